"""Makes ``tiny_logits.npz`` in this folder with llama.cpp. Run as README.md says; the tests only read the result."""

import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "models"))

from divergence import mean_divergence  # noqa: E402 - beside the tests that read the result
from tiny import CONTEXT, INT8, ROWS, TEXT, VARIANTS  # noqa: E402 - likewise


def logits(path: Path) -> np.ndarray:
    """After each token of the text, computed in f32 throughout."""
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    model = llama_cpp.Llama(str(path), n_ctx=CONTEXT, logits_all=True, n_threads=1, verbose=False, **exact)
    model.eval(TEXT)
    result = np.array(model.scores[: len(TEXT)], np.float32)
    model.close()
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        # llama.cpp rounds activations to int8 for quantised weights: it gets the same weights decoded to f32.
        made = {name: logits(variant.write(path, decoded=True))[ROWS] for name, variant in VARIANTS.items()}
        for name in INT8:
            packed = logits(VARIANTS[name].write(path))[ROWS]
            made[f"{name}, divergence of int8"] = np.float64(mean_divergence(made[name], packed))
    np.savez_compressed(HERE / "tiny_logits.npz", **made)
