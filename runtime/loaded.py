"""A loaded artifact: what a session and its forks use together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property
from itertools import count
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import finalize

from rlxc.artifact import Artifact, Verification
from rlxc.errors import SessionError
from rlxc.runtime.engines import Engine
from rlxc.runtime.model import Model
from rlxc.runtime.prefix import PrefixCache
from rlxc.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rlxc.runtime.chat import ChatTemplate

ReadTokenizer = Callable[[], Tokenizer]


class Loaded:
    """An artifact and the engine that runs it, until the last session that uses them is closed or gone.

    Attributes:
        artifact: what is loaded.
        verification: of its files' digests.
        model: runs it.
        prefixes: what was read before and may be read again.
    """

    def __init__(
        self,
        artifact: Artifact,
        engine: Engine[Any, Any],
        verification: Verification,
        read_tokenizer: ReadTokenizer,
        prefix_cache: int,
    ) -> None:
        self.artifact, self.verification = artifact, verification
        self.model = Model(artifact, engine, verification)
        self.prefixes = PrefixCache(self.model, prefix_cache)
        self._read_tokenizer = read_tokenizer
        self._lock = threading.Lock()
        self._numbers, self._users = count(), set[int]()
        self._closing = threading.Lock()  # taken once, and kept

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Text to token ids and back."""
        self.verification.wait("tokenizer.json")
        return self._read_tokenizer()

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """How messages become a prompt, or None if the model has no chat format."""
        # Imported here because jinja2 takes a while, and most sessions do not chat.
        from rlxc.runtime.chat import ChatTemplate

        name = "chat_template.jinja"
        if name not in self.artifact.manifest.files:
            return None
        source = self.artifact.file(name)
        self.verification.wait(name)
        bos, eos = self.tokenizer.bos_id, self.tokenizer.eos_ids[:1]
        return ChatTemplate(
            source.read_text(encoding="utf-8"),
            bos_token="" if bos is None else self.tokenizer.piece(bos),
            eos_token=self.tokenizer.piece(eos[0]) if eos else "",
        )

    def lock(self) -> None:
        """Keep other threads out, until :meth:`unlock`.

        Raises:
            SessionError: one is in.
        """
        if not self._lock.acquire(blocking=False):
            raise SessionError(
                "another thread is using the session, or a fork of it",
                remedy="load one session for each thread",
            )

    def unlock(self) -> None:
        """Let other threads in."""
        self._lock.release()

    def enter(self) -> int:
        """One more session uses it; returns its number."""
        number = next(self._numbers)
        self._users.add(number)
        return number

    def leave(self, number: int) -> None:
        """That session does no more; after the last one, the engine is closed."""
        self._users.discard(number)
        if not self._users:
            self.close()

    def close(self) -> None:
        """Release everything; nobody uses it, or will."""
        if self._closing.acquire(blocking=False):
            self.verification.close()
            self.prefixes.clear()
            self.model.engine.close()


class Lease:
    """One session's use of what is loaded, until the session is closed, or is gone without having been closed.

    Args:
        loaded: what the session uses.
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self._leave = finalize(self, loaded.leave, loaded.enter())
        self._leave.atexit = False  # the process ends: so does all that it has

    @property
    def is_open(self) -> bool:
        """Whether the session may still be used."""
        return self._leave.alive

    def check_open(self) -> None:
        """Refuse a session that is closed.

        Raises:
            SessionError: it is.
        """
        if not self.is_open:
            raise SessionError("the session is closed", remedy="load the artifact again")

    def using(self) -> AbstractContextManager[None]:
        """Keep other threads out, in a ``with`` statement.

        Raises:
            SessionError: one is in, or the session is closed.
        """
        return self  # no generator: a snapshot takes little longer than one

    def __enter__(self) -> None:
        self._loaded.lock()
        if not self.is_open:
            self._loaded.unlock()
            self.check_open()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loaded.unlock()

    def close(self) -> None:
        """The session is used no more."""
        self._leave()
