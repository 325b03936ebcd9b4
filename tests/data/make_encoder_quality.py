"""Makes ``encoder_quality.json`` in this folder with llama.cpp. Run as README.md says; the tests only read the result.

It calls ``ggml_quantize_chunk`` without an importance matrix, as ``llama-quantize`` does by default: for K-quants and
IQ4_NL it writes down the errors of what comes out, for simpler formats the SHA-256 of the bytes. For all packed types
it also has random blocks decoded, and writes down the SHA-256 of the weights.
"""

import ctypes
import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import gguf
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "weights"))

from encoder_cases import SEARCHED, SIMPLE, digest_of_weights, errors, random_blocks, real, synthetic  # noqa: E402 - beside the tests


def ggml() -> ctypes.CDLL:
    """The library in the package llama-cpp-python."""
    spec = importlib.util.find_spec("llama_cpp")
    assert spec is not None and spec.origin is not None
    library = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml-base.so"))
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library.ggml_quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, size, size, size, pointer]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    return library


def quantize(library: ctypes.CDLL, name: str, values: np.ndarray) -> np.ndarray:
    """``uint8 [rows, row_bytes]`` of f32 ``[rows, in]``."""
    kind = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    rows, columns = values.shape
    out = np.zeros((rows, columns // block * block_bytes), np.uint8)
    library.ggml_quantize_init(int(kind))
    done = library.ggml_quantize_chunk(int(kind), values.ctypes.data, out.ctypes.data, 0, rows, columns, None)
    assert done == out.nbytes
    return out


class TypeTraits(ctypes.Structure):
    """The start of ``ggml_type_traits``."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


def decode(library: ctypes.CDLL, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The weights f32 of random blocks."""
    library.ggml_get_type_traits.restype = ctypes.POINTER(TypeTraits)
    traits = library.ggml_get_type_traits(int(kind))[0]
    blocks = random_blocks(traits.type_size)
    weights = np.empty((len(blocks), traits.blck_size), np.float32)
    traits.to_float(blocks.ctypes.data, weights.ctypes.data, weights.size)
    return weights


if __name__ == "__main__":
    library = ggml()
    made: dict[str, dict[str, object]] = {"errors": {}, "sha256": {}, "decoded": {}}
    for case, values in (synthetic() | real(Path(sys.argv[1]))).items():
        made["errors"][case] = {
            name: errors(
                values, gguf.dequantize(quantize(library, name, values), gguf.GGMLQuantizationType[name])
            )
            for name in SEARCHED
        }
    for case, values in synthetic().items():
        made["sha256"][case] = {
            name: hashlib.sha256(quantize(library, name, values).tobytes()).hexdigest() for name in SIMPLE
        }
    packed = [kind for kind, (block, _) in gguf.GGML_QUANT_SIZES.items() if block > 1]
    for kind in (kind for kind in packed if kind.name not in ("Q8_1", "Q8_K")):  # which hold activations
        made["decoded"][kind.name] = digest_of_weights(decode(library, kind))
    (HERE / "encoder_quality.json").write_text(json.dumps(made, indent=1) + "\n")
