"""Tokenizers of Hugging Face folders: taken as they are, with what the files beside ``tokenizer.json`` say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from rlxc.errors import FormatError, ModelError, RlxcError, UnsupportedError
from rlxc.runtime.tokenizer import Tokenizer
from rlxc.vocab import DEFAULT_TEMPLATES, TokenizerFiles, build_tokenizer, tokenizer_of
from rlxc.vocab.huggingface import build_tokenizer_from_folder

Json = dict[str, Any]
WriteFolder = Callable[..., Path]

SPECIAL = ["<s>", "</s>", "<|im_end|>"]
WORDS = ["a", "b", "c", "\u0120", "ab", "abc", "\u0120a"]
MERGES = [("a", "b"), ("ab", "c"), ("\u0120", "a")]
SIZE = len(SPECIAL) + len(WORDS)
BOS, EOS, IM_END = range(3)
ROWS = 16
"""Of the embedding: more than there are tokens, as in many models."""


def byte_level(bos: bool = True, eos: bool = False) -> Json:
    """A byte-level ``tokenizer.json`` with the special tokens first, made by the library."""
    vocab = {text: i for i, text in enumerate([*SPECIAL, *WORDS])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    template = " ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos)
    tokens = [("<s>", BOS)] * bos + [("</s>", EOS)] * eos
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=tokens)
    made: Json = json.loads(tokenizer.to_str())
    return made


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """``write_folder(tokenizer, tokenizer_config={}, ...)``: a folder with these files; None leaves one out."""

    def write(tokenizer: Json | None = None, template: str | None = None, **files: Json | None) -> Path:
        files = {"tokenizer": tokenizer or byte_level(), "tokenizer_config": settings_of(), **files}
        for name, value in files.items():
            if value is not None:
                (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        if template is not None:
            (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8")
        return tmp_path

    return write


def settings_of(**changes: Any) -> Json:
    """A ``tokenizer_config.json``, with the two ways of writing a token."""
    return {"bos_token": {"__type": "AddedToken", "content": "<s>"}, "eos_token": "</s>", **changes}


def read(folder: Path) -> TokenizerFiles:
    return build_tokenizer_from_folder(folder, rows=ROWS)


def test_tokenizer_json_is_stored_byte_for_byte(write_folder: WriteFolder) -> None:
    folder = write_folder()
    assert read(folder).tokenizer_json == (folder / "tokenizer.json").read_bytes()


def test_the_runtime_encodes_and_decodes_as_the_library(write_folder: WriteFolder, tmp_path: Path) -> None:
    files = read(write_folder())
    ours = Tokenizer(tmp_path / "tokenizer.json", bos_id=files.bos_id, eos_ids=files.eos_ids)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    ids = ours.encode("abc ab<|im_end|>")
    assert ids == theirs.encode("abc ab<|im_end|>").ids == [BOS, 8, 6, 7, IM_END]
    assert ours.decode(ids) == theirs.decode(ids) == "abc ab"


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (True, True), (False, True)])
def test_what_is_added_is_what_the_post_processor_adds(
    write_folder: WriteFolder, bos: bool, eos: bool
) -> None:
    files = read(write_folder(byte_level(bos, eos)))
    assert (files.add_bos, files.add_eos) == (bos, eos)
    assert (files.bos_id, files.eos_ids[0]) == (BOS, EOS)


def test_a_post_processor_alone_tells_the_special_tokens(write_folder: WriteFolder) -> None:
    files = read(write_folder(byte_level(True, True), tokenizer_config=None))
    assert (files.bos_id, files.eos_ids[0]) == (BOS, EOS)


def test_eos_ids_are_the_tokenizer_s_then_the_generation_s_then_those_known_by_text(
    write_folder: WriteFolder,
) -> None:
    files = read(write_folder(generation_config={"eos_token_id": [5, EOS]}, config={"eos_token_id": 6}))
    assert files.eos_ids == (EOS, 5, IM_END)


def test_the_model_s_eos_counts_where_the_generation_has_none(write_folder: WriteFolder) -> None:
    files = read(write_folder(generation_config={"eos_token_id": None}, config={"eos_token_id": 6}))
    assert files.eos_ids == (EOS, 6, IM_END)


def test_ids_stand_in_for_a_missing_tokenizer_config(write_folder: WriteFolder) -> None:
    files = read(write_folder(byte_level(False), tokenizer_config=None, config={"bos_token_id": BOS}))
    assert (files.bos_id, files.add_bos) == (BOS, False)


def test_a_bos_that_is_null_is_none(write_folder: WriteFolder) -> None:
    settings = settings_of(bos_token=None)
    files = read(write_folder(byte_level(False), tokenizer_config=settings, config={"bos_token_id": BOS}))
    assert files.bos_id is None


def test_added_tokens_beyond_the_embedding_are_left_out(write_folder: WriteFolder) -> None:
    made = byte_level()
    image = {**made["added_tokens"][0], "id": SIZE, "content": "<image_soft_token>"}
    made["added_tokens"].append(image)
    settings = settings_of(added_tokens_decoder={"0": {"content": "<s>"}, str(SIZE): image})
    folder = write_folder(made, tokenizer_config=settings)
    assert build_tokenizer_from_folder(folder, rows=SIZE + 1).vocab_size == SIZE + 1
    files = build_tokenizer_from_folder(folder, rows=SIZE)
    assert files.vocab_size == SIZE
    assert "<image_soft_token>" not in tokenizers.Tokenizer.from_buffer(files.tokenizer_json).get_vocab()


def test_padding_and_truncation_are_switched_off(write_folder: WriteFolder) -> None:
    made = byte_level()
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(made))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    files = read(write_folder(json.loads(tokenizer.to_str())))
    assert len(tokenizers.Tokenizer.from_buffer(files.tokenizer_json).encode("abc" * 20).ids) == 21
    assert json.loads(files.tokenizer_json)["model"] == made["model"]


@pytest.mark.parametrize(
    ("files", "template"),
    [
        ({"template": "file", "tokenizer_config": settings_of(chat_template="settings")}, "file"),
        ({"tokenizer_config": settings_of(chat_template="settings")}, "settings"),
        (
            {
                "tokenizer_config": settings_of(
                    chat_template=[
                        {"name": "tool_use", "template": "tools"},
                        {"name": "default", "template": "default"},
                    ]
                )
            },
            "default",
        ),
        ({}, DEFAULT_TEMPLATES["<|im_start|>"]),
    ],
    ids=["file", "settings", "default of several", "by its tokens"],
)
def test_chat_template(write_folder: WriteFolder, files: Json, template: str) -> None:
    made = byte_level()
    made["added_tokens"].append({**made["added_tokens"][0], "id": SIZE, "content": "<|im_start|>"})
    assert read(write_folder(made, **files)).chat_template == template


def test_without_turn_tokens_there_is_no_template(write_folder: WriteFolder) -> None:
    assert read(write_folder()).chat_template is None


def test_tokenizer_of_chooses_by_what_the_path_is(write_folder: WriteFolder, tmp_path: Path) -> None:
    folder = write_folder()
    assert tokenizer_of(folder, {}, rows=ROWS) == read(folder)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "a"],
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, -1.0],
        "tokenizer.ggml.token_type": [2, 3, 3, 1],
    }
    found = tokenizer_of(tmp_path / "model.gguf", metadata, rows=ROWS)
    assert found == build_tokenizer(metadata, source="model.gguf")


def sentence_piece(**changes: Any) -> Json:
    """A vocabulary whose decoder is SentencePiece's, as Llama 2 has it."""
    vocab = {text: i for i, text in enumerate([*SPECIAL, "\u2581", "a", "<0x00>", "\u2581a"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("\u2581", "a")], byte_fallback=True))
    steps = {
        "replace": decoders.Replace("\u2581", " "),
        "bytes": decoders.ByteFallback(),
        "fuse": decoders.Fuse(),
        "strip": decoders.Strip(" ", 1, 0),
        **changes,
    }
    tokenizer.decoder = decoders.Sequence([step for step in steps.values() if step is not None])
    made: Json = json.loads(tokenizer.to_str())
    return made


def test_a_sentence_piece_decoder_is_accepted(write_folder: WriteFolder) -> None:
    assert read(write_folder(sentence_piece(), tokenizer_config=None)).vocab_size == 7


@pytest.mark.parametrize(
    "tokenizer",
    [
        {**byte_level(), "decoder": None},
        {**byte_level(), "decoder": {"type": "Fuse"}},
        {**byte_level(), "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        sentence_piece(replace=decoders.Replace("_", " ")),
        sentence_piece(replace=None),
        sentence_piece(bytes=None),
        sentence_piece(strip=decoders.Strip(" ", 2, 0)),
    ],
    ids=["none", "neither kind", "another kind", "other spaces", "no spaces", "no bytes", "strips more"],
)
def test_a_decoder_that_the_runtime_does_not_follow_is_refused(
    write_folder: WriteFolder, tokenizer: Json
) -> None:
    with pytest.raises(UnsupportedError, match="its decoder"):
        read(write_folder(tokenizer, tokenizer_config=None))


def with_template(*pieces: str) -> Json:
    made = byte_level()
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(made))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(pieces), special_tokens=[(text, i) for i, text in enumerate(SPECIAL)]
    )
    changed: Json = json.loads(tokenizer.to_str())
    return changed


def with_unknown_id() -> Json:
    made = byte_level()
    made["post_processor"]["special_tokens"]["<s>"]["ids"] = [99]
    return made


def with_gap() -> Json:
    made = byte_level()
    made["model"]["vocab"]["abc"] = 14
    return made


DAMAGE: dict[str, tuple[Json, type[RlxcError], str]] = {
    "not a tokenizer": ({"tokenizer": {"model": {"type": "BPE"}}}, FormatError, "is no tokenizer"),
    "ids with gaps": ({"tokenizer": with_gap()}, UnsupportedError, "ids 0 to"),
    "added tokens no list": ({"tokenizer": {**byte_level(), "added_tokens": 3}}, FormatError, "added_tokens"),
    "two tokens before": ({"tokenizer": with_template("<s>", "</s>", "$A")}, UnsupportedError, "more than"),
    "two tokens after": ({"tokenizer": with_template("$A", "</s>", "</s>")}, UnsupportedError, "more than"),
    "unknown id before": ({"tokenizer": with_unknown_id()}, UnsupportedError, "more than"),
    "another bos": (
        {"tokenizer_config": settings_of(bos_token="</s>")},
        ModelError,
        "bos_token is token 1, but tokenizer.json adds token 0",
    ),
    "bos no token": (
        {"tokenizer_config": settings_of(bos_token="<bos>")},
        ModelError,
        "'<bos>', which is no",
    ),
    "bos not text": ({"tokenizer_config": settings_of(bos_token=[1])}, ModelError, "which is no token"),
    "add_bos otherwise": (
        {"tokenizer_config": settings_of(add_bos_token=False)},
        ModelError,
        "add_bos_token is False",
    ),
    "add_eos otherwise": (
        {"tokenizer_config": settings_of(add_eos_token=True)},
        ModelError,
        "add_eos_token is True",
    ),
    "added token elsewhere": (
        {"tokenizer_config": settings_of(added_tokens_decoder={"5": {"content": "</s>"}})},
        ModelError,
        "token 5 as '</s>', tokenizer.json has it as 1",
    ),
    "added token unknown": (
        {"tokenizer_config": settings_of(added_tokens_decoder={"11": {"content": "<pad>"}})},
        ModelError,
        "token 11 as '<pad>'",
    ),
    "eos out of range": ({"generation_config": {"eos_token_id": [99]}}, ModelError, "eos_token_id is"),
    "eos no number": ({"config": {"eos_token_id": "</s>"}}, ModelError, "eos_token_id is '</s>'"),
    "templates without default": (
        {"tokenizer_config": settings_of(chat_template=[{"name": "rag", "template": "x"}])},
        FormatError,
        "chat_template",
    ),
}


@pytest.mark.parametrize(("files", "error", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_contradictions_are_refused(
    write_folder: WriteFolder, files: Json, error: type[RlxcError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        read(write_folder(**files))
    assert "\n" not in str(caught.value)


def test_a_sentence_piece_model_alone_is_refused_with_a_way_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e")
    with pytest.raises(FormatError, match=r"no tokenizer.json, only tokenizer.model; .*save_pretrained"):
        read(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_file_that_is_not_text_is_refused(write_folder: WriteFolder, name: str) -> None:
    folder = write_folder()
    (folder / name).write_bytes(b"\xff{")
    with pytest.raises(FormatError, match=name):
        read(folder)


@settings(max_examples=60)
@given(data=st.data())
def test_damage_raises_only_our_errors(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    for name, content in (
        ("tokenizer.json", byte_level(True, True)),
        ("tokenizer_config.json", settings_of()),
    ):
        text = bytearray(json.dumps(content).encode())
        for _ in range(data.draw(st.integers(0, 3))):
            at = data.draw(st.integers(0, len(text) - 1))
            text[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=3))
        (folder / name).write_bytes(text)
    try:
        files = read(folder)
    except RlxcError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most examples raise, and all in one line
    else:
        assert files.vocab_size >= 1
