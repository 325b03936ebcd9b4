"""SentencePiece BPE (``tokenizer.ggml.model`` = ``llama``): scores instead of merges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from rlxc.errors import ModelError, UnsupportedError
from rlxc.vocab.keys import SPACE, Keys, Vocabulary, shown
from rlxc.vocab.parts import Parts, bpe, marked_spaces, replace

_MAX_TOKEN = 1024  # characters; deriving a merge is quadratic in them


def sentence_piece(vocabulary: Vocabulary, keys: Keys) -> Parts:
    """The parts; refuses scores that do not say which merge goes first."""
    tokens = vocabulary.tokens
    scores = keys.scores(len(tokens))
    best_first = _best_first(vocabulary, scores, keys.source)
    _check_characters(best_first, vocabulary, keys.source)
    _check_ties(best_first, vocabulary, scores, keys.source)
    prefix = keys.get("add_space_prefix", bool, True)
    escape = replace({"String": " "}, SPACE)
    unknown = keys.token_id("unknown", len(tokens), 0)
    return Parts(
        normalizer=(
            {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, escape]}
            if prefix
            else escape
        ),
        pre_tokenizer=None,
        decoder=marked_spaces(strip=prefix),
        model=lambda: bpe(
            vocabulary.ids,
            _merges_from_scores(best_first),
            unk_token=None if unknown is None else tokens[unknown],
            byte_fallback=all(f"<0x{byte:02X}>" in vocabulary.ids for byte in range(256)),
        ),
        add_bos=True,
        bos_id=1,
        eos_id=2,
    )


def _best_first(vocabulary: Vocabulary, scores: np.ndarray[Any, Any], source: object) -> list[str]:
    """The tokens that merges can make, by score, then by id."""
    # An added token is cut out of the text beforehand, so its text never comes up here, unless it is
    # spelt with the mark that spaces are turned into afterwards.
    best_first = [
        text
        for i in np.argsort(-scores, kind="stable").tolist()
        if " " not in (text := vocabulary.tokens[i]) and (not vocabulary.is_added(i) or SPACE in text)
    ]
    longest = max(best_first, key=len, default="")
    if len(longest) > _MAX_TOKEN:
        raise ModelError(
            f"token {vocabulary.ids[longest]} has {len(longest)} characters; the limit is {_MAX_TOKEN}",
            source=source,
        )
    return best_first


def _merges_from_scores(best_first: list[str]) -> list[tuple[str, str]]:
    """Returns the merges that make BPE by rank equal to SentencePiece's BPE by score, best first.

    SentencePiece joins whichever two neighbours make the best-scored token, so any way to cut a token in two
    is a possible merge: twice as many as there are tokens. At most one of them ever happens. While nothing has
    been joined across the ends of a stretch of text, what happens inside does not depend on what is outside; so
    when two neighbours that spell token ``t`` meet, they are the last two symbols of BPE run on ``t`` alone, and
    that run has one such pair or none.
    """
    rank = {text: i for i, text in enumerate(best_first)}
    pairs = (_last_pair(text, rank) for text in best_first if len(text) > 1)
    return [pair for pair in pairs if pair is not None and pair[0] in rank and pair[1] in rank]


def _last_pair(text: str, rank: Mapping[str, int]) -> tuple[str, str] | None:
    """Runs BPE on ``text`` until two symbols are left; None if it gets stuck before."""
    never = len(rank)
    symbols = list(text)
    ranks = [rank.get(left + right, never) for left, right in pairwise(symbols)]
    while len(symbols) > 2:
        best = min(ranks)
        if best == never:
            return None
        i = ranks.index(best)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        del ranks[i]
        if i > 0:
            ranks[i - 1] = rank.get(symbols[i - 1] + symbols[i], never)
        if i < len(ranks):
            ranks[i] = rank.get(symbols[i] + symbols[i + 1], never)
    return symbols[0], symbols[1]


def _check_characters(best_first: list[str], vocabulary: Vocabulary, source: object) -> None:
    """Refuses tokens made of a character that is no token: the library joins tokens only."""
    known = set(best_first)
    for text in best_first:
        if known.issuperset(text) or next(_cuts(text, known), None) is None:
            continue
        missing = next(char for char in text if char not in known)
        raise UnsupportedError(
            f"token {vocabulary.ids[text]} is {shown(text)}, but {shown(missing)} is no token",
            source=source,
            remedy="use a vocabulary with every character that its tokens have",
        )


def _check_ties(
    best_first: list[str], vocabulary: Vocabulary, scores: np.ndarray[Any, Any], source: object
) -> None:
    """Refuses tokens of equal score where it matters which of them is joined first.

    Of equals, SentencePiece joins the leftmost in the text; ranks would join the lower id. Both come to the same if
    the tokens share no part that either could take from the other, and if none of them is itself a part of a token
    that is joined no later.
    """
    known = set(best_first)

    def score_of(text: str) -> float:
        return float(scores[vocabulary.ids[text]])

    tied: set[str] = set()
    for score, group in groupby(best_first, key=score_of):
        equals = list(group)
        if len(equals) < 2:  # nearly always
            continue
        equals = [text for text in equals if next(_cuts(text, known), None)]
        tied.update(equals if len(equals) > 1 else ())
        begun_by = {
            left: text for text in reversed(equals) for left, _ in _cuts(text, known)
        }  # the lowest id stays
        for text in equals:
            for _, right in _cuts(text, known):
                other = begun_by.get(right, text)
                if vocabulary.ids[other] < vocabulary.ids[text]:
                    raise _tie(text, other, score, source)
    for text in best_first if tied else ():
        for part in {part for cut in _cuts(text, known) for part in cut} & tied:
            if score_of(text) >= score_of(part):
                raise _tie(part, text, score_of(part), source)


def _cuts(text: str, known: set[str]) -> Iterator[tuple[str, str]]:
    """Every way to make a text of two symbols: known tokens or single characters."""
    for i in range(1, len(text)):
        left, right = text[:i], text[i:]
        if (i == 1 or left in known) and (i == len(text) - 1 or right in known):
            yield left, right


def _tie(one: str, other: str, score: float, source: object) -> UnsupportedError:
    return UnsupportedError(
        f"tokens {shown(one)} and {shown(other)} compete at score {score:g}, so the scores do not say which is "
        "made first",
        source=source,
        remedy="convert the model again, from its tokenizer.model",
    )
