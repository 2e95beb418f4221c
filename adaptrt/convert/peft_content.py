"""The tensors of a PEFT folder, sorted by the base's modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from adaptrt.adapters.base import BaseTarget, BaseView
from adaptrt.adapters.check import PEFT_PREFIX, plain_key
from adaptrt.adapters.problems import Problems, brief
from adaptrt.adapters.variant import Target
from adaptrt.convert.safetensors import SafetensorsFile
from adaptrt.tensor import Tensor


class Lazy(Mapping[str, Tensor]):
    """Tensors by name, each loaded when it is indexed."""

    def __init__(self, content: Content, keys: Mapping[str, str]) -> None:
        self._content, self._keys = content, keys

    def __getitem__(self, name: str) -> Tensor:
        return self._content.load(self._keys[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


@dataclass
class Part:
    """What the file holds for one module: `keys` still to be taken by suffix, and what was taken."""

    base: BaseTarget
    keys: dict[str, str]
    params: dict[str, Any] = field(default_factory=dict)
    roles: dict[str, str] = field(default_factory=dict)  # role → PEFT key


class Content:
    """The keys of an adapter's weights, sorted by the base's modules."""

    def __init__(self, file: SafetensorsFile, base: BaseView, problems: Problems) -> None:
        self.file = file
        self._base = base
        self.notes: list[str] = []
        self.parts: dict[str, Part] = {}  # by module path
        self.shared: dict[str, str] = {}  # keys of no module, by themselves
        self._loaded: dict[str, Tensor] = {}
        for key in file.names:
            module, suffix = _split(key, base)
            if module is None and key.startswith(PEFT_PREFIX):
                problems.add(f"{brief(key)} belongs to no module of the base that can be adapted")
                continue
            if module is None:
                self.shared[suffix] = key
                continue
            part = self.part(module)
            if part.keys.setdefault(suffix, key) != key:
                problems.add(f"{brief(key)} and {brief(part.keys[suffix])} name the same tensor")
        self.parts = {module: self.parts[module] for module in base.modules if module in self.parts}

    def part(self, module: str) -> Part:
        """What there is for a module of the base."""
        return self.parts.setdefault(module, Part(self._base.modules[module], {}))

    def load(self, key: str) -> Tensor:
        """A tensor by its PEFT key, read once."""
        if key not in self._loaded:
            self._loaded[key] = self.file.tensor(key)
        return self._loaded[key]

    def add(self, key: str, tensor: Tensor) -> None:
        """Take a tensor of no module that the file does not hold."""
        self.shared[key] = key
        self._loaded[key] = tensor

    def targets(self) -> list[Target]:
        """What was resolved, in the base's order of modules."""
        parts = [self.parts[module] for module in self._base.modules if module in self.parts]
        return [Target(part.base.target, part.params, part.roles) for part in parts if part.roles]


def _split(key: str, base: BaseView) -> tuple[str | None, str]:
    """A PEFT key as (module path, suffix); (None, key) when no module of the base is in it."""
    plain = plain_key(key)
    path = plain.removeprefix(PEFT_PREFIX)
    end = len(path) if path != plain else 0
    while end > 0:
        end = path.rfind(".", 0, end)
        if path[: max(end, 0)] in base.modules:
            return path[:end], path[end + 1 :]
    return None, plain
