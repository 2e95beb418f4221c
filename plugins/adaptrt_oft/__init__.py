"""OFT (Qiu et al., arXiv:2306.07280): W R x, R turning every run of b inputs by a matrix of its own.

R is the Cayley transform (I - Q)(I + Q)⁻¹ of a skew-symmetric Q, whose upper triangle is stored, or the first terms of
its Neumann series, as PEFT 0.18 and later form it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from adaptrt.adapters.dense import Floats, dense_term
from adaptrt.adapters.normal import Lowered
from adaptrt.adapters.options import Rule, any_value, boolean, finite, flag
from adaptrt.adapters.problems import Problems, brief
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.errors import AdapterError
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

FIRST_PEFT = (0, 18)  # the Neumann series was another before
MOST_TERMS = 1024  # of the series: each takes a product of all blocks, and PEFT's default is 5
DEFAULTS: Mapping[str, Any] = {
    "r": 0, "oft_block_size": 32, "block_share": False, "coft": False, "eps": 6e-5,
    "use_cayley_neumann": True, "num_cayley_neumann_terms": 5,
}  # fmt: skip


def count(value: object) -> str | None:
    """A whole number, 0 included."""
    return None if type(value) is int and value >= 0 else "expected a whole number, 0 or above"


def terms(value: object) -> str | None:
    """A number of terms of the series."""
    return (
        None
        if type(value) is int and 0 < value <= MOST_TERMS
        else f"expected a whole number from 1 to {MOST_TERMS}"
    )


class OftVariant(Variant):
    """OFT on linear layers, where the input turns, and on the embedding, where the output does."""

    name = "oft"
    options: ClassVar[Mapping[str, Rule]] = {
        "r": count,
        "oft_block_size": count,
        **dict.fromkeys(("block_share", "coft", "use_cayley_neumann"), boolean),
        "eps": finite,
        "num_cayley_neumann_terms": terms,
        "fan_in_fan_out": flag,  # says how the base stores W
        **dict.fromkeys(("module_dropout", "init_weights"), any_value),  # of training, of the start
    }
    params: ClassVar[Mapping[str, type]] = {
        "block": int, "blocks": int, "entries": int, "coft": bool, "eps": float, "neumann": bool, "terms": int,
    }  # fmt: skip
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {"R": ("blocks", "entries")}

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "OFT"

    def check_config(self, config: Mapping[str, Any], problems: Problems) -> None:
        """Also refuses what older PEFT saved with another meaning, as PEFT does."""
        before = len(problems.lines)
        super().check_config(config, problems)
        if len(problems.lines) > before:
            return
        values = {**DEFAULTS, **config}
        if "oft_block_size" not in config:
            problems.add(
                "option oft_block_size is missing: an OFT of PEFT before 0.15, which is another method"
            )
        elif (values["r"] == 0) == (values["oft_block_size"] == 0):
            problems.add(
                f"options r = {values['r']} and oft_block_size = {values['oft_block_size']}: expected one of them"
            )
        if values["use_cayley_neumann"] and _version(config.get("peft_version")) < FIRST_PEFT:
            problems.add(
                f"option use_cayley_neumann of an adapter saved by PEFT {brief(config.get('peft_version'))}: "
                f"the series was another before {'.'.join(map(str, FIRST_PEFT))}"
            )

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """Where the inputs do not divide, PEFT takes the nearest size or number of blocks that does."""
        values = {**DEFAULTS, **config}
        inner = module.base.shape[1]  # of an embedding its width
        if values["r"]:
            block = inner // nearest_divisor(inner, values["r"])
        else:
            block = nearest_divisor(inner, values["oft_block_size"])
        params = {
            "block": block,
            "blocks": 1 if values["block_share"] else inner // block,
            "entries": block * (block - 1) // 2,
            "coft": values["coft"],
            "eps": float(values["eps"]),
            "neumann": values["use_cayley_neumann"],
            "terms": values["num_cayley_neumann_terms"],
        }
        return params, {"R": f"oft_{'embedding_' if module.base.kind == 'embedding' else ''}R.weight"}

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """The rotation; of the embedding a dense change, its table times R - I.

        Raises AdapterError for blocks that do not make the input.
        """
        vectors = to_float32(tensors["R"])
        inner = base.shape[1]
        block, blocks = int(params["block"]), len(vectors)
        if block * (block - 1) // 2 != vectors.shape[1] or inner % block or blocks not in (1, inner // block):
            raise AdapterError(
                f"oft_R is {list(vectors.shape)}, expected blocks of {block} for {inner} inputs"
            )
        if problem := terms(params["terms"]):
            raise AdapterError(f"param terms is {params['terms']}, {problem}")
        q = np.zeros((blocks, block, block), np.float32)
        rows_above, columns_above = np.triu_indices(block, 1)
        q[:, rows_above, columns_above] = vectors
        q -= q.transpose(0, 2, 1)
        if params["coft"]:
            size = np.linalg.norm(q, axis=(1, 2), keepdims=True)
            limit = np.float32(float(params["eps"]) / blocks**0.5)
            q *= np.where(size <= limit, np.float32(1), limit / np.maximum(size, limit))
        turn = neumann(q, int(params["terms"])) if params["neumann"] else cayley(q)
        turn = np.ascontiguousarray(np.broadcast_to(turn, (inner // block, block, block)))
        if base.kind == "embedding":
            change = turn - np.eye(block, dtype=np.float32)
            return Lowered(terms=(dense_term(_turned_table(base.weight(), change)),))
        return Lowered(rotation=turn)


def _turned_table(table: Floats, change: Floats) -> Floats:
    """What the table's rows change by, transposed: [width, vocabulary]."""
    block = change.shape[1]
    turned = np.empty(table.T.shape, np.float32)
    for j, part in enumerate(change):
        columns = slice(j * block, (j + 1) * block)
        np.matmul(part, table[:, columns].T, out=turned[columns])
    return turned


def nearest_divisor(size: int, wanted: int) -> int:
    """Of the divisors of `size` the nearest to `wanted`, the smaller of two."""
    divisors = (d for d in range(1, size + 1) if size % d == 0)
    return min(divisors, key=lambda d: (abs(d - wanted), d)) if wanted < size else size


def cayley(q: Floats) -> Floats:
    """What turns columns: ((I - Q)(I + Q)⁻¹)ᵀ of skew-symmetric matrices [..., b, b]; PEFT turns rows."""
    eye = np.eye(q.shape[-1], dtype=np.float32)
    return np.asarray(np.linalg.solve(eye - q, eye + q), np.float32)


def neumann(q: Floats, terms: int) -> Floats:
    """What turns columns, by PEFT's series I + 2Q + 2Q² + … + Qⁿ⁻¹, transposed: of `terms` terms, but 4 for 3."""
    turn = np.eye(q.shape[-1], dtype=np.float32) + np.zeros_like(q)
    power = qt = q.transpose(0, 2, 1)
    if terms > 1:
        turn += 2 * qt
    if terms > 2:
        last = max(terms - 1, 3)
        for k in range(2, last + 1):
            power = power @ qt
            turn += power if k == last else 2 * power
    return turn


def _version(text: object) -> tuple[int, ...]:
    """The first two numbers of a version; (0, 0) for none."""
    numbers = str(text).partition("@")[0].split(".")[:2]
    return tuple(int(n) for n in numbers) if all(n.isdecimal() and len(n) < 10 for n in numbers) else (0, 0)


@hookimpl
def adaptrt_variants() -> list[OftVariant]:
    """OFT."""
    return [OftVariant()]
