"""Text to ids and back, token by token or at once, on SentencePiece and byte-level vocabularies."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlxc.errors import ArtifactError, OptionError, SessionError
from rlxc.runtime.tokenizer import StopMatcher, TextStream, Tokenizer
from rlxc.vocab import build_tokenizer
from rlxc.weights import open_gguf

DATA = Path(__file__).parent.parent / "data"
TEXTS = [
    "Hello, world!",
    " leading and trailing ",
    "",
    "naïve 你好 😀👨‍👩‍👧‍👦 \x00\t\r\n",
    "def f(x):\n    return x\n\n\n",
    "مرحبا ▁ नमस्ते",
]


def sentence_piece() -> dict[str, Any]:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256
    words = ["\u2581", "a", "b", "\u2581a", "ab", "\u2581ab"]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *words, "<html>"],
        "tokenizer.ggml.token_type": np.array(types + [1] * len(words) + [4]),
        "tokenizer.ggml.scores": -np.arange(len(tokens) + len(words) + 1, dtype=np.float32),
    }


def byte_level() -> dict[str, Any]:
    made = json.loads((DATA / "byte_level_tokens.json").read_text())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": made["tokens"],
        "tokenizer.ggml.token_type": np.array(made["types"]),
        "tokenizer.ggml.merges": made["merges"],
    }


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory, gemma_gguf: Path) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    loaded = {}
    with open_gguf(gemma_gguf) as gguf:
        kinds = {"llama": sentence_piece(), "gpt2": byte_level(), "gemma": gguf.metadata}
        for name, metadata in kinds.items():
            files = build_tokenizer(metadata, source=name)
            path = folder / f"{name}.json"
            path.write_bytes(files.tokenizer_json)
            loaded[name] = Tokenizer(path, bos_id=files.bos_id, eos_ids=files.eos_ids)
    return loaded


@pytest.fixture(params=["llama", "gpt2", "gemma"])
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    return tokenizers[request.param]


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    expected = (
        text if tokenizer.bos_id is None else text.replace("▁", " ")
    )  # SentencePiece's own mark is a space
    assert tokenizer.decode(tokenizer.encode(text)) == expected


@pytest.mark.parametrize("text", TEXTS)
def test_decoding_agrees_with_the_library(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == tokenizer._tokenizer.decode(ids)
    assert tokenizer.decode(ids, skip_special=False) == tokenizer._tokenizer.decode(
        ids, skip_special_tokens=False
    )


def test_special_tokens_are_added_unless_declined(tokenizers: dict[str, Tokenizer]) -> None:
    gemma = tokenizers["gemma"]
    assert gemma.encode("Hi")[0] == gemma.bos_id == 2
    assert gemma.encode("Hi", add_special=False) == gemma.encode("Hi")[1:]


def test_special_tokens_are_shown_on_request(tokenizers: dict[str, Tokenizer]) -> None:
    gemma = tokenizers["gemma"]
    assert gemma.decode(gemma.encode("Hi"), skip_special=False) == "<bos>Hi"


def test_user_defined_tokens_are_text(tokenizers: dict[str, Tokenizer]) -> None:
    llama = tokenizers["llama"]
    assert llama.decode(llama.encode("a<html>b")) == "a<html> b"


def test_a_continuation_keeps_its_leading_space(tokenizers: dict[str, Tokenizer]) -> None:
    llama = tokenizers["llama"]
    ids = llama.encode("ab", add_special=False)
    assert (llama.decode(ids), llama.decode(ids, continuation=True)) == ("ab", " ab")


def test_vocabulary_facts(tokenizers: dict[str, Tokenizer]) -> None:
    gemma = tokenizers["gemma"]
    assert (gemma.vocab_size, gemma.bos_id, gemma.eos_ids) == (262_144, 2, (1, 106))


def test_pieces_show_control_tokens_and_spaces(tokenizers: dict[str, Tokenizer]) -> None:
    gemma = tokenizers["gemma"]
    assert [gemma.piece(i) for i in (2, 494, 107)] == ["<bos>", " t", "\n"]


def test_a_piece_of_part_of_a_character_is_a_replacement(tokenizers: dict[str, Tokenizer]) -> None:
    assert tokenizers["gemma"].piece(238 + 0xF0) == "\ufffd"


@pytest.mark.parametrize("token_id", [-1, 262_144, 2**40])
def test_an_id_outside_the_vocabulary_is_refused(tokenizers: dict[str, Tokenizer], token_id: int) -> None:
    with pytest.raises(SessionError, match="outside the vocabulary of 262144"):
        tokenizers["gemma"].decode([token_id])


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(SessionError, match="not valid Unicode"):
        tokenizer.encode("\ud83d")


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": 3}', "\x00"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ArtifactError, match="not a tokenizer") as caught:
        Tokenizer(path)
    assert "\n" not in str(caught.value)


def test_ids_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(build_tokenizer(sentence_piece(), source="test").tokenizer_json)
    with pytest.raises(ArtifactError, match="token 5000 is outside"):
        Tokenizer(path, bos_id=1, eos_ids=[5000])


def test_loading_works_in_a_thread(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(build_tokenizer(sentence_piece(), source="test").tokenizer_json)
    loaded: list[Tokenizer] = []
    thread = threading.Thread(target=lambda: loaded.append(Tokenizer(path)))
    thread.start()
    thread.join()
    assert loaded[0].decode(loaded[0].encode("ab")) == "ab"


class TestTextStream:
    @pytest.mark.parametrize("text", TEXTS)
    def test_pieces_add_up_to_the_whole(self, tokenizer: Tokenizer, text: str) -> None:
        ids = tokenizer.encode(text)
        stream = TextStream(tokenizer)
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)

    @given(data=st.data(), skip_special=st.booleans(), continuation=st.booleans())
    def test_pieces_of_any_ids_add_up_to_the_whole(
        self, tokenizers: dict[str, Tokenizer], data: st.DataObject, skip_special: bool, continuation: bool
    ) -> None:
        tokenizer = tokenizers[data.draw(st.sampled_from(sorted(tokenizers)))]
        ids = data.draw(st.lists(st.integers(0, min(tokenizer.vocab_size, 600) - 1), max_size=30))
        stream = TextStream(tokenizer, skip_special=skip_special, continuation=continuation)
        whole = tokenizer.decode(ids, skip_special=skip_special, continuation=continuation)
        assert "".join(map(stream.push, ids)) + stream.flush() == whole

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_a_character_of_several_tokens_comes_out_whole(
        self, tokenizers: dict[str, Tokenizer], name: str
    ) -> None:
        tokenizer = tokenizers[name]
        ids = tokenizer.encode("\U0001f9ff", add_special=False)
        stream = TextStream(tokenizer, continuation=True)
        shown = [stream.push(token_id) for token_id in ids]
        assert len(ids) > 2
        assert "".join(shown[:-1]).strip() == ""
        assert shown[-1] == "\U0001f9ff"

    def test_a_character_cut_short_is_replaced_at_the_end(self, tokenizers: dict[str, Tokenizer]) -> None:
        stream = TextStream(tokenizers["gemma"])
        assert stream.push(238 + 0xF0) == ""
        assert stream.flush() == "\ufffd"

    def test_only_the_first_space_is_dropped(self, tokenizers: dict[str, Tokenizer]) -> None:
        llama = tokenizers["llama"]
        stream = TextStream(llama)
        ids = llama.encode("a a", add_special=False)
        assert [stream.push(token_id) for token_id in ids] == ["a", " a"]

    def test_an_id_outside_the_vocabulary_is_refused(self, tokenizer: Tokenizer) -> None:
        with pytest.raises(SessionError, match="outside the vocabulary"):
            TextStream(tokenizer).push(tokenizer.vocab_size)


def streamed(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    matcher = StopMatcher(stops)
    shown, stopped = "", False
    for piece in pieces:
        text, stopped = matcher.push(piece)
        shown += text
    return shown + matcher.flush(), stopped


class TestStopMatcher:
    def test_text_is_cut_at_the_stop_string(self) -> None:
        assert streamed(["END"], ["one EN", "D two"]) == ("one ", True)

    def test_a_possible_beginning_is_held_back(self) -> None:
        matcher = StopMatcher(["END"])
        assert matcher.push("one EN") == ("one ", False)
        assert matcher.push("TER") == ("ENTER", False)

    def test_a_beginning_that_never_completes_comes_out_at_the_end(self) -> None:
        matcher = StopMatcher(["END"])
        matcher.push("EN")
        assert matcher.flush() == "EN"
        assert matcher.flush() == ""

    def test_a_stop_string_that_overlaps_itself_is_found(self) -> None:
        assert streamed(["aab"], list("xaaab")) == ("xa", True)

    def test_the_stop_string_completed_first_counts(self) -> None:
        assert streamed(["abcd", "bc"], ["abcd"]) == ("a", True)

    def test_nothing_comes_after_a_stop(self) -> None:
        matcher = StopMatcher(["x"])
        matcher.push("x")
        assert matcher.push("more") == ("", True)

    def test_without_stop_strings_all_text_passes_at_once(self) -> None:
        assert StopMatcher([]).push("text") == ("text", False)

    def test_one_string_is_one_stop(self) -> None:
        assert streamed("END", ["E N D END"]) == ("E N D ", True)  # type: ignore[arg-type]

    @pytest.mark.parametrize("stops", [[""], [3], ["a", None]])
    def test_a_stop_that_is_no_text_is_refused(self, stops: list[Any]) -> None:
        with pytest.raises(OptionError, match="non-empty text"):
            StopMatcher(stops)

    @given(
        st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
        st.lists(st.text("ab", max_size=4), max_size=12),
    )
    def test_the_division_into_pieces_does_not_matter(self, stops: list[str], pieces: list[str]) -> None:
        text = "".join(pieces)
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert streamed(stops, [*pieces, ""]) == ((text[: min(ends)[1]], True) if ends else (text, False))
