"""How long drafts are, step by step: they grow while they are accepted, and pause while they are not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlxc.runtime.speculate import Pace


def run(pace: Pace, steps: int, accept: Callable[[int], int]) -> list[int]:
    """The lengths drafted in so many steps."""
    lengths = []
    for _ in range(steps):
        lengths.append(pace.length)
        if pace.length:
            pace.judged(pace.length, accept(pace.length))
        else:
            pace.passed(False)
    return lengths


def test_drafts_grow_while_all_is_accepted() -> None:
    assert run(Pace(16), 5, lambda drafted: drafted) == [3, 6, 12, 16, 16]


def test_drafts_shrink_to_one_more_than_was_accepted() -> None:
    pace = Pace(16)
    run(pace, 3, lambda drafted: drafted)
    pace.judged(16, 4)
    assert pace.length == 5


def test_short_draft_that_is_accepted_says_nothing_of_longer_ones() -> None:
    pace = Pace(16)
    pace.judged(2, 2)
    assert pace.length == 3


def test_drafter_that_is_always_wrong_is_hardly_asked() -> None:
    lengths = run(Pace(16), 1000, lambda drafted: 0)
    asked = [place for place, length in enumerate(lengths) if length]
    assert np.diff(asked).tolist()[:7] == [1, 5, 9, 17, 33, 65, 65]
    # Where a token more costs up to a quarter of a step, that is below 3 % at any length from 100 tokens on.
    for count in range(100, 1000):
        assert sum(lengths[:count]) / 4 < 0.03 * count


def test_accepted_token_ends_the_backing_off() -> None:
    pace = Pace(16)
    run(pace, 30, lambda drafted: 0)
    run(pace, 40, lambda drafted: drafted)
    assert run(pace, 8, lambda drafted: 0)[2:] == [0, 0, 0, 0, 1, 0]


def test_right_guesses_end_a_pause() -> None:
    pace = Pace(16)
    run(pace, 2, lambda drafted: 0)
    pace.passed(True)
    pace.passed(False)
    pace.passed(True)
    assert pace.length == 0
    pace.passed(True)
    assert pace.length == 1


def test_pause_after_many_failures_takes_more_right_guesses() -> None:
    pace = Pace(16)
    run(pace, 150, lambda drafted: 0)
    for _ in range(3):
        pace.passed(True)
        assert pace.length == 0
    pace.passed(True)
    assert pace.length == 1
