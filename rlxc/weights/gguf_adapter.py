"""LoRA adapters in GGUF files, as llama.cpp's ``convert_lora_to_gguf.py`` writes and ``llama-adapter.cpp`` reads them.

A pair is ``X.lora_a`` ``[rank, in]`` and ``X.lora_b`` ``[out, rank]``, where X is the base model's tensor.  Only the
embedding's ``lora_a`` is stored the other way, ``[vocab, rank]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf.constants import Keys

from rlxc.errors import FormatError, ModelError, UnsupportedError
from rlxc.weights.formats import FORMATS
from rlxc.weights.gguf import GgufFile, open_gguf
from rlxc.weights.gguf_header import DAMAGED, quote
from rlxc.weights.lora import (
    EMBEDDING,
    Adapter,
    AdapterBase,
    Floats,
    LoraPair,
    check_target,
    in_model_order,
    lora_scale,
    make_pair,
    no_experts,
)
from rlxc.weights.names import is_of_experts

_A, _B = ".lora_a", ".lora_b"
_NORM = "_norm.weight"
# What a key may begin with if it says nothing about the arithmetic: names, licences, alignment, and shards.
_DESCRIPTIVE = ("general.", "split.")
_ADAPTER_KEYS = frozenset(
    {
        Keys.Adapter.TYPE,
        Keys.Adapter.LORA_ALPHA,
        Keys.Adapter.LORA_TASK_NAME,
        Keys.Adapter.LORA_PROMPT_PREFIX,
        Keys.Adapter.ALORA_INVOCATION_TOKENS,
    }
)


@dataclass(frozen=True)
class GgufAdapter:
    """What an open GGUF adapter says of itself.

    Attributes:
        file: the open file.
        architecture: of the base model.
        alpha: of all its pairs; 0 if the file names none.
        prompt_prefix: text that prompts shall begin with; empty if there is none.
        invocation_tokens: those of an activated LoRA.
        targets: the tensors that it has a pair for, in file order.
        replaced: the tensors that it brings whole: norms, which ``mergekit-extract-lora`` stores.
    """

    file: GgufFile
    architecture: str
    alpha: float
    prompt_prefix: str
    invocation_tokens: tuple[int, ...]
    targets: tuple[str, ...]
    replaced: tuple[str, ...]

    def rank(self, target: str) -> int:
        """The rank of a target, from the shape of its b."""
        return self.file.tensors[target + _B].shape[-1]

    def read(self, base: AdapterBase, name: str) -> Adapter:
        """The adapter for a base model; its values are decoded to f32.

        Raises:
            ModelError: the adapter is for another model.
            FormatError: the shapes of a pair do not belong together, or a value is not finite.
        """
        if self.architecture != base.architecture:
            raise ModelError(
                f"is for a {self.architecture} model, but the base model is {base.architecture}",
                source=self.file.path,
                remedy="use the base model that it was trained for",
            )
        for target in (*self.targets, *self.replaced):
            check_target(base, target, self.file.path)
        return Adapter(
            name,
            self.file.path,
            self.file.fingerprint(),
            self.architecture,
            in_model_order({target: self._pair(target) for target in self.targets}),
            self.invocation_tokens,
            in_model_order({target: self._values(target) for target in self.replaced}),
        )

    def _pair(self, target: str) -> LoraPair:
        a, b = self._values(target + _A), self._values(target + _B)
        if target == EMBEDDING:
            a = np.ascontiguousarray(a.T)
        return make_pair(self.file.path, target, a, b, lora_scale(self.alpha, b.shape[-1]))

    def _values(self, name: str) -> Floats:
        info = self.file.tensors[name]
        form, width = FORMATS[info.dtype], info.shape[-1]
        rows = self.file.data(name).reshape(-1, form.row_bytes(width))
        return form.decode(rows, width).reshape(info.shape)


def open_gguf_adapter(path: Path) -> GgufAdapter:
    """Open a GGUF file that is a LoRA adapter.

    Raises:
        FormatError: the file is damaged, no adapter, or half of a pair is missing.
        UnsupportedError: it is another kind of adapter, or has a key that may change the arithmetic.
    """
    file = open_gguf(path)
    kind = file.metadata.get(Keys.General.TYPE)
    if kind != "adapter":
        said = "is missing" if kind is None else f"is {quote(kind)}, not 'adapter'"
        raise FormatError(
            f"{Keys.General.TYPE} {said}", source=path, remedy="pass the file of a LoRA adapter"
        )
    adapter_type = file.metadata.get(Keys.Adapter.TYPE)
    if adapter_type != "lora":
        raise UnsupportedError(
            f"{Keys.Adapter.TYPE} is {quote(adapter_type)}", source=path, remedy="only 'lora' is implemented"
        )
    for key in file.metadata:
        if key not in _ADAPTER_KEYS and not key.startswith(_DESCRIPTIVE):
            raise UnsupportedError(
                f"metadata {quote(key)} is not known for an adapter",
                source=path,
                remedy="it may change the arithmetic, so it is not ignored",
            )
    if Keys.General.ARCHITECTURE not in file.metadata:
        raise FormatError(f"{Keys.General.ARCHITECTURE} is missing", source=path, remedy=DAMAGED)
    targets, replaced = _targets(file)
    _text(file, Keys.Adapter.LORA_TASK_NAME)
    return GgufAdapter(
        file,
        _text(file, Keys.General.ARCHITECTURE),
        _alpha(file),
        _text(file, Keys.Adapter.LORA_PROMPT_PREFIX),
        _tokens(file),
        targets,
        replaced,
    )


def _targets(file: GgufFile) -> tuple[tuple[str, ...], tuple[str, ...]]:
    pairs: dict[str, set[str]] = {}
    replaced = []
    for info in file.tensors.values():
        target, suffix = info.name[: -len(_A)], info.name[-len(_A) :]
        if suffix in (_A, _B):
            pairs.setdefault(target, set()).add(suffix)
        elif info.name.endswith(_NORM):
            replaced.append(info.name)
        else:
            raise FormatError(
                f"tensor {quote(info.name)} is neither half of a LoRA pair nor a norm",
                source=file.path,
                remedy="convert the adapter again with convert_lora_to_gguf.py",
            )
    for target, halves in pairs.items():
        missing = {_A, _B} - halves
        if missing:
            raise FormatError(
                f"{quote(target)} has half a pair: {min(missing)[1:]} is missing",
                source=file.path,
                remedy=DAMAGED,
            )
        if is_of_experts(target):
            raise no_experts(target, file.path)
        for name in (target + _A, target + _B):
            if len(file.tensors[name].shape) != 2:
                raise FormatError(
                    f"{quote(name)} has shape {list(file.tensors[name].shape)}, not two dimensions",
                    source=file.path,
                    remedy="adapters of matrices are implemented, not of convolutions",
                )
    return tuple(pairs), tuple(replaced)


def _text(file: GgufFile, key: str) -> str:
    value = file.metadata.get(key, "")
    if not isinstance(value, str):
        raise FormatError(f"{key} is {quote(value)}, not a string", source=file.path, remedy=DAMAGED)
    return value


def _alpha(file: GgufFile) -> float:
    key = Keys.Adapter.LORA_ALPHA
    value = file.metadata.get(key, 0.0)
    if not isinstance(value, float) or not math.isfinite(value):
        raise FormatError(f"{key} is {quote(value)}, not a finite f32", source=file.path, remedy=DAMAGED)
    return value


def _tokens(file: GgufFile) -> tuple[int, ...]:
    key = Keys.Adapter.ALORA_INVOCATION_TOKENS
    value = file.metadata.get(key)
    if value is None:
        return ()
    if not isinstance(value, np.ndarray) or value.dtype != np.uint32:
        raise FormatError(f"{key} is not an array of UINT32", source=file.path, remedy=DAMAGED)
    return tuple(int(token) for token in value)
