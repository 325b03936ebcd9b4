"""``rlxc formats``: tables as text, Markdown and JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from command_line import assert_done, assert_wrong_usage, call

from rlxc.models import ARCHITECTURES
from rlxc.weights.gguf import open_gguf


def test_json_has_the_bits_of_gguf_s_own_table() -> None:
    facts = json.loads(assert_done(call("formats", "--json")))
    bits = {row["name"]: row["bits"] for row in facts["formats"] if row["in_gguf"]}
    sizes = {kind.name.lower(): 8 * nbytes / block for kind, (block, nbytes) in gguf.GGML_QUANT_SIZES.items()}
    assert bits == {name: sizes[name] for name in bits}
    assert sizes.keys() - bits.keys() == {"f64", "i8", "i16", "i32", "i64", "q8_1", "q8_k"}  # of no weights
    assert [row["name"] for row in facts["architectures"]] == list(ARCHITECTURES)
    assert all({*row["formats"]} == bits.keys() for row in facts["architectures"])


def test_bits_in_an_artifact_are_those_of_a_compiled_model(gemma_gguf: Path) -> None:
    facts = json.loads(assert_done(call("formats", "--json")))
    bits = {row["name"]: row["stored"]["onnx"]["bits"] for row in facts["formats"]}
    with open_gguf(gemma_gguf) as file:
        assert {"q4_k", "q5_0", "q6_k", "q8_0"} <= {str(info.dtype) for info in file.tensors.values()}
    weights = json.loads(assert_done(call("inspect", gemma_gguf, "--json", "--weights", "--backend", "onnx")))
    by_format = weights["weights"]["by_format"]
    for name in ("q4_k", "q6_k"):  # what the others hold is gathered, too, or stacked with them
        totals = by_format[name]
        assert 8 * totals["stored_bytes"] / totals["parameters"] == bits[name]


def test_text_has_all_tables_aligned_and_without_markup() -> None:
    lines = assert_done(call("formats")).splitlines()
    assert "`" not in "".join(lines)
    (line,) = (line for line in lines if line.startswith("q4_k ") and "MatMulNBits" in line)
    assert line.split()[:4] == ["q4_k", "yes", "256", "4.5"]


def test_markdown_rows_are_as_wide_as_their_heads() -> None:
    pytest.importorskip("tvm")
    tables = assert_done(call("formats", "--markdown")).split("\n\n")[1::2]
    assert len(tables) == 5
    for table in tables:
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_one_way_to_print_at_a_time() -> None:
    assert_wrong_usage(call("formats", "--json", "--markdown"), "--json another")
