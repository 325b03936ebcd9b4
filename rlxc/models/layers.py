"""What architectures are made of: a builder of graphs that keeps account of every tensor of the file."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from rlxc.dtypes import DType
from rlxc.errors import ModelError
from rlxc.ir import Alias, Graph, Node, RopeSpec, Source, TensorType, Value, Weight
from rlxc.ir.ops import (
    Add,
    Attention,
    ClampedSwiglu,
    DequantMatMul,
    Embed,
    ExpertMatMul,
    Gelu,
    KvAppend,
    LayerNorm,
    MatMul,
    MixExperts,
    Mul,
    Op,
    Positions,
    RmsNorm,
    Rope,
    Route,
    SelectRows,
    Silu,
    Split,
)
from rlxc.models.config import Config
from rlxc.weights.registry import F32, TiedAlias, WeightRegistry


class Builder:
    """Emits the nodes of one model and checks each tensor's presence and shape as it is used."""

    def __init__(self, architecture: str, config: Config, registry: WeightRegistry, source: object) -> None:
        self.config, self.registry, self.source = config, registry, source
        self.graph = Graph(architecture, (), (), (), ())
        self._inputs: list[Value] = []
        self._nodes: list[Node] = []
        self._weights: dict[str, Weight] = {}
        self._presents: list[str] = []
        self.ids = self._input("input_ids", DType.I64, "batch", "seq")
        self.rows = self._input("logit_rows", DType.I64, "rows")

    def _input(self, name: str, dtype: DType, *shape: int | str) -> str:
        self._inputs.append(Value(name, TensorType(dtype, shape)))
        return name

    def emit(self, name: str, op: Op, *inputs: str) -> str:
        """Add a node with one result of this name, and return the name."""
        self._nodes.append(Node(op, inputs, (name,)))
        return name

    def has(self, key: str) -> bool:
        """Whether the file has this tensor."""
        return key in self.registry

    def weight(self, key: str, *shape: int) -> str:
        """Use a tensor of the file, which must have this shape ``[out, in]`` or ``[n]``.

        Raises:
            ModelError: it is missing, or has another shape.
        """
        if key not in self._weights:
            if not self.has(key):
                raise ModelError(
                    f"tensor {key} is missing", source=self.source, remedy="the file is not a whole model"
                )
            found = self.registry.resolve(key)
            if found.shape != shape:
                raise ModelError(
                    f"tensor {key} has shape {list(found.shape)}, the metadata asks for {list(shape)}",
                    source=self.source,
                )
            kind = self.registry.kind(key)
            recipe = Alias(kind.target) if isinstance(kind, TiedAlias) else Source(key)
            if isinstance(kind, TiedAlias):
                self.weight(kind.target, *shape)
            dtype = DType.F32 if isinstance(found, F32) else found.scheme
            self._weights[key] = Weight(key, TensorType(dtype, shape), recipe)
        return key

    def linear(self, name: str, x: str, key: str, out: int, in_: int) -> str:
        """``x W^T``, plus the bias where the file has one; ``key`` is the tensors' name without ``.weight``."""
        inputs = [x, self.weight(f"{key}.weight", out, in_)]
        if self.has(f"{key}.bias"):
            inputs.append(self.weight(f"{key}.bias", out))
        packed = self._weights[inputs[1]].type.dtype.is_packed
        return self.emit(name, DequantMatMul() if packed else MatMul(), *inputs)

    def norm(self, name: str, x: str, key: str, size: int, heads: int = 1) -> str:
        """RMS norm over ``size`` channels, once or for each of ``heads``."""
        return self.emit(name, RmsNorm(self.config.eps, heads), x, self.weight(f"{key}.weight", size))

    def layer_norm(self, name: str, x: str, key: str, size: int) -> str:
        """Layer norm over ``size`` channels, with the bias if the file has one."""
        inputs = [x, self.weight(f"{key}.weight", size)]
        if self.has(f"{key}.bias"):
            inputs.append(self.weight(f"{key}.bias", size))
        return self.emit(name, LayerNorm(self.config.eps), *inputs)

    def embed(self) -> str:
        """The embedding of this step's tokens."""
        table = self.weight("token_embd.weight", self.config.vocab, self.config.hidden)
        return self.emit("embedding", Embed(), self.ids, table)

    def attention(
        self,
        layer: int,
        x: str,
        rope: RopeSpec,
        *,
        scale: float,
        window: int | None = None,
        soft_cap: float | None = None,
        qk_norm: Literal["head", "whole"] | None = None,
        sinks: bool = False,
        factors: tuple[str, ...] = (),
    ) -> str:
        """Self-attention of one layer, from its normed input to the output projection.

        Queries, keys and values are projected by one matrix where the file has ``attn_qkv``. ``qk_norm`` normalises
        queries and keys before they are rotated, each head by itself or all of them as a whole.
        """
        c, at, block = self.config, f"layers.{layer}", f"blk.{layer}"
        q_size, kv_size = c.heads * c.head_dim, c.kv_heads * c.head_dim
        q, k, v = self._projections(layer, x, (q_size, kv_size, kv_size))
        if qk_norm:
            q_parts, k_parts = (c.heads, c.kv_heads) if qk_norm == "head" else (1, 1)
            q = self.norm(f"{at}.q_norm", q, f"{block}.attn_q_norm", q_size // q_parts, q_parts)
            k = self.norm(f"{at}.k_norm", k, f"{block}.attn_k_norm", kv_size // k_parts, k_parts)
        cache = ("batch", c.kv_heads, "past", c.head_dim)
        past_key = self._input(f"past_key_values.{layer}.key", DType.F32, *cache)
        past_value = self._input(f"past_key_values.{layer}.value", DType.F32, *cache)
        positions = self.emit(f"{at}.positions", Positions(), self.ids, past_key)
        q = self.emit(f"{at}.q_rope", Rope(c.heads, rope), q, positions, *factors)
        k = self.emit(f"{at}.k_rope", Rope(c.kv_heads, rope), k, positions, *factors)
        keys = self.emit(f"present.{layer}.key", KvAppend(), past_key, k)
        values = self.emit(f"present.{layer}.value", KvAppend(), past_value, v)
        self._presents += [keys, values]
        sink = (self.weight(f"{block}.attn_sinks.weight", c.heads),) if sinks else ()
        op = Attention(c.heads, scale, window, soft_cap)
        heads = self.emit(f"{at}.attention", op, q, keys, values, *sink)
        return self.linear(f"{at}.o", heads, f"{block}.attn_output", c.hidden, q_size)

    def _projections(self, layer: int, x: str, sizes: tuple[int, int, int]) -> list[str]:
        """Queries, keys and values."""
        at, block, hidden = f"layers.{layer}", f"blk.{layer}", self.config.hidden
        if self.has(f"{block}.attn_qkv.weight"):
            whole = self.linear(f"{at}.qkv", x, f"{block}.attn_qkv", sum(sizes), hidden)
            return self.split(whole, sizes, [f"{at}.{part}" for part in "qkv"])
        return [
            self.linear(f"{at}.{part}", x, f"{block}.attn_{part}", size, hidden)
            for part, size in zip("qkv", sizes)
        ]

    def split(self, x: str, sizes: tuple[int, ...], names: list[str]) -> list[str]:
        """Cut the last dimension into parts of these sizes and names."""
        self._nodes.append(Node(Split(sizes), (x,), tuple(names)))
        return names

    def mlp(self, layer: int, x: str, activation: Silu | Gelu) -> str:
        """``down(act(up(x)))``."""
        c, at, block = self.config, f"layers.{layer}", f"blk.{layer}"
        up = self.linear(f"{at}.up", x, f"{block}.ffn_up", c.ffn, c.hidden)
        active = self.emit(f"{at}.act", activation, up)
        return self.linear(f"{at}.down", active, f"{block}.ffn_down", c.hidden, c.ffn)

    def gated_mlp(self, layer: int, x: str, activation: Silu | Gelu, *, fused: bool = False) -> str:
        """``down(act(gate(x)) * up(x))``; ``fused`` files have gate and up, in this order, in ``ffn_up``."""
        c, at, block = self.config, f"layers.{layer}", f"blk.{layer}"
        if fused:
            both = self.linear(f"{at}.gate_up", x, f"{block}.ffn_up", 2 * c.ffn, c.hidden)
            gate, up = self.split(both, (c.ffn, c.ffn), [f"{at}.gate", f"{at}.up"])
        else:
            gate = self.linear(f"{at}.gate", x, f"{block}.ffn_gate", c.ffn, c.hidden)
            up = self.linear(f"{at}.up", x, f"{block}.ffn_up", c.ffn, c.hidden)
        active = self.emit(f"{at}.act", activation, gate)
        gated = self.emit(f"{at}.gated", Mul(), active, up)
        return self.linear(f"{at}.down", gated, f"{block}.ffn_down", c.hidden, c.ffn)

    def experts(
        self,
        layer: int,
        x: str,
        experts: int,
        used: int,
        ffn: int,
        activation: Silu | ClampedSwiglu,
    ) -> str:
        """A gated MLP for each of ``experts``, of which each token uses the ``used`` that the router scores highest."""
        c, at, block = self.config, f"layers.{layer}", f"blk.{layer}"
        scores = self.linear(f"{at}.scores", x, f"{block}.ffn_gate_inp", experts, c.hidden)
        chosen, weights = f"{at}.experts", f"{at}.expert_weights"
        self._nodes.append(Node(Route(used), (scores,), (chosen, weights)))

        def product(name: str, x: str, key: str, out: int, in_: int) -> str:
            inputs = [x, self.weight(f"{block}.{key}_exps.weight", experts, out, in_), chosen]
            if self.has(f"{block}.{key}_exps.bias"):
                inputs.append(self.weight(f"{block}.{key}_exps.bias", experts, out))
            return self.emit(f"{at}.{name}", ExpertMatMul(), *inputs)

        gate = product("expert_gate", x, "ffn_gate", ffn, c.hidden)
        up = product("expert_up", x, "ffn_up", ffn, c.hidden)
        if isinstance(activation, ClampedSwiglu):
            gated = self.emit(f"{at}.expert_gated", activation, gate, up)
        else:
            active = self.emit(f"{at}.expert_act", activation, gate)
            gated = self.emit(f"{at}.expert_gated", Mul(), active, up)
        down = product("expert_down", gated, "ffn_down", c.hidden, ffn)
        return self.emit(f"{at}.mixed", MixExperts(), down, weights)

    def add(self, name: str, x: str, residual: str) -> str:
        """The residual sum."""
        return self.emit(name, Add(), x, residual)

    def finish(self, x: str) -> Graph:
        """Final norm and logits of the wanted rows; checks that every tensor of the file was used.

        Raises:
            ModelError: naming the first tensors that the architecture has no use for.
        """
        c = self.config
        rows = self.emit("last", SelectRows(), x, self.rows)
        normed = self.norm("output_norm", rows, "output_norm", c.hidden)
        logits = self.linear("logits", normed, "output", c.vocab, c.hidden)
        surplus = sorted(set(self.registry) - set(self._weights))
        if surplus:
            raise ModelError(
                f"{len(surplus)} tensors have no place in a {self.graph.name} model: {', '.join(surplus[:3])}",
                source=self.source,
                remedy="dropping them could change the result",
            )
        return replace(
            self.graph,
            inputs=tuple(self._inputs),
            outputs=(logits, *self._presents),
            nodes=tuple(self._nodes),
            weights=tuple(self._weights.values()),
        )
