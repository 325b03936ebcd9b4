"""The whole compiler: what an artifact holds, what is refused, and the real model's text."""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from adapters import random_pairs, write_gguf_adapter

import rlxc
from rlxc.artifact import Artifact, BackendName
from rlxc.backends import default_backend, get_backend
from rlxc.compiler import lower
from rlxc.errors import ArtifactError, FormatError, OptionError, RlxcError
from rlxc.ir import parse
from rlxc.passes import WeightChanges, default_passes
from rlxc.runtime import Session

TESTS = Path(__file__).resolve().parent
MAX_ANONYMOUS = 500 << 20
QUICK: Any = {"backend": "onnx"}
"""For tests to which the backend makes no difference: making machine code takes seconds."""
MAX_GROWTH = {"onnx": 1.35, "tvm": 1.02}
needs_tvm = pytest.mark.skipif(default_backend() != "tvm", reason="TVM is not installed")
CompileGemma = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma 3 in the formats of a K_M file."""
    variants = runpy.run_path(str(TESTS / "models" / "tiny.py"))["VARIANTS"]
    path: Path = variants["gemma3-window"].write(tmp_path_factory.mktemp("tiny") / "model.gguf")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_input_gives_the_same_bytes(tiny_gguf: Path, tmp_path: Path, backend: BackendName) -> None:
    rlxc.compile(tiny_gguf, tmp_path / "first.rlx", backend=backend)
    rlxc.compile(tiny_gguf, tmp_path / "second.rlx", backend=backend)
    first, second = contents(tmp_path / "first.rlx"), contents(tmp_path / "second.rlx")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_nothing_in_an_artifact_names_where_it_was_made(
    tiny_gguf: Path, tmp_path: Path, backend: BackendName
) -> None:
    rlxc.compile(tiny_gguf, tmp_path / "model.rlx", backend=backend)
    folders = [str(tiny_gguf.parent).encode(), str(tmp_path).encode()]
    assert [
        name for name, data in contents(tmp_path / "model.rlx").items() if any(f in data for f in folders)
    ] == []


@pytest.mark.parametrize("activations", ["int8", "float32"])
def test_options_are_recorded(tiny_gguf: Path, tmp_path: Path, activations: str) -> None:
    artifact = rlxc.compile(tiny_gguf, tmp_path / "model.rlx", activations=activations, context=100, **QUICK)
    options = artifact.manifest.options
    assert (options.activations, options.context) == (activations, 100)
    assert artifact.manifest.kv_cache.context == 100


def test_context_is_what_a_short_model_allows_by_default(tiny_gguf: Path, tmp_path: Path) -> None:
    manifest = rlxc.compile(tiny_gguf, tmp_path / "model.rlx", **QUICK).manifest
    assert manifest.options.context == manifest.model.trained_context == 256


@pytest.mark.needs_ring
@pytest.mark.parametrize(
    ("context", "rollback", "layout"),
    [(24, 0, "linear"), (25, 0, "ring"), (34, 10, "linear"), (35, 10, "ring"), (256, 10, "ring")],
)
def test_a_window_a_step_and_a_rollback_make_a_ring_where_that_is_shorter(
    tiny_gguf: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    context: int,
    rollback: int,
    layout: str,
) -> None:
    monkeypatch.setattr("rlxc.lowering.MAX_STEP", 16)
    output = tmp_path / "model.rlx"
    plan = rlxc.compile(tiny_gguf, output, context=context, rollback=rollback, **QUICK).manifest.kv_cache
    assert (plan.context, plan.max_step, plan.rollback) == (context, 16, rollback)
    layouts = {layer.index: (layer.layout, layer.capacity) for layer in plan.layers}
    assert layouts == {**dict.fromkeys(range(7), (layout, 24 + rollback)), 5: ("linear", context)}


def test_a_context_can_be_taken_back_whole(tiny_gguf: Path, tmp_path: Path) -> None:
    rlxc.compile(tiny_gguf, tmp_path / "model.rlx", context=99, rollback=10**12, **QUICK)
    assert Artifact.open(tmp_path / "model.rlx").manifest.kv_cache.rollback == 99


@needs_tvm
@pytest.mark.parametrize("dtype", ["auto", "f32", "f16", "bf16", "int8"])
def test_caches_for_tvm_lie_in_pages_of_any_type(tiny_gguf: Path, dtype: Any) -> None:
    text = lower(tiny_gguf, backend="tvm", context=100, kv_cache=dtype)
    stored = "f16" if dtype == "auto" else dtype
    assert len(re.findall(rf"input %past_key_values.*: {stored}\[pages, \d+, 64, \d+\]", text)) == 14
    assert re.findall(r"input %block_table.*", text) == [
        "input %block_table.0: i32[batch, 2]",
        "input %block_table.1: i32[batch, 2]",
    ]
    assert text.count("layout='paged', window=8") == 6
    assert text.count("layout='paged'") == 7


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"activations": "int4"}, "activations 'int4' are unknown"),
        ({"activations": None}, "activations None are unknown"),
        ({"backend": "abacus"}, "backend 'abacus' is unknown"),
        ({"backend": "onnx", "target": "gpu"}, "target 'gpu' is unknown"),
        ({"context": 0}, "context 0 is outside 1..256"),
        ({"context": -1}, "context -1 is outside 1..256"),
        ({"context": 257}, "context 257 is outside 1..256"),
        ({"rollback": -1}, "rollback -1 is less than 0; give a number of tokens"),
        (
            {"backend": "onnx", "kv_cache": "int8"},
            "the onnx backend has no kv_cache 'int8'; choose one of: auto, f32",
        ),
        pytest.param(
            {"backend": "tvm", "kv_cache": "q8_0"},
            "the tvm backend has no kv_cache 'q8_0'; choose one of: auto, f16, f32, bf16, int8",
            marks=needs_tvm,
        ),
        ({"kv_cache": None}, "backend has no kv_cache None"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(
    tiny_gguf: Path, tmp_path: Path, options: dict[str, Any], problem: str
) -> None:
    with pytest.raises(OptionError, match=re.escape(problem)):
        rlxc.compile(tiny_gguf, tmp_path / "model.rlx", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_and_kept(tiny_gguf: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.rlx"
    output.mkdir()
    (output / "precious").write_text("kept")
    with pytest.raises(ArtifactError, match="the output exists already"):
        rlxc.compile(tiny_gguf, output)
    assert contents(output) == {"precious": b"kept"}


def test_overwriting_replaces_an_artifact(tiny_gguf: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.rlx"
    rlxc.compile(tiny_gguf, output, context=50, **QUICK)
    rlxc.compile(tiny_gguf, output, context=60, overwrite=True, **QUICK)
    assert Artifact.open(output).manifest.options.context == 60
    assert [path.name for path in tmp_path.iterdir()] == ["model.rlx"]


def test_a_failed_overwrite_keeps_the_old_artifact(tiny_gguf: Path, tmp_path: Path) -> None:
    output = tmp_path / "model.rlx"
    rlxc.compile(tiny_gguf, output, context=50, **QUICK)

    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rlxc.compile(tiny_gguf, output, context=60, overwrite=True, progress=stop)
    assert Artifact.open(output).manifest.options.context == 50
    assert [path.name for path in tmp_path.iterdir()] == ["model.rlx"]


KILLED = """
import os, signal, sys
import rlxc

def die(stage, done, total):
    if (stage, done) == (sys.argv[3], total if sys.argv[4] == "last" else int(sys.argv[4])):
        os.kill(os.getpid(), signal.SIGKILL)

rlxc.compile(sys.argv[1], sys.argv[2], backend="onnx", progress=die)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
@pytest.mark.parametrize(("stage", "done"), [("weights", "1"), ("weights", "last"), ("digests", "0")])
def test_a_killed_compile_leaves_nothing_that_loads(
    tiny_gguf: Path, tmp_path: Path, stage: str, done: str
) -> None:
    output = tmp_path / "model.rlx"
    command = [sys.executable, "-c", KILLED, str(tiny_gguf), str(output), stage, done]
    assert subprocess.run(command, cwd=TESTS.parent, check=False).returncode == -9
    assert not output.exists()
    left = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(left) == 1
    with pytest.raises(ArtifactError):
        rlxc.load(left[0])
    rlxc.compile(tiny_gguf, output, backend="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["model.rlx"]


def test_progress_never_goes_back(tiny_gguf: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    rlxc.compile(tiny_gguf, tmp_path / "model.rlx", progress=lambda *call: calls.append(call))
    stages = list(dict.fromkeys(stage for stage, _, _ in calls))
    assert calls == sorted(calls, key=lambda call: (stages.index(call[0]), call[1]))
    for stage in stages:
        done, totals = [c[1] for c in calls if c[0] == stage], {c[2] for c in calls if c[0] == stage}
        assert totals == {done[-1]}


def test_a_model_that_changes_while_it_is_compiled_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(tiny_gguf.read_bytes())

    def touch(stage: str, done: int, total: int) -> None:
        os.utime(model, ns=(1, 1))

    with pytest.raises(FormatError, match="has changed since it was opened"):
        rlxc.compile(model, tmp_path / "out.rlx", progress=touch, **QUICK)
    assert not (tmp_path / "out.rlx").exists()


def test_trace_tells_of_every_pass(tiny_gguf: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    rlxc.compile(tiny_gguf, tmp_path / "model.rlx", trace=lines.append, **QUICK)
    names = [name for name in default_pass_names() if any(line.startswith(f"{name}: ") for line in lines)]
    assert names == default_pass_names()


def default_pass_names() -> list[str]:
    passes = default_passes(
        get_backend("onnx").features,
        context=256,
        max_step=256,
        rollback=0,
        cache_dtype=None,
        changes=WeightChanges(),
    )
    return [one.name for one in passes]


def test_lowered_text_shows_the_scheduled_graph(tiny_gguf: Path) -> None:
    text = lower(tiny_gguf)
    assert text.startswith("graph gemma3\n")
    assert text.count("= GroupQueryAttention(") == 7
    assert "KvAppend" not in text


def test_lowered_text_says_what_becomes_of_each_matrix_that_adapters_change(
    tiny_gguf: Path, tmp_path: Path
) -> None:
    shapes = {"blk.0.attn_q.weight": (256, 256), "blk.6.ffn_gate.weight": (512, 256)}
    adapter = write_gguf_adapter(tmp_path / "a.gguf", random_pairs(shapes, 5), architecture="gemma3")
    text = lower(tiny_gguf, adapters=[adapter], fold_to="q6_k", backend="onnx")
    decisions = [line for line in text.splitlines() if line.startswith("#")]
    assert decisions == [
        "# blk.0.attn_q.weight: split, q6_k anew would cost an error of 1.7%, more than 1.0%; "
        "rank 16 reads 16384 bytes a token",
        "# blk.6.ffn_gate.weight: split, q6_k anew would cost an error of 1.7%, more than 1.0%; "
        "rank 16 reads 24576 bytes a token",
    ]
    assert text.count("= LoraMatMul(") == 2
    folded = lower(tiny_gguf, adapters=[adapter], lora="fold", backend="onnx")
    assert folded.startswith("# blk.0.attn_q.weight: fold, fold was asked for\n# blk.6.")
    assert "Lora" not in folded
    assert parse(folded).name == parse(text).name == "gemma3"


def test_trace_tells_of_the_choice_before_the_passes(tiny_gguf: Path, tmp_path: Path) -> None:
    adapter = write_gguf_adapter(
        tmp_path / "a.gguf", random_pairs({"blk.0.attn_q.weight": (256, 256)}, 5), architecture="gemma3"
    )
    lines: list[str] = []
    lower(tiny_gguf, adapters=[adapter], backend="onnx", trace=lines.append)
    names = [line.partition(":")[0] for line in lines]
    assert names == ["choose_lora_strategy", *default_pass_names()]


def test_quantized_graph_names_the_format(tiny_gguf: Path) -> None:
    text = lower(tiny_gguf, quantize="nf4", backend="onnx", after="quantize_weights")
    assert text.count(": nf4[") == 7 * 7  # seven matrices of each of seven layers
    assert "@token_embd.weight: q8_0[" in text


@pytest.mark.parametrize("name", ["missing.gguf", "."])
def test_a_model_that_cannot_be_opened_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(RlxcError, match=re.escape(str(tmp_path / name))):
        rlxc.compile(tmp_path / name, tmp_path / "model.rlx")


def test_inspect_tells_a_model_s_formats(tiny_gguf: Path) -> None:
    info = rlxc.inspect(tiny_gguf)
    assert (info.architecture, info.kind) == ("gemma3", "GGUF v3")
    assert info.tensors == {"q8_0": 8, "q5_0": 28, "q6_k": 7, "q4_k": 7, "f32": 43}


def test_inspect_tells_an_artifact_s_options(tiny_gguf: Path, tmp_path: Path) -> None:
    rlxc.compile(tiny_gguf, tmp_path / "model.rlx", context=99, **QUICK)
    info = rlxc.inspect(tmp_path / "model.rlx")
    assert info.architecture == "gemma3"
    assert info.details["options"] == {"activations": "int8", "context": 99}


def test_inspect_refuses_other_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no model at all, but long enough to have a header")
    with pytest.raises(FormatError):
        rlxc.inspect(tmp_path / "notes.txt")
    with pytest.raises(ArtifactError):
        rlxc.inspect(tmp_path)


# --- the real model -----------------------------------------------------------------------------------------------


def test_real_artifact_says_what_was_compiled(gemma_artifact: Path, gemma_gguf: Path) -> None:
    model = Artifact.open(gemma_artifact).manifest.model
    assert (model.architecture, model.name, model.layers) == ("gemma3", "Gemma 3 270m", 18)
    assert (model.vocab_size, model.trained_context) == (262144, 32768)
    assert model.fingerprint == hashlib.sha256(gemma_gguf.read_bytes()).hexdigest()


@pytest.mark.needs_ring
def test_real_artifact_plans_windows_and_full_layers(
    compile_gemma: CompileGemma, backend: BackendName
) -> None:
    plan = Artifact.open(compile_gemma(backend, "int8")).manifest.kv_cache
    assert (plan.context, plan.max_step, plan.rollback) == (4096, 256, 64)
    assert plan.page_size == {"onnx": None, "tvm": 64}[backend]
    assert plan.bytes_per_token == 18 * 2 * 256 * {"onnx": 4, "tvm": 2}[backend]
    layouts = {"onnx": ("ring", "linear"), "tvm": ("paged", "paged")}[backend]
    # 512 + 256 + 64 positions, which are 13 pages, and lie in 14.
    kept = {"onnx": 832, "tvm": 14 * 64}[backend]
    for layer in plan.layers:
        full = layer.index in (5, 11, 17)
        assert layer.layout == layouts[full]
        assert layer.window == (None if full else 512)
        assert layer.capacity == (4096 if full else kept)
        assert layer.table == (int(full) if backend == "tvm" else None)


def test_real_artifact_accounts_for_every_byte_of_the_file(gemma_artifact: Path, gemma_gguf: Path) -> None:
    weights = Artifact.open(gemma_artifact).manifest.weights
    assert sum(weight.nbytes for weight in weights) == rlxc.inspect(gemma_gguf).tensor_bytes


def test_real_artifact_lists_its_files(compile_gemma: CompileGemma, backend: BackendName) -> None:
    artifact = Artifact.open(compile_gemma(backend, "int8"))
    files = artifact.manifest.files
    own = {"onnx": {"model.onnx", "weights.bin"}, "tvm": {"weights.safetensors"}}[backend]
    own |= {library.file for library in artifact.manifest.target.libraries}
    assert {*own, "tokenizer.json", "chat_template.jinja"} <= files.keys()
    present = {path.name: path.stat().st_size for path in artifact.path.iterdir()}
    assert {name: entry.size for name, entry in files.items()} == {
        name: size for name, size in present.items() if name != "manifest.json"
    }


def test_real_artifact_is_little_larger_than_the_file(
    compile_gemma: CompileGemma, backend: BackendName, gemma_gguf: Path
) -> None:
    size = sum(path.stat().st_size for path in compile_gemma(backend, "int8").iterdir())
    assert size <= MAX_GROWTH[backend] * gemma_gguf.stat().st_size


COMPILE = """
import sys
import rlxc
print("ready", flush=True)
sys.stdin.readline()
rlxc.compile(sys.argv[1], sys.argv[2], backend=sys.argv[3])
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_compiling_the_real_model_takes_little_memory(
    gemma_gguf: Path, tmp_path: Path, backend: BackendName
) -> None:
    command = [sys.executable, "-c", COMPILE, str(gemma_gguf), str(tmp_path / "model.rlx"), backend]
    with subprocess.Popen(
        command, cwd=TESTS.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as compiling:
        assert compiling.stdin is not None and compiling.stdout is not None
        assert compiling.stdout.readline() == "ready\n"
        compiling.stdin.write("go\n")
        compiling.stdin.flush()
        peak = peak_anonymous(compiling)
        assert compiling.wait() == 0
    assert (tmp_path / "model.rlx").exists()
    assert 10 << 20 < peak <= MAX_ANONYMOUS


def peak_anonymous(process: subprocess.Popen[str]) -> int:
    """The most bytes of anonymous memory that a process holds from now to its end, looked at every 10 ms."""
    pause, peak = threading.Event(), 0
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        resident = re.search(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)
        peak = max(peak, int(resident[1]) << 10 if resident else 0)
        pause.wait(0.01)
    return peak


@pytest.fixture(scope="module")
def gemma_session(compile_gemma: CompileGemma, backend: BackendName) -> Iterator[Session]:
    with rlxc.load(compile_gemma(backend, "float32")) as session:
        yield session


TEXTS: list[dict[str, Any]] = json.loads((TESTS / "data" / "gemma_text.json").read_text())


@pytest.mark.parametrize(
    "text",
    [pytest.param(text, marks=pytest.mark.slow) if len(text["prompt_ids"]) > 512 else text for text in TEXTS],
    ids=lambda text: text["prompt"][:12],
)
def test_real_model_continues_text_as_llama_cpp_does(gemma_session: Session, text: dict[str, Any]) -> None:
    assert gemma_session.tokenizer.encode(text["prompt"]) == text["prompt_ids"]
    # Along the reference's own text, so that a near tie early on changes nothing after it.
    logits = gemma_session.score(text["prompt_ids"] + text["ids"])
    best = logits[len(text["prompt_ids"]) - 1 : -1].argmax(-1)
    # Exact weights and f32 activations on both sides: what is left is the order of sums, and llama.cpp's GELU table.
    clear = np.array(text["gaps"]) > 0.05
    assert clear.sum() > 40
    assert np.flatnonzero((best != text["ids"]) & clear).tolist() == []
