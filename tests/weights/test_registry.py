"""The weight registry: names, aliases, bytes and pins."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from rlxc.dtypes import DType
from rlxc.errors import WeightError
from rlxc.weights.gguf import open_gguf
from rlxc.weights.registry import (
    F32,
    Base,
    LoraAdapter,
    Packed,
    TiedAlias,
    WeightRegistry,
    base_registry,
)


def table(key: str, scheme: DType = DType.Q8_0, shape: tuple[int, ...] = (10, 64)) -> Packed:
    return Packed(key, scheme, shape)


@pytest.fixture
def tied() -> WeightRegistry:
    """``head`` is an alias of ``output``, which is an alias of ``embed``."""
    registry = WeightRegistry()
    registry.add(table("embed"))
    registry.add(table("output"), TiedAlias("embed"))
    registry.add(table("head"), TiedAlias("output"))
    return registry


# Weights ----------------------------------------------------------------------------------------------------


def test_f32_weight_takes_four_bytes_an_element():
    assert F32("norm", (640,)).nbytes == 2560
    assert F32("matrix", (3, 4)).nbytes == 48


@pytest.mark.parametrize(
    ("scheme", "nbytes"),
    [(DType.Q8_0, 10 * 16 * 34), (DType.Q4_K, 10 * 2 * 144), (DType.F16, 10 * 512 * 2)],
    ids=str,
)
def test_packed_weight_takes_its_rows_of_blocks(scheme, nbytes):
    assert Packed("w", scheme, (10, 512)).nbytes == nbytes


def test_stack_of_matrices_counts_every_one():
    assert Packed("experts", DType.Q8_0, (4, 10, 32)).nbytes == 4 * 10 * 34


def test_packed_row_that_is_not_whole_blocks_is_refused():
    with pytest.raises(WeightError, match="not whole q4_k blocks"):
        Packed("w", DType.Q4_K, (10, 640))


@pytest.mark.parametrize("scheme", [DType.F32, DType.I32, DType.BOOL], ids=str)
def test_scheme_without_blocks_is_refused(scheme):
    with pytest.raises(WeightError, match="no packed scheme"):
        Packed("w", scheme, (10, 64))


@pytest.mark.parametrize("shape", [(), (0,), (10, 0), (-1, 64)], ids=str)
def test_shape_without_weights_is_refused(shape):
    for make in (lambda: F32("w", shape), lambda: Packed("w", DType.F16, shape)):
        with pytest.raises(WeightError, match="holds no weights"):
            make()


# Names and aliases ------------------------------------------------------------------------------------------


def test_weights_keep_the_order_they_were_added_in(tied):
    assert list(tied) == ["embed", "output", "head"]
    assert len(tied) == 3
    assert "head" in tied and "absent" not in tied


def test_kind_is_what_was_added(tied):
    assert tied.kind("embed") == Base()
    assert tied.kind("head") == TiedAlias("output")


def test_duplicate_name_is_refused(tied):
    with pytest.raises(WeightError, match="output: is already registered"):
        tied.add(table("output"))


def test_unknown_weight_is_refused_by_name(tied):
    for ask in (tied.resolve, tied.kind, tied.remove, tied.pin):
        with pytest.raises(WeightError, match="absent: there is no weight of this name"):
            ask("absent")


def test_weight_that_is_no_alias_resolves_to_itself(tied):
    assert tied.resolve("embed") == table("embed")


def test_alias_chain_resolves_to_the_weight_at_its_end(tied):
    assert tied.resolve("head") == table("embed")


def test_alias_may_be_added_before_its_target():
    registry = WeightRegistry()
    registry.add(table("output"), TiedAlias("embed"))
    registry.add(table("embed"))
    registry.validate()
    assert registry.resolve("output") == table("embed")


def test_dangling_alias_is_refused(tied):
    tied.add(table("lost"), TiedAlias("absent"))
    for ask in (tied.validate, lambda: tied.resolve("lost")):
        with pytest.raises(WeightError, match="lost: is tied to 'absent', which does not exist"):
            ask()


def test_alias_cycle_is_refused():
    registry = WeightRegistry()
    for key, target in (("a", "b"), ("b", "c"), ("c", "b")):
        registry.add(table(key), TiedAlias(target))
    for ask in (registry.validate, lambda: registry.resolve("a")):
        with pytest.raises(WeightError, match="a -> b -> c -> b"):
            ask()


def test_alias_of_itself_is_refused():
    registry = WeightRegistry()
    registry.add(table("a"), TiedAlias("a"))
    with pytest.raises(WeightError, match="a -> a"):
        registry.validate()


@pytest.mark.parametrize(
    "alias",
    [table("x", shape=(64, 10 * 32)), table("x", scheme=DType.Q4_0), F32("x", (10, 64))],
    ids=["shape", "scheme", "f32"],
)
def test_alias_unlike_its_target_is_refused(tied, alias):
    tied.add(alias, TiedAlias("head"))
    for ask in (tied.validate, lambda: tied.resolve("x")):
        with pytest.raises(WeightError, match=r"x: is .* but tied to 'head'"):
            ask()


# Bytes ------------------------------------------------------------------------------------------------------


def test_alias_counts_no_bytes(tied):
    assert tied.nbytes() == table("embed").nbytes
    assert tied.nbytes(TiedAlias("embed")) == 0


def test_bytes_are_counted_by_kind_and_adapter(tied):
    tied.add(F32("chat.a", (8, 4)), LoraAdapter("chat"))
    tied.add(F32("chat.b", (4, 8)), LoraAdapter("chat"))
    tied.add(F32("code.a", (2, 4)), LoraAdapter("code"))
    assert tied.nbytes(Base()) == table("embed").nbytes
    assert tied.nbytes(LoraAdapter("chat")) == 256
    assert tied.nbytes(LoraAdapter("code")) == 32
    assert tied.nbytes(LoraAdapter("absent")) == 0
    assert tied.nbytes() == table("embed").nbytes + 288


# Removal and pins -------------------------------------------------------------------------------------------


def test_removed_weight_is_gone_and_its_name_free(tied):
    tied.remove("head")
    assert "head" not in tied
    tied.add(table("head"))
    assert tied.kind("head") == Base()


def test_target_of_an_alias_is_not_removed(tied):
    with pytest.raises(WeightError, match="output: is still the target of 'head'"):
        tied.remove("output")
    assert "output" in tied


def test_chain_is_removed_from_its_end(tied):
    for key in ("head", "output", "embed"):
        tied.remove(key)
    assert len(tied) == 0


def test_alias_of_itself_can_be_removed():
    registry = WeightRegistry()
    registry.add(table("a"), TiedAlias("a"))
    registry.remove("a")
    assert "a" not in registry


def test_pinned_weight_is_not_removed_until_its_last_pin_is_released(tied):
    first, second = tied.pin("head"), tied.pin("head")
    first.release()
    with pytest.raises(WeightError, match="head: is pinned"):
        tied.remove("head")
    second.release()
    tied.remove("head")
    assert "head" not in tied


def test_pin_on_an_alias_keeps_the_whole_chain(tied):
    with tied.pin("head"):
        for key in ("head", "output", "embed"):
            with pytest.raises(WeightError):
                tied.remove(key)


def test_pin_ends_with_its_block_even_after_an_error(tied):
    with pytest.raises(ZeroDivisionError), tied.pin("head"):
        raise ZeroDivisionError
    tied.remove("head")
    assert "head" not in tied


def test_second_release_does_not_release_another_pin(tied):
    pin, _other = tied.pin("head"), tied.pin("head")
    pin.release()
    pin.release()
    with pytest.raises(WeightError, match="pinned"):
        tied.remove("head")


# From a file ------------------------------------------------------------------------------------------------


def test_tensors_of_a_file_become_base_weights(write_gguf):
    def fill(writer):
        writer.add_tensor("norm", np.zeros(32, np.float32))
        writer.add_tensor("half", np.zeros((3, 8), np.float16))
        packed = np.zeros((2, 68), np.uint8)
        writer.add_tensor("packed", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    with open_gguf(write_gguf(fill)) as file:
        registry = base_registry(file)
        assert [registry.resolve(key) for key in registry] == [
            F32("norm", (32,)),
            Packed("half", DType.F16, (3, 8)),
            Packed("packed", DType.Q8_0, (2, 64)),
        ]
        assert {registry.kind(key) for key in registry} == {Base()}
        assert registry.nbytes() == sum(info.nbytes for info in file.tensors.values())
