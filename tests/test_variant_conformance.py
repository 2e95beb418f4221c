"""The variant conformance kit: on LoRA and rsLoRA it passes, and each way of being wrong makes it fail."""

from __future__ import annotations

from typing import Any, ClassVar

from adaptrt_rslora import RsLoraVariant

from adaptrt.adapters.lora import LoraVariant
from adaptrt.testing import VariantConformance


class TestLora(VariantConformance):
    variant = LoraVariant()
    config: ClassVar = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "lora_bias": True}
    targets = ("blk.0.attn_q", "blk.1.attn_q", "blk.0.ffn_down", "output")

    def reference(self, x: Any, weight: Any, bias: Any, params: Any, tensors: Any, scale: float) -> Any:
        change = x @ tensors["A"].T @ tensors["B"].T + tensors["bias"]
        return x @ weight.T + bias + scale * 6 / 4 * change


class TestRsLora(VariantConformance):
    variant = RsLoraVariant()
    config: ClassVar = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True}
    targets = ("blk.0.attn_q", "token_embd")

    def reference(self, x: Any, weight: Any, bias: Any, params: Any, tensors: Any, scale: float) -> Any:
        return x @ (weight + scale * 3 * tensors["B"] @ tensors["A"]).T + bias
