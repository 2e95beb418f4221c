"""Parity and speed of the CUDA products, against torch and bitsandbytes, on a machine with a GPU.

    python product_check.py parity LIBRARY
    python product_check.py speed LIBRARY [LIBRARY ...] [--tokens 1,8,64] [--kind nf4]

LIBRARY: nvcc -std=c++17 -O3 -shared -Xcompiler -fPIC -cudart static -gencode=arch=compute_90a,code=sm_90a
-I../../include -o libproducts.so shim.cu ../dequant.cu ../product*.cu -ldl

Parity: random matrices, quantized and dequantized by bitsandbytes (int8: here), products in float64; outputs are
poisoned first. Speed: CUDA graphs over copies of the weights that together exceed the L2, medians of replays after
warming up, every peer in the same process.
"""

import argparse
import ctypes
import math
import statistics
import sys
import time

import torch

F32, F16, BF16, INT8, NF4 = range(5)
NAMES = ["f32", "f16", "bf16", "int8", "nf4"]
SHAPES_8B = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
LIMIT = 5e-3
P, I64, I32 = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int


class Library:
    """The launchers of one build."""

    def __init__(self, path):
        self.path, self.c = path, ctypes.CDLL(path)
        self.c.check_packed_bytes.restype = self.c.check_workspace_bytes.restype = ctypes.c_uint64
        self.context = P()
        self.call("check_create", I32(0), ctypes.byref(self.context))
        self.workspace = torch.zeros(384 << 20, dtype=torch.uint8, device="cuda")

    def call(self, name, *arguments):
        """Raise RuntimeError for any CUDA error."""
        status = getattr(self.c, name)(*arguments)
        if status:
            raise RuntimeError(f"{name}: CUDA error {status}")

    def pack(self, dtype, rows, cols, stored):
        """Stored bytes [n] on the device -> packed bytes."""
        size = self.c.check_packed_bytes(I32(dtype), I64(rows), I64(cols))
        packed = torch.full((size,), 0xFF, dtype=torch.uint8, device="cuda")
        self.call(
            "check_pack",
            I32(dtype),
            I64(rows),
            I64(cols),
            P(stored.data_ptr()),
            P(packed.data_ptr()),
            stream(),
        )
        return packed

    def product(self, dtype, rows, cols, packed, x, y, accumulate=False):
        """y[tokens, rows] = x[tokens, cols] W^T, or += that."""
        need = self.c.check_workspace_bytes(self.context, I32(dtype), I64(rows), I64(cols), I32(x.shape[0]))
        assert need <= self.workspace.numel(), (need, rows, cols, x.shape)
        self.call(
            "check_product",
            self.context,
            I32(dtype),
            I64(rows),
            I64(cols),
            P(packed.data_ptr()),
            P(x.data_ptr()),
            I64(x.stride(0)),
            I32(x.shape[0]),
            P(y.data_ptr()),
            I64(y.stride(0)),
            I32(y.dtype == torch.bfloat16),
            I32(accumulate),
            P(self.workspace.data_ptr()),
            stream(),
        )


def stream():
    """Torch's stream, which may be capturing."""
    return P(torch.cuda.current_stream().cuda_stream)


def aligned(parts):
    """The parts of a stored tensor, each but the last two filled up to 64 bytes (spec/format.md)."""
    out = []
    for part in parts:
        flat = part.contiguous().view(torch.uint8).flatten()
        out += [flat, torch.zeros(-flat.numel() % 64, dtype=torch.uint8, device="cuda")]
    return torch.cat(out)


def make_matrix(dtype, rows, cols, seed):
    """(stored bytes, the matrix in float64)"""
    g = torch.Generator(device="cuda").manual_seed(seed)
    w = torch.randn(rows, cols, device="cuda", generator=g) * 0.02
    if dtype == NF4:
        import bitsandbytes.functional as bnb

        codes, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
        parts = [codes, state.absmax, torch.cat([state.state2.absmax.flatten(), state.offset.reshape(1)])]
        return aligned(parts), bnb.dequantize_4bit(codes, state).double().reshape(rows, cols)
    if dtype == INT8:
        blocks = math.ceil(cols / 64)
        padded = torch.nn.functional.pad(w, (0, blocks * 64 - cols)).reshape(rows, blocks, 64)
        scales = (padded.abs().amax(-1) / 127).to(torch.bfloat16)
        codes = (padded / scales.float()[..., None]).round().clamp(-127, 127)
        value = (codes.double() * scales.double()[..., None]).reshape(rows, -1)[:, :cols]
        return aligned([codes.reshape(rows, -1)[:, :cols].to(torch.int8), scales]), value
    w = w.to([torch.float32, torch.float16, torch.bfloat16][dtype])
    return aligned([w]), w.double()


def relative(out, want):
    """Norm of the error over that of the result."""
    return float((out.double() - want).norm() / want.norm())


def check(library, dtype, rows, cols, tokens, case):
    """True when every launcher is within the limit for one matrix."""
    stored, w = make_matrix(dtype, rows, cols, case)
    packed = library.pack(dtype, rows, cols, stored)
    dense = torch.full((rows, cols), math.nan, dtype=torch.bfloat16, device="cuda")
    library.call(
        "check_dequantize",
        I32(dtype),
        I64(rows),
        I64(cols),
        P(packed.data_ptr()),
        P(dense.data_ptr()),
        stream(),
    )
    errors = {"dequantize": relative(dense, w)}
    picked = torch.randint(0, rows, (5,), dtype=torch.int32, device="cuda")
    out = torch.full((5, cols), math.nan, device="cuda")
    library.call(
        "check_rows",
        I32(dtype),
        I64(rows),
        I64(cols),
        P(packed.data_ptr()),
        P(picked.data_ptr()),
        I32(5),
        P(out.data_ptr()),
        stream(),
    )
    errors["rows"] = relative(out, w[picked.long()])
    for n in tokens:
        x = torch.randn(n, math.ceil(cols / 8) * 8 + 8, device="cuda").to(torch.bfloat16)[:, :cols]
        want = x.double() @ w.T
        for name, kind, add in (
            ("f32", torch.float32, False),
            ("bf16", torch.bfloat16, False),
            ("add", torch.float32, True),
        ):
            wide = torch.full((n, rows + 3), math.nan, dtype=kind, device="cuda")
            y = wide[:, :rows]
            if add:
                y.fill_(1.0)
            for _ in range(2 if name == "f32" else 1):  # twice: the workspace must be as it was
                library.product(dtype, rows, cols, packed, x, y, add)
            torch.cuda.synchronize()
            errors[f"{n} {name}"] = relative(y, want + (1.0 if add else 0.0))
            if not wide[:, rows:].isnan().all():
                errors[f"{n} {name} wrote past its rows"] = math.inf
    worst = max(errors.values(), key=lambda e: math.inf if math.isnan(e) else e)
    bad = {k: v for k, v in errors.items() if not v <= LIMIT}
    print(f"{NAMES[dtype]:5} {rows:6} x {cols:6}  worst {worst:.2e}", f"BAD {bad}" if bad else "", flush=True)
    return not bad


def parity(paths, tokens, cases):
    """True when every library is right for every shape and type."""
    shapes = [
        (16, 64),
        (17, 128),
        (100, 72),
        (33, 200),
        (64, 576),
        (128, 896),
        (200, 2048),
        (640, 5632),
        (256, 11008),
        (5, 256),
        (4096, 4096),
        (1024, 14336),
        (131, 1000),
        (257, 4104),
    ]
    fine = True
    for path in paths:
        library = Library(path)
        for case, (rows, cols) in enumerate(shapes[:cases]):
            for dtype in (NF4, INT8, BF16, F16, F32):
                if dtype in (F16, F32) and case > 4:
                    continue
                fine &= check(library, dtype, rows, cols, tokens, case)
    print("parity", "ok" if fine else "FAILED")
    return fine


def measure(one_pass, calls):
    """Median microseconds a call; one_pass() makes `calls` calls."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        one_pass()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            one_pass()
        warm_until = time.monotonic() + 0.06  # the clock rises with load
        while time.monotonic() < warm_until:
            graph.replay()
            torch.cuda.synchronize()
        times = []
        for _ in range(15):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)


def copy_bandwidth():
    """TB/s, reading and writing."""
    a = torch.randn(1 << 29, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() * 4 / measure(lambda: torch.mul(a, 1.0, out=b), 1) / 1e6  # TB/s


def stored_bytes(dtype, rows, cols):
    """What a product must read of the weights."""
    n = rows * cols
    return {NF4: n / 2 + n / 64 + n / 4096, INT8: n + n / 32, BF16: 2 * n}[dtype]


def copies_for(size):
    """So many copies do not fit into the L2 together."""
    return max(2, min(64, math.ceil(400e6 / size)))


def peer_times(rows, cols, tokens, with_bnb):
    """Microseconds by (peer, tokens)."""
    import bitsandbytes as bnb

    w = torch.randn(rows, cols, device="cuda", dtype=torch.bfloat16) * 0.02
    times = {}
    dense = [w.clone() for _ in range(copies_for(2 * rows * cols))]
    if with_bnb:
        quantized = [
            bnb.functional.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
            for _ in range(copies_for(rows * cols / 2))
        ]
    for m in tokens:
        x = torch.randn(m, cols, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            times["cublas", m] = measure(
                lambda x=x: [torch.nn.functional.linear(x, d) for d in dense], len(dense)
            )
            if with_bnb:
                times["bnb", m] = measure(
                    lambda x=x: [bnb.matmul_4bit(x, q.t(), quant_state=s) for q, s in quantized],
                    len(quantized),
                )
    return times


def own_times(library, dtype, rows, cols, tokens):
    """Microseconds by tokens."""
    stored, _ = make_matrix(dtype, rows, cols, 0)
    packed = library.pack(dtype, rows, cols, stored)
    copies = [packed.clone() for _ in range(copies_for(stored_bytes(dtype, rows, cols)))]
    times = {}
    for m in tokens:
        x = torch.randn(m, cols, device="cuda").to(torch.bfloat16)
        y = torch.empty(m, rows, device="cuda", dtype=torch.bfloat16 if m > 64 else torch.float32)
        times[m] = measure(
            lambda x=x, y=y: [library.product(dtype, rows, cols, p, x, y) for p in copies], len(copies)
        )
    return times


def speed(paths, tokens, shapes, dtype, peers):
    """Print a line for every shape and number of tokens, and geometric means."""
    libraries = [Library(path) for path in paths]
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, copy {bandwidth:.2f} TB/s, {NAMES[dtype]}, microseconds")
    ratios = {}
    for name, (rows, cols) in shapes.items():
        own = [own_times(library, dtype, rows, cols, tokens) for library in libraries]
        peer = peer_times(rows, cols, tokens, dtype == NF4) if peers else {}
        for m in tokens:
            moved = stored_bytes(dtype, rows, cols) + 2 * m * cols + (4 if m <= 64 else 2) * m * rows
            floor = moved / bandwidth / 1e6
            text = f"{name:8} M={m:<5} floor {floor:7.2f}"
            for who in ("cublas", "bnb"):
                if (who, m) in peer:
                    text += f"  {who} {peer[who, m]:7.1f}"
            for i, times in enumerate(own):
                text += f" | {times[m]:7.2f} ({floor / times[m]:4.0%}"
                for who in ("cublas", "bnb"):
                    if (who, m) in peer:
                        text += f" {peer[who, m] / times[m]:5.2f}x"
                        ratios.setdefault((i, who, m), []).append(peer[who, m] / times[m])
                text += ")"
            print(text, flush=True)
    for (i, who, m), values in sorted(ratios.items()):
        print(
            f"geometric mean {libraries[i].path}: M={m} vs {who} "
            f"{math.exp(sum(map(math.log, values)) / len(values)):.2f}x"
        )


def main():
    """Exit status 1 when parity fails."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["parity", "speed"])
    parser.add_argument("libraries", nargs="+")
    parser.add_argument("--tokens", default="1,2,3,4,5,7,8,9,16,17,40,64,65,100,128,200,300,512")
    parser.add_argument("--shapes", default="qkv,o,gate_up,down")
    parser.add_argument("--cases", type=int, help="parity: only the first shapes")
    parser.add_argument("--kind", default="nf4")
    parser.add_argument("--no-peers", action="store_true")
    args = parser.parse_args()
    tokens = [int(m) for m in args.tokens.split(",")]
    if args.what == "parity":
        return 0 if parity(args.libraries, tokens, args.cases) else 1
    shapes = {**SHAPES_8B, "head": (128256, 4096)}
    speed(
        args.libraries,
        tokens,
        {n: shapes[n] for n in args.shapes.split(",")},
        NAMES.index(args.kind),
        not args.no_peers,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
