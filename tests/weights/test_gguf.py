"""Reading sound GGUF files, whole and split."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from rlxc.dtypes import DType
from rlxc.errors import FormatError, WeightError
from rlxc.weights.gguf import StringArray, open_gguf

SCALARS = {
    "uint8": 255,
    "int8": -128,
    "uint16": 65535,
    "int16": -32768,
    "uint32": 2**32 - 1,
    "int32": -(2**31),
    "uint64": 2**64 - 1,
    "int64": -(2**63),
    "float32": 0.1,
    "float64": 0.1,
    "bool": True,
    "string": "naïve ☃",
}
ARRAY_TYPES = {
    "UINT8": np.uint8,
    "INT8": np.int8,
    "UINT16": np.uint16,
    "INT16": np.int16,
    "UINT32": np.uint32,
    "INT32": np.int32,
    "UINT64": np.uint64,
    "INT64": np.int64,
    "FLOAT32": np.float32,
    "FLOAT64": np.float64,
    "BOOL": np.bool_,
}


def test_tensors_agree_with_the_reference_reader(write_gguf):
    path = write_gguf()
    reference = gguf.GGUFReader(path)
    with open_gguf(path) as file:
        assert list(file.tensors) == [tensor.name for tensor in reference.tensors]
        for tensor in reference.tensors:
            info = file.tensors[tensor.name]
            assert info.dtype.name == tensor.tensor_type.name
            assert list(info.shape) == tensor.shape.tolist()[::-1]
            assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
            assert file.data(tensor.name).tobytes() == tensor.data.tobytes()


@pytest.mark.parametrize("kind", SCALARS)
def test_scalar_becomes_a_python_value(write_gguf, kind):
    path = write_gguf(lambda writer: getattr(writer, f"add_{kind}")("some.key", SCALARS[kind]))
    value = open_gguf(path).metadata["some.key"]
    expected = float(np.float32(0.1)) if kind == "float32" else SCALARS[kind]
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize("kind", ARRAY_TYPES)
def test_numeric_array_becomes_a_read_only_numpy_array(write_gguf, kind):
    def fill(writer):
        writer.add_key_value(
            "some.key", [0, 1, 1], gguf.GGUFValueType.ARRAY, sub_type=gguf.GGUFValueType[kind]
        )

    value = open_gguf(write_gguf(fill)).metadata["some.key"]
    assert value.dtype == ARRAY_TYPES[kind]
    assert value.tolist() == [0, 1, 1]
    assert not value.flags.writeable


def test_string_array_is_a_sequence_of_str(write_gguf):
    tokens = open_gguf(write_gguf()).metadata["tokenizer.ggml.tokens"]
    expected = ["<s>", "", "é", "日本", "a longer piece"]
    assert isinstance(tokens, StringArray)
    assert list(tokens) == expected
    assert [tokens[i] for i in range(-5, 5)] == expected + expected
    assert tokens[1:4:2] == expected[1:4:2]
    assert "日本" in tokens


def test_string_array_index_beyond_its_end_is_an_index_error(write_gguf):
    with pytest.raises(IndexError):
        open_gguf(write_gguf()).metadata["tokenizer.ggml.tokens"][5]


def test_metadata_keeps_the_order_of_the_file(write_gguf):
    path = write_gguf()
    fields = [name for name in gguf.GGUFReader(path).fields if not name.startswith("GGUF.")]
    assert list(open_gguf(path).metadata) == fields


def test_version_2_is_read_like_version_3(write_gguf):
    path = write_gguf()
    expected = open_gguf(path).tensors
    raw = bytearray(path.read_bytes())
    raw[4] = 2
    path.with_name("old.gguf").write_bytes(raw)
    file = open_gguf(path.with_name("old.gguf"))
    assert file.version == 2
    assert file.tensors == expected


def test_alignment_in_the_metadata_is_honoured(write_gguf):
    def fill(writer):
        writer.add_custom_alignment(256)
        writer.add_tensor("a", np.arange(3, dtype=np.float32))
        writer.add_tensor("b", np.arange(5, dtype=np.float32))

    file = open_gguf(write_gguf(fill))
    assert file.alignment == 256
    assert all(info.offset % 256 == 0 for info in file.tensors.values())
    assert file.data("b").view(np.float32).tolist() == [0, 1, 2, 3, 4]


def test_tensor_with_four_dimensions_has_its_innermost_last(write_gguf):
    path = write_gguf(lambda writer: writer.add_tensor("a", np.zeros((2, 3, 4, 5), np.float32)))
    assert open_gguf(path).tensors["a"].shape == (2, 3, 4, 5)


def test_file_without_tensors_opens(write_gguf):
    assert not open_gguf(write_gguf(lambda writer: None)).tensors


def test_data_is_a_read_only_view_of_the_mapping(write_gguf):
    file = open_gguf(write_gguf())
    data = file.data("norm.weight")
    assert (data.dtype, data.shape) == (np.uint8, (128,))
    assert not data.flags.writeable
    assert np.shares_memory(data, file.data("norm.weight"))


def test_views_and_metadata_outlive_the_file(write_gguf):
    with open_gguf(write_gguf()) as file:
        data = file.data("norm.weight")
        expected = data.tobytes()
    assert data.tobytes() == expected
    assert file.metadata["tokenizer.ggml.tokens"][3] == "日本"
    assert file.metadata["tokenizer.ggml.scores"].tolist() == [0.5, -1.0, 2.0]


def test_data_of_a_closed_file_is_refused(write_gguf):
    file = open_gguf(write_gguf())
    file.close()
    with pytest.raises(WeightError, match="closed"):
        file.data("norm.weight")


def test_unknown_tensor_is_refused(write_gguf):
    with pytest.raises(WeightError, match="no tensor 'absent'"):
        open_gguf(write_gguf()).data("absent")


def test_fingerprint_is_the_sha256_of_the_file(write_gguf):
    path = write_gguf()
    assert open_gguf(path).fingerprint() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("look", ["fingerprint", "check_unchanged"])
def test_file_replaced_after_opening_is_noticed(write_gguf, look):
    path = write_gguf()
    file = open_gguf(path)
    other = path.with_name("other.gguf")
    other.write_bytes(path.read_bytes())
    other.replace(path)
    with pytest.raises(FormatError, match="changed"):
        getattr(file, look)()


# Split files ------------------------------------------------------------------------------------------------


def shard(directory: Path, number: int, count: int = 3) -> Path:
    return directory / f"model-{number:05d}-of-{count:05d}.gguf"


@pytest.fixture
def split(write_gguf, tmp_path):
    """A directory with three shards of one tensor each."""

    def fill(writer):
        for i in range(3):
            writer.add_tensor(f"w{i}", np.full(8, i, np.float32))

    write_gguf(fill, split_max_tensors=1)
    assert shard(tmp_path, 3).exists()
    return tmp_path


def rewrite(path: Path, number: int, count: int, total: int, names: list[str]) -> None:
    """Write a shard that says it is ``number`` (from 0) of ``count``."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    writer.add_int32("split.tensors.count", total)
    for name in names:
        writer.add_tensor(name, np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_first_shard_opens_all(split):
    file = open_gguf(shard(split, 1))
    assert list(file.tensors) == ["w0", "w1", "w2"]
    assert [info.shard for info in file.tensors.values()] == [0, 1, 2]
    assert [file.data(name).view(np.float32)[7] for name in file.tensors] == [0, 1, 2]
    assert file.metadata["general.architecture"] == "llama"


def test_fingerprint_of_a_split_file_covers_every_shard(split):
    whole = b"".join(shard(split, number).read_bytes() for number in (1, 2, 3))
    assert open_gguf(shard(split, 1)).fingerprint() == hashlib.sha256(whole).hexdigest()


def test_later_shard_names_the_first(split):
    with pytest.raises(FormatError, match=r"is shard 2 of 3; open model-00001-of-00003\.gguf instead"):
        open_gguf(shard(split, 2))


def test_missing_shard_is_named(split):
    shard(split, 2).unlink()
    with pytest.raises(FormatError, match=r"model-00002-of-00003\.gguf: shard 2 of 3 is missing"):
        open_gguf(shard(split, 1))


def test_renamed_first_shard_says_what_it_should_be_called(split):
    shard(split, 1).rename(split / "renamed.gguf")
    with pytest.raises(FormatError, match=r"00001-of-00003\.gguf"):
        open_gguf(split / "renamed.gguf")


def test_shard_of_another_model_size_is_refused(split):
    rewrite(shard(split, 2), number=1, count=4, total=3, names=["w1"])
    with pytest.raises(FormatError, match=r"split\.count is 4"):
        open_gguf(shard(split, 1))


def test_shard_in_the_wrong_place_is_refused(split):
    rewrite(shard(split, 2), number=2, count=3, total=3, names=["w1"])
    with pytest.raises(FormatError, match=r"split\.no is 2"):
        open_gguf(shard(split, 1))


def test_shards_with_too_few_tensors_are_refused(split):
    rewrite(shard(split, 2), number=1, count=3, total=3, names=[])
    with pytest.raises(FormatError, match=r"split\.tensors\.count is 3, but the 3 shards hold 2"):
        open_gguf(shard(split, 1))


def test_tensor_in_two_shards_is_refused(split):
    rewrite(shard(split, 2), number=1, count=3, total=3, names=["w0"])
    with pytest.raises(FormatError, match="'w0' is also in another shard"):
        open_gguf(shard(split, 1))


def test_shard_without_split_metadata_is_refused(split, write_gguf):
    write_gguf(name=shard(split, 2).name)
    with pytest.raises(FormatError, match=r"split\.no is missing"):
        open_gguf(shard(split, 1))


def test_merged_file_with_split_count_zero_opens(write_gguf):
    path = write_gguf(lambda writer: writer.add_uint16("split.count", 0))
    assert open_gguf(path).metadata["split.count"] == 0


# The real model ---------------------------------------------------------------------------------------------


def test_real_model_opens_within_half_a_second(gemma_gguf):
    def seconds() -> float:
        start = time.perf_counter()
        open_gguf(gemma_gguf).close()
        return time.perf_counter() - start

    assert min(seconds() for _ in range(3)) <= 0.5


def test_real_model_has_its_vocabulary_and_packed_tensors(gemma_gguf):
    with open_gguf(gemma_gguf) as file:
        tokens = list(file.metadata["tokenizer.ggml.tokens"])
        assert len(tokens) == 262_144
        assert tokens[:4] == ["<pad>", "<eos>", "<bos>", "<unk>"]
        assert file.tensors["token_embd.weight"].shape == (262_144, 640)
        assert {info.dtype for info in file.tensors.values()} == {
            DType.F32,
            DType.Q5_0,
            DType.Q8_0,
            DType.Q4_K,
            DType.Q6_K,
        }


def test_real_model_cut_short_anywhere_is_refused(gemma_gguf, tmp_path):
    with open_gguf(gemma_gguf) as file:
        data_start = min(info.offset for info in file.tensors.values())
        data_end = max(info.offset + info.nbytes for info in file.tensors.values())
    # The header is real; the tensors are a hole, which takes no disk and is never looked at.
    path = tmp_path / "cut.gguf"
    with gemma_gguf.open("rb") as source:
        path.write_bytes(source.read(data_start))
    with path.open("r+b") as file:
        file.truncate(data_end)
    open_gguf(path).close()
    for percent in range(99, 0, -1):
        with path.open("r+b") as file:
            file.truncate(data_end * percent // 100)
        with pytest.raises(FormatError):
            open_gguf(path)
