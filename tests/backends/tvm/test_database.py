"""Tuning databases: TVM's format, merging, and lines that cannot be read."""

from __future__ import annotations

import base64
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm.s_tir.meta_schedule.database import JSONDatabase

from rlxc.backends.tvm.database import RECORDS, WORKLOADS, Database, user_folder
from rlxc.backends.tvm.kernels.kernel import Kernel, Knobs, Number, Pointer
from rlxc.backends.tvm.problem import Filled, Problem

SPACE = tuple({"tokens": tokens, "rows": rows} for tokens in (4, 8) for rows in (1, 2, 3))
LLVM = tvm.target.Target({"kind": "llvm"})


def kernel(knobs: Knobs) -> Kernel:
    params = (Pointer("x", "float32"), Number("n"), Pointer("past", "int32"))
    return Kernel("nothing", params, lambda x, n, past: None)


def problem(name: str = "nothing 64", space: tuple[Knobs, ...] = SPACE) -> Problem:
    return Problem(name, space, kernel, (64, 7, Filled(2, 31)), 256, 64, 1)


def add(
    database: Database, knobs: Knobs, *seconds: float, of: str = "nothing 64", target: str = "cpu"
) -> None:
    database.add(problem(of), target, LLVM, knobs, seconds or None)


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def reopened(tmp_path: Path, warnings: list[str]) -> Any:
    """The database at `tmp_path`, read anew."""
    return lambda: Database(tmp_path, warn=warnings.append)


def test_fastest_setting_is_found_again(tmp_path: Path, reopened: Any, warnings: list[str]) -> None:
    database = reopened()
    add(database, SPACE[0], 3e-6)
    add(database, SPACE[4], 1e-6, 2e-6, 9e-6)  # the median counts, not the mean: one call was disturbed
    add(database, SPACE[5], 2.5e-6)
    assert database.best(problem(), "cpu") == SPACE[4]
    assert reopened().best(problem(), "cpu") == SPACE[4]
    assert reopened().seconds(problem(), "cpu", SPACE[4]) == 2e-6
    assert warnings == []


def test_problem_target_or_setting_that_was_not_measured_is_unknown(tmp_path: Path, reopened: Any) -> None:
    add(reopened(), SPACE[1], 1e-6)
    database = reopened()
    assert database.best(problem("other"), "cpu") is None
    assert database.best(problem(), "other") is None
    assert database.best(problem(space=SPACE[2:]), "cpu") is None
    assert database.seconds(problem(), "cpu", SPACE[0]) is None


def test_failed_candidate_is_never_the_best(reopened: Any) -> None:
    add(reopened(), SPACE[0])
    database = reopened()
    assert database.seconds(problem(), "cpu", SPACE[0]) == math.inf
    assert database.best(problem(), "cpu") is None


def test_later_database_counts_where_both_know_a_problem(tmp_path: Path) -> None:
    add(Database(tmp_path / "a"), SPACE[1], 1e-6)
    add(Database(tmp_path / "a"), SPACE[2], 1e-6, of="only in a")
    add(Database(tmp_path / "b"), SPACE[3], 5e-6)
    merged = Database(tmp_path / "a", tmp_path / "b")
    assert merged.best(problem(), "cpu") == SPACE[3]
    assert merged.best(problem("only in a"), "cpu") == SPACE[2]
    assert merged.seconds(problem("only in a"), "cpu", SPACE[2]) is None


def test_tvm_reads_the_files_and_the_knobs(tmp_path: Path) -> None:
    add(Database(tmp_path), SPACE[4], 1e-6, 2e-6)
    add(Database(tmp_path), SPACE[0])
    folder = tmp_path / "cpu"
    database = JSONDatabase(str(folder / WORKLOADS), str(folder / RECORDS))
    first, second = database.get_all_tuning_records()
    assert len(database) == 2
    assert [float(seconds) for seconds in first.run_secs] == [1e-6, 2e-6]
    assert [float(seconds) for seconds in second.run_secs] == [1e10]
    chosen = [int(inst.attrs[0][int(first.trace.decisions[inst])]) for inst in first.trace.insts]
    assert chosen == [SPACE[4]["rows"], SPACE[4]["tokens"]]  # by name
    assert first.workload.mod.attrs["rlxc_problem"] == "nothing 64"
    assert list(first.workload.mod.attrs["rlxc_knobs"]) == ["rows", "tokens"]
    assert [tuple(info.shape) for info in first.args_info] == [(1,), (64,), (2,)]


def test_a_problem_takes_one_workload_line_even_if_two_processes_write(tmp_path: Path) -> None:
    one, two = Database(tmp_path), Database(tmp_path)
    add(one, SPACE[0], 1e-6)
    add(two, SPACE[0], 1e-6, of="second")
    add(one, SPACE[1], 2e-6, of="second")
    add(two, SPACE[2], 0.5e-6)
    assert len((tmp_path / "cpu" / WORKLOADS).read_text().splitlines()) == 2
    again = Database(tmp_path)
    assert again.best(problem(), "cpu") == SPACE[2]
    assert again.seconds(problem("second"), "cpu", SPACE[1]) == 2e-6


def test_corrupt_record_is_skipped_and_named(tmp_path: Path, reopened: Any, warnings: list[str]) -> None:
    for knobs, seconds in zip(SPACE, (3e-6, 1e-6, 2e-6)):
        add(reopened(), knobs, seconds)
    path = tmp_path / "cpu" / RECORDS
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:40], lines[2]]) + "\n")
    assert reopened().best(problem(), "cpu") == SPACE[2]
    (warning,) = warnings
    assert f"{path}, line 2" in warning


def test_corrupt_workload_costs_its_records_only(tmp_path: Path, reopened: Any, warnings: list[str]) -> None:
    add(reopened(), SPACE[0], 1e-6)
    add(reopened(), SPACE[1], 1e-6, of="second")
    path = tmp_path / "cpu" / WORKLOADS
    first, second = path.read_text().splitlines()
    path.write_text(f"{first[:-20]}\n{second}\n")
    database = reopened()
    assert database.best(problem(), "cpu") is None
    assert database.best(problem("second"), "cpu") == SPACE[1]
    (warning,) = warnings
    assert f"{path}, line 1" in warning


def test_line_that_was_cut_off_does_not_swallow_the_next(
    tmp_path: Path, reopened: Any, warnings: list[str]
) -> None:
    add(reopened(), SPACE[0], 2e-6)
    path = tmp_path / "cpu" / RECORDS
    path.write_text(path.read_text()[:-30])
    add(Database(tmp_path, warn=lambda text: None), SPACE[1], 1e-6)
    assert reopened().best(problem(), "cpu") == SPACE[1]
    assert len(warnings) == 1


RECORD = [0, [[[["SampleCategorical", [], [[1, 2], [0.5, 0.5]], ["v0"]]], [[0, 0]]], [1e-6], {}, []]]


@pytest.mark.parametrize(
    "line",
    [
        "7",
        "[" * 100_000,
        json.dumps(RECORD).replace("[0, 0]", "[0, 2]"),
        json.dumps(RECORD).replace("[0, 0]", "[3, 0]"),
        json.dumps(RECORD).replace("SampleCategorical", "GetSBlock"),
        json.dumps(RECORD).replace("1e-06", "-1"),
        json.dumps(RECORD).replace("1e-06", "NaN"),
        json.dumps(RECORD).replace("[1e-06]", "[]"),
        json.dumps(RECORD).replace("[1e-06]", '["a"]'),
        json.dumps(RECORD).replace("[0, [[[", '["0", [[['),
    ],
    ids=lambda line: line[:80],
)
def test_record_of_another_form_is_named(tmp_path: Path, warnings: list[str], line: str) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / RECORDS).write_text(line + "\n")
    assert Database(tmp_path, warn=warnings.append).best(problem(), "cpu") is None
    assert len(warnings) == 1


def test_the_record_that_others_are_altered_from_is_sound(tmp_path: Path, warnings: list[str]) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / RECORDS).write_text(json.dumps(RECORD) + "\n")
    Database(tmp_path, warn=warnings.append).best(problem(), "cpu")
    assert warnings == []


@given(st.data())
def test_no_damage_to_a_workload_raises(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    add(Database(folder), SPACE[0], 1e-6)
    path = folder / "cpu" / WORKLOADS
    digest, encoded = json.loads(path.read_text())
    module = bytearray(base64.b64decode(encoded))
    for _ in range(data.draw(st.integers(1, 3))):
        module[data.draw(st.integers(0, len(module) - 1))] = data.draw(st.integers(0, 255))
    path.write_text(json.dumps([digest, base64.b64encode(module).decode()]) + "\n")
    assert Database(folder, warn=lambda text: None).best(problem(), "cpu") in (None, SPACE[0])


def test_database_without_a_folder_is_refused() -> None:
    with pytest.raises(ValueError, match="folder"):
        Database()


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"RLXC_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a/tuned"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/rlxc/tuned"),
        ({"HOME": "/c"}, "/c/.cache/rlxc/tuned"),
    ],
)
def test_user_folder_follows_the_platform(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("RLXC_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert user_folder() == Path(folder)
