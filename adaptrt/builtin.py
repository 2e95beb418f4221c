"""What adaptrt itself offers, through the same hooks as anyone's plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adaptrt.hookspecs import hookimpl

if TYPE_CHECKING:
    from adaptrt.adapters.variant import Variant
    from adaptrt.backends.base import Backend
    from adaptrt.convert.base import Importer
    from adaptrt.model.architecture import Architecture


@hookimpl
def adaptrt_variants() -> list[Variant]:
    """LoRA."""
    from adaptrt.adapters.lora import LoraVariant

    return [LoraVariant()]


@hookimpl
def adaptrt_backends() -> list[Backend]:
    """The native CPU and CUDA backends, and the numpy reference they are tested against."""
    from adaptrt.backends.cpu import CpuBackend
    from adaptrt.backends.cuda import CudaBackend
    from adaptrt.backends.reference import ReferenceBackend

    return [CpuBackend(), CudaBackend(), ReferenceBackend()]


@hookimpl
def adaptrt_architectures() -> list[Architecture]:
    """The Llama family."""
    from adaptrt.model.llama import LlamaArchitecture

    return [LlamaArchitecture()]


@hookimpl
def adaptrt_importers() -> list[Importer]:
    """Hugging Face model folders and PEFT adapter folders."""
    from adaptrt.convert.hf import HfImporter
    from adaptrt.convert.peft import PeftImporter

    return [HfImporter(), PeftImporter()]
