"""The whole ONNX model: its interface, its nodes, and its initializers.

The interface follows the convention of onnxruntime-genai: ``input_ids``, ``attention_mask`` (ones, as long as past
and new tokens together), ``past_key_values.N.key/value`` and ``present.N.key/value`` (bind both to one buffer). More
inputs have defaults: ``logit_rows``, the tokens whose logits are wanted, ``[-1]`` unless it is fed, and, where the
model takes LoRA adapters, theirs (:mod:`rlxc.backends.onnx.lora`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import ModelProto, TensorProto, ValueInfoProto, helper, numpy_helper

from rlxc.backends.onnx.external import WeightsFile
from rlxc.backends.onnx.lora import MICROSOFT
from rlxc.backends.onnx.lower import FLOAT_TYPES, Lowering, ReadFloats
from rlxc.backends.onnx.runtime import Runtime
from rlxc.backends.onnx.weights import Stored
from rlxc.dtypes import DType
from rlxc.ir import Graph, TensorType

OPSET = 23
IR_VERSION = 11

_TYPES = {**FLOAT_TYPES, DType.I32: TensorProto.INT32, DType.I64: TensorProto.INT64}


def build_model(
    graph: Graph,
    stored: Mapping[str, Stored],
    file: WeightsFile,
    read_floats: ReadFloats,
    *,
    runtime: Runtime,
    int8: bool,
    context: int,
) -> ModelProto:
    """Lower a scheduled graph to an ONNX model whose weights lie in ``file``.

    Args:
        graph: the graph after the ONNX target's passes.
        stored: where each weight lies.
        file: the weights file; position tables are appended to it.
        read_floats: gives small f32 weights (rope factors), which become part of those tables.
        runtime: the ONNX Runtime that the model is for.
        int8: whether matrix products may quantise activations to int8; otherwise they stay f32.
        context: number of positions.

    Raises:
        UnsupportedError: an op has no ONNX equivalent.
    """
    to = Lowering(graph, stored, file, read_floats, runtime=runtime, int8=int8, context=context)
    to.lower_nodes()
    inputs = []
    for value in graph.inputs:
        if value.name == "past_length":
            inputs.append(_value_info("attention_mask", TensorType(DType.I64, ("batch", "total"))))
            continue
        adapter_inputs = to.side_paths.inputs_for(value.name)
        for name, one in adapter_inputs.items():
            inputs.append(_value_info(name, TensorType(DType.F32, one.shape)))
        if not adapter_inputs:
            inputs.append(_value_info(value.name, value.type))
    to.side_paths.add_defaults()
    if any(value.name == "logit_rows" for value in graph.inputs):
        to.initializers["logit_rows"] = numpy_helper.from_array(np.array([-1]), "logit_rows")
    outputs = [_value_info(name, graph.types[name]) for name in graph.outputs]
    if "logits" in graph.outputs:
        # Declared as one row, the default, because onnxruntime-genai asks for every token's logits otherwise.
        outputs[graph.outputs.index("logits")].type.tensor_type.shape.dim[1].dim_value = 1
    proto = helper.make_graph(to.nodes, graph.name, inputs, outputs, list(to.initializers.values()))
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    return helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="rlxc")


def _value_info(name: str, type_: TensorType) -> ValueInfoProto:
    shape = list(type_.shape)
    if len(shape) == 4:
        # Any capacity will do that holds the context, or a ring's window; the name says what was planned.
        shape[2] = f"capacity_{shape[2]}"
    return helper.make_tensor_value_info(name, _TYPES[type_.dtype], shape)
