"""transformers + bitsandbytes NF4 + PEFT (installed by those names): bfloat16 compute, on our device."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext
from importlib import import_module
from typing import Any

from adaptrt.bench.peers import Setup
from adaptrt.bench.work import Work

NAME = "peft"
PACKAGE = "peft"
RANK = 16


def works(setup: Setup) -> list[Work]:
    """Decode with and without an adapter, and prefills, named as ours are."""
    torch = import_module("torch")
    torch.set_num_threads(setup.threads)
    model = _quantized(setup.metadata, setup.device)

    def timed(ids: list[int], **options: Any) -> tuple[float, Any]:
        start = time.perf_counter()
        out = model(torch.tensor([ids], device=setup.device), **options)
        out.logits.cpu()  # waits for the device, and brings home what ours does
        return time.perf_counter() - start, out

    def decode(adapted: bool) -> float:
        with torch.inference_mode(), _adapter(model, adapted):
            _, out = timed([5], use_cache=True)
            times = []
            for position in range(setup.steps):
                seconds, out = timed([6 + position], past_key_values=out.past_key_values, use_cache=True)
                times.append(seconds)
        return statistics.median(times)

    def prefill(n_tokens: int) -> float:
        with torch.inference_mode(), _adapter(model, False):
            return timed([5 + i % 1000 for i in range(n_tokens)], logits_to_keep=1)[0]

    return [
        Work("decode 1 stream", 1, lambda: decode(False)),
        Work("decode 1 stream, 1 adapter", 1, lambda: decode(True)),
        *(Work(f"prefill {n}", n, lambda n=n: prefill(n)) for n in setup.prefills),  # type: ignore[misc]
    ]


def _adapter(model: Any, active: bool) -> Any:
    return nullcontext() if active else model.disable_adapter()


def _quantized(metadata: Mapping[str, Any], device: str) -> Any:
    """A random Llama with Linear4bit layers under a PEFT LoRA on all of them, made where it will run."""
    torch, nn = import_module("torch"), import_module("bitsandbytes.nn")
    peft, transformers = import_module("peft"), import_module("transformers")
    config = transformers.LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
    )
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            parent = model.get_submodule(name.rpartition(".")[0])
            packed = nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                device="meta",
            )
            packed.weight = nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            )
            setattr(parent, name.rpartition(".")[2], packed.to(device))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=targets)).eval()
