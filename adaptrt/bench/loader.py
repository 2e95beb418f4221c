"""Loads what is timed, always on the backend that took the first: `auto` is decided once."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from adaptrt.adapters.base import BaseView
from adaptrt.backends.base import Backend, Executable, LoadOptions, Precision
from adaptrt.backends.choose import load_executable
from adaptrt.bench.subject import Cost, Subject
from adaptrt.program import Program
from adaptrt.tensor import Tensor

PAGE_TOKENS = LoadOptions.page_tokens


@dataclass
class Loader:
    """`choice` is what --backend says until something was loaded, then the backend that was found."""

    backends: Mapping[str, Backend]
    choice: str
    options: LoadOptions
    cleanup: ExitStack = field(default_factory=ExitStack)

    def load(
        self, program: Program, tensors: Mapping[str, Tensor], precision: Precision | None = None
    ) -> Executable:
        """The program, until `cleanup` closes it. Raises BackendError."""
        options = replace(self.options, precision=precision or self.options.precision)
        executable, self.choice = load_executable(self.backends, self.choice, program, tensors, options)
        self.cleanup.callback(executable.close)
        return executable

    def subject(self, base: BaseView, precision: Precision | None = None) -> Subject:
        """A whole model."""
        weights = base.weights()
        executable = self.load(base.program, weights, precision)
        return Subject(executable, Cost.of(base.program, weights), PAGE_TOKENS, base.program.vocab_size)

    @property
    def torch_device(self) -> str:
        """What torch calls the device."""
        name, _, device = self.choice.partition(":")
        return {"cuda": f"cuda:{device or 0}", "torch": device or "cpu"}.get(name, "cpu")
