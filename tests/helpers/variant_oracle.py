"""PEFT as the oracle of every variant: single, scaled and stacked after a LoRA, on one dequantized base."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from helpers.oracle import Oracle
from helpers.variant_cases import Stacking, VariantCase
from numpy.typing import NDArray
from peft import PeftMixedModel, PeftModel, get_peft_model
from peft.tuners.boft import layer as boft
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.functional import linear

Logits = NDArray[np.float32]

torch.sparse.check_sparse_tensor_invariants.enable()  # silences a warning of torch about SHiRA's tensors
# PEFT allows several butterfly factors only with this extension, which it would compile for CUDA
boft._FBD_CUDA = SimpleNamespace(
    forward=lambda blocks: [torch.stack([torch.block_diag(*factor) for factor in blocks])]
)


class VariantOracle:
    """Makes PEFT folders for a base, and gives PEFT's logits [tokens, vocabulary] under them."""

    def __init__(self, folder: Path, adrt: Path) -> None:
        self.plain: Any = Oracle(folder, adrt).model

    def save(self, case: VariantCase, path: Path, seed: int) -> Path:
        """Save a case's adapter: what PEFT initialises, plus noise in every trainable tensor."""
        torch.manual_seed(seed)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            model = get_peft_model(copy.deepcopy(self.plain), case.config())
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    usual = 0.6 / parameter.shape[-1] ** 0.5
                    size = next((s for part, s in case.noise.items() if part in name), usual)
                    parameter.add_(torch.randn_like(parameter) * size)
            model.save_pretrained(path)
        return path

    def logits(self, ids: Sequence[int], model: Any = None) -> Logits:
        """Logits of a model, the plain base unless one is given."""
        with torch.no_grad():
            return (
                (self.plain if model is None else model).eval()(torch.tensor([list(ids)])).logits[0].numpy()
            )

    def single(self, folder: Path) -> Any:
        """The base under one adapter."""
        return load(self.plain, folder)

    def scaled(self, folder: Path, scale: float) -> Any:
        """PEFT's own scaling where it has one; else every adapted layer gives base + scale · (adapted - base)."""
        model = self.single(folder)
        for _, layer in tuner_layers(model):
            scaling = getattr(layer, "scaling", None)
            if hasattr(layer, "boft_s"):
                scale_parts(layer, scale)
            elif scaling is None:
                interpolate(layer, scale)
            elif "default" in scaling:
                scaling["default"] *= scale
        return model

    def stacked(self, lora: Path, folder: Path, stacking: Stacking) -> Any:
        """The adapter in `folder` after the LoRA in `lora`; see Stacking."""
        if stacking in ("active", "mixed"):
            kind = PeftModel if stacking == "active" else PeftMixedModel
            model = load(self.plain, lora, kind)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model.load_adapter(folder, adapter_name="second")
            model.base_model.set_adapter(["default", "second"])
            return model
        merged = load(self.plain, lora).merge_and_unload()
        model = load(merged, folder)
        if stacking == "beside":
            alone = self.single(folder)
            for path, layer in tuner_layers(model):
                add_change_of(layer, alone.get_submodule(path))
        return model


def load(base: Any, folder: Path, kind: Any = PeftModel) -> Any:
    """PEFT's model of a folder over a copy of `base`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind.from_pretrained(copy.deepcopy(base), folder).eval()


def tuner_layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The adapted layers and their paths."""
    yield from (
        (path, m)
        for path, m in model.named_modules()
        if isinstance(m, BaseTunerLayer) and path != "base_model"
    )


def interpolate(layer: Any, scale: float) -> None:
    """Make the layer give base + scale · (adapted - base)."""
    adapted, base = layer.forward, layer.get_base_layer()
    layer.forward = lambda x: base(x) + scale * (adapted(x) - base(x))


def scale_parts(layer: Any, scale: float) -> None:
    """Make BOFT's turn of the input, and its gain, each go this part of its way."""
    base = layer.get_base_layer()
    turn, gain = (part.detach() for part in layer.get_delta_weight("default"))
    turn = torch.eye(len(turn)).lerp(turn, scale)
    gain = 1 + scale * (gain[:, 0] - 1)
    layer.forward = lambda x: linear(x @ turn, base.weight) * gain + (0 if base.bias is None else base.bias)


def add_change_of(layer: Any, alone: Any) -> None:
    """Make the layer give `alone`, the variant on the plain base, plus what merging the LoRA added to the base."""
    merged, plain = layer.get_base_layer(), alone.get_base_layer()
    gain = alone.boft_s["default"][:, 0] if hasattr(alone, "boft_s") else 1  # on all that came before it
    layer.forward = lambda x: alone(x) + gain * (merged(x) - plain(x))
