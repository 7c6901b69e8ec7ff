"""Pieces of a sweep over one folder: the locks are the queue, nothing is done twice, nobody is waited for in vain."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from repnoise.campaign import sweep
from repnoise.campaign.sweep import run_sweep, share
from repnoise.campaign.sweep_file import Sweep, read_sweep
from repnoise.campaign.sweep_studies import Piece, SweepStudies
from repnoise.store.lock import is_free
from repnoise.store.run import Run
from repnoise.study import inputs
from repnoise.study.attacking import attack
from repnoise.study.cell import Cell
from repnoise.study.defending import defend
from repnoise.study.measuring import evaluate
from repnoise.study.workers import Failures

NAMES = ("a", "b", "c", "d")
ROW = {"metric": "m", "value": 0.5, "n": 2, "lo": None, "hi": None, "seed": 0}
PIECES: list[Piece] = [(name, None) for name in NAMES]


class Folders(SweepStudies):
    """Pieces that are a moment's work; `made` says in which order."""

    def __init__(self, folder: Path, began: str | None = None) -> None:
        super().__init__(None, folder, quiet=True, began=began)  # type: ignore[arg-type]
        self.made: list[str] = []

    def run_of(self, piece: Piece) -> Run:
        return Run(self.folder / piece[0])

    def is_done(self, piece: Piece) -> bool:
        return self.run_of(piece).is_done(piece[0])

    def _do(self, who: str, cell: Cell | None) -> None:
        run = self.run_of((who, cell))
        with run.held():
            if run.is_done(who):
                return
            with run.start(stage="base", name=who, hash=who):
                self.made.append(who)
                if who == "wrong":
                    raise ValueError("it diverged")
                run.finish()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "PAUSE", 0.01)


@pytest.fixture
def shared(tmp_path: Path) -> Callable[..., tuple[Folders, Failures]]:
    def go(pieces: list[Piece] = PIECES, **more: Any) -> tuple[Folders, Failures]:
        studies, failures = Folders(tmp_path, **more), Failures("piece", len(pieces))
        share(studies, "piece", pieces, 1, failures)
        return studies, failures

    return go


def held_by_another(run: Run, until: Callable[[], bool], *, finishes: bool) -> threading.Thread:
    """Another worker has the piece; it finishes it, or leaves without."""
    has = threading.Event()

    def work() -> None:
        with run.held():
            has.set()
            while not until():
                time.sleep(0.01)
            if finishes:
                run.start(stage="base", name="b", hash=run.path.name).finish()

    thread = threading.Thread(target=work)
    thread.start()
    assert has.wait(10)
    return thread


def test_what_another_worker_holds_comes_last_and_is_not_done_again(shared: Any, tmp_path: Path) -> None:
    other = held_by_another(Run(tmp_path / "b"), lambda: (tmp_path / "d" / "manifest.json").exists(), finishes=True)
    studies, failures = shared()
    other.join()
    assert studies.made == ["a", "c", "d"]
    assert not failures.found
    assert all(studies.is_done(piece) for piece in PIECES)


def test_what_another_worker_leaves_is_taken_up(shared: Any, tmp_path: Path) -> None:
    other = held_by_another(Run(tmp_path / "b"), lambda: (tmp_path / "d" / "manifest.json").exists(), finishes=False)
    studies, failures = shared()
    other.join()
    assert studies.made == ["a", "c", "d", "b"]
    assert not failures.found


def test_a_lock_of_another_machine_that_may_be_gone_is_told_and_not_waited_for(shared: Any, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".lock").write_text('{"pid": 1, "host": "elsewhere"}')
    studies, failures = shared()
    assert studies.made == ["a", "c", "d"]
    ((label, error),) = failures.found
    assert label == "b"
    assert "in use by process 1 on elsewhere" in str(error)
    assert "If it is surely gone, delete" in str(error)


def test_what_failed_with_another_worker_is_not_tried_again(shared: Any) -> None:
    pieces = [("wrong", None), ("a", None)]
    studies, failures = shared(pieces, began="2000-01-01T00:00:00+00:00")
    assert studies.made == ["wrong", "a"]
    assert str(failures.found[0][1]) == "it diverged"
    beside, failures = shared(pieces, began="2000-01-01T00:00:00+00:00")  # one that was started as early
    assert beside.made == []
    assert str(failures.found[0][1]) == "failed with another worker: ValueError: it diverged"
    later, _ = shared(pieces, began="2999-01-01T00:00:00+00:00")
    assert later.made == ["wrong"]


def test_many_workers_do_each_piece_once(tmp_path: Path) -> None:
    pieces: list[Piece] = [(f"piece-{n}", None) for n in range(20)]
    workers = [Folders(tmp_path) for _ in range(4)]
    failures = Failures("piece", 20)
    threads = [threading.Thread(target=share, args=(w, "piece", pieces, 1, failures)) for w in workers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures.found
    assert sorted(name for worker in workers for name in worker.made) == sorted(name for name, _ in pieces)
    assert sum(bool(worker.made) for worker in workers) >= 2


# ---- of the real stages -----------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Sweep:
    path = tmp_path / "small.yaml"
    train = {"max_steps": 1, "per_device_train_batch_size": 2}
    defences = [{"label": f"beta-{n}", "name": "repnoise", "beta": n, "train": train} for n in (1, 2)]
    attacks = [{"name": "sft", "harm": "knowledge", "steps": 0}]
    overrides = ["controls=[random]", "evaluations=[loss]", "curve=[]"]
    sweep = {"sweep": "small", "recipe": "sandbox", "overrides": overrides, "attacks": attacks, "defences": defences}
    path.write_text(yaml.safe_dump(sweep))
    return read_sweep(str(path))


def test_what_the_studies_share_is_read_once(small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    given = inputs.load_data
    monkeypatch.setattr(inputs, "load_data", lambda recipe: read.append(recipe) or given(recipe))
    studies = SweepStudies(small, tmp_path / "out")
    targets = studies.targets
    assert list(targets) == ["base", "control-random", "beta-1", "beta-2"]
    assert len(read) == 1
    one, two = studies.studies.values()
    assert one.data is two.data
    assert one.evaluations is two.evaluations
    assert one.base().hash == two.base().hash
    assert one.defended().hash != two.defended().hash


@pytest.mark.parametrize("stage", ["evaluate", "defend", "attack"])
def test_a_stage_asks_again_once_it_has_the_lock(
    stage: str, small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its first look and the lock another worker may have finished the piece."""
    study = next(iter(SweepStudies(small, tmp_path / "out", quiet=True).studies.values()))
    target = study.defended() if stage == "defend" else study.base()
    cell = study.cells()[0]
    run, digest = study.attack_run(target, cell) if stage == "attack" else (target.run, target.hash)
    given = Run.held

    @contextmanager
    def slow(self: Run) -> Iterator[None]:
        monkeypatch.setattr(Run, "held", given)
        other = Run(self.path)
        other.start(stage="base", name="another", hash=digest)
        for label in study.evaluations:
            other.write_rows(label, [ROW], settings=study.measured(label))
        other.finish()
        with given(self):
            yield

    monkeypatch.setattr(Run, "held", slow)
    if stage == "evaluate":
        evaluate(study, target, "base")
    elif stage == "defend":
        defend(study)
    else:
        attack(study, target, cell)
    manifest = run.manifest()
    assert manifest is not None
    assert manifest["name"] == "another"


def test_the_comparison_is_written_while_the_folder_is_held(
    small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = []
    for name in ("share", "tell_of_attacks"):
        monkeypatch.setattr(sweep, name, lambda *args: None)
    monkeypatch.setattr(sweep, "write_comparison", lambda folder: held.append(not is_free(folder)) or folder)
    run_sweep(small, tmp_path / "out", quiet=True)
    assert held == [True]
