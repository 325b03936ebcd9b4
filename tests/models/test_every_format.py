"""Every cell of the table of formats and architectures: its model, compiled, has llama.cpp's logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from oracle import Floats, tolerance
from tiny import FORMATS, ROWS

from rlxc.artifact import BackendName
from rlxc.dtypes import DType
from rlxc.supported import CELLS
from rlxc.weights.formats import GGML_FORMATS
from rlxc.weights.gguf import open_gguf


def test_the_table_has_all_formats_of_gguf() -> None:
    assert {DType[name] for name in FORMATS} == {found.dtype for found in GGML_FORMATS.values()}


@pytest.mark.parametrize(("architecture", "dtype"), CELLS, ids=str)
def test_cell(
    architecture: str,
    dtype: DType,
    backend: BackendName,
    tiny_gguf: Callable[[str], Path],
    score_tiny: Callable[..., Floats],
    llama_cpp_logits: dict[str, Floats],
) -> None:
    variant = f"{architecture}-formats"
    with open_gguf(tiny_gguf(variant)) as file:
        matrices = {info.dtype for info in file.tensors.values() if len(info.shape) > 1}
    assert dtype in matrices
    logits, expected = score_tiny(backend, variant, "float32")[ROWS], llama_cpp_logits[variant]
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance(variant, expected))
