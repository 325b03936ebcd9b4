"""Makes ``tiny_logits.npz`` in this folder with llama.cpp. Run as README.md says; the tests only read the result."""

import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "models"))

from tiny import CONTEXT, TEXT, VARIANTS  # noqa: E402 - beside the tests that read the result


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
        model = Path(folder) / "model.gguf"
        # llama.cpp rounds activations to int8 for quantised weights: it gets the same weights decoded to f32.
        made = {name: logits(variant.write(model, decoded=True)) for name, variant in VARIANTS.items()}
    np.savez_compressed(HERE / "tiny_logits.npz", **made)
