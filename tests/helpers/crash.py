"""Kill a writing process at random moments and look at what it left.

`python crash.py append|write KILLS SEED FOLDER` prints {"kills": …, "commits": …, "torn": files that held
bytes of an interrupted append} as JSON; a file that opens wrongly ends it with a traceback.
"""

from __future__ import annotations

import json
import mmap
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import numpy as np

from adaptrt.format import Writer, append, open_file, verify
from adaptrt.tensor import Tensor

RESTART_BYTES = 32 << 20
MAX_DELAY_S = 0.06


def tensor(seed: int) -> Tensor:
    """About 300 KB, so that a kill may well fall into writing it."""
    return Tensor.from_numpy(np.random.default_rng(seed).integers(0, 256, 300_000 + seed % 1000, np.uint8))


def write_whole(path: Path, step: int) -> None:
    with Writer(path, metadata={"step": step}) as w, w.section("base", kind="base") as s:
        s.add("t", tensor(step))


def add_and_remove(path: Path, step: int) -> None:
    """Section `step` comes, section `step - 2` goes."""
    with append(path) as a:
        with a.section(f"adapter/{step}", kind="adapter", codec="zstd" if step % 2 else "raw") as s:
            s.add("t", tensor(step))
        if step > 2:
            a.remove(f"adapter/{step - 2}")
        a.metadata["step"] = step


def check(path: Path, acknowledged: int, appended: bool) -> int:
    """Look at the file after a kill; its step, which is the last acknowledged one or the one after it."""
    with open_file(path) as file:
        step = int(file.metadata["step"])
        expect(step in (acknowledged, acknowledged + 1), f"step {step} after {acknowledged}")
        expect(file.warnings == [], str(file.warnings))
        expected = {f"adapter/{n}" for n in (step - 1, step) if n > 0} | {"base"} if appended else {"base"}
        expect(set(file.sections) == expected, str(list(file.sections)))
        for name in file.sections:
            seed = int(name.split("/")[1]) if "/" in name else (0 if appended else step)
            expect(file.tensor(name, "t").data.tobytes() == tensor(seed).data.tobytes(), name)
    return step


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(what)


def child(path: Path, step: int, acknowledged: mmap.mmap, appended: bool) -> NoReturn:
    try:
        while True:
            step += 1
            (add_and_remove if appended else write_whole)(path, step)
            acknowledged[:8] = step.to_bytes(8, "little")
    finally:
        os._exit(1)


def main(mode: str, kills: int, seed: int, folder: Path) -> None:
    rng = random.Random(seed)
    path = folder / "victim.adrt"
    appended = mode == "append"
    acknowledged = mmap.mmap(-1, 8)  # shared with the child
    step = commits = torn = 0
    write_whole(path, 0)
    for _ in range(kills):
        acknowledged[:8] = step.to_bytes(8, "little")
        pid = os.fork()
        if pid == 0:
            child(path, step, acknowledged, appended)
        time.sleep(rng.uniform(0, MAX_DELAY_S))
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        expect(os.WIFSIGNALED(status), "the child failed by itself")
        found = check(path, int.from_bytes(acknowledged[:8], "little"), appended)
        problems = verify(path)
        if appended and problems:
            torn += 1
            expect(len(problems) == 1 and "interrupted append" in problems[0], str(problems))
            with append(path):  # reclaims the torn bytes
                pass
            problems = verify(path)
        expect(problems == [], str(problems))
        commits, step = commits + found - step, found
        if path.stat().st_size > RESTART_BYTES:
            step = 0
            write_whole(path, step)
    print(json.dumps({"kills": kills, "commits": commits, "torn": torn}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
