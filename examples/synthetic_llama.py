"""Write a Llama-shaped GGUF in Q4_K_M with random but sane blocks, to measure what a large model costs.

    python examples/synthetic_llama.py llama-8b.gguf                       # 8B: 4.9 GB
    python examples/synthetic_llama.py tiny.gguf --layers 2 --width 256 --heads 4 --kv-heads 2 --ffn 512 --vocab 512
    rlxc compile llama-8b.gguf -o llama-8b.rlx && rlxc bench llama-8b.rlx

Its text is noise; its shapes, formats and bytes are those of the real thing, and so are its speed and memory.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

Bytes = npt.NDArray[np.uint8]
Tensor = tuple[str, GGMLQuantizationType, tuple[int, ...]]

Q4, Q6, F32 = GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q6_K, GGMLQuantizationType.F32


def tensors(args: argparse.Namespace) -> Iterator[Tensor]:
    """Every tensor: its name, format and shape ``[out, in]``, as a Q4_K_M file has them."""
    width, kv = args.width, args.width // args.heads * args.kv_heads
    yield "token_embd.weight", Q4, (args.vocab, width)
    yield "output_norm.weight", F32, (width,)
    yield "output.weight", Q6, (args.vocab, width)
    for i in range(args.layers):
        # The first and last eighth of the layers, and every third one between, have two matrices in six bits.
        eighth = args.layers // 8
        more = i < eighth or i >= 7 * args.layers // 8 or (i - eighth) % 3 == 2
        wide = Q6 if more else Q4
        block = f"blk.{i}"
        yield f"{block}.attn_norm.weight", F32, (width,)
        yield f"{block}.attn_q.weight", Q4, (width, width)
        yield f"{block}.attn_k.weight", Q4, (kv, width)
        yield f"{block}.attn_v.weight", wide, (kv, width)
        yield f"{block}.attn_output.weight", Q4, (width, width)
        yield f"{block}.ffn_norm.weight", F32, (width,)
        yield f"{block}.ffn_gate.weight", Q4, (args.ffn, width)
        yield f"{block}.ffn_up.weight", Q4, (args.ffn, width)
        yield f"{block}.ffn_down.weight", wide, (width, args.ffn)


def data(rng: np.random.Generator, tensor: Tensor) -> Bytes:
    """A tensor's bytes: weights of mean about 0 and a standard deviation of 1 / sqrt(in), norms of 1."""
    _, dtype, shape = tensor
    if dtype is F32:
        return np.ones(shape, np.float32).view(np.uint8)
    size, block_bytes = GGML_QUANT_SIZES[dtype]
    count = math.prod(shape) // size
    out = np.frombuffer(rng.bytes(count * block_bytes), np.uint8).reshape(count, block_bytes).copy()
    deviation = 1 / math.sqrt(shape[-1])
    if dtype is Q4:  # codes 0..15 times scales 0..63, less minimums 0..63 that stand for the codes' middle
        scale = deviation / (32 * 4.6)
        out[:, :4] = np.array([scale, 7.5 * scale], np.float16).view(np.uint8)
    else:  # codes -32..31 times scales -128..127
        out[:, 208:210] = np.array([deviation / (74 * 18.5)], np.float16).view(np.uint8)
    return out.reshape(-1)


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    for name, value in {
        "layers": 32,
        "width": 4096,
        "heads": 32,
        "kv-heads": 8,
        "ffn": 14336,
        "vocab": 128256,
        "context": 8192,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    args = parser.parse_args()
    writer = gguf.GGUFWriter(args.output, "llama")
    writer.add_name("synthetic llama")
    writer.add_context_length(args.context)
    writer.add_embedding_length(args.width)
    writer.add_block_count(args.layers)
    writer.add_feed_forward_length(args.ffn)
    writer.add_head_count(args.heads)
    writer.add_head_count_kv(args.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(500000.0)
    writer.add_rope_dimension_count(args.width // args.heads)
    writer.add_vocab_size(args.vocab)
    # A vocabulary of bytes and fillers: enough for a tokenizer, nothing to read.
    letters = [chr(256 + i) if i < 33 or 127 <= i < 161 or i == 173 else chr(i) for i in range(256)]
    tokens = [*letters, "ab", *(f"<filler {i}>" for i in range(args.vocab - 258)), "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (args.vocab - 1) + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(args.vocab - 1)
    writer.add_eos_token_id(args.vocab - 1)
    every = list(tensors(args))
    for name, dtype, shape in every:
        size, block_bytes = GGML_QUANT_SIZES[dtype]
        writer.add_tensor_info(
            name, list(shape), np.dtype(np.float32), math.prod(shape) // size * block_bytes, raw_dtype=dtype
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(0)
    for tensor in every:
        writer.write_tensor_data(data(rng, tensor))
    writer.close()
    print(f"{args.output}: {args.output.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
