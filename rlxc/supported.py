"""What is supported, as the code has it: formats, architectures, which of them are tested together, tokenizers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

from rlxc.backends import BACKENDS, Backend, get_backend
from rlxc.dtypes import ENCODABLE, DType
from rlxc.errors import OptionError
from rlxc.ir import Graph, Node, Source, TensorType, Value, Weight
from rlxc.ir.ops import DequantMatMul, MatMul
from rlxc.models import ARCHITECTURES
from rlxc.models.abilities import abilities
from rlxc.passes import ChooseWeightLayout
from rlxc.vocab.build import KINDS
from rlxc.vocab.pretokenizers import PRE_TOKENIZERS
from rlxc.weights.formats import FORMATS, GGML_FORMATS
from rlxc.weights.hf_families import FAMILIES

CELLS = tuple(product(ARCHITECTURES, (row.dtype for row in GGML_FORMATS.values())))
"""Every architecture with every format of GGUF: ``tests/models/test_every_format.py`` tests each of these."""

_TARGETS = {"tvm": "x86-64-v4-vnni"}
"""What layouts are chosen for, so that the table is the same everywhere."""

_SHAPE = (1024, 1024)
"""Of the matrix whose bytes are asked for: whole blocks and whole tiles of every format."""


@dataclass(frozen=True)
class StoredFormat:
    """What a backend makes of a format with int8 activations: bits per weight in an artifact, and what reads them."""

    bits: float
    route: str


@dataclass(frozen=True)
class Format:
    """A format of weights.

    Attributes:
        name: as ``--quantize`` and ``rlxc inspect`` have it.
        in_gguf: whether GGUF files hold it.
        block: weights in a block.
        bits: per weight in a file, scales with it.
        encoded: whether ``--quantize`` and ``--fold-to`` take it.
        stored: by backend, those that are installed.
    """

    name: str
    in_gguf: bool
    block: int
    bits: float
    encoded: bool
    stored: Mapping[str, StoredFormat]


@dataclass(frozen=True)
class Architecture:
    """A kind of model.

    Attributes:
        name: ``general.architecture`` of GGUF files.
        about: which models it covers.
        features: what its layers can have.
        ropes: scalings of its rotary embedding.
        folders: ``model_type`` of the Hugging Face folders that are read.
        formats: those that it is tested with.
    """

    name: str
    about: str
    features: tuple[str, ...]
    ropes: tuple[str, ...]
    folders: tuple[str, ...]
    formats: tuple[str, ...]


@dataclass(frozen=True)
class Tokenizer:
    """A kind of vocabulary: ``tokenizer.ggml.model`` of GGUF files."""

    name: str
    about: str


@dataclass(frozen=True)
class Supported:
    """All there is; ``pre_tokenizers`` are names of ``tokenizer.ggml.pre``, those that cut words alike together."""

    formats: tuple[Format, ...]
    architectures: tuple[Architecture, ...]
    tokenizers: tuple[Tokenizer, ...]
    pre_tokenizers: tuple[tuple[str, ...], ...]


def supported() -> Supported:
    """What is supported, on the backends that are installed."""
    engines = []
    for name in BACKENDS:
        try:
            engines.append(get_backend(name))
        except OptionError:  # its packages are not there
            continue
    return Supported(
        tuple(_format(dtype, engines) for dtype in FORMATS),
        tuple(map(_architecture, ARCHITECTURES)),
        tuple(
            Tokenizer(name, _first_line(sys.modules[kind.__module__].__doc__)) for name, kind in KINDS.items()
        ),
        tuple(entry.names for entry in PRE_TOKENIZERS),
    )


def _format(dtype: DType, engines: list[Backend]) -> Format:
    row = FORMATS[dtype]
    return Format(
        dtype.value,
        row in GGML_FORMATS.values(),
        row.block_size,
        row.bits_per_weight,
        dtype in ENCODABLE,
        {engine.name: _stored(dtype, engine) for engine in engines},
    )


def _stored(dtype: DType, engine: Backend) -> StoredFormat:
    """What a backend says of a model that is one product."""
    weight = Weight("w", TensorType(dtype, _SHAPE), Source("w"))
    x = Value("x", TensorType(DType.F32, ("batch", "seq", _SHAPE[1])))
    node = Node(DequantMatMul() if dtype.is_packed else MatMul(), ("x", "w"), ("y",))
    graph = Graph("product", (x,), ("y",), (node,), (weight,))
    features = engine.features_for(_TARGETS.get(engine.name, "native"), "int8")
    stored = engine.storage(ChooseWeightLayout(features).run(graph).graph, "int8")["w"]
    return StoredFormat(8 * stored.nbytes / prod(_SHAPE), stored.route)


def _architecture(name: str) -> Architecture:
    found = abilities(name)
    return Architecture(
        name,
        found.about,
        found.features,
        found.ropes,
        tuple(model_type for model_type, family in FAMILIES.items() if family.architecture == name),
        tuple(dtype.value for architecture, dtype in CELLS if architecture == name),
    )


def _first_line(docstring: str | None) -> str:
    return (docstring or "").partition("\n")[0]  # there is none with python -OO
