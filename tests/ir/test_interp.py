"""The oracle itself, against loops that follow the definitions one number at a time."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
from numbers_in_f64 import Floats, assert_close, normal

from rlxc.dtypes import DType
from rlxc.errors import GraphError
from rlxc.ir import RopeSpec, ops, parse
from rlxc.ir.interp import evaluate, run, weight_array


def past(length: int) -> npt.NDArray[np.int32]:
    return np.array(length, np.int32)


def slow_attention(op: ops.Attention, q: Floats, k: Floats, v: Floats, sinks: Floats | None) -> Floats:
    """``q [S, heads * D]``, ``k`` and ``v`` ``[K, T, D]``: softmax over the visible keys, query by query."""
    step, (kv_heads, total, dim) = len(q), k.shape
    out = np.zeros_like(q)
    for s in range(step):
        position = total - step + s
        visible = range(0 if op.window is None else max(0, position - op.window + 1), position + 1)
        for h in range(op.heads):
            kv, part = h // (op.heads // kv_heads), slice(h * dim, (h + 1) * dim)
            scores = [op.scale * sum(q[s, part] * k[kv, t]) for t in visible]
            if op.soft_cap is not None:
                scores = [op.soft_cap * math.tanh(score / op.soft_cap) for score in scores]
            total_size = sum(map(math.exp, scores)) + (0 if sinks is None else math.exp(sinks[h]))
            for t, score in zip(visible, scores):
                out[s, part] += math.exp(score) / total_size * v[kv, t]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize(("soft_cap", "with_sinks"), [(None, False), (0.7, False), (None, True), (0.7, True)])
def test_attention_follows_its_definition(
    heads: int, kv_heads: int, window: int | None, soft_cap: float | None, with_sinks: bool
) -> None:
    q, k, v = normal(2, 4, heads * 6), normal(2, kv_heads, 9, 6, seed=1), normal(2, kv_heads, 9, 6, seed=2)
    sinks = normal(heads, seed=3) if with_sinks else None
    op = ops.Attention(heads, 0.3, window, soft_cap)
    (found,) = evaluate(op, [q, k, v] if sinks is None else [q, k, v, sinks])
    for batch in range(2):
        assert_close(found[batch], slow_attention(op, q[batch], k[batch], v[batch], sinks))


@pytest.mark.parametrize("window", [1, 2, 4])
def test_a_query_sees_window_keys_its_own_included(window: int) -> None:
    values = np.eye(8)[None, None]  # the output lists the weight of every key
    (found,) = evaluate(ops.Attention(1, 1.0, window), [np.zeros((1, 3, 8)), np.zeros((1, 1, 8, 8)), values])
    for s, weights in enumerate(found[0]):
        own = 8 - 3 + s
        assert np.flatnonzero(weights).tolist() == list(range(own - window + 1, own + 1))


def test_attention_sees_no_later_key() -> None:
    q, k, v = normal(1, 3, 4), normal(1, 1, 3, 4, seed=1), normal(1, 1, 3, 4, seed=2)
    (before,) = evaluate(ops.Attention(1, 1.0), [q, k, v])
    k[:, :, 2], v[:, :, 2] = 100.0, -100.0
    (after,) = evaluate(ops.Attention(1, 1.0), [q, k, v])
    np.testing.assert_array_equal(before[:, :2], after[:, :2])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("factors", [None, np.array([1.0, 3.0])])
def test_rope_turns_pairs_of_channels(interleaved: bool, factors: Floats | None) -> None:
    x, positions = normal(1, 2, 2 * 6), np.array([[5, 6]])
    spec = RopeSpec(100.0, 4, interleaved)
    (found,) = evaluate(ops.Rope(2, spec), [x, positions] if factors is None else [x, positions, factors])
    for s, h, pair in np.ndindex(2, 2, 2):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + 2)
        angle = positions[0, s] * 100.0 ** (-2 * pair / 4) / (1.0 if factors is None else factors[pair])
        turned = complex(x[0, s, 6 * h + first], x[0, s, 6 * h + second]) * complex(
            math.cos(angle), math.sin(angle)
        )
        assert_close(found[0, s, 6 * h + first], turned.real)
        assert_close(found[0, s, 6 * h + second], turned.imag)


def test_append_puts_heads_apart_and_rows_last() -> None:
    cache, new = normal(1, 2, 3, 4), normal(1, 2, 8, seed=1)
    (grown,) = evaluate(ops.KvAppend(), [cache, new])
    assert grown.shape == (1, 2, 5, 4)
    np.testing.assert_array_equal(grown[:, :, :3], cache)
    np.testing.assert_array_equal(grown[0, 1, 4], new[0, 1, 4:])


def test_linear_write_stores_a_row_at_its_position() -> None:
    cache = np.full((1, 1, 5, 2), np.nan)
    (written,) = evaluate(ops.KvWrite("linear"), [cache, np.array([[[1.0, 2], [3, 4]]]), past(2)])
    np.testing.assert_array_equal(written[0, 0], [[np.nan] * 2, [np.nan] * 2, [1, 2], [3, 4], [np.nan] * 2])


def test_ring_write_wraps_around() -> None:
    cache = np.zeros((1, 1, 4, 1))
    (written,) = evaluate(ops.KvWrite("ring"), [cache, np.array([[[1.0], [2], [3]]]), past(6)])
    assert written.ravel().tolist() == [3, 0, 1, 2]


def test_write_leaves_its_input_as_it_was() -> None:
    cache = np.zeros((1, 1, 4, 1))
    evaluate(ops.KvWrite("linear"), [cache, np.ones((1, 1, 1)), past(0)])
    assert not cache.any()


def test_linear_read_gives_all_rows() -> None:
    cache = np.arange(5.0).reshape(1, 1, 5, 1)
    (rows,) = evaluate(ops.KvRead("linear"), [cache, np.zeros((1, 2, 1)), past(2)])
    assert rows.ravel().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("length", "expected"),
    [(0, [10, 11]), (1, [10, 11, 12]), (5, [13, 14, 15, 16]), (7, [15, 16, 10, 11])],
    ids=["first step", "less than a window", "end of the ring", "around the ring"],
)
def test_ring_read_gives_what_the_step_sees_oldest_first(length: int, expected: list[int]) -> None:
    cache = np.arange(10.0, 17).reshape(1, 1, 7, 1)
    (rows,) = evaluate(ops.KvRead("ring", 3), [cache, np.zeros((1, 2, 1)), past(length)])
    assert rows.ravel().tolist() == expected


def test_linear_cache_that_is_full_is_an_error() -> None:
    with pytest.raises(GraphError, match=r"3 \+ 2 rows do not fit a linear cache of 4"):
        evaluate(ops.KvWrite("linear"), [np.zeros((1, 1, 4, 1)), np.zeros((1, 2, 1)), past(3)])


def test_step_longer_than_a_ring_is_an_error() -> None:
    with pytest.raises(GraphError, match="do not fit a ring cache of 4"):
        evaluate(ops.KvWrite("ring"), [np.zeros((1, 1, 4, 1)), np.zeros((1, 5, 1)), past(0)])


def test_ring_too_small_for_window_and_step_is_an_error() -> None:
    with pytest.raises(GraphError, match="a step of 3 tokens needs 5 rows of a ring of 4"):
        evaluate(ops.KvRead("ring", 3), [np.zeros((1, 1, 4, 1)), np.zeros((1, 3, 1)), past(6)])


def test_ring_holds_exactly_a_window_and_a_step_less_one() -> None:
    (rows,) = evaluate(ops.KvRead("ring", 3), [np.zeros((1, 1, 5, 1)), np.zeros((1, 3, 1)), past(6)])
    assert rows.shape[2] == 5


# The second sequence's pages are apart from the first's, but for the one that holds positions 8 to 15.
TABLE = np.array([[5, 2, 7, 0], [1, 2, 4, 9]], np.int32)


def test_paged_write_stores_a_row_in_the_page_of_its_position() -> None:
    pool = np.zeros((10, 2, 8, 1))
    new = np.arange(1.0, 13).reshape(2, 3, 2)
    (written,) = evaluate(ops.KvWrite("paged"), [pool, new, past(15), TABLE[:, [0, 3, 2, 1]]])
    # Positions 15, 16 and 17: the last row of entry 1 and the first two of entry 2.
    expected = np.zeros_like(pool)
    for sequence, (second, third) in enumerate([(0, 7), (9, 4)]):
        for head in range(2):
            expected[second, head, 7] = new[sequence, 0, head]
            expected[third, head, :2, 0] = new[sequence, 1:, head]
    np.testing.assert_array_equal(written, expected)
    assert not pool.any()


@pytest.mark.parametrize("length", [0, 7, 8, 20])
@pytest.mark.parametrize("window", [None, 1, 4, 9, 40])
def test_paged_read_gives_what_the_step_sees_oldest_first(length: int, window: int | None) -> None:
    pool = normal(10, 2, 8, 3)
    (rows,) = evaluate(ops.KvRead("paged", window), [pool, np.zeros((2, 5, 6)), past(length), TABLE])
    first = 0 if window is None else max(0, length + 1 - window)
    assert rows.shape == (2, 2, length + 5 - first, 3)
    for sequence in range(2):
        for t, position in enumerate(range(first, length + 5)):
            page = pool[TABLE[sequence, position // 8]]
            np.testing.assert_array_equal(rows[sequence, :, t], page[:, position % 8])


def test_pages_behind_the_window_need_no_entry() -> None:
    table = np.array([[-1, 99, 3, 0]], np.int32)
    pool = normal(4, 1, 8, 1)
    (rows,) = evaluate(ops.KvRead("paged", 4), [pool, np.zeros((1, 1, 1)), past(19), table])
    np.testing.assert_array_equal(rows[0, 0, :, 0], pool[3, 0, :4, 0])


@pytest.mark.parametrize(
    ("table", "length", "problem"),
    [
        ([[5, 2], [1, 4]], 14, "position 16 is beyond a table of 2 pages"),
        ([[5, 2], [1, -1]], 8, "a block table names page -1 of 10"),
        ([[5, 2], [10, 3]], 0, "a block table names page 10 of 10"),
        ([[5, 2], [1, 2]], 8, "two sequences write to one row of a page"),
        ([[5, 5], [1, 2]], 6, None),
    ],
)
def test_paged_write_to_where_it_must_not_is_an_error(
    table: list[list[int]], length: int, problem: str | None
) -> None:
    inputs = [np.zeros((10, 1, 8, 1)), np.zeros((2, 3, 1)), past(length), np.array(table, np.int32)]
    if problem is None:  # a page twice in one table: its rows differ all the same
        evaluate(ops.KvWrite("paged"), inputs)
        return
    with pytest.raises(GraphError, match=problem):
        evaluate(ops.KvWrite("paged"), inputs)


HALVES = {
    DType.F32: ([1 / 3, 1e-9], [1 / 3, 1e-9]),
    # f16 has steps of 2 from 2048 on, and of 2^-24 below 2^-14.
    DType.F16: ([2049.0, 2051.0, 2.0**-25, 3 * 2.0**-25], [2048.0, 2052.0, 0.0, 2.0**-23]),
    # bf16 has 8 significant bits: steps of 2 from 256 on.
    DType.BF16: ([257.0, 259.0, -257.0, 258.0, 2.0**99], [256.0, 260.0, -256.0, 258.0, 2.0**99]),
    # The largest of a row becomes 127: steps of 2 here.
    DType.INT8: ([254.0, 1.0, 3.0, -5.0, -254.0, 100.9], [254.0, 0.0, 4.0, -4.0, -254.0, 100.0]),
}
"""Numbers, and what is left of them in a cache of each type; halves go to even ones."""


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rows_are_rounded_as_they_are_stored(dtype: DType) -> None:
    given, kept = map(np.array, HALVES[dtype])
    size = len(given)
    new = np.concatenate([given, 2 * given])[None, None]  # two heads: their scales are apart
    (written,) = evaluate(ops.KvWrite("linear"), [np.zeros((1, 2, 1, size)), new, past(0)], dtype)
    np.testing.assert_array_equal(written[0, 0, 0], kept)
    if dtype is DType.INT8:
        np.testing.assert_array_equal(written[0, 1, 0], 2 * kept)


def test_scale_of_codes_is_f32() -> None:
    (written,) = evaluate(
        ops.KvWrite("linear"), [np.zeros((1, 1, 1, 1)), np.ones((1, 1, 1)), past(0)], DType.INT8
    )
    assert written.item() == 127 * float(np.float32(1 / 127)) != 1.0


def test_row_of_zeros_has_codes_of_zero() -> None:
    (written,) = evaluate(
        ops.KvWrite("linear"), [np.ones((1, 1, 1, 2)), np.zeros((1, 1, 2)), past(0)], DType.INT8
    )
    assert written.ravel().tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("length", [0, 3, 9, 25])
@pytest.mark.parametrize(("layout", "capacity"), [("linear", 32), ("ring", 7), ("paged", 8)])
def test_fused_attention_equals_its_parts(length: int, layout: str, capacity: int, dtype: DType) -> None:
    spec, window, factors = RopeSpec(100.0, 4), 5, np.array([1.0, 2.0])
    table = [np.array([[5, 2, 7, 0], [1, 8, 4, 9]])] if layout == "paged" else []
    count = 10 if table else 2
    q, k, v = normal(2, 3, 16), normal(2, 3, 8, seed=1), normal(2, 3, 8, seed=2)
    key_cache, value_cache = normal(count, 2, capacity, 4, seed=3), normal(count, 2, capacity, 4, seed=4)
    found = evaluate(
        ops.GroupQueryAttention(4, 0.5, layout, window, spec),
        [q, k, v, key_cache, value_cache, past(length), *table, factors],
        dtype,
    )

    (positions,) = evaluate(ops.Positions(), [np.zeros((2, 3), np.int64), past(length)])
    (q,) = evaluate(ops.Rope(4, spec), [q, positions, factors])
    (k,) = evaluate(ops.Rope(2, spec), [k, positions, factors])
    (key_cache,) = evaluate(ops.KvWrite(layout), [key_cache, k, past(length), *table], dtype)
    (value_cache,) = evaluate(ops.KvWrite(layout), [value_cache, v, past(length), *table], dtype)
    read = ops.KvRead(layout, None if layout == "linear" else window)
    (keys,) = evaluate(read, [key_cache, k, past(length), *table])
    (values,) = evaluate(read, [value_cache, v, past(length), *table])
    (out,) = evaluate(ops.Attention(4, 0.5, window), [q, keys, values])
    for one, other in zip(found, (out, key_cache, value_cache)):
        assert_close(one, other)


def test_positions_follow_the_past() -> None:
    ids = np.zeros((2, 3), np.int64)
    for length in (past(4), np.zeros((2, 1, 4, 8))):
        (positions,) = evaluate(ops.Positions(), [ids, length])
        assert positions.tolist() == [[4, 5, 6], [4, 5, 6]]


def test_negative_rows_count_from_the_end() -> None:
    x = np.arange(6.0).reshape(1, 3, 2)
    (rows,) = evaluate(ops.SelectRows(), [x, np.array([-1, 0])])
    assert rows.tolist() == [[[4, 5], [0, 1]]]


def test_split_cuts_the_last_dimension() -> None:
    first, second = evaluate(ops.Split((1, 2)), [np.arange(6.0).reshape(2, 3)])
    assert (first.tolist(), second.tolist()) == ([[0], [3]], [[1, 2], [4, 5]])


def test_weights_follow_their_recipes() -> None:
    graph = parse(
        """
        graph recipes
        input %x: f32[1, 2]
        weight @a: f32[1, 2] = source("file")
        weight @b: f32[1, 2] = alias(@a)
        weight @c: f32[3, 2] = concat(@again: f32[1, 2] = alias(@b), @two: f32[2, 2])
        %y = MatMul(%x, @c)
        output %y
        """
    )
    tensors = {"file": [[1, 2]], "two": [[3, 4], [5, 6]]}
    result = run(graph, {"x": np.array([[1.0, 10.0]])}, lambda name: np.array(tensors[name], np.float32))
    assert result["y"].tolist() == [[21, 43, 65]]


def test_folded_weights_follow_their_recipes() -> None:
    graph = parse(
        """
        graph folds
        input %x: f32[1, 1, 2]
        weight @w: f32[3, 2] = fold(@base: f32[3, 2], @a: f32[1, 2], @b: f32[3, 1], 0.5)
        weight @d: q8_0[3, 2] = encode(@f: f32[3, 2] = fold(@base: f32[3, 2], {rest}, 0.5))
        weight @t: f32[3, 2] = fold_transposed(@base: f32[3, 2], @ta: f32[1, 3], @tb: f32[2, 1], -1.0)
        %y = MatMul(%x, @w)
        %z = DequantMatMul(%x, @d)
        %e = MatMul(%x, @t)
        output %y
        output %z
        output %e
        """.replace("{rest}", "@a: f32[1, 2], @b: f32[3, 1], @m: f32[3]")
    )
    tensors = {
        "base": [[3, 0], [0, 1], [1, 1]],
        "a": [[2, 8]],
        "b": [[0], [1], [-1]],
        "m": [6, 13, 0],
        "ta": [[1, 2, 3]],
        "tb": [[1], [10]],
    }
    x = np.array([[[1.0, 10.0]]])
    result = run(graph, {"x": x}, lambda name: np.array(tensors[name], np.float32))
    # Half of b a is [[0, 0], [1, 4], [-1, -4]]; the folded rows [3, 0], [1, 5] and [0, -3].
    assert result["y"].tolist() == [[[3, 51, -30]]]
    # The same rows at the lengths 6, 13 and 0: [6, 0], [1, 5] * 13 / sqrt(26) and [0, 0].
    assert_close(result["z"], [[[6, 51 * 13 / math.sqrt(26), 0]]])
    # base - [[1, 10], [2, 20], [3, 30]].
    assert result["e"].tolist() == [[[2 - 100, -2 - 190, -2 - 290]]]


def test_lora_follows_its_definition() -> None:
    x, weight, bias = normal(2, 3, 8), normal(5, 8, seed=1), normal(5, seed=2)
    a, b, scales = normal(2, 3, 4, 8, seed=3), normal(2, 5, 4, seed=4), normal(2, 4, seed=5)
    (u,) = evaluate(ops.LoraDown(), [x, a, scales])
    (y,) = evaluate(ops.LoraMatMul((3, 2), first=1), [x, weight, bias, u, b])
    for batch, token in np.ndindex(2, 3):
        for row in range(5):
            part = 1 if row < 3 else 2
            delta = 0.0
            for rank in range(4):
                narrow = sum(a[batch, part, rank, i] * x[batch, token, i] for i in range(8))
                assert_close(u[batch, token, part, rank], scales[batch, rank] * narrow)
                delta += b[batch, row, rank] * scales[batch, rank] * narrow
            base = sum(weight[row, i] * x[batch, token, i] for i in range(8)) + bias[row]
            assert_close(y[batch, token, row], base + delta)


def test_lora_without_bias_leaves_its_inputs_as_they_were() -> None:
    x, weight, u, b = (
        normal(1, 2, 8),
        normal(5, 8, seed=1),
        normal(1, 2, 1, 4, seed=3),
        normal(1, 5, 4, seed=4),
    )
    (y,) = evaluate(ops.LoraMatMul((5,)), [x, weight, u, b])
    assert_close(y, x @ weight.T + u[:, :, 0] @ b[0].T)
    np.testing.assert_array_equal(u, normal(1, 2, 1, 4, seed=3))


def test_embedding_with_lora_follows_its_definition() -> None:
    x, ids = normal(2, 3, 6), np.array([[0, 8, 3], [3, 3, 1]])
    a, b, scales = normal(2, 9, 4, seed=1), normal(2, 6, 4, seed=2), normal(2, 4, seed=3)
    (y,) = evaluate(ops.LoraEmbed(), [x, ids, a, scales, b])
    for batch, token, column in np.ndindex(2, 3, 6):
        row = a[batch, ids[batch, token]]
        delta = sum(scales[batch, rank] * row[rank] * b[batch, column, rank] for rank in range(4))
        assert_close(y[batch, token, column], x[batch, token, column] + delta)


def test_ranks_of_zeros_change_nothing() -> None:
    x, weight = normal(1, 2, 8), normal(5, 8, seed=1)
    for rank in (0, 3):
        u, b = np.zeros((1, 2, 1, rank)), normal(1, 5, rank, seed=2)
        (y,) = evaluate(ops.LoraMatMul((5,)), [x, weight, u, b])
        np.testing.assert_array_equal(y, x @ weight.T)


def test_a_graph_s_caches_round_as_their_type_says() -> None:
    graph = parse(
        """
        graph g
        input %cache: bf16[1, 1, 4, 2]
        input %x: f32[1, 1, 2]
        input %past: i32[]
        %present = KvWrite(%cache, %x, %past; layout='linear')
        %a, %keys, %values = GroupQueryAttention(%x, %x, %x, %cache, %cache, %past; heads=1, scale=1.0, layout='linear')
        output %present
        output %a
        """
    )
    feeds = {"cache": np.zeros((1, 1, 4, 2)), "x": np.array([[[257.0, 1.0]]]), "past": past(0)}
    results = run(graph, feeds, lambda name: np.zeros(1, np.float32))
    assert results["present"][0, 0, 0].tolist() == results["a"].ravel().tolist() == [256.0, 1.0]


def test_missing_input_is_an_error() -> None:
    graph = parse("graph g\ninput %x: f32[2]\n%y = Silu(%x)\noutput %y")
    with pytest.raises(GraphError, match="no array for input %x"):
        run(graph, {}, lambda name: np.zeros(1, np.float32))


def test_floats_are_computed_in_f64() -> None:
    graph = parse("graph g\ninput %x: f32[1]\n%y = Add(%x, %x)\noutput %y")
    (y,) = run(graph, {"x": np.ones(1, np.float32)}, lambda name: np.zeros(1, np.float32)).values()
    assert y.dtype == np.float64


def balanced(own: list[float], other: list[float], recipe: str, dim: int) -> Floats:
    n, data = len(own), {"own": np.float32(own), "other": np.float32(other)}
    graph = parse(f"graph g\nweight @w: f32[{n}] = {recipe}(@own: f32[{n}], @other: f32[{n}], {dim})")
    return weight_array(graph, graph.weight["w"], data.__getitem__)


@pytest.mark.parametrize(
    ("recipe", "order"), [("balance", [0, 1, 2, 3, 4]), ("balance_interleaved", [0, 2, 1, 3, 4])]
)
def test_vectors_are_balanced_by_the_pairs_that_rope_turns(recipe: str, order: list[int]) -> None:
    # Of the pairs (0, 2) and (1, 3), in halves, and of channel 4: sizes 5, 10, 2 and 20, 2.5, 8.
    own, other = np.array([3.0, 8, 4, 6, 2]), np.array([12.0, 1.5, 16, 2, 8])
    pair = (own[order].tolist(), other[order].tolist())
    assert_close(balanced(*pair, recipe, 4), np.array([6.0, 4, 8, 3, 4])[order])
    assert_close(balanced(*pair[::-1], recipe, 4), np.array([6.0, 3, 8, 4, 4])[order])


def test_sizes_below_a_hundredth_of_the_mean_are_raised_to_that() -> None:
    own, other = [0.0, 2, 2, 4], [2.0, 2, 2, 1]  # with a mean of 2: 0.02 instead of 0
    assert_close(balanced(own, other, "balance", 0), [0, 2, 2, 2])
    assert_close(balanced(other, own, "balance", 0), [0.2, 2, 2, 2])


def test_next_to_a_vector_of_zeros_nothing_changes() -> None:
    own, zeros = [1.0, 2, 3, 4], [0.0] * 4
    assert_close(balanced(own, zeros, "balance", 4), own)
    assert_close(balanced(zeros, own, "balance", 4), zeros)
