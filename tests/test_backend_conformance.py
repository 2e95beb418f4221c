"""The backend conformance kit, on the backends that live here."""

from __future__ import annotations

import pytest
import torch
from adaptrt_torch import TorchBackend

from adaptrt.backends.cpu import CpuBackend
from adaptrt.testing import BackendConformance


class TestCpu(BackendConformance):
    backend = CpuBackend()


class TestTorch(BackendConformance):
    backend = TorchBackend()
    device = "cpu"
    independence = 1e-5  # torch picks its kernels by the batch's shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
class TestTorchOnCuda(TestTorch):
    device = "cuda"
