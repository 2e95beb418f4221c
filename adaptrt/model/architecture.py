"""The seam for model architectures: a declarative description from a config to tensor names and a Program."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from adaptrt.errors import ModelError
from adaptrt.program import Program

Role = Literal["linear", "embedding", "head", "norm", "bias"]
Metadata = Mapping[str, Any]  # GGUF-style keys: "llama.block_count"


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of the model: its name in the file, in the Hugging Face folder, its shape and what it is for."""

    name: str
    hf_name: str
    shape: tuple[int, ...]
    role: Role

    @property
    def target(self) -> str:
        """The attach point's name: the tensor's without `.weight`."""
        return self.name.removesuffix(".weight")


class Architecture(ABC):
    """Describes one model family."""

    name: str  # general.architecture: "llama"
    hf_architectures: tuple[str, ...]  # config.json's "architectures": ("LlamaForCausalLM",)
    hf_head: str = "lm_head"  # the head's module path, for adapters of a head that is tied and has no tensor

    @abstractmethod
    def metadata(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json → GGUF-style metadata. Raises ConvertError naming any option that cannot be honoured."""

    @abstractmethod
    def tensors(self, metadata: Metadata) -> tuple[TensorSpec, ...]:
        """Every tensor of the model, in file order. A tied head is absent."""

    @abstractmethod
    def program(self, metadata: Metadata) -> Program:
        """The computation. Raises ModelError naming a missing or impossible metadata key."""

    def config(self, metadata: Metadata) -> dict[str, Any]:
        """A config.json that transformers reads, the inverse of `metadata`. Raises ModelError where there is none."""
        raise ModelError(f"architecture {self.name!r} cannot be written as a Hugging Face folder")

    def untied(self, metadata: Metadata) -> dict[str, Any]:
        """The metadata with a head of its own beside the embedding. Raises ModelError where that cannot be."""
        raise ModelError(f"architecture {self.name!r} has no head apart from its embedding")
