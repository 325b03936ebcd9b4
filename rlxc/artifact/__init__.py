"""The artifact: a folder with a manifest, a compiled model, its weights and its tokenizer.

It is written under a hidden name and renamed when complete, so that whatever has the final name is whole. It is
opened with every field, size and digest checked. Digests find damage; they are not signatures.
"""

from rlxc.artifact.fields import Activations, BackendName
from rlxc.artifact.kv import (
    DEFAULT_ROLLBACK,
    KEY_TILE,
    KvCacheType,
    KvLayer,
    KvPlan,
    PageLayout,
)
from rlxc.artifact.lora import DEFAULT_MAX_RANK, UNIT_RANK, LoraGroup, LoraPart, LoraPlan
from rlxc.artifact.manifest import (
    FORMAT,
    MANIFEST,
    VERSION,
    AdapterEntry,
    FileEntry,
    Library,
    Manifest,
    ModelFacts,
    Options,
    TargetFacts,
    TokenizerFacts,
    WeightEntry,
)
from rlxc.artifact.read import Artifact, Verification
from rlxc.artifact.write import ArtifactWriter, FileWriter

__all__ = [
    "DEFAULT_MAX_RANK",
    "DEFAULT_ROLLBACK",
    "FORMAT",
    "KEY_TILE",
    "MANIFEST",
    "UNIT_RANK",
    "VERSION",
    "Activations",
    "AdapterEntry",
    "Artifact",
    "ArtifactWriter",
    "BackendName",
    "FileEntry",
    "FileWriter",
    "KvCacheType",
    "KvLayer",
    "KvPlan",
    "Library",
    "LoraGroup",
    "LoraPart",
    "LoraPlan",
    "Manifest",
    "ModelFacts",
    "Options",
    "PageLayout",
    "TargetFacts",
    "TokenizerFacts",
    "Verification",
    "WeightEntry",
]
