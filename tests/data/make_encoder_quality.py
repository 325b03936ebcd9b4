"""Makes ``encoder_quality.json`` in this folder with llama.cpp. Run as README.md says; the tests only read the result.

It calls ``ggml_quantize_chunk`` without an importance matrix, as ``llama-quantize`` does by default: for K-quants it
writes down the errors of what comes out, for simpler formats the SHA-256 of the bytes.
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

from encoder_cases import K_QUANTS, SIMPLE, errors, real, synthetic  # noqa: E402 - beside the tests


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


if __name__ == "__main__":
    library = ggml()
    made: dict[str, dict[str, object]] = {"errors": {}, "sha256": {}}
    for case, values in (synthetic() | real(Path(sys.argv[1]))).items():
        made["errors"][case] = {
            name: errors(
                values, gguf.dequantize(quantize(library, name, values), gguf.GGMLQuantizationType[name])
            )
            for name in K_QUANTS
        }
    for case, values in synthetic().items():
        made["sha256"][case] = {
            name: hashlib.sha256(quantize(library, name, values).tobytes()).hexdigest() for name in SIMPLE
        }
    (HERE / "encoder_quality.json").write_text(json.dumps(made, indent=1) + "\n")
