"""The `.adrt` file (spec/format.md): bytes to and from named tensors and metadata. Knows no model."""

from adaptrt.format.appender import Appender, append
from adaptrt.format.index import Section, TensorEntry
from adaptrt.format.reader import File, open_file
from adaptrt.format.section import SectionWriter
from adaptrt.format.verifier import verify
from adaptrt.format.writer import Writer

__all__ = [
    "Appender",
    "File",
    "Section",
    "SectionWriter",
    "TensorEntry",
    "Writer",
    "append",
    "open_file",
    "verify",
]
