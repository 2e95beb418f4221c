"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with a real small model and real text beside the checkout; users do not have it."""
    if not (SHARED / "models").is_dir():
        pytest.skip("needs ../shared (models and corpora beside the checkout)")
    return SHARED
