"""What every adapter must satisfy before it is lowered, be it from a PEFT folder or from a file."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.carried import BIAS, CARRIED, ROWS, check_carried
from adaptrt.adapters.invocation import check_invocation
from adaptrt.adapters.problems import Problems, brief
from adaptrt.adapters.stored import QUANTIZED, is_factor, stored_dims
from adaptrt.adapters.variant import Adapter, BaseWeight, Params, Target, Variant
from adaptrt.errors import AdapterError
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

PEFT_PREFIX = "base_model.model."
# What a raw state dict has and PEFT leaves out when it saves, and what torch.compile, FSDP and activation checkpointing
# put into the paths of a base that was wrapped before PEFT saw it.
_NO_PART_OF_A_KEY = re.compile(
    r"\.default(?=\.|$)|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)

_INTEGERS = ("u8", "i32", "f32")
# dtype → the integer view of an item and its exponent bits, which are all ones for NaN and infinity only
_EXPONENT = {"f32": (np.uint32, 0x7F800000), "f16": (np.uint16, 0x7C00), "bf16": (np.uint16, 0x7F80)}


def plain_key(key: str) -> str:
    """A PEFT key without the adapter's name `default` and the names of wrappers around the base's modules."""
    return _NO_PART_OF_A_KEY.sub("", key)


def find_variant(adapter: Adapter, variants: Mapping[str, Variant]) -> Variant:
    """The adapter's variant. Raises AdapterError naming the missing plugin."""
    if adapter.variant not in variants:
        installed = ", ".join(sorted(variants)) or "none"
        raise AdapterError(
            f"adapter {adapter.name!r}: needs a plugin for variant {brief(adapter.variant)}, "
            f"installed: {installed}"
        )
    return variants[adapter.variant]


def check_adapter(
    adapter: Adapter, variant: Variant, base: Mapping[str, BaseWeight], problems: Problems
) -> None:
    """Every target exists in the base (`base` by target name), and its params and tensors fit the variant."""
    if not adapter.targets:
        problems.add("it adapts nothing")
    vocabulary = next((target.shape[0] for target in base.values() if target.kind == "embedding"), None)
    check_invocation(adapter, vocabulary, problems)
    for target in adapter.targets:
        if target.target not in base:
            problems.add(f"target {brief(target.target)}: the base has no such tensor to adapt")
            continue
        check_target(target, adapter.tensors, variant, base[target.target], problems.about(target.target))


def check_target(
    target: Target,
    tensors: Mapping[str, Tensor],
    variant: Variant,
    base: BaseWeight,
    problems: Problems,
) -> None:
    """One target's params, roles, shapes and values; `tensors` by PEFT name."""
    roles = {role: tensors[name] for role, name in target.tensors.items()}
    labels = {role: name.removeprefix(PEFT_PREFIX) for role, name in target.tensors.items()}
    carried = {role: roles.pop(role) for role in CARRIED if role in roles}
    for role, tensor in carried.items():
        if tensor.dtype in _dtypes(role, variant):  # else it is refused below
            check_carried(role, labels[role], tensor, target.params, base, problems)
        beside = role == ROWS and variant.adds and base.kind == "head"
        if CARRIED[role].alone and len(target.tensors) - (BIAS in carried) > 1 and not beside:
            problems.add(f"{labels[role]} replaces what other tensors of the target change")
    brought = {name for role in carried for name in CARRIED[role].params}
    params = {name: value for name, value in target.params.items() if name not in brought}
    _check_params(params, variant.params if roles or not carried else {}, variant.name, problems)
    if roles or not carried:
        _check_roles(roles, labels, variant, params, base, problems)
    for role, name in target.tensors.items():
        dtypes = _dtypes(role, variant)
        if tensors[name].dtype in dtypes:
            check = _check_integers if role in variant.integers else _check_values
            check(labels[role], tensors[name], problems)
        else:
            found, expected = tensors[name].dtype, ", ".join(dtypes)
            problems.add(f"{labels[role]} is of dtype {found}, expected {expected}")


def sizes(base: BaseWeight) -> dict[str, int]:
    """The base's `out` and `in`: an embedding maps its vocabulary (its rows) to its width."""
    rows, cols = base.shape
    return {"out": cols, "in": rows} if base.kind == "embedding" else {"out": rows, "in": cols}


def _check_params(params: Params, types: Mapping[str, type], variant: str, problems: Problems) -> None:
    for name in sorted(params.keys() ^ types.keys()):
        what = "missing" if name in types else f"unknown to variant {variant}"
        problems.add(f"param {brief(name)[1:-1]} is {what}")
    for name, expected in types.items():
        value = params.get(name)
        if name in params and not _is_a(value, expected):
            problems.add(f"param {name} is {brief(value)}, expected {_EXPECTED[expected]}")


_EXPECTED = {int: "a whole number above 0", float: "a finite number", str: "a string", bool: "true or false"}


def _is_a(value: object, expected: type) -> bool:
    if expected is float:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]
    return type(value) is expected and (expected is not int or value > 0)  # type: ignore[operator]


def _check_roles(
    roles: Mapping[str, Tensor],
    labels: Mapping[str, str],
    variant: Variant,
    params: Params,
    base: BaseWeight,
    problems: Problems,
) -> None:
    for role in sorted(variant.roles.keys() - variant.optional - variant.derived - roles.keys()):
        problems.add(f"tensor {role} is missing")
    known = {name: int(value) for name, value in params.items() if type(value) is int} | sizes(base)
    for role, tensor in roles.items():
        if role in variant.roles:
            dims = stored_dims(variant.roles[role], tensor.dtype)
            _check_shape(labels[role], tensor, dims, known, problems)
        else:
            problems.add(f"role {brief(role)} is unknown to variant {variant.name}")


def _check_shape(
    label: str, tensor: Tensor, dims: tuple[str | int, ...], known: dict[str, int], problems: Problems
) -> None:
    """Compare a shape with its dims; a name not yet known takes the size found here."""
    found = tensor.shape
    if len(found) == len(dims):
        for dim, size in zip(dims, found, strict=True):
            if isinstance(dim, str):
                known.setdefault(dim, size)
    expected = [known.get(dim, dim) if isinstance(dim, str) else dim for dim in dims]
    if list(found) != expected:
        names = ", ".join(str(dim) for dim in dims)
        problems.add(f"{label} is {list(found)}, expected [{', '.join(map(str, expected))}] ({names})")


def _dtypes(role: str, variant: Variant) -> tuple[str, ...]:
    """What a role may be stored in."""
    factor = is_factor(variant.roles.get(role, ()))
    return _INTEGERS if role in variant.integers else (*_EXPONENT, *(QUANTIZED if factor else ()))


def _check_values(label: str, tensor: Tensor, problems: Problems) -> None:
    if tensor.dtype in QUANTIZED and not np.isfinite(to_float32(tensor)).all():
        problems.add(f"{label} holds NaN or infinity")
    if tensor.dtype not in _EXPONENT:
        return
    item, exponent = _EXPONENT[tensor.dtype]
    bits: NDArray[np.unsignedinteger] = tensor.data.view(item)
    bad = np.flatnonzero((bits & item(exponent)) == item(exponent))
    if bad.size:
        problems.add(f"{label} holds NaN or infinity ({bad.size} of {bits.size} values)")


def _check_integers(label: str, tensor: Tensor, problems: Problems) -> None:
    """Whole numbers, which PEFT stores as f32 on Windows."""
    if tensor.dtype == "f32":
        values = tensor.data.view(np.float32)
        if not ((np.abs(values) < 2**31) & (values == np.rint(values))).all():
            problems.add(f"{label} holds numbers that are not whole or beyond 32 bits")
