"""Linear layers that bitsandbytes packed into 4 bits, read as the packed weights they are.

Beside ``X.weight``, the codes, a file has ``X.weight.absmax`` (one per 64 weights; in 8 bits where quantised
themselves, with ``nested_absmax`` and ``nested_quant_map``), ``X.weight.quant_map`` (the value of each code) and
``X.weight.quant_state.bitsandbytes__nf4`` (or ``fp4``), which holds JSON. Facts from ``QuantState`` in bitsandbytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlxc.dtypes import DType
from rlxc.errors import ModelError, UnsupportedError
from rlxc.weights.bnb import dequantize_absmax
from rlxc.weights.files import parse_json
from rlxc.weights.formats import FORMATS
from rlxc.weights.hf_keys import Keys
from rlxc.weights.safetensors import SafetensorsFile, Tensor

_TYPES = {"nf4": DType.NF4, "fp4": DType.FP4}
_BLOCK = 64
_CODE_BYTES = _BLOCK // 2
# How layers compute and load, not what they hold; the last ones are about 8 bits.
_HARMLESS = frozenset(
    """
    bnb_4bit_compute_dtype llm_int8_enable_fp32_cpu_offload llm_int8_has_fp16_weight llm_int8_skip_modules
    llm_int8_threshold
    """.split()
)
_MAP_TOLERANCE = 1e-6
"""Of values up to 1: maps come in f32, some computed and some written out. Any other map is 1e-3 off somewhere."""


def read_quantization(config: Keys | None, architecture: str) -> DType | None:
    """The format that ``quantization_config`` promises: of linear layers, or of gpt-oss's experts; None for floats.

    Raises:
        UnsupportedError: another way to quantise than bitsandbytes' 4 bits, or MXFP4 in gpt-oss.
        ModelError: a key of the wrong type.
    """
    if config is None:
        return None
    if architecture == "gpt-oss":
        config.only("quant_method", "mxfp4")
        config.finish(("modules_to_not_convert",))  # the tensors say so too
        return DType.MXFP4
    config.only("quant_method", "bitsandbytes")
    for key in ("load_in_8bit", "_load_in_8bit"):
        if config.flag(key, False):
            raise UnsupportedError(
                f"{config.where}{key} = True is not implemented",
                source=config.source,
                remedy="use the model as it was before, or in bitsandbytes' 4 bits",
            )
    for key in ("load_in_4bit", "_load_in_4bit"):
        config.only(key, True)
    config.only("bnb_4bit_quant_storage", "uint8")
    config.flag("bnb_4bit_use_double_quant", False)  # the tensors of each weight say so too
    config.only("bnb_4bit_quant_type", *_TYPES)
    kind = config.text("bnb_4bit_quant_type", "fp4")
    config.finish(_HARMLESS)
    return _TYPES[kind]


@dataclass(frozen=True)
class FourBitWeight:
    """A packed weight ``[out, in]``: where its parts are, checked to fit together.

    Attributes:
        parts: the names of all its tensors, the codes first.
    """

    file: SafetensorsFile
    dtype: DType
    shape: tuple[int, int]
    parts: tuple[str, ...]
    nested: tuple[int, float] | None  # how many absmax share a nested one, and the mean that was taken away

    def rows(self) -> npt.NDArray[np.uint8]:
        """Packed rows, ``uint8 [out, row_bytes]``, in fresh memory: each block its absmax, then its codes."""
        out, in_ = self.shape
        blocks = np.empty((out * in_ // _BLOCK, FORMATS[self.dtype].block_bytes), np.uint8)
        absmax = np.ascontiguousarray(self._absmax(), "<f4")
        blocks[:, :-_CODE_BYTES] = absmax[:, None].view(np.uint8)
        blocks[:, -_CODE_BYTES:] = self.file.data(self.parts[0]).reshape(-1, _CODE_BYTES)
        return blocks.reshape(out, -1)

    def _absmax(self) -> npt.NDArray[np.float32]:
        name = self.parts[0]
        if self.nested is None:
            return self.file.floats(f"{name}.absmax").reshape(-1)
        blocksize, offset = self.nested
        return dequantize_absmax(
            self.file.data(f"{name}.absmax"),
            self.file.floats(f"{name}.nested_absmax").reshape(-1),
            self.file.floats(f"{name}.nested_quant_map"),
            offset,
            blocksize,
        )


def open_four_bit(
    files: Mapping[str, SafetensorsFile], name: str, dtype: DType, shape: tuple[int, ...]
) -> FourBitWeight | None:
    """The packed weight ``name``, or None if it was left as it is (element type other than U8).

    Args:
        files: where every tensor of the folder is.
        name: the weight, such as ``model.layers.0.mlp.up_proj.weight``.
        dtype: the format that the configuration promises.
        shape: ``[out, in]``.

    Raises:
        ModelError: parts are missing, in different files, or do not fit together.
        UnsupportedError: a block size or map that is not implemented.
    """
    file = files[name]
    if file.tensors[name].dtype != "U8":
        return None
    parts = _Parts(files, file, name)
    state = _state(parts, dtype, shape)
    count = math.prod(shape)
    codes = file.tensors[name]
    if codes.nbytes * 2 != count:
        raise parts.error(f"has {codes.nbytes} bytes of codes; {list(shape)} weights need {count // 2}")
    _check_map(parts, dtype)
    nested = None
    if f"{name}.nested_absmax" in files:
        nested = (state.integer("nested_blocksize"), _offset(state))
        parts.require("absmax", "U8", count // _BLOCK)
        parts.require("nested_absmax", "F32", -(-count // _BLOCK // nested[0]))
        parts.require("nested_quant_map", "F32", 256)
    else:
        parts.require("absmax", "F32", count // _BLOCK)
    out, in_ = shape
    return FourBitWeight(file, dtype, (out, in_), (name, *parts.used), nested)


class _Parts:
    """The tensors that belong to one weight, all in the file of its codes."""

    def __init__(self, files: Mapping[str, SafetensorsFile], file: SafetensorsFile, name: str) -> None:
        self.files, self.file, self.name = files, file, name
        self.used: list[str] = []

    def require(self, part: str, dtype: str, count: int | None) -> Tensor:
        """A part of this element type and number of elements."""
        name = f"{self.name}.{part}"
        if self.files.get(name) is not self.file:
            where = "missing" if name not in self.files else "in another file"
            raise self.error(f"is packed in 4 bits, but {part} is {where}")
        tensor = self.file.tensors[name]
        if tensor.dtype != dtype or count not in (None, math.prod(tensor.shape)):
            raise self.error(
                f"needs {part} of {dtype} [{count or 'n'}], but it is {tensor.dtype} {list(tensor.shape)}"
            )
        self.used.append(name)
        return tensor

    def error(self, problem: str) -> ModelError:
        return ModelError(
            f"tensor {self.name} {problem}",
            source=self.file.path,
            remedy="save the model again with Transformers",
        )


def _state(parts: _Parts, dtype: DType, shape: tuple[int, ...]) -> Keys:
    """What the JSON says of a weight, checked where it says what is known already."""
    part = f"quant_state.bitsandbytes__{dtype}"
    parts.require(part, "U8", None)
    raw = parts.file.data(f"{parts.name}.{part}").tobytes()
    where = f"{parts.name}.{part}"
    state = Keys(parse_json(raw, parts.file.path, where), parts.file.path, f"{where}: ")
    state.only("quant_type", str(dtype))
    state.only("blocksize", _BLOCK)
    if state.integer("blocksize") != _BLOCK or shape[-1] % _BLOCK:
        raise UnsupportedError(
            f"tensor {parts.name} has rows of {shape[-1]} weights, which are not whole blocks of {_BLOCK}",
            source=parts.file.path,
            remedy="use the model as it was before",
        )
    if state.values.get("shape") != list(shape):
        raise parts.error(f"is packed from shape {state.values.get('shape')}, but must be {list(shape)}")
    state.only("dtype", "float32", "float16", "bfloat16")  # what it was before: values are exact in f32
    state.only("nested_dtype", "float32")
    state.only("shape", list(shape))
    for key in ("nested_blocksize", "nested_offset"):
        if state.has(key) and f"{parts.name}.nested_absmax" not in parts.files:
            raise parts.error(f"has {key}, but nested_absmax is missing")
    return state


def _offset(state: Keys) -> float:
    value = state.values.get("nested_offset")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e30:
        raise state.error("nested_offset", f"must be a number, not {value!r}")
    return float(value)


def _check_map(parts: _Parts, dtype: DType) -> None:
    parts.require("quant_map", "F32", 16)
    codebook = np.array(FORMATS[dtype].codebook, np.float32)
    found = parts.file.floats(f"{parts.name}.quant_map").reshape(-1)
    if not np.allclose(found, codebook, rtol=0, atol=_MAP_TOLERANCE):
        raise UnsupportedError(
            f"tensor {parts.name} has a quant_map that is not {dtype}'s",
            source=parts.file.path,
            remedy="only the standard nf4 and fp4 are implemented",
        )
