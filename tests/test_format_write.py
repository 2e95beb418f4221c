"""Writing a whole file: what is committed, what a failure leaves, and that everything comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import independent_reader
from helpers.written import add_adapter, bf16, leftovers, noise, plain, write_base
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptrt.errors import ClosedError, FormatError, MissingError
from adaptrt.format import File, Writer, append, open_file, verify
from adaptrt.tensor import DTYPES, Int8Layout, Nf4Layout, Tensor, rows_cols, tensor_nbytes


def test_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    def write(path: Path, chunk: int) -> bytes:
        data = bf16(300, 500)
        with Writer(path, metadata={"b": 1, "a": 2.5}) as w:
            for codec in ("raw", "zstd"):
                with w.section(codec, kind="adapter", codec=codec) as s:
                    s.metadata["scale"] = 0.5
                    with s.stream("t", data.dtype, data.shape) as out:
                        for start in range(0, data.data.size, chunk):
                            out.write(data.data[start : start + chunk])
        return path.read_bytes()

    assert write(tmp_path / "one.adrt", 1 << 20) == write(tmp_path / "two.adrt", 777)


def test_raw_tensors_are_read_only_views_into_the_map(base: Path) -> None:
    with open_file(base) as file:
        tensor = file.tensor("base", "w")
        assert file.tensor("base", "w") is tensor
    assert not tensor.data.flags.owndata and not tensor.data.flags.writeable
    assert tensor.data.ctypes.data % 64 == 0
    assert tensor.data.tobytes() == noise(1000).tobytes()  # still there after close()
    with pytest.raises(ClosedError, match="after close"):
        file.tensor("base", "w")


def test_compression_is_used_where_it_pays(tmp_path: Path) -> None:
    path = tmp_path / "a.adrt"
    tensors = {
        "bf16": (bf16(200, 100), ("zstd", 2)),
        "f32": (Tensor.from_numpy(np.linspace(0, 1, 9000, dtype=np.float32)), ("zstd", 4)),
        "text": (
            Tensor.from_numpy(np.frombuffer(b"".join(b"to be %d or not " % i for i in range(999)), np.uint8)),
            ("zstd", 1),
        ),
        "noise": (plain(50_000), ("raw", 1)),
        "bomb": (Tensor("u8", (1 << 20,), np.zeros(1 << 20, np.uint8)), ("raw", 1)),
        "tiny": (plain(3), ("raw", 1)),
    }
    with Writer(path) as w:
        for name, (tensor, _) in tensors.items():
            with w.section(name, kind="adapter", codec="zstd") as s:
                s.add("t", tensor)
    with open_file(path) as file:
        for name, (tensor, expected) in tensors.items():
            section = file.sections[name]
            assert (section.codec, section.planes) == expected, name
            assert (section.stored_bytes < section.bytes) == (section.codec == "zstd")
            assert file.tensor(name, "t").data.tobytes() == tensor.data.tobytes()
            assert not file.tensor(name, "t").data.flags.writeable
    assert verify(path) == []


def test_digest_depends_on_content_alone(tmp_path: Path) -> None:
    digests = set()
    a, b = bf16(64, 64), plain(100)
    for number, (codec, order) in enumerate([("raw", "ab"), ("zstd", "ab"), ("raw", "ba")]):
        path = tmp_path / f"{number}.adrt"
        with Writer(path) as w, w.section("base", kind="base", codec=codec, metadata={"n": number}) as s:
            for name in order:
                s.add(name, {"a": a, "b": b}[name])
        with open_file(path) as file:
            digests.add(file.sections["base"].digest)
    assert len(digests) == 1
    with Writer(tmp_path / "other.adrt") as w, w.section("base", kind="base") as s:
        s.add("a", Tensor("f16", a.shape, a.data))
        s.add("b", b)
    with open_file(tmp_path / "other.adrt") as file:
        assert file.sections["base"].digest not in digests


def test_aliases_share_the_tensor_across_sections(tmp_path: Path) -> None:
    path = tmp_path / "vera.adrt"
    with Writer(path) as w:
        with w.section("one", kind="adapter") as s:
            s.add("projection", plain(5000))
        with w.section("two", kind="adapter") as s:
            s.alias("shared", ("one", "projection"))
            s.add("own", plain(5))
            s.alias("again", ("two", "own"))
    with open_file(path) as file:
        assert file.tensor("two", "shared") is file.tensor("one", "projection")
        assert file.sections["two"].tensors["shared"].shape == (5000,)
        assert file.sections["two"].bytes == 64
        with Writer(tmp_path / "copy.adrt") as w:
            w.copy_section(file, "one")
            w.copy_section(file, "two", name="deux")
    with open_file(tmp_path / "copy.adrt") as copy:
        assert copy.sections["deux"].tensors["again"].alias == ("deux", "own")
        assert copy.tensor("deux", "shared") is copy.tensor("one", "projection")
    missing = pytest.raises(FormatError, match=r"\['one', 'projection'\], which is missing")
    with missing, append(path) as a:
        a.remove("one")
    assert verify(path) == []


def test_copy_refuses_an_alias_that_leads_elsewhere(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        with Writer(tmp_path / f"{name}.adrt") as w, w.section("base", kind="base") as s:
            s.add("w", plain(10, seed))
    with append(tmp_path / "a.adrt") as a, a.section("adapter/x", kind="adapter") as s:
        s.alias("w", ("base", "w"))
    before = (tmp_path / "b.adrt").read_bytes()
    with (
        open_file(tmp_path / "a.adrt") as file,
        pytest.raises(FormatError, match="aliases lead to other tensors"),
        append(tmp_path / "b.adrt") as a,
    ):
        a.copy_section(file, "adapter/x")
    assert (tmp_path / "b.adrt").read_bytes() == before


MISUSES = {
    "too few bytes": (lambda s: _stream(s, "t", (4,), b"abc"), "1 bytes short of the 4"),
    "too many bytes": (lambda s: _stream(s, "t", (4,), b"abcde"), "1 bytes more"),
    "tensor twice": (lambda s: (s.add("t", plain(1)), s.add("t", plain(1))), "'t' is written twice"),
    "alias twice": (lambda s: (s.add("t", plain(1)), s.alias("t", ("s", "t"))), "'t' is written twice"),
    "stream in a stream": (lambda s: _nested(s), "before the last one is complete"),
    "empty name": (lambda s: s.add("", plain(1)), "tensor name has 0 bytes"),
    "long name": (lambda s: s.add("x" * 257, plain(1)), "257 bytes"),
    "five dimensions": (lambda s: _stream(s, "t", (1,) * 5, b"a"), "5 dimensions"),
    "huge dimension": (lambda s: _stream(s, "t", (1 << 40,), b"a"), "dimension"),
    "unknown dtype": (lambda s: _stream(s, "t", (1,), b"a", "f64"), "unknown dtype 'f64'"),
    "metadata NaN": (lambda s: s.metadata.update(scale=float("nan")), "not JSON compliant"),
    "metadata set": (lambda s: s.metadata.update(scale={1}), "type set"),
    "metadata key": (lambda s: s.metadata.update({1: 2}), "key of type int"),
    "metadata surrogate": (lambda s: s.metadata.update(x="\ud800"), "surrogates not allowed"),
    "metadata depth": (lambda s: s.metadata.update(x=_deep(20)), "more than 16 deep"),
    "metadata integer": (lambda s: s.metadata.update(x=1 << 64), "65 bits"),
    "dangling alias": (lambda s: s.alias("t", ("s", "nope")), "missing"),
    "alias of an alias": (
        lambda s: (s.add("t", plain(1)), s.alias("u", ("s", "t")), s.alias("v", ("s", "u"))),
        "an alias itself",
    ),
}


def _stream(s, name, shape, data, dtype="u8") -> None:
    with s.stream(name, dtype, shape) as out:
        out.write(data)


def _nested(s) -> None:
    with s.stream("a", "u8", (1,)):
        s.add("b", plain(1))


def _deep(depth: int) -> list:
    return [_deep(depth - 1)] if depth else []


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("case", MISUSES)
def test_misuse_leaves_nothing_behind(case: str, codec: str, tmp_path: Path) -> None:
    misuse, message = MISUSES[case]
    refused = pytest.raises(FormatError, match=message)
    with refused, Writer(tmp_path / "bad.adrt") as w, w.section("s", kind="adapter", codec=codec) as s:
        misuse(s)
    assert list(tmp_path.iterdir()) == []


def test_misuse_of_sections(base: Path) -> None:
    before = base.read_bytes()
    cases = {
        "section 'base' exists already": ("base", "base", "raw"),
        "unknown critical kind 'x'": ("a", "x", "raw"),
        "codec is 'gzip'": ("a", "adapter", "gzip"),
    }
    for message, (name, kind, codec) in cases.items():
        refused = pytest.raises(FormatError, match=message)
        with refused, append(base) as a, a.section(name, kind=kind, codec=codec):
            pass
    refused = pytest.raises(FormatError, match="'b' begins before the last one is complete")
    with refused, append(base) as a, a.section("a", kind="adapter"), a.section("b", kind="adapter"):
        pass
    with pytest.raises(MissingError, match="no section 'nope'"), append(base) as a:
        a.remove("nope")
    with pytest.raises(FormatError, match="with statement"):
        append(base).section("a", kind="adapter").__enter__()
    assert base.read_bytes() == before


@pytest.mark.parametrize("interrupt", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_exception_keeps_the_old_file(interrupt: type[BaseException], base: Path) -> None:
    before = base.read_bytes()
    with pytest.raises(interrupt), Writer(base) as w, w.section("base", kind="base") as s:
        s.add("x", plain(100_000))
        raise interrupt
    with pytest.raises(interrupt), append(base) as a:
        with a.section("adapter/a", kind="adapter") as s:
            s.add("x", plain(100_000))
        raise interrupt
    assert base.read_bytes() == before
    assert leftovers(base) == []


def test_failed_section_can_be_survived(base: Path) -> None:
    with append(base) as a:
        with pytest.raises(ZeroDivisionError), a.section("adapter/bad", kind="adapter") as s:
            s.add("x", plain(100_000))
            raise ZeroDivisionError
        with a.section("adapter/good", kind="adapter") as s:
            s.add("x", plain(10))
    with open_file(base) as file:
        assert list(file.sections) == ["base", "adapter/good"]
    assert verify(base) == []


def test_replacing_a_file_does_not_disturb_its_readers(base: Path) -> None:
    with open_file(base) as old:
        with Writer(base) as w, w.section("base", kind="base") as s:
            s.add("other", plain(1))
        assert old.tensor("base", "w").data.tobytes() == noise(1000).tobytes()
    with open_file(base) as new:
        assert list(new.sections["base"].tensors) == ["other"]


def test_symbolic_link_stays_one(base: Path) -> None:
    link = base.with_name("link.adrt")
    link.symlink_to(base)
    with Writer(link) as w, w.section("base", kind="base") as s:
        s.add("other", plain(1))
    add_adapter(link, "adapter/a")
    assert link.is_symlink()
    with open_file(base) as file:
        assert list(file.sections) == ["base", "adapter/a"]


def test_left_temporary_file_is_taken_over(base: Path) -> None:
    temporary = base.with_name(f".{base.name}.tmp")
    temporary.write_bytes(noise(1 << 20).tobytes())
    write_base(base)
    assert leftovers(base) == [] and verify(base) == []


# Round trips


def contents(dtype: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A random tensor with zeros between its parts."""
    data = noise(tensor_nbytes(dtype, shape), seed)
    if dtype == "nf4":
        layout = Nf4Layout(int(np.prod(shape, dtype=object)))
        data[layout.code_bytes : layout.absmax_offset] = 0
        data[layout.absmax_offset + layout.blocks : layout.nested_offset] = 0
    if dtype == "int8":
        rows, cols = rows_cols(shape)
        data[rows * cols : Int8Layout(rows, cols).scale_offset] = 0
    return Tensor(dtype, shape, data)


NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=40)
TENSORS = st.dictionaries(
    NAMES,
    st.builds(
        contents,
        st.sampled_from(DTYPES),
        st.lists(st.integers(0, 9), max_size=4).map(tuple),
        st.integers(0, 1 << 32),
    ),
    max_size=5,
)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=10,
)
METADATA = st.dictionaries(NAMES, JSON, max_size=4)
SECTIONS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(["raw", "zstd"]), METADATA, TENSORS), min_size=1, max_size=4
)


def write_sections(builder, sections) -> None:
    for name, (codec, metadata, tensors) in sections.items():
        with builder.section(name, kind="adapter", codec=codec, metadata=metadata) as s:
            for key, tensor in tensors.items():
                s.add(key, tensor)


def check_sections(file: File, sections) -> None:
    assert list(file.sections) == list(sections)
    for name, (_, metadata, tensors) in sections.items():
        assert file.sections[name].metadata == metadata
        found = file.read_section(name)
        assert list(found) == list(tensors)
        for key, tensor in tensors.items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape)
            assert found[key].data.tobytes() == tensor.data.tobytes()


@settings(max_examples=40, deadline=None)
@given(metadata=METADATA, first=SECTIONS, second=SECTIONS)
def test_round_trip(tmp_path_factory, metadata, first, second) -> None:
    path = tmp_path_factory.mktemp("round") / "trip.adrt"
    with Writer(path, metadata=metadata) as w:
        write_sections(w, first)
    with append(path) as a:
        for name in first.keys() & second.keys():
            a.remove(name)
        write_sections(a, second)
    kept = {name: first[name] for name in first if name not in second} | second
    with open_file(path) as file:
        assert file.metadata == metadata
        check_sections(file, kept)
    assert verify(path) == []
    expected = {
        name: {key: (t.dtype, list(t.shape), t.data.tobytes()) for key, t in tensors.items()}
        for name, (_, _, tensors) in kept.items()
    }
    assert independent_reader.read(path) == expected
