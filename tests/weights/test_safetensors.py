"""Safetensors files against the library's own reader; damaged and hostile ones."""

from __future__ import annotations

import hashlib
import json
import os
import struct

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from rlxc.errors import FormatError, RlxcError, UnsupportedError, WeightError
from rlxc.weights.safetensors import SafetensorsFile


def build(header, data=b"") -> bytes:
    """A file of a header, given as JSON or as an object."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype="F32", shape=(1,), begin=0, end=4):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    return {
        "w": rng.standard_normal((3, 5)).astype(np.float32),
        "half": rng.standard_normal((2, 2, 3)).astype(np.float16),
        "codes": rng.integers(0, 255, (7,)).astype(np.uint8),
        "none": np.zeros((0, 4), np.float32),
        "number": np.array(2.5, np.float32),
    }


@pytest.fixture
def path(tmp_path, arrays):
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path / "model.safetensors"


def test_tensors_are_those_of_the_library(path):
    reference = load_file(path)
    with SafetensorsFile(path) as file:
        assert set(file.tensors) == set(reference)
        for name, array in reference.items():
            tensor = file.tensors[name]
            assert (tensor.name, tensor.shape, tensor.nbytes) == (name, array.shape, array.nbytes)
            assert file.data(name).tobytes() == array.tobytes()
        assert {name: tensor.dtype for name, tensor in file.tensors.items()} == {
            "w": "F32", "half": "F16", "codes": "U8", "none": "F32", "number": "F32",
        }  # fmt: skip
        assert file.metadata == {"format": "pt"}


def test_floats_have_the_file_s_values(path, arrays):
    with SafetensorsFile(path) as file:
        for name in ("w", "half", "none", "number"):
            values = file.floats(name)
            assert values.dtype == np.float32 and values.shape == arrays[name].shape
            assert (values == arrays[name].astype(np.float32)).all()


def test_bf16_is_decoded(tmp_path):
    values = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32)
    packed = gguf.quantize(values, gguf.GGMLQuantizationType.BF16)
    path = tmp_path / "model.safetensors"
    path.write_bytes(build({"w": entry("BF16", values.shape, 0, packed.nbytes)}, packed.tobytes()))
    reference = gguf.dequantize(packed, gguf.GGMLQuantizationType.BF16)
    assert (SafetensorsFile(path).floats("w") == reference).all()


def test_bytes_are_borrowed_from_the_mapping_and_outlive_the_file(path, arrays):
    file = SafetensorsFile(path)
    data, values = file.data("w"), file.floats("w")
    file.close()
    assert not data.flags.writeable and not data.flags.owndata
    assert np.shares_memory(data, values)
    assert (values == arrays["w"]).all()


def test_f32_that_is_not_aligned_is_copied(tmp_path):
    header = {"a": entry("U8", (1,), 0, 1), "w": entry("F32", (2,), 1, 9)}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    path = tmp_path / "model.safetensors"
    path.write_bytes(build(raw, b"\7" + np.array([1.5, -2], "<f4").tobytes()))
    values = SafetensorsFile(path).floats("w")
    assert values.flags.aligned
    assert values.tolist() == [1.5, -2]


def test_several_files_are_one_model(tmp_path, arrays):
    save_file({"w": arrays["w"]}, tmp_path / "1.safetensors")
    save_file({"codes": arrays["codes"]}, tmp_path / "2.safetensors")
    file = SafetensorsFile(tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    assert list(file.tensors) == ["w", "codes"]
    assert (file.floats("w") == arrays["w"]).all()
    assert (file.data("codes") == arrays["codes"]).all()


def test_tensor_in_two_files_is_refused(tmp_path, arrays):
    for name in ("1", "2"):
        save_file({"w": arrays["w"]}, tmp_path / f"{name}.safetensors")
    with pytest.raises(FormatError, match=r"2.safetensors: tensor 'w' is also in 1.safetensors"):
        SafetensorsFile(tmp_path / "1.safetensors", tmp_path / "2.safetensors")


def test_hash_is_that_of_the_files_one_after_the_other(tmp_path, arrays):
    paths = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    save_file({"w": arrays["w"]}, paths[0])
    save_file({"codes": arrays["codes"]}, paths[1])
    digest = hashlib.sha256()
    SafetensorsFile(*paths).hash_into(digest)
    assert digest.digest() == hashlib.sha256(paths[0].read_bytes() + paths[1].read_bytes()).digest()


def test_file_that_changed_is_not_hashed(path, arrays):
    file = SafetensorsFile(path)
    path.unlink()
    save_file({"w": arrays["w"]}, path)
    with pytest.raises(FormatError, match="has changed since it was opened"):
        file.hash_into(hashlib.sha256())


def test_file_that_changes_in_place_is_not_what_was_opened(path):
    file = SafetensorsFile(path)
    file.check_unchanged()
    with path.open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"?")
    os.utime(path, ns=(1, 1))  # clocks are coarse
    with pytest.raises(FormatError, match="has changed since it was opened"):
        file.check_unchanged()


def test_closing_a_file_ends_its_hashing(tmp_path):
    save_file({"w": np.zeros(1 << 20, np.float32)}, tmp_path / "large.safetensors")
    file = SafetensorsFile(tmp_path / "large.safetensors")

    class Digest:
        pieces = 0

        def update(self, data):
            self.pieces += 1
            file.close()

    digest = Digest()
    with pytest.raises(WeightError, match="the file is closed"):
        file.hash_into(digest)
    assert digest.pieces == 1


def test_missing_tensor_is_refused(path):
    with pytest.raises(WeightError, match="has no tensor 'b'"):
        SafetensorsFile(path).data("b")


def test_closed_file_gives_no_tensor(path):
    file = SafetensorsFile(path)
    file.close()
    with pytest.raises(WeightError, match="is closed"):
        file.data("w")


def test_integers_are_no_floats(path):
    with pytest.raises(UnsupportedError, match="tensor 'codes' has element type U8; one of F32, F16, BF16"):
        SafetensorsFile(path).floats("codes")


def test_no_path_at_all_is_refused():
    with pytest.raises(FormatError, match="no safetensors file was given"):
        SafetensorsFile()


DAMAGED = {
    "three bytes": (b"abc", "not a sound safetensors file"),
    "header past the end": (struct.pack("<Q", 2**62) + b"{}", "not a sound safetensors file"),
    "header that is no JSON": (build(b"{'a'}"), "not a sound safetensors file"),
    "header that is a list": (build(b"[]"), "not a sound safetensors file"),
    "header nested deeply": (build(b'{"a":' + b"[" * 9999 + b"]" * 9999 + b"}"), "not a sound safetensors file"),
    "tensor past the end": (build({"a": entry(end=4)}, bytes(3)), "not a sound safetensors file"),
    "bytes that belong to no tensor": (build({"a": entry()}, bytes(5)), "not a sound safetensors file"),
    "gap": (build({"a": entry(), "b": entry(begin=8, end=12)}, bytes(12)), "not a sound safetensors file"),
    "overlap": (build({"a": entry(), "b": entry(begin=2, end=6)}, bytes(6)), "not a sound safetensors file"),
    "shape that does not fit": (build({"a": entry(shape=(2,))}, bytes(4)), "not a sound safetensors file"),
    "shape that overflows": (build({"a": entry(shape=(2**63, 4))}, bytes(4)), "not a sound safetensors file"),
    "negative offset": (build({"a": entry(begin=-4, end=0)}, bytes(4)), "not a sound safetensors file"),
    "unknown type": (build({"a": entry("Q4")}, bytes(4)), "not a sound safetensors file"),
    "two tensors of one name": (
        build(b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(4)),
        "the header is not sound JSON: key 'a' appears twice",
    ),
    "entry that is a list": (build({"a": ["F32", [1], [0, 4]]}, bytes(4)), "the entry of tensor 'a' is no object"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_refused_in_one_line(tmp_path, case):
    content, message = DAMAGED[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message) as caught:
        SafetensorsFile(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert caught.value.remedy and "\n" not in str(caught.value)


def test_missing_empty_and_odd_files_are_refused(tmp_path):
    (tmp_path / "empty").touch()
    for name, message in (("absent", "No such file"), ("empty", "is empty"), ("", "is a directory")):
        with pytest.raises(FormatError, match=message):
            SafetensorsFile(tmp_path / name)
    with pytest.raises(FormatError, match="cannot be read"):
        SafetensorsFile("model\0.safetensors")


def test_file_cut_anywhere_is_refused(tmp_path, path):
    content = path.read_bytes()
    cut = tmp_path / "cut.safetensors"
    for length in range(1, len(content)):
        cut.write_bytes(content[:length])
        with pytest.raises(FormatError):
            SafetensorsFile(cut)


@pytest.fixture(scope="module")
def mutant(tmp_path_factory):
    """``mutant(bytes)`` writes a file anew: a mapping that is still open keeps the old one."""
    path = tmp_path_factory.mktemp("mutants") / "model.safetensors"

    def write(content):
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        return path

    return write


SAMPLE = build(
    {"__metadata__": {"format": "pt"}, "a": entry("F32", (2, 2), 0, 16), "b": entry("BF16", (3,), 16, 22)}, bytes(22)
)  # fmt: skip


@settings(max_examples=400)
@given(data=st.data())
def test_mutant_is_refused_or_read_as_the_library_does(mutant, data):
    content = bytearray(SAMPLE)
    for place in data.draw(st.lists(st.integers(0, len(SAMPLE) - 1), min_size=1, max_size=4)):
        content[place] = data.draw(st.one_of(st.sampled_from(b'{}[]",:0192'), st.integers(0, 255)))
    path = mutant(bytes(content))
    try:
        file = SafetensorsFile(path)
    except RlxcError:
        return
    header = json.loads(content[8 : 8 + struct.unpack("<Q", content[:8])[0]])
    header.pop("__metadata__", None)
    assert {name: list(tensor.shape) for name, tensor in file.tensors.items()} == {
        name: value["shape"] for name, value in header.items()
    }
    assert sum(file.data(name).size for name in header) == len(content) - 8 - int.from_bytes(
        content[:8], "little"
    )
