"""Values to weights in any format: what :mod:`rlxc.weights.formats` decodes, made."""

from __future__ import annotations

import gguf
import numpy as np
import numpy.typing as npt

from rlxc.dtypes import ENCODABLE, DType
from rlxc.errors import WeightError
from rlxc.weights.bnb import nearest, over_absmax
from rlxc.weights.encode_k import encode_k
from rlxc.weights.encode_levels import encode_binary, encode_iq4_nl, encode_mxfp4, encode_ternary
from rlxc.weights.formats import FORMATS, BlockFormat, Bytes, Fields, Scales

F32 = npt.NDArray[np.float32]

CHUNK = 1 << 16
"""Weights are encoded about this many at a time: what the search needs for them stays in the processor's cache."""

# What stands in for the formats that only llama.cpp's importance matrices make well: about as many bits, and an error
# that is no greater.
_STAND_IN = {
    DType.IQ1_S: DType.Q2_K,
    DType.IQ1_M: DType.Q2_K,
    DType.IQ2_XXS: DType.Q2_K,
    DType.IQ2_XS: DType.Q2_K,
    DType.IQ2_S: DType.Q2_K,
    DType.IQ3_XXS: DType.Q3_K,
    DType.IQ3_S: DType.Q3_K,
    DType.IQ4_XS: DType.IQ4_NL,
    DType.NVFP4: DType.Q4_K,
}
# For rows that are not whole blocks of 256, as llama-quantize does it; in place of IQ4_NL, its 4 bits, Q4_0.
_NARROWER_BLOCK = {
    DType.Q2_K: DType.Q4_0,
    DType.Q3_K: DType.Q4_0,
    DType.Q4_K: DType.Q5_0,
    DType.Q5_K: DType.Q5_1,
    DType.Q6_K: DType.Q8_0,
}
_BY_LEVELS = {
    DType.IQ4_NL: encode_iq4_nl,
    DType.MXFP4: encode_mxfp4,
    DType.TQ1_0: encode_ternary,
    DType.TQ2_0: encode_ternary,
    DType.Q1_0: encode_binary,
}


def fitting(dtype: DType, in_features: int) -> DType:
    """The format to encode rows of ``in_features`` weights in, where ``dtype`` is wanted.

    It is ``dtype``, or one of about its size where it has no encoder, if the rows are whole blocks of it; else one of
    about its quality with smaller blocks; else F16.
    """
    dtype = _STAND_IN.get(dtype, dtype)
    for candidate in (dtype, _NARROWER_BLOCK.get(dtype, DType.F16)):
        if in_features % FORMATS[candidate].block_size == 0:
            return candidate
    return DType.F16


def changeable(dtype: DType) -> DType:
    """The format for a weight of ``dtype`` that was changed: ternary and binary ones have no levels for a change."""
    return DType.Q4_K if dtype in (DType.TQ1_0, DType.TQ2_0, DType.Q1_0) else dtype


def encode(dtype: DType, values: F32) -> Bytes:
    """Packed rows, ``uint8 [rows, row_bytes]``, of weights ``f32 [rows, in]``.

    F16 and BF16 round to nearest even; Q4_0 to Q8_0 and INT4 take their scale from a block's extremes, NF4 and FP4
    too, with the nearest value of their codebook; K-quants search (:mod:`rlxc.weights.encode_k`). The bytes of NF4
    are those of bitsandbytes, and those of FP4 but for the sign of a zero; those of Q4_0 to Q8_0, MXFP4, TQ1_0, TQ2_0
    and Q1_0 are llama.cpp's; IQ4_NL searches, too (:mod:`rlxc.weights.encode_levels`).

    Raises:
        WeightError: a format without encoder; values that are NaN, infinite, or too large for the format; rows that are
            not whole blocks of it.
    """
    if dtype not in ENCODABLE:
        raise WeightError(
            f"{dtype} can be read but not made",
            remedy=f"encode in {fitting(dtype, values.shape[-1])} instead",
        )
    form = FORMATS[dtype]
    if values.ndim != 2 or values.dtype != np.float32:
        raise WeightError(
            f"values of dtype {values.dtype} and shape {list(values.shape)} cannot be encoded",
            remedy="pass float32 [rows, in]",
        )
    rows, columns = values.shape
    out = np.empty((rows, form.row_bytes(columns)), np.uint8)
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        part = values[start : start + step]
        if not np.isfinite(part).all():
            raise WeightError(
                f"NaN or infinite values cannot be encoded as {dtype}", remedy="look for what made them"
            )
        out[start : start + step] = _encode(form, part)
    return out


def _encode(form: BlockFormat, values: F32) -> Bytes:
    match form.dtype:
        case DType.NF4 | DType.FP4:
            packed = form.pack(_nearest_in_codebook(form, values))
        case DType.INT4:
            packed = form.pack(_int4(form, values))
        case DType.Q2_K | DType.Q3_K | DType.Q4_K | DType.Q5_K | DType.Q6_K:
            packed = form.pack(encode_k(form, values))
        case _ if form.dtype in _BY_LEVELS:
            with np.errstate(all="ignore"):  # of zero scales, and of those beyond f16, which are found below
                packed = form.pack(_BY_LEVELS[form.dtype](form, values))
        case _:
            with np.errstate(all="ignore"):  # of a zero scale, and of one beyond f16, which is found below
                packed = gguf.quantize(np.ascontiguousarray(values), form.ggml_type).view(np.uint8)
    if not _is_finite(form, packed):
        raise WeightError(
            f"values as large as {np.abs(values).max():.3g} are too large for {form.dtype}",
            remedy="choose a format of wider range, such as bf16",
        )
    return packed


def _nearest_in_codebook(form: BlockFormat, values: F32) -> Fields:
    assert form.codebook is not None
    scaled, absmax = over_absmax(values.reshape(-1, form.block_size))
    codes = nearest(np.array(form.codebook, np.float32), scaled)
    return Fields(
        codes.view(np.int8).reshape(values.shape), Scales(absmax.reshape(len(values), -1), None), None
    )


def _int4(form: BlockFormat, values: F32) -> Fields:
    """Codes from -7 to 7: the code -8 is left out, so that a weight and its negative are encoded alike."""
    blocks = values.reshape(-1, form.block_size)
    scales = np.abs(blocks).max(axis=1) / np.float32(7)
    # The scale of denormal values rounds to 0, or so far that codes go over 7.
    codes = np.divide(blocks, scales[:, None], out=np.zeros_like(blocks), where=scales[:, None] != 0)
    codes = np.clip(np.rint(codes), -7, 7).astype(np.int8)
    return Fields(codes.reshape(values.shape), Scales(scales.reshape(len(values), -1), None), None)


def _is_finite(form: BlockFormat, packed: Bytes) -> bool:
    """Whether the weights are finite, by their scales."""
    blocks = packed.reshape(-1, form.block_bytes)
    if form.is_float:
        return bool(np.isfinite(form.decode(blocks, 1)).all())
    scales = (scale for scale in (form.scale, form.minimum) if scale)
    return all(np.isfinite(scale.read(blocks).base).all() for scale in scales)
