"""A session's adapters: what is loaded, what each step runs with, and what is refused."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from adapters import random_pairs, write_peft_adapter

from rlxc.artifact import AdapterEntry, Manifest
from rlxc.errors import FormatError, ModelError, OptionError, SessionError
from rlxc.runtime import Session

MakeArtifact = Callable[..., Any]
WriteAdapter = Callable[..., Path]
Q, DOWN = "blk.0.attn_q.weight", "blk.0.ffn_down.weight"
IDS = [5, 6, 7]


def read_pairs(path: Path) -> Mapping[str, Any]:
    """A and B of a GGUF adapter, by another reader: B times alpha / rank, in float64."""
    reader = gguf.GGUFReader(path)
    (alpha,) = reader.fields["adapter.lora.alpha"].parts[-1]
    tensors = {tensor.name: np.array(tensor.data, np.float64) for tensor in reader.tensors}
    pairs = {}
    for name in {name.rpartition(".lora_")[0] for name in tensors}:
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        pairs[name] = (a.T if name == "token_embd.weight" else a, b * float(alpha) / b.shape[1])
    return pairs


def mixed(engine: Any, step: int = -1) -> list[tuple[int, float]]:
    """What a step of one sequence ran with: numbers of prepared adapters, and scales."""
    (mix,) = engine.mixes[step]
    return [(engine.prepared.index(adapter), scale) for adapter, scale in mix]


# --- what a step runs with ----------------------------------------------------------------------------------------


def test_engine_gets_the_adapter_s_numbers(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    path = write_adapter("a", rank=3, alpha=8.0)
    split_session.adapters.push(path)
    (prepared,) = engine.prepared
    expected = read_pairs(path)
    assert prepared.pairs.keys() == expected.keys()
    for tensor, (a, b) in prepared.pairs.items():
        np.testing.assert_array_equal(a, expected[tensor][0])
        np.testing.assert_allclose(b, expected[tensor][1], rtol=1e-6)  # one rounding to float32


def test_session_without_adapters_runs_with_none(split_session: Session, engine: Any) -> None:
    np.testing.assert_array_equal(split_session.prefill(IDS), engine.logits(IDS))
    assert engine.mixes == [[()]]


def test_change_takes_effect_at_the_next_step_and_keeps_what_was_read(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    adapters = split_session.adapters
    split_session.prefill(IDS)
    adapters.push(write_adapter("a"), 0.5)
    after_push = split_session.decode(8)
    adapters.set_scale("a", 2.0)
    after_scale = split_session.decode(9)
    adapters.pop()
    after_pop = split_session.decode(10)
    (a,) = engine.prepared
    mixes = [(), (), (), ((a, 0.5),), ((a, 2.0),), ()]
    np.testing.assert_array_equal(after_push, engine.logits([*IDS, 8], mixes[:4]))
    np.testing.assert_array_equal(after_scale, engine.logits([*IDS, 8, 9], mixes[:5]))
    np.testing.assert_array_equal(after_pop, engine.logits([*IDS, 8, 9, 10], mixes))


def test_reset_reads_anew(split_session: Session, engine: Any, write_adapter: WriteAdapter) -> None:
    split_session.prefill(IDS)
    split_session.adapters.push(write_adapter("a"), 0.5)
    split_session.reset()
    expected = engine.logits(IDS, [((engine.prepared[0], 0.5),)] * len(IDS))
    np.testing.assert_array_equal(split_session.prefill(IDS), expected)


def test_stack_keeps_its_order(split_session: Session, engine: Any, write_adapter: WriteAdapter) -> None:
    adapters = split_session.adapters
    for seed, name in enumerate("abc"):
        adapters.push(write_adapter(name, seed=seed), seed + 1)
    assert adapters.entries() == [("a", 1.0), ("b", 2.0), ("c", 3.0)]
    split_session.prefill(IDS)
    assert mixed(engine) == [(0, 1.0), (1, 2.0), (2, 3.0)]
    assert [adapters.pop() for _ in range(4)] == [("c", 3.0), ("b", 2.0), ("a", 1.0), None]
    assert len(adapters) == 0


def test_same_adapter_twice_adds_its_scales_and_runs_once(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    adapters, path = split_session.adapters, write_adapter("a", rank=40)  # of which two would not fit
    adapters.push(path, 0.5)
    adapters.push("a", 1.0)
    assert adapters.entries() == [("a", 0.5), ("a", 1.0)]
    split_session.prefill(IDS)
    assert mixed(engine) == [(0, 1.5)]
    adapters.set_scale("a", 0.25)
    assert adapters.entries() == [("a", 0.5), ("a", 0.25)]


def test_adapter_at_scale_0_costs_nothing(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    split_session.adapters.push(write_adapter("a"), 0)
    np.testing.assert_array_equal(split_session.prefill(IDS), engine.logits(IDS))
    assert split_session.adapters.entries() == [("a", 0.0)]


def test_clear_keeps_adapters_loaded(split_session: Session, write_adapter: WriteAdapter) -> None:
    adapters = split_session.adapters
    for name in "ab":
        adapters.push(write_adapter(name))
    adapters.clear()
    assert (len(adapters), adapters.entries(), adapters.loaded) == (0, [], ["a", "b"])


def test_swapping_loaded_adapters_prepares_nothing_and_gives_the_engine_the_same_objects(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    adapters = split_session.adapters
    names = [adapters.load(write_adapter(name, seed=seed)) for seed, name in enumerate("ab")]
    prepared = list(engine.prepared)
    for name in names * 2:
        adapters.push(name)
        split_session.decode(5)
        adapters.pop()
    assert engine.prepared == prepared
    assert [step[0][0][0] for step in engine.mixes] == prepared * 2


def test_unchanged_stack_gives_every_step_the_same_mix(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    split_session.adapters.push(write_adapter("a"))
    for _ in range(3):
        split_session.decode(5)
    assert len({id(mix) for (mix,) in engine.mixes}) == 1


def test_score_runs_with_the_stack(split_session: Session, engine: Any, write_adapter: WriteAdapter) -> None:
    split_session.adapters.push(write_adapter("a"), 0.5)
    mixes = [((engine.prepared[0], 0.5),)] * 3
    expected = [engine.logits(IDS[:n], mixes[:n]) for n in (1, 2, 3)]
    np.testing.assert_array_equal(split_session.score(IDS), expected)


# --- loading ------------------------------------------------------------------------------------------------------


def test_load_returns_the_name_and_pushes_nothing(
    split_session: Session, write_adapter: WriteAdapter
) -> None:
    adapters = split_session.adapters
    assert adapters.load(write_adapter("style")) == "style"
    assert adapters.load(str(write_adapter("other")), name="tone") == "tone"
    assert (adapters.loaded, adapters.entries()) == (["style", "tone"], [])


def test_file_that_is_loaded_is_not_read_again(
    split_session: Session, engine: Any, write_adapter: WriteAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapters, path = split_session.adapters, write_adapter("a")
    monkeypatch.chdir(path.parent)
    adapters.load(path)
    adapters.push("a.gguf")
    assert adapters.load("a.gguf", name="a") == adapters.load(path) == "a"
    assert len(engine.prepared) == 1
    assert adapters.load(path, name="b") == "b"  # another name is another adapter
    assert len(engine.prepared) == 2


def test_nbytes_counts_each_loaded_adapter_once(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    adapters = split_session.adapters
    assert adapters.nbytes == 0
    adapters.push(write_adapter("a"))
    adapters.push("a")
    adapters.load(write_adapter("b", rank=7))
    assert adapters.nbytes == sum(adapter.nbytes for adapter in engine.prepared)
    adapters.unload("b")
    assert adapters.nbytes == engine.prepared[0].nbytes


def test_unloaded_adapter_is_forgotten(split_session: Session, write_adapter: WriteAdapter) -> None:
    adapters = split_session.adapters
    adapters.load(write_adapter("a"))
    adapters.unload("a")
    assert adapters.loaded == []
    with pytest.raises(SessionError, match="no adapter called 'a' is loaded, and there is no such file"):
        adapters.push("a")


def test_adapter_on_the_stack_is_not_unloaded(split_session: Session, write_adapter: WriteAdapter) -> None:
    adapters = split_session.adapters
    adapters.push(write_adapter("a"))
    with pytest.raises(SessionError, match="adapter 'a' is on the stack; pop it first"):
        adapters.unload("a")
    assert adapters.loaded == ["a"]


def test_unknown_adapter_is_not_unloaded(split_session: Session, write_adapter: WriteAdapter) -> None:
    split_session.adapters.load(write_adapter("a"))
    with pytest.raises(SessionError, match="no adapter called 'b' is loaded; loaded: a"):
        split_session.adapters.unload("b")


def test_second_adapter_of_a_name_is_refused(
    split_session: Session, engine: Any, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    adapters = split_session.adapters
    adapters.load(write_adapter("a"))
    other = tmp_path / "elsewhere" / "a.gguf"
    other.parent.mkdir()
    write_adapter("b", seed=1).rename(other)
    with pytest.raises(SessionError, match="another adapter is called 'a'; load this one with name="):
        adapters.push(other)
    assert (len(engine.prepared), len(adapters)) == (1, 0)


def test_copy_of_a_loaded_adapter_is_that_adapter(
    split_session: Session, engine: Any, write_adapter: WriteAdapter, tmp_path: Path
) -> None:
    adapters = split_session.adapters
    adapters.load(write_adapter("a"))
    copied = tmp_path / "elsewhere" / "a.gguf"
    copied.parent.mkdir()
    write_adapter("b").rename(copied)
    adapters.push(copied, 0.5)
    assert (len(engine.prepared), adapters.entries()) == (1, [("a", 0.5)])


@pytest.mark.parametrize("name", ["missing.gguf", "a\0b", "x" * 5000])
def test_missing_file_is_refused(split_session: Session, write_adapter: WriteAdapter, name: str) -> None:
    split_session.adapters.load(write_adapter("a"))
    with pytest.raises(SessionError, match="there is no such file; loaded: a"):
        split_session.adapters.push(name)


@pytest.mark.parametrize("name", [None, 3, b"a.gguf", "", ["a"]])
def test_what_is_no_name_is_refused(split_session: Session, name: Any) -> None:
    with pytest.raises(OptionError, match="an adapter is given by its name or path"):
        split_session.adapters.push(name)


def test_file_that_is_no_adapter_is_refused(split_session: Session, tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(FormatError, match=r"a\.gguf"):
        split_session.adapters.push(tmp_path / "a.gguf")


def test_adapter_of_another_architecture_is_refused(
    split_session: Session, write_adapter: WriteAdapter
) -> None:
    with pytest.raises(ModelError, match="llama"):
        split_session.adapters.push(write_adapter("a", architecture="llama"))


def test_matrix_that_the_artifact_cannot_change_is_named(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    path = write_adapter("a", targets=(Q, "blk.0.attn_v.weight"))
    with pytest.raises(
        SessionError,
        match=r"a\.gguf: changes blk\.0\.attn_v\.weight, which the artifact cannot.*lora='split'",
    ):
        split_session.adapters.push(path)
    assert engine.prepared == []


def test_matrix_of_another_shape_is_refused(split_session: Session, write_adapter: WriteAdapter) -> None:
    rng = np.random.default_rng(0)
    wrong = {
        f"{Q}.lora_a": rng.standard_normal((2, 6)).astype(np.float32),
        f"{Q}.lora_b": rng.standard_normal((8, 2)).astype(np.float32),
    }
    path = write_adapter("a", targets=(DOWN,), tensors=wrong)
    with pytest.raises(
        SessionError, match=r"attn_q\.weight is \[8, 4\] in the model, the adapter is for one of \[8, 6\]"
    ):
        split_session.adapters.push(path)


def test_weight_that_an_adapter_replaces_is_refused(
    split_session: Session, write_adapter: WriteAdapter
) -> None:
    path = write_adapter("a", tensors={"blk.0.attn_norm.weight": np.ones(4, np.float32)})
    with pytest.raises(SessionError, match=r"replaces blk\.0\.attn_norm\.weight, .*lora='fold'"):
        split_session.adapters.push(path)


def test_dora_is_refused(split_session: Session, tmp_path: Path) -> None:
    module = "model.layers.0.self_attn.q_proj"
    pairs = random_pairs({module: (8, 4)}, 2)
    magnitudes = {module: np.ones(8, np.float32)}
    folder = write_peft_adapter(tmp_path / "dora", pairs, magnitudes=magnitudes)
    with pytest.raises(SessionError, match=r"dora: is a DoRA for blk\.0\.attn_q\.weight, .*lora='fold'"):
        split_session.adapters.push(folder)


def test_adapter_whose_scale_overflows_is_refused(
    split_session: Session, write_adapter: WriteAdapter
) -> None:
    with pytest.raises(SessionError, match=r"times its scale 1e\+38 overflows"):
        split_session.adapters.push(write_adapter("a", rank=1, alpha=1e38, targets=(Q,), size=100.0))


def test_adapter_of_too_high_a_rank_is_refused(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    with pytest.raises(SessionError, match=r"adapter 'a' has 64 ranks.* takes 48; .*--lora-rank 64"):
        split_session.adapters.load(write_adapter("a", rank=49))
    assert engine.prepared == []


def test_stack_of_too_high_a_rank_is_refused_and_unchanged(
    split_session: Session, write_adapter: WriteAdapter
) -> None:
    adapters = split_session.adapters
    adapters.push(write_adapter("a", rank=17))  # two units of 16
    adapters.push(write_adapter("b", rank=1))
    with pytest.raises(SessionError, match=r"the stack would have 64 ranks.* takes 48; .*--lora-rank 64"):
        adapters.push(write_adapter("c", rank=1))
    assert adapters.entries() == [("a", 1.0), ("b", 1.0)]
    adapters.pop()
    adapters.push("c")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), True, "1", None])
def test_impossible_scale_is_refused_before_anything_is_read(
    split_session: Session, engine: Any, write_adapter: WriteAdapter, scale: Any
) -> None:
    with pytest.raises(OptionError, match="an adapter's scale"):
        split_session.adapters.push(write_adapter("a"), scale)
    assert (engine.prepared, len(split_session.adapters)) == ([], 0)


def test_scale_of_an_adapter_that_is_not_pushed_is_refused(
    split_session: Session, write_adapter: WriteAdapter
) -> None:
    split_session.adapters.load(write_adapter("a"))
    with pytest.raises(SessionError, match="no adapter called 'a' is on the stack"):
        split_session.adapters.set_scale("a", 1.0)


def test_adapter_that_does_not_fit_in_memory_is_refused(
    open_session: Callable[..., Session],
    make_artifact: MakeArtifact,
    fake_engine: type[Any],
    split_manifest: Manifest,
    write_adapter: WriteAdapter,
) -> None:
    class FullEngine(fake_engine):  # type: ignore[misc]
        def prepare(self, pairs: Any) -> Any:
            raise MemoryError

    session = open_session(FullEngine(), make_artifact(manifest=split_manifest))
    with pytest.raises(SessionError, match="not enough memory for the adapter"):
        session.adapters.push(write_adapter("a"))
    assert session.adapters.loaded == []


def test_artifact_without_a_plan_takes_no_adapters(session: Session, write_adapter: WriteAdapter) -> None:
    for call in (session.adapters.push, session.adapters.load):
        with pytest.raises(SessionError, match=r"takes no adapters while it runs; .*lora='split'"):
            call(write_adapter("a"))
    assert session.adapters.pop() is None
    session.adapters.clear()


# --- compiled-in adapters -----------------------------------------------------------------------------------------

DIGEST = "0" * 64


@pytest.fixture
def open_compiled(
    open_session: Callable[..., Session], make_artifact: MakeArtifact, split_manifest: Manifest, engine: Any
) -> Callable[..., Session]:
    """Opens an artifact with adapters, given with the content of their files, or None."""

    def open_it(*entries: tuple[AdapterEntry, Path | None]) -> Session:
        files = {
            str(entry.file).replace(".", "__"): path.read_bytes()
            for entry, path in entries
            if path is not None
        }
        manifest = replace(split_manifest, adapters=tuple(entry for entry, _ in entries))
        return open_session(engine, make_artifact("compiled.rlx", manifest=manifest, **files))

    return open_it


def test_compiled_adapters_are_on_the_stack_from_the_start(
    open_compiled: Callable[..., Session], engine: Any, write_adapter: WriteAdapter
) -> None:
    session = open_compiled(
        (AdapterEntry("first", DIGEST, 0.5, (), "adapter.0.gguf"), write_adapter("a", seed=1)),
        (AdapterEntry("second", DIGEST, 2.0, (), "adapter.1.gguf"), write_adapter("b", seed=2)),
    )
    assert session.adapters.entries() == [("first", 0.5), ("second", 2.0)]
    assert session.adapters.loaded == ["first", "second"]
    session.prefill(IDS)
    assert mixed(engine) == [(0, 0.5), (1, 2.0)]
    assert session.adapters.pop() == ("second", 2.0)


def test_folded_adapter_is_listed_and_runs_with_nothing(
    open_compiled: Callable[..., Session], engine: Any
) -> None:
    session = open_compiled((AdapterEntry("deep", DIGEST, 0.5, (Q,), None), None))
    assert (session.adapters.entries(), len(session.adapters)) == ([("deep", 0.5)], 1)
    assert (session.adapters.loaded, session.adapters.nbytes) == ([], 0)
    np.testing.assert_array_equal(session.prefill(IDS), engine.logits(IDS))


def test_partly_folded_adapter_runs_below_the_stack_with_the_rest(
    open_compiled: Callable[..., Session], engine: Any, write_adapter: WriteAdapter
) -> None:
    folded = AdapterEntry("deep", DIGEST, 0.5, (Q,), "adapter.0.gguf")
    session = open_compiled(
        (AdapterEntry("on top", DIGEST, 3.0, (), "adapter.1.gguf"), write_adapter("b", seed=2)),
        (folded, write_adapter("a", seed=1, targets=(Q, DOWN))),
    )
    assert session.adapters.entries() == [("deep", 0.5), ("on top", 3.0)]
    session.prefill(IDS)
    assert mixed(engine) == [(1, 0.5), (0, 3.0)]
    assert list(engine.prepared[1].pairs) == [DOWN]  # what is folded is not added again
    assert session.adapters.nbytes == sum(adapter.nbytes for adapter in engine.prepared)
    session.generate(IDS, max_tokens=1, adapter="on top", scale=1.5)
    assert mixed(engine) == [(1, 0.5), (0, 1.5)]


@pytest.mark.parametrize(
    ("call", "problem"),
    [
        (lambda adapters, path: adapters.pop(), "popped"),
        (lambda adapters, path: adapters.clear(), "cleared"),
        (lambda adapters, path: adapters.set_scale("deep", 1.0), "rescaled"),
        (lambda adapters, path: adapters.unload("deep"), "unloaded"),
        (lambda adapters, path: adapters.push("deep"), "pushed"),
    ],
)
def test_folded_adapter_cannot_be_changed(
    open_compiled: Callable[..., Session],
    write_adapter: WriteAdapter,
    call: Callable[[Any, Path], object],
    problem: str,
) -> None:
    session = open_compiled((AdapterEntry("deep", DIGEST, 0.5, (Q,), None), None))
    with pytest.raises(SessionError, match=f"'deep' is folded into the weights and cannot be {problem}"):
        call(session.adapters, write_adapter("a"))
    assert session.adapters.entries() == [("deep", 0.5)]


def test_clear_with_a_folded_adapter_leaves_the_stack(
    open_compiled: Callable[..., Session], write_adapter: WriteAdapter
) -> None:
    session = open_compiled((AdapterEntry("deep", DIGEST, 0.5, (Q,), None), None))
    session.adapters.push(write_adapter("a"))
    with pytest.raises(SessionError, match="cannot be cleared"):
        session.adapters.clear()
    assert session.adapters.entries() == [("deep", 0.5), ("a", 1.0)]
    assert session.adapters.pop() == ("a", 1.0)


def test_name_of_a_folded_adapter_is_taken(
    open_compiled: Callable[..., Session], write_adapter: WriteAdapter
) -> None:
    session = open_compiled((AdapterEntry("deep", DIGEST, 0.5, (Q,), None), None))
    with pytest.raises(SessionError, match="another adapter is called 'deep'"):
        session.adapters.load(write_adapter("deep"))


# --- generating ---------------------------------------------------------------------------------------------------


def test_generate_with_an_adapter_runs_with_that_one_alone(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    split_session.adapters.push(write_adapter("a", seed=1))
    split_session.generate(IDS, max_tokens=2, adapter=str(write_adapter("b", seed=2)), scale=0.5)
    assert [mixed(engine, step) for step in range(2)] == [[(1, 0.5)]] * 2
    assert split_session.adapters.entries() == [("a", 1.0)]
    split_session.generate(IDS, max_tokens=1)
    assert mixed(engine) == [(0, 1.0)]


def test_text_with_an_adapter_is_that_of_a_stack_of_it(
    split_session: Session, write_adapter: WriteAdapter
) -> None:
    adapters, path = split_session.adapters, write_adapter("a")
    plain = split_session.generate(IDS, max_tokens=8)
    once = split_session.generate(IDS, max_tokens=8, adapter=path, scale=0.5)
    adapters.push("a", 0.5)
    assert split_session.generate(IDS, max_tokens=8).ids == once.ids != plain.ids


def test_change_during_a_stream_takes_effect_at_its_next_piece(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    stream = split_session.stream(IDS, max_tokens=3)
    next(stream)
    split_session.adapters.push(write_adapter("a"), 0.5)
    next(stream)
    assert mixed(engine) == [(0, 0.5)]


def test_stream_with_an_adapter_keeps_it(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    stream = split_session.stream(IDS, max_tokens=3, adapter=write_adapter("a"))
    next(stream)
    split_session.adapters.push(write_adapter("b"))
    split_session.adapters.unload("a")
    list(stream)
    assert mixed(engine) == [(0, 1.0)]


def test_scale_without_an_adapter_is_refused(split_session: Session, engine: Any) -> None:
    with pytest.raises(OptionError, match="scale is that of an adapter; name the adapter as well"):
        split_session.generate(IDS, scale=0.5)
    assert engine.steps == []


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"adapter": "missing"}, "no such file"), ({"adapter": "a", "scale": float("nan")}, "scale")],
)
def test_impossible_adapter_of_a_text_is_refused_at_once(
    split_session: Session, engine: Any, write_adapter: WriteAdapter, options: Any, problem: str
) -> None:
    split_session.adapters.load(write_adapter("a"))
    with pytest.raises((OptionError, SessionError), match=problem):
        split_session.stream(IDS, **options)
    assert engine.steps == []


# --- closing, and other threads -----------------------------------------------------------------------------------


def test_closed_session_has_no_adapters(split_session: Session, write_adapter: WriteAdapter) -> None:
    path = write_adapter("a")
    split_session.adapters.push(path)
    split_session.close()
    assert (split_session.adapters.loaded, len(split_session.adapters)) == ([], 0)
    for call in (lambda: split_session.adapters.push(path), split_session.adapters.pop):
        with pytest.raises(SessionError, match="the session is closed"):
            call()


def test_closing_lets_go_of_the_adapters(
    split_session: Session, engine: Any, write_adapter: WriteAdapter
) -> None:
    split_session.adapters.push(write_adapter("a", invocation_tokens=[5]))
    split_session.prefill(IDS)
    gone = weakref.ref(engine.prepared.pop())
    engine.mixes.clear()
    split_session._sequence.cache.mixes.clear()  # the fake's own notes
    split_session.close()
    gc.collect()
    assert gone() is None


def test_another_thread_cannot_change_the_stack_during_a_step(
    open_session: Callable[..., Session],
    make_artifact: MakeArtifact,
    fake_engine: type[Any],
    split_manifest: Manifest,
    write_adapter: WriteAdapter,
) -> None:
    entered, leave = threading.Event(), threading.Event()

    class SlowEngine(fake_engine):  # type: ignore[misc]
        def step(self, *args: Any) -> Any:
            entered.set()
            assert leave.wait(60)
            return super().step(*args)

    session = open_session(SlowEngine(), make_artifact(manifest=split_manifest))
    session.adapters.load(write_adapter("a"))
    first = threading.Thread(target=session.prefill, args=(IDS,))
    first.start()
    assert entered.wait(60)
    try:
        with pytest.raises(SessionError, match="another thread is using the session"):
            session.adapters.push("a")
    finally:
        leave.set()
        first.join()
    assert len(session.adapters) == 0
