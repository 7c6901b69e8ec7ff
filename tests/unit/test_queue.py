"""Trials shared over one storage: each once, dead workers are noticed, passwords stay unseen."""

from __future__ import annotations

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
from trial_tasks import WANTED

optuna = pytest.importorskip("optuna")

from repnoise.campaign import queue  # noqa: E402
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


def trials(url: str) -> list[Any]:
    return queue.open_study(url, "work").get_trials()


def states(url: str) -> Counter[str]:
    return Counter(trial.state.name for trial in trials(url))


def test_three_workers_on_one_storage_run_each_trial_once(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "done"
    finish(*(start(url, folder, workers=3) for _ in range(3)))  # who make the database at the same time
    numbers = Counter(path.stem for path in folder.iterdir())
    assert len(numbers) >= WANTED
    assert set(numbers.values()) == {1}
    assert len(Counter(path.suffix for path in folder.iterdir())) >= 2  # more than one had work
    assert set(states(url)) == {"COMPLETE"}


def test_the_trial_of_a_killed_worker_is_taken_up_again(url: str, tmp_path: Path) -> None:
    folder = tmp_path / "done"
    victim = start(url, folder, "hang")
    end = time.monotonic() + 60
    while not any(path.read_text() for path in folder.iterdir()):
        assert victim.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.communicate()
    (first,) = folder.iterdir()
    finish(start(url, folder))
    assert states(url) == {"COMPLETE": WANTED, "FAIL": 1}
    assert first.read_text() in {path.read_text() for path in folder.iterdir() if path != first}  # the same point


def test_a_trial_that_fails_stops_nobody_and_is_told(url: str, tmp_path: Path) -> None:
    finish(start(url, tmp_path / "done", "fail"))
    assert states(url) == {"COMPLETE": WANTED - 1, "FAIL": 1}
    assert trials(url)[3].user_attrs["error"] == "trial 3 went wrong"


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_trial_that_kills_its_workers_is_given_up(url: str) -> None:
    study = queue.open_study(url, "work")
    study.enqueue_trial({})
    for _ in range(queue.RETRIES + 1):
        trial = study.ask()
        trial.set_user_attr("worker", {"host": platform.node(), "pid": 2**22 + 5, "birth": 1.0})
        queue.take_up(study)
    assert not study.get_trials(states=(optuna.trial.TrialState.WAITING, optuna.trial.TrialState.RUNNING))


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_worker_of_another_machine_is_known_by_its_heartbeat(url: str) -> None:
    study = queue.open_study(url, "work", heartbeat=1)
    study.enqueue_trial({})
    trial = study.ask()
    trial.set_user_attr("worker", {"host": "elsewhere", "pid": 1, "birth": 1.0})
    study._storage.record_heartbeat(trial._trial_id)
    queue.take_up(study)
    assert [t.state.name for t in study.get_trials()] == ["RUNNING"]  # it may well be alive
    time.sleep(4.5)
    queue.take_up(study)
    assert [t.state.name for t in study.get_trials()] == ["FAIL", "WAITING"]


def test_who_is_dead() -> None:
    me = queue._me()
    assert not queue._is_dead(me)
    assert queue._is_dead({**me, "birth": me["birth"] - 60})  # another process had this id
    assert not queue._is_dead({**me, "host": "elsewhere", "pid": 2**22 + 5})
    assert not queue._is_dead(None)
    child = subprocess.Popen([sys.executable, "-c", ""])
    birth = queue._birth(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie is dead
    assert queue._is_dead({"host": platform.node(), "pid": child.pid, "birth": birth or 1.0})
    child.wait()


@pytest.mark.parametrize("url", ["nonsense", "mongodb://a:s3cret@b/c", "sqlite://", "sqlite:///:memory:"])
def test_urls_that_will_not_do(url: str) -> None:
    with pytest.raises(ConfigError, match=r"sqlite:///FILE") as caught:
        queue.open_study(url, "work")
    assert "s3cret" not in str(caught.value)


def test_a_password_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = "postgresql://me:s3cret@127.0.0.1:1/x"
    assert queue.check_url(url) == "postgresql://me:***@127.0.0.1:1/x"
    with pytest.raises((ConfigError, MissingExtraError)) as caught:  # no server, or no driver
        queue.open_study(url, "work")
    assert "***" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"cannot be opened: .*unable to open database file"):
        queue.open_study(f"sqlite:///{tmp_path}/nowhere/x.db", "work")


def test_without_optuna(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'repnoise\[search\]'"):
        queue.open_study(url, "work")


def test_a_folder_has_one_name(tmp_path: Path) -> None:
    names: set[Any] = {queue.folder_id(tmp_path) for _ in range(3)}
    assert len(names) == 1
    (tmp_path / "other").mkdir()
    assert queue.folder_id(tmp_path / "other") not in names
