"""Any native backend: the table of functions of `native/include/adaptrt.h`, bound once for all hardware.

A backend module supplies the table (`adrt_backend *`) and its name; the rest, from Program to step, is here.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from adaptrt.adapters.fit import AttachPoint
from adaptrt.adapters.normal import Int32s, Kronecker, Lowered, LoweredAdapter, Sparse, Term, Vector
from adaptrt.backends.base import Batch, LoadOptions, Peaks, Reads, attach_points
from adaptrt.backends.checks import check_lengths, int32s
from adaptrt.backends.reuse import ReusedMemory
from adaptrt.errors import BackendError, ClosedError, NoMemoryError, UnavailableError
from adaptrt.program import Add, Attention, Embed, Gated, Linear, Norm, Op, Program, Rope, Scale
from adaptrt.tensor import Tensor, rows_cols

ABI_VERSION = 3
ERRORS = {"NO_MEMORY": NoMemoryError, "UNAVAILABLE": UnavailableError}  # any other code is a BackendError
ITEM_ALIGNMENT = {"f32": 4, "f16": 2, "bf16": 2, "int8": 2, "nf4": 4}


class Library(Protocol):
    """A cffi module in API mode: `ffi` and `lib`."""

    ffi: Any
    lib: Any


def native_module(name: str) -> Any:
    """The compiled cffi module, which binds the header for every backend. Raises BackendError when it is broken."""
    try:
        return import_module("adaptrt.backends._native")
    except ImportError as error:
        raise BackendError(f"backend {name}: the compiled module is missing or broken ({error})") from error


def open_table(library: Library, path: Path, symbol: str, name: str) -> Any:
    """The table of a backend in a shared library of its own. Raises BackendError when it cannot be loaded.

    cffi's API mode binds only what is linked into the module, so the one symbol is looked up here.
    """
    try:
        function = getattr(ctypes.CDLL(str(path)), symbol)
    except (OSError, AttributeError) as error:
        raise BackendError(f"backend {name}: {path.name} cannot be loaded ({error})") from error
    function.restype = ctypes.c_void_p
    return library.ffi.cast("const adrt_backend *", function() or 0)


def check_table(library: Library, table: Any, name: str) -> None:
    """Raise BackendError when a backend's table is missing or of another ABI."""
    if table == library.ffi.NULL:
        raise BackendError(f"backend {name}: the library offers no table of functions")
    if table.abi_version != ABI_VERSION or table.struct_bytes < library.ffi.sizeof("adrt_backend"):
        raise BackendError(
            f"backend {name}: ABI version {table.abi_version} with {table.struct_bytes} bytes, "
            f"expected version {ABI_VERSION} with {library.ffi.sizeof('adrt_backend')}"
        )


class Calls:
    """A backend's functions, their error codes turned into BackendError."""

    def __init__(self, library: Library, table: Any, name: str) -> None:
        check_table(library, table, name)
        self.ffi, self.lib, self.table, self.name = library.ffi, library.lib, table, name

    def __call__(self, function: str, *arguments: Any) -> None:
        """Call one function of the table; raises BackendError, or the kind of it that ERRORS names."""
        error = self.ffi.new("adrt_error *")
        code = getattr(self.table, function)(*arguments, error)
        if code != self.lib.ADRT_OK:
            message = self.ffi.string(error.message).decode("utf-8", "replace")
            kinds = {self.constant(name): kind for name, kind in ERRORS.items()}
            raise kinds.get(code, BackendError)(f"backend {self.name}: {message}")

    def constant(self, name: str) -> int:
        """An enumerator of the header, by its name without `ADRT_`."""
        return int(getattr(self.lib, "ADRT_" + name))


class Structs:
    """C structs of one call or one object, and the buffers that they point into, alive as long as this is."""

    def __init__(self, calls: Calls) -> None:
        self.calls, self.ffi = calls, calls.ffi
        self._kept: list[Any] = []

    def array(self, ctype: str, items: Iterable[Any]) -> Any:
        """A C array; NULL when it would be empty."""
        values = list(items)
        if not values:
            return self.ffi.NULL
        self._kept.append(self.ffi.new(f"{ctype}[]", values))
        return self._kept[-1]

    def pointer(self, ctype: str, array: NDArray[Any], writable: bool = False) -> Any:
        """A pointer to a contiguous array's first item; nothing is copied."""
        self._kept.append(self.ffi.from_buffer(f"{ctype}[]", array, require_writable=writable))
        return self._kept[-1]

    def tensor(self, tensor: Tensor) -> Any:
        """An adrt_tensor over a Tensor's bytes, copied only when they are not aligned to their items."""
        if tensor.dtype not in ITEM_ALIGNMENT:
            raise BackendError(
                f"backend {self.calls.name}: a tensor is {tensor.dtype}, "
                f"expected one of {', '.join(ITEM_ALIGNMENT)}"
            )
        data = np.ascontiguousarray(tensor.data)
        if data.ctypes.data % ITEM_ALIGNMENT[tensor.dtype]:
            data = data.copy()
        rows, cols = rows_cols(tensor.shape)
        return {
            "dtype": self.calls.constant(tensor.dtype.upper()),
            "rows": rows,
            "cols": cols,
            "data": self.pointer("uint8_t", data),
            "bytes": data.nbytes,
        }

    def vector(self, vector: Vector | None, size: int, what: str) -> Any:
        """A float32 pointer, NULL for None; raises BackendError when the length is not `size`."""
        if vector is None:
            return self.ffi.NULL
        if vector.shape != (size,):
            raise BackendError(f"{what} is {list(vector.shape)}, expected [{size}]")
        return self.pointer("float", np.ascontiguousarray(vector, np.float32))

    def int32s(self, values: Int32s, size: int, what: str) -> Any:
        """An int32 pointer; raises BackendError when the length is not `size`."""
        if values.shape != (size,):
            raise BackendError(f"{what} is {list(values.shape)}, expected [{size}]")
        return self.pointer("int32_t", int32s(values))


class ProgramStructs:
    """A Program with its registers, tensors and targets numbered, as an adrt_program."""

    def __init__(self, calls: Calls, program: Program, tensors: Mapping[str, Tensor]) -> None:
        self.structs, self.calls = Structs(calls), calls
        self.registers = {name: i for i, name in enumerate(program.registers)}
        constants = {name: Tensor.from_numpy(value) for name, value in program.constants.items()}
        named = {name: tensors[name] for name in program.weights} | constants
        self.tensor_numbers = {name: i for i, name in enumerate(named)}
        self.targets = {name: i for i, name in enumerate(program.targets)}
        self.points = attach_points(program, named)
        s = self.structs
        self.program = calls.ffi.new(
            "adrt_program *",
            {
                "n_registers": len(self.registers),
                "register_widths": s.array("int64_t", program.registers.values()),
                "n_tensors": len(named),
                "tensors": s.array("adrt_tensor", [s.tensor(t) for t in named.values()]),
                "n_ops": len(program.ops),
                "ops": s.array("adrt_op", [self._op(op) for op in program.ops]),
                "n_targets": len(self.targets),
            },
        )

    def _op(self, op: Op) -> dict[str, Any]:
        fields: dict[str, Any] = dict.fromkeys(("out", "a", "b", "c", "weight", "bias", "target"), -1)
        fields |= {"kind": self.calls.constant(type(op).__name__.upper())} | self._fields(op)
        for name in ("out", "a", "b", "c"):
            if fields[name] != -1:
                fields[name] = self.registers[fields[name]]
        for name in ("weight", "bias"):
            if fields[name] not in (-1, None):
                fields[name] = self.tensor_numbers[fields[name]]
        if fields["bias"] is None:
            fields["bias"] = -1
        if fields["target"] != -1:
            fields["target"] = self.targets[fields["target"]]
        return fields

    def _fields(self, op: Op) -> dict[str, Any]:
        """The op's own fields, registers and tensors still by name."""
        if isinstance(op, Embed):
            return {"out": op.out, "weight": op.weight, "target": op.target}
        if isinstance(op, Norm):
            target = -1 if op.target is None else op.target
            return {"out": op.out, "a": op.src, "weight": op.weight, "target": target, "value": [op.eps, 0.0]}
        if isinstance(op, Linear):
            return {"out": op.out, "a": op.src, "weight": op.weight, "bias": op.bias, "target": op.target}
        if isinstance(op, Rope):
            shape = {"heads": op.heads, "head_dim": op.head_dim, "value": [op.factor, 0.0]}
            return {"out": op.reg, "a": op.reg, "weight": op.inv_freq} | shape
        if isinstance(op, Attention):
            shape = {"heads": op.heads, "kv_heads": op.kv_heads, "head_dim": op.head_dim, "layer": op.layer}
            return {"out": op.out, "a": op.q, "b": op.k, "c": op.v, "value": [op.scale, op.softcap]} | shape
        if isinstance(op, Gated):
            mode = self.calls.constant(op.activation.upper())
            return {"out": op.out, "a": op.gate, "b": op.up, "mode": mode}
        if isinstance(op, Add):
            return {"out": op.out, "a": op.a, "b": op.b}
        if isinstance(op, Scale):
            return {"out": op.out, "a": op.src, "value": [op.factor, op.softcap]}
        return {"a": op.src, "weight": op.weight, "bias": op.bias, "target": op.target}


class NativeExecutable:
    """A program loaded by a native backend."""

    def __init__(
        self,
        calls: Calls,
        program: Program,
        tensors: Mapping[str, Tensor],
        options: LoadOptions,
        threads: int,
        device: int = 0,
    ) -> None:
        self._calls, self._ffi = calls, calls.ffi
        self._loaded = ProgramStructs(calls, program, tensors)
        self._adapters: dict[int, Structs] = {}
        self._logits = ReusedMemory()
        self._vocabulary = program.vocab_size
        self._executable = self._ffi.NULL
        native_options = {
            "threads": threads,
            "precision": calls.constant(options.precision.upper()),
            "kv_dtype": calls.constant(options.kv_dtype.upper()),
            "page_tokens": options.page_tokens,
            "isa": calls.constant("ISA_" + options.isa.upper()),
            "device": device,
            "gpu_memory": options.gpu_memory,
        }
        rows = self._loaded.points[program.targets[-1]].out
        if rows != program.vocab_size:
            raise BackendError(f"the head has {rows} rows, the vocabulary {program.vocab_size}")
        out = self._ffi.new("adrt_executable **")
        calls("load", self._loaded.program, self._ffi.new("adrt_options *", native_options), out)
        self._executable = out[0]

    def reserve(self, n_pages: int) -> None:
        """Make KV pages 0 … n_pages-1 exist. Raises BackendError when memory is short; what existed stays."""
        self._calls("reserve", self._open(), n_pages)

    def attach(self, adapter: LoweredAdapter) -> int:
        """Take a lowered adapter; returns a handle for Batch.stacks.

        Raises BackendError when a target is unknown or a shape does not fit.
        """
        executable, structs = self._open(), Structs(self._calls)
        attachments = structs.array(
            "adrt_attachment",
            [self._attachment(structs, target, lowered) for target, lowered in adapter.items()],
        )
        handle = self._ffi.new("int32_t *")
        self._calls("attach", executable, len(adapter), attachments, handle)
        self._adapters[handle[0]] = structs
        return int(handle[0])

    def _attachment(self, structs: Structs, target: str, lowered: Lowered) -> dict[str, Any]:
        if target not in self._loaded.targets:
            raise BackendError(f"adapter target {target}: the program has no such attach point")
        point, name = self._loaded.points[target], f"adapter target {target}:"
        terms = [_term(structs, term, point, f"{name} term {k}:") for k, term in enumerate(lowered.terms)]
        return {
            "target": self._loaded.targets[target],
            "n_terms": len(terms),
            "terms": structs.array("adrt_term", terms),
            "g_in": structs.vector(lowered.g_in, point.inner, f"{name} g_in"),
            **_rotation(structs, lowered.rotation, point.inner, name),
            "g_out": structs.vector(lowered.g_out, point.out, f"{name} g_out"),
            "c": structs.vector(lowered.c, point.out, f"{name} c"),
            "scales_bias": lowered.scales_bias,
        }

    def detach(self, handle: int) -> None:
        """Release an adapter. Raises BackendError for an unknown handle."""
        self._calls("detach", self._open(), handle)
        del self._adapters[handle]

    def prefetch(self, handles: Sequence[int]) -> None:
        """Say that adapters will be named soon. Raises BackendError for an unknown handle."""
        structs = Structs(self._calls)
        if self._calls.table.prefetch != self._ffi.NULL:
            self._calls("prefetch", self._open(), len(handles), structs.array("int32_t", handles))

    def step(self, batch: Batch) -> NDArray[np.float32]:
        """Run every token, store its keys and values, return logits [n_logits, vocabulary].

        The interpreter's lock is released meanwhile. Raises BackendError for an impossible batch.
        """
        executable, structs = self._open(), Structs(self._calls)
        check_lengths(batch)
        logits = self._logits.lend(len(batch.logit_rows), self._vocabulary)
        names = (
            "tokens",
            "positions",
            "run_start",
            "page_start",
            "pages",
            "stack_start",
            "stacks",
            "logit_rows",
        )
        fields = {name: structs.pointer("int32_t", int32s(getattr(batch, name))) for name in names}
        fields |= {
            "n_tokens": len(batch.tokens),
            "n_runs": len(batch.run_start) - 1,
            "n_logits": len(batch.logit_rows),
            "logits": structs.pointer("float", logits, writable=True),
        }
        self._calls("step", executable, self._ffi.new("adrt_batch *", fields))
        return logits

    def describe(self) -> str:
        """One line for the user: device, kernels, threads."""
        return str(self._ffi.string(self._calls.table.describe(self._open())).decode())

    def peaks(self) -> Peaks:
        """What the hardware does at best, measured now, which takes up to a second; nothing where no one can say."""
        if self._calls.table.peaks == self._ffi.NULL:
            return Peaks()
        out = self._ffi.new("adrt_peaks *")
        self._calls("peaks", self._open(), out)
        return Peaks(**{field.name: getattr(out, field.name) for field in fields(Peaks)})

    def read_step(self, handles: Sequence[int]) -> Reads:
        """Do the reads of a step with these adapters; nothing where no one can say. Raises BackendError."""
        if self._calls.table.read_step == self._ffi.NULL:
            return Reads()
        structs, out = Structs(self._calls), self._ffi.new("adrt_reads *")
        self._calls("read_step", self._open(), len(handles), structs.array("int32_t", handles), out)
        return Reads(out.bytes_per_second, out.shared_seconds)

    def close(self) -> None:
        """Free everything; safe to call twice."""
        executable, self._executable = self._executable, self._ffi.NULL
        if executable != self._ffi.NULL:
            self._calls.table.unload(executable)
            self._adapters.clear()
            del self._loaded

    def __del__(self) -> None:
        if hasattr(self, "_executable"):
            self.close()

    def _open(self) -> Any:
        if self._executable == self._ffi.NULL:
            raise ClosedError("the executable was used after close()")
        return self._executable


def _term(structs: Structs, term: Term, point: AttachPoint, name: str) -> dict[str, Any]:
    """An adrt_term; lengths that C cannot see are checked here, shapes there."""
    calls = structs.calls
    if isinstance(term, Sparse):
        rows, entries = point.weight_shape[0], len(term.columns)
        return {
            "kind": calls.constant("SPARSE"),
            "scale": term.scale,
            "n_values": entries,
            "row_start": structs.int32s(term.row_start, rows + 1, f"{name} row_start"),
            "columns": structs.int32s(term.columns, entries, f"{name} columns"),
            "values": structs.vector(term.values, entries, f"{name} values"),
        }
    if isinstance(term, Kronecker):
        factors = {"u": structs.tensor(term.w1), "v": structs.tensor(term.w2)}
        return {"kind": calls.constant("KRONECKER"), "scale": term.scale, **factors}
    return {
        "kind": calls.constant("LOW_RANK"),
        "scale": term.scale,
        **({} if term.u is None else {"u": structs.tensor(term.u)}),
        "v": structs.tensor(term.v),
        "d": structs.vector(term.d, term.rank, f"{name} d"),
        "e": structs.vector(term.e, point.out, f"{name} e"),
    }


def _rotation(
    structs: Structs, rotation: NDArray[np.float32] | None, inner: int, name: str
) -> dict[str, Any]:
    if rotation is None:
        return {}
    block = rotation.shape[-1]
    if rotation.ndim != 3 or rotation.shape[1] != block or rotation.shape[0] * block != inner:
        raise BackendError(f"{name} rotation is {list(rotation.shape)}, expected [{inner}/b, b, b]")
    values = structs.pointer("float", np.ascontiguousarray(rotation, np.float32))
    return {"rotation": values, "rotation_block": block}
