"""Files that are no GGUF, damaged, hostile or beyond rlxc: always an RlxcError, never much memory."""

from __future__ import annotations

import os
import re
import struct
import tracemalloc
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Ggml
from gguf import GGUFValueType as Kind
from hypothesis import given, settings
from hypothesis import strategies as st

from rlxc.errors import FormatError, RlxcError, UnsupportedError
from rlxc.weights.gguf import open_gguf

# A file of a few kB may cost as much again in Python objects, but nothing that grows with a number in it.
MEMORY_BOUND = 1 << 20


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


def pair(key: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(key) + u32(kind) + payload


def tensor(name="w", dims=(32,), kind: int = Ggml.F32, offset: int = 0, n_dims: int | None = None) -> bytes:
    """An entry of the tensor table; ``dims`` innermost first, as in the file."""
    shape = b"".join(map(u64, dims))
    return text(name) + u32(len(dims) if n_dims is None else n_dims) + shape + u32(kind) + u64(offset)


def build(
    pairs=(), tensors=(), data=b"", version=3, magic=b"GGUF", n_tensors=None, n_pairs=None, alignment=32
) -> bytes:
    head = magic + u32(version)
    head += u64(len(tensors) if n_tensors is None else n_tensors)
    head += u64(len(pairs) if n_pairs is None else n_pairs)
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


def array_of(kind: int, count: int, payload: bytes = b"") -> bytes:
    return u32(kind) + u64(count) + payload


DAMAGED = {
    "wrong magic": (build(magic=b"PK\3\4"), "is not a GGUF file"),
    "version 0": (build(version=0), "version is 0"),
    "absurd tensor count": (build(n_tensors=2**62), "tensor count is 4611686018427387904"),
    "absurd metadata count": (build(n_pairs=2**64 - 1), "metadata count is 18446744073709551615"),
    "more pairs than there are": (build([pair("a", Kind.UINT8, b"\1")], n_pairs=2), "metadata key 1 is empty"),
    "key length past the end": (build([u64(2**63) + b"key"]), "metadata key 0"),
    "string length past the end": (build([pair("a", Kind.STRING, u64(1000))]), "metadata 'a'"),
    "absurd string length": (build([pair("a", Kind.STRING, u64(2**64 - 1))]), "metadata 'a'"),
    "absurd number array": (build([pair("a", Kind.ARRAY, array_of(Kind.FLOAT32, 2**61))]), "length of metadata 'a'"),
    "absurd string array": (build([pair("a", Kind.ARRAY, array_of(Kind.STRING, 2**60))]), "length of metadata 'a'"),
    "string in an array past the end": (
        build([pair("a", Kind.ARRAY, array_of(Kind.STRING, 2, text("x") + u64(2**64 - 1)))]),
        "ends in number 1",
    ),
    "unknown value type": (build([pair("a", 13, b"")]), "metadata 'a' has value type 13"),
    "unknown array type": (build([pair("a", Kind.ARRAY, array_of(99, 0))]), "metadata 'a' has value type 99"),
    "boolean 2": (build([pair("a", Kind.BOOL, b"\2")]), "neither 0 nor 1"),
    "array with boolean 255": (
        build([pair("a", Kind.ARRAY, array_of(Kind.BOOL, 2, b"\1\xff"))]),
        "neither 0 nor 1",
    ),
    "duplicate key": (build([pair("a", Kind.UINT8, b"\1")] * 2), "metadata key 'a' appears twice"),
    "key not UTF-8": (build([pair(b"\xff", Kind.UINT8, b"\1")]), "metadata key 0 is not UTF-8"),
    "string not UTF-8": (build([pair("a", Kind.STRING, text(b"ab\xc3"))]), "metadata 'a' is not UTF-8 at byte 2"),
    "tensor name not UTF-8": (build(tensors=[tensor(b"\x80")]), "name of tensor 0 is not UTF-8"),
    "alignment 0": (build([pair("general.alignment", Kind.UINT32, u32(0))]), "general.alignment is 0"),
    "alignment 4": (build([pair("general.alignment", Kind.UINT32, u32(4))]), "general.alignment is 4"),
    "alignment 48": (build([pair("general.alignment", Kind.UINT32, u32(48))]), "general.alignment is 48"),
    "alignment of another type": (
        build([pair("general.alignment", Kind.UINT64, u64(32))]),
        "general.alignment is of type UINT64",
    ),
    "no dimensions": (build(tensors=[tensor(dims=())], data=bytes(128)), "tensor 'w' has 0 dimensions"),
    "five dimensions": (build(tensors=[tensor(dims=(1,) * 5)], data=bytes(128)), "tensor 'w' has 5 dimensions"),
    "absurd dimensions": (build(tensors=[tensor(n_dims=2**32 - 1)]), "tensor 'w' has 4294967295 dimensions"),
    "dimension 0": (build(tensors=[tensor(dims=(32, 0))], data=bytes(128)), "a dimension is 0"),
    "shape that overflows 64 bits": (build(tensors=[tensor(dims=(2**63, 2, 2**32))]), "tensor 'w' ends at"),
    "row that is not whole blocks": (
        build(tensors=[tensor(dims=(48, 2), kind=Ggml.Q8_0)], data=bytes(128)),
        "tensor 'w' has rows of 48 weights",
    ),
    "misaligned tensor": (build(tensors=[tensor(offset=8)], data=bytes(256)), "offset 8, not a multiple"),
    "tensor past the end": (build(tensors=[tensor()], data=bytes(127)), "tensor 'w' ends at"),
    "tensor offset past the end": (build(tensors=[tensor(offset=2**63)], data=bytes(128)), "tensor 'w' ends at"),
    "overlapping tensors": (
        build(tensors=[tensor("a", offset=0), tensor("b", offset=96)], data=bytes(256)),
        "tensors 'a' and 'b' overlap",
    ),
    "tensors at the same place": (
        build(tensors=[tensor("a"), tensor("b")], data=bytes(256)),
        "tensors 'a' and 'b' overlap",
    ),
    "duplicate tensor": (
        build(tensors=[tensor("a"), tensor("a", offset=128)], data=bytes(256)),
        "tensor 'a' appears twice",
    ),
    "split count that is text": (build([pair("split.count", Kind.STRING, text("2"))]), "split.count"),
}  # fmt: skip
UNSUPPORTED = {
    "version 1": (build(version=1), "GGUF version 1"),
    "version 4": (build(version=4), "GGUF version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "nested array": (
        build([pair("a", Kind.ARRAY, array_of(Kind.ARRAY, 1, array_of(Kind.UINT8, 0)))]),
        "metadata 'a' is an array of arrays",
    ),
    "tensor type": (build(tensors=[tensor(kind=Ggml.Q8_1)]), r"type Q8_1.*Q4_K.*Q6_K"),
    "tensor type without a name": (build(tensors=[tensor(kind=1000)]), r"type 1000.*Q4_K"),
}


def check_message(error: RlxcError, path: Path) -> None:
    """One line that starts with the file and ends with a remedy."""
    assert str(error).startswith(f"{path}: ")
    assert error.remedy
    assert "\n" not in str(error)


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused_by_name(tmp_path, case):
    content, message = DAMAGED[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=re.escape(message)) as caught:
        open_gguf(path)
    check_message(caught.value, path)


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, case):
    content, message = UNSUPPORTED[case]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UnsupportedError, match=message) as caught:
        open_gguf(path)
    check_message(caught.value, path)


def test_big_endian_file_of_the_reference_writer_is_refused(write_gguf):
    path = write_gguf(lambda writer: None, endianess=gguf.GGUFEndian.BIG)
    with pytest.raises(UnsupportedError, match="big-endian"):
        open_gguf(path)


def test_string_array_that_is_not_utf8_is_refused_when_read(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(build([pair("a", Kind.ARRAY, array_of(Kind.STRING, 2, text("x") + text(b"\xff")))]))
    strings = open_gguf(path).metadata["a"]
    with pytest.raises(FormatError, match=r"metadata 'a'\[1\] is not UTF-8"):
        list(strings)


def test_newline_in_a_key_keeps_the_message_on_one_line(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(build([pair("a\nb" + "x" * 200, Kind.BOOL, b"\2")]))
    with pytest.raises(FormatError) as caught:
        open_gguf(path)
    check_message(caught.value, path)
    assert "x" * 100 not in str(caught.value)


def test_missing_file_is_refused(tmp_path):
    with pytest.raises(FormatError, match="No such file"):
        open_gguf(tmp_path / "absent.gguf")


def test_directory_is_refused(tmp_path):
    with pytest.raises(FormatError, match="is a directory"):
        open_gguf(tmp_path)


def test_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(FormatError, match="is empty"):
        open_gguf(tmp_path / "empty.gguf")


def test_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(FormatError, match="not a regular file"):
        open_gguf(tmp_path / "pipe.gguf")


def test_path_with_a_nul_byte_is_refused():
    with pytest.raises(FormatError, match="cannot be read"):
        open_gguf("model\0.gguf")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_refused(tmp_path, typical_bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(typical_bytes)
    path.chmod(0)
    with pytest.raises(FormatError, match="Permission denied"):
        open_gguf(path)


# Mutations of a real file -----------------------------------------------------------------------------------


def tensor_end(path: Path) -> int:
    with open_gguf(path) as file:
        return max(info.offset + info.nbytes for info in file.tensors.values())


def test_file_cut_anywhere_before_its_last_weight_is_refused(tmp_path, typical_bytes):
    path = tmp_path / "model.gguf"
    path.write_bytes(typical_bytes)
    end = tensor_end(path)
    for length in range(end - 1, 0, -1):
        os.truncate(path, length)
        with pytest.raises(FormatError):
            open_gguf(path)


def same(ours: object, theirs: object) -> bool:
    """Equal, with NaN equal to NaN."""
    if isinstance(ours, (float, np.ndarray)):
        return np.array_equal(
            np.asarray(ours), np.asarray(theirs), equal_nan=np.asarray(ours).dtype.kind == "f"
        )
    return bool(ours == theirs) if isinstance(ours, (int, str)) else list(ours) == theirs


def check_as_the_reference_reads(path: Path) -> None:
    """``path`` either opens, and then holds what ``gguf.GGUFReader`` finds in it, or it is refused."""
    try:
        file = open_gguf(path)
        metadata = {
            key: value if isinstance(value, (int, float, str, np.ndarray)) else list(value)
            for key, value in file.metadata.items()
        }
    except RlxcError:
        return
    reference = gguf.GGUFReader(path)
    fields = {key: f.contents() for key, f in reference.fields.items() if not key.startswith("GGUF.")}
    assert list(metadata) == list(fields)
    assert all(same(metadata[key], fields[key]) for key in metadata)
    assert list(file.tensors) == [t.name for t in reference.tensors]
    for t in reference.tensors:
        assert file.data(t.name).tobytes() == t.data.tobytes()


@pytest.fixture(scope="module")
def mutant(tmp_path_factory, typical_bytes):
    """``mutant(bytes)`` writes a file anew: a mapping that is still open keeps the old one."""
    path = tmp_path_factory.mktemp("mutants") / "model.gguf"

    def write(content: bytes) -> Path:
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return path

    return write


def header_length(content: bytes) -> int:
    return content.index(b"Q4_0.weight") + 48


@settings(max_examples=1500)
@given(data=st.data())
def test_flipped_bytes_are_refused_or_read_as_the_reference_does(mutant, typical_bytes, data):
    content = bytearray(typical_bytes)
    places = st.integers(0, header_length(typical_bytes))
    for place in data.draw(st.lists(places, min_size=1, max_size=3)):
        content[place] ^= data.draw(st.integers(1, 255))
    check_as_the_reference_reads(mutant(bytes(content)))


INTERESTING = st.sampled_from(
    [0, 1, 2, 7, 8, 9, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
)  # fmt: skip


@settings(max_examples=1500)
@given(value=st.one_of(INTERESTING, st.integers(0, 2**64 - 1)), width=st.sampled_from([4, 8]), data=st.data())
def test_spliced_integers_are_refused_or_read_as_the_reference_does(
    mutant, typical_bytes, value, width, data
):
    place = data.draw(st.integers(4, header_length(typical_bytes)))
    raw = (value & (2 ** (8 * width) - 1)).to_bytes(width, "little")
    check_as_the_reference_reads(mutant(typical_bytes[:place] + raw + typical_bytes[place + width :]))


@settings(max_examples=500)
@given(data=st.data())
def test_inserted_or_deleted_bytes_are_refused_or_read_as_the_reference_does(mutant, typical_bytes, data):
    start = data.draw(st.integers(0, header_length(typical_bytes)))
    stop = data.draw(st.integers(start, start + 16))
    extra = data.draw(st.binary(max_size=16))
    check_as_the_reference_reads(mutant(typical_bytes[:start] + extra + typical_bytes[stop:]))


@settings(max_examples=300)
@given(content=st.binary(max_size=200))
def test_noise_behind_a_valid_magic_is_refused_or_read_as_the_reference_does(mutant, content):
    check_as_the_reference_reads(mutant(b"GGUF" + u32(3) + content))


@pytest.mark.parametrize("value", [2**16 - 1, 2**31 - 1, 2**40, 2**63 - 1, 2**64 - 1])
def test_huge_number_anywhere_in_the_header_allocates_little(mutant, typical_bytes, value):
    tracemalloc.start()
    try:
        for place in range(4, header_length(typical_bytes)):
            path = mutant(typical_bytes[:place] + u64(value) + typical_bytes[place + 8 :])
            tracemalloc.reset_peak()
            with suppress(RlxcError):
                open_gguf(path).close()
            assert tracemalloc.get_traced_memory()[1] < MEMORY_BOUND, place
    finally:
        tracemalloc.stop()
