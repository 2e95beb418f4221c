"""The CPU backend of another architecture: cross-compiled, run by qemu, and called through a pipe (emulated.c).

Both sides are little-endian with 64-bit pointers and lay structs out alike, so the structs of `adaptrt.backends.native`
travel as they are: bytes, and a list of the pointers in them. `NativeExecutable` notices no difference.
"""

from __future__ import annotations

import atexit
import shutil
import struct
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any
from weakref import WeakValueDictionary

from adaptrt.backends.base import LoadOptions
from adaptrt.backends.native import ABI_VERSION, Calls, NativeExecutable, native_module
from adaptrt.program import Program
from adaptrt.tensor import Tensor

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
NATIVE = Path(__file__).resolve().parents[2] / "native"
# Of -O3 only the time to compile would be seen.
FLAGS = [
    "-std=gnu11",
    "-O1",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wall",
    "-Wextra",
    "-Werror",
]
FUNCTIONS = ("load", "reserve", "attach", "detach", "step", "describe", "unload")
REPLY = struct.Struct("<qqq512s")


def missing_tools() -> str | None:
    """Why nothing can be emulated here, or None."""
    missing = [tool for tool in (COMPILER, EMULATOR) if shutil.which(tool) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def compile_backend(folder: Path) -> Path:
    """Everything that CMake compiles for AArch64, and the driver, as one static program."""
    sources = [*NATIVE.glob("common/*.c"), *NATIVE.glob("cpu/*.c"), Path(__file__).with_suffix(".c")]
    sources = [s for s in sources if not s.stem.startswith(("kernels_avx", "kernels_vnni"))]
    include = [f"-I{NATIVE / name}" for name in ("include", "common", "cpu")]

    def compile_one(number: int) -> str:
        source, target = sources[number], folder / f"{number}.o"
        dot = ["-march=armv8.2-a+dotprod"] if source.stem.endswith("_neon_dot") else []
        command = [COMPILER, *FLAGS, *dot, *include, "-c", str(source), "-o", str(target)]
        subprocess.run(command, check=True)
        return str(target)

    with ThreadPoolExecutor(4) as pool:
        objects = list(pool.map(compile_one, range(len(sources))))
    program = folder / "backend"
    subprocess.run([COMPILER, "-static", *objects, "-lm", "-lpthread", "-o", str(program)], check=True)
    return program


class Ffi:
    """cffi's `ffi` that remembers how much memory lies behind an address, as long as its owner lives."""

    def __init__(self, ffi: Any) -> None:
        self._ffi = ffi
        self.owners: WeakValueDictionary[int, Any] = WeakValueDictionary()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ffi, name)

    def address(self, pointer: Any) -> int:
        return int(self._ffi.cast("uintptr_t", pointer))

    def new(self, *arguments: Any) -> Any:
        return self._remember(self._ffi.new(*arguments))

    def from_buffer(self, *arguments: Any, **options: Any) -> Any:
        return self._remember(self._ffi.from_buffer(*arguments, **options))

    def _remember(self, made: Any) -> Any:
        known = self.owners.get(self.address(made))
        if known is None or len(self._ffi.buffer(known)) < len(self._ffi.buffer(made)):
            self.owners[self.address(made)] = made
        return made


class Image:
    """The memory that arguments reach, as blobs and the pointers between them; the arguments are the first blobs."""

    def __init__(self, ffi: Ffi, arguments: list[Any]) -> None:
        self.ffi = ffi
        self.owners: list[Any] = []
        self.pointers: list[tuple[int, int, int]] = []
        self._numbers: dict[int, int] = {}
        for argument in arguments:
            self._number(argument)
        for number, owner in enumerate(self.owners):  # which grows meanwhile
            item = ffi.typeof(owner).item
            size = ffi.sizeof(item)
            for i in range(len(ffi.buffer(owner)) // size if item.kind == "struct" else 0):
                self._follow(owner[i], item, number, i * size)

    def _number(self, owner: Any) -> int:
        address = self.ffi.address(owner)
        if address not in self._numbers:
            self._numbers[address] = len(self.owners)
            self.owners.append(owner)
        return self._numbers[address]

    def _follow(self, value: Any, ctype: Any, blob: int, offset: int) -> None:
        for name, field in ctype.fields:
            inner = getattr(value, name)
            if field.type.kind == "struct":
                self._follow(inner, field.type, blob, offset + field.offset)
            elif field.type.kind == "pointer" and inner != self.ffi.NULL:
                target = self._number(self.ffi.owners[self.ffi.address(inner)])
                self.pointers.append((blob, offset + field.offset, target))

    def bytes(self) -> bytes:
        buffers = [self.ffi.buffer(owner) for owner in self.owners]
        parts = [part for buffer in buffers for part in (struct.pack("<q", len(buffer)), buffer)]
        return b"".join(parts) + b"".join(struct.pack("<qqq", *pointer) for pointer in self.pointers)


class Table:
    """An `adrt_backend` whose functions run in the emulator."""

    abi_version = ABI_VERSION

    def __init__(self, ffi: Ffi, process: subprocess.Popen[bytes]) -> None:
        self.ffi, self.process = ffi, process
        self.struct_bytes = ffi.sizeof("adrt_backend")

    def _call(
        self, function: str, executable: Any, argument: int, arguments: list[Any], error: Any = None
    ) -> tuple[int, int, bytes]:
        """Code, value and payload of the reply."""
        image = Image(self.ffi, arguments)
        number = self.ffi.address(executable) - 1 if executable else 0
        header = (FUNCTIONS.index(function), number, argument, len(image.owners), len(image.pointers))
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(struct.pack("<5q", *header) + image.bytes())
        self.process.stdin.flush()
        reply = self.process.stdout.read(REPLY.size)
        assert len(reply) == REPLY.size, f"the emulated backend died in {function}: {self.process.wait()}"
        code, value, n_bytes, message = REPLY.unpack(reply)
        if error is not None:
            error.code, error.message = code, message
        return code, value, self.process.stdout.read(n_bytes)

    def load(self, program: Any, options: Any, out: Any, error: Any) -> int:
        code, value, _ = self._call("load", None, 0, [program, options], error)
        if code == 0:
            out[0] = self.ffi.cast("adrt_executable *", value + 1)
        return code

    def reserve(self, executable: Any, n_pages: int, error: Any) -> int:
        return self._call("reserve", executable, n_pages, [], error)[0]

    def attach(self, executable: Any, n: int, attachments: Any, handle: Any, error: Any) -> int:
        code, handle[0], _ = self._call("attach", executable, n, [attachments] if n else [], error)
        return code

    def detach(self, executable: Any, handle: int, error: Any) -> int:
        return self._call("detach", executable, handle, [], error)[0]

    def step(self, executable: Any, batch: Any, error: Any) -> int:
        logits = self.ffi.buffer(self.ffi.owners[self.ffi.address(batch.logits)])
        code, _, logits[:] = self._call("step", executable, len(logits), [batch], error)
        return code

    def describe(self, executable: Any) -> Any:
        self._description = self.ffi.new("char[]", self._call("describe", executable, 0, [])[2])
        return self._description

    def unload(self, executable: Any) -> None:
        self._call("unload", executable, 0, [])


@cache
def emulated_calls() -> Calls:
    """The emulated backend, compiled and started once; it ends when its input does."""
    native = native_module("cpu")
    ffi = Ffi(native.ffi)
    with TemporaryDirectory() as folder:
        program = compile_backend(Path(folder))
        process = subprocess.Popen([EMULATOR, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        table = Table(ffi, process)
        table.describe(None)  # an answer means that the program's file is needed no longer
    atexit.register(process.communicate)
    return Calls(SimpleNamespace(ffi=ffi, lib=native.lib), table, "emulated")


class EmulatedBackend:
    """The CPU backend as AArch64 runs it."""

    name = "emulated"

    def unavailable(self) -> str | None:
        """The tools that are not installed, or None."""
        return missing_tools()

    def load(self, program: Program, tensors: Mapping[str, Tensor], options: LoadOptions) -> NativeExecutable:
        """As CpuBackend.load, with one thread: in an emulator more would only wait for each other."""
        return NativeExecutable(emulated_calls(), program, tensors, options, 1)
