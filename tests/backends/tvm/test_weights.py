"""The weights file: what the ``safetensors`` package reads from it, and what writing it costs."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from random_tensors import RandomTensors
from safetensors import safe_open
from stored_weights import store

from rlxc.backends import recipes
from rlxc.backends.tvm.layout import layout_of
from rlxc.backends.tvm.weights import WeightsFile
from rlxc.dtypes import DType
from rlxc.errors import UnsupportedError
from rlxc.ir import parse
from rlxc.weights.encode import encode

MODEL = """
graph model
input %ids: i64[batch, seq]
weight @table: q6_k[37, 256]
weight @norm: f32[250]
weight @qkv: q4_k[60, 256] = concat(@q: q4_k[21, 256], @k: q4_k[3, 256], @v: q4_k[36, 256])
weight @float: bf16[20, 24]
%x = Embed(%ids, @table)
output %x
"""


class FileSink:
    """What a backend writes to, on a plain file."""

    def __init__(self, path: Path) -> None:
        self.stream = path.open("wb")

    def write(self, data: bytes | npt.NDArray[Any]) -> None:
        self.stream.write(memoryview(data).cast("B") if isinstance(data, np.ndarray) else data)

    def align(self, multiple: int) -> None:
        self.stream.write(bytes(-self.stream.tell() % multiple))


@dataclass(frozen=True)
class Written:
    file: WeightsFile
    tensors: RandomTensors
    path: Path
    progress: list[str]

    def tensor(self, name: str) -> npt.NDArray[np.uint8]:
        """A tensor's bytes, as the safetensors package reads them, without the padding at its end."""
        with safe_open(self.path, "np") as reader:
            return np.asarray(reader.get_tensor(name))[: self.file.stored[name].nbytes]


def write(folder: Path, text: str = MODEL, **constants: npt.NDArray[Any]) -> Written:
    graph = parse(text)
    written = Written(WeightsFile(graph), RandomTensors(graph, seed=3), folder / "w.safetensors", [])
    for name, array in constants.items():
        written.file.constant(name, array)
    sink = FileSink(written.path)
    with sink.stream:
        written.file.write(written.tensors.packed.__getitem__, sink, written.progress.append)
    return written


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write(
        tmp_path_factory.mktemp("weights"), frequencies=np.arange(5.0), rows=np.arange(3, dtype=np.int64)
    )


def test_safetensors_reads_every_tensor(written: Written) -> None:
    with safe_open(written.path, "np") as reader:
        assert set(reader.keys()) == {"table", "norm", "qkv", "float", "frequencies", "rows"}
        shapes = {name: reader.get_tensor(name).shape for name in reader.keys()}  # noqa: SIM118, no mapping
        assert {
            name: (-(-stored.nbytes // 64) * 64,) for name, stored in written.file.stored.items()
        } == shapes


def test_metadata_names_the_format(written: Written) -> None:
    with safe_open(written.path, "np") as reader:
        assert reader.metadata() == {"format": "rlxc tiles", "version": "1"}


def test_tensors_lie_where_the_kernels_were_told(written: Written) -> None:
    raw = written.path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    assert start % 64 == 0
    assert len(raw) == start + written.file.nbytes
    for name, stored in written.file.stored.items():
        assert stored.offset == header[name]["data_offsets"][0]
        assert stored.offset % 64 == 0


def test_matrices_lie_as_their_layouts_say(written: Written) -> None:
    for name, dtype, shape in (("table", DType.Q6_K, (37, 256)), ("float", DType.BF16, (20, 24))):
        layout = layout_of(dtype, *shape)
        assert written.file.stored[name].layout == layout
        expected = store(layout, [written.tensors.packed[name].reshape(shape[0], -1)]).view(np.uint8)
        # Between sections the file has zeros, `store` has not.
        inside = np.concatenate(
            [np.arange(s.tile_bytes * layout.tiles) + s.offset for s in layout.sections.values()]
        )
        np.testing.assert_array_equal(written.tensor(name)[inside], expected[inside])
        assert not np.delete(written.tensor(name), inside).any()


def test_stacked_weights_lie_like_one(written: Written) -> None:
    layout = layout_of(DType.Q4_K, 60, 256)
    parts = [written.tensors.packed[part].reshape(-1, 144) for part in "qkv"]
    found = written.tensor("qkv").view(np.int8)
    # Whole tiles: 60 rows of codes and f16 have no gap between their sections.
    np.testing.assert_array_equal(found, store(layout, [np.concatenate(parts)]))


EXPERTS = """
graph experts
input %x: f32[batch, seq, 64]
input %chosen: i64[batch, seq, 2]
weight @w: {weight}
weight @b: f32[3, 20]
%y = ExpertMatMul(%x, @w, %chosen, @b)
output %y
"""


@pytest.mark.parametrize("dtype", ["q4_1", "f32"])
@pytest.mark.parametrize("recipe", ["", " = encode(@given: bf16[3, 20, 64])"])
def test_experts_lie_in_whole_tiles_each_and_so_do_their_biases(
    tmp_path: Path, dtype: str, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "CHUNK_VALUES", 64 * 7)  # pieces that end anywhere
    written = write(tmp_path, EXPERTS.format(weight=f"{dtype}[3, 20, 64]{recipe}"))
    layout = layout_of(DType(dtype), 3 * 32, 64)
    assert written.file.stored["w"].layout == layout
    if recipe:
        rows = encode(DType(dtype), written.tensors.decoded["given"].reshape(60, 64)).view(np.uint8)
    else:
        rows = written.tensors.packed["w"]
    experts = np.pad(rows.reshape(3, 20, -1), ((0, 0), (0, 12), (0, 0)))
    found = written.tensor("w").view(np.int8)
    np.testing.assert_array_equal(found, store(layout, list(experts)))
    biases = written.tensor("b").view(np.float32).reshape(3, 32)
    np.testing.assert_array_equal(biases, np.pad(written.tensors.decoded["b"], ((0, 0), (0, 12))))


def test_vectors_lie_as_they_are(written: Written) -> None:
    np.testing.assert_array_equal(written.tensor("norm"), written.tensors.packed["norm"])


def test_constants_lie_as_they_are(written: Written) -> None:
    np.testing.assert_array_equal(written.tensor("frequencies").view(np.float64), np.arange(5.0))
    np.testing.assert_array_equal(written.tensor("rows").view(np.int64), [0, 1, 2])


def test_constant_of_a_known_name_is_stored_once() -> None:
    file = WeightsFile(parse(MODEL))
    first = file.constant("frequencies", np.arange(5.0))
    size = file.nbytes
    assert file.constant("frequencies", np.arange(5.0)) == first
    assert file.nbytes == size


def test_progress_names_every_weight(written: Written) -> None:
    assert written.progress == ["table", "norm", "qkv", "float"]


def test_two_writes_give_the_same_bytes(written: Written, tmp_path: Path) -> None:
    again = write(tmp_path, frequencies=np.arange(5.0), rows=np.arange(3, dtype=np.int64))
    assert again.path.read_bytes() == written.path.read_bytes()


def test_a_stack_of_different_formats_is_refused(tmp_path: Path) -> None:
    stack = "weight @w: q8_0[32, 256] = concat(@a: q5_0[16, 256], @b: q8_0[16, 256])"
    text = f"graph mixed\ninput %ids: i64[batch, seq]\n{stack}\n%x = Embed(%ids, @w)\noutput %x"
    with pytest.raises(UnsupportedError, match="@w stacks q5_0 and q8_0"):
        write(tmp_path, text)


def test_an_alias_that_no_pass_resolved_is_refused(tmp_path: Path) -> None:
    weights = "weight @w: q8_0[32, 256]\nweight @same: q8_0[32, 256] = alias(@w)"
    text = f"graph tied\ninput %ids: i64[batch, seq]\n{weights}\n%x = Embed(%ids, @same)\noutput %x"
    with pytest.raises(UnsupportedError, match="@same cannot be stored"):
        write(tmp_path, text)


@pytest.mark.parametrize("dtype", ["q4_k", "f16"])
def test_writing_a_large_weight_takes_little_memory(tmp_path: Path, dtype: str) -> None:
    weight = f"weight @w: {dtype}[32768, 1024]"
    graph = parse(f"graph large\ninput %ids: i64[batch, seq]\n{weight}\n%x = Embed(%ids, @w)\noutput %x")
    file = WeightsFile(graph)
    data = np.zeros(file.nbytes * 144 // 148 if dtype == "q4_k" else file.nbytes, np.uint8)
    sink = FileSink(Path("/dev/null"))
    tracemalloc.start()
    try:
        with sink.stream:
            file.write(lambda name: data, sink, lambda name: None)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert file.nbytes > 18 << 20
    # A chunk of 2 MiB, unpacked to a byte per code, as words and in planes; and the small sections, a seventh in all.
    assert peak < 24 << 20
