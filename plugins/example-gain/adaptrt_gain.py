"""Gain: y = g ⊙ (W x) + b, where g is a learned vector, one number an output."""

from adaptrt.adapters.normal import Lowered
from adaptrt.adapters.options import any_value
from adaptrt.adapters.variant import Variant
from adaptrt.hookspecs import hookimpl
from adaptrt.quant.plain import to_float32


class GainVariant(Variant):
    """A user's scale is no concern of ours: at scale s adaptrt takes 1 + s (g - 1)."""

    # what files and users call it
    name = "gain"
    # options of adapter_config.json beside those of every method, each with a rule; all others are refused
    options = {"init_gain": any_value}
    # numbers of a target that `resolve` reads off the config, with their types
    params = {}
    # tensors of a target, with their shapes
    roles = {"gain": ("out",)}

    def claims(self, config):
        """Whether an adapter_config.json is ours."""
        return config.get("peft_type") == "GAIN"

    def resolve(self, config, module, problems):
        """One module's params, and the name of each role's tensor after the module's path."""
        return {}, {"gain": "gain"}

    def lower(self, params, tensors, base):
        """The normal form (adaptrt's spec/adapters.md) of one target."""
        return Lowered(g_out=to_float32(tensors["gain"]))


@hookimpl
def adaptrt_variants():
    """What this plugin offers."""
    return [GainVariant()]
