"""Work shared over one storage: every piece once, dead workers are noticed, passwords stay unseen."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from trial_tasks import PIECES

optuna = pytest.importorskip("optuna")

from repnoise.campaign import queue as trials  # noqa: E402
from repnoise.errors import ConfigError, MissingExtraError  # noqa: E402

WORKER = Path(__file__).parent / "trial_tasks.py"


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'shared.db'}"


def start(url: str, folder: Path, kind: str = "", workers: int = 1) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [sys.executable, str(WORKER), url, "work", str(folder), kind, str(workers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err


def done(folder: Path) -> Counter[int]:
    return Counter(int(path.stem) for path in folder.iterdir())


def states(url: str) -> Counter[str]:
    return Counter(trial.state.name for trial in trials.open_study(url, "work").get_trials())


def test_three_workers_on_one_storage_do_each_piece_once(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "done"
    finish(*(start(url, folder, workers=3) for _ in range(3)))  # who fill the queue at the same time
    assert done(folder) == Counter({n: 1 for n in range(len(PIECES))})
    workers = Counter(path.suffix for path in folder.iterdir())
    assert len(workers) >= 2  # more than one had work
    assert states(url)["COMPLETE"] == len(PIECES)
    assert not {"RUNNING", "WAITING", "FAIL"} & set(states(url))


def test_a_piece_that_two_workers_queued_is_done_once(url: str) -> None:
    study = trials.open_study(url, "work")
    for _ in range(2):  # both looked before either wrote
        study.enqueue_trial({}, user_attrs={"key": "x", "piece": {"n": 1}, "after": -1})
    seen: list[Any] = []
    trials.work_off(study, seen.append)
    assert [piece["n"] for piece in seen] == [1]
    trials.queue(study, {"x": {"n": 2}})  # a later round, for its result is gone from the disk
    trials.work_off(study, seen.append)
    assert [piece["n"] for piece in seen] == [1, 2]


def test_pieces_of_a_killed_worker_are_taken_up_again(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "done"
    victim = start(url, folder, "hang")
    end = time.monotonic() + 60
    while not list(folder.iterdir()):
        assert victim.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    (first,) = folder.iterdir()
    finish(start(url, folder))
    assert done(folder) == Counter({n: 1 for n in range(len(PIECES))} | {int(first.stem): 2})
    (again,) = [path for path in folder.glob(f"{first.stem}.*") if path != first]
    assert f"'pid': {victim.pid}" in again.read_text()  # it knows who died, for the lock of the folder


def test_a_piece_that_fails_stops_nobody_and_is_told(url: str, tmp_path: Path) -> None:
    finish(start(url, tmp_path / "done", "fail"))
    assert done(tmp_path / "done") == Counter({n: 1 for n in range(len(PIECES))})
    study = trials.open_study(url, "work")
    assert trials.why_not(study, "piece 3") == "piece 3 went wrong"
    finish(start(url, tmp_path / "again"))  # the same command again: what failed has another turn
    assert 3 in done(tmp_path / "again")


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_piece_that_kills_its_workers_is_given_up(url: str) -> None:
    study = trials.open_study(url, "work")
    trials.queue(study, {"bad": {"n": 0}})
    for _ in range(trials.RETRIES + 1):
        trial = study.ask()
        trial.set_user_attr("worker", {"host": platform.node(), "pid": 2**22 + 5, "birth": 1.0})
        trials.take_up(study)
    assert not study.get_trials(states=(optuna.trial.TrialState.WAITING, optuna.trial.TrialState.RUNNING))
    assert trials.why_not(study, "bad") == f"its worker died or was stopped, {trials.RETRIES + 1} times"


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_worker_of_another_machine_is_known_by_its_heartbeat(url: str) -> None:
    study = trials.open_study(url, "work", heartbeat=1)
    trials.queue(study, {"far": {"n": 0}})
    trial = study.ask()
    trial.set_user_attr("worker", {"host": "elsewhere", "pid": 1, "birth": 1.0})
    study._storage.record_heartbeat(trial._trial_id)
    trials.take_up(study)
    assert [t.state.name for t in study.get_trials()] == ["RUNNING"]  # it may well be alive
    time.sleep(4.5)
    trials.take_up(study)
    assert [t.state.name for t in study.get_trials()] == ["FAIL", "WAITING"]
    assert study.get_trials()[1].user_attrs["dead"]["host"] == "elsewhere"


def test_the_lock_of_a_dead_worker_is_removed_and_no_other(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    trials.free_lock(tmp_path, None)
    trials.free_lock(tmp_path, {"host": "elsewhere", "pid": 8})
    assert lock.exists()
    trials.free_lock(tmp_path, {"host": "elsewhere", "pid": 7})
    assert not lock.exists()
    trials.free_lock(tmp_path, {"host": "elsewhere", "pid": 7})


def test_who_is_dead() -> None:
    me = trials._me()
    assert not trials._is_dead(me)
    assert trials._is_dead({**me, "birth": me["birth"] - 60})  # another process had this id
    assert not trials._is_dead({**me, "host": "elsewhere", "pid": 2**22 + 5})
    assert not trials._is_dead(None)
    child = subprocess.Popen([sys.executable, "-c", ""])
    birth = trials._birth(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie is dead
    assert trials._is_dead({"host": platform.node(), "pid": child.pid, "birth": birth or 1.0})
    child.wait()


@pytest.mark.parametrize("url", ["nonsense", "mongodb://a:s3cret@b/c", "sqlite://", "sqlite:///:memory:"])
def test_urls_that_will_not_do(url: str) -> None:
    with pytest.raises(ConfigError, match=r"sqlite:///FILE") as caught:
        trials.open_study(url, "work")
    assert "s3cret" not in str(caught.value)


def test_a_password_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql://me:s3cret@127.0.0.1:1/x"
    assert trials.check_url(url) == "postgresql://me:***@127.0.0.1:1/x"
    with pytest.raises((ConfigError, MissingExtraError)) as caught:  # no server, or no driver
        trials.open_study(url, "work")
    assert "***" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot be opened: .*unable to open database file"):
        trials.open_study(f"sqlite:///{tmp_path}/nowhere/x.db", "work")


def test_without_optuna(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'repnoise\[search\]'"):
        trials.open_study(url, "work")


def test_a_folder_has_one_name(tmp_path: Path) -> None:
    names: set[Any] = {trials.folder_id(tmp_path) for _ in range(3)}
    assert len(names) == 1
    (tmp_path / "other").mkdir()
    assert trials.folder_id(tmp_path / "other") not in names
