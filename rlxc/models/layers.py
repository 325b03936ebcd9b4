"""What architectures are made of: a builder of graphs that keeps account of every tensor of the file."""

from __future__ import annotations

from dataclasses import replace

from rlxc.dtypes import DType
from rlxc.errors import ModelError
from rlxc.ir import Alias, Graph, Node, RopeSpec, Source, TensorType, Value, Weight
from rlxc.ir.ops import (
    Add,
    Attention,
    DequantMatMul,
    Embed,
    Gelu,
    KvAppend,
    MatMul,
    Mul,
    Op,
    Positions,
    RmsNorm,
    Rope,
    SelectRows,
    Silu,
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
        head_norm: bool = False,
        factors: tuple[str, ...] = (),
    ) -> str:
        """Self-attention of one layer, from its normed input to the output projection.

        ``head_norm`` normalises each head's query and key before they are rotated.
        """
        c, at, block = self.config, f"layers.{layer}", f"blk.{layer}"
        q_size, kv_size = c.heads * c.head_dim, c.kv_heads * c.head_dim
        q = self.linear(f"{at}.q", x, f"{block}.attn_q", q_size, c.hidden)
        k = self.linear(f"{at}.k", x, f"{block}.attn_k", kv_size, c.hidden)
        v = self.linear(f"{at}.v", x, f"{block}.attn_v", kv_size, c.hidden)
        if head_norm:
            q = self.norm(f"{at}.q_norm", q, f"{block}.attn_q_norm", c.head_dim, c.heads)
            k = self.norm(f"{at}.k_norm", k, f"{block}.attn_k_norm", c.head_dim, c.kv_heads)
        cache = ("batch", c.kv_heads, "past", c.head_dim)
        past_key = self._input(f"past_key_values.{layer}.key", DType.F32, *cache)
        past_value = self._input(f"past_key_values.{layer}.value", DType.F32, *cache)
        positions = self.emit(f"{at}.positions", Positions(), self.ids, past_key)
        q = self.emit(f"{at}.q_rope", Rope(c.heads, rope), q, positions, *factors)
        k = self.emit(f"{at}.k_rope", Rope(c.kv_heads, rope), k, positions, *factors)
        keys = self.emit(f"present.{layer}.key", KvAppend(), past_key, k)
        values = self.emit(f"present.{layer}.value", KvAppend(), past_value, v)
        self._presents += [keys, values]
        heads = self.emit(f"{at}.attention", Attention(c.heads, scale, window), q, keys, values)
        return self.linear(f"{at}.o", heads, f"{block}.attn_output", c.hidden, q_size)

    def gated_mlp(self, layer: int, x: str, activation: Silu | Gelu) -> str:
        """``down(act(gate(x)) * up(x))``."""
        c, at, block = self.config, f"layers.{layer}", f"blk.{layer}"
        gate = self.linear(f"{at}.gate", x, f"{block}.ffn_gate", c.ffn, c.hidden)
        up = self.linear(f"{at}.up", x, f"{block}.ffn_up", c.ffn, c.hidden)
        active = self.emit(f"{at}.act", activation, gate)
        gated = self.emit(f"{at}.gated", Mul(), active, up)
        return self.linear(f"{at}.down", gated, f"{block}.ffn_down", c.hidden, c.ffn)

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
