"""A merged model → a Hugging Face folder in full precision: safetensors shards, config, tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from adaptrt.convert.base import Progress
from adaptrt.convert.folders import new_folder, write_json, write_safetensors
from adaptrt.convert.hf_tokenizer import SPECIALS
from adaptrt.convert.merge import MergedModel, naming_tensor
from adaptrt.model.architecture import Architecture, TensorSpec
from adaptrt.quant.plain import plain_bytes
from adaptrt.tensor import PLAIN_ITEM_BYTES

FullDtype = Literal["f32", "bf16", "f16"]
TORCH_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
SHARD_BYTES = 5 * 10**9  # as transformers cuts them


def write_hf(
    model: MergedModel, architecture: Architecture, out: Path, dtype: FullDtype, progress: Progress
) -> None:
    """Write `out`, a new folder that transformers loads. Raises ConvertError for a value beyond the dtype's range."""
    shards, total = _shards(model.specs, dtype), sum(prod(spec.shape) for spec in model.specs)
    done = 0

    def pieces(spec: TensorSpec) -> Iterator[NDArray[np.uint8]]:
        nonlocal done
        for chunk in model.chunks(spec):
            with naming_tensor(spec):
                encoded = plain_bytes(chunk, dtype)
            yield encoded
            done += chunk.size
            progress(done, total, spec.hf_name)

    with new_folder(out) as folder:
        _write_text(model, architecture, folder, dtype)
        names: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            name = "model.safetensors"
            if len(shards) > 1:
                name = f"model-{number:05}-of-{len(shards):05}.safetensors"
            shapes = {spec.hf_name: (dtype, spec.shape) for spec in shard}
            write_safetensors(folder / name, shapes, (pieces(spec) for spec in shard))
            names |= dict.fromkeys(shapes, name)
        if len(shards) > 1:
            size = total * PLAIN_ITEM_BYTES[dtype]
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
            write_json(folder / "model.safetensors.index.json", index)


def _shards(specs: tuple[TensorSpec, ...], dtype: str) -> list[list[TensorSpec]]:
    """Tensors in file order, cut where a shard would become too large."""
    shards: list[list[TensorSpec]] = [[]]
    room = SHARD_BYTES
    for spec in specs:
        nbytes = prod(spec.shape) * PLAIN_ITEM_BYTES[dtype]
        if nbytes > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(spec)
        room -= nbytes
    return shards


def _write_text(model: MergedModel, architecture: Architecture, folder: Path, dtype: str) -> None:
    """config.json, generation_config.json and what the base file has of the tokenizer."""
    metadata = model.metadata
    ids: dict[str, Any] = {}
    for name in SPECIALS:
        found = metadata.get(f"tokenizer.{name}_token_id")
        if name == "eos":
            found = metadata.get("tokenizer.eos_token_ids")
            found = found[0] if found and len(found) == 1 else found
        if found is not None:
            ids[f"{name}_token_id"] = found
    write_json(folder / "config.json", architecture.config(metadata) | {"dtype": TORCH_NAMES[dtype]} | ids)
    write_json(folder / "generation_config.json", ids)
    if "tokenizer" not in model.file.sections:
        return
    content = model.file.tensor("tokenizer", "tokenizer.json").data.tobytes()
    (folder / "tokenizer.json").write_bytes(content)
    tokens = {f"{name}_token": metadata.get(f"tokenizer.{name}_token") for name in SPECIALS}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | {
        k: v for k, v in tokens.items() if v is not None
    }
    write_json(folder / "tokenizer_config.json", settings)
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
