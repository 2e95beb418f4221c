"""`convert`, `pack`, `adapter add` and `merge` killed at random moments: what is left opens rightly or is not there.

The long version: ADAPTRT_KILLS=200.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers.cli import adaptrt_cli
from helpers.oracle import llama_folder, peft_folder

from adaptrt.cli import main
from adaptrt.format import append, open_file, verify

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fork:DeprecationWarning"
)  # Python 3.12 warns in any threaded process

KILLS = int(os.environ.get("ADAPTRT_KILLS", "8"))


@dataclass(frozen=True)
class Files:
    folder: Path
    base: Path
    adapter: Path
    fingerprint: str


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    path = tmp_path_factory.mktemp("kills")
    folder = llama_folder(path / "hf", hidden_size=256, intermediate_size=704, vocab_size=4000)
    peft = peft_folder(path / "voice", folder, r=32)
    assert adaptrt_cli("convert", folder, "-o", path / "base.adrt").code == 0
    done = adaptrt_cli("convert", peft, "-o", path / "voice.adrt", "--base", path / "base.adrt")
    assert done.code == 0, done.err
    with open_file(path / "base.adrt") as file:
        return Files(folder, path / "base.adrt", path / "voice.adrt", file.sections["base"].digest)


def run_in_child(args: Sequence[object]) -> int:
    """Fork, so that no time goes into starting Python and every moment is one of the command's own."""
    pid = os.fork()
    if pid == 0:
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            main([str(arg) for arg in args])
        finally:
            sys.stdout = sys.stderr = None  # type: ignore[assignment]
            os._exit(0)
    return pid


def kill_at_random(
    args: Sequence[object], prepare: Callable[[], None], check: Callable[[bool], None]
) -> None:
    """Time the command once, then kill it at KILLS moments spread over that time; `check` looks at what is left."""
    prepare()
    started = time.perf_counter()
    os.waitpid(run_in_child(args), 0)
    seconds = time.perf_counter() - started
    check(True)
    rng = random.Random(0)
    for _ in range(KILLS):
        prepare()
        pid = run_in_child(args)
        time.sleep(rng.uniform(0, 1.1 * seconds))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        check(not os.WIFSIGNALED(status))


def test_convert(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out.adrt"

    def check(finished: bool) -> None:
        assert out.exists() or not finished
        if out.exists():
            assert out.read_bytes() == files.base.read_bytes()

    kill_at_random(["convert", files.folder, "-o", out], lambda: out.unlink(missing_ok=True), check)


def test_pack_over_an_existing_file(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out.adrt"

    def check(finished: bool) -> None:
        assert verify(out) == []
        with open_file(out) as file:
            assert file.sections["base"].digest == files.fingerprint
            assert ("adapter/voice" in file.sections) or not finished

    args = ["pack", "--force", out, files.base, files.adapter]
    kill_at_random(args, lambda: shutil.copyfile(files.base, out), check)


@pytest.mark.parametrize("to", ["adrt", "hf"])
def test_merge(to: str, files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def content() -> list[bytes]:
        return [path.read_bytes() for path in (sorted(out.iterdir()) if out.is_dir() else [out])]

    def prepare() -> None:
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)

    args = ["merge", files.base, files.adapter, "-o", out, "--to", to]
    assert adaptrt_cli(*args).code == 0
    whole = content()

    def check(finished: bool) -> None:
        assert out.exists() or not finished
        assert not out.exists() or content() == whole

    kill_at_random(args, prepare, check)


def test_adapter_add(files: Files, tmp_path: Path) -> None:
    out = tmp_path / "out.adrt"

    def check(finished: bool) -> None:
        problems = verify(out)
        assert all("interrupted append" in problem for problem in problems)
        with open_file(out) as file:
            assert file.sections["base"].digest == files.fingerprint
            added = "adapter/voice" in file.sections
        assert added or not finished
        if not added:
            assert adaptrt_cli("adapter", "add", out, files.adapter).code == 0
        elif problems:
            with append(out):
                pass
        assert verify(out) == []

    kill_at_random(["adapter", "add", out, files.adapter], lambda: shutil.copyfile(files.base, out), check)
