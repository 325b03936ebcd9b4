"""What is written as GGUF, as the ``gguf`` package reads it."""

from __future__ import annotations

import io
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

# What tests share lies in the folder above.
sys.path.insert(0, str(Path(__file__).parent.parent))

from adapters import random_pairs, write_gguf_adapter

from rlxc.dtypes import DType
from rlxc.errors import WeightError
from rlxc.weights.adapters import AdapterBase, open_adapter
from rlxc.weights.formats import FORMATS
from rlxc.weights.gguf import open_gguf
from rlxc.weights.gguf_writer import NewTensor, adapter_bytes, write_gguf
from rlxc.weights.lora import Adapter

BASE = AdapterBase("llama", layers=1, heads=4, kv_heads=2)
Q, EMBEDDING = "blk.0.attn_q.weight", "token_embd.weight"
SHAPES = {Q: (32, 64), EMBEDDING: (64, 50)}


def packed(kind: str, rows: int, columns: int, seed: int) -> npt.NDArray[Any]:
    values = np.random.default_rng(seed).standard_normal((rows, columns), np.float32)
    return gguf.quantize(values, gguf.GGMLQuantizationType[kind])


TENSORS = {
    "odd.weight": (DType.Q8_0, packed("Q8_0", 3, 32, 1)),
    "norm.weight": (DType.F32, np.arange(5, dtype=np.float32)),
    "half.weight": (DType.F16, packed("F16", 7, 3, 2)),
    "brain.weight": (DType.BF16, packed("BF16", 1, 9, 3)),
    "four.weight": (DType.Q4_1, packed("Q4_1", 5, 64, 4)),
}


def new_tensor(name: str, chunk: int) -> NewTensor:
    """A tensor whose rows come ``chunk`` at a time."""
    dtype, rows = TENSORS[name]
    shape = rows.shape
    if dtype.is_packed:
        shape = (rows.shape[0], rows.shape[1] // FORMATS[dtype].block_bytes * FORMATS[dtype].block_size)
    elif dtype is DType.BF16:
        shape = (rows.shape[0], rows.shape[1] // 2)
    return NewTensor(name, dtype, shape, [rows[i : i + chunk] for i in range(0, len(rows), chunk)])


@pytest.mark.parametrize("alignment", [32, 8, 256])
@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_file_reads_back_as_it_was_written(write_gguf_file: Any, alignment: int, chunk: int) -> None:
    path, source = write_gguf_file(alignment, [new_tensor(name, chunk) for name in TENSORS])
    reader, given = gguf.GGUFReader(path), gguf.GGUFReader(source)
    assert [tensor.name for tensor in reader.tensors] == list(TENSORS)
    for tensor in reader.tensors:
        dtype, rows = TENSORS[tensor.name]
        assert tensor.tensor_type.name == dtype.name
        assert tensor.data.tobytes() == rows.tobytes()
        assert tensor.data_offset % alignment == 0
    assert {name: field_bytes(field) for name, field in fields(reader).items()} == {
        name: field_bytes(field) for name, field in fields(given).items()
    }
    assert reader.data_offset % alignment == 0
    assert path.stat().st_size % alignment == 0


def fields(reader: gguf.GGUFReader) -> dict[str, Any]:
    """The metadata without the reader's own fields for the header."""
    return {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def field_bytes(field: Any) -> bytes:
    return b"".join(part.tobytes() for part in field.parts)


@pytest.fixture
def write_gguf_file(tmp_path: Path) -> Any:
    """Writes tensors, with the metadata of a file by the ``gguf`` package; gives both files' paths."""

    def write(alignment: int, tensors: list[NewTensor]) -> tuple[Path, Path]:
        source = tmp_path / "source.gguf"
        writer = gguf.GGUFWriter(source, "llama")
        if alignment != gguf.GGUF_DEFAULT_ALIGNMENT:
            writer.add_custom_alignment(alignment)
        writer.add_string("general.name", "ünïcode")
        writer.add_array("tokenizer.ggml.tokens", ["<s>", "", "日本"])
        writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
        writer.add_bool("llama.flag", True)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        file = open_gguf(source)
        path = tmp_path / "written.gguf"
        with open(path, "wb") as sink:
            write_gguf(sink, [file.pair(key) for key in file.metadata], tensors, file.alignment)
        return path, source

    return write


def test_file_without_tensors_can_be_read(write_gguf_file: Any) -> None:
    path, _ = write_gguf_file(32, [])
    assert gguf.GGUFReader(path).tensors == []


@pytest.mark.parametrize("dtype", [DType.NF4, DType.FP4, DType.INT4])
def test_format_that_gguf_has_no_type_for_is_refused_before_anything_is_written(dtype: DType) -> None:
    sink = io.BytesIO()
    with pytest.raises(WeightError, match=f"GGUF has no type {dtype}; choose another format"):
        write_gguf(sink, [], [NewTensor("x.weight", dtype, (1, 64), [])], 32)
    assert sink.getvalue() == b""


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    pairs = random_pairs(SHAPES, {Q: 3, EMBEDDING: 5}, seed=1)
    path = write_gguf_adapter(tmp_path / "stil-ü.gguf", pairs, alpha=12.0, invocation_tokens=[7, 8])
    return open_adapter(path, BASE)


def test_adapter_s_products_and_facts_read_back(adapter: Adapter, tmp_path: Path) -> None:
    (tmp_path / "copy.gguf").write_bytes(adapter_bytes(adapter))
    copy = open_adapter(tmp_path / "copy.gguf", BASE)
    assert (copy.invocation_tokens, copy.architecture) == ((7, 8), "llama")
    assert copy.pairs.keys() == adapter.pairs.keys()
    for name, pair in copy.pairs.items():
        given = adapter.pairs[name]
        assert pair.scale == 1.0
        np.testing.assert_array_equal(pair.a, given.a)
        np.testing.assert_array_equal(pair.b, given.b * np.float32(12.0 / given.rank))


def test_adapter_s_file_is_one_that_others_read(adapter: Adapter, tmp_path: Path) -> None:
    path = tmp_path / "copy.gguf"
    path.write_bytes(adapter_bytes(adapter))
    reader = gguf.GGUFReader(path)
    texts = {key: reader.fields[key].contents() for key in ("general.type", "adapter.type", "general.name")}
    assert texts == {"general.type": "adapter", "adapter.type": "lora", "general.name": "stil-ü"}
    assert reader.fields["adapter.lora.alpha"].contents() == 0.0
    assert reader.fields["adapter.alora.invocation_tokens"].contents() == [7, 8]
    # The embedding's A is looked up by tokens: stored as [vocab, rank].
    shapes = {tensor.name: tensor.data.shape for tensor in reader.tensors}
    assert shapes[f"{EMBEDDING}.lora_a"] == (50, 5)
    assert shapes[f"{Q}.lora_a"] == (3, 64)


def test_b_that_overflows_with_its_scale_is_refused(adapter: Adapter) -> None:
    pair = replace(adapter.pairs[Q], scale=3e38, b=adapter.pairs[Q].b * 100)
    with pytest.raises(WeightError, match=rf"stil-ü\.gguf: B of {Q} times its scale 3e\+38 overflows"):
        adapter_bytes(replace(adapter, pairs={Q: pair}))
