"""Vocabularies of GGUF files become tokenizers that give llama.cpp's ids."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

# What tests share lies beside them.
sys.path.insert(0, str(Path(__file__).parent))

from vocabularies import (
    CONTROL,
    DATA,
    NORMAL,
    UNKNOWN,
    UNUSED,
    Metadata,
    byte_level,
    load,
    pieces,
    sentence_piece,
    unigram,
    with_tokens,
    word_piece,
)

from rlxc.vocab import DEFAULT_TEMPLATES, TokenizerFiles, build_tokenizer
from rlxc.weights import open_gguf


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
        ("pre", "words"),
        [
            ("tekken", ["приВЕТ", "1", "2"]),
            ("gpt-4o", ["camel", "Case's", "приВЕТ's", "12"]),
        ],
    )
    def test_cased_pre_tokenizers_know_the_case_of_ascii_only(self, pre: str, words: list[str]) -> None:
        tokenizer = load(build_tokenizer(byte_level(pre=pre), source="test"))
        text = "".join(words)
        cut = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
        assert cut == words

    def test_of_a_merge_that_comes_twice_the_first_counts(self) -> None:
        changes = {"tokens": ["a", "b", "c", "ab", "bc"], "token_type": np.ones(5, np.int32)}
        changes |= {"bos_token_id": None, "eos_token_id": None}
        assert pieces(byte_level(**changes, merges=["a b", "b c", "a b"]), "abc") == ["ab", "c"]

    def test_a_byte_that_is_no_token_joins_nothing(self) -> None:
        changes = {"tokens": ["a", "b", "ab"], "token_type": np.ones(3, np.int32)}
        changes |= {"bos_token_id": None, "eos_token_id": None}
        assert pieces(byte_level(**changes, merges=["a b"]), "abacb") == ["ab", "a", "b"]

    def test_marks_of_messages_are_shown(self) -> None:
        ends = ("<|end|>", "<|return|>", "<|call|>")
        metadata = with_tokens(byte_level(), **dict.fromkeys(("<|channel|>", "<|message|>", *ends), CONTROL))
        added = load(build_tokenizer(metadata, source="test")).get_added_tokens_decoder()
        shown = {token.content for token in added.values() if not token.special}
        assert shown == {"<h1>", "<|channel|>", "<|message|>", "<|end|>"}

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


def strips(metadata: Metadata) -> dict[str, tuple[bool, bool]]:
    added = load(build_tokenizer(metadata, source="test")).get_added_tokens_decoder().values()
    return {token.content: (token.lstrip, token.rstrip) for token in added}


class TestAddedTokens:
    def test_none_swallows_space_by_default(self) -> None:
        assert set(strips(byte_level()).values()) == {(False, False)}

    def test_those_of_phi_3_swallow_space_after_them(self) -> None:
        metadata = sentence_piece() | {"general.name": "Phi 3 Phi-3.5 Mini"}
        metadata = with_tokens(metadata, **{"<|user|>": CONTROL, "<|endoftext|>": CONTROL})
        right = {text for text, sides in strips(metadata).items() if sides == (False, True)}
        assert right == {"</s>", "<html>", "<|user|>"}

    @pytest.mark.parametrize(
        ("token", "keys"),
        [
            ("<mask>", {"tokenizer.ggml.pre": "jina-v2-code"}),
            ("<mask>", {"general.architecture": "jina-bert-v3"}),
            ("[MASK]", {"general.name": "Modern-BERT base"}),
        ],
    )
    def test_masks_swallow_space_before_them(self, token: str, keys: Metadata) -> None:
        found = strips(with_tokens(byte_level() | keys, **{token: CONTROL}))
        assert {text for text, sides in found.items() if sides != (False, False)} == {token}
        assert found[token] == (True, False)

    @pytest.mark.parametrize(
        ("tokens", "ours"),
        [
            (["<a>", "<b>"], False),
            (["\n", "\n\n", "\n\n\n"], False),  # whichever is longest begins leftmost
            (["|a|", "|bc|"], True),
            (["|bc|", "|a|"], True),
            (["<a", "a>>", "<a>>"], False),  # the third takes what the first two compete for
        ],
    )
    def test_tokens_that_overlap_are_left_to_the_runtime(self, tokens: list[str], ours: bool) -> None:
        metadata = with_tokens(byte_level(), **dict.fromkeys(tokens, CONTROL))
        assert (b'"cut":"longest first"' in build_tokenizer(metadata, source="test").tokenizer_json) == ours


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


class TestUnigram:
    def test_the_document_alone_gives_the_most_probable_pieces(self) -> None:
        assert pieces(unigram(), "abba") == ["ab", "b", "a"]

    def test_a_text_ends_with_its_end_by_default(self) -> None:
        files = build_tokenizer(unigram(), source="test")
        assert (files.add_bos, files.add_eos, files.eos_ids) == (False, True, (1,))

    def test_fillers_do_not_change_what_an_unknown_character_costs(self) -> None:
        types = np.array([CONTROL, CONTROL, UNKNOWN, NORMAL, NORMAL, NORMAL, UNUSED])
        scores = np.array([0, 0, 0, -1, -2, -2.5, -10000], np.float32)
        tokens = [*unigram()["tokenizer.ggml.tokens"], "[PAD6]"]
        filled = unigram(tokens=tokens, token_type=types, scores=scores)
        vocab = json.loads(build_tokenizer(filled, source="test").tokenizer_json)["model"]["vocab"]
        assert min(score for _, score in vocab) == -2.5
        assert vocab[6] == [" [PAD6]", 0.0]


class TestWordPiece:
    def test_the_document_alone_gives_the_longest_pieces(self) -> None:
        assert pieces(word_piece(), "HelloIng a b") == ["hello", "##ing", "a", "[UNK]"]

    def test_texts_are_surrounded_whatever_the_file_says(self) -> None:
        metadata = word_piece(add_bos_token=False, add_eos_token=False)
        assert pieces(metadata, "a", add_special_tokens=True) == ["[CLS]", "a", "[SEP]"]
        files = build_tokenizer(metadata, source="test")
        assert (files.bos_id, files.eos_ids, files.add_bos, files.add_eos) == (1, (2,), True, True)
