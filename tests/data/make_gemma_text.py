"""Makes ``gemma_text.json`` in this folder with llama.cpp. Run as README.md says; the tests only read the result."""

import json
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

from quality_llama_cpp import write_decoded  # noqa: E402 - not a package

PROMPTS = [
    "The three most important inventions of the nineteenth century were",
    "def fibonacci(n):\n",
    "Die Hauptstadt von Frankreich ist",
    # Longer than the window of 512 and the ring that holds it.
    (EXAMPLES / "english.txt").read_text(),
]
TOKENS = 48


def greedy(model: llama_cpp.Llama, prompt: str) -> dict[str, object]:
    """The prompt's ids, the best next token 48 times over, and by how much each beat the second."""
    ids = model.tokenize(prompt.encode())
    model.reset()
    model.eval(ids)
    best: list[int] = []
    gaps: list[float] = []
    for _ in range(TOKENS):
        logits = np.array(model.scores[model.n_tokens - 1])
        second, first = np.partition(logits, -2)[-2:]
        best.append(int(logits.argmax()))
        gaps.append(round(float(first - second), 4))
        model.eval(best[-1:])
    return {"prompt": prompt, "prompt_ids": ids, "ids": best, "gaps": gaps}


if __name__ == "__main__":
    exact = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32, "flash_attn": False}
    with tempfile.TemporaryDirectory() as folder:
        decoded = Path(folder) / "decoded.gguf"
        write_decoded(Path(sys.argv[1]), decoded)
        model = llama_cpp.Llama(str(decoded), n_ctx=1024, logits_all=True, verbose=False, **exact)
        texts = [greedy(model, prompt) for prompt in PROMPTS]
        model.close()
    lines = ",\n".join(map(json.dumps, texts))
    (HERE / "gemma_text.json").write_text(f"[{lines}]\n")
