"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Matrices of tests are small, and the threads of torch and numpy spin for each other: 4 times slower on a busy machine.
# numpy reads this when it is imported, so nothing above may import it.
for threads in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(threads, "1")
# Ignored in a shell's background jobs, and what tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with a real small model and real text beside the checkout; users do not have it."""
    if not (SHARED / "models").is_dir():
        pytest.skip("needs ../shared (models and corpora beside the checkout)")
    return SHARED


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small file with a section "base"."""
    from helpers.written import write_base  # imports numpy

    path = tmp_path / "model.adrt"
    write_base(path)
    return path


@pytest.fixture(scope="session", autouse=True)
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run outside the checkout: `python -m adaptrt` would otherwise import its sources, which have no built module."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("cwd"))
    yield
    os.chdir(before)
