"""Has llama.cpp encode thousands of texts with every vocabulary of tests/tokenizer_cases.py. Run as README.md says.

Of most it keeps a digest of the ids of every 20 texts; of the first ones the ids, so that a failing test can show what
differs.
"""

import ctypes
import gzip
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tokenizer_cases import CASES, UNUSED  # noqa: E402 - beside the tests that read the result
from tokenizer_texts import (  # noqa: E402 - likewise
    BYTE_TEXTS,
    TEXTS,
    byte_texts,
    chunks,
    digest,
    texts,
)


def write(path: Path, case: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for name, value in case.items():
        key = "general.name" if name == "name" else f"tokenizer.ggml.{name}"
        if isinstance(value, bytes):
            writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8)
        else:
            add[type(value)](key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def reference(path: Path, types: list[int]) -> dict[str, Any]:
    model = llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)
    made: dict[str, Any] = {}
    for kind, all_texts in (
        ("texts", [text.encode() for text in texts(*TEXTS)]),
        ("bytes", byte_texts(*BYTE_TEXTS)),
    ):
        ids = [model.tokenize(text, add_bos=True, special=True) for text in all_texts]
        made[kind] = {"first": next(chunks(ids)), "digests": "".join(map(digest, chunks(ids)))}
    made["pieces"] = digest([list(piece(model, i)) for i, kind in enumerate(types) if kind != UNUSED])
    return made


def piece(model: llama_cpp.Llama, i: int) -> bytes:
    buffer = ctypes.create_string_buffer(4096)
    vocab = llama_cpp.llama_model_get_vocab(model.model)
    length = llama_cpp.llama_token_to_piece(vocab, i, buffer, len(buffer), 0, True)
    return buffer.raw[:length]


def main() -> None:
    made = {}
    for name, make in CASES.items():
        case = make()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocab.gguf"
            write(path, case)
            made[name] = reference(path, case["token_type"])
    made["gemma"] = reference(Path(sys.argv[1]), [])
    data = json.dumps(made, separators=(",", ":")).encode()
    (HERE / "tokenizer_ids.json.gz").write_bytes(gzip.compress(data, mtime=0))


if __name__ == "__main__":
    main()
