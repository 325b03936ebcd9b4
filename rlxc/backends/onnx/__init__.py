"""The ONNX backend: a graph that plain ONNX Runtime loads, with every quantised weight bit-exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from rlxc.artifact import ArtifactWriter, Library, Manifest
from rlxc.backends import BuildOptions, StoredAs
from rlxc.backends.onnx.external import WeightsFile
from rlxc.backends.onnx.genai import companion_files
from rlxc.backends.onnx.layout_costs import machine
from rlxc.backends.onnx.model import build_model
from rlxc.backends.onnx.planning import Nowhere, describe_weights, plan_weights
from rlxc.backends.onnx.runtime import installed_runtime
from rlxc.backends.onnx.storage import Storage, storage_name
from rlxc.backends.onnx.weights import Stored, write_weights
from rlxc.backends.recipes import Losses, ReadBytes
from rlxc.dtypes import DType
from rlxc.errors import OptionError
from rlxc.ir import Graph, Source
from rlxc.ir.target import TargetFeatures

_PACKED = [dtype for dtype in DType if dtype.is_packed]


class OnnxBackend:
    """Writes ``model.onnx`` and ``weights.bin``."""

    name = "onnx"

    def __init__(self) -> None:
        self._runtime = installed_runtime()
        self.runs_on = self._runtime.name
        self.features = TargetFeatures(
            # SkipSimplifiedLayerNormalization is slower here than Add and RMSNormalization.
            add_rms_norm=False,
            glu=True,
            group_query_attention=True,
            ring_cache=self._runtime.has_ring,
            cache_dtypes=(DType.F32, DType.F16),
            storage={dtype: storage_name(dtype) for dtype in _PACKED},
            widest={Storage.of(DType.Q8_0).name: DType.Q8_0},
        )

    def features_for(self, target: str, activations: str) -> TargetFeatures:
        """The features, with the layouts that ONNX Runtime can run.

        Raises:
            OptionError: a target was named.
        """
        _check_target(target)
        return replace(self.features, machines=(machine(self._runtime, int8=activations == "int8"),))

    def build(
        self,
        graph: Graph,
        read: ReadBytes,
        writer: ArtifactWriter,
        options: BuildOptions,
        progress: Callable[[str], None],
        losses: Losses | None = None,
    ) -> tuple[Library, ...]:
        """Write the graph's model and weights into an artifact.

        Args:
            graph: the graph after this backend's passes.
            read: gives the bytes of the model file's tensors.
            writer: the artifact being written.
            options: what the user chose.
            progress: told each weight's name when it is written.
            losses: told what encoding weights cost.

        Raises:
            OptionError: a target was named.
        """
        _check_target(options.target)
        with writer.file("weights.bin") as sink:
            file = WeightsFile("weights.bin", sink)
            stored = write_weights(graph, read, file, progress, losses)
            model = self._model(graph, stored, file, read, options)
        with writer.file("model.onnx") as sink:
            sink.write(model.SerializeToString(deterministic=True))
        return ()

    def check(self, graph: Graph, read: ReadBytes, options: BuildOptions) -> None:
        """Raise what `build` would raise for such a graph and such options, without writing anything."""
        _check_target(options.target)
        self._model(graph, plan_weights(graph), WeightsFile("", Nowhere()), read, options)

    def storage(self, graph: Graph, activations: str) -> dict[str, StoredAs]:
        """How each weight of a graph is stored and used, whatever activations are."""
        return describe_weights(graph)

    def companion_files(self, manifest: Manifest) -> dict[str, bytes]:
        """Files that let onnxruntime-genai load the artifact too; nothing where a model has no end token."""
        return companion_files(manifest) if manifest.tokenizer.eos_ids else {}

    def _model(
        self,
        graph: Graph,
        stored: Mapping[str, Stored],
        file: WeightsFile,
        read: ReadBytes,
        options: BuildOptions,
    ) -> ModelProto:
        def read_floats(name: str) -> npt.NDArray[np.float32]:
            recipe = graph.weight[name].recipe
            assert isinstance(recipe, Source)
            return read(recipe.tensor).view("<f4")

        return build_model(
            graph,
            stored,
            file,
            read_floats,
            runtime=self._runtime,
            int8=options.activations == "int8",
            context=options.context,
        )


def _check_target(target: str) -> None:
    if target != "native":
        raise OptionError(f"target {target!r} is unknown", remedy="the onnx backend has one target: native")
