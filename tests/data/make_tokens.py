"""Makes the reference ids in this folder with llama.cpp. Run as README.md says; the tests only read the results."""

import json
import random
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import gguf
import llama_cpp

HERE = Path(__file__).parent
PRE = [
    "default",
    "gpt-2",
    "smollm",
    "falcon",
    "llama-bpe",
    "dbrx",
    "qwen2",
    "qwen35",
]
TEXTS = [
    "",
    "a",
    " ",
    "Hello, world!",
    "  two  spaces   three    four",
    "\n\n\n a\n\n",
    "\t\tx\t y \t",
    "line\r\nend\r\n",
    "\x00\x01\x02 control\x7f\x1b[0m",
    "Être où naïve façade — “quotes” … ‘x’",
    "Привет, мир! ПРИВЕТ",
    "你好，世界。我们今天去吃饭吧！",
    "こんにちは世界、カタカナ と ひらがな",
    "안녕하세요 세계",
    "مرحبا بالعالم، كيف حالك؟",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "😀😃👨‍👩‍👧‍👦🏳️‍🌈👍🏽 emoji 🇩🇪🇫🇷",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝕋𝕖𝕩𝕥",
    "e\u0301 combining a\u0308",
    "zero\u200bwidth\u200djoin\ufeffbom nbsp\u00a0here\u3000wide\u2003em",
    "def f(x):\n    return x ** 2  # square\n\n\nclass A:\n\tpass\n",
    'for(int i=0;i<10;++i){printf("%d\\n",i);}',
    '{"k": [1, 2.5, -3e10], "s": null}',
    "<h1>Title</h1><p>text</p></s>",
    "<bos>text<eos>",
    "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
    "<|im_start|>user\nHi<|im_end|>\n",
    "x <unused5> <unk> <pad>y",
    "▁▁ literal ▁mark",
    "1234567890 3.14159 1,000,000 ½ ² ٣",
    "don't I'LL we've HE'S they're",
    "http://example.com/a?b=c&d=e#f",
    "a" * 33 + " " * 70 + "x" + "\n" * 75 + "\t" * 40 + "-" * 21,
    "\ue000 private \uffff \U0010ffff",
    "\u2028line\u2029para\x85nel\x0bvt\x0cff",
]


def load(path: Path) -> llama_cpp.Llama:
    return llama_cpp.Llama(model_path=str(path), vocab_only=True, verbose=False)


def ids(model: llama_cpp.Llama, texts: list[str]) -> list[list[int]]:
    return [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]


def gemma(path: Path) -> None:
    """Adds words of the vocabulary itself in random order, which make long chains of merges."""
    model = load(path)
    generator = random.Random(7)
    words = [
        model.detokenize([generator.randrange(494, 236_000)]).decode(errors="ignore") for _ in range(3000)
    ]
    texts = TEXTS + ["".join(generator.sample(words, 30)) for _ in range(60)]
    write("gemma_tokens.json", {"texts": texts, "ids": ids(model, texts)})


def byte_level() -> None:
    """Runs every pre-tokenizer on one small vocabulary: the bytes, and merges of neighbours often met in TEXTS."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    corpus = [[alphabet[byte] for byte in text.encode()] for text in TEXTS]
    special = ["<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<unused5>"]
    user_defined = ["<h1>"]
    tokens, merges = list(alphabet.values()), []
    while len(merges) < 700:
        counts: dict[tuple[str, str], int] = {}
        for word in corpus:
            for pair in pairwise(word):
                if "<" not in pair[0]:  # nothing may spell a special token
                    counts[pair] = counts.get(pair, 0) + 1
        best = max(sorted(counts), key=lambda pair: counts[pair])
        merges.append(" ".join(best))
        if "".join(best) not in tokens:
            tokens.append("".join(best))
        corpus = [join(word, best) for word in corpus]
    types = [1] * len(tokens) + [3] * len(special) + [4] * len(user_defined)
    tokens += special + user_defined
    made = {"tokens": tokens, "types": types, "merges": merges, "texts": TEXTS, "ids": {}}
    for pre in PRE:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "vocab.gguf"
            writer = gguf.GGUFWriter(path, "llama")
            writer.add_tokenizer_model("gpt2")
            writer.add_tokenizer_pre(pre)
            writer.add_token_list(tokens)
            writer.add_token_types(types)
            writer.add_token_merges(merges)
            writer.add_bos_token_id(tokens.index("<bos>"))
            writer.add_eos_token_id(tokens.index("<eos>"))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
            made["ids"][pre] = ids(load(path), TEXTS)
    write("byte_level_tokens.json", made)


def join(word: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for symbol in word:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


def write(name: str, value: object) -> None:
    (HERE / name).write_text(json.dumps(value, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    gemma(Path(sys.argv[1]))
    byte_level()
