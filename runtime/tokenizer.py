"""Text to token ids and back, from an artifact's ``tokenizer.json``.

Encoding is done by the ``tokenizers`` library, with the help of ``pieces.py`` where that has other rules than
llama.cpp. Decoding is done here, on bytes: every token stands for a fixed byte string, so a text can be decoded token
by token in constant time each, and never differently from all at once.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path

import tokenizers

from rlxc.errors import ArtifactError, OptionError, SessionError
from rlxc.runtime.pieces import Pieces, byte_alphabet, byte_of
from rlxc.runtime.word_piece import spelling

_SPACE = "\u2581"  # what SentencePiece vocabularies write for a space
_BYTE_ALPHABET = byte_alphabet()


class Tokenizer:
    """A tokenizer loaded from a ``tokenizer.json``.

    Loading holds the GIL (half a second for 262,144 tokens): to overlap it with other work, put that in a thread.

    Attributes:
        vocab_size: number of tokens; ids are 0 ... vocab_size - 1.
        bos_id: the token that begins a text, if the model has one.
        eos_ids: tokens at which generation stops.
    """

    def __init__(self, path: str | Path, *, bos_id: int | None = None, eos_ids: Iterable[int] = ()) -> None:
        """Loads ``path``; ``bos_id`` and ``eos_ids`` come from the artifact's manifest.

        Raises:
            ArtifactError: the file is missing or damaged, or an id is outside its vocabulary.
        """
        path = Path(path)
        if not path.is_file():
            raise ArtifactError("there is no such file", source=path, remedy="compile the model again")
        try:
            raw = path.read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_buffer(raw)
        except Exception as error:  # the library raises nothing narrower
            raise ArtifactError(
                f"not a tokenizer: {error}", source=path, remedy="compile the model again"
            ) from error
        self.vocab_size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        for token_id in (*self.eos_ids, *(() if bos_id is None else (bos_id,))):
            if not 0 <= token_id < self.vocab_size:
                raise ArtifactError(
                    f"token {token_id} is outside the vocabulary of {self.vocab_size} tokens", source=path
                )
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        kinds = _decoder_kinds(self._tokenizer)
        self._byte_level, self._word_piece = "ByteLevel" in kinds, "WordPiece" in kinds
        self._strips = bool(kinds & {"Strip", "WordPiece"})
        self._pieces = Pieces(self._tokenizer, raw, byte_level=self._byte_level)

    def encode(self, text: str | bytes, *, add_special: bool = True) -> list[int]:
        """Returns the ids of ``text``; special tokens written out in it count as such.

        Args:
            text: any text; or bytes, of which those that are no UTF-8 become what llama.cpp makes of them: byte
                tokens in a SentencePiece vocabulary, U+FFFD in others.
            add_special: put the model's begin (and end) tokens around it, as its vocabulary asks for.

        Raises:
            SessionError: the text holds half a surrogate pair.
        """
        try:
            data = text if isinstance(text, bytes) else text.encode()
        except (AttributeError, UnicodeEncodeError) as error:
            raise SessionError("the prompt is not valid Unicode text") from error
        if not self._pieces.needed:
            try:
                ids: list[int] = self._tokenizer.encode(data.decode(), add_special_tokens=add_special).ids
            except UnicodeDecodeError:
                pass
            else:
                return ids
        ids = self._pieces.encode(data)
        return self._surrounded(ids) if add_special else ids

    def _surrounded(self, ids: list[int]) -> list[int]:
        """Puts around ids what the document puts around any text."""
        around = self._tokenizer.encode("a", add_special_tokens=True)
        mask = around.special_tokens_mask
        before = len(list(takewhile(bool, mask)))
        if before == len(mask):  # no token for the letter
            before = int(around.ids[:1] == [self.bos_id])
        after = len(list(takewhile(bool, reversed(mask[before:]))))
        return [*around.ids[:before], *ids, *around.ids[len(mask) - after :]]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True, continuation: bool = False) -> str:
        """Returns the text of ``ids``; bytes that are no UTF-8 become U+FFFD.

        Args:
            ids: token ids.
            skip_special: leave control tokens out.
            continuation: the ids go on from a text before them. Where the vocabulary puts a space before every
                text, decoding takes it away again; a continuation keeps it.

        Raises:
            SessionError: an id is outside the vocabulary.
        """
        data = b"".join(self.piece_bytes(token_id, skip_special=skip_special) for token_id in ids)
        if self._strips and not continuation:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", errors="replace")

    def piece(self, token_id: int) -> str:
        """Returns one token as text, control tokens included; part of a character becomes U+FFFD."""
        return self.piece_bytes(token_id, skip_special=False).decode("utf-8", errors="replace")

    def piece_bytes(self, token_id: int, *, skip_special: bool = True) -> bytes:
        """Returns the bytes that one token stands for: maybe only part of a character.

        Raises:
            SessionError: the id is outside the vocabulary.
        """
        if skip_special and token_id in self._special:
            return b""
        added = self._added.get(token_id)
        if added is not None:
            return added
        known = 0 <= token_id < self.vocab_size
        token: str | None = self._tokenizer.id_to_token(token_id) if known else None
        if token is None:
            raise SessionError(f"token {token_id} is outside the vocabulary of {self.vocab_size} tokens")
        if self._byte_level:
            spelt = all(char in _BYTE_ALPHABET for char in token)
            return bytes(_BYTE_ALPHABET[char] for char in token) if spelt else token.encode()
        text = spelling(token) if self._word_piece else token
        byte = byte_of(text)
        return text.replace(_SPACE, " ").encode() if byte is None else bytes([byte])


def _decoder_kinds(tokenizer: tokenizers.Tokenizer) -> frozenset[str]:
    """Returns the kinds of the steps that decoding consists of."""
    if tokenizer.decoder is None:
        return frozenset()
    state = json.loads(tokenizer.decoder.__getstate__())
    return frozenset(step["type"] for step in state.get("decoders", [state]))


class TextStream:
    """Turns ids into text one at a time; the pieces, with :meth:`flush`, add up to :meth:`Tokenizer.decode`.

    Half a character is held back until the rest of it arrives.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, continuation: bool = False
    ) -> None:
        """Takes the options of :meth:`Tokenizer.decode`."""
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip = tokenizer._strips and not continuation
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Returns the text that ``token_id`` completes, which may be empty."""
        data = self._tokenizer.piece_bytes(token_id, skip_special=self._skip_special)
        if self._strip and data:
            data = data.removeprefix(b" ")
            self._strip = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """Returns what is left when no more ids come: U+FFFD if a character was cut short, else nothing."""
        return self._utf8.decode(b"", final=True)


class StopMatcher:
    """Cuts streamed text at the first stop string completed, however the text is divided into pieces."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises OptionError for a stop string that is empty or no string."""
        if isinstance(stops, str):
            stops = [stops]
        for stop in stops:
            if not isinstance(stop, str) or not stop:
                raise OptionError(f"stop strings are non-empty text, not {stop!r}", source="stop")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, text: str) -> tuple[str, bool]:
        """Returns the text that is safe to show, and whether a stop string has been met (and is cut off)."""
        if self._stopped:
            return "", True
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held, self._stopped = "", True
            return text[: min(found)[1]], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        shown = len(text) - keep
        self._held = text[shown:]
        return text[:shown], False

    def flush(self) -> str:
        """Returns the text that was held back as a possible beginning of a stop string."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without completing it."""
    return next(
        (n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])),
        0,
    )
