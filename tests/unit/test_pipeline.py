"""Parts of the pipeline that need no whole run: worker processes, failures, what a hash depends on."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from worker_tasks import build, work

from repnoise.errors import ConfigError, DataError, RunError
from repnoise.study.pipeline import Study, resolve
from repnoise.study.workers import Failures, carry_out, in_processes


def start(folder: Path, tasks: list[tuple[Any, ...]], jobs: int = 2) -> Any:
    return in_processes(work, tasks, jobs, build, (folder,))


def test_every_task_has_its_turn_and_errors_arrive_as_they_were(tmp_path: Path) -> None:
    found = dict(start(tmp_path, [("a",), ("wrong",), ("broken",), ("b",)]))
    assert found[0] is None
    assert isinstance(found[1], DataError)
    assert str(found[1]) == "the row is bad"
    assert isinstance(found[2], IndexError)
    assert found[3] is None
    assert (tmp_path / "a").exists()
    assert (tmp_path / "b").exists()


def test_a_process_that_dies_is_an_error_and_no_hang(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="a worker process died without a word"):
        list(start(tmp_path, [("killed",), ("a", 0.1)], jobs=1))


def test_stopping_early_kills_what_runs(tmp_path: Path) -> None:
    with closing(start(tmp_path, [("a",), ("slow", 60.0), ("never", 60.0)])) as finished:
        index, error = next(finished)
        assert (index, error) == (0, None)
        while not (tmp_path / "slow.started").exists():
            time.sleep(0.01)
    assert multiprocessing.active_children() == []
    assert not (tmp_path / "slow").exists(), "it was waited for"


def test_stopping_early_leaves_other_children_alone(tmp_path: Path) -> None:
    other = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    with closing(start(tmp_path, [("a",), ("slow", 60.0)])) as finished:
        next(finished)
        other.start()  # after the pool: a loader of data, for example
    try:
        assert other.is_alive()
        assert multiprocessing.active_children() == [other]
    finally:
        other.kill()
        other.join()


def test_what_the_processes_need_is_built_once_in_each(tmp_path: Path) -> None:
    looks: list[float] = []
    tasks = [(str(n), 0.1) for n in range(6)]
    work_ = in_processes(work, tasks, 2, build, (tmp_path,), meanwhile=lambda: looks.append(time.monotonic()))
    assert [error for _, error in work_] == [None] * 6
    built = [line.split() for line in (tmp_path / "built").read_text().splitlines()]
    assert 1 <= len({pid for pid, _ in built}) == len(built) <= 2
    assert {threads for _, threads in built} == {str(max(1, torch.get_num_threads() // 2))}
    assert looks


def test_failures_are_raised_together() -> None:
    failures = Failures("attack", 9)
    failures.raise_if_any()
    failures.add("one", DataError("the row is bad"))
    with pytest.raises(DataError, match="1 of 9 attacks failed:\n  one: the row is bad\n"):
        failures.raise_if_any()
    failures.add("two", IndexError("oh"))
    with pytest.raises(RunError, match="  two: IndexError: oh\n"):
        failures.raise_if_any()
    for number in range(10):
        failures.add(str(number), ConfigError("no"))
    with pytest.raises(RunError, match=r"\.\.\. and 7 more"):
        failures.raise_if_any()


def test_ctrl_c_is_no_failure() -> None:
    def stopped(here: Any, task: str) -> None:
        raise KeyboardInterrupt if task == "stop" else ValueError(task)

    work = carry_out(stopped, [("wrong",), ("stop",)], 1, None, build, ())
    index, error = next(work)
    assert (index, str(error)) == (0, "wrong")
    with pytest.raises(KeyboardInterrupt):
        next(work)


@pytest.fixture
def study_of(tmp_path: Path) -> Callable[..., Study]:
    return lambda *changes: Study(resolve("sandbox", changes), tmp_path)


def test_what_a_hash_depends_on(study_of: Callable[..., Study]) -> None:
    """A setting of the defence changes the defence only, one of the attack the attack only."""
    plain = study_of()
    cell = plain.cells()[0]

    def hashes(study: Study) -> tuple[str, ...]:
        base, defended = study.base(), study.defended()
        attacked = [study.attack_run(target, study.cells()[0])[1] for target in (base, defended)]
        return base.hash, defended.hash, *attacked

    def changed(*changes: str) -> list[bool]:
        return [a != b for a, b in zip(hashes(plain), hashes(study_of(*changes)), strict=True)]

    assert changed("about=another text", "study=x") == [False, False, False, False]
    assert changed("defence.beta=0.7") == [False, True, False, True]
    assert changed("defence.train.max_steps=7") == [False, True, False, True]
    assert changed("attacks.0.steps=7") == [False, False, True, True]
    assert changed("seed=1") == [True, True, True, True]
    assert changed("model=sandbox:ignorant") == [True, True, True, True]
    assert cell.seed == 0
    names = {target.run.path.name.split("-")[0] for target in plain.targets()}
    assert names == {"base", "control", "repnoise"}


def test_withheld_harm_is_attacked_on_request_only(study_of: Callable[..., Study]) -> None:
    assert {cell.harm for cell in study_of("attacks=[{name: sft}]").cells()} == {"knowledge", "behaviour"}
    assert {cell.harm for cell in study_of("attacks.0.harm=withheld").cells()} == {"withheld"}
