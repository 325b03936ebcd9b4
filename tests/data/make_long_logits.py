"""Makes ``long_logits.npz`` in this folder with llama.cpp. Run as README.md says; the tests only read the result."""

import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "end_to_end"))

from long_cases import CASES, CONTEXT, POSITIONS, TEXT  # noqa: E402 - beside the tests that read the result


def logits(path: Path) -> np.ndarray:
    """After the tokens in these positions, computed in f32 throughout."""
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    model = llama_cpp.Llama(str(path), n_ctx=CONTEXT, logits_all=True, n_threads=1, verbose=False, **exact)
    model.eval(TEXT)
    result = np.array(model.scores[list(POSITIONS)], np.float32)
    model.close()
    return result


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.gguf"
        made = {name: logits(case.write(model, decoded=True)) for name, case in CASES.items()}
    np.savez_compressed(HERE / "long_logits.npz", **made)
