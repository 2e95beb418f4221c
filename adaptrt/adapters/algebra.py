"""One LoRA made of several: PEFT's `add_weighted_adapter` (0.21), target by target, in float32.

linear  A = Σ ±√|w s| A_k, B = Σ √|w s| B_k: of one rank; an approximation, as PEFT says itself
cat     A = [w s A_k; …], B = [B_k, …]: exact, the rank is the sum
svd     the best of a given rank for Σ w s B_k A_k
ties, dare_linear, dare_ties, magnitude_prune: linear with the factors thinned out first; with _svd, the product is.

Sources: TIES (Yadav et al., arXiv:2306.01708), DARE (Yu et al., arXiv:2311.03099).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.lora import LoraVariant
from adaptrt.adapters.problems import Problems, brief
from adaptrt.adapters.stored import declared_form
from adaptrt.adapters.variant import Adapter, Progress, Target, no_progress
from adaptrt.errors import AdapterError
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

Combination = Literal[
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd", "dare_linear_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip
SignMethod = Literal["total", "frequency"]
Floats = NDArray[np.float32]

Part = tuple[Target, Adapter, float]  # one adapter's part in a target, with the user's weight

FAMILY = ("lora", "rslora")  # what s·B·A is all of


@dataclass(frozen=True)
class Factors:
    """One adapter's part in a target: weight · scale · B A, B [out, rank] and A [rank, in]."""

    weight: float  # the user's
    scale: float
    b: Floats
    a: Floats

    @property
    def factor(self) -> float:
        """What the product is multiplied by."""
        return self.weight * self.scale


@dataclass(frozen=True)
class Recipe:
    """How to combine, with PEFT's names and defaults; `seed` draws what DARE drops."""

    combination_type: Combination = "svd"
    svd_rank: int | None = None
    density: float | None = None
    majority_sign_method: SignMethod = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("combination_type", self.combination_type, get_args(Combination)),
            ("majority_sign_method", self.majority_sign_method, get_args(SignMethod)),
        ):
            if value not in known:
                raise AdapterError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        if self.svd_rank is not None and (type(self.svd_rank) is not int or self.svd_rank < 1):
            raise AdapterError(f"svd_rank is {self.svd_rank!r}, expected a whole number above 0")
        if type(self.seed) is not int or self.seed < 0:
            raise AdapterError(f"seed is {self.seed!r}, expected a whole number, 0 or more")
        if self.thins and not (isinstance(self.density, int | float) and 0 < self.density <= 1):
            raise AdapterError(f"density is {self.density!r}, expected a number above 0, at most 1")
        self._check_used()

    def _check_used(self) -> None:
        """Refuse what the type of combination would ignore. PEFT ignores it."""
        kind = self.combination_type
        for name, acts in (
            ("svd_rank", kind.endswith("svd")),
            ("density", self.thins),
            ("majority_sign_method", "ties" in kind),
            ("seed", kind.startswith("dare")),
        ):
            value = getattr(self, name)
            if not acts and value != getattr(Recipe, name):
                raise AdapterError(f"{name} is {value!r}, which has no effect on combination_type {kind!r}")

    @property
    def thins(self) -> bool:
        """Whether values are dropped first."""
        return self.combination_type.startswith(("ties", "dare", "magnitude"))


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    name: str,
    recipe: Recipe,
    progress: Progress = no_progress,
) -> Adapter:
    """A LoRA adapter `name` of scale 1. Raises AdapterError naming what cannot be combined.

    A target that some adapters lack is made of the others, as in PEFT. Differently from PEFT, the scale is 1 for rsLoRA
    too: PEFT divides by √r what it never multiplied.
    """
    _check(adapters, weights)
    if len(adapters) == 1:
        recipe = _for_one(recipe)
    together: dict[str, list[Part]] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for target in adapter.targets:
            together.setdefault(target.target, []).append((target, adapter, weight))
    _check_rank(recipe, together.values())
    generator = np.random.default_rng(recipe.seed)
    targets: list[Target] = []
    tensors: dict[str, Tensor] = {}
    for done, (name_of_target, parts) in enumerate(together.items(), start=1):
        b, a = _combined(name_of_target, [_factors(*part) for part in parts], recipe, generator)
        roles = parts[0][0].tensors
        tensors |= {roles["A"]: Tensor.from_numpy(a), roles["B"]: Tensor.from_numpy(b)}
        targets.append(Target(name_of_target, {"rank": len(a), "scale": 1.0}, roles))
        progress(done, len(together))
    return Adapter(
        name, "lora", tuple(targets), tensors, _config(adapters, targets, recipe), adapters[0].base
    )


def _check(adapters: Sequence[Adapter], weights: Sequence[float]) -> None:
    problems = Problems()
    if not adapters or len(adapters) != len(weights):
        problems.add(
            f"found {len(adapters)} adapters and {len(weights)} weights, expected as many, at least one"
        )
    for adapter in adapters:
        if adapter.variant not in FAMILY:
            problems.add(
                f"adapter {adapter.name!r} is of variant {adapter.variant}, expected {' or '.join(FAMILY)}"
            )
            continue
        others = {role for target in adapter.targets for role in target.tensors} - {"A", "B"}
        if others:
            problems.add(f"adapter {adapter.name!r} has {', '.join(sorted(others))}, which do not combine")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not np.isfinite(weight):
            problems.add(f"weight {weight!r}, expected a finite number")
    problems.raise_for("cannot combine")


def _for_one(recipe: Recipe) -> Recipe:
    """PEFT's rule: one adapter alone is only scaled."""
    if recipe.thins or recipe.svd_rank is not None:
        given = f"combination_type {recipe.combination_type!r}, svd_rank {recipe.svd_rank}"
        raise AdapterError(f"found one adapter with {given}, expected several: one alone is only scaled")
    return Recipe("linear")


def _check_rank(recipe: Recipe, together: Iterable[Sequence[Part]]) -> None:
    """A target of lower rank than asked for loses nothing; when all are, what was asked for was a mistake."""
    largest = max(_largest_rank(parts, recipe) for parts in together)
    if recipe.svd_rank is not None and recipe.svd_rank > largest:
        raise AdapterError(
            f"svd_rank is {recipe.svd_rank}, expected at most {largest}: no combined target can have a higher rank"
        )


def _largest_rank(parts: Sequence[Part], recipe: Recipe) -> int:
    """Of the sum of products; thinned ones can fill the whole matrix."""
    ranks = [int(target.params["rank"]) for target, *_ in parts]
    target, adapter, _ = parts[0]
    sides = [prod(adapter.tensors[target.tensors[role]].shape) // ranks[0] for role in ("B", "A")]
    return min(sides) if recipe.thins else min(*sides, sum(ranks))


def _factors(target: Target, adapter: Adapter, weight: float) -> Factors:
    b, a = (
        to_float32(declared_form(adapter.tensors[target.tensors[role]], LoraVariant.roles[role]))
        for role in ("B", "A")
    )
    return Factors(weight, float(target.params["scale"]), b, a)


def _read_config(adapter: Adapter) -> dict[str, Any]:
    try:
        given = json.loads(adapter.config_text or "{}")
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise AdapterError(
            f"adapter {adapter.name!r}: its config is {brief(adapter.config_text)}, expected JSON"
        )
    return given


def _config(adapters: Sequence[Adapter], targets: Sequence[Target], recipe: Recipe) -> str:
    """A LoraConfig that says what the new adapter is, on the first one's base."""
    given = _read_config(adapters[0])
    paths = sorted({_module(target.tensors["A"]) for target in targets})
    ranks = {path: int(t.params["rank"]) for t in targets if (path := _module(t.tensors["A"]))}
    rank = max(ranks.values())
    return json.dumps(
        {
            "peft_type": "LORA",
            "task_type": given.get("task_type"),
            "base_model_name_or_path": given.get("base_model_name_or_path"),
            "inference_mode": True,
            "r": rank,
            "lora_alpha": rank,
            "rank_pattern": {path: found for path, found in ranks.items() if found != rank},
            "alpha_pattern": {path: found for path, found in ranks.items() if found != rank},
            "target_modules": paths,
            "bias": "none",
        },
        indent=2,
    )


def _module(key: str) -> str:
    """The module path in a PEFT key."""
    return key.removeprefix("base_model.model.").partition(".lora_")[0]


# One target


def _combined(
    target: str, parts: Sequence[Factors], recipe: Recipe, generator: np.random.Generator
) -> tuple[Floats, Floats]:
    """B and A of the new adapter."""
    kind = recipe.combination_type
    if kind == "cat":
        a = np.concatenate([np.float32(part.factor) * part.a for part in parts])
        return np.concatenate([part.b for part in parts], axis=1), a
    if kind == "svd":
        return _svd_of_product(parts, recipe.svd_rank)
    mix = _mixer(kind.removesuffix("_svd"), recipe, generator)
    if kind.endswith("_svd"):
        deltas = [np.float32(part.scale) * (part.b @ part.a) for part in parts]
        rank = recipe.svd_rank or max(len(part.a) for part in parts)
        return _svd(mix(deltas, [part.weight for part in parts]), rank)
    if len({len(part.a) for part in parts}) > 1:
        ranks = ", ".join(str(len(part.a)) for part in parts)
        raise AdapterError(f"{target}: ranks {ranks}, and {kind} needs the same; cat and svd take any")
    roots = [float(np.sqrt(abs(part.factor))) for part in parts]
    signed = [root if part.factor >= 0 else -root for root, part in zip(roots, parts, strict=True)]
    new_a = mix([part.a for part in parts], signed)
    return mix([part.b for part in parts], roots), new_a


def _mixer(
    kind: str, recipe: Recipe, generator: np.random.Generator
) -> Callable[[Sequence[Floats], Sequence[float]], Floats]:
    """How matrices of one shape become one, each with its weight."""
    density = 1.0 if recipe.density is None else float(recipe.density)

    def thinned(matrix: Floats) -> Floats:
        if not recipe.thins or density >= 1:
            return matrix
        return drop(matrix, density, generator) if kind.startswith("dare") else keep_largest(matrix, density)

    def mix(matrices: Sequence[Floats], weights: Sequence[float]) -> Floats:
        stacked = np.stack([thinned(matrix) for matrix in matrices])
        weighted = stacked * np.asarray(weights, np.float32)[:, None, None]
        if not kind.endswith("ties"):
            return np.asarray(weighted.sum(axis=0))
        agrees = agreeing(stacked, recipe.majority_sign_method)
        return np.asarray(
            (weighted * agrees).sum(axis=0) / np.maximum(agrees.sum(axis=0), 1).astype(np.float32)
        )

    return mix


def keep_largest(matrix: Floats, density: float) -> Floats:
    """The largest values by size, a share `density` of them; the others 0."""
    kept = int(density * matrix.size)
    order = np.argsort(-np.abs(matrix).reshape(-1), kind="stable")[:kept]
    result = np.zeros(matrix.size, np.float32)
    result[order] = matrix.reshape(-1)[order]
    return result.reshape(matrix.shape)


def drop(matrix: Floats, density: float, generator: np.random.Generator) -> Floats:
    """Each value kept with probability `density` and divided by it (DARE)."""
    return np.asarray(matrix * (generator.random(matrix.shape) < density) / np.float32(density), np.float32)


def agreeing(stacked: Floats, method: SignMethod) -> NDArray[np.bool_]:
    """Where a matrix of the stack has the sign that most of them have (TIES)."""
    votes = stacked if method == "total" else np.sign(stacked)
    majority = np.where(votes.sum(axis=0) >= 0, 1, -1)
    return np.asarray(np.sign(stacked) == majority)


def _svd(delta: Floats, rank: int) -> tuple[Floats, Floats]:
    u, s, vt = np.linalg.svd(delta, full_matrices=False)
    return np.ascontiguousarray(u[:, :rank] * s[:rank]), np.ascontiguousarray(vt[:rank])


def _svd_of_product(parts: Sequence[Factors], rank: int | None) -> tuple[Floats, Floats]:
    """The SVD of Σ w B A without ever making it: that of the small core between two orthogonal factors."""
    q1, r1 = np.linalg.qr(np.concatenate([np.float32(part.factor) * part.b for part in parts], axis=1))
    q2, r2 = np.linalg.qr(np.concatenate([part.a for part in parts]).T)
    b, a = _svd(r1 @ r2.T, rank or max(len(part.a) for part in parts))
    return np.asarray(q1 @ b, np.float32), np.asarray(a @ q2.T, np.float32)
