"""The golden files, made by hand from the specification, against both readers and the writer."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
from helpers import independent_reader, make_golden

from adaptrt.format import Writer, append, open_file, verify
from adaptrt.quant import tables
from adaptrt.tensor import Tensor

GOLDEN = make_golden.GOLDEN
SPEC = GOLDEN.parent / "format.md"
FILES = ["tensors.adrt", "appended.adrt", "frames.adrt", "fallback.adrt"]


def as_tensor(dtype: str, shape: list[int], data: bytes) -> Tensor:
    return Tensor(dtype, tuple(shape), np.frombuffer(data, np.uint8))


def test_golden_files_are_those_of_the_script() -> None:
    assert sorted(path.name for path in GOLDEN.glob("*.adrt")) == sorted(FILES)
    built = make_golden.build()
    for name in ("tensors.adrt",):  # the others hold zstd frames, which may differ with zstd's version
        assert (GOLDEN / name).read_bytes() == built[name]
    assert all((GOLDEN / name).stat().st_size < 40_000 for name in FILES)


@pytest.mark.parametrize("name", FILES)
def test_both_readers_agree(name: str) -> None:
    expected = independent_reader.read(GOLDEN / name)
    with open_file(GOLDEN / name) as file:
        assert list(file.sections) == list(expected)
        for section, tensors in expected.items():
            found = {
                key: (tensor.dtype, list(tensor.shape), tensor.data.tobytes())
                for key, tensor in file.read_section(section).items()
            }
            assert found == tensors


def test_independent_reader_is_short_and_independent() -> None:
    text = Path(independent_reader.__file__).read_text()
    assert text.count("\n") < 150
    imported = set(re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE))
    assert imported == {"__future__", "hashlib", "json", "math", "numpy", "pathlib", "struct", "sys"} | {
        "zlib",
        "zstandard",
    }


def test_tensors_golden_holds_what_was_put_in() -> None:
    path = GOLDEN / "tensors.adrt"
    assert verify(path) == []
    with open_file(path) as file:
        assert file.warnings == []
        assert file.metadata["general.name"] == "gölden"
        assert file.metadata["list"] == [True, False, None, -1, 0.1, 1e16, 1e-07, '\n\x1f\x7f"\\/']
        for name, dtype, shape, data in make_golden.every_dtype():
            tensor = file.tensor("base", name)
            assert (tensor.dtype, list(tensor.shape), tensor.data.tobytes()) == (dtype, shape, data)
        assert file.tensor("base", "z.tied") is file.tensor("base", "a.f32")
        values = file.tensor("base", "a.f32").data.view("<f4")
        assert values.tolist() == list(struct.unpack("<6f", struct.pack("<6f", 1, -2, 0.5, 1e-30, 3e8, -0.0)))


def test_writer_makes_the_very_bytes_of_tensors_golden(tmp_path: Path) -> None:
    path = tmp_path / "tensors.adrt"
    with open_file(GOLDEN / "tensors.adrt") as file:
        metadata = dict(reversed(file.metadata.items()))  # the order of keys must not matter
    with Writer(path, metadata=metadata) as w:
        with w.section("base", kind="base") as s:
            for name, dtype, shape, data in make_golden.every_dtype():
                s.add(name, as_tensor(dtype, shape, data))
            s.alias("z.tied", ("base", "a.f32"))
        with w.section("tokenizer", kind="tokenizer", codec="zstd") as s:  # too small to pay: stays raw
            s.add("tokenizer.json", as_tensor("u8", [9], '{"é": 1}'.encode()))
        with w.section("note", kind="x-note", critical=False, metadata={"by": "hand"}) as s:
            s.add("text", as_tensor("u8", [3], b"hi!"))
    assert path.read_bytes() == (GOLDEN / "tensors.adrt").read_bytes()


def test_appending_makes_the_very_bytes_of_appended_golden(tmp_path: Path) -> None:
    path = tmp_path / "appended.adrt"
    golden = GOLDEN / "appended.adrt"
    with Writer(path, metadata={"step": 1}) as w:
        with w.section("base", kind="base") as s:
            s.add("w", as_tensor("f32", [4], struct.pack("<4f", 1, 2, 3, 4)))
        with w.section("adapter/old", kind="adapter") as s:
            s.add("B", as_tensor("bf16", [2, 2], make_golden.pattern(8, 5)))
    with append(path) as a, open_file(golden) as file:
        a.copy_section(file, "adapter/pirate")
    with append(path) as a:
        a.remove("adapter/old")
        a.metadata["step"] = 3
    assert path.read_bytes() == golden.read_bytes()
    assert verify(path) == []


def test_frames_golden_spans_two_frames_and_four_planes() -> None:
    path = GOLDEN / "frames.adrt"
    assert verify(path) == []
    with open_file(path) as file:
        section = file.sections["adapter/big"]
        assert (section.codec, section.planes, len(section.frames)) == ("zstd", 4, 2)
        assert file.tensor("adapter/big", "t").data.tobytes() == make_golden.pattern(4096, 7) * 320


def test_fallback_golden_opens_with_the_first_generation() -> None:
    path = GOLDEN / "fallback.adrt"
    with open_file(path) as file:
        assert list(file.sections) == ["base", "adapter/old"]
        assert file.warnings == ["slot 0: root digest of generation 2 does not match; using generation 1"]
    assert len(verify(path)) == 2  # the torn slot, and the bytes after the first generation


def table_of(title: str) -> list[int]:
    """The hex words of the code block that follows `title` in the specification."""
    text = SPEC.read_text()
    block = text[text.index(title) :].split("```")[1]
    return [int(word, 16) for word in re.findall(r"\b[0-9a-f]{8}\b", block)]


def test_tables_in_the_specification_are_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    dynamic = functional.create_dynamic_map(signed=True).numpy().view(np.uint32)
    assert table_of("Dynamic map") == dynamic.tolist() == tables.DYNAMIC_MAP.view(np.uint32).tolist()
    codebook = functional.get_4bit_type("nf4", device="cpu").numpy().view(np.uint32)
    assert table_of("Codebook") == codebook.tolist() == tables.NF4_CODEBOOK.view(np.uint32).tolist()
