"""What compiling with adapters and encodings refuses: each in one line, and nothing is left behind."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from adapters import random_pairs, write_gguf_adapter
from one_layer import LINEAR, compile_exact, pairs, write_adapter, write_model

from rlxc.errors import FormatError, ModelError, OptionError, RlxcError, UnsupportedError, WeightError

Q, DOWN, NORM = "blk.0.attn_q.weight", "blk.0.ffn_down.weight", "blk.0.attn_norm.weight"
TWO = {Q: LINEAR[Q], DOWN: LINEAR[DOWN]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and adapters for it, which tests read and leave as they are."""
    root = tmp_path_factory.mktemp("refused")
    write_model(root / "model.gguf")
    write_adapter(root / "a.gguf", seed=1)
    write_adapter(root / "b.gguf", TWO, rank=20, seed=2)
    return root


def damaged(folder: Path, tmp_path: Path) -> Path:
    data = (folder / "a.gguf").read_bytes()
    (tmp_path / "damaged.gguf").write_bytes(data[:-100])
    return tmp_path / "damaged.gguf"


def second_of_a_name(folder: Path, tmp_path: Path) -> list[Path]:
    (tmp_path / "other").mkdir()
    return [folder / "a.gguf", write_adapter(tmp_path / "other" / "a.gguf", seed=9)]


def with_norm(folder: Path, tmp_path: Path, name: str = "n") -> Path:
    norm = {NORM: np.ones(256, np.float32)}
    return write_gguf_adapter(tmp_path / f"{name}.gguf", pairs(TWO), tensors=norm)


def hot(tmp_path: Path) -> Path:
    large = random_pairs({Q: LINEAR[Q]}, 1, size=10)
    return write_gguf_adapter(tmp_path / "hot.gguf", large, alpha=3e38)


MakeAdapters = Callable[[Path, Path], Any]
REFUSED: Mapping[str, tuple[type[RlxcError], MakeAdapters, dict[str, Any], str]] = {
    "unknown mode": (
        OptionError,
        lambda f, t: [],
        {"lora": "both"},
        "lora 'both' is unknown; choose one of: auto",
    ),
    "nothing to fold": (OptionError, lambda f, t: [], {"lora": "fold"}, "there is no adapter to fold"),
    "unknown format to fold to": (
        OptionError,
        lambda f, t: [f / "a.gguf"],
        {"fold_to": "q9"},
        "cannot fold to 'q9'; choose one of: f32, f16",
    ),
    "format of what is not folded": (
        OptionError,
        lambda f, t: [f / "a.gguf"],
        {"lora": "split", "fold_to": "q8_0"},
        "nothing is folded to q8_0",
    ),
    "format without adapters": (
        OptionError,
        lambda f, t: [],
        {"fold_to": "q8_0"},
        "nothing is folded to q8_0",
    ),
    "unknown encoding": (
        OptionError,
        lambda f, t: [],
        {"quantize": "q9"},
        "cannot quantize to 'q9'; choose one of: none, f16",
    ),
    "rank of 0": (OptionError, lambda f, t: [], {"lora_rank": 0}, "must be an integer in 1..4096, got 0"),
    "rank of True": (OptionError, lambda f, t: [], {"lora_rank": True}, "in 1..4096, got True"),
    "huge rank": (OptionError, lambda f, t: [], {"lora_rank": 4097}, "in 1..4096, got 4097"),
    "rank as text": (OptionError, lambda f, t: [], {"lora_rank": "16"}, "in 1..4096, got '16'"),
    "rank below the adapters'": (
        OptionError,
        lambda f, t: [f / "a.gguf", f / "b.gguf"],
        {"lora": "split", "lora_rank": 32},
        "the adapters have 48 ranks, counted in units of 16; lora rank is 32; give a lora rank of 48 or more",
    ),
    "a path for a list": (OptionError, lambda f, t: f / "a.gguf", {}, "adapters must be a list"),
    "text for a list": (OptionError, lambda f, t: str(f / "a.gguf"), {}, "adapters must be a list"),
    "a pair for a list": (
        OptionError,
        lambda f, t: (f / "a.gguf", 0.5),
        {},
        "or a path and a scale, got 0.5",
    ),
    "no path": (OptionError, lambda f, t: [None], {}, "or a path and a scale, got None"),
    "scale that is not a number": (
        OptionError,
        lambda f, t: [(f / "a.gguf", "1")],
        {},
        "finite number of float32",
    ),
    "scale that is not finite": (
        OptionError,
        lambda f, t: [(f / "a.gguf", float("nan"))],
        {},
        "finite number of float32, got nan",
    ),
    "scale beyond f32": (OptionError, lambda f, t: [(f / "a.gguf", 10**400)], {}, "finite number of float32"),
    "two of a name": (
        OptionError,
        second_of_a_name,
        {},
        "two adapters are called 'a'; rename one of the files",
    ),
    "missing file": (FormatError, lambda f, t: [t / "none.gguf"], {}, "none.gguf: cannot be read"),
    "damaged file": (FormatError, lambda f, t: [damaged(f, t)], {}, "damaged.gguf: "),
    "a model": (FormatError, lambda f, t: [f / "model.gguf"], {}, "general.type is missing"),
    "a folder without files": (
        FormatError,
        lambda f, t: [t],
        {},
        "adapter_config.json: cannot be read: No such file",
    ),
    "another architecture": (
        ModelError,
        lambda f, t: [write_adapter(t / "g.gguf", architecture="gemma3")],
        {},
        "g.gguf: is for a gemma3 model, but the base model is llama",
    ),
    "a layer too many": (
        ModelError,
        lambda f, t: [write_adapter(t / "d.gguf", {"blk.1.attn_q.weight": (256, 256)})],
        {},
        "adapts blk.1.attn_q.weight, but the base model has 1 layers",
    ),
    "a tensor of no model": (
        ModelError,
        lambda f, t: [write_adapter(t / "d.gguf", {"blk.0.attn_qkv.weight": (512, 256)})],
        {},
        "which no llama model has",
    ),
    "another shape": (
        ModelError,
        lambda f, t: [write_adapter(t / "d.gguf", {Q: (128, 256)})],
        {},
        "a [4, 256] and b [128, 4] do not fit the base model's [256, 256]",
    ),
    "a split norm": (
        OptionError,
        lambda f, t: [with_norm(f, t)],
        {"lora": "split"},
        f"changes {NORM} as no side path can: it was trained as a whole; fold it",
    ),
    "a norm from two adapters": (
        OptionError,
        lambda f, t: [with_norm(f, t), with_norm(f, t, "m")],
        {"lora": "fold"},
        f"m.gguf: replaces {NORM}, which an adapter before it changes",
    ),
    "values beyond f32, split": (
        WeightError,
        lambda f, t: [hot(t)],
        {"lora": "split"},
        "hot.gguf: B of blk.0.attn_q.weight times its scale 3e+38 overflows; use an adapter with a smaller alpha",
    ),
    "values beyond f32, folded": (
        WeightError,
        lambda f, t: [hot(t)],
        {"lora": "fold"},
        "folding an adapter into it gives values that are infinite",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_done_is_refused_in_one_line_and_leaves_nothing(
    folder: Path, tmp_path: Path, case: str
) -> None:
    error, make, options, problem = REFUSED[case]
    adapters = make(folder, tmp_path)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(error, match=re.escape(problem)) as refused:
        compile_exact(folder / "model.gguf", tmp_path / "out.rlx", adapters=adapters, **options)
    assert str(refused.value).count("\n") == 0
    assert sorted(tmp_path.iterdir()) == before


def test_adapters_of_matrices_with_scales_are_refused(tmp_path: Path) -> None:
    scale = {Q.replace(".weight", ".scale"): np.array([2.0], np.float32)}
    model = write_model(tmp_path / "scaled.gguf", tensors=scale)
    adapter = write_adapter(tmp_path / "a.gguf", {Q: LINEAR[Q]})
    with pytest.raises(UnsupportedError, match=f"{re.escape(Q)} has a scale of its own"):
        compile_exact(model, tmp_path / "out.rlx", adapters=[adapter])
