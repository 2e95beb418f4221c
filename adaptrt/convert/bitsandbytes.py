"""bitsandbytes 4-bit checkpoints: their bytes go into nf4 tensors verbatim, nothing is requantized.

The keys behind a weight are the suffixes below, as bitsandbytes' QuantState.as_dict(packed=True) writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, Protocol

import numpy as np

from adaptrt.convert.files import parse_object, shown
from adaptrt.convert.safetensors import Checkpoint
from adaptrt.errors import ConvertError
from adaptrt.model.architecture import TensorSpec
from adaptrt.quant.tables import DYNAMIC_MAP, NF4_CODEBOOK
from adaptrt.tensor import BLOCK, NESTED_BLOCK, Nf4Layout, Tensor

STATE = ".quant_state.bitsandbytes__nf4"
SUFFIXES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
STATE_LIMIT = 1 << 16  # bytes of its JSON; real ones have about 200
COMPUTE_DTYPES = ("float32", "float16", "bfloat16")  # what bitsandbytes casts to; we keep float32
INSTEAD = "; convert the model as it was before it was quantized"


class Output(Protocol):
    """Where a tensor's bytes go."""

    def write(self, chunk: Any) -> None:
        """Append bytes."""


def check_config(quantization: Mapping[str, Any]) -> None:
    """Refuse a config.json quantization_config that is not bitsandbytes' NF4 with double quantization.

    Raises ConvertError.
    """
    method = quantization.get("quant_method", "bitsandbytes" if "load_in_4bit" in quantization else None)
    if method != "bitsandbytes":
        raise ConvertError(
            f"config.json: quantization_config has quant_method {shown(method)}, expected bitsandbytes{INSTEAD}"
        )
    for key, expected in (
        ("load_in_4bit", True),
        ("load_in_8bit", False),
        ("bnb_4bit_quant_type", "nf4"),
        ("bnb_4bit_use_double_quant", True),
        ("bnb_4bit_quant_storage", "uint8"),
    ):
        found = quantization.get(key, expected)
        if found != expected:
            raise ConvertError(
                f"config.json: quantization_config has {key} {shown(found)}, expected {expected!r}{INSTEAD}"
            )


def is_packed(checkpoint: Checkpoint, spec: TensorSpec) -> bool:
    """Whether this weight is stored in bitsandbytes' NF4."""
    return f"{spec.hf_name}{STATE}" in checkpoint


def write_packed(checkpoint: Checkpoint, spec: TensorSpec, out: Output) -> None:
    """Copy a weight's parts to `out` in nf4 layout. Raises ConvertError for one that is not standard NF4."""
    layout, name = Nf4Layout(prod(spec.shape)), spec.hf_name
    offset = _check_state(checkpoint, spec)
    _check_map(checkpoint, f"{name}.quant_map", NF4_CODEBOOK)
    _check_map(checkpoint, f"{name}.nested_quant_map", DYNAMIC_MAP)
    nested = _part(checkpoint, f"{name}.nested_absmax", "f32", (layout.nested_blocks,)).data
    if not np.isfinite(nested.view(np.float32)).all():
        raise ConvertError(f"{_where(checkpoint, name + '.nested_absmax')} has a value that is not finite")
    out.write(_part(checkpoint, name, "u8", (layout.code_bytes, 1)).data)
    out.write(np.zeros(layout.absmax_offset - layout.code_bytes, np.uint8))
    out.write(_part(checkpoint, f"{name}.absmax", "u8", (layout.blocks,)).data)
    out.write(np.zeros(layout.nested_offset - layout.absmax_offset - layout.blocks, np.uint8))
    out.write(nested)
    out.write(np.array([offset], "<f4"))


def _check_state(checkpoint: Checkpoint, spec: TensorSpec) -> float:
    """Check the packed JSON against the config's shape; returns the mean that was taken off every absmax."""
    name = f"{spec.hf_name}{STATE}"
    where, (dtype, shape) = _where(checkpoint, name), checkpoint.info(name)
    if dtype != "u8" or prod(shape) > STATE_LIMIT:
        raise ConvertError(f"{where} is {dtype} {list(shape)}, expected at most {STATE_LIMIT} bytes of u8")
    state = parse_object(checkpoint.tensor(name).data.tobytes(), where)
    expected: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "shape": list(spec.shape),
    }
    for key, value in expected.items():
        if state.get(key) != value:
            raise ConvertError(f"{where}: {key} is {shown(state.get(key))}, expected {value!r}")
    if state.get("dtype") not in COMPUTE_DTYPES:
        names = ", ".join(COMPUTE_DTYPES)
        raise ConvertError(f"{where}: dtype is {shown(state.get('dtype'))}, expected one of {names}")
    unknown = sorted(set(state) - set(expected) - {"dtype", "nested_offset"})
    if unknown:
        raise ConvertError(f"{where} has a key {shown(unknown[0])}, which NF4 does not have")
    offset: object = state.get("nested_offset")
    if type(offset) is not float or not _is_float32(offset):
        raise ConvertError(f"{where}: nested_offset is {shown(offset)}, expected a float32 number")
    return offset


def _is_float32(value: float) -> bool:
    return abs(value) <= float(np.finfo(np.float32).max) and float(np.float32(value)) == value


def _check_map(checkpoint: Checkpoint, name: str, table: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    if not np.array_equal(_part(checkpoint, name, "f32", table.shape).data, table.view(np.uint8)):
        raise ConvertError(f"{_where(checkpoint, name)} is not the standard table of {table.size} values")


def _part(checkpoint: Checkpoint, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    found = checkpoint.info(name)
    if found != (dtype, shape):
        raise ConvertError(
            f"{_where(checkpoint, name)} is {found[0]} {list(found[1])}, expected {dtype} {list(shape)}"
        )
    return checkpoint.tensor(name)


def _where(checkpoint: Checkpoint, name: str) -> str:
    return f"{checkpoint.folder}: tensor {shown(name)}"
