"""LoRA (Hu et al., arXiv:2106.09685): W x + scale · B (A x), and what PEFT's LoraConfig can add to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from adaptrt.adapters.normal import Lowered, LowRank
from adaptrt.adapters.options import Rule, any_value, finite, flag, match_pattern, patterns, positive_int
from adaptrt.adapters.problems import Problems
from adaptrt.adapters.variant import BaseWeight, Module, Params, Roles, Variant
from adaptrt.quant.plain import to_float32
from adaptrt.tensor import Tensor

PEFT_DEFAULT = 8  # of r and of lora_alpha when the config leaves them out

KEEPS_BASE = (
    True,
    False,
    "gaussian",
    "eva",
    "orthogonal",
    "mica",
)  # initialisations that leave the base alone

CHANGES_BASE = (
    "pissa",
    "olora",
    "corda",
    "lora_ga",
)  # by B A as it started, with what follows the name as settings
THE_CHANGED_BASE = (
    "convert the base that training used (unload() and save_pretrained() in PEFT) and set this to true"
)

TRAINING_ONLY = ("lora_velora_embed", "lora_monteclora_sampler.")  # PEFT's eval forward does not read them


def other_methods(config: Mapping[str, Any]) -> frozenset[str]:
    """The options at work in a LoraConfig that make it another method than plain LoRA."""
    switches = ("alora_invocation_tokens", "arrow_config", "kasa_config")
    return frozenset(
        name for name, value in config.items() if value and (name in switches or name.startswith("use_"))
    )


def _initialisation(value: object) -> str | None:
    name = value.lower() if isinstance(value, str) else value
    if name is None or name in KEEPS_BASE:
        return None
    if name == "loftq":
        return f"this initialisation changed the base by more than its factors say: {THE_CHANGED_BASE}"
    if isinstance(name, str) and name.startswith(CHANGES_BASE):
        return (
            "this initialisation changed the base: give the adapter as it was initialised (--initial DIR), or "
            + THE_CHANGED_BASE
        )
    return "unknown initialisation, which may have changed the base"


class LoraVariant(Variant):
    """LoRA on linear layers, the head and the embedding. A relative overrides `methods` and `scaling`."""

    name = "lora"
    methods: ClassVar[frozenset[str]] = frozenset()  # the `use_…` options that select this variant
    options: ClassVar[Mapping[str, Rule]] = {
        "r": positive_int,
        "lora_alpha": finite,
        "rank_pattern": patterns(positive_int),
        "alpha_pattern": patterns(finite),
        "lora_bias": flag,
        "init_lora_weights": _initialisation,
        **dict.fromkeys(("use_rslora", "use_dora", "use_qalora"), flag),
        "fan_in_fan_out": flag,  # says how the base stores W; A and B are the same
        **dict.fromkeys(
            # of training, of an initialisation, or of a method that another option switches on
            ("lora_dropout", "velora_config", "monteclora_config", "runtime_config", "loftq_config",
             "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
            any_value,
        ),
    }  # fmt: skip
    params: ClassVar[Mapping[str, type]] = {"rank": int, "scale": float}
    roles: ClassVar[Mapping[str, tuple[str | int, ...]]] = {
        "A": ("rank", "in"),
        "B": ("out", "rank"),
        "bias": ("out",),
    }
    optional: ClassVar[frozenset[str]] = frozenset({"bias"})
    adds: ClassVar[bool] = True

    def claims(self, config: Mapping[str, Any]) -> bool:
        """See Variant.claims."""
        return config.get("peft_type") == "LORA" and other_methods(config) == self.methods

    def scaling(self, alpha: float, rank: int) -> float:
        """What B (A x) is multiplied by."""
        return alpha / rank

    def resolve(self, config: Mapping[str, Any], module: Module, problems: Problems) -> tuple[Params, Roles]:
        """See Variant.resolve."""
        rank = match_pattern(config.get("rank_pattern"), module.path, config.get("r", PEFT_DEFAULT))
        alpha = match_pattern(
            config.get("alpha_pattern"), module.path, config.get("lora_alpha", PEFT_DEFAULT)
        )
        if module.base.kind == "embedding":
            roles = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
        else:
            roles = {"A": "lora_A.weight", "B": "lora_B.weight"}
        if config.get("lora_bias"):
            roles["bias"] = "lora_B.bias"
        for suffix in module.tensors:
            if suffix.startswith(TRAINING_ONLY):
                module.discard(suffix, "it acts in training only")
        return {"rank": rank, "scale": self.scaling(float(alpha), rank)}, roles

    def lower(self, params: Params, tensors: Mapping[str, Tensor], base: BaseWeight) -> Lowered:
        """U = B, V = A, and c = scale · bias (PEFT scales lora_bias with the product)."""
        scale = float(params["scale"])
        term = LowRank(u=tensors["B"], v=tensors["A"], scale=scale)
        c = to_float32(tensors["bias"]) * scale if "bias" in tensors else None
        return Lowered(terms=(term,), c=c)
