"""Makes ``quirk_logits.npz`` in this folder with llama.cpp. Run as README.md says; the tests only read the result."""

import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "models")]

from make_tiny_logits import logits  # noqa: E402 - beside this file
from quirks import QUIRKS, ROWS  # noqa: E402 - beside the tests that read the result

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        made = {name: logits(quirk.write(path))[ROWS] for name, quirk in QUIRKS.items()}
    np.savez_compressed(HERE / "quirk_logits.npz", **made)
