"""What ``manifest.json`` says: typed, and checked field by field when it is read.

The dataclasses are the schema. A field's annotation gives its type and, through a rule of ``fields.py``, its range; one
reader follows the annotations, so that a new field needs no code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from rlxc.artifact.fields import (
    Activations,
    Bytes,
    Count,
    FileName,
    Finite,
    Index,
    Sha256,
    text,
)
from rlxc.artifact.kv import KvPlan
from rlxc.artifact.lora import UNIT_RANK, LoraPlan
from rlxc.dtypes import DType
from rlxc.errors import ArtifactError

MANIFEST = "manifest.json"
FORMAT = "rlxc-artifact"
VERSION = 3


@dataclass(frozen=True)
class ModelFacts:
    """What was compiled; ``fingerprint`` is the sha256 of the input.

    Of the experts in a weight ``[experts, out, in]``, a token uses ``experts_used``; 0 where there are none.
    """

    architecture: str
    name: str
    fingerprint: Sha256
    layers: Count
    heads: Count
    kv_heads: Count
    vocab_size: Count
    trained_context: Count
    experts_used: Index = 0


@dataclass(frozen=True)
class Library:
    """Machine code for one family of CPUs.

    ``machine`` is the architecture as ``platform.machine()`` names it on Linux; ``needs`` are the features that the
    code uses beyond that architecture's baseline, as ``/proc/cpuinfo`` spells them; ``target`` is what the compiler
    calls the family. A step needs ``workspace`` bytes of scratch memory, and makes ``calls`` calls of kernels. Of
    ``problems``, kernels at shapes that can be tuned, ``tuned`` were.
    """

    file: FileName
    target: Annotated[str, text("a target's name", r"[a-z0-9][a-z0-9_.-]{0,63}")]
    machine: Annotated[str, text("an architecture's name", r"[a-z0-9_]{1,32}")]
    needs: tuple[Annotated[str, text("a CPU feature's name", r"[a-z0-9_]{1,32}")], ...]
    workspace: Count
    calls: Count
    problems: Index
    tuned: Index


@dataclass(frozen=True)
class TargetFacts:
    """What the artifact runs on; ``runs_on`` is a claim that the backend's engine checks.

    ``backend`` may be one that a newer rlxc has: the runtime refuses what it has no engine for. A backend that makes
    machine code lists its ``libraries``, the best first; a machine loads the first that its CPU can run.
    """

    backend: Annotated[str, text("a backend's name", r"[a-z0-9_]{1,32}")]
    runs_on: str
    libraries: tuple[Library, ...] = ()


@dataclass(frozen=True)
class Options:
    """The compile options that shaped the artifact."""

    activations: Activations
    context: Count


@dataclass(frozen=True)
class WeightEntry:
    """One weight as stored: format, shape ``[out, in]``, and where it came from.

    The model file has ``nbytes`` of it, the artifact ``stored_bytes``; ``route`` says in words what reads it there.
    """

    name: str
    dtype: DType
    shape: tuple[Count, ...]
    recipe: str
    nbytes: Bytes
    stored_bytes: Bytes
    route: str


@dataclass(frozen=True)
class TokenizerFacts:
    """The token ids that start and end a text, and whether encoding adds them."""

    bos_id: Index | None
    eos_ids: tuple[Index, ...]
    add_bos: bool
    add_eos: bool


@dataclass(frozen=True)
class AdapterEntry:
    """A LoRA adapter that was compiled in.

    It was ``folded`` into weights, and is a part of them at this scale; or it lies in ``file``, and a new session's
    stack begins with it at this scale; or both, for different matrices: then it cannot be taken away.
    """

    name: str
    fingerprint: Sha256
    scale: Finite
    folded: tuple[str, ...]
    file: FileName | None


@dataclass(frozen=True)
class FileEntry:
    """The size in bytes and the digest of one file."""

    size: Bytes
    sha256: Sha256


@dataclass(frozen=True)
class Manifest:
    """Everything an artifact says about itself; ``rlxc`` is the version that compiled it.

    ``aliases`` are tensors of the model that take no bytes: other names of weights, such as a tied output matrix.
    """

    rlxc: str
    model: ModelFacts
    target: TargetFacts
    options: Options
    kv_cache: KvPlan
    tokenizer: TokenizerFacts
    weights: tuple[WeightEntry, ...]
    aliases: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    lora: LoraPlan | None = None
    adapters: tuple[AdapterEntry, ...] = ()
    files: Mapping[FileName, FileEntry] = field(default_factory=lambda: MappingProxyType({}))

    def to_json(self) -> bytes:
        """The text of ``manifest.json``; equal manifests give equal bytes."""
        tree = {"format": FORMAT, "version": VERSION, **_plain(self)}
        return (json.dumps(tree, indent=1, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, text: bytes, source: object = None) -> Manifest:
        """Read and check every field.

        Raises:
            ArtifactError: naming the first field that is missing, unknown, of the wrong type or out of range.
        """
        tree = parse_object(text, source)
        version, maker = tree.pop("version", None), tree.get("rlxc")
        if tree.pop("format", None) != FORMAT:
            raise ArtifactError(
                f"{MANIFEST} is not that of an rlxc artifact",
                source=source,
                remedy="give the path of an artifact",
            )
        if type(version) is int and version > VERSION:
            raise ArtifactError(
                f"made by a newer rlxc ({maker!r:.40}): its format is version {version}, this one reads {VERSION}",
                source=source,
                remedy="upgrade: pip install --upgrade rlxc",
            )
        try:
            _expect(type(version) is int and version == VERSION, str(VERSION), version, "version")
            manifest: Manifest = _read(cls, tree, "")
            _check_consistency(manifest)
        except _Mismatch as mismatch:
            raise ArtifactError(
                f"{MANIFEST}: {mismatch}", source=source, remedy="compile the model again"
            ) from None
        return manifest


def parse_object(text: bytes, source: object) -> dict[str, Any]:
    """The JSON object in ``text``; other JSON counts as an empty one.

    Raises:
        ArtifactError: it is not JSON.
    """
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{MANIFEST} is not JSON ({error})", source=source, remedy="compile the model again"
        ) from None
    return tree if isinstance(tree, dict) else {}


class _Mismatch(ValueError):
    """A field is not what its annotation says."""


def _plain(value: Any) -> Any:
    """Dataclasses, mappings and tuples as what ``json`` writes."""
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _read(kind: Any, value: Any, where: str) -> Any:
    """The JSON value at ``where`` as ``kind``: an annotated type, a container, a dataclass or a leaf."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        leaf = _read(args[0], value, where)
        for rule in args[1:]:
            _expect(rule.holds(leaf), rule.says, value, where)
        return leaf
    if origin in (Union, UnionType):  # of X and None only
        return None if value is None else _read(args[0], value, where)
    if origin is Literal:
        _expect(type(value) is str and value in args, " or ".join(map(repr, args)), value, where)
        return value
    if origin is tuple:
        _expect(type(value) is list, "a list", value, where)
        return tuple(_read(args[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is Mapping:
        _expect(type(value) is dict, "an object", value, where)
        items = {_read(args[0], key, f"a name in {where}"): item for key, item in value.items()}
        return MappingProxyType({key: _read(args[1], item, f"{where}.{key}") for key, item in items.items()})
    if is_dataclass(kind):
        return _read_object(kind, value, where)
    if issubclass(kind, Enum):
        names = [str(member.value) for member in kind]
        _expect(type(value) is str and value in names, f"one of {', '.join(names)}", value, where)
        return kind(value)
    _expect(type(value) is kind, f"of type {_JSON_NAMES[kind]}", value, where)
    return value


_JSON_NAMES = {int: "integer", float: "floating-point number", str: "string", bool: "boolean"}


def _read_object(kind: Any, value: Any, where: str) -> Any:
    """A JSON object as the dataclass ``kind``: exactly its fields."""
    _expect(type(value) is dict, "an object", value, where)
    kinds = get_type_hints(kind, include_extras=True)
    prefix = f"{where}." if where else ""
    missing = [name for name in kinds if name not in value]
    if missing:
        raise _Mismatch(f"{prefix}{missing[0]} is missing")
    unknown = [name for name in value if name not in kinds]
    if unknown:
        raise _Mismatch(f"{prefix or 'the top level '}has an unknown field {unknown[0]!r:.80}")
    return kind(**{name: _read(kinds[name], value[name], prefix + name) for name in kinds})


def _expect(holds: bool, says: str, value: object, where: str) -> None:
    if not holds:
        raise _Mismatch(f"{where} must be {says}, got {value!r:.80}")


def _check_consistency(manifest: Manifest) -> None:
    """What the fields must say together, so that the runtime can obey the plan."""
    plan, model, tokenizer = manifest.kv_cache, manifest.model, manifest.tokenizer
    if [layer.index for layer in plan.layers] != list(range(model.layers)):
        raise _Mismatch(f"kv_cache.layers must describe layers 0..{model.layers - 1} in order")
    if manifest.options.context != plan.context:
        raise _Mismatch(f"options.context is {manifest.options.context}, kv_cache.context is {plan.context}")
    if plan.problem:
        raise _Mismatch(f"kv_cache.{plan.problem}")
    for i, library in enumerate(manifest.target.libraries):
        if library.file not in manifest.files:
            raise _Mismatch(f"target.libraries[{i}].file is {library.file!r}, which is not among the files")
    names = {weight.name for weight in manifest.weights}
    for alias, weight in manifest.aliases.items():
        if alias in names or weight not in names:
            raise _Mismatch(
                f"aliases says that {alias!r:.80} is {weight!r:.80}, which the weights do not allow"
            )
    _check_lora(manifest)
    bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
    for token in (*bos, *tokenizer.eos_ids):
        if token >= model.vocab_size:
            raise _Mismatch(f"tokenizer names token {token}, the vocabulary has {model.vocab_size}")


def _check_lora(manifest: Manifest) -> None:
    lora = manifest.lora
    if lora is not None:
        if lora.dtype not in (DType.F32, DType.F16):
            raise _Mismatch(f"lora.dtype must be f32 or f16, got {lora.dtype}")
        if lora.max_rank % UNIT_RANK:
            raise _Mismatch(f"lora.max_rank must be a multiple of {UNIT_RANK}, got {lora.max_rank}")
        for i, group in enumerate(lora.groups):
            if len({part.columns for part in group.parts}) != 1:
                raise _Mismatch(f"lora.groups[{i}].parts must be some, and read one number of columns")
            if group.kind == "embedding" and len(group.parts) > 1:
                raise _Mismatch(f"lora.groups[{i}].parts must be one table, got {len(group.parts)}")
        for part in lora.parts:
            if part.first_row + part.rows > part.up_rows:
                raise _Mismatch(f"lora: {part.tensor} does not fit into the {part.up_rows} rows of {part.up}")
        _expect_unique((part.tensor for part in lora.parts), "lora")
    _expect_unique((adapter.name for adapter in manifest.adapters), "adapters")
    for i, adapter in enumerate(manifest.adapters):
        if adapter.file is None and not adapter.folded:
            raise _Mismatch(f"adapters[{i}] is neither folded nor in a file")
        if adapter.file is not None and adapter.file not in manifest.files:
            raise _Mismatch(f"adapters[{i}].file is {adapter.file!r}, which is not among the files")
        if adapter.file is not None and lora is None:
            raise _Mismatch(f"adapters[{i}].file is {adapter.file!r}, but lora is missing")


def _expect_unique(names: Iterable[str], where: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _Mismatch(f"{where} names {name!r:.80} twice")
        seen.add(name)
