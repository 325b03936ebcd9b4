"""Whether a model compiles, and everything that is missing: of files that are broken in several ways at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "models"))

from hf_folders import HfTiny
from tiny import CONTEXT, HIDDEN, VARIANTS, VOCAB, write_tiny_model

import rlxc
import rlxc.checking
from rlxc.artifact import BackendName
from rlxc.backends import BACKENDS
from rlxc.checking import CheckOptions, Readiness, check
from rlxc.errors import FormatError, ModelError, OptionError, UnsupportedError
from rlxc.weights.gguf import GgufFile
from rlxc.weights.source import ModelFile, open_model

Floats = npt.NDArray[np.float32]
BROKEN_TENSORS: dict[str, Floats | None] = {
    "blk.0.attn_k.weight": None,
    "blk.1.attn_k.weight": None,
    "blk.1.attn_norm.weight": None,
    "blk.0.ffn_up.weight": np.ones((8, HIDDEN), np.float32),
    "blk.1.ffn_up.weight": np.ones((8, HIDDEN), np.float32),
    "blk.0.attn_sinks.weight": np.ones(4, np.float32),
    "blk.1.attn_sinks.weight": np.ones(4, np.float32),
    "mtp.weight": np.ones(4, np.float32),
}
BROKEN_KEYS: dict[str, Any] = {
    "attention.clamp_kqv": 8.0,
    "rope.scaling.type": "spiral",
    "use_parallel_residual": True,
}


def readiness(path: Path, **options: Any) -> dict[str, Readiness]:
    """What is said of each backend."""
    return {one.backend: one for one in rlxc.inspect(path, **options).readiness}


def problems(path: Path, **options: Any) -> list[str]:
    """What is missing, which is the same for both backends."""
    found = readiness(path, **options)
    assert found["tvm"].problems == found["onnx"].problems
    return list(found["onnx"].problems)


def assert_said(found: list[str], *starts: str) -> None:
    """There is a problem that begins with each of these, in this order, and no other."""
    assert [line for line, start in zip(found, starts) if not line.startswith(start)] == []
    assert len(found) == len(starts), found


@pytest.mark.parametrize("name", ["llama-k-m", "gemma3-window", "qwen3moe-odd", "gpt-oss-odd", "phi3-odd"])
def test_sound_model_compiles(name: str, tmp_path: Path, backend: BackendName) -> None:
    (found,) = readiness(VARIANTS[name].write(tmp_path / "m.gguf"), backend=backend).values()
    assert found.problems == () and found.compiles
    assert found.context == CONTEXT


def test_everything_that_is_missing_is_listed(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", "llama", metadata=BROKEN_KEYS, tensors=BROKEN_TENSORS)
    assert_said(
        problems(model),
        "rope scaling 'spiral' is not implemented; ",
        "metadata llama.attention.clamp_kqv = 8.0 is not implemented",
        "metadata llama.use_parallel_residual = True is not implemented",
        "2 tensors are missing: blk.{0-1}.attn_k.weight",
        "tensor blk.1.attn_norm.weight is missing",
        f"2 tensors have shape [8, {HIDDEN}], but the metadata asks for [512, {HIDDEN}]: blk.{{0-1}}.ffn_up.weight",
        "2 tensors have no place in a llama model: blk.{0-1}.attn_sinks.weight; ",
        "tensor mtp.weight has no place in a llama model",
    )


def test_compiling_raises_the_first_and_says_how_many_more(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", "llama", tensors=BROKEN_TENSORS)
    with pytest.raises(
        ModelError, match=r"are missing: .*weight \(and 4 more problems, which `rlxc inspect` lists\)"
    ):
        rlxc.compile(model, tmp_path / "m.rlx")


def test_missing_and_senseless_numbers_are_all_listed(tmp_path: Path) -> None:
    keys = {
        "block_count": None,
        "attention.head_count": 0,
        "rope.freq_base": -1.0,
        "context_length": "long",
        "expert_colour": 3,
    }
    found = problems(write_tiny_model(tmp_path / "m.gguf", "llama", metadata=keys, tensors=BROKEN_TENSORS))
    # Nothing is said of tensors, whose number and sizes nobody knows; nor of keys that contradict a stand-in.
    assert sorted(found) == [
        "metadata llama.attention.head_count = 0 is outside 1..2147483647",
        "metadata llama.block_count is missing",
        "metadata llama.context_length must be one integer, got 'long'",
        "metadata llama.expert_colour = 3 is not implemented for this architecture; it may change the model's "
        "arithmetic, so it is not ignored",
        "metadata llama.rope.freq_base must be a positive number, got -1.0",
    ]


def test_unknown_architecture_and_unknown_tokenizer_are_both_told(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", "llama")
    data = model.read_bytes().replace(
        b"llama", b"mamba"
    )  # the architecture, its keys' prefix and the tokenizer
    model.write_bytes(data)
    assert_said(
        problems(model),
        "architecture 'mamba' is not implemented; known: ",
        "tokenizer model 'mamba' is not supported; known: ",
    )


def test_tokenizer_larger_than_the_embedding_is_told(tmp_path: Path) -> None:
    tensors = {"token_embd.weight": np.ones((VOCAB - 1, HIDDEN), np.float32)}
    found = problems(write_tiny_model(tmp_path / "m.gguf", "llama", tensors=tensors))
    assert found == [f"the tokenizer has {VOCAB} tokens, the embedding {VOCAB - 1} rows"]


def write_foreign(path: Path, kinds: Mapping[str, tuple[int, npt.NDArray[Any]]]) -> Path:
    """A tiny Llama with some tensors of types that cannot be decoded, known to ``gguf`` or not."""
    write_tiny_model(path, "llama", tensors=dict.fromkeys(kinds))
    reader = gguf.GGUFReader(path)
    plain = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    writer = gguf.GGUFWriter(path.with_suffix(".foreign.gguf"), "llama")
    for name, field in fields.items():
        if name != "general.architecture":
            kind = field.types[0]
            writer.add_key_value(
                name, field.contents(), kind, field.types[1] if len(field.types) > 1 else None
            )
    for name, data in plain.items():
        writer.add_tensor(name, data)
    for name, (_, data) in kinds.items():
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.I8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = path.with_suffix(".foreign.gguf").read_bytes()
    for name, (code, _) in kinds.items():
        # After the name come the number of dimensions, the dimensions, and the type.
        at = data.index(len(name).to_bytes(8, "little") + name.encode()) + 8 + len(name)
        at += 4 + 8 * int.from_bytes(data[at : at + 4], "little")
        data = data[:at] + code.to_bytes(4, "little") + data[at + 4 :]
    path.write_bytes(data)
    return path


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Two matrices of a type that ``gguf`` names, one of a type of the future; and another problem."""
    up, norm = np.zeros((512, HIDDEN), np.int8), np.zeros(HIDDEN, np.int8)
    kinds = {
        "blk.0.ffn_up.weight": (24, up),
        "blk.1.ffn_up.weight": (24, up),
        "blk.1.attn_norm.weight": (199, norm),
        "extra.weight": (24, norm),
    }
    return write_foreign(tmp_path / "m.gguf", kinds)


def test_types_without_a_format_do_not_hide_the_rest(foreign: Path) -> None:
    assert_said(
        problems(foreign),
        "3 tensors have type I8, such as 'blk.0.ffn_up.weight'; use a file quantised to one of F32, ",
        "tensor 'blk.1.attn_norm.weight' has type 199, which is unknown; ",
        "tensor extra.weight has no place in a llama model",
    )


def test_types_without_a_format_are_counted_and_listed(foreign: Path) -> None:
    info = rlxc.inspect(foreign, weights=True)
    assert info.tensors["i8"] == 3
    assert info.weights is not None
    (row,) = [row for row in info.weights.rows if row.name == "blk.1.ffn_up.weight"]
    assert (row.format, row.shape, row.nbytes, row.stored_bytes) == ("i8", (512, HIDDEN), None, None)
    assert info.weights.by_format["i8"].nbytes is None and info.weights.total.nbytes is None


def test_types_without_a_format_cannot_be_compiled(foreign: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"3 tensors have type I8.*\(and 1 more problem"):
        rlxc.compile(foreign, tmp_path / "m.rlx")


@pytest.mark.parametrize(("head_dim", "refusing"), [(6, {"tvm", "onnx"}), (12, {"onnx"}), (64, set())])
def test_head_size_that_a_backend_s_kernels_refuse_is_told(
    head_dim: int, refusing: set[str], tmp_path: Path
) -> None:
    pytest.importorskip("tvm")
    found = readiness(write_tiny_model(tmp_path / "m.gguf", "llama", head_dim=head_dim))
    assert {name for name, one in found.items() if not one.compiles} == refusing
    assert all("channels" in problem for one in found.values() for problem in one.problems)


def test_backend_that_is_not_installed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = rlxc.checking.get_backend

    def get_backend(name: str) -> Any:
        if name == "tvm":
            raise OptionError("the tvm backend needs TVM, which is not installed", remedy="pip install it")
        return real(name)

    monkeypatch.setattr(rlxc.checking, "get_backend", get_backend)
    found = readiness(write_tiny_model(tmp_path / "m.gguf", "llama"))
    assert found["tvm"].problems == ("the tvm backend needs TVM, which is not installed; pip install it",)
    assert found["onnx"].compiles


def test_target_that_there_is_not_is_told(tmp_path: Path, backend: BackendName) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", "llama")
    (found,) = readiness(model, backend=backend, target="abacus").values()
    assert len(found.problems) == 1 and "'abacus'" in found.problems[0]


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real: Callable[[GgufFile, str], npt.NDArray[np.uint8]] = GgufFile.data

    def data(file: GgufFile, name: str) -> npt.NDArray[np.uint8]:
        read.append(name)
        return real(file, name)

    monkeypatch.setattr(GgufFile, "data", data)
    model = VARIANTS["llama-llama3"].write(tmp_path / "m.gguf")
    assert all(one.compiles for one in readiness(model, weights=True).values())
    assert set(read) == {"rope_freqs.weight"}  # a few numbers, which rope tables are made of


class _Changed:
    """An open model with other metadata."""

    def __init__(self, file: ModelFile, metadata: Mapping[str, Any]) -> None:
        self.file, self.metadata = file, metadata

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


@pytest.mark.parametrize("value", [None, 0, 1, 7, 2**31 - 1, "x", float("nan"), np.array([1, 2])], ids=str)
@pytest.mark.parametrize("name", ["llama-yarn", "gpt-oss-odd"])
def test_whatever_a_key_says_is_told_and_breaks_nothing(name: str, value: Any, tmp_path: Path) -> None:
    told = 0
    with open_model(VARIANTS[name].write(tmp_path / "m.gguf")) as file:
        architecture = file.metadata["general.architecture"]
        for key in [key for key in file.metadata if key.startswith(f"{architecture}.")]:
            metadata = {**file.metadata, key: value}
            if value is None:
                del metadata[key]
            found = check(_Changed(file, metadata), CheckOptions(BACKENDS))  # type: ignore[arg-type]
            told += sum(len(one.readiness.problems) for one in found)
    assert told > 10


# --- context ------------------------------------------------------------------------------------------------------


def test_context_decides_the_bytes_of_caches(tmp_path: Path, backend: BackendName) -> None:
    model = VARIANTS["gemma3-window"].write(tmp_path / "m.gguf")
    held = []
    for context in (64, 128, 256, None):  # whole pages
        (found,) = readiness(model, backend=backend, context=context).values()
        assert found.context == context or context is None
        held.append(found.cache_bytes)
    assert None not in held
    assert held[0] < held[1] < held[2] == held[3]  # type: ignore[operator]


@pytest.mark.parametrize("context", [0, CONTEXT + 1])
def test_context_that_the_model_was_not_trained_for_is_refused(tmp_path: Path, context: int) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", "llama")
    with pytest.raises(OptionError, match=f"context {context} is outside 1..{CONTEXT}, what the model was"):
        rlxc.inspect(model, context=context)


# --- Hugging Face folders -----------------------------------------------------------------------------------------


def test_folder_compiles(tmp_path: Path, backend: BackendName) -> None:
    (found,) = readiness(HfTiny(seed=1).write(tmp_path / "model"), backend=backend).values()
    # It has no tokenizer, which is what is missing.
    assert len(found.problems) == 1 and "tokenizer.json" in found.problems[0]


def test_every_key_of_a_folder_that_nobody_reads_is_listed(tmp_path: Path) -> None:
    tiny = HfTiny(config={"attention_chunk_size": 8, "mlp_colour": "red"})
    found = problems(tiny.write(tmp_path / "model"))
    assert len(found) == 2
    assert "attention_chunk_size = 8 is not implemented" in found[0]
    assert "mlp_colour = 'red' is not implemented" in found[1]


def test_every_tensor_of_a_folder_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    down = "model.layers.{}.mlp.down_proj.weight"
    tensors: dict[str, Any] = {
        down.format(0): None,
        down.format(1): None,
        "model.norm.weight": ("F64", np.ones(64)),
        "model.layers.1.mlp.up_proj.weight": ("F32", np.ones((2, 2), np.float32)),
        "score.weight": ("F32", np.ones((2, 64), np.float32)),
    }
    path = HfTiny().write(tmp_path / "model", tensors=tensors)
    info = rlxc.inspect(path, weights=True)
    assert (info.kind, info.architecture, info.name) == ("Hugging Face folder", "llama", "model")
    assert info.tensors == {"f32": 19, "f64": 1}
    assert info.weights is not None and len(info.weights.rows) == 20
    found = [problem.removeprefix(f"{path}: ") for problem in info.readiness[0].problems]
    assert_said(
        sorted(found),
        "2 tensors are missing: model.layers.{0-1}.mlp.down_proj.weight; ",
        "tensor model.layers.1.mlp.up_proj.weight has shape [2, 2], but config.json asks for [128, 64]",
        "tensor model.norm.weight has element type F64; ",
        "tensor score.weight has no place in the model that config.json describes; ",
    )


def test_folder_of_an_unknown_kind_of_model_is_told(tmp_path: Path) -> None:
    info = rlxc.inspect(HfTiny(config={"model_type": "mamba"}).write(tmp_path / "model"))
    assert info.architecture == "mamba"
    assert all("model_type = 'mamba' is not implemented" in one.problems[0] for one in info.readiness)


def test_damaged_folder_is_an_error(tmp_path: Path) -> None:
    path = HfTiny(config={"model_type": "mamba"}).write(tmp_path / "model")
    (path / "model.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises((FormatError, UnsupportedError)):
        rlxc.inspect(path)
