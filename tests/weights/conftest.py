"""Small GGUF files, written by the ``gguf`` package."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

# What tests share with the scripts that make their reference data lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

GgufWriterFn = Callable[..., Path]


@pytest.fixture
def write_gguf(tmp_path: Path) -> GgufWriterFn:
    """``write_gguf(fill=None, name="model.gguf", **writer_options)``: a file with what ``fill(writer)`` adds."""

    def write(
        fill: Callable[[gguf.GGUFWriter], None] | None = None, name: str = "model.gguf", **options: Any
    ) -> Path:
        path = tmp_path / name
        write_small_gguf(path, fill or fill_typical, **options)
        return path

    return write


@pytest.fixture(scope="session")
def typical_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a small file with scalars, arrays, strings and tensors of several types."""
    path = tmp_path_factory.mktemp("typical") / "model.gguf"
    write_small_gguf(path, fill_typical)
    return path.read_bytes()


def write_small_gguf(path: Path, fill: Callable[[gguf.GGUFWriter], None], **options: Any) -> None:
    """Write what ``fill`` adds."""
    writer = gguf.GGUFWriter(path, "llama", **options)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fill_typical(writer: gguf.GGUFWriter) -> None:
    """Scalars, arrays, strings, and tensors of F32, F16, Q8_0 and Q4_0."""
    rng = np.random.default_rng(2)
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_bool("tokenizer.ggml.add_bos_token", True)
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "", "é", "日本", "a longer piece"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0, 2.0])
    writer.add_array("tokenizer.ggml.token_type", [1, 2, 3])
    writer.add_tensor("norm.weight", rng.standard_normal(32, np.float32))
    writer.add_tensor("half.weight", rng.standard_normal((3, 8), np.float32).astype(np.float16))
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0):
        packed = gguf.quantize(rng.standard_normal((2, 64), np.float32), kind)
        writer.add_tensor(f"{kind.name}.weight", packed, raw_dtype=kind)
