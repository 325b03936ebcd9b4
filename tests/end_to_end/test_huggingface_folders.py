"""Hugging Face folders from file to logits and text, against Transformers, bitsandbytes and tokenizers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import hf_folders
import numpy as np
import numpy.typing as npt
import pytest
import tokenizers
from hf_folders import ADAPTED, CONTEXT, TEXT, VARIANTS, HfTiny, write_adapter
from interpreted import Interpreted

import rlxc
from rlxc.artifact import Artifact, BackendName
from rlxc.dtypes import DType
from rlxc.runtime import Session
from rlxc.weights.encode import encode

DATA = Path(__file__).parent.parent / "data"
CompileExact = Callable[..., Path]
Folder = Callable[[str], Path]
Floats = npt.NDArray[Any]

# Logits have a standard deviation of 1. Two f32 computations in different order are 1e-5 apart at most.
TOLERANCE = 5e-5

ON_TVM = ("llama-bias", "gemma3-new", "gpt-oss-mxfp4", "stablelm-parallel")
"""BF16, F16, biases, windows, two kinds of positions, experts and layer norms; compiling takes seconds for each."""

TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """``folder(variant)``: a tiny model of ``tests/hf_folders.py``, with a tokenizer."""
    root = tmp_path_factory.mktemp("folders")
    return cache(lambda name: with_tokenizer(VARIANTS[name].write(root / name)))


def with_tokenizer(folder: Path) -> Path:
    shutil.copy(DATA / "peft_tiny" / "base" / "tokenizer.json", folder)
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def transformers_logits() -> dict[str, Floats]:
    """Transformers' logits ``f32 [len(TEXT), vocab]`` by variant; see ``tests/data/README.md``."""
    with np.load(DATA / "hf_logits.npz") as stored:
        return dict(stored)


def score(artifact: Path, ids: list[int]) -> Floats:
    with rlxc.load(artifact, threads=1) as session:
        return session.score(ids)


def formats(artifact: Path, tables: bool = False) -> set[str]:
    """The formats of an artifact's matrices, with or without the embedding and the output."""
    weights = [each for each in Artifact.open(artifact).manifest.weights if len(each.shape) == 2]
    outside = ("token_embd.weight", "output.weight")
    return {str(each.dtype) for each in weights if tables or each.name not in outside}


# --- numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_transformers(
    variant: str, folder: Folder, compile_exact: CompileExact, transformers_logits: dict[str, Floats]
) -> None:
    logits = score(compile_exact(folder(variant), "onnx", context=CONTEXT), TEXT)
    np.testing.assert_allclose(logits, transformers_logits[variant], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("variant", ON_TVM)
def test_logits_on_tvm_equal_transformers(
    variant: str, folder: Folder, compile_exact: CompileExact, transformers_logits: dict[str, Floats]
) -> None:
    pytest.importorskip("tvm")
    logits = score(compile_exact(folder(variant), "tvm", context=CONTEXT), TEXT)
    np.testing.assert_allclose(logits, transformers_logits[variant], rtol=0, atol=TOLERANCE)


def test_bitsandbytes_folders_run_packed(folder: Folder, compile_exact: CompileExact) -> None:
    for variant in ("llama-nf4", "llama-fp4"):
        assert formats(compile_exact(folder(variant), "onnx")) == {VARIANTS[variant].four_bit}


# --- adapters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ADAPTED)
def test_logits_with_an_adapter_equal_peft_s(
    variant: str, folder: Folder, tmp_path: Path, transformers_logits: dict[str, Floats]
) -> None:
    model = Interpreted(folder(variant))
    adapter = model.open(write_adapter(tmp_path / "adapter", VARIANTS[variant]))
    expected = transformers_logits[f"{variant}+adapter"]
    np.testing.assert_allclose(model.logits(TEXT, [(adapter, 1.0)]), expected, rtol=0, atol=TOLERANCE)
    assert np.abs(expected - transformers_logits[variant]).max() > 100 * TOLERANCE


@pytest.mark.parametrize("lora", ["split", "fold"])
@pytest.mark.parametrize("variant", ["phi3-long", "gpt-oss-mxfp4"])
def test_compiled_adapters_equal_the_interpreter_s(
    variant: str, lora: str, folder: Folder, tmp_path: Path, compile_exact: CompileExact
) -> None:
    path = write_adapter(tmp_path / "adapter", VARIANTS[variant])
    model = Interpreted(folder(variant))
    expected = model.logits(TEXT, [(model.open(path), 1.0)])
    artifact = compile_exact(folder(variant), "onnx", context=CONTEXT, lora=lora, adapters=[path])
    np.testing.assert_allclose(score(artifact, TEXT), expected, rtol=0, atol=TOLERANCE)


# --- text ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chatty(folder: Folder, compile_exact: CompileExact, backend: BackendName) -> Iterator[Session]:
    with rlxc.load(compile_exact(folder("llama-bias"), backend), threads=1) as session:
        yield session


def continued(folder: Path, ids: list[int], tokens: int) -> list[int]:
    """The best tokens after ``ids``, by the interpreter."""
    model = Interpreted(folder)
    for _ in range(tokens):
        ids = [*ids, int(model.logits(ids)[-1].argmax())]
    return ids[-tokens:]


@pytest.mark.parametrize("prompt", ["Two owls, a fox (or 3).", "x = y", "To the zoo"])
def test_text_goes_in_and_comes_out(prompt: str, chatty: Session, folder: Folder) -> None:
    judge = tokenizers.Tokenizer.from_file(str(folder("llama-bias") / "tokenizer.json"))
    ids = judge.encode(prompt).ids
    assert chatty.tokenizer.encode(prompt) == ids
    made = chatty.generate(prompt, max_tokens=4)
    assert made.ids == continued(folder("llama-bias"), ids, 4)
    assert made.text == judge.decode(made.ids) and made.text


def test_chat_template_makes_the_prompt(chatty: Session, folder: Folder) -> None:
    assert chatty.chat_template is not None
    messages = [{"role": "user", "content": "Hoot?"}, {"role": "assistant", "content": "Hoot."}]
    prompt = chatty.chat_template.render(messages)
    assert prompt == "<s>user: Hoot?\nassistant: Hoot.\nassistant:"
    judge = tokenizers.Tokenizer.from_file(str(folder("llama-bias") / "tokenizer.json"))
    assert chatty.tokenizer.encode(prompt, add_special=False) == judge.encode(prompt).ids
    assert judge.encode(prompt).ids[0] == 1


# --- encoded anew -------------------------------------------------------------------------------------------------


def rounded(tiny: HfTiny, how: Callable[[Floats], Floats], tables: bool) -> dict[str, tuple[str, Floats]]:
    """The matrices of a folder as f32 with the values that a format gives them."""
    return {
        name: ("F32", how(values))
        for name, values in tiny.arrays().items()
        if values.ndim == 2 and (tables or name.endswith("proj.weight"))
    }


def by_ggml(dtype: DType) -> Callable[[Floats], Floats]:
    """Encoded by the ``gguf`` package if it can, which has no encoder of K-quants, and decoded by it."""
    kind = gguf.GGMLQuantizationType[dtype.name]

    def through(values: Floats) -> Floats:
        packed = encode(dtype, values) if dtype is DType.Q4_K else gguf.quantize(values, kind)
        return np.asarray(gguf.dequantize(packed, kind), np.float32)

    return through


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> HfTiny:
    """A model whose rows are whole blocks of K-quants."""
    for name, value in (("HIDDEN", 256), ("FFN", 512), ("WEIGHT_SIZE", 1 / 16)):
        monkeypatch.setattr(hf_folders, name, value)
    monkeypatch.setitem(hf_folders.HEAD_DIM, "llama", 64)
    return HfTiny(dtype="BF16", config={"tie_word_embeddings": True}, seed=31)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("onnx", DType.Q8_0), ("onnx", DType.Q4_0), ("onnx", DType.Q4_K), ("tvm", DType.Q4_K)],
)
def test_folder_in_a_format_has_the_logits_of_its_rounded_weights(
    backend: BackendName, dtype: DType, wide: HfTiny, tmp_path: Path, compile_exact: CompileExact
) -> None:
    if backend == "tvm":
        pytest.importorskip("tvm")
    model = with_tokenizer(wide.write(tmp_path / "model"))
    artifact = compile_exact(model, backend, quantize=dtype.value)
    assert formats(artifact, tables=True) == {dtype.value}
    judge = wide.write(tmp_path / "judge", tensors=rounded(wide, by_ggml(dtype), tables=True))
    expected = Interpreted(judge).logits(TEXT)
    np.testing.assert_allclose(score(artifact, TEXT), expected, rtol=0, atol=TOLERANCE)
    assert np.abs(expected - Interpreted(model).logits(TEXT)).max() > 100 * TOLERANCE


def test_nf4_of_a_folder_is_that_of_bitsandbytes(tmp_path: Path, compile_exact: CompileExact) -> None:
    # `hf_folders` packs by formula; what bitsandbytes itself makes of the values is in the test below.
    plain, packed = HfTiny(seed=32), HfTiny(four_bit="nf4", seed=32)
    artifact = compile_exact(with_tokenizer(plain.write(tmp_path / "plain")), "onnx", quantize="nf4")
    assert (formats(artifact), formats(artifact, tables=True)) == ({"nf4"}, {"nf4", "f32"})
    expected = Interpreted(packed.write(tmp_path / "packed")).logits(TEXT)
    np.testing.assert_allclose(score(artifact, TEXT), expected, rtol=0, atol=TOLERANCE)


def test_fp4_of_a_folder_is_that_of_bitsandbytes(compile_exact: CompileExact) -> None:
    artifact = compile_exact(DATA / "peft_tiny" / "base", "onnx", quantize="fp4")
    assert formats(artifact) == {"fp4"}
    with np.load(DATA / "peft_tiny" / "logits.npz") as stored:
        ids, expected = stored["ids"].tolist(), stored["fp4"]
    np.testing.assert_allclose(score(artifact, ids), expected, rtol=0, atol=TOLERANCE)
