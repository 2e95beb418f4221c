"""Gain under adaptrt's conformance kit."""

from adaptrt_gain import GainVariant

from adaptrt.testing import VariantConformance


class TestGain(VariantConformance):
    variant = GainVariant()
    config = {"peft_type": "GAIN", "target_modules": ["q_proj", "down_proj"], "init_gain": True}
    targets = ("blk.0.attn_q", "blk.0.ffn_down", "output")

    def reference(self, x, weight, bias, params, tensors, scale):
        gain = 1 + scale * (tensors["gain"] - 1)
        return gain * (x @ weight.T) + bias
