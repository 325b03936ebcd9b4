"""WordPiece vocabularies: words are found by the ``tokenizers`` library, and their pieces by its model or here.

llama.cpp writes a word with the mark of a space before it. A piece that begins a word can then come up inside one, too,
where the text has such a mark: of that the library's model knows nothing.
"""

from __future__ import annotations

import tokenizers

_SPACE = "\u2581"
_GOES_ON = "##"


def spelling(token: str) -> str:
    """A token of a WordPiece vocabulary as it stands in a text with marked spaces."""
    return token.removeprefix(_GOES_ON) if token.startswith(_GOES_ON) else _SPACE + token


class WordPiece:
    """From a text without added tokens to ids."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Takes a tokenizer as rlxc writes it."""
        self._tokenizer = tokenizer
        added = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items()}
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        self._ids = {spelling(token): i for token, i in vocabulary.items() if token not in added} | added
        self._longest = max(map(len, self._ids))
        self._unknown: int = vocabulary[tokenizer.model.unk_token]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text."""
        normalized = self._tokenizer.normalizer.normalize_str(text)
        ids: list[int] = []
        for word, _ in self._tokenizer.pre_tokenizer.pre_tokenize_str(normalized):
            if _SPACE in word:
                ids += self._pieces(_SPACE + word)
            else:
                ids += [token.id for token in self._tokenizer.model.tokenize(word)]
        return ids

    def _pieces(self, word: str) -> list[int]:
        """The longest piece that begins the word, then that of the rest; one unknown token if one is missing."""
        ids: list[int] = []
        at = 0
        while at < len(word):
            ends = range(min(len(word), at + self._longest), at, -1)
            end = next((end for end in ends if word[at:end] in self._ids), None)
            if end is None:
                return [self._unknown]
            ids.append(self._ids[word[at:end]])
            at = end
        return ids
