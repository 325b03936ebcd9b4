"""Texts that tokenizers get wrong; the same on every machine.

``tests/data/make_tokenizer_ids.py`` gives them to llama.cpp, ``tests/test_tokenizer_ids.py`` to rlxc, with the
vocabularies of ``tokenizer_cases.py``.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|user|>", "<|end|>"]
OVERLAPPING = ["|||IP|||", "|||NUMBER|||"]
USER_DEFINED = ["<h1>", "\n\n\n", "    "]
CHUNK = 20  # texts to a digest
TEXTS, BYTE_TEXTS = (3, 2400), (4, 600)  # seed and number of those that the reference holds
DIGEST = 10  # hexadecimal digits

_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "aàáâãäåæçèéêëßøœñÀÉÎÕÜŒǅǆĳſİıK",
    "абвгдежзийАБВГДЕЖЗЙёЁђЂ",
    "αβγδεζηθΑΒΓΔΕΖΩςάΆ",
    "你好世界今天去吃饭吧的一是在不了有和人这中大为上个国我以要",
    "こんにちはカタカナひらがなーｶﾀｶﾅゞ",
    "안녕하세요세계각힣가",
    "مرحبابالعالمكيفحالكـ",
    "שלוםעולםבראשית",
    "नमस्तेदुनियाकिहैंक्षी",
    "สวัสดีชาวโลกำเ",
    "ვეფხისᲢᲧᲐᏣᎳᎩᏗꮳꮃ𐐀𐐨𐒰𞤀",
    "ʰʲᵃⁿ々〆ªº",
)
_DIGITS = ("0123456789", "٠١٢٣٤٥٦٧٨٩", "०१२३४५६७८९", "０１２３", "²³¹½¼ⅧⅨ①⑳", "𝟎𝟏𝟗〇一二三")
_SPACES = (
    " ",
    "  ",
    "   ",
    "\t",
    "\n",
    "\r\n",
    "\r",
    "\n\n",
    "\u00a0",
    "\u3000",
    "\u2003",
    "\u2028",
    "\x85",
    "\x0b",
    "\x0c",
)
_MARKS = (
    "\u0301",
    "\u0308",
    "\u0323\u0302",
    "\u20dd",
    "\ufe0f",
    "\u093f",
    "\u0e33",
    "\u0345",
    "\u05b0",
    "\u0338",
)
_PUNCTUATION = tuple("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") + tuple("—“”‘’…¿¡。，、！？「」§¶·€£©™×÷→∑√≠♥★")
_CONTRACTIONS = (
    "'s",
    "'t",
    "'re",
    "'ve",
    "'m",
    "'ll",
    "'d",
    "'S",
    "'T",
    "'RE",
    "'Ve",
    "'LL",
    "’s",
    "’re",
    "'x",
    "'ſ",
    "'",
)
_EMOJI = ("😀", "😃", "👨‍👩‍👧‍👦", "🏳️‍🌈", "👍🏽", "🇩🇪", "🇫🇷🇯🇵", "❤️", "1️⃣", "☃", "🫠")
_ODD = (
    *(
        "\x00",
        "\x01",
        "\x1b[0m",
        "\x7f",
        "\u200b",
        "\u200d",
        "\u200e",
        "\ufeff",
        "\u00ad",
        "\ufffd",
        "\ufffe",
        "\uffff",
    ),
    *(
        "\ue000",
        "\U000f0000",
        "\U0010ffff",
        "\u0378",
        "\U000e0001",
        "\U0001fbfa",
        "\u2581",
        "\u2581\u2581",
        "\u0130",
    ),
    *(
        "<0x41>",
        "<0x0A>",
        "<0xZZ>",
        "<unk>",
        "[UNK]",
        "[MASK]",
        "<s",
        "s>",
        "<|",
        "|>",
        "＜s＞",
        "&amp;",
        "\\n",
    ),
    *(
        "def f(x):\n    return x\n",
        "for(i=0;i<10;++i){}",
        '{"k": [1, -3e10]}',
        "http://a.b/c?d=e#f",
        "a@b.com",
    ),
    *("ﬁ", "ﷺ", "Å", "Ⅻ", "㎏", "ｈｅｌｌｏ", "e\u0301", "q\u0307\u0323", "각", "ㄱ", "\u1100\u1161\u11a8"),
)
_INVALID = (
    *(
        b"\x80",
        b"\xbf\xbf",
        b"\xff",
        b"\xfe",
        b"\xc3",
        b"\xc3(",
        b"\xe2\x82",
        b"\xe2\x28\xa1",
        b"\xf0\x9f\x98",
    ),
    *(
        b"\xf0\x9f",
        b"\xc0\x80",
        b"\xc1\xbf",
        b"\xe0\x80\xaf",
        b"\xf0\x80\x80\xaf",
        b"\xed\xa0\x80",
        b"\xed\xbf\xbf",
    ),
    *(b"\xed\xa0\xbd\xed\xb8\x80", b"\xf8\x88\x80\x80\x80", b"\xe4\xbd", b"\xa0\xe5", b"\xc2"),
)


class Dice:
    """Chances from the one method of `random.Random` whose stream is promised never to change."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def below(self, n: int) -> int:
        """Return a number from 0 to n - 1."""
        return int(self._random() * n)

    def pick(self, items: Sequence[Any]) -> Any:
        """Return one of the items."""
        return items[self.below(len(items))]


def texts(seed: int, count: int) -> list[str]:
    """Texts of up to 40 parts each: words, digits, spaces, punctuation, emoji, special tokens and oddities."""
    dice = Dice(seed)
    return [_text(dice) for _ in range(count)]


def byte_texts(seed: int, count: int) -> list[bytes]:
    """Texts with bytes in them that are no UTF-8, but none that would be a number beyond Unicode."""
    dice = Dice(seed)
    made = []
    for _ in range(count):
        parts = [_text(dice).encode() for _ in range(1 + dice.below(3))]
        made.append(
            b"".join(part + dice.pick(_INVALID) for part in parts) + dice.pick((b"", b"a", b" ", b"<s>"))
        )
    return made


def _text(dice: Dice) -> str:
    length = dice.pick((1, 2, 3, 5, 8, 13, 40))
    parts = [_part(dice) for _ in range(length)]
    if dice.below(50) == 0:
        parts.append(
            dice.pick(("a", " ", "\n", "7", "-", "é", "你", "\t ", "ab", "\u0301")) * (20 + dice.below(300))
        )
    return "".join(parts)


def _part(dice: Dice) -> str:
    kind = dice.below(20)
    if kind < 6:
        return _word(dice)
    if kind < 10:
        return str(dice.pick(_SPACES))
    if kind < 12:
        digits = dice.pick(_DIGITS)
        return "".join(dice.pick(digits) for _ in range(1 + dice.below(7)))
    if kind < 14:
        return "".join(dice.pick(_PUNCTUATION) for _ in range(1 + dice.below(3)))
    other = (_CONTRACTIONS, _MARKS, _EMOJI, _ODD, _ODD, [*SPECIAL, *USER_DEFINED])[kind - 14]
    return str(dice.pick(other))


def _word(dice: Dice) -> str:
    alphabet = dice.pick(_ALPHABETS)
    word = "".join(dice.pick(alphabet) for _ in range(1 + dice.below(8)))
    return str(dice.pick((word, word, word.capitalize(), word.upper(), " " + word, word + dice.pick(_MARKS))))


def chunks(items: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Several texts at a time."""
    return (items[i : i + CHUNK] for i in range(0, len(items), CHUNK))


def digest(ids: Sequence[Sequence[int]]) -> str:
    """What the reference stores of the ids of a chunk."""
    return hashlib.sha256(repr([list(row) for row in ids]).encode()).hexdigest()[:DIGEST]
