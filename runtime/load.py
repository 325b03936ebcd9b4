"""Opening an artifact for running."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from time import sleep

from rlxc.artifact import Artifact
from rlxc.errors import OptionError
from rlxc.runtime.engines import find_engine, loads_slowly
from rlxc.runtime.loaded import Loaded, ReadTokenizer
from rlxc.runtime.session import Session
from rlxc.runtime.threads import choose_threads
from rlxc.runtime.tokenizer import Tokenizer

DEFAULT_PREFIX_CACHE = 128 << 20
"""Bytes of keys and values that a session keeps of what it has read."""

_HEAD_START = 0.03  # seconds


def load(
    path: str | os.PathLike[str],
    *,
    threads: int | None = None,
    prefix_cache: int = DEFAULT_PREFIX_CACHE,
) -> Session:
    """Open an artifact for running.

    Digests are compared while the model loads; no result is given before they are known to be right. The tokenizer is
    read while a model loads that takes a while, and when it is first needed else.

    Args:
        path: the artifact.
        threads: how many to compute with; by default one for each physical core that this process may use.
        prefix_cache: bytes of keys and values to keep of what was read: a prompt that begins as an earlier one did is
            read from there on. 0 keeps nothing.

    Raises:
        ArtifactError: the artifact is damaged or is none.
        OptionError: ``threads`` or ``prefix_cache`` is out of range.
        SessionError: what runs this kind of artifact is not installed.
    """
    threads = choose_threads(threads)
    if isinstance(prefix_cache, bool) or not isinstance(prefix_cache, int) or prefix_cache < 0:
        raise OptionError(f"prefix_cache must be a number of bytes, 0 or more, got {prefix_cache!r}")
    artifact = Artifact.open(path)
    verification = artifact.start_verification()
    try:
        make_engine = find_engine(artifact, verification)
        read_tokenizer = _tokenizer_reader(artifact)
        if loads_slowly(artifact):
            read_tokenizer = _start(read_tokenizer)
        engine = make_engine(artifact, threads)
        loaded = Loaded(artifact, engine, verification, read_tokenizer, prefix_cache)
        try:
            return Session(loaded)
        except BaseException:
            loaded.close()
            raise
    except BaseException:
        verification.close()
        raise


def _tokenizer_reader(artifact: Artifact) -> ReadTokenizer:
    path, facts = artifact.file("tokenizer.json"), artifact.manifest.tokenizer
    return lambda: Tokenizer(path, bos_id=facts.bos_id, eos_ids=facts.eos_ids)


def _start(read: ReadTokenizer) -> ReadTokenizer:
    """Read the tokenizer in a thread: a large vocabulary takes half a second."""

    def later() -> Tokenizer:
        # The library holds the GIL while it reads. Let the engine come to its own reading first, which does not.
        sleep(_HEAD_START)
        return read()

    pool = ThreadPoolExecutor(1, thread_name_prefix="rlxc-tokenizer")
    tokenizer = pool.submit(later)
    pool.shutdown(wait=False)
    return tokenizer.result
