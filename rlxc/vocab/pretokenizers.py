"""How byte-level vocabularies cut a text into words, by the names that ``tokenizer.ggml.pre`` uses.

The expressions are those of llama.cpp's ``llama-vocab.cpp``. For ``tekken`` and ``gpt-4o`` it has simplified ones,
which tell upper from lower case in ASCII only; here stand the models' own.
"""

from __future__ import annotations

from dataclasses import dataclass

_ENGLISH = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SUFFIX = r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _words(digits: str, letters: str = r"\p{L}", symbols: str = r"\p{L}\p{N}") -> str:
    head = rf"(?:{_SUFFIX})|[^\r\n\p{{L}}\p{{N}}]?{letters}+|{digits}"
    return rf"{head}| ?[^\s{symbols}]+[\r\n]*|{_TAIL}"


def _cased_words(digits: str, suffix: str) -> str:
    head = (
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{suffix}"
    )
    return rf"{head}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"


@dataclass(frozen=True)
class PreTokenizer:
    """How text is cut into words: each pattern cuts the pieces of the one before it further."""

    names: tuple[str, ...]
    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is itself a token is taken whole
    add_bos: bool = False  # unless the file says otherwise


PRE_TOKENIZERS = (
    PreTokenizer(("default",), (r"[\p{P}\$\+<=>\^~\|]+", _ENGLISH, r"\p{N}+", "[0-9][0-9][0-9]")),
    PreTokenizer(
        ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4"), (_ENGLISH,)
    ),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        (r"\p{N}", _ENGLISH),
    ),
    PreTokenizer(("falcon",), (r"[\p{P}\$\+<=>\^~\|`]+", _ENGLISH, "[0-9][0-9][0-9]")),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        (_words(r"\p{N}{1,3}"),),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), (_words(r"\p{N}{1,3}"),)),
    PreTokenizer(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open"), (_words(r"\p{N}"),)
    ),
    PreTokenizer(("qwen35",), (_words(r"\p{N}", letters=r"[\p{L}\p{M}]", symbols=r"\p{L}\p{M}\p{N}"),)),
    PreTokenizer(("tekken",), (_cased_words(r"\p{N}", ""),), ignore_merges=True, add_bos=True),
    PreTokenizer(("gpt-4o", "llama4"), (_cased_words(r"\p{N}{1,3}", rf"(?:{_SUFFIX})?"),)),
)
