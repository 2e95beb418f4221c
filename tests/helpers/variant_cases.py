"""Every variant's adapters as PEFT makes them: one row a case. A new variant adds rows here, not tests.

A case is a PEFT config and what is unusual about it. Its adapter has every trainable tensor perturbed by noise, since
PEFT initialises many methods to do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from helpers.oracle import LINEARS
from peft import (
    AdaLoraConfig,
    BOFTConfig,
    C3AConfig,
    DeloraConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftConfig,
    RandLoraConfig,
    ShiraConfig,
    VBLoRAConfig,
    VeraConfig,
)

# How PEFT, or torch by hand, says what "stacked after a LoRA" means (tests/helpers/variant_oracle.py):
#   active  several active adapters of one PeftModel
#   mixed   PeftMixedModel
#   merged  the LoRA is merged into the base, then PEFT applies the variant
#   beside  the variant acts on the base's weight alone, the LoRA's product is added: for methods that change the
#           input which W sees (spec/adapters.md, "Stacking", rule 1)
Stacking = Literal["active", "mixed", "merged", "beside"]


@dataclass(frozen=True)
class VariantCase:
    """`noise` maps a part of a tensor's name to the standard deviation of its noise, else 0.6 / √columns."""

    variant: str  # its name in our registry
    config: Callable[..., PeftConfig]  # called without arguments
    stacking: Stacking = "merged"
    noise: Mapping[str, float] = field(default_factory=dict)


def case(
    variant: str,
    config: Callable[..., PeftConfig],
    stacking: Stacking = "merged",
    noise: Mapping[str, float] | None = None,
    **options: Any,
) -> VariantCase:
    """A case on every linear layer unless `options` say otherwise."""
    return VariantCase(
        variant, partial(config, **{"target_modules": LINEARS} | options), stacking, noise or {}
    )


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
NORMS = ["input_layernorm", "post_attention_layernorm", "model.norm"]
ENDS = ["embed_tokens", "lm_head"]
GAIN = {"ia3_l": 0.4, "ln_tuning": 0.4}
MAGNITUDE = {"magnitude": 0.4}
LAMBDAS = {"lambda": 0.4}
EIGENVALUES = {"lora_E": 1.0}

# The rows of the parity table in spec/adapters.md: single, scaled, stacked and in a mixed batch.
CASES: dict[str, VariantCase] = {
    "LoRA": case("lora", LoraConfig, "active", r=4, lora_alpha=8),
    "rsLoRA": case("rslora", LoraConfig, "active", r=16, lora_alpha=4, use_rslora=True),
    "DoRA": case("dora", LoraConfig, "active", MAGNITUDE, r=4, lora_alpha=8, use_dora=True),
    "DoRA, rsLoRA": case(
        "dora", LoraConfig, "active", MAGNITUDE, r=16, lora_alpha=4, use_dora=True, use_rslora=True
    ),
    "VeRA": case("vera", VeraConfig, noise=LAMBDAS, r=16),
    "AdaLoRA": case("adalora", AdaLoraConfig, "mixed", EIGENVALUES, init_r=4, lora_alpha=8, total_step=10),
    "IA3": case("ia3", IA3Config, noise=GAIN, target_modules=ATTENTION, feedforward_modules=[]),
    "IA3, feed-forward": case("ia3", IA3Config, "beside", GAIN, feedforward_modules=LINEARS),
    "HRA": case("hra", HRAConfig, "beside", r=4),
    "HRA, Gram-Schmidt": case("hra", HRAConfig, "beside", r=4, apply_GS=True),
    "DeLoRA": case("delora", DeloraConfig, r=4, delora_lambda=6),
    "LN tuning": case("ln_tuning", LNTuningConfig, noise=GAIN, target_modules=NORMS),
    "LoHa": case("loha", LoHaConfig, "mixed", r=4, alpha=8),
    "LoKr": case("lokr", LoKrConfig, "mixed", r=3, alpha=6),
    "MiSS": case("miss", MissConfig, r=8),
    "MiSS, bat": case("miss", MissConfig, "beside", r=8, init_weights="bat"),
    "VB-LoRA": case("vblora", VBLoRAConfig, r=3, num_vectors=12, vector_length=16),
    "SHiRA": case("shira", ShiraConfig, r=3),
    "OFT": case("oft", OFTConfig, "beside", {"oft_R": 0.1}, oft_block_size=16),
    "BOFT": case("boft", BOFTConfig, "beside", boft_block_size=4, boft_n_butterfly_factor=3),
    "FourierFT": case("fourierft", FourierFTConfig, n_frequency=50, scaling=50.0),
    "C3A": case("c3a", C3AConfig, noise={"c3a_kernel": 4.0}, block_size=16),
    "RandLoRA": case("randlora", RandLoraConfig, r=12, randlora_alpha=12),
}

# Other ranks, patterns and options: compared with PEFT once, alone, and not in the table.
OPTIONS: dict[str, VariantCase] = {
    "LoRA, rank 256": case("lora", LoraConfig, r=256, lora_alpha=32),
    "LoRA, one module": case("lora", LoraConfig, target_modules=["k_proj"], layers_to_transform=[1]),
    "LoRA, embedding and head": case("lora", LoraConfig, target_modules=[*ENDS, "q_proj"]),
    **{f"DoRA, rank {r}": case("dora", LoraConfig, noise=MAGNITUDE, r=r, use_dora=True) for r in (1, 3, 256)},
    "DoRA, embedding and head": case(
        "dora", LoraConfig, noise=MAGNITUDE, target_modules=[*ENDS, "q_proj"], use_dora=True
    ),
    "DoRA, patterns": case(
        "dora",
        LoraConfig,
        noise=MAGNITUDE,
        use_dora=True,
        use_rslora=True,
        rank_pattern={"q_proj": 3, r".*\.1\.mlp\.up_proj": 5},
        alpha_pattern={"v_proj": 2},
    ),
    "DoRA, biases, fan_in_fan_out": case(
        "dora", LoraConfig, noise=MAGNITUDE, use_dora=True, bias="all", fan_in_fan_out=True
    ),
    **{f"VeRA, rank {r}": case("vera", VeraConfig, noise=LAMBDAS, r=r) for r in (1, 3, 256)},
    "VeRA, projections not saved": case(
        "vera",
        VeraConfig,
        noise=LAMBDAS,
        r=16,
        save_projection=False,
        projection_prng_key=-7,
        bias="vera_only",
    ),
    "VeRA, one module and the head": case(
        "vera", VeraConfig, noise=LAMBDAS, r=16, target_modules=["lm_head", "layers.1.mlp.down_proj"]
    ),
    **{
        f"AdaLoRA, rank {r}": case(
            "adalora", AdaLoraConfig, noise=EIGENVALUES, init_r=r, lora_alpha=8, total_step=10
        )
        for r in (1, 3, 256)
    },
    "AdaLoRA, pruned": case(
        "adalora",
        AdaLoraConfig,
        noise=EIGENVALUES,
        init_r=4,
        lora_alpha=0,
        total_step=10,
        target_modules=["q_proj"],
        rank_pattern={
            "model.layers.0.self_attn.q_proj.lora_E": [True, False, True, True],
            "model.layers.1.self_attn.q_proj.lora_E": [False] * 4,
        },
    ),
    "IA3, as PEFT chooses, and the head": case(
        "ia3",
        IA3Config,
        noise=GAIN,
        target_modules=["k_proj", "v_proj", "down_proj", "lm_head"],
        feedforward_modules=["down_proj"],
    ),
    **{f"HRA, rank {r}": case("hra", HRAConfig, r=r) for r in (1, 3, 256)},
    "HRA, head, biases": case("hra", HRAConfig, r=2, target_modules=["lm_head", "q_proj"], bias="hra_only"),
    **{f"DeLoRA, rank {r}": case("delora", DeloraConfig, r=r) for r in (1, 3, 256)},
    "DeLoRA, patterns": case(
        "delora", DeloraConfig, r=2, rank_pattern={"q_proj": 3}, lambda_pattern={"k_proj": 4}, bias="all"
    ),
    "LN tuning, one": case("ln_tuning", LNTuningConfig, noise=GAIN, target_modules=["model.norm"]),
    "LoHa, patterns": case(
        "loha",
        LoHaConfig,
        r=16,
        rank_pattern={"q_proj": 1, "o_proj": 3, "v_proj": 256},
        alpha_pattern={"k_proj": 3},
    ),
    "LoKr, both products": case("lokr", LoKrConfig, r=1, decompose_both=True, decompose_factor=4),
    "LoKr, both whole": case(
        "lokr",
        LoKrConfig,
        r=256,
        alpha=256,
        rank_pattern={"lm_head": 16},
        target_modules=["lm_head", "v_proj"],
    ),
    "MiSS, rank 1": case("miss", MissConfig, r=1),
    "MiSS, a rest": case("miss", MissConfig, r=3, target_modules=["lm_head", "down_proj"]),
    "MiSS, mini": case("miss", MissConfig, r=16, mini_r=4, init_weights="mini"),
    "VB-LoRA, saved best": case(
        "vblora", VBLoRAConfig, r=16, num_vectors=300, vector_length=32, topk=3, save_only_topk_weights=True
    ),
    "VB-LoRA, rank 256": case("vblora", VBLoRAConfig, r=256, num_vectors=8, vector_length=8, topk=1),
    "VB-LoRA, rank 1": case("vblora", VBLoRAConfig, r=1, num_vectors=40, vector_length=4, topk=5),
    "SHiRA, rank 1": case("shira", ShiraConfig, r=1),
    "SHiRA, one module": case("shira", ShiraConfig, r=16, target_modules=["v_proj"]),
    "OFT, Cayley": case("oft", OFTConfig, noise={"oft_R": 0.3}, oft_block_size=8, use_cayley_neumann=False),
    "OFT, nearest number of blocks": case(
        "oft", OFTConfig, noise={"oft_R": 0.1}, r=3, oft_block_size=0, num_cayley_neumann_terms=3
    ),
    "OFT, shared block": case(
        "oft",
        OFTConfig,
        noise={"oft_R": 0.2},
        oft_block_size=16,
        block_share=True,
        num_cayley_neumann_terms=7,
    ),
    "OFT, constrained": case("oft", OFTConfig, oft_block_size=16, coft=True, eps=2.0),
    "OFT, embedding and head": case(
        "oft", OFTConfig, noise={"oft_": 0.2}, oft_block_size=16, target_modules=["embed_tokens", "lm_head"]
    ),
    "BOFT, one factor": case("boft", BOFTConfig, boft_block_size=0, boft_block_num=8),
    "FourierFT, few waves": case(
        "fourierft",
        FourierFTConfig,
        n_frequency=9,
        scaling=80.0,
        n_frequency_pattern={"q_proj": 4096},
        random_loc_seed=0,
    ),
    "C3A, patterns": case(
        "c3a",
        C3AConfig,
        noise={"c3a_kernel": 4.0},
        block_size=8,
        block_size_pattern={"q_proj": 64, "layers.0.self_attn.k_proj": 1},
    ),
    "RandLoRA, rank 1": case(
        "randlora", RandLoraConfig, r=1, randlora_alpha=1, target_modules=["v_proj", "o_proj"]
    ),
    "RandLoRA, sparse": case("randlora", RandLoraConfig, r=3, randlora_alpha=3, sparse=True),
    "RandLoRA, rank 256": case("randlora", RandLoraConfig, r=256, randlora_alpha=256, very_sparse=True),
}
