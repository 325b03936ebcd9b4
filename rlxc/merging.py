"""Writes a model with adapters merged in, as a file that other software loads."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from rlxc.adapting import Adapted, AdapterArgument, AdapterOptions, adapt
from rlxc.backends.recipes import Losses, packed_rows
from rlxc.dtypes import DType
from rlxc.errors import ArtifactError, OptionError, UnsupportedError
from rlxc.ir import Alias, Encode, Graph, TensorType, Weight
from rlxc.models import Config
from rlxc.passes.fold_lora import FoldLora
from rlxc.reading import read_model
from rlxc.weights.encode import encode
from rlxc.weights.formats import FORMATS
from rlxc.weights.gguf import GgufFile
from rlxc.weights.gguf_writer import NewTensor, write_gguf
from rlxc.weights.names import adds_one, huggingface_rows, is_of_experts, is_permuted, to_huggingface
from rlxc.weights.source import ModelFile, open_model

Progress = Callable[[str, int, int], None]
Rows = Iterator[npt.NDArray[np.uint8]]

_FLOATS = {DType.F32: "F32", DType.F16: "F16", DType.BF16: "BF16"}


@dataclass(frozen=True)
class Merged:
    """What was written, and what encoding the merged matrices anew cost, by tensor."""

    path: Path
    tensors: int
    losses: Mapping[str, Mapping[str, float | None]]


def merge(
    model: str | os.PathLike[str],
    adapters: Sequence[AdapterArgument],
    output: str | os.PathLike[str],
    *,
    fold_to: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Merge LoRA adapters into a model: ``W + scale * B A``, tensor by tensor.

    A ``.gguf`` output keeps the metadata of a GGUF model, and every tensor that no adapter changes, as they are. A
    ``.safetensors`` output has Hugging Face's names and order of rows, and floats of one type; the model's
    ``config.json`` and tokenizer belong beside it. Where an adapter changes the embedding or the logits of a model that
    ties them, they are tied no more, and the configuration has to say so.

    Args:
        model: a GGUF file or a Hugging Face folder.
        adapters: GGUF files or PEFT folders, with scales or without.
        output: a file that ends in ``.gguf`` or ``.safetensors``.
        fold_to: the format of merged matrices; by default their own, or one of about its size where it can only be read
            (:func:`rlxc.weights.encode.fitting`). In safetensors, the type of all: f16, bf16 or f32,
            by default the model's, or f16 if it is packed.
        overwrite: replace a file that is there.
        progress: called as the work goes on.

    Raises:
        RlxcError: the input is damaged or not supported, an option is out of range, or the output exists.
    """
    path = Path(output)
    if path.suffix not in (".gguf", ".safetensors"):
        raise OptionError(
            "is neither a .gguf nor a .safetensors file", source=path, remedy="name one of these"
        )
    if os.path.lexists(path) and not overwrite:
        raise OptionError("exists already", source=path, remedy="replace it, or give another path")
    if not adapters:
        raise OptionError("there is no adapter to merge", source=model, remedy="name one")
    to_gguf = path.suffix == ".gguf"
    if not to_gguf and fold_to not in (None, *_FLOATS):
        raise OptionError(f"a safetensors file cannot hold {fold_to}", remedy="fold to f16, bf16 or f32")
    options = AdapterOptions(adapters, "fold", fold_to=fold_to if to_gguf else DType.F32.value)
    losses = Losses()
    with open_model(model) as file:
        if to_gguf and not isinstance(file, GgufFile):
            raise UnsupportedError(
                "a Hugging Face folder cannot become a GGUF file",
                source=file.path,
                remedy="name a .safetensors file",
            )
        config, registry, graph, _ = read_model(file)
        adapted = adapt(options, graph, config, registry)
        changes = adapted.changes
        dtype = _float_type(fold_to, graph)
        graph = FoldLora(changes.folded, changes.fold_to).run(graph).graph
        weights = [weight for weight in graph.weights if not isinstance(weight.recipe, Alias)]
        merging = _Merging(
            file, graph, config, adapted, losses, progress or (lambda stage, done, total: None)
        )
        with _new_file(path) as sink:
            if isinstance(file, GgufFile) and to_gguf:
                merging.to_gguf(file, weights, sink)
            else:
                merging.to_safetensors(weights, dtype, sink)
    return Merged(path, len(weights), losses.summary())


@dataclass
class _Merging:
    file: ModelFile
    graph: Graph
    config: Config
    adapted: Adapted
    losses: Losses
    progress: Progress

    def to_gguf(self, file: GgufFile, weights: Sequence[Weight], sink: BinaryIO) -> None:
        # The parts of a split model become one file.
        pairs = [file.pair(key) for key in file.metadata if not key.startswith("split.")]
        tensors = [
            NewTensor(weight.name, weight.type.dtype, _shape(weight), rows)
            for weight, rows in self._rows_of(weights)
        ]
        write_gguf(sink, pairs, tensors, file.alignment)

    def to_safetensors(self, weights: Sequence[Weight], dtype: DType, sink: BinaryIO) -> None:
        architecture = self.graph.name
        experts = next((weight.name for weight in weights if is_of_experts(weight.name)), None)
        if experts is not None:
            raise UnsupportedError(
                f"{experts} would have to be cut into single experts",
                source=self.file.path,
                remedy="compile the model with the adapters, or merge those into its GGUF file",
            )
        named = {to_huggingface(architecture, weight.name): weight for weight in weights}
        # What a Hugging Face model computes from its configuration has no name there.
        kept = {name: _as_float(weight, dtype) for name, weight in named.items() if name is not None}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, weight in kept.items():
            shape = _shape(weight)
            start, end = end, end + int(np.prod(shape)) * FORMATS[dtype].block_bytes
            header[name] = {"dtype": _FLOATS[dtype], "shape": shape, "data_offsets": [start, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        sink.write(len(text).to_bytes(8, "little") + text)
        for weight, rows in self._rows_of(list(kept.values())):
            for part in self._as_huggingface(weight, rows):
                sink.write(np.ascontiguousarray(part).data)

    def _as_huggingface(self, weight: Weight, rows: Rows) -> Rows:
        """Rows in Hugging Face's order, and Gemma's norms without the 1 that GGUF adds."""
        architecture, name, config = self.graph.name, weight.name, self.config
        if adds_one(architecture, name):
            exact = weight.recipe.part if isinstance(weight.recipe, Encode) else weight
            values = np.concatenate(list(packed_rows(exact, self.adapted.read(self.file.data)))).view(
                np.float32
            )
            return iter([encode(weight.type.dtype, values.reshape(1, -1) - np.float32(1))])
        if is_permuted(architecture, name):
            whole = np.concatenate(list(rows))
            return iter([huggingface_rows(architecture, name, whole, config.heads, config.kv_heads)])
        return rows

    def _rows_of(self, weights: Sequence[Weight]) -> Iterator[tuple[Weight, Rows]]:
        """Each weight and its rows, made as they are asked for; progress is told when a weight is complete."""
        read = self.adapted.read(self.file.data)

        def rows(number: int, weight: Weight) -> Rows:
            yield from packed_rows(weight, read, self.losses)
            self.progress("weights", number, len(weights))

        for number, weight in enumerate(weights, 1):
            yield weight, rows(number, weight)


def _shape(weight: Weight) -> tuple[int, ...]:
    return tuple(map(int, weight.type.shape))


def _float_type(fold_to: str | None, graph: Graph) -> DType:
    """The one type of a safetensors file."""
    if fold_to is None:
        types = [weight.type.dtype for weight in graph.weights if len(weight.type.shape) == 2]
        return next((dtype for dtype in types if dtype in _FLOATS), DType.F16)
    return DType(fold_to)


def _as_float(weight: Weight, dtype: DType) -> Weight:
    if weight.type.dtype is dtype:
        return weight
    return replace(weight, type=TensorType(dtype, weight.type.shape), recipe=Encode(weight))


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that has its name only once it is complete.

    Raises:
        ArtifactError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(temporary, "xb") as sink:
            yield sink
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(
            f"cannot be written ({error.strerror})", source=path, remedy="give another output path"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
