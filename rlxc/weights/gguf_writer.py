"""Writes GGUF files, tensor by tensor: merged models and LoRA adapters.

Layout: the GGUF specification, version 3.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUF_DEFAULT_ALIGNMENT, GGUF_MAGIC, GGUF_VERSION, GGUFValueType, Keys

from rlxc.dtypes import DType
from rlxc.errors import WeightError
from rlxc.weights.formats import FORMATS
from rlxc.weights.lora import EMBEDDING, Adapter

Rows = Iterable[npt.NDArray[np.generic]]


@dataclass(frozen=True)
class NewTensor:
    """A tensor to write: ``shape`` is ``[out, in]`` or ``[n]``, ``rows`` are its bytes, a few rows at a time."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    rows: Rows

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return int(np.prod(self.shape[:-1])) * FORMATS[self.dtype].row_bytes(self.shape[-1])


def write_gguf(sink: BinaryIO, pairs: Sequence[bytes], tensors: Sequence[NewTensor], alignment: int) -> None:
    """Write a whole file.

    Args:
        sink: where it goes.
        pairs: the metadata, encoded.
        tensors: in order.
        alignment: what tensors start at multiples of; metadata that names another would be wrong.

    Raises:
        WeightError: GGUF has no type for a tensor's format.
    """
    header = [struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(tensors), len(pairs)), *pairs]
    offset = 0
    for tensor in tensors:
        kind = FORMATS[tensor.dtype].ggml_type
        dims = tensor.shape[::-1]
        header.append(_string(tensor.name))
        header.append(struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset))
        offset += -(-tensor.nbytes // alignment) * alignment
    text = b"".join(header)
    sink.write(text)
    sink.write(b"\0" * (-len(text) % alignment))
    for tensor in tensors:
        written = sum(sink.write(np.ascontiguousarray(rows).view(np.uint8).data) for rows in tensor.rows)
        assert written == tensor.nbytes, tensor.name
        sink.write(b"\0" * (-written % alignment))


def adapter_bytes(adapter: Adapter) -> bytes:
    """A GGUF file of an adapter's pairs, which read back as equal products: scales are multiplied into B, alpha is 0.

    Raises:
        WeightError: a B times its scale overflows.
    """
    pairs = [
        _pair(Keys.General.TYPE, "adapter"),
        _pair(Keys.General.ARCHITECTURE, adapter.architecture),
        _pair(Keys.General.NAME, adapter.name),
        _pair(Keys.Adapter.TYPE, "lora"),
        _pair(Keys.Adapter.LORA_ALPHA, 0.0),
    ]
    if adapter.invocation_tokens:
        pairs.append(_pair(Keys.Adapter.ALORA_INVOCATION_TOKENS, adapter.invocation_tokens))
    tensors = []
    for target, pair in adapter.pairs.items():
        with np.errstate(over="ignore"):
            b = np.float32(pair.scale) * pair.b
        if not np.isfinite(b).all():
            raise WeightError(
                f"B of {target} times its scale {pair.scale:g} overflows",
                source=adapter.source,
                remedy="use an adapter with a smaller alpha",
            )
        # An embedding's A is looked up by rows, and so it is stored.
        a = np.ascontiguousarray(pair.a.T) if target == EMBEDDING else pair.a
        tensors += [
            NewTensor(f"{target}.{side}", DType.F32, array.shape, [array])
            for side, array in (("lora_a", a), ("lora_b", b))
        ]
    sink = BytesIO()
    write_gguf(sink, pairs, tensors, GGUF_DEFAULT_ALIGNMENT)
    return sink.getvalue()


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _pair(key: str, value: str | float | Sequence[int]) -> bytes:
    if isinstance(value, str):
        return _string(key) + struct.pack("<I", GGUFValueType.STRING) + _string(value)
    if isinstance(value, float):
        return _string(key) + struct.pack("<If", GGUFValueType.FLOAT32, value)
    head = struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.UINT32, len(value))
    return _string(key) + head + struct.pack(f"<{len(value)}I", *value)
