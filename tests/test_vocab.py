"""Vocabularies of GGUF files become tokenizers that give llama.cpp's ids."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from rlxc.errors import FormatError, ModelError, RlxcError, UnsupportedError
from rlxc.vocab import DEFAULT_TEMPLATES, TokenizerFiles, build_tokenizer
from rlxc.weights import open_gguf

DATA = Path(__file__).parent / "data"
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6

Metadata = dict[str, Any]


def sentence_piece(**changes: Any) -> Metadata:
    """A vocabulary for words of a, b, c: the better the score, the earlier a merge."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    scores = [0.0] * len(tokens)
    pieces = {
        "\u2581": -9,
        "a": -9,
        "b": -9,
        "c": -9,
        "bc": -1,
        "ab": -2,
        "abc": -3,
        "\u2581a": -4,
        "\u2581abc": -5,
    }
    tokens += [*pieces, "<html>"]
    types += [NORMAL] * len(pieces) + [USER_DEFINED]
    scores += [*map(float, pieces.values()), -1000.0]
    metadata = {
        "model": "llama",
        "tokens": tokens,
        "token_type": np.array(types, np.int32),
        "scores": np.array(scores, np.float32),
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def byte_level(**changes: Any) -> Metadata:
    """The vocabulary that ``make_tokens.py`` made."""
    made = json.loads((DATA / "byte_level_tokens.json").read_text())
    metadata = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": made["tokens"],
        "token_type": np.array(made["types"], np.int32),
        "merges": made["merges"],
        "bos_token_id": made["tokens"].index("<bos>"),
        "eos_token_id": made["tokens"].index("<eos>"),
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in metadata.items() if value is not None}


def with_tokens(metadata: Metadata, **types: int) -> Metadata:
    """Appends tokens of the given types."""
    changed = dict(metadata)
    changed["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], *types]
    kinds = [*metadata["tokenizer.ggml.token_type"], *types.values()]
    changed["tokenizer.ggml.token_type"] = np.array(kinds, np.int32)
    if "tokenizer.ggml.scores" in metadata:
        scores = [*metadata["tokenizer.ggml.scores"], *[-2000.0] * len(types)]
        changed["tokenizer.ggml.scores"] = np.array(scores, np.float32)
    return changed


def load(files: TokenizerFiles) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(files.tokenizer_json.decode())


def pieces(metadata: Metadata, text: str, add_special_tokens: bool = False) -> list[str]:
    tokens: list[str] = (
        load(build_tokenizer(metadata, source="test"))
        .encode(text, add_special_tokens=add_special_tokens)
        .tokens
    )
    return tokens


@pytest.fixture(scope="module")
def gemma(gemma_gguf: Path) -> TokenizerFiles:
    with open_gguf(gemma_gguf) as gguf:
        return build_tokenizer(gguf.metadata, source=gemma_gguf)


class TestRealVocabulary:
    def test_ids_are_those_of_llama_cpp(self, gemma: TokenizerFiles) -> None:
        reference = json.loads((DATA / "gemma_tokens.json").read_text())
        tokenizer = load(gemma)
        assert [tokenizer.encode(text).ids for text in reference["texts"]] == reference["ids"]

    def test_special_ids_and_rules(self, gemma: TokenizerFiles) -> None:
        assert (gemma.bos_id, gemma.eos_ids, gemma.vocab_size) == (2, (1, 106), 262_144)
        assert (gemma.add_bos, gemma.add_eos) == (True, False)

    def test_the_html_tag_spelt_like_an_end_does_not_stop_generation(self, gemma: TokenizerFiles) -> None:
        assert load(gemma).token_to_id("</s>") not in gemma.eos_ids

    def test_a_file_without_template_gets_the_one_of_its_turn_tokens(self, gemma: TokenizerFiles) -> None:
        assert gemma.chat_template == DEFAULT_TEMPLATES["<start_of_turn>"]

    def test_file_holds_at_most_one_merge_per_token(self, gemma: TokenizerFiles) -> None:
        made = ["".join(merge.split(" ")) for merge in json.loads(gemma.tokenizer_json)["model"]["merges"]]
        assert len(set(made)) == len(made)
        assert len(gemma.tokenizer_json) < 10e6


class TestSentencePiece:
    def test_the_best_score_is_merged_first(self) -> None:
        # bc (-1) beats ab (-2), so abc is reached through a + bc.
        assert pieces(sentence_piece(add_space_prefix=False), "abc") == ["abc"]
        assert pieces(sentence_piece(add_space_prefix=False), "abb") == ["ab", "b"]

    def test_only_the_split_that_happens_becomes_a_merge(self) -> None:
        document = json.loads(build_tokenizer(sentence_piece(), source="test").tokenizer_json)
        assert document["model"]["merges"] == ["b c", "a b", "a bc", "\u2581 a", "\u2581 abc"]

    def test_a_space_is_put_before_text_and_after_special_tokens(self) -> None:
        assert pieces(sentence_piece(), "a<s>a") == ["\u2581a", "<s>", "\u2581a"]

    def test_no_space_is_put_before_text_if_the_file_says_so(self) -> None:
        assert pieces(sentence_piece(add_space_prefix=False), "a<s>a") == ["a", "<s>", "a"]

    def test_unknown_characters_fall_back_to_bytes(self) -> None:
        assert pieces(sentence_piece(add_space_prefix=False), "aé") == ["a", "<0xC3>", "<0xA9>"]

    def test_bos_is_added_by_default(self) -> None:
        assert pieces(sentence_piece(), "a", add_special_tokens=True) == ["<s>", "\u2581a"]

    def test_bos_and_eos_are_added_as_the_file_says(self) -> None:
        metadata = sentence_piece(add_bos_token=False, add_eos_token=True)
        assert pieces(metadata, "a", add_special_tokens=True) == ["\u2581a", "</s>"]

    def test_default_ids_are_those_of_llama(self) -> None:
        files = build_tokenizer(sentence_piece(bos_token_id=None, eos_token_id=None), source="test")
        assert (files.bos_id, files.eos_ids) == (1, (2,))

    def test_control_tokens_are_special_and_user_defined_ones_are_not(self) -> None:
        added = load(build_tokenizer(sentence_piece(), source="test")).get_added_tokens_decoder()
        assert {token.content: token.special for token in added.values()} == {
            "<unk>": True,
            "<s>": True,
            "</s>": True,
            "<html>": False,
        }

    def test_an_empty_token_gets_a_name(self) -> None:
        metadata = sentence_piece()
        metadata["tokenizer.ggml.tokens"][-1] = ""
        files = build_tokenizer(metadata, source="test")
        assert load(files).id_to_token(files.vocab_size - 1) == f"[EMPTY_{files.vocab_size - 1}]"

    @given(st.text(alphabet="abc ", max_size=30))
    def test_merges_give_what_joining_by_score_gives(self, text: str) -> None:
        metadata = sentence_piece(add_space_prefix=False)
        assert pieces(metadata, text) == joined_by_score(metadata, text)

    @given(
        st.lists(st.text(alphabet="abc", min_size=2, max_size=6), unique=True, max_size=25),
        st.randoms(use_true_random=False),
        st.text(alphabet="abc", max_size=40),
    )
    def test_any_vocabulary_with_distinct_scores_gives_what_joining_by_score_gives(
        self, words: list[str], random: Any, text: str
    ) -> None:
        tokens = ["<unk>", "<s>", "</s>", "a", "b", "c", *words]
        scores = [-float(i) for i in range(len(tokens))]
        random.shuffle(scores)
        metadata = sentence_piece(
            tokens=tokens,
            token_type=np.array([UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (len(tokens) - 3)),
            scores=np.array(scores, np.float32),
            add_space_prefix=False,
        )
        assert pieces(metadata, text) == joined_by_score(metadata, text)


def joined_by_score(metadata: Metadata, text: str) -> list[str]:
    """SentencePiece's rule, literally: join the best-scored neighbours, leftmost of equals, until none fit."""
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    symbols = list(text.replace(" ", "\u2581"))
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            return symbols
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


class TestByteLevel:
    @pytest.mark.parametrize(
        "pre", ["default", "gpt-2", "smollm", "falcon", "llama-bpe", "dbrx", "qwen2", "qwen35"]
    )
    def test_ids_are_those_of_llama_cpp(self, pre: str) -> None:
        made = json.loads((DATA / "byte_level_tokens.json").read_text())
        tokenizer = load(build_tokenizer(byte_level(pre=pre), source="test"))
        assert [tokenizer.encode(text).ids for text in made["texts"]] == made["ids"][pre]

    @pytest.mark.parametrize(
        ("pre", "words"), [("tekken", ["приВЕТ", "1", "2"]), ("gpt-4o", ["приВЕТ's", "12"])]
    )
    def test_cased_pre_tokenizers_split_at_upper_case_of_any_script(self, pre: str, words: list[str]) -> None:
        tokenizer = load(build_tokenizer(byte_level(pre=pre), source="test"))
        text = "".join(words)
        cut = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert cut == ["при", words[0].removeprefix("при"), *words[1:]]

    def test_a_missing_pre_tokenizer_is_the_default_one(self) -> None:
        absent = build_tokenizer(byte_level(pre=None), source="test")
        assert absent == build_tokenizer(byte_level(pre="default"), source="test")

    def test_bos_is_added_by_default_for_llama_3_only(self) -> None:
        assert build_tokenizer(byte_level(pre="llama-bpe"), source="test").add_bos
        assert not build_tokenizer(byte_level(pre="qwen2"), source="test").add_bos

    def test_end_tokens_are_known_by_text_and_by_key(self) -> None:
        metadata = with_tokens(
            byte_level(), **{"<|fim_pad|>": CONTROL, "<stop>": CONTROL, "<|endoftext|>": NORMAL}
        )
        metadata["tokenizer.ggml.eot_token_id"] = metadata["tokenizer.ggml.tokens"].index("<stop>")
        files = build_tokenizer(metadata, source="test")
        found = [metadata["tokenizer.ggml.tokens"][i] for i in files.eos_ids]
        assert found == ["<eos>", "<stop>", "<|im_end|>", "<|fim_pad|>", "<|endoftext|>"]

    def test_an_end_token_of_normal_type_is_still_special(self) -> None:
        metadata = with_tokens(byte_level(), **{"<|endoftext|>": NORMAL})
        assert pieces(metadata, "a<|endoftext|>")[-1] == "<|endoftext|>"

    def test_a_message_end_among_several_does_not_stop_generation(self) -> None:
        metadata = with_tokens(byte_level(), **dict.fromkeys(("<|end|>", "<|return|>", "<|call|>"), CONTROL))
        files = build_tokenizer(metadata, source="test")
        assert metadata["tokenizer.ggml.tokens"].index("<|end|>") not in files.eos_ids

    def test_merges_that_look_like_a_header_survive(self) -> None:
        tokens = [*"#version12", "#v", "#ve", "#ver", "#vers", "#versi", "#versio", "#version", "#version1"]
        merges = [f"{'#version'[:i]} {'#version'[i]}" for i in range(1, 8)] + ["#version 1"]
        metadata = byte_level(
            pre="falcon", tokens=tokens, token_type=np.ones(len(tokens), np.int32), merges=merges,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        tokenizer = load(build_tokenizer(metadata, source="test"))
        assert tokenizer.model.tokenize("#version12")[0].value == "#version1"


class TestTemplates:
    def test_the_files_own_template_is_kept(self) -> None:
        metadata = byte_level() | {"tokenizer.chat_template": "{{ messages }}"}
        assert build_tokenizer(metadata, source="test").chat_template == "{{ messages }}"

    def test_turn_tokens_choose_a_template(self) -> None:
        assert build_tokenizer(byte_level(), source="test").chat_template == DEFAULT_TEMPLATES["<|im_start|>"]

    def test_a_vocabulary_without_turn_tokens_has_no_template(self) -> None:
        assert build_tokenizer(sentence_piece(), source="test").chat_template is None


@pytest.mark.parametrize("metadata", [sentence_piece(), byte_level()], ids=["llama", "gpt2"])
def test_the_same_metadata_gives_the_same_bytes(metadata: Metadata) -> None:
    assert build_tokenizer(metadata, source="a") == build_tokenizer(dict(metadata), source="b")


DAMAGE: dict[str, tuple[Metadata, type[RlxcError], str]] = {
    "no model": (sentence_piece(model=None), ModelError, "carries no tokenizer"),
    "unknown model": (sentence_piece(model="t5"), UnsupportedError, "known: llama, gpt2"),
    "unknown pre-tokenizer": (byte_level(pre="martian"), UnsupportedError, "'martian'.*known: .*qwen2"),
    "no tokens": (sentence_piece(tokens=None), ModelError, "tokens is missing"),
    "empty tokens": (sentence_piece(tokens=[]), ModelError, "tokens is empty"),
    "tokens not text": (sentence_piece(tokens=[1, 2]), FormatError, "not an array of strings"),
    "tokens one string": (sentence_piece(tokens="abc"), FormatError, "not an array of strings"),
    "token types missing": (sentence_piece(token_type=None), ModelError, "token_type is missing"),
    "token types short": (
        sentence_piece(token_type=np.ones(3, np.int32)),
        ModelError,
        "3 entries for 269 tokens",
    ),
    "token types not numbers": (sentence_piece(token_type=["a"]), FormatError, "not an array of numbers"),
    "scores missing": (sentence_piece(scores=None), ModelError, "scores is missing"),
    "scores short": (sentence_piece(scores=np.zeros(2, np.float32)), ModelError, "2 entries for 269 tokens"),
    "scores NaN": (sentence_piece(scores=np.full(269, np.nan, np.float32)), ModelError, "NaN for token 0"),
    "long token": (with_tokens(sentence_piece(), **{"a" * 1025: NORMAL}), ModelError, "1025 characters"),
    "bos out of range": (sentence_piece(bos_token_id=269), ModelError, "bos_token_id is 269"),
    "bos not a number": (sentence_piece(bos_token_id="1"), FormatError, "bos_token_id has type str"),
    "eot out of range": (sentence_piece(eot_token_id=9999), ModelError, "eot_token_id is 9999"),
    "flag not a flag": (sentence_piece(add_bos_token=7), FormatError, "add_bos_token has type int"),
    "bos added but absent": (byte_level(bos_token_id=None, add_bos_token=True), ModelError, "no such token"),
    "eos added but absent": (byte_level(eos_token_id=None, add_eos_token=True), ModelError, "no such token"),
    "merges missing": (byte_level(merges=None), ModelError, "merges is missing"),
    "merge of one part": (byte_level(merges=["ab"]), FormatError, r"merges\[0\] is 'ab'"),
    "merge of three parts": (byte_level(merges=["a b c"]), FormatError, r"merges\[0\] is 'a b c'"),
    "merge makes no token": (byte_level(merges=["Q Q"]), ModelError, "needs 'QQ'"),
    "half a surrogate": (
        with_tokens(sentence_piece(), **{"\ud800": NORMAL}),
        FormatError,
        "not valid Unicode",
    ),
    "template not text": (sentence_piece() | {"tokenizer.chat_template": 3}, FormatError, "not a string"),
}


@pytest.mark.parametrize(("metadata", "error", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_metadata_is_refused(metadata: Metadata, error: type[RlxcError], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        build_tokenizer(metadata, source="broken.gguf")
    assert "\n" not in str(caught.value)


def test_a_token_twice_is_refused_by_both_ids() -> None:
    metadata = sentence_piece()
    metadata["tokenizer.ggml.tokens"][-1] = "ab"
    with pytest.raises(ModelError, match="tokens 264 and 268 are both 'ab'"):
        build_tokenizer(metadata, source="broken.gguf")
