"""Every kind of vocabulary gives llama.cpp's ids: thousands of texts each, and bytes that are no text.

``tests/data/make_tokenizer_ids.py`` took the ids from llama.cpp.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from tokenizer_cases import CASES, NORMAL, PRE_TOKENIZERS, UNUSED, Case
from tokenizer_texts import BYTE_TEXTS, DIGEST, TEXTS, byte_texts, chunks, digest, texts

from rlxc.runtime.tokenizer import TextStream, Tokenizer
from rlxc.vocab import build_tokenizer
from rlxc.vocab.pretokenizers import PRE_TOKENIZERS as KNOWN
from rlxc.weights import open_gguf

REFERENCE = Path(__file__).parent / "data" / "tokenizer_ids.json.gz"


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(gzip.decompress(REFERENCE.read_bytes()))
    return found


@pytest.fixture(scope="module")
def given() -> dict[str, Sequence[str | bytes]]:
    return {"texts": texts(*TEXTS), "bytes": byte_texts(*BYTE_TEXTS)}


def metadata(case: Case) -> dict[str, Any]:
    """A case as a GGUF file has it."""
    types = {"scores": np.float32, "token_type": np.int32}
    found = {}
    for name, value in case.items():
        key = "general.name" if name == "name" else f"tokenizer.ggml.{name}"
        array = np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
        found[key] = np.array(value, types[name]) if name in types else array
    return found


def load(metadata: dict[str, Any], folder: Path) -> Tokenizer:
    files = build_tokenizer(metadata, source="test")
    path = folder / "tokenizer.json"
    path.write_bytes(files.tokenizer_json)
    return Tokenizer(path, bos_id=files.bos_id, eos_ids=files.eos_ids)


@pytest.fixture(scope="module", params=CASES)
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Case, Tokenizer]:
    case = CASES[request.param]()
    return request.param, case, load(metadata(case), tmp_path_factory.mktemp("vocab"))


def assert_ids(tokenizer: Tokenizer, given: Sequence[str | bytes], expected: dict[str, Any]) -> None:
    ids = [tokenizer.encode(text) for text in given]
    first = expected["first"]
    assert dict(zip(given, ids[: len(first)], strict=False)) == dict(zip(given, first, strict=False))
    digests = expected["digests"]
    wrong = [
        list(chunk)
        for n, (chunk, of_chunk) in enumerate(zip(chunks(given), chunks(ids), strict=True))
        if digest(of_chunk) != digests[n * DIGEST : (n + 1) * DIGEST]
    ]
    assert not wrong, f"in {len(wrong)} chunks, the first of which has {wrong[0]!r}"


def test_texts_get_the_ids_of_llama_cpp(
    loaded: tuple[str, Case, Tokenizer],
    given: dict[str, Sequence[str | bytes]],
    reference: dict[str, Any],
) -> None:
    name, _, tokenizer = loaded
    assert_ids(tokenizer, given["texts"], reference[name]["texts"])


def test_bytes_get_the_ids_of_llama_cpp(
    loaded: tuple[str, Case, Tokenizer],
    given: dict[str, Sequence[str | bytes]],
    reference: dict[str, Any],
) -> None:
    name, _, tokenizer = loaded
    assert_ids(tokenizer, given["bytes"], reference[name]["bytes"])


def test_every_token_stands_for_the_bytes_that_llama_cpp_says(
    loaded: tuple[str, Case, Tokenizer], reference: dict[str, Any]
) -> None:
    name, case, tokenizer = loaded
    pieces = [
        list(tokenizer.piece_bytes(i, skip_special=False))
        for i, kind in enumerate(case["token_type"])
        if kind != UNUSED  # llama.cpp shows nothing for them
    ]
    assert digest(pieces) == reference[name]["pieces"]


def test_a_stream_of_ids_adds_up_to_the_text_of_all(
    loaded: tuple[str, Case, Tokenizer], given: dict[str, Sequence[str | bytes]]
) -> None:
    _, _, tokenizer = loaded
    for text in given["texts"][:200]:
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_gemma_gives_the_ids_of_llama_cpp(
    gemma_gguf: Path,
    tmp_path: Path,
    given: dict[str, Sequence[str | bytes]],
    reference: dict[str, Any],
) -> None:
    with open_gguf(gemma_gguf) as gguf:
        tokenizer = load(dict(gguf.metadata), tmp_path)
    for kind in ("texts", "bytes"):
        assert_ids(tokenizer, given[kind], reference["gemma"][kind])


def test_a_case_for_every_way_to_cut_words() -> None:
    assert {next(pre for pre in PRE_TOKENIZERS if pre in known.names) for known in KNOWN} == {*PRE_TOKENIZERS}


def test_the_cases_have_tokens_of_more_than_a_character() -> None:
    for make in CASES.values():
        case = make()
        long = [
            text
            for text, kind in zip(case["tokens"], case["token_type"], strict=True)
            if kind == NORMAL and text[1:]
        ]
        assert len(long) > 1000
