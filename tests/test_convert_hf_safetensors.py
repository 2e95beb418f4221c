"""The safetensors reader: equal to the safetensors package on good files, strict on hostile ones."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from adaptrt.convert.safetensors import HEADER_LIMIT, open_safetensors
from adaptrt.errors import ConvertError
from adaptrt.quant.plain import to_float32

TORCH = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "F16", "shape": [4], "data_offsets": [24, 32]}


def raw(path: Path, header: object, data: bytes = bytes(32), length: int | None = None) -> Path:
    """A file with this header (text verbatim, or JSON) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize("shape", [(), (1,), (0, 5), (7,), (3, 5), (2, 3, 4)])
def test_tensors_equal_the_safetensors_package(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    save_file(
        {"b": torch.randn(5), "a": torch.randn(shape).to(TORCH[dtype])}, tmp_path / "x", metadata={"k": "v"}
    )
    expected = load_file(tmp_path / "x")
    with open_safetensors(tmp_path / "x") as file:
        assert set(file.names) == {"a", "b"}
        assert file.metadata == {"k": "v"}
        assert file.info("a") == (dtype, shape)
        values = expected["a"].float().numpy()
        tensor = file.tensor("a")
        assert (tensor.dtype, tensor.shape) == (dtype, shape)
        assert np.array_equal(to_float32(tensor), values)
        for size in (1, 2, 1000):
            pieces = [chunk.copy() for chunk in file.chunks("a", size)]
            assert all(piece.dtype == np.float32 and piece.size <= size for piece in pieces)
            joined = np.concatenate([*pieces, np.empty(0, np.float32)])
            assert np.array_equal(joined, values.reshape(-1))


def test_other_dtypes_are_told_but_only_ours_are_read(tmp_path: Path) -> None:
    tensors = {
        "u8": torch.arange(5, dtype=torch.uint8),
        "i32": torch.arange(5, dtype=torch.int32),
        "i64": torch.arange(5),
        "f64": torch.ones(2, dtype=torch.float64),
        "bool": torch.ones(3, dtype=torch.bool),
        "f8_e4m3": torch.ones(3).to(torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x")
    with open_safetensors(tmp_path / "x") as file:
        assert {name: file.info(name)[0] for name in file.names} == {name: name for name in tensors}
        assert file.tensor("u8").data.tolist() == [0, 1, 2, 3, 4]
        assert file.tensor("i32").data.view(np.int32).tolist() == [0, 1, 2, 3, 4]
        for name in ("i64", "f64", "bool", "f8_e4m3"):
            with pytest.raises(
                ConvertError, match=f"'{name}' has dtype {name}, expected f32, f16, bf16, u8, i32"
            ):
                file.tensor(name)
        for name in tensors:
            with pytest.raises(ConvertError, match=f"'{name}' has dtype {name}, expected f32, f16, bf16$"):
                next(file.chunks(name))
        with pytest.raises(ConvertError, match="no tensor 'w'"):
            file.info("w")


def test_hand_made_bytes(tmp_path: Path) -> None:
    data = np.arange(6, dtype="<f4").tobytes() + np.arange(4, dtype="<f2").tobytes()
    text = json.dumps({"a": A, "b": B, "__metadata__": {}}).encode() + b"    "  # padding is allowed
    with open_safetensors(raw(tmp_path / "x", text, data)) as file:
        assert file.names == ("a", "b")
        assert to_float32(file.tensor("a")).tolist() == [[0, 1, 2], [3, 4, 5]]
        assert to_float32(file.tensor("b")).tolist() == [0, 1, 2, 3]


def test_empty_file_of_no_tensors(tmp_path: Path) -> None:
    with open_safetensors(raw(tmp_path / "x", {}, b"")) as file:
        assert file.names == ()


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": A, "b": B | {"data_offsets": [20, 28]}}, "'b' overlaps the tensor before it"),
        ({"a": A, "b": B | {"data_offsets": [26, 34]}}, "'b' leaves a hole before it"),
        ({"a": A | {"data_offsets": [8, 32]}}, "'a' leaves a hole before it: it begins at 8 of the data"),
        ({"a": A}, "trailing bytes"),
        ({"a": A, "b": B, "c": A | {"data_offsets": [32, 56]}}, "truncated"),
        ({"a": A | {"shape": [2, 4]}, "b": B}, "'a' of shape [2, 4], dtype F32, spans 24 bytes, expected 32"),
        ({"a": A | {"data_offsets": [24, 0]}}, "'a' has bad data_offsets"),
        ({"a": A | {"data_offsets": [0]}}, "'a' has bad data_offsets"),
        ({"a": A | {"data_offsets": [-24, 0]}}, "'a' has bad data_offsets"),
        ({"a": A | {"data_offsets": [0.0, 24.0]}}, "'a' has bad data_offsets"),
        ({"a": A | {"data_offsets": [False, 24]}}, "'a' has bad data_offsets"),
        ({"a": A | {"data_offsets": None}}, "'a' has bad data_offsets"),
        ({"a": A | {"shape": [2, -3]}}, "'a' has a bad shape"),
        ({"a": A | {"shape": [True, 6]}}, "'a' has a bad shape"),
        ({"a": A | {"shape": [1 << 41]}}, "'a' has a bad shape"),
        ({"a": A | {"shape": [1] * 9}}, "'a' has a bad shape"),
        ({"a": A | {"shape": "23"}}, "'a' has a bad shape"),
        ({"a": A | {"shape": [1 << 40, 1 << 40, 0], "data_offsets": [0, 0]}}, "trailing bytes"),
        ({"a": A | {"dtype": "F128"}}, "'a' has unknown dtype 'F128'"),
        ({"a": A | {"dtype": "f32"}}, "'a' has unknown dtype 'f32'"),
        ({"a": A | {"dtype": 7}}, "'a' has unknown dtype 7"),
        ({"a": A | {"extra": 1}}, "'a' must have exactly dtype, shape and data_offsets"),
        ({"a": {"dtype": "F32", "shape": [8]}}, "'a' must have exactly dtype, shape and data_offsets"),
        ({"a": 5}, "'a' must have exactly"),
        ({"__metadata__": {"k": 1}}, "__metadata__ must map strings to strings"),
        ({"__metadata__": ["k"]}, "__metadata__ must map strings to strings"),
        (b'{"a":{"dtype":"F32"},"a":{}}', "header: key 'a' appears twice, expected once"),
        (b'{"a":{"dtype":"F32","dtype":"F16"}}', "header: key 'dtype' appears twice, expected once"),
        (b'{"__metadata__":{},"__metadata__":{}}', "header: key '__metadata__' appears twice"),
        (b"", "header starts with b'', expected '{'"),
        (b"[]", "header starts with b'[', expected '{'"),
        (b" {}", "header starts with b' ', expected '{'"),
        (b"{", "header: not valid JSON"),
        (b"{} {}", "header: not valid JSON"),
        (b'{"\xff": 1}', "header: not valid JSON"),
        (b'{"a":' + b"[" * 200_000, "header: not valid JSON"),
        (b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}', "header: "),
    ],
)
def test_hostile_headers(tmp_path: Path, header: object, message: str) -> None:
    path = raw(tmp_path / "x", header)
    with pytest.raises(ConvertError) as caught:
        open_safetensors(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("length", [33, 100, HEADER_LIMIT, HEADER_LIMIT + 1, 1 << 63, (1 << 64) - 1])
def test_a_declared_header_takes_no_memory(tmp_path: Path, length: int) -> None:
    path = raw(tmp_path / "x", b"", bytes(32), length)
    tracemalloc.start()
    try:
        with pytest.raises(ConvertError, match=f"header of {length} bytes"):
            open_safetensors(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_strange_names_stay_on_one_short_line(tmp_path: Path) -> None:
    name = "new\nline \x1b[31m" + "x" * 10_000
    with pytest.raises(ConvertError) as caught:
        open_safetensors(raw(tmp_path / "x", {name: 5}))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="No such file"):
        open_safetensors(tmp_path / "none")
    with pytest.raises(ConvertError, match="not a regular file"):
        open_safetensors(tmp_path)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "x"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4).half()}, path, metadata={"format": "pt"})
    return path.read_bytes()


def test_truncated_at_every_byte(tmp_path: Path, good: bytes) -> None:
    for size in range(len(good)):
        (tmp_path / "x").write_bytes(good[:size])
        with pytest.raises(ConvertError):
            open_safetensors(tmp_path / "x")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 255)), min_size=1, max_size=4))
def test_mutated_files_are_read_or_refused(
    tmp_path: Path, good: bytes, changes: list[tuple[int, int]]
) -> None:
    mutated = bytearray(good)
    for position, value in changes:
        mutated[position % len(good)] = value
    (tmp_path / "x").write_bytes(mutated)
    try:
        with open_safetensors(tmp_path / "x") as file:
            total: Any = sum(file.nbytes(name) for name in file.names)
            for name in file.names:
                assert sum(len(piece) for piece in file.raw_chunks(name, 7)) == file.nbytes(name)
    except ConvertError as error:
        assert "\n" not in str(error)
    else:
        assert total == 24 + 8
