"""How far quantised inference drifts from exact weights: rlxc beside llama.cpp on the same GGUF.

    python examples/quality_llama_cpp.py model.gguf
    python examples/quality_llama_cpp.py model.gguf --lora adapter.gguf

The reference is llama.cpp itself, on a copy of the model whose weights are decoded to f32, with an f32 cache. For
each of llama.cpp (on the quantised file), rlxc with int8 and rlxc with float32 activations, this prints the mean
Kullback-Leibler divergence of the next-token distribution from the reference, in nats, and on how many tokens the
best next token differs although the reference's two best are more than 0.05 apart. With an adapter, all of them use
it beside the base weights: llama.cpp by its own LoRA code, rlxc split.

Needs `pip install rlxc[bench]`, and disk space for the decoded copy.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from llama_cpp import GGML_TYPE_F32, Llama

import rlxc
from rlxc.weights.formats import FORMATS
from rlxc.weights.gguf import open_gguf

TEXT = Path(__file__).with_name("english.txt")
Logits = npt.NDArray[np.float32]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--lora", type=Path, help="a GGUF adapter")
    parser.add_argument("--tokens", type=int, default=768, help="how much of the text is used")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        exact = Path(folder) / "exact.gguf"
        write_decoded(args.model, exact)
        ids, reference = llama_cpp_logits(exact, args.lora, args.text.read_bytes(), args.tokens)
        exact.unlink()
        _, peer = llama_cpp_logits(args.model, args.lora, args.text.read_bytes(), args.tokens)
        report("llama.cpp", reference, peer)
        del peer
        for activations in ("int8", "float32"):
            artifact = Path(folder) / f"{activations}.rlx"
            adapters = [args.lora] if args.lora else []
            mode = "split" if adapters else "auto"
            rlxc.compile(args.model, artifact, activations=activations, adapters=adapters, lora=mode)
            with rlxc.load(artifact) as session:
                report(f"rlxc {activations}", reference, session.score(ids))


def write_decoded(model: Path, output: Path) -> None:
    """A copy of the model with every tensor as f32."""
    source = gguf.GGUFReader(model)
    writer = gguf.GGUFWriter(
        output, str(source.fields["general.architecture"].contents()), use_temp_file=False
    )
    for field in source.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[0]
        writer.add_key_value(
            field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None
        )
    with open_gguf(model) as file:
        for info in file.tensors.values():
            rows = file.data(info.name).reshape(-1, FORMATS[info.dtype].row_bytes(info.shape[-1]))
            decoded = FORMATS[info.dtype].decode(rows, info.shape[-1])
            writer.add_tensor(info.name, decoded.reshape(info.shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_logits(model: Path, lora: Path | None, text: bytes, tokens: int) -> tuple[list[int], Logits]:
    """The first tokens of the text, and llama.cpp's logits after each: ``f32 [tokens, vocab]``."""
    exact_cache = {"type_k": GGML_TYPE_F32, "type_v": GGML_TYPE_F32, "flash_attn": False}
    llama = Llama(
        str(model),
        n_ctx=tokens,
        logits_all=True,
        verbose=False,
        n_threads=2,
        lora_path=str(lora) if lora else None,
        **exact_cache,
    )
    ids = llama.tokenize(text)[:tokens]
    llama.eval(ids)
    logits = np.array(llama.scores[: len(ids)], np.float32)
    llama.close()
    return ids, logits


def report(name: str, reference: Logits, logits: Logits) -> None:
    """Print the mean divergence from the reference, and clear changes of the best token."""
    divergence = np.empty(len(reference))
    changed = 0
    for i, (row, exact) in enumerate(zip(logits, reference)):
        p, q = log_softmax(exact), log_softmax(row)
        divergence[i] = np.sum(np.exp(p) * (p - q))
        second, best = np.partition(exact, -2)[-2:]
        changed += bool(best - second > 0.05 and exact.argmax() != row.argmax())
    print(
        f"{name:14} mean KL {divergence.mean():.2e} nats, best token clearly changed: {changed} of {len(reference)}"
    )


def log_softmax(logits: Logits) -> npt.NDArray[np.float64]:
    """Log-probabilities in float64."""
    wide = logits.astype(np.float64)
    wide -= wide.max()
    return wide - np.log(np.exp(wide).sum())


if __name__ == "__main__":
    main()
