"""Makes ``tiny_adapter_logits.npz`` in this folder with llama.cpp. Run as README.md says; tests read the result."""

import ctypes
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "end_to_end"))

from adapter_cases import (  # noqa: E402 - beside the tests that read the result
    CASES,
    CONTEXT,
    LAST,
    TEXT,
    Files,
    Stack,
    write_files,
)


def logits(files: Files, stack: Stack) -> np.ndarray:
    """After the last tokens of the text, computed in f32 throughout, with adapters as ``--lora-scaled`` has them."""
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    model = llama_cpp.Llama(
        str(files.model), n_ctx=CONTEXT, logits_all=True, n_threads=1, verbose=False, **exact
    )
    # They are the model's, and are freed with it.
    opened = [
        llama_cpp.llama_adapter_lora_init(model.model, str(files.adapters[name]).encode())
        for name, _ in stack
    ]
    assert all(opened)
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * len(opened))(*opened)
    scales = (ctypes.c_float * len(opened))(*(scale for _, scale in stack))
    assert llama_cpp.llama_set_adapters_lora(model.ctx, adapters, len(opened), scales) == 0
    model.eval(TEXT)
    result = np.array(model.scores[len(TEXT) - LAST : len(TEXT)], np.float32)
    model.close()
    return result


def main() -> None:
    """Write the logits of every case."""
    made = {}
    for variant, stacks in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            # llama.cpp rounds activations to int8 for quantised weights: it gets the same weights decoded to f32.
            files = write_files(variant, Path(folder), decoded=True)
            made |= {f"{variant}/{case}": logits(files, stack) for case, stack in stacks.items()}
    np.savez_compressed(HERE / "tiny_adapter_logits.npz", **made)


if __name__ == "__main__":
    main()
