"""The variant conformance kit on the variants of plugins/: each against its formula, dense and plain."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
import torch
from adaptrt_adalora import AdaLoraVariant
from adaptrt_alora import AloraVariant
from adaptrt_boft import BoftVariant
from adaptrt_c3a import C3aVariant
from adaptrt_delora import DeloraVariant
from adaptrt_dora import DoraVariant
from adaptrt_fourierft import FourierFtVariant
from adaptrt_hra import HraVariant
from adaptrt_ia3 import Ia3Variant
from adaptrt_ln_tuning import LnTuningVariant
from adaptrt_loha import LoHaVariant
from adaptrt_lokr import LoKrVariant
from adaptrt_miss import MissVariant
from adaptrt_oft import OftVariant
from adaptrt_randlora import RandLoraVariant
from adaptrt_rslora import RsLoraVariant
from adaptrt_shira import ShiraVariant
from adaptrt_trainable_tokens import TrainableTokensVariant
from adaptrt_vblora import VbLoraVariant
from adaptrt_vera import VeraVariant

from adaptrt.adapters.lora import LoraVariant
from adaptrt.testing import VariantConformance

SQUARE = ("blk.0.attn_q", "blk.1.attn_q")  # [48, 48]


def block_diagonal(blocks: Any) -> Any:
    return torch.block_diag(*(torch.from_numpy(block) for block in blocks)).numpy()


class Kit(VariantConformance):
    """For methods whose formula is another weight, or other inputs of the base's."""

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        raise NotImplementedError

    def reference(self, x: Any, weight: Any, bias: Any, params: Any, tensors: Any, scale: float) -> Any:
        return x @ self.changed(weight, tensors, scale).T + bias


class TestLora(VariantConformance):
    variant = LoraVariant()
    config: ClassVar = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "lora_bias": True}
    targets = ("blk.0.attn_q", "blk.1.attn_q", "blk.0.ffn_down", "output")

    def reference(self, x: Any, weight: Any, bias: Any, params: Any, tensors: Any, scale: float) -> Any:
        change = x @ tensors["A"].T @ tensors["B"].T + tensors["bias"]
        return x @ weight.T + bias + scale * 6 / 4 * change


class TestRsLora(Kit):
    variant = RsLoraVariant()
    config: ClassVar = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_rslora": True}
    targets = ("blk.0.attn_q", "token_embd")

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        return weight + scale * 3 * tensors["B"] @ tensors["A"]


class TestAlora(Kit):
    variant = AloraVariant()
    config: ClassVar = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "alora_invocation_tokens": [3, 1]}

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        return weight + scale * 6 / 4 * tensors["B"] @ tensors["A"]


class TestDora(Kit):
    variant = DoraVariant()
    config: ClassVar = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "use_dora": True}
    targets = ("blk.0.attn_q", "blk.0.ffn_down", "token_embd", "output")

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        new = weight + scale * 6 / 4 * tensors["B"] @ tensors["A"]
        return tensors["magnitude"][:, None] / np.linalg.norm(new, axis=1, keepdims=True) * new


class TestVera(Kit):
    variant = VeraVariant()
    config: ClassVar = {"peft_type": "VERA", "r": 8}
    sizes: ClassVar = {"largest in": 80, "largest out": 48}

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        a, b = tensors["A"][:, : weight.shape[1]], tensors["B"][: len(weight)]
        return weight + scale * np.diag(tensors["lambda_b"]) @ b @ np.diag(tensors["lambda_d"]) @ a


class TestAdaLora(Kit):
    variant = AdaLoraVariant()
    config: ClassVar = {"peft_type": "ADALORA", "init_r": 4, "lora_alpha": 6}

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        return weight + scale * 6 / (4 + 1e-5) * tensors["B"] @ (tensors["E"] * tensors["A"])


class TestDelora(Kit):
    variant = DeloraVariant()
    config: ClassVar = {"peft_type": "DELORA", "r": 4}

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        a, b = tensors["A"], tensors["B"]
        a, b = a / np.linalg.norm(a, axis=1, keepdims=True), b / np.linalg.norm(b, axis=0)
        return weight + scale * tensors["lambda"] / 4 * b @ a * tensors["lengths"]


class TestHra(Kit):
    variant = HraVariant()
    config: ClassVar = {"peft_type": "HRA", "r": 3}

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        turned = weight
        for u in (tensors["u"] / np.linalg.norm(tensors["u"], axis=0)).T:
            turned = turned @ (np.eye(len(u)) - 2 * np.outer(u, u))
        return weight + scale * (turned - weight)


class TestIa3(VariantConformance):
    variant = Ia3Variant()
    config: ClassVar = {"peft_type": "IA3"}

    def reference(self, x: Any, weight: Any, bias: Any, params: Any, tensors: Any, scale: float) -> Any:
        return (x @ weight.T + bias) * (1 + scale * (tensors["output"][:, 0] - 1))


class TestIa3FeedForward(Kit):
    variant = Ia3Variant()
    config: ClassVar = {"peft_type": "IA3"}

    def names(self, module: Any) -> Any:
        return {"input": "ia3_l"}

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        return weight * (1 + scale * (tensors["input"] - 1))


class TestLnTuning(Kit):
    variant = LnTuningVariant()
    config: ClassVar = {"peft_type": "LN_TUNING"}
    targets = ("blk.0.attn_norm", "output_norm")

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        return weight + scale * (np.diag(tensors["replaced_weight"]) - weight)


class TestTrainableTokens(Kit):
    variant = TrainableTokensVariant()
    config: ClassVar = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [9, 1, 30]}
    targets = ("token_embd", "output")

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        table = weight.T.copy() if weight.shape[0] == 48 else weight.copy()
        table[[9, 1, 30]] += scale * (tensors["replaced_rows"] - table[[9, 1, 30]])
        return table.T if weight.shape[0] == 48 else table


class TestLoHa(Kit):
    variant = LoHaVariant()
    config: ClassVar = {"peft_type": "LOHA", "r": 3, "alpha": 4}

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        product = (tensors["w1_a"] @ tensors["w1_b"]) * (tensors["w2_a"] @ tensors["w2_b"])
        return weight + scale * 4 / 3 * product


class TestLoKr(Kit):
    variant = LoKrVariant()
    config: ClassVar = {"peft_type": "LOKR", "r": 3, "alpha": 4}
    sizes: ClassVar = {"out1": 6, "out2": 8, "in1": 4, "in2": 12}
    targets = SQUARE

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        w1, w2 = (tensors[f"{name}_a"] @ tensors[f"{name}_b"] for name in ("w1", "w2"))
        return weight + scale * 4 / 3 * np.kron(w1, w2)


class TestMiss(Kit):
    variant = MissVariant()
    config: ClassVar = {"peft_type": "MISS", "r": 8}
    sizes: ClassVar = {"width": 48}

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        return weight + scale * np.tile(tensors["block"].T, weight.shape[1] // 8)


class TestVbLora(Kit):
    variant = VbLoraVariant()
    config: ClassVar = {"peft_type": "VBLORA", "r": 2, "num_vectors": 6, "vector_length": 8, "topk": 2}
    sizes: ClassVar = {"runs of in": 6, "runs of out": 6}
    targets = SQUARE

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        def mixed(logits: Any) -> Any:
            shares = np.exp(logits) * (logits >= np.sort(logits)[..., -2:-1])
            return shares / shares.sum(-1, keepdims=True) @ tensors["bank"]

        a = mixed(tensors["logits_A"]).reshape(2, 48)
        b = mixed(tensors["logits_B"]).transpose(0, 2, 1).reshape(48, 2)
        return weight + scale * b @ a


class TestOft(Kit):
    variant = OftVariant()
    config: ClassVar = {
        "peft_type": "OFT", "r": 0, "oft_block_size": 16, "use_cayley_neumann": False, "peft_version": "0.21.2",
    }  # fmt: skip

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        q, eye = np.zeros((len(tensors["R"]), 16, 16)), np.eye(16)
        above, right = np.triu_indices(16, 1)
        q[:, above, right] = tensors["R"]
        q -= q.transpose(0, 2, 1)
        turn = block_diagonal([(eye - one) @ np.linalg.inv(eye + one) for one in q])  # of rows of x
        return weight @ (np.eye(len(turn)) + scale * (turn - np.eye(len(turn)))).T


class TestBoft(Kit):
    variant = BoftVariant()
    config: ClassVar = {
        "peft_type": "BOFT", "boft_block_size": 8, "boft_block_num": 0, "boft_n_butterfly_factor": 1,
    }  # fmt: skip
    sizes: ClassVar = {"blocks": 6}
    targets = SQUARE

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        skew, eye = (tensors["R"][0] - tensors["R"][0].transpose(0, 2, 1)) / 2, np.eye(8)
        turn = block_diagonal([(eye - one) @ np.linalg.inv(eye + one) for one in skew])
        gain = 1 + scale * (tensors["s"] - 1)
        return gain * (weight @ (np.eye(48) + scale * (turn - np.eye(48))).T)


class TestC3a(Kit):
    variant = C3aVariant()
    config: ClassVar = {"peft_type": "C3A", "block_size": 16}
    sizes: ClassVar = {"out / block": 3, "in / block": 3}
    targets = SQUARE

    def tensor(self, role: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
        return rng.standard_normal(shape, np.float32)

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        blocks = [
            [np.stack([np.roll(kernel, k) for k in range(16)]) for kernel in row] for row in tensors["kernel"]
        ]
        return weight + scale / 48 * np.block(blocks)


class TestFourierFt(Kit):
    variant = FourierFtVariant()
    config: ClassVar = {"peft_type": "FOURIERFT", "n_frequency": 20, "scaling": 90.0, "random_loc_seed": 5}

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        places = torch.randperm(weight.size, generator=torch.Generator().manual_seed(5))[:20]
        spectrum = np.zeros(weight.size)
        spectrum[places.numpy()] = tensors["spectrum"]
        return weight + scale * 90 * np.fft.ifft2(spectrum.reshape(weight.shape)).real


class TestRandLora(Kit):
    variant = RandLoraVariant()
    config: ClassVar = {"peft_type": "RANDLORA", "r": 8, "randlora_alpha": 12}
    sizes: ClassVar = {"smallest": 48, "largest": 80, "most bases": 7, "bases": 6, "smaller": 48}
    targets = SQUARE

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        a = tensors["lambda"][:, :, None] * tensors["A"] * tensors["gamma"]  # [rank, bases, in]
        b = tensors["B"].reshape(80, -1)[:48, :48]  # PEFT cuts [out, bases · rank] as it lies
        return weight + scale * 12 / 8 * b @ a.reshape(48, 48)


class TestShira(Kit):
    variant = ShiraVariant()
    config: ClassVar = {"peft_type": "SHIRA", "r": 2}
    sizes: ClassVar = {"entries": 100}

    def tensor(self, role: str, shape: tuple[int, ...], rng: np.random.Generator) -> Any:
        if role == "places":
            return rng.integers(0, 48, shape, np.int32)
        return super().tensor(role, shape, rng)

    def changed(self, weight: Any, tensors: Any, scale: float) -> Any:
        change = np.zeros_like(weight)
        np.add.at(change, tuple(tensors["places"]), tensors["values"])
        return weight + scale * change
