"""Hugging Face folders, read as if they were GGUF files: ``config.json`` and safetensors.

Tensors are translated as they are asked for: names, Llama's order of rows in q and k, Gemma's ``1 +`` in norms, f32
for everything of one dimension and all biases, experts in one tensor. Matrices are borrowed from the mapping as they
are, unless their rows are permuted, bitsandbytes packed them, or they are of experts.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from os import PathLike
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from rlxc.dtypes import DType
from rlxc.errors import FormatError, ModelError, Problems, RlxcError, UnsupportedError, WeightError
from rlxc.weights.files import MappedFile, parse_json, read_bytes
from rlxc.weights.formats import FORMATS
from rlxc.weights.gguf_header import MetaValue, quote
from rlxc.weights.hf_bnb import open_four_bit
from rlxc.weights.hf_config import HfConfig, read_config
from rlxc.weights.hf_gpt_oss import PLACES, Place, expert_blocks, expert_floats, packed_shapes, stored_shape
from rlxc.weights.names import adds_one, gguf_rows, layer_of, to_huggingface
from rlxc.weights.safetensors import SafetensorsFile, Tensor
from rlxc.weights.tensor_problems import TensorProblems

_CONFIG = "config.json"
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FINGERPRINTED = (
    _CONFIG,
    _INDEX,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""Besides the weights, everything that decides what is compiled."""

_TABLE, _OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
_FLOATS = {"F32": DType.F32, "F16": DType.F16, "BF16": DType.BF16}
# The frequencies of rotary embedding follow from the configuration; old files have them as well.
_DERIVED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb(_local)?\.inv_freq")

Bytes = npt.NDArray[np.uint8]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class HfTensor:
    """A tensor as GGUF would have it.

    ``source`` is its name in the folder, empty if it was computed, with a ``*`` for the number of an expert if it is of
    several tensors.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    nbytes: int
    source: str


class HfFolder:
    """An open Hugging Face folder; get one from `open_folder`.

    Attributes:
        path: the folder.
        metadata: what ``config.json`` says, with GGUF's keys.
        tensors: by GGUF name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = read_config(parse_json(read_bytes(path / _CONFIG), path / _CONFIG), path / _CONFIG)
        self.metadata: Mapping[str, MetaValue] = MappingProxyType(
            {**config.metadata, "general.name": path.resolve().name}
        )
        self._shards = _open_shards(path)
        self._others = [MappedFile(path / name) for name in _FINGERPRINTED if (path / name).exists()]
        tensors = _Translation(path, config, self._shards)
        self.tensors: Mapping[str, HfTensor] = MappingProxyType(tensors.infos)
        self._readers = tensors.readers

    def data(self, name: str) -> Bytes:
        """The bytes of a tensor, ``uint8 [nbytes]``, which outlive `close`: a view of the mapping, or made now.

        Raises:
            WeightError: there is no such tensor, or the folder is closed.
        """
        if name not in self.tensors:
            raise WeightError(
                f"has no tensor {quote(name)}",
                source=self.path,
                remedy="list its tensors with `rlxc inspect`",
            )
        self._open()
        return self._readers[name]()

    def fingerprint(self) -> str:
        """SHA-256 (hex) over the configuration, the tokenizer's files and the weights, each with its name.

        Raises:
            FormatError: a file is gone or has changed since it was opened.
            WeightError: the folder is closed.
        """
        digest = hashlib.sha256()
        for file in self._files():
            content = hashlib.sha256()
            file.hash_into(content)
            digest.update(f"{file.path.name}\0".encode() + content.digest())
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """Check that the bytes are still those that were opened.

        Raises:
            FormatError: a file is gone or has changed since it was opened.
            WeightError: the folder is closed.
        """
        for file in self._files():
            file.check_unchanged()

    def close(self) -> None:
        """Let go of the mappings; they end when the last view from `data` is gone."""
        for shard in self._shards:
            shard.close()
        self._shards, self._readers = [], {}

    def __enter__(self) -> HfFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _files(self) -> list[MappedFile | SafetensorsFile]:
        return [*self._others, *self._open()]

    def _open(self) -> list[SafetensorsFile]:
        if not self._shards:
            raise WeightError("the folder is closed", source=self.path, remedy="open it again")
        return self._shards


def open_folder(path: str | PathLike[str]) -> HfFolder:
    """Open a Hugging Face folder.

    Raises:
        FormatError: a file is missing, damaged or cut short, or this is no such folder.
        UnsupportedError: a kind of model, or something in it, that is not implemented.
        ModelError: configuration and tensors do not make up a model.
    """
    folder = Path(path)
    if not (folder / _CONFIG).exists():
        raise FormatError(f"has no {_CONFIG}", source=folder, remedy=_remedy(folder))
    return HfFolder(folder)


@dataclass(frozen=True)
class FolderSurvey:
    """What is in a Hugging Face folder, whether it can be read as a model or not."""

    model_type: str
    tensors: tuple[Tensor, ...]


def survey_folder(path: Path) -> FolderSurvey | None:
    """Look at a folder without asking what its configuration means; None if there are no tensors to look at.

    Raises:
        FormatError: a file is damaged.
    """
    kind = parse_json(read_bytes(path / _CONFIG), path / _CONFIG).get("model_type")
    if not any((path / name).exists() for name in (_SINGLE, _INDEX)):
        return None
    shards = _open_shards(path)
    tensors = tuple(tensor for shard in shards for tensor in shard.tensors.values())
    for shard in shards:
        shard.close()
    return FolderSurvey(kind if isinstance(kind, str) else "", tensors)


def _remedy(folder: Path) -> str:
    """What to do with a folder that is no model."""
    if (folder / "adapter_config.json").exists():
        return "this is an adapter: pass the model, and the adapter with --lora"
    if (folder / "manifest.json").exists():
        return "this is a compiled artifact: pass the model that it was made from"
    return "pass a GGUF file, or a Hugging Face folder with config.json and safetensors"


def _open_shards(path: Path) -> list[SafetensorsFile]:
    """The weights' files, checked against the index that names them."""
    single, index = path / _SINGLE, path / _INDEX
    if single.exists() and index.exists():
        raise FormatError(
            f"has {_SINGLE} as well as {_INDEX}", source=path, remedy="keep the one that is the model"
        )
    if single.exists():
        return [SafetensorsFile(single)]
    if not index.exists():
        if any(path.glob("*.bin")) or any(path.glob("*.pth")):
            raise UnsupportedError(
                "its weights are pickled, and reading a pickle can run code",
                source=path,
                remedy="save the model with Transformers as safetensors",
            )
        raise FormatError(f"has no {_SINGLE} and no {_INDEX}", source=path, remedy="download the weights too")
    places = parse_json(read_bytes(index), index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise FormatError("weight_map is missing or no object", source=index, remedy="download it again")
    for tensor, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise FormatError(
                f"weight_map puts {quote(tensor)} into {quote(name)}, which is no file beside it",
                source=index,
                remedy="download it again",
            )
    shards = []
    for name in sorted(set(places.values())):
        if not (path / name).exists():
            raise FormatError("is missing", source=path / name, remedy=f"{_INDEX} names it: download it too")
        shard = SafetensorsFile(path / name)
        promised = {tensor for tensor, place in places.items() if place == name}
        wrong = sorted(promised ^ shard.tensors.keys())
        if wrong:
            there = "has no tensor" if wrong[0] in promised else f"is not where {_INDEX} has tensor"
            raise FormatError(
                f"{there} {quote(wrong[0])}", source=shard.path, remedy="put the files of one model together"
            )
        shards.append(shard)
    return shards


@dataclass(frozen=True)
class _Matrix:
    """A matrix of the folder: its type in GGUF, and what gives its bytes."""

    dtype: DType
    read: Callable[[], Bytes]


class _Translation:
    """Finds each tensor that the configuration asks for, and makes sure that none is left."""

    def __init__(self, path: Path, config: HfConfig, shards: list[SafetensorsFile]) -> None:
        self.path, self.config = path, config
        self.files = {name: shard for shard in shards for name in shard.tensors}
        self.infos: dict[str, HfTensor] = {}
        self.readers: dict[str, Callable[[], Bytes]] = {}
        self._used: set[str] = set()
        self._wrong = TensorProblems(path, _CONFIG, f"the model that {_CONFIG} describes")
        self._problems = Problems()
        for name, shape in config.shapes.items():
            self._add(name, shape)
        for name, values in config.rope_factors.items():
            factors = np.ascontiguousarray(values, "<f4").view(np.uint8)
            self._put(HfTensor(name, DType.F32, values.shape, factors.nbytes, ""), factors.copy)
        self._used.update(filter(_DERIVED.fullmatch, self.files))
        if config.tied:
            self._used.add(_OUTPUT)
        for source in sorted(self.files.keys() - self._used):
            self._wrong.surplus(source)
        self._wrong.report(self._problems)
        if self._problems.found:
            raise self._problems.error()
        if config.tied:
            self._check_tied_output()

    def _add(self, name: str, shape: tuple[int, ...]) -> None:
        if self.config.architecture == "gpt-oss" and (place := PLACES.get(name.split(".", 2)[-1])):
            self._add_of_gpt_oss(name, shape, place)
            return
        source = to_huggingface(self.config.architecture, name)
        assert source is not None  # the configuration asks for nothing else
        if len(shape) == 1:
            if self._plain(source, shape) is not None:
                self._put_floats(name, shape, source, partial(self._vector, name, source))
            return
        experts = [source.replace("*", str(i)) for i in range(shape[0])] if "*" in source else [source]
        matrices = [self._matrix(name, one, shape[-2:]) for one in experts]
        found = [matrix for matrix in matrices if matrix is not None]
        if len(found) < len(experts):
            return
        dtype = found[0].dtype
        for one, matrix in zip(experts, found):
            if matrix.dtype is not dtype:
                problem = f"{matrix.dtype}, but the layer's first expert is {dtype}"
                self._wrong.add(one, f"is {problem}", f"are {problem}")
        nbytes = prod(shape[:-1]) * FORMATS[dtype].row_bytes(shape[-1])
        read = found[0].read if len(found) == 1 else partial(_joined, found)
        self._put(HfTensor(name, dtype, shape, nbytes, source), read)

    def _add_of_gpt_oss(self, name: str, shape: tuple[int, ...], place: Place) -> None:
        source = f"model.layers.{layer_of(name)}.{place.name}"
        if len(shape) == 3 and self.config.packing is DType.MXFP4 and source not in self.files:
            count, out, in_ = shape
            parts = {source + end: stored for end, stored in packed_shapes((count, out, in_), place).items()}
            sound = [self._is_sound(part, stored, "U8") for part, stored in parts.items()]
            if all(sound):
                nbytes = count * out * FORMATS[DType.MXFP4].row_bytes(in_)
                read = partial(self._blocks, parts, place)
                self._put(HfTensor(name, DType.MXFP4, shape, nbytes, source), read)
            return
        stored = stored_shape(shape, place)
        dtype = self._plain(source, stored)
        if dtype is None:
            return
        if len(shape) < 3:
            self._put_floats(name, shape, source, partial(self._floats, source, place))
            return
        size = FORMATS[dtype].block_bytes
        read = partial(self._experts, source, (*stored, size), place)
        self._put(HfTensor(name, dtype, shape, prod(shape) * size, source), read)

    def _put_floats(
        self, name: str, shape: tuple[int, ...], source: str, reader: Callable[[], Bytes]
    ) -> None:
        self._put(HfTensor(name, DType.F32, shape, 4 * prod(shape), source), reader)

    def _put(self, info: HfTensor, reader: Callable[[], Bytes]) -> None:
        self.infos[info.name], self.readers[info.name] = info, reader

    def _matrix(self, name: str, source: str, shape: tuple[int, ...]) -> _Matrix | None:
        """One matrix of the folder, the whole of ``name`` or one expert's; None if something is wrong with it."""
        packing = self.config.packing
        if source in self.files and packing in (DType.NF4, DType.FP4):
            try:
                packed = open_four_bit(self.files, source, packing, shape)
            except RlxcError as error:  # about the parts that it is packed in
                self._problems.add(error)
                self._used.update(part for part in self.files if f"{part}.".startswith(f"{source}."))
                return None
            if packed is not None:
                self._used.update(packed.parts)
                return _Matrix(packed.dtype, lambda: self._in_order(name, packed.rows()).reshape(-1))
        dtype = self._plain(source, shape)
        if dtype is None:
            return None
        rows = shape[0]
        return _Matrix(
            dtype,
            lambda: self._in_order(name, self.files[source].data(source).reshape(rows, -1)).reshape(-1),
        )

    def _plain(self, source: str, shape: tuple[int, ...]) -> DType | None:
        """The type of a tensor of floats; None if there is none, or it is of another type or shape."""
        return (
            _FLOATS[self.files[source].tensors[source].dtype]
            if self._is_sound(source, shape, *_FLOATS)
            else None
        )

    def _is_sound(self, source: str, shape: tuple[int, ...], *dtypes: str) -> bool:
        """Whether there is a tensor of one of these types and of this shape; if not, that is one more problem."""
        self._used.add(source)
        if source not in self.files:
            self._wrong.missing(source)
            return False
        found = self.files[source].tensors[source]
        if found.dtype not in dtypes:
            problem = f"element type {found.dtype}"
            others = ", and bitsandbytes' 4 bits" if len(shape) == 2 else ""
            remedy = f"supported: {', '.join(dtypes)}{others}"
            self._wrong.add(source, f"has {problem}", f"have {problem}", remedy, UnsupportedError)
            return False
        if found.shape != shape:
            self._wrong.misshapen(source, found.shape, shape)
            return False
        return True

    def _vector(self, name: str, source: str) -> Bytes:
        values = self.files[source].floats(source)
        if adds_one(self.config.architecture, name):
            values = values + np.float32(1)
        return _as_bytes(self._in_order(name, values))

    def _floats(self, source: str, place: Place) -> Bytes:
        """Of gpt-oss: sinks, or one number for each row of each expert."""
        return _as_bytes(self.files[source].floats(source)[..., place.first :: place.step])

    def _experts(self, source: str, shape: tuple[int, ...], place: Place) -> Bytes:
        return expert_floats(self.files[source].data(source).reshape(shape), place).reshape(-1)

    def _blocks(self, parts: Mapping[str, tuple[int, ...]], place: Place) -> Bytes:
        blocks, scales = (self.files[part].data(part).reshape(shape) for part, shape in parts.items())
        return expert_blocks(blocks, scales, place).reshape(-1)

    def _in_order(self, name: str, rows: npt.NDArray[Scalar]) -> npt.NDArray[Scalar]:
        return gguf_rows(self.config.architecture, name, rows, self.config.heads, self.config.kv_heads)

    def _check_tied_output(self) -> None:
        """A stored output matrix must be the embedding once more; to drop another would change every logit."""
        if _OUTPUT not in self.files:
            return
        ours, theirs = self.files[_TABLE], self.files[_OUTPUT]
        same_kind = ours.tensors[_TABLE].dtype == theirs.tensors[_OUTPUT].dtype
        if not same_kind or not _equal_bytes(ours.data(_TABLE), theirs.data(_OUTPUT)):
            raise ModelError(
                f"tie_word_embeddings is true, but {_OUTPUT} differs from {_TABLE}",
                source=self.path,
                remedy=f"set tie_word_embeddings to false in {_CONFIG} if the model has its own output matrix",
            )


def _joined(matrices: list[_Matrix]) -> Bytes:
    """The bytes of several matrices, one after the other."""
    return np.concatenate([matrix.read() for matrix in matrices])


def _as_bytes(values: npt.NDArray[np.float32]) -> Bytes:
    return np.ascontiguousarray(values, "<f4").reshape(-1).view(np.uint8)


def _equal_bytes(a: Bytes, b: Bytes) -> bool:
    step = 1 << 22  # comparing makes a temporary array as large as what is compared
    return len(a) == len(b) and all(
        np.array_equal(a[i : i + step], b[i : i + step]) for i in range(0, len(a), step)
    )
