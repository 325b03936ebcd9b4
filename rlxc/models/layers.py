"""What architectures are made of: a builder of graphs that keeps account of every tensor of the file."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from rlxc.dtypes import DType
from rlxc.ir import Alias, Graph, Node, RopeSpec, Source, TensorType, Value, Weight
from rlxc.ir.ops import (
    Add,
    Attention,
    ClampedSwiglu,
    Constant,
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
    SoftCap,
    Split,
)
from rlxc.models.config import Config, Fields
from rlxc.weights.registry import F32, TiedAlias, WeightRegistry
from rlxc.weights.tensor_problems import TensorProblems


class Builder:
    """Emits the nodes of one model and checks each tensor's presence and shape as it is used."""

    def __init__(self, architecture: str, config: Config, registry: WeightRegistry, fields: Fields) -> None:
        self.config, self.registry = config, registry
        self._problems = fields.problems
        self._wrong = TensorProblems(fields.source, "the metadata", f"a {architecture} model")
        self.graph = Graph(architecture, (), (), (), ())
        self._inputs: list[Value] = []
        self._nodes: list[Node] = []
        self._weights: dict[str, Weight] = {}
        self._left_out: set[str] = set()
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

        If it does not, that is one more problem of the model, and the graph goes on as if it did.
        """
        if key not in self._weights:
            self._weights[key] = self._checked(key, shape)
        return key

    def _checked(self, key: str, shape: tuple[int, ...]) -> Weight:
        if not self.has(key):
            self._wrong.missing(key)
            return Weight(key, TensorType(DType.F32, shape), Source(key))
        kind, found = self.registry.kind(key), self.registry.resolve(key)
        if isinstance(kind, TiedAlias):
            target = self._weights[self.weight(kind.target, *shape)]
            return Weight(key, target.type, Alias(target.name))
        if found.shape != shape:
            self._wrong.misshapen(key, found.shape, shape)
            return Weight(key, TensorType(DType.F32, shape), Source(key))
        return Weight(
            key, TensorType(DType.F32 if isinstance(found, F32) else found.scheme, shape), Source(key)
        )

    def linear(self, name: str, x: str, key: str, out: int, in_: int) -> str:
        """``x W^T``, times the scale and plus the bias where the file has them.

        ``key`` is the tensors' name without ``.weight``. NVFP4 files have a scale of each matrix, and one of its
        input, which is for rounding that to NVFP4, too: nothing that happens here.
        """
        weight = self.weight(f"{key}.weight", out, in_)
        bias = (self.weight(f"{key}.bias", out),) if self.has(f"{key}.bias") else ()
        packed = self._weights[weight].type.dtype.is_packed
        op = DequantMatMul() if packed else MatMul()
        self._left_out.add(f"{key}.input_scale")
        if not self.has(f"{key}.scale"):
            return self.emit(name, op, x, weight, *bias)
        product = self.emit(f"{name}.unscaled", op, x, weight)
        scaled = f"{name}.unbiased" if bias else name
        self.emit(scaled, Mul(), product, self.weight(f"{key}.scale", 1))
        return self.emit(name, Add(), scaled, *bias) if bias else scaled

    def norm(self, name: str, x: str, key: str, size: int, heads: int = 1) -> str:
        """RMS norm over ``size`` channels, once or for each of ``heads``."""
        return self.emit(name, RmsNorm(self.config.eps, heads), x, self.weight(f"{key}.weight", size))

    def layer_norm(self, name: str, x: str, key: str, size: int) -> str:
        """Layer norm over ``size`` channels, with the bias if the file has one."""
        inputs = [x, self.weight(f"{key}.weight", size)]
        if self.has(f"{key}.bias"):
            inputs.append(self.weight(f"{key}.bias", size))
        return self.emit(name, LayerNorm(self.config.eps), *inputs)

    def embed(self, scale: float = 1.0) -> str:
        """The embedding of this step's tokens, times ``scale``."""
        table = self.weight("token_embd.weight", self.config.vocab, self.config.hidden)
        return self.scaled("scaled_embedding", self.emit("embedding", Embed(), self.ids, table), scale)

    def scaled(self, name: str, x: str, factor: float) -> str:
        """``x`` times a constant; itself where that is 1."""
        if factor == 1:
            return x
        return self.emit(name, Mul(), x, self.emit(f"{name}_factor", Constant(factor)))

    def rope_factors(self, rope: RopeSpec, original: int, context: int) -> tuple[str, ...]:
        """The tensor whose elements divide the frequencies of ``rope``, if the file has one.

        Llama 3.1's ``rope_freqs`` is for any context. LongRoPE has one set for contexts as long as the ``original``
        one, and one for longer ones: the context that the graph is built for decides, so that keys in a cache stay
        comparable. Source: Ding et al. 2024.
        """
        if self.has("rope_freqs.weight"):
            return (self.weight("rope_freqs.weight", rope.dim // 2),)
        kinds = ("long", "short") if context > original else ("short", "long")
        taken, other = (f"rope_factors_{kind}.weight" for kind in kinds)
        if not self.has(taken) and not self.has(other):
            return ()
        self._left_out.add(other)
        return (self.weight(taken, rope.dim // 2),)

    def attention(
        self,
        layer: int,
        x: str,
        rope: RopeSpec | None,
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
        queries and keys before they are rotated, each head by itself or all of them as a whole. Without ``rope`` they
        are not rotated.
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
        if rope is not None:
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

    def add(self, name: str, x: str, residual: str, scale: float = 1.0) -> str:
        """The residual sum ``scale * x + residual``."""
        return self.emit(name, Add(), self.scaled(f"{name}_scaled", x, scale), residual)

    def finish(
        self, x: str, *, layer_norm: bool = False, scale: float = 1.0, soft_cap: float | None = None
    ) -> Graph:
        """Final norm and logits of the wanted rows, times ``scale``, soft-capped.

        Takes note of tensors that were not used, and of all that is wrong with others.
        """
        c = self.config
        rows = self.emit("last", SelectRows(), x, self.rows)
        norm = self.layer_norm if layer_norm else self.norm
        normed = norm("output_norm", rows, "output_norm", c.hidden)
        # Before the product, whose rows are many more.
        normed = self.scaled("scaled_output_norm", normed, scale)
        logits = self.linear("logits" if soft_cap is None else "scores", normed, "output", c.vocab, c.hidden)
        if soft_cap is not None:
            logits = self.emit("logits", SoftCap(soft_cap), logits)
        for key in self.registry:
            if key not in self._weights and key not in self._left_out:
                self._wrong.surplus(key)
        self._wrong.report(self._problems)
        return replace(
            self.graph,
            inputs=tuple(self._inputs),
            outputs=(logits, *self._presents),
            nodes=tuple(self._nodes),
            weights=tuple(self._weights.values()),
        )
