"""The vocabulary of a GGUF file, turned into a standard ``tokenizer.json`` and a chat template."""

from rlxc.vocab.build import TokenizerFiles, build_tokenizer
from rlxc.vocab.templates import DEFAULT_TEMPLATES

__all__ = ["DEFAULT_TEMPLATES", "TokenizerFiles", "build_tokenizer"]
