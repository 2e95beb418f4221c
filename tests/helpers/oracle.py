"""transformers + PEFT as the oracle: random Llama folders, PEFT folders, and float32 logits on dequantized weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adaptrt.format import open_file
from adaptrt.model.llama import LlamaArchitecture
from adaptrt.quant.plain import to_float32

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"hidden_size": 256, "intermediate_size": 384},  # widths that integer kernels take
    "biases": {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True, "intermediate_size": 172},
    "llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "max_position_embeddings": 256,
    },
}


def llama_folder(path: Path, seed: int = 0, **changes: Any) -> Path:
    """Save a random two-layer Llama; weights are large enough that every layer matters."""
    config = {
        "vocab_size": 131,
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    } | changes
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if name.endswith("bias") or "norm" in name else 1.5 / parameter.shape[-1] ** 0.5
            noise = torch.randn_like(parameter) * scale
            parameter.copy_(parameter + noise if "norm" in name else noise)
    model.save_pretrained(path)
    return path


def peft_folder(path: Path, base: Path, seed: int = 0, **options: Any) -> Path:
    """Save a LoRA adapter for a model folder with every trainable tensor perturbed."""
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS} | options
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * (0.6 / parameter.shape[-1] ** 0.5))
    model.save_pretrained(path)
    return path


class Oracle:
    """A transformers model in float32 whose weights are those of an `.adrt` file, dequantized."""

    def __init__(self, folder: Path, adrt: Path) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        state = self.model.state_dict()
        with open_file(adrt) as file, torch.no_grad():
            for spec in LlamaArchitecture().tensors(file.metadata):
                weight = to_float32(file.tensor("base", spec.name))
                state[spec.hf_name].copy_(torch.from_numpy(weight.copy()).reshape(state[spec.hf_name].shape))
        self.model.eval()

    def logits(self, ids: Sequence[int], adapters: Sequence[tuple[Path, float]] = ()) -> NDArray[np.float32]:
        """Logits [tokens, vocabulary] under a stack of PEFT folders, in order, each at its scale."""
        model = self.model
        for index, (folder, _) in enumerate(adapters):
            if index == 0:
                model = PeftModel.from_pretrained(model, folder, adapter_name="a0")
            else:
                model.load_adapter(folder, adapter_name=f"a{index}")
        if adapters:
            names = [f"a{index}" for index in range(len(adapters))]
            model.base_model.set_adapter(names)
            for module in model.modules():
                if not isinstance(module, BaseTunerLayer) or not hasattr(module, "scaling"):
                    continue  # TrainableTokensLayer has no scale
                for name, (_, scale) in zip(names, adapters, strict=True):
                    if name in module.scaling:
                        module.scaling[name] *= scale
            model.eval()
        with torch.no_grad():
            result = model(torch.tensor([list(ids)])).logits[0].numpy()
        if adapters:
            self.model = model.unload()
        return result


def relative_error(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """‖found - expected‖ / ‖expected‖."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
