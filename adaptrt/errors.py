"""The named ways things fail. Every message is one line: the thing, what was found, what was expected."""

from __future__ import annotations


class AdaptrtError(Exception):
    """Base of every error adaptrt raises on purpose; the CLI prints it as one line and exits with 1."""


class FormatError(AdaptrtError):
    """An `.adrt` file breaks a rule of spec/format.md."""


class NotAdrtError(FormatError):
    """The file does not start with the magic bytes `ADRT`."""


class VersionError(FormatError):
    """The file is of a format version this build does not read."""


class TruncatedError(FormatError):
    """The file ends before something it promises."""


class ChecksumError(FormatError):
    """Stored bytes do not match their recorded digest."""


class LimitError(FormatError):
    """A declared size or count exceeds a limit of the format or of the file itself."""


class MissingError(FormatError):
    """The file has no section, tensor or metadata key of that name."""


class ConvertError(AdaptrtError):
    """A foreign file or folder cannot be imported."""


class ModelError(AdaptrtError):
    """A model's metadata, tensors or architecture cannot be run."""


class AdapterError(AdaptrtError):
    """An adapter cannot be imported, loaded or applied."""


class BaseMismatchError(AdapterError):
    """An adapter belongs to another base model."""


class UnknownAdapterError(AdapterError):
    """No adapter of that name is loaded or stored."""


class ContextError(AdaptrtError):
    """A prompt and its requested continuation do not fit into the model's context."""


class RequestError(AdaptrtError):
    """A generation request has an impossible parameter."""


class BackendError(AdaptrtError):
    """A backend is unavailable, refused its input or ran out of memory."""


class UnavailableError(BackendError):
    """A backend lacks its device, or does not offer what was asked of it: another backend may."""


class NoMemoryError(BackendError):
    """A backend ran out of its memory."""


class PluginError(AdaptrtError):
    """A plugin is broken or collides with another."""


class ClosedError(AdaptrtError):
    """The model was used after `close()`."""
