"""LoRA adapters in the folders that PEFT writes: ``adapter_config.json`` and ``adapter_model.safetensors``.

A module ``M`` of the base model has tensors ``base_model.model.M.lora_A.weight`` ``[rank, in]`` and
``.lora_B.weight`` ``[out, rank]``; an embedding has ``.lora_embedding_A`` ``[rank, vocab]`` and
``.lora_embedding_B`` ``[hidden, rank]``; DoRA adds ``.lora_magnitude_vector`` ``[out]``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rlxc.errors import FormatError, ModelError, UnsupportedError, WeightError
from rlxc.weights.gguf_header import DAMAGED, quote
from rlxc.weights.lora import (
    EMBEDDING,
    Adapter,
    AdapterBase,
    Floats,
    LoraPair,
    check_target,
    in_model_order,
    make_pair,
    no_experts,
)
from rlxc.weights.names import adds_one, gguf_rows, to_gguf
from rlxc.weights.peft_config import PeftConfig, read_peft_config, saves
from rlxc.weights.safetensors import SafetensorsFile

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

_PREFIX = "base_model.model."
_LINEAR = (".lora_A.weight", ".lora_B.weight")
_EMBEDDING = (".lora_embedding_A", ".lora_embedding_B")
_MAGNITUDE = ".lora_magnitude_vector"
_FROZEN = ".base_layer.weight"
_PARTS = (*_LINEAR, *_EMBEDDING, _MAGNITUDE, _FROZEN)
_HEADS = ("embed_tokens", "lm_head")
"""What PEFT stores whole without being asked, after the vocabulary was resized."""
_LONGEST_NAME = 250


@dataclass(frozen=True)
class PeftAdapter:
    """An open PEFT folder.

    Attributes:
        folder: where it is.
        config: its settings.
        file: its open weights.
        modules: the tensors of each adapted module, by their role (``.lora_A.weight`` and so on).
        saved: the tensors that it brings whole, by their name in the base model.
    """

    folder: Path
    config: PeftConfig
    file: SafetensorsFile
    modules: Mapping[str, Mapping[str, str]]
    saved: Mapping[str, str]

    def rank(self, module: str) -> int:
        """The rank of a module, from the shape of its A."""
        parts = self.modules[module]
        return self.file.tensors[parts[_EMBEDDING[0] if _EMBEDDING[0] in parts else _LINEAR[0]]].shape[0]

    def read(self, base: AdapterBase, name: str) -> Adapter:
        """The adapter for a base model: f32, with GGUF's names and row order.

        Raises:
            ModelError: the adapter is for another model.
            FormatError: tensors contradict each other or the configuration, or a value is not finite.
            UnsupportedError: an element type or a combination of options is not implemented.
        """
        pairs = {self._target(base, f"{module}.weight"): module for module in self.modules}
        replaced = {self._target(base, whole): tensor for whole, tensor in self.saved.items()}
        if len(pairs) < len(self.modules) or len(replaced) < len(self.saved) or pairs.keys() & replaced:
            raise FormatError("adapts a tensor twice", source=self.file.path, remedy=DAMAGED)
        if self.config.ties_weights and {EMBEDDING, "output.weight"} & {*pairs, *replaced}:
            raise UnsupportedError(
                "ensure_weight_tying is true, and the embedding or the output is adapted",
                source=self.config.path,
                remedy="adapters of tied weights are not implemented: train it without",
            )
        digest = hashlib.sha256(self.config.sha256)
        self.file.hash_into(digest)
        return Adapter(
            name,
            self.folder,
            digest.hexdigest(),
            base.architecture,
            in_model_order({target: self._pair(base, target, module) for target, module in pairs.items()}),
            self.config.invocation_tokens,
            in_model_order(
                {target: self._whole(base, target, tensor) for target, tensor in replaced.items()}
            ),
        )

    def _target(self, base: AdapterBase, name: str) -> str:
        target = to_gguf(base.architecture, name)
        if target is None and ".experts" in name:  # where they are parameters, not modules
            raise no_experts(name.removesuffix(".weight"), self.file.path)
        if target is None:
            raise ModelError(
                f"adapts {quote(name)}, which no {base.architecture} model has",
                source=self.file.path,
                remedy="use the base model that it was trained for",
            )
        check_target(base, target, self.file.path)
        return target

    def _pair(self, base: AdapterBase, target: str, module: str) -> LoraPair:
        parts = self.modules[module]
        a_name, b_name = _EMBEDDING if target == EMBEDDING else _LINEAR
        if a_name not in parts:
            raise FormatError(
                f"{quote(module)} has {min(parts)[1:]}, but {a_name[1:]} is how such a module is adapted",
                source=self.file.path,
                remedy=DAMAGED,
            )
        a, b = self.file.floats(parts[a_name]), self._rows(base, target, parts[b_name])
        magnitude = self._rows(base, target, parts[_MAGNITUDE]) if _MAGNITUDE in parts else None
        pair = make_pair(self.file.path, module, a, b, self.config.scale_of(module), magnitude)
        if pair.rank != self.config.rank_of(module):
            raise FormatError(
                f"{quote(module)} has rank {pair.rank}, but the configuration says {self.config.rank_of(module)}",
                source=self.file.path,
                remedy="keep the two files of an adapter together",
            )
        if _FROZEN in parts:
            self._check_frozen(module, pair, target)
        return pair

    def _check_frozen(self, module: str, pair: LoraPair, target: str) -> None:
        """PEFT stores the weight under an adapted embedding too: the base model's own, of which we need no copy."""
        shape = (pair.b.shape[0], pair.a.shape[1])
        expected = shape[::-1] if target == EMBEDDING else shape
        found = self.file.tensors[self.modules[module][_FROZEN]].shape
        if found != expected:
            raise FormatError(
                f"{quote(module)} has a base layer of shape {list(found)}, but the pair makes it {list(expected)}",
                source=self.file.path,
                remedy=DAMAGED,
            )

    def _whole(self, base: AdapterBase, target: str, tensor: str) -> Floats:
        values = self._rows(base, target, tensor)
        return values + 1 if adds_one(base.architecture, target) else values

    def _rows(self, base: AdapterBase, target: str, tensor: str) -> Floats:
        """The values of a tensor, rows in GGUF's order."""
        rows = self.file.floats(tensor)
        try:
            return gguf_rows(base.architecture, target, rows, base.heads, base.kv_heads)
        except WeightError as error:
            raise ModelError(
                f"{target}: {error.problem}",
                source=self.file.path,
                remedy="use the base model that it was trained for",
            ) from None


def open_peft_adapter(folder: Path) -> PeftAdapter:
    """Open a folder that PEFT wrote.

    Raises:
        FormatError: a file is missing or damaged, or tensors and configuration contradict each other.
        UnsupportedError: the configuration asks for something that is not implemented.
    """
    config = read_peft_config(folder / CONFIG)
    if not (folder / WEIGHTS).exists() and (folder / "adapter_model.bin").exists():
        raise UnsupportedError(
            "adapter_model.bin is a pickle, which runs code when it is read",
            source=folder,
            remedy=f"save the adapter as {WEIGHTS} (safe_serialization=True)",
        )
    file = SafetensorsFile(folder / WEIGHTS)
    modules, saved = _sorted_out(file)
    for module, parts in modules.items():
        _check_module(file, config, module, parts)
    for whole in saved:
        module = whole.rpartition(".")[0]
        if not (config.stores_whole(module) or module.endswith(_HEADS)):
            raise FormatError(
                f"tensor {quote(whole)} is no part of a LoRA, and modules_to_save does not name its module",
                source=file.path,
                remedy="keep the two files of an adapter together",
            )
    for name in config.saved:
        if not any(saves(name, whole.rpartition(".")[0]) for whole in saved):
            raise FormatError(
                f"modules_to_save names {quote(name)}, but there is no tensor of it",
                source=file.path,
                remedy="keep the two files of an adapter together",
            )
    return PeftAdapter(folder, config, file, modules, saved)


def _sorted_out(file: SafetensorsFile) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """The tensors of each adapted module by their role, and the tensors of modules that are stored whole."""
    modules: dict[str, dict[str, str]] = {}
    saved: dict[str, str] = {}
    for tensor in file.tensors:
        if not tensor.startswith(_PREFIX) or len(tensor) > _LONGEST_NAME:
            raise FormatError(
                f"tensor {quote(tensor)} is not named as PEFT does",
                source=file.path,
                remedy=f"names begin with {_PREFIX}",
            )
        name = tensor[len(_PREFIX) :]
        part = next((part for part in _PARTS if name.endswith(part)), None)
        if part is None:
            saved[name] = tensor
        else:
            modules.setdefault(name[: -len(part)], {})[part] = tensor
    return modules, saved


def _check_module(file: SafetensorsFile, config: PeftConfig, module: str, parts: Mapping[str, str]) -> None:
    path = file.path
    pairs = [pair for pair in (_LINEAR, _EMBEDDING) if not set(pair).isdisjoint(parts)]
    if len(pairs) != 1:
        what = "both kinds of pairs" if pairs else f"{min(parts)[1:]}, but no pair"
        raise FormatError(f"{quote(module)} has {what}", source=path, remedy=DAMAGED)
    for half in pairs[0]:
        if half not in parts:
            raise FormatError(
                f"{quote(module)} has half a pair: {half[1:]} is missing", source=path, remedy=DAMAGED
            )
        shape = file.tensors[parts[half]].shape
        if len(shape) != 2:
            raise FormatError(
                f"{quote(parts[half])} has shape {list(shape)}, not two dimensions",
                source=path,
                remedy="adapters of matrices are implemented, not of convolutions",
            )
    if config.uses_dora != (_MAGNITUDE in parts):
        said = "has no" if config.uses_dora else "has a"
        raise FormatError(
            f"{quote(module)} {said} magnitude, but use_dora is {str(config.uses_dora).lower()}",
            source=path,
            remedy="keep the two files of an adapter together",
        )
    if config.uses_dora and pairs[0] is _EMBEDDING:
        raise UnsupportedError(
            f"{quote(module)} is an embedding with DoRA",
            source=path,
            remedy="DoRA is implemented for matrix products only",
        )
    if not config.is_target(module):
        raise FormatError(
            f"{quote(module)} is adapted, but target_modules does not name it",
            source=path,
            remedy="keep the two files of an adapter together",
        )
