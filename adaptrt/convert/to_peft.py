"""An adapter of an `.adrt` file → a PEFT folder: the stored tensors and the config's text, as they are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from adaptrt.adapters.check import find_variant, plain_key
from adaptrt.adapters.stored import QUANTIZED, declared_form
from adaptrt.adapters.variant import Adapter, Variant
from adaptrt.convert.files import parse_object
from adaptrt.convert.folders import new_folder, write_safetensors
from adaptrt.convert.peft import CONFIG, WEIGHTS
from adaptrt.convert.peft_carried import SAVED_AGAIN
from adaptrt.errors import AdapterError
from adaptrt.tensor import Tensor


def export_peft(adapter: Adapter, variants: Mapping[str, Variant], out: Path) -> list[str]:
    """Write `out`, a new folder that PEFT loads; returns notes on what could not stay as it was stored.

    Raises AdapterError for an adapter that has no PEFT config, or whose tensors PEFT would not tell apart.
    """
    what = f"adapter {adapter.name!r}"
    if not parse_object(adapter.config_text.encode(), f"{what}: its config").get("peft_type"):
        raise AdapterError(f"{what}: its config has no peft_type, so PEFT cannot say what it is")
    plain = _plain_tensors(adapter, find_variant(adapter, variants))
    tensors = {plain_key(name).replace(f".{SAVED_AGAIN}", ".weight"): plain[name] for name in sorted(plain)}
    if len(tensors) < len(plain):
        raise AdapterError(
            f"{what}: two tensors have one name without the adapter's name 'default' and wrappers'"
        )
    shapes = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    with new_folder(out) as folder:
        (folder / CONFIG).write_bytes(adapter.config_text.encode())
        pieces = ([np.ascontiguousarray(tensor.data)] for tensor in tensors.values())
        write_safetensors(folder / WEIGHTS, shapes, pieces)
    packed = sorted({tensor.dtype for tensor in adapter.tensors.values()} & set(QUANTIZED))
    return [f"PEFT has no {' and no '.join(packed)}: these tensors became f32"] if packed else []


def _plain_tensors(adapter: Adapter, variant: Variant) -> dict[str, Tensor]:
    """Every tensor in a dtype and shape that PEFT knows, without what we computed from the base."""
    found = {}
    for target in adapter.targets:
        for role, name in target.tensors.items():
            if role in variant.derived:
                continue
            found[name] = declared_form(adapter.tensors[name], variant.roles.get(role, ()))
    return found
