"""How byte-level vocabularies cut a text into words, by the names that ``tokenizer.ggml.pre`` uses.

The expressions are those of llama.cpp's ``llama-vocab.cpp``, so that the ids are its ids. For ``tekken``, ``gpt-4o``
and their kind it has simplified ones: every letter beyond ASCII counts as upper and lower case, and marks count as
symbols, where the models' own tokenizers tell them apart. Characters that Unicode added after its version 15 are the
one exception: here they are what they are in Unicode, and to llama.cpp they are symbols.
"""

from __future__ import annotations

from dataclasses import dataclass

_ENGLISH = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_SUFFIX = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_SPACES = r"\s+(?!\S)|\s+"
_TAIL = rf"\s*[\r\n]+|{_SPACES}"
_ASCII_WORD = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
_CHINESE = r"[一-龥぀-ゟ゠-ヿ]+"
_SENTENCE = r" ?[^(\s|.,!?…。，、।۔،)]+"


def _words(
    digits: str,
    *,
    suffix: str = _SUFFIX + "|",
    letters: str = r"\p{L}+",
    symbols: str = r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    tail: str = _TAIL,
) -> str:
    return rf"{suffix}[^\r\n\p{{L}}\p{{N}}]?{letters}|{digits}|{symbols}|{tail}"


def _cased_words(digits: str, *, suffix: str = "", letter: str = r"\p{L}") -> str:
    upper, lower = (rf"((?=[{letter}])([^{other}]))" for other in ("a-z", "A-Z"))
    head = rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+{suffix}|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*{suffix}"
    return rf"{head}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"


def _marked_words(symbols_tail: str, tail: str = _TAIL) -> str:
    return rf"{_ASCII_WORD}|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+| ?[\p{{P}}\p{{S}}]+{symbols_tail}|{tail}"


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
        (
            *("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "gigachat"),
            *("a.x-4.0", "mellum", "modern-bert", "roberta-bpe", "jina-es", "jina-de", "jina-v1-en"),
            *("jina-v2-es", "jina-v2-de", "jina-v2-code"),
        ),
        (_ENGLISH,),
    ),
    PreTokenizer(
        (
            *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
            "mellum2",
        ),
        (r"\p{N}", _ENGLISH),
    ),
    PreTokenizer(("falcon",), (r"[\p{P}\$\+<=>\^~\|`]+", _ENGLISH, "[0-9][0-9][0-9]")),
    PreTokenizer(
        (
            *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
            "jina-v5-nano",
        ),
        (_words(r"\p{N}{1,3}"),),
        ignore_merges=True,
        add_bos=True,
    ),
    PreTokenizer(("minicpm5",), (r"\p{N}{1,3}", _words(r"\p{N}+")), ignore_merges=True),
    PreTokenizer(("dbrx", "smaug-bpe", "chatglm-bpe"), (_words(r"\p{N}{1,3}"),)),
    PreTokenizer(("glm4",), (_words(r"\p{N}{1,3}"),), ignore_merges=True),
    PreTokenizer(
        (
            *("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2", "kormo"),
            "f2llmv2",
        ),
        (_words(r"\p{N}"),),
    ),
    PreTokenizer(
        ("qwen35",),
        (_words(r"\p{N}", letters=r"[\p{L}\p{M}]+", symbols=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"),),
    ),
    PreTokenizer(("ufakzeka",), (_words(r"\p{N}", suffix=""),)),
    PreTokenizer(("laguna",), (r"[^\n]+|[\n]+", _words(r"\p{N}"))),
    PreTokenizer(("seed-coder",), (_words(r"\p{N}", symbols=r" ?[^\s\p{L}\p{N}\r\n]+"),)),
    PreTokenizer(
        ("bailingmoe", "bailingmoe2", "llada-moe"), (_words(r"\p{N}", tail=rf"\s*[\r\n]|{_SPACES}"),)
    ),
    PreTokenizer(
        ("exaone-moe",),
        (
            _words(
                r"\p{N}",
                letters=r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+",
                symbols=r" ?[^\s\p{L}\p{N}]+[\r\n/]?",
                tail=rf"\s*[\r\n]|{_SPACES}",
            ),
        ),
    ),
    PreTokenizer(("tekken",), (_cased_words(r"\p{N}"),), ignore_merges=True, add_bos=True),
    PreTokenizer(
        ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
        (_cased_words(r"\p{N}{1,3}", suffix=_SUFFIX + "?"),),
    ),
    PreTokenizer(
        ("granite-embed-multi-97m",),
        (_cased_words(r"\p{N}{1,3}", suffix=_SUFFIX + "?", letter=r"\p{L}\p{M}"),),
        ignore_merges=True,
    ),
    PreTokenizer(
        ("deepseek-coder",), (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[[一-龥ࠀ-一가-퟿]&&[^\s]]+", r"\p{N}")
    ),
    PreTokenizer(
        ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"),
        (r"\p{N}{1,3}", _CHINESE, _marked_words(r"[\r\n]*")),
    ),
    PreTokenizer(
        ("spark2_5",),
        (r"\p{N}{1,3}", _CHINESE, _marked_words("", rf"[\r\n]|{_SPACES}"), r"\p{N}"),
    ),
    PreTokenizer(("bloom", "poro-chat", "gpt3-finnish"), (_SENTENCE,)),
    PreTokenizer(("viking",), (_SENTENCE, r"\p{N}")),
)
