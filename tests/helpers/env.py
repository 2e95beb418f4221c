"""A virtual environment of its own that sees what this one has installed; a plugin goes in and disturbs no one."""

from __future__ import annotations

import os
import site
import subprocess
import venv
from pathlib import Path


class Env:
    """`run` executes shell lines in a folder, with the environment's Python first in PATH and no package index."""

    def __init__(self, path: Path) -> None:
        venv.create(path, with_pip=False, symlinks=True)
        self._bin = path / "bin"
        (packages,) = path.glob("lib/python*/site-packages")
        seen = [place for place in site.getsitepackages() if Path(place).is_dir()]
        lines = [f"import site; site.addsitedir({place!r})\n" for place in seen]  # with their own .pth files
        (packages / "shared.pth").write_text("".join(lines))

    def run(self, script: str, cwd: Path) -> str:
        """What the lines print; fails with all of it when one of them fails."""
        # pip takes any value of the second for "no isolation", even 0: it builds with the setuptools that is here
        offline = {"PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        environment = os.environ | offline | {"PATH": f"{self._bin}{os.pathsep}{os.environ['PATH']}"}
        environment.pop("PYTHONPATH", None)
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout
