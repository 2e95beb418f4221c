"""Hugging Face model folders (config.json, safetensors, tokenizer) → one `.adrt` file, tensor by tensor.

Memory stays bounded by a few read buffers plus one scale per 64 weights of the largest tensor.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adaptrt.backends.native_quant import best_kernels
from adaptrt.convert import bitsandbytes
from adaptrt.convert.base import ConvertOptions, Progress
from adaptrt.convert.files import JSON_LIMIT, read_json, shown
from adaptrt.convert.hf_tokenizer import read_text_files
from adaptrt.convert.safetensors import Checkpoint, same_bytes
from adaptrt.errors import ConvertError
from adaptrt.format import Writer
from adaptrt.model.architecture import Architecture, TensorSpec
from adaptrt.quant.encode import Encoder, Kernels
from adaptrt.quant.finite import NotFiniteError, require_finite
from adaptrt.tensor import Tensor

log = logging.getLogger("adaptrt.convert")

# Tensors that old checkpoints carry and that config.json already determines.
INERT = re.compile(r"rotary_emb\.inv_freq$")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SHOWN_PROBLEMS = 3


class HfImporter:
    """Imports a Hugging Face model folder."""

    name = "hf"

    def claims(self, path: Path) -> bool:
        """A folder with config.json, which is no adapter folder."""
        has = {name: os.path.isfile(path / name) for name in ("config.json", "adapter_config.json")}  # noqa: PTH113
        return has["config.json"] and not has["adapter_config.json"]

    def convert(self, src: Path, out: Path, options: ConvertOptions, progress: Progress) -> None:
        """See Importer.convert."""
        src = Path(src)
        if not (src / "config.json").exists():
            raise ConvertError(f"{src}: not a Hugging Face model folder, it has no config.json")
        for key in ("base", "adapter_dtype", "initial"):
            if getattr(options, key) is not None:
                raise ConvertError(f"{src}: is a model folder; option {key} goes with an adapter folder")
        config = read_json(src / "config.json", JSON_LIMIT)
        architecture = _architecture(src, config, options.architectures)
        metadata = _metadata(src, config, architecture, options)
        specs = architecture.tensors(metadata)
        vocab_size = next(spec.shape[0] for spec in specs if spec.role == "embedding")
        text = read_text_files(src, config, vocab_size)
        with Checkpoint(src) as checkpoint:
            plan = _plan(src, checkpoint, specs, config, options)
            with Writer(out, metadata=metadata | text.metadata) as writer:
                _write_base(writer, src, checkpoint, plan, progress)
                if text.tokenizer is not None:
                    _write_tokenizer(writer, text.tokenizer)
        if text.tokenizer is None:
            log.warning("%s: no tokenizer.json, the file takes token ids but no text", src)


@dataclass(frozen=True)
class _Job:
    """One tensor to write: `packed` ones are copied, the others encoded to `dtype`."""

    spec: TensorSpec
    dtype: str
    packed: bool


def _architecture(
    src: Path, config: Mapping[str, Any], installed: Mapping[str, Architecture]
) -> Architecture:
    names, model_type = config.get("architectures"), config.get("model_type")
    if names is None and isinstance(model_type, str) and model_type in installed:
        return installed[model_type]
    for architecture in installed.values():
        if isinstance(names, list) and names and names[0] in architecture.hf_architectures:
            return architecture
    known = ", ".join(name for architecture in installed.values() for name in architecture.hf_architectures)
    raise ConvertError(f"{src}: config.json has architectures {shown(names)}, expected one of {known}")


def _metadata(
    src: Path, config: Mapping[str, Any], architecture: Architecture, options: ConvertOptions
) -> dict[str, Any]:
    """The model's metadata. Its name comes from the input's content, never from where it lies."""
    quantization = config.get("quantization_config")
    if quantization is not None:
        if not isinstance(quantization, Mapping):
            raise ConvertError(f"{src}: config.json has a quantization_config that is no object")
        bitsandbytes.check_config(quantization)
    metadata = architecture.metadata(config)
    metadata["general.type"] = "model"
    origin = config.get("_name_or_path")
    name = options.name
    if name is None and isinstance(origin, str):
        name = re.split(r"[/\\]", origin.rstrip("/\\"))[-1]
    return metadata | ({"general.name": name} if name else {})


# Planning: every tensor is consumed or refused before anything is written


def _plan(
    src: Path,
    checkpoint: Checkpoint,
    specs: tuple[TensorSpec, ...],
    config: Mapping[str, Any],
    options: ConvertOptions,
) -> list[_Job]:
    quantized = config.get("quantization_config") is not None
    jobs = [_job(src, checkpoint, spec, quantized, options) for spec in specs]
    wanted = {job.spec.hf_name for job in jobs}
    wanted |= {job.spec.hf_name + end for job in jobs if job.packed for end in bitsandbytes.SUFFIXES}
    present = set(checkpoint.names)
    extra = {name for name in present - wanted if not INERT.search(name)}
    if HEAD in extra and EMBEDDING in checkpoint and same_bytes(checkpoint, HEAD, EMBEDDING):
        extra.discard(HEAD)  # a tied head that was saved all the same
    groups = {
        "missing tensors": [shown(name) for name in sorted(wanted - present)],
        "unexpected tensors": [shown(name) for name in sorted(extra)],
        "wrong tensors": [text for job in jobs if (text := _mismatch(checkpoint, job))],
    }
    problems = [f"{what}: {_few(items)}" for what, items in groups.items() if items]
    if problems:
        raise ConvertError(f"{src}: {'; '.join(problems)}")
    return jobs


def _job(
    src: Path, checkpoint: Checkpoint, spec: TensorSpec, quantized: bool, options: ConvertOptions
) -> _Job:
    in_head = spec.role in ("embedding", "head")
    if quantized and bitsandbytes.is_packed(checkpoint, spec):
        asked = options.head if in_head else options.dtype
        if asked not in (None, "nf4"):
            raise ConvertError(
                f"{src}: tensor {shown(spec.hf_name)} is nf4 already, it cannot become {asked}"
            )
        return _Job(spec, "nf4", packed=True)
    if in_head:
        return _Job(spec, options.head_dtype, packed=False)
    return _Job(spec, options.linear_dtype if spec.role == "linear" else "f32", packed=False)


def _mismatch(checkpoint: Checkpoint, job: _Job) -> str | None:
    name = job.spec.hf_name
    if job.packed or name not in checkpoint:
        return None
    dtype, shape = checkpoint.info(name)
    if shape != job.spec.shape:
        return f"{shown(name)} is {list(shape)}, config.json makes it {list(job.spec.shape)}"
    if dtype not in ("f32", "f16", "bf16"):
        return f"{shown(name)} is {dtype}, expected f32, f16 or bf16"
    return None


def _few(items: list[str]) -> str:
    more = f" and {len(items) - SHOWN_PROBLEMS} more" if len(items) > SHOWN_PROBLEMS else ""
    return ", ".join(items[:SHOWN_PROBLEMS]) + more


# Writing


def _write_base(
    writer: Writer, src: Path, checkpoint: Checkpoint, plan: list[_Job], progress: Progress
) -> None:
    kernels = best_kernels()
    total = sum(checkpoint.nbytes(job.spec.hf_name) for job in plan)
    done = 0
    with writer.section("base", kind="base") as section:
        for job in plan:
            with section.stream(job.spec.name, job.dtype, job.spec.shape) as out:
                if job.packed:
                    bitsandbytes.write_packed(checkpoint, job.spec, out)
                else:
                    _encode(src, checkpoint, job, kernels, out)
            done += checkpoint.nbytes(job.spec.hf_name)
            progress(done, total, job.spec.name)


def _encode(src: Path, checkpoint: Checkpoint, job: _Job, kernels: Kernels, out: bitsandbytes.Output) -> None:
    encoder = Encoder(job.dtype, job.spec.shape, kernels)
    try:
        done = 0
        for chunk in checkpoint.chunks(job.spec.hf_name):
            if job.dtype not in ("nf4", "int8"):  # these two find it out themselves
                _require_finite(chunk, done)
            out.write(encoder.feed(chunk))
            done += chunk.size
        out.write(encoder.finish())
    except ValueError as error:  # not finite, or beyond the range of f16
        raise ConvertError(f"{src}: tensor {shown(job.spec.hf_name)}: {error}") from error


def _require_finite(chunk: NDArray[np.float32], done: int) -> None:
    try:
        require_finite(chunk)
    except NotFiniteError as error:
        raise NotFiniteError(done + error.index, error.value) from None


def _write_tokenizer(writer: Writer, tokenizer: bytes) -> None:
    """The tokenizer as its own section; not critical, since token ids run without it."""
    with writer.section("tokenizer", kind="tokenizer", critical=False, codec="zstd") as section:
        content = np.frombuffer(tokenizer, np.uint8)
        section.add("tokenizer.json", Tensor("u8", content.shape, content))
