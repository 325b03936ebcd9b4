"""Several errors that are raised as one."""

from __future__ import annotations

from rlxc.errors import FormatError, ModelError, Problems, UnsupportedError

FIRST = UnsupportedError("key a is not implemented", source="m.gguf", remedy="leave it out")
SECOND = ModelError("tensor b is missing", source="m.gguf")
THIRD = FormatError("c is damaged", source="m.gguf")


def problems(*errors: FormatError | ModelError | UnsupportedError) -> Problems:
    found = Problems()
    for error in errors:
        found.add(error)
    return found


def test_one_problem_is_itself() -> None:
    assert problems(FIRST).error() is FIRST
    assert FIRST.parts == (FIRST,)


def test_several_are_the_first_and_say_how_many_more() -> None:
    error = problems(FIRST, SECOND, THIRD).error()
    assert type(error) is UnsupportedError
    assert (error.source, error.remedy) == ("m.gguf", "leave it out")
    assert error.problem == "key a is not implemented (and 2 more problems, which `rlxc inspect` lists)"
    assert error.parts == (FIRST, SECOND, THIRD)
    assert "and 1 more problem," in str(problems(FIRST, SECOND).error())


def test_error_of_several_is_taken_apart_and_none_counts_twice() -> None:
    whole = problems(FIRST, SECOND).error()
    assert problems(FIRST, whole, THIRD).found == [FIRST, SECOND, THIRD]
