"""Bytes that are no UTF-8, read as llama.cpp reads them.

It takes a character's length from its first byte and asks of the others only that they continue one: so longer ways to
write a character, and halves of surrogate pairs, are characters to it.
"""

from __future__ import annotations

_LENGTHS = (1,) * 12 + (2, 2, 3, 4)
SURROGATES = range(0xD800, 0xE000)
_REPLACEMENT = 0xFFFD
_UNICODE = 0x110000


def leading_length(byte: int) -> int:
    """The number of bytes that a character's first byte announces; 1 for a byte that begins none."""
    return _LENGTHS[byte >> 4]


def sequence_length(text: bytes, at: int) -> int:
    """The length of the sequence that begins at a place: a first byte and as many as it announces; 0 for none."""
    first = text[at]
    if first < 0x80:
        return 1
    length = leading_length(first)
    if length == 1 or first >= 0xF8:
        return 0
    following = text[at + 1 : at + length]
    whole = len(following) == length - 1 and all(byte >> 6 == 0b10 for byte in following)
    return length if whole else 0


def code_points(text: bytes) -> list[int]:
    """The characters of a text, with U+FFFD for every byte that is part of none.

    A number beyond Unicode, over which llama.cpp fails, counts as such bytes.
    """
    points = []
    at = 0
    while at < len(text):
        length = sequence_length(text, at)
        point = _code_point(text[at : at + length]) if length else _REPLACEMENT
        if point >= _UNICODE:
            point, length = _REPLACEMENT, 1
        points.append(point)
        at += max(length, 1)
    return points


def _code_point(sequence: bytes) -> int:
    point = sequence[0] & (0x7F if len(sequence) == 1 else 0x7F >> len(sequence))
    for byte in sequence[1:]:
        point = point << 6 | byte & 0x3F
    return point
