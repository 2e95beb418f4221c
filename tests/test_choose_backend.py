"""What `auto` runs a model on: made-up backends that are here or not, and take what is asked or not."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from adaptrt.backends.base import LoadOptions
from adaptrt.backends.choose import load_executable
from adaptrt.backends.cpu import CpuBackend
from adaptrt.backends.cuda import CudaBackend
from adaptrt.backends.native import ABI_VERSION, ERRORS, Calls, native_module
from adaptrt.errors import BackendError, NoMemoryError, UnavailableError
from adaptrt.testing.programs import decoder


class Made:
    """A backend whose executable is its own name."""

    takes_device = True
    takes_gpu_memory = False

    def __init__(self, name: str, reason: str | None = None, error: BackendError | None = None) -> None:
        self.name, self.reason, self.error, self.options = name, reason, error, LoadOptions()

    def unavailable(self) -> str | None:
        return self.reason

    def load(self, program: Any, tensors: Any, options: LoadOptions) -> Any:
        self.options = options
        if self.error:
            raise self.error
        return f"{self.name} loaded"


def auto(*backends: Made, choice: str = "auto", **options: Any) -> tuple[Any, str]:
    program: Any = None
    return load_executable({b.name: b for b in backends}, choice, program, {}, LoadOptions(**options))


CPU, REFERENCE = Made("cpu"), Made("reference")


@pytest.mark.parametrize(
    ("backends", "chosen"),
    [
        ((REFERENCE, CPU, Made("cuda")), "cuda"),
        ((Made("tpu"), CPU), "cpu"),  # a plugin's backend has to be asked for
        ((CPU, REFERENCE, Made("cuda", "no driver")), "cpu"),
        ((CPU, Made("cuda", error=UnavailableError("no precision exact"))), "cpu"),
    ],
)
def test_auto_takes_the_first_that_takes_the_model_and_says_nothing(
    backends: tuple[Made, ...], chosen: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert auto(*backends) == (f"{chosen} loaded", chosen)
    assert not caplog.records


@pytest.mark.parametrize(
    ("backends", "chosen", "words"),
    [
        ((CPU, Made("cuda", error=NoMemoryError("9 bytes do not fit"))), "cpu", "9 bytes do not fit; running on"),
        ((Made("cpu", "broken"), REFERENCE), "reference", "slow reference: broken"),
        ((REFERENCE,), "reference", "slow reference: not installed"),
    ],
)  # fmt: skip
def test_what_a_user_would_wonder_about_is_one_warning(
    backends: tuple[Made, ...], chosen: str, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert auto(*backends)[1] == chosen
    (record,) = caplog.records
    assert record.levelname == "WARNING" and words in record.getMessage()


@pytest.mark.parametrize("kind", [UnavailableError, NoMemoryError, BackendError])
def test_a_backend_that_was_named_is_not_replaced(kind: type[BackendError]) -> None:
    with pytest.raises(kind, match="its own words"):
        auto(CPU, Made("cuda", error=kind("its own words")), choice="cuda:1")


def test_a_fault_is_no_reason_for_another_backend() -> None:
    with pytest.raises(BackendError, match="register 9"):
        auto(CPU, Made("cuda", error=BackendError("register 9")))


def test_nothing_at_all_is_an_error() -> None:
    with pytest.raises(BackendError, match="no backend is available"):
        auto(Made("cpu", "broken"), Made("cuda", "no driver"))


def test_options_arrive_and_a_device_only_by_name() -> None:
    cuda = Made("cuda")
    assert auto(CPU, cuda, precision="exact")[1] == "cuda"
    assert (cuda.options.precision, cuda.options.device) == ("exact", "")
    assert auto(CPU, cuda, choice="cuda:1")[1] == "cuda:1" and cuda.options.device == "1"


def test_a_limit_of_gpu_memory_goes_to_a_backend_that_keeps_it_and_to_no_other() -> None:
    plain, cuda = Made("cuda"), Made("cuda")
    cuda.takes_gpu_memory = True
    assert auto(CPU, cuda, gpu_memory=5)[1] == "cuda" and cuda.options.gpu_memory == 5
    for backends in ((CPU,), (plain, CPU), (CPU, Made("cuda", "no driver"))):
        with pytest.raises(
            BackendError, match=r"'(cpu|cuda)': has no GPU memory to limit, found a limit of 5 bytes"
        ):
            auto(*backends, gpu_memory=5)
    cuda.error = NoMemoryError("at least 9 MiB")
    with pytest.raises(NoMemoryError, match="at least 9 MiB"):
        auto(CPU, cuda, gpu_memory=5)


@pytest.mark.parametrize("options", [{"precision": "exact"}, {"kv_dtype": "f32"}])
def test_what_cuda_does_not_offer_auto_finds_elsewhere(options: dict[str, Any]) -> None:
    """On every machine: with a GPU its backend refuses these, without one it is not there."""
    backends = {"cpu": CpuBackend(), "cuda": CudaBackend()}
    model = decoder()
    executable, name = load_executable(backends, "auto", model.program, model.tensors, LoadOptions(**options))
    assert name == "cpu"
    executable.close()


def test_codes_of_the_header_become_kinds_of_error() -> None:
    module = native_module("cpu")

    table = module.ffi.new(
        "adrt_backend *", {"abi_version": ABI_VERSION, "struct_bytes": module.ffi.sizeof("adrt_backend")}
    )
    calls = Calls(module, table, "made")
    assert calls.constant("NO_MEMORY") == 2 and set(ERRORS) == {"NO_MEMORY", "UNAVAILABLE"}
    for code, kind in ((1, BackendError), (2, NoMemoryError), (3, UnavailableError), (4, BackendError)):
        made = module.ffi.callback("int(adrt_error *)", lambda error, code=code: code)
        table.probe = made
        with pytest.raises(BackendError, match="backend made: ") as caught:
            calls("probe")
        assert type(caught.value) is kind


def test_a_cuda_backend_that_was_not_built_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = SimpleNamespace(__file__=str(tmp_path / "_native.so"))
    monkeypatch.setattr("adaptrt.backends.cuda.native_module", lambda name: module)
    (tmp_path / "_cuda.txt").write_text("switched off by ADAPTRT_CUDA=OFF\n")
    expected = "not built when adaptrt was installed: switched off by ADAPTRT_CUDA=OFF"
    assert CudaBackend().unavailable() == expected
