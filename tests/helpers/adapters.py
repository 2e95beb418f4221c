"""PEFT folders, edited and perturbed, and the base file they belong to."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from helpers.oracle import LINEARS
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adaptrt.adapters.base import BaseView
from adaptrt.format import open_file
from adaptrt.model.llama import LlamaArchitecture

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Tensors = dict[str, torch.Tensor]


def open_view(path: Path) -> BaseView:
    """The base of an `.adrt` file; what it maps lives as long as it does."""
    return BaseView(open_file(path), LlamaArchitecture())


@cache
def _loaded(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def base_model(base: Path) -> Any:
    """A fresh transformers model of a folder, in float32."""
    return copy.deepcopy(_loaded(base))


def perturbed_peft(
    path: Path, base: Path, seed: int = 0, dtype: Any = None, save_embeddings: Any = "auto", **options: Any
) -> Path:
    """Save an adapter whose every trainable tensor is random: PEFT starts many of them at nothing."""
    torch.manual_seed(seed)
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM"} | options
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base_model(base), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.requires_grad or "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * (0.6 / parameter.shape[-1] ** 0.5))
        model.save_pretrained(path, save_embedding_layers=save_embeddings)
    if dtype is not None:
        edit_tensors(path, lambda ts: {name: t.to(dtype) if "lora_" in name else t for name, t in ts.items()})
    return path


def edit_tensors(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    """Rewrite a folder's tensors."""
    tensors = edit(load_file(folder / WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def edited(
    folder: Path,
    out: Path,
    config: dict[str, Any] | None = None,
    tensors: Callable[[Tensors], Tensors] | None = None,
) -> Path:
    """A copy of a PEFT folder with options set and tensors rewritten."""
    shutil.copytree(folder, out)
    text = json.loads((folder / CONFIG).read_text())
    (out / CONFIG).write_text(json.dumps(text | (config or {})))
    if tensors is not None:
        edit_tensors(out, tensors)
    return out
