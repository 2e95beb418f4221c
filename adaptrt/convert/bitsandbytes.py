"""bitsandbytes 4-bit checkpoints: their bytes go into nf4 tensors verbatim, nothing is requantized.

The keys behind a weight are the suffixes below, as bitsandbytes' QuantState.as_dict(packed=True) writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite, prod
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
COMPUTE_DTYPES = ("float32", "float16", "bfloat16")  # what bitsandbytes casts to; we keep float32


class Output(Protocol):
    """Where a tensor's bytes go."""

    def write(self, chunk: Any) -> None:
        """Append bytes."""


def check_config(quantization: Mapping[str, Any]) -> None:
    """Refuse a config.json quantization_config that is not bitsandbytes NF4. Raises ConvertError."""
    method = quantization.get("quant_method", "bitsandbytes" if "load_in_4bit" in quantization else None)
    if method != "bitsandbytes":
        raise ConvertError(
            f"config.json: quantization_config has quant_method {method!r}, expected bitsandbytes"
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
            raise ConvertError(f"config.json: quantization_config has {key} {found!r}, expected {expected!r}")


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
        raise ConvertError(f"tensor {shown(name + '.nested_absmax')} has a value that is not finite")
    out.write(_part(checkpoint, name, "u8", (layout.code_bytes, 1)).data)
    out.write(bytes(layout.absmax_offset - layout.code_bytes))
    out.write(_part(checkpoint, f"{name}.absmax", "u8", (layout.blocks,)).data)
    out.write(bytes(layout.nested_offset - layout.absmax_offset - layout.blocks))
    out.write(nested)
    out.write(np.array([offset], "<f4"))


def _check_state(checkpoint: Checkpoint, spec: TensorSpec) -> float:
    """Check the packed JSON against the config's shape; returns the mean that was taken off every absmax."""
    name = f"{spec.hf_name}{STATE}"
    dtype, _ = checkpoint.info(name)
    if dtype != "u8":
        raise ConvertError(f"tensor {shown(name)} is {dtype}, expected u8")
    state = parse_object(checkpoint.tensor(name).data.tobytes(), f"tensor {shown(name)}")
    expected: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "shape": list(spec.shape),
    }
    for key, value in expected.items():
        if state.get(key) != value:
            raise ConvertError(f"tensor {shown(name)}: {key} is {state.get(key)!r}, expected {value!r}")
    unknown = set(state) - set(expected) - {"dtype", "nested_offset"}
    if unknown or state.get("dtype") not in COMPUTE_DTYPES:
        raise ConvertError(
            f"tensor {shown(name)}: dtype is {state.get('dtype')!r} and unknown keys are {sorted(unknown)}, "
            f"expected {', '.join(COMPUTE_DTYPES)} and none"
        )
    offset: object = state.get("nested_offset")
    if type(offset) is not float or not isfinite(offset) or float(np.float32(offset)) != offset:
        raise ConvertError(f"tensor {shown(name)}: nested_offset is {offset!r}, expected a float32 number")
    return offset


def _check_map(checkpoint: Checkpoint, name: str, table: np.ndarray[Any, np.dtype[np.float32]]) -> None:
    if not np.array_equal(_part(checkpoint, name, "f32", table.shape).data, table.view(np.uint8)):
        raise ConvertError(f"tensor {shown(name)} is not the standard table of {table.size} values")


def _part(checkpoint: Checkpoint, name: str, dtype: str, shape: tuple[int, ...]) -> Tensor:
    found = checkpoint.info(name)
    if found != (dtype, shape):
        raise ConvertError(
            f"tensor {shown(name)} is {found[0]} {list(found[1])}, expected {dtype} {list(shape)}"
        )
    return checkpoint.tensor(name)
