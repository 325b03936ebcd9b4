"""A snapshot as a file: a safetensors file whose every byte is vouched for by a sha256 in its header.

Tensors: ``tokens`` I64 ``[seq_len]``; for each layer that has a cache of its own ``layers.N.keys`` and
``layers.N.values`` ``[n, kv_dim]`` as they are stored (F32, F16, BF16, or I8 codes), and with codes
``layers.N.key_scales`` and ``layers.N.value_scales`` F32 ``[n, heads]``. Metadata:

- ``format``, ``version``: what this file is;
- ``model``, ``identity``, ``parts``: the model's name; see :mod:`rlxc.runtime.identity`;
- ``first``: the position of each layer's first row, null for a layer that has none;
- ``readings``, ``invoked``: as in :class:`~rlxc.runtime.sequence.TokenSequence`, as JSON;
- ``sha256``: of the whole file, with 64 zeros in place of this digest.

A digest finds damage; it is no signature. So a file is not believed for having the right one: each field is checked
against the artifact's plan.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from rlxc.artifact import KvLayer, KvPlan, Manifest
from rlxc.artifact.write import sync_folder
from rlxc.dtypes import DType
from rlxc.errors import SnapshotError
from rlxc.runtime.engines import KvRows
from rlxc.runtime.identity import identity, mismatch, parts
from rlxc.runtime.sequence import Reading, Tokens

FORMAT = "rlxc-snapshot"
VERSION = 1

_LARGEST_HEADER = 64 << 20
_MOST_TOKENS = 2**31 - 1  # that a context can have
_ALIGNMENT = 8
_LENGTH_BYTES = 8  # of the number that a safetensors file begins with: how long its header is
_NO_DIGEST = "0" * 64
_DIGEST = re.compile(rb'"sha256":"([0-9a-f]{64})"')
_DAMAGED = "copy it again, or make the snapshot again"
_ELSEWHERE = "give another path, in a folder that exists, on a disk with room"
_OURS = "give a file that snapshot.save() wrote"


class _Stored(NamedTuple):
    """A type of elements, as safetensors and numpy call it."""

    name: str
    dtype: np.dtype[Any]


_STORED = {
    DType.F32: _Stored("F32", np.dtype("<f4")),
    DType.F16: _Stored("F16", np.dtype("<f2")),
    DType.BF16: _Stored("BF16", np.dtype("<u2")),
    DType.INT8: _Stored("I8", np.dtype("i1")),
    DType.I64: _Stored("I64", np.dtype("<i8")),
}


@dataclass(frozen=True)
class Contents:
    """What a snapshot's file holds.

    Attributes:
        tokens: ``int64 [seq_len]``.
        readings: what they were read with, each from that token on.
        invoked: where activated adapters joined in, by fingerprint.
        layers: rows as a cache gives and takes them.
    """

    tokens: Tokens
    readings: Sequence[tuple[int, Reading]]
    invoked: Mapping[str, int]
    layers: Sequence[KvRows]


def write_contents(path: Path, contents: Contents, manifest: Manifest) -> None:
    """Write a snapshot of an artifact's model, under a hidden name first.

    Raises:
        SnapshotError: it cannot be written; a file of this name is as it was.
    """
    plan = manifest.kv_cache
    firsts = [
        rows.first if layer.shares is None else None for layer, rows in zip(plan.layers, contents.layers)
    ]
    arrays: dict[str, npt.NDArray[Any]] = {"tokens": contents.tokens}
    for layer, rows in zip(plan.layers, contents.layers):
        for name, array in zip(_names(layer), (rows.keys, rows.values, rows.key_scales, rows.value_scales)):
            assert array is not None
            arrays[name] = array
    places = _places(plan, len(contents.tokens), firsts)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "model": manifest.model.name,
        "identity": identity(manifest),
        "parts": json.dumps(parts(manifest)),
        "first": json.dumps(firsts),
        "readings": json.dumps(contents.readings),
        "invoked": json.dumps(contents.invoked),
        "sha256": _NO_DIGEST,
    }
    header = _header(metadata, places)
    if len(header) > _LARGEST_HEADER:
        raise SnapshotError(
            f"adapters or their scales changed at {len(contents.readings)} tokens, more than a file can tell",
            source=path,
        )
    data = [np.ascontiguousarray(arrays[place.name], place.stored.dtype).data for place in places]
    digest = hashlib.sha256(header)
    for piece in data:
        digest.update(piece)
    signed = f'"sha256":"{digest.hexdigest()}"'.encode()
    with _replacing(path) as file:
        file.write(_DIGEST.sub(signed, header, count=1))
        for piece in data:
            file.write(piece)


def read_contents(path: Path, manifest: Manifest) -> Contents:
    """Read a snapshot of an artifact's model; its arrays are views of the file's bytes in memory.

    Raises:
        SnapshotError: it cannot be read, is damaged or of something else, or a field is not as it must be.
    """
    data = _read(path, _most_bytes(manifest.kv_cache))
    header = _intact_header(path, data)
    start = _LENGTH_BYTES + len(header)
    try:
        entries = _object(_json(header, "the header"), "the header")
        metadata = _object(entries.pop("__metadata__", None), "the metadata")
        _check_kind(path, metadata, manifest)
        return _contents(entries, metadata, data[start:], manifest)
    except _Wrong as wrong:
        raise SnapshotError(wrong.problem, source=path, remedy=wrong.remedy) from None


# --- what lies where ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A tensor of the file; ``begin`` and ``end`` are bytes from the header's end."""

    name: str
    stored: _Stored
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        return self.begin + math.prod(self.shape) * self.stored.dtype.itemsize

    @property
    def entry(self) -> dict[str, Any]:
        return {"dtype": self.stored.name, "shape": list(self.shape), "data_offsets": [self.begin, self.end]}


def _names(layer: KvLayer) -> tuple[str, ...]:
    """The tensors of a layer, in the order of the fields of `KvRows`; one that shares another's cache has none."""
    if layer.shares is not None:
        return ()
    kinds = ("keys", "values", "key_scales", "value_scales")[: 4 if layer.dtype is DType.INT8 else 2]
    return tuple(f"layers.{layer.index}.{kind}" for kind in kinds)


def _places(plan: KvPlan, count: int, firsts: Sequence[int | None]) -> list[_Place]:
    """Where everything lies that a sequence of ``count`` tokens has: wide elements first, so that all are aligned."""
    wanted: list[tuple[str, DType, tuple[int, ...]]] = [("tokens", DType.I64, (count,))]
    for layer, first in zip(plan.layers, firsts):
        if first is None:
            continue
        keys, values, *scales = _names(layer)
        for name in (keys, values):
            wanted.append((name, layer.dtype, (count - first, layer.heads * layer.head_dim)))
        for name in scales:
            wanted.append((name, DType.F32, (count - first, layer.heads)))
    wanted.sort(key=lambda tensor: -_STORED[tensor[1]].dtype.itemsize)
    places: list[_Place] = []
    for name, dtype, shape in wanted:
        places.append(_Place(name, _STORED[dtype], shape, places[-1].end if places else 0))
    return places


def _most_bytes(plan: KvPlan) -> int:
    """The largest file that a full sequence could have."""
    firsts = [
        None if layer.shares is not None else max(0, plan.context - layer.capacity) for layer in plan.layers
    ]
    return _LENGTH_BYTES + _LARGEST_HEADER + _places(plan, plan.context, firsts)[-1].end


def _header(metadata: Mapping[str, str], places: Sequence[_Place]) -> bytes:
    """The beginning of the file, up to the data."""
    tree = {"__metadata__": metadata, **{place.name: place.entry for place in places}}
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


# --- reading ------------------------------------------------------------------------------------------------------


def _read(path: Path, most: int) -> npt.NDArray[np.uint8]:
    """The bytes of a file."""
    try:
        status = os.stat(path)  # before opening, because opening a pipe would wait
        if not stat.S_ISREG(status.st_mode):
            raise SnapshotError("is not a plain file", source=path, remedy=_OURS)
        if status.st_size > most:
            raise SnapshotError(
                f"has {status.st_size} bytes, more than a snapshot of this artifact can have",
                source=path,
                remedy="use an artifact of the model that the snapshot was made with, with as much context",
            )
        with open(path, "rb") as file:
            return np.fromfile(file, np.uint8, status.st_size)
    except MemoryError:
        raise SnapshotError("there is not enough memory to read it", source=path) from None
    except (OSError, ValueError) as error:  # a ValueError is about the path itself
        why = getattr(error, "strerror", None) or error
        raise SnapshotError(f"cannot be read ({why})", source=path, remedy=_OURS) from None


def _intact_header(path: Path, data: npt.NDArray[np.uint8]) -> bytes:
    """The text of the header, once the file is known to have its digest."""
    length = int.from_bytes(data[:_LENGTH_BYTES].tobytes(), "little")
    header = data[_LENGTH_BYTES:][: min(length, _LARGEST_HEADER)].tobytes()
    found = _DIGEST.search(header)
    if len(header) != length or length % _ALIGNMENT or found is None:
        raise SnapshotError("is no snapshot, or only a part of one", source=path, remedy=_OURS)
    digest = hashlib.sha256(data[:_LENGTH_BYTES].data)
    digest.update(header[: found.start(1)] + _NO_DIGEST.encode() + header[found.end(1) :])
    digest.update(data[_LENGTH_BYTES + length :].data)
    if digest.hexdigest().encode() != found[1]:
        raise SnapshotError(
            "is damaged: its bytes do not have the sha256 in its header", source=path, remedy=_DAMAGED
        )
    return header


def _check_kind(path: Path, metadata: Mapping[str, Any], manifest: Manifest) -> None:
    """Refuse what is not a snapshot, or one of something else."""
    version = metadata.get("version")
    if metadata.get("format") != FORMAT:
        raise SnapshotError(f"its format is not {FORMAT}", source=path, remedy=_OURS)
    if version != str(VERSION):
        raise SnapshotError(
            f"its version is {version!r:.20}, this rlxc reads version {VERSION}",
            source=path,
            remedy="make the snapshot again, or use the rlxc that made it",
        )
    if metadata.get("identity") == identity(manifest):
        return
    found = mismatch(_object(_field(metadata, "parts"), "parts"), manifest)
    raise SnapshotError(
        f"{found.problem} (it was made with {metadata.get('model')!r:.80})", source=path, remedy=found.remedy
    )


def _contents(
    entries: Mapping[str, Any], metadata: Mapping[str, Any], data: npt.NDArray[np.uint8], manifest: Manifest
) -> Contents:
    plan, vocab = manifest.kv_cache, manifest.model.vocab_size
    shape = _object(entries.get("tokens"), "tokens").get("shape")
    count = _integer(_list(shape, 1, "shape of tokens")[0], 0, _MOST_TOKENS, "number of tokens")
    if count > plan.context:
        raise _Wrong(
            f"holds {count} tokens, which do not fit the context of {plan.context}",
            f"compile with --context {count} or more",
        )
    firsts = _firsts(_field(metadata, "first"), count, plan)
    places = _places(plan, count, firsts)
    arrays = {place.name: _array(place, entries, data) for place in places}
    unknown = sorted(entries.keys() - arrays.keys())
    _expect(not unknown, f"tensor {unknown[:1]!r:.80} is none of a snapshot")
    _expect(places[-1].end == len(data), f"data must have {places[-1].end} bytes, got {len(data)}")
    tokens: Tokens = arrays["tokens"]
    outside = tokens[(tokens < 0) | (tokens >= vocab)]
    _expect(not len(outside), f"tokens must be in the vocabulary of {vocab}, got {outside[:1]}")
    readings = _readings(_field(metadata, "readings"), count)
    invoked = _invoked(_field(metadata, "invoked"), count)
    layers = [_rows(layer, first, count, arrays) for layer, first in zip(plan.layers, firsts)]
    return Contents(tokens, readings, invoked, layers)


def _firsts(value: Any, count: int, plan: KvPlan) -> list[int | None]:
    """Where each layer's rows begin: a window may have moved on, but not past what the next token sees."""
    firsts: list[int | None] = []
    for layer, first in zip(plan.layers, _list(value, len(plan.layers), "first")):
        where = f"first[{layer.index}]"
        if layer.shares is not None:
            _expect(first is None, f"{where} must be null, got {first!r:.80}")
            firsts.append(None)
        elif layer.window is None or layer.layout == "linear":
            firsts.append(_integer(first, 0, 0, where))
        else:
            low, high = max(0, count - layer.capacity), max(0, count - layer.window + 1)
            firsts.append(_integer(first, low, high, where))
    return firsts


def _array(place: _Place, entries: Mapping[str, Any], data: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    entry = _object(entries.get(place.name), place.name)
    for field in sorted({*place.entry, *entry}):
        value, got = place.entry.get(field), entry.get(field)
        _expect(got == value, f"{field!r:.80} of {place.name} must be {value}, got {got!r:.80}")
    _expect(place.end <= len(data), f"{place.name} must end in the file, which has {len(data)} bytes of data")
    return data[place.begin : place.end].view(place.stored.dtype).reshape(place.shape)


def _rows(layer: KvLayer, first: int | None, count: int, arrays: Mapping[str, npt.NDArray[Any]]) -> KvRows:
    if first is not None:
        return KvRows(first, *(arrays[name] for name in _names(layer)))
    nothing = np.zeros((0, layer.heads * layer.head_dim), _STORED[layer.dtype].dtype)
    scales = None if layer.dtype is not DType.INT8 else np.zeros((0, layer.heads), np.float32)
    return KvRows(count, nothing, nothing, scales, scales)


def _readings(value: Any, count: int) -> list[tuple[int, Reading]]:
    """What tokens were read with: the first of them from token 0 on, each next one from a later token on."""
    found: list[tuple[int, Reading]] = []
    for number, item in enumerate(_list(value, None, "readings")):
        where = f"readings[{number}]"
        begin, adapters = _list(item, 2, where)
        low, high = (found[-1][0] + 1, count - 1) if found else (0, 0)
        reading = tuple(_scaled_adapter(adapter, where) for adapter in _list(adapters, None, where))
        found.append((_integer(begin, low, high, where), reading))
    _expect(bool(found) == bool(count), "readings must begin with the first token")
    return found


def _scaled_adapter(value: Any, where: str) -> tuple[str, float]:
    fingerprint, scale = _list(value, 2, where)
    _expect(
        type(scale) is float and math.isfinite(scale), f"{where} must have finite scales, got {scale!r:.80}"
    )
    return _fingerprint(fingerprint, where), scale


def _invoked(value: Any, count: int) -> dict[str, int]:
    return {
        _fingerprint(fingerprint, "invoked"): _integer(start, 0, count - 1, "invoked")
        for fingerprint, start in _object(value, "invoked").items()
    }


# --- what values must be ------------------------------------------------------------------------------------------


class _Wrong(ValueError):
    """A field is not as it must be."""

    def __init__(self, problem: str, remedy: str = _DAMAGED) -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


def _field(metadata: Mapping[str, Any], name: str) -> Any:
    """The JSON in a field of the metadata, which are all text."""
    text = metadata.get(name)
    _expect(isinstance(text, str), f"{name} is missing")
    return _json(str(text), name)


def _json(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _Wrong(f"{where} must be JSON ({str(error)[:80]})") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _Wrong(f"{where} must be an object, got {value!r:.80}")
    return value


def _list(value: Any, length: int | None, where: str) -> list[Any]:
    if not isinstance(value, list) or length not in (None, len(value)):
        size = "a list" if length is None else f"a list of {length}"
        raise _Wrong(f"{where} must be {size}, got {value!r:.80}")
    return value


def _integer(value: Any, low: int, high: int, where: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise _Wrong(f"{where} must be an integer in {low}..{high}, got {value!r:.80}")
    return value


def _fingerprint(value: Any, where: str) -> str:
    if not isinstance(value, str) or re.fullmatch("[0-9a-f]{64}", value) is None:
        raise _Wrong(f"{where} must name adapters by 64 hexadecimal digits, got {value!r:.80}")
    return value


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _Wrong(otherwise)


# --- writing ------------------------------------------------------------------------------------------------------


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of ``path`` when the block ends; if it fails, nothing is left of it."""
    try:
        final = Path(os.path.realpath(path))
        if final.exists() and not final.is_file():
            raise SnapshotError("is there already, and is no plain file", source=path, remedy=_ELSEWHERE)
        partial = final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
        try:
            with open(partial, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, final)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        sync_folder(final.parent)
    except (OSError, ValueError) as error:  # a ValueError is about the path itself
        why = getattr(error, "strerror", None) or error
        raise SnapshotError(f"cannot be written ({why})", source=path, remedy=_ELSEWHERE) from error
