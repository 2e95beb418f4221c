"""Train the built-in demo model: a tokenizer, a small Llama base, four adapters.

Usage: ``python -m adaptrt.demo.recipe CORPORA_DIR OUT_DIR``

``CORPORA_DIR`` holds the public-domain texts ``kjv.txt``, ``presidents.txt``,
``shakespeare.txt`` and ``grimm.txt``.  ``OUT_DIR`` receives ``base/`` (a Hugging Face
folder), ``adapters/<name>/`` (PEFT folders) and ``samples.txt``.  Nothing is downloaded
and nothing else in the package imports this file: torch, transformers and peft are needed
to remake the demo, never to run it.

The demo has to fit in a few megabytes once packed, so the sizes below come from this
budget (``check_budget`` recomputes it from the files; the limit is 3.95 MB):

==================  =====================================================  =========
part                arithmetic                                                 bytes
==================  =====================================================  =========
linear layers       6 x (2*256*256 + 2*256*128 + 3*256*640) x 4.13 / 8     2 131 477
tied embedding      2048 x 256 x 8.25 / 8                                    540 672
norms (float32)     13 x 256 x 4                                              13 312
adapters (bf16)     24 ranks x 26 880 x 2 x 0.9                            1 161 216
tokenizer.json      about 120 kB x 0.3                                        36 000
**total**                                                                  3 882 677
==================  =====================================================  =========

One rank over all seven projections of a layer costs 4480 numbers (the sum of their in-
and out-dimensions), hence 26 880 for six layers; 24 ranks are spent as 8 + 8 + 4 + 4.

The whole run takes about 40 minutes on two idle cores with AVX512-BF16.  On a busy machine
two OpenMP threads wait for each other most of the time: run the adapters side by side
instead, one process each, with ``OMP_NUM_THREADS=1`` and ``--only NAME``.

Every random choice is seeded, so on one machine and one torch build the run repeats; the
last digits may differ elsewhere because bf16 matrix products round differently.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adaptrt.demo.batches import (
    BOS_ID,
    CONTEXT,
    EOS_ID,
    VOCAB,
    Phase,
    Stream,
    adapter_batches,
    build_stream,
    mixed_batches,
    train_tokenizer,
)
from adaptrt.demo.texts import SOURCES, read_sources

log = logging.getLogger("adaptrt.demo.recipe")

SEED = 20240607
PACKED_LIMIT = 3_950_000
# fmt: off
NF4_LEVELS = [
    -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
]
# fmt: on
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PROMPTS = ["The king looked at the sea and said", "In the morning the old man", "My friends,"]

LossFn = Callable[[Tensor], Tensor]


# Short rows are faster per token on a CPU; the second phase then teaches the positions
# 256..511, without which the advertised context would be half untrained.
BASE_PHASES = [Phase(2000, 16, 256), Phase(600, 8, 512)]
BASE_RATE = 2e-3
CHECKPOINT_EVERY = 500


@dataclass(frozen=True)
class AdapterSpec:
    """One adapter: its text, its rank and scaling, and how long it trains."""

    name: str
    source: str
    rank: int
    alpha: int
    rslora: bool
    steps: int
    rate: float = 3e-3


# Both scalings are shipped (alpha / r, and alpha / sqrt(r) for rsLoRA), and two ranks, so
# that the demo exercises a mixed batch.  Grimm's text is so short that the base has seen it
# a dozen times: longer or faster training there only memorizes.
ADAPTERS = [
    AdapterSpec("scripture", "kjv", rank=4, alpha=8, rslora=False, steps=120),
    AdapterSpec("bard", "shakespeare", rank=8, alpha=8, rslora=True, steps=120),
    AdapterSpec("president", "presidents", rank=4, alpha=16, rslora=False, steps=140),
    AdapterSpec("grimm", "grimm", rank=8, alpha=8, rslora=True, steps=80, rate=2e-3),
]
ADAPTER_BATCH, ADAPTER_LENGTH = 16, 256


# ------------------------------------------------------------------------ training


def build_model() -> LlamaForCausalLM:
    """Create the untrained base; every in-dimension is a multiple of the NF4 block, 64."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)


def loss_function(model: nn.Module, compiled: bool) -> LossFn:
    """Next-token loss of a batch of rows, in bf16 autocast.

    On CPUs with AVX512-BF16 autocast and ``torch.compile`` together more than double the
    speed; the loss itself stays in float32.
    """

    def loss(rows: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        return functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    return torch.compile(loss, dynamic=False) if compiled else loss


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up over 4 % of the steps, then a cosine down to 3 % of the peak."""
    warmup = max(1, total // 25)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return peak * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: nn.Module, decay: float) -> torch.optim.AdamW:
    """AdamW over the trainable tensors; norms (vectors) are not decayed."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def train(
    model: nn.Module,
    data: Iterator[Tensor],
    total: int,
    peak: float,
    decay: float,
    after_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Run the optimizer over ``data`` and log the smoothed loss."""
    model.train()
    loss_of = loss_function(model, compiled=True)
    optimizer = make_optimizer(model, decay)
    begun, smooth = time.monotonic(), 0.0
    for step, rows in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total, peak)
        loss = loss_of(rows)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if step == 0 else 0.97 * smooth + 0.03 * loss.item()
        if (step + 1) % 50 == 0:
            spent = time.monotonic() - begun
            log.info("step %d/%d loss %.3f (%.0f s)", step + 1, total, smooth, spent)
        after_step(step + 1)


@torch.no_grad()
def held_out_loss(model: nn.Module, stream: Stream) -> float:
    """Mean loss in nats a token over the held-out stream, in rows of 256 tokens."""
    model.eval()
    loss_of = loss_function(model, compiled=False)
    count = len(stream.held_out) // 257
    rows = stream.held_out[: count * 257].view(count, 257)
    losses = [loss_of(part) * len(part) for part in rows.split(16)]
    return float(sum(losses)) / count


def report_losses(label: str, model: nn.Module, streams: list[Stream]) -> None:
    """Log the held-out loss of every source, also in bits a byte."""
    for stream in streams:
        loss = held_out_loss(model, stream)
        bits = loss / math.log(2) * len(stream.held_out) / stream.held_out_bytes
        log.info("%s: held-out %s %.3f nats/token, %.3f bits/byte", label, stream.name, loss, bits)


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Save beside the target and move file by file, so a reader never sees half a file."""
    scratch = folder.with_name(folder.name + ".partial")
    model.save_pretrained(scratch)
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(scratch.iterdir()):
        file.replace(folder / file.name)
    scratch.rmdir()


def train_base(streams: list[Stream], out: Path) -> None:
    """Train the base on the mix, leaving a usable checkpoint every few minutes."""
    model = build_model()

    def checkpoint(step: int) -> None:
        if step % CHECKPOINT_EVERY == 0:
            save_model(model, out / "base")

    total = sum(p.steps for p in BASE_PHASES)
    train(model, mixed_batches(streams, BASE_PHASES, SEED), total, BASE_RATE, 0.1, checkpoint)
    save_model(model, out / "base")
    report_losses("float base", model, streams)


# ------------------------------------------------------------------------ adapters


def nf4_round_trip(weight: Tensor) -> Tensor:
    """Quantize to NF4 in blocks of 64 with one absolute maximum each, and back.

    The adapters run over a quantized base, so they are trained over what it decodes to.
    """
    levels = torch.tensor(NF4_LEVELS)
    blocks = weight.reshape(-1, 64)
    scale = blocks.abs().amax(dim=1, keepdim=True).clamp_min(1e-12)
    nearest = torch.bucketize(blocks / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).view_as(weight)


def load_quantized_base(folder: Path) -> LlamaForCausalLM:
    """Load the base with its linear layers rounded through NF4."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.split(".")[-1] in PROJECTIONS:
                module.weight.copy_(nf4_round_trip(module.weight))
    model.name_or_path = "adaptrt-demo"
    return model


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save as PEFT does, then cast to bf16: half the bytes.

    The empty model card goes, and the target list, which PEFT keeps as a set, is sorted so
    that two runs write the same file.
    """
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(str(folder), save_embedding_layers=False)
    weights = folder / "adapter_model.safetensors"
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    (folder / "README.md").unlink(missing_ok=True)
    settings = folder / "adapter_config.json"
    config = json.loads(settings.read_text())
    config["target_modules"].sort()
    settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def train_adapter(spec: AdapterSpec, streams: dict[str, Stream], out: Path) -> None:
    """Train one adapter on its own text over the quantized base."""
    stream = streams[spec.source]
    others = [s for s in streams.values() if s is not stream]
    torch.manual_seed(SEED)
    torch._dynamo.reset()
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        use_rslora=spec.rslora,
        target_modules=PROJECTIONS,
        task_type="CAUSAL_LM",
    )
    base = load_quantized_base(out / "base")
    report_losses("NF4 base", base, [stream])
    model = get_peft_model(base, config)
    phase = Phase(spec.steps, ADAPTER_BATCH, ADAPTER_LENGTH)
    train(model, adapter_batches(stream, others, phase, SEED), spec.steps, spec.rate, 0.0)
    save_adapter(model, out / "adapters" / spec.name)
    report_losses(f"NF4 base + {spec.name}", model, [stream])


# ------------------------------------------------------------------ samples, budget


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str, seed: int) -> str:
    """Continue a prompt for up to 100 tokens at temperature 0.8, top-k 40."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt")
    produced = model.generate(
        inputs["input_ids"],
        attention_mask=torch.ones_like(inputs["input_ids"]),
        max_new_tokens=100,
        do_sample=True,
        temperature=0.8,
        top_k=40,
        pad_token_id=EOS_ID,
    )
    return str(tokenizer.decode(produced[0], skip_special_tokens=True))


def write_samples(out: Path) -> None:
    """Write continuations of the same neutral prompts by the base and every adapter."""
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    parts: list[str] = []
    for name in ["base", *(spec.name for spec in ADAPTERS)]:
        model: Any = load_quantized_base(out / "base")
        if name != "base":
            model = PeftModel.from_pretrained(model, str(out / "adapters" / name))
        model.eval()
        for prompt in PROMPTS:
            for seed in (1, 2):
                parts.append(f"=== {name}, seed {seed}\n{sample(model, tokenizer, prompt, seed)}\n")
    (out / "samples.txt").write_text("\n".join(parts), encoding="utf-8")


def packed_estimate(out: Path) -> dict[str, int]:
    """Estimate the packed size of each part from the files themselves."""
    sizes = dict.fromkeys(["linear", "embedding", "norms"], 0.0)
    for name, tensor in load_file(out / "base" / "model.safetensors").items():
        if "embed_tokens" in name:
            sizes["embedding"] += tensor.numel() * 8.25 / 8
        elif name.split(".")[-2] in PROJECTIONS:
            sizes["linear"] += tensor.numel() * 4.13 / 8
        else:
            sizes["norms"] += tensor.numel() * 4
    sizes["tokenizer"] = (out / "base" / "tokenizer.json").stat().st_size * 0.3
    for spec in ADAPTERS:
        file = out / "adapters" / spec.name / "adapter_model.safetensors"
        sizes[f"adapter {spec.name}"] = file.stat().st_size * 0.9
    return {part: round(size) for part, size in sizes.items()}


def check_budget(out: Path) -> None:
    """Log the packed estimate and fail if it is over the limit."""
    sizes = packed_estimate(out)
    for part, size in sizes.items():
        log.info("packed %-18s %9d bytes", part, size)
    total = sum(sizes.values())
    log.info("packed total %d of %d bytes", total, PACKED_LIMIT)
    if total > PACKED_LIMIT:
        raise ValueError(f"the demo would pack to {total} bytes, over {PACKED_LIMIT}")


# ---------------------------------------------------------------------------- main


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parts = ["base", *(spec.name for spec in ADAPTERS), "samples"]
    parser = argparse.ArgumentParser(description="Train the adaptrt demo model.")
    parser.add_argument("corpora", type=Path, help="folder with kjv.txt and the other texts")
    parser.add_argument("out", type=Path, help="folder to write base/ and adapters/ to")
    parser.add_argument("--only", action="append", choices=parts, help="make only this part (repeatable)")
    arguments = parser.parse_args()
    arguments.only = arguments.only or parts
    return arguments


def main() -> None:
    """Run the whole recipe, or the parts asked for over what OUT already holds."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    only: list[str] = arguments.only
    out: Path = arguments.out
    documents = read_sources(arguments.corpora, SEED)
    if "base" in only:
        tokenizer = train_tokenizer([d for group in documents.values() for d in group], out / "base")
    else:
        tokenizer = Tokenizer.from_file(str(out / "base" / "tokenizer.json"))
    streams = {s.name: build_stream(s, documents[s.name], tokenizer) for s in SOURCES}
    if "base" in only:
        train_base(list(streams.values()), out)
    for spec in ADAPTERS:
        if spec.name in only:
            train_adapter(spec, streams, out)
    if "samples" in only:
        write_samples(out)
        check_budget(out)


if __name__ == "__main__":
    main()
