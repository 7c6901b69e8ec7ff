"""Ctrl-C and kill -9 in the middle: nothing done is lost, nothing is repeated, the result is the same."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

PATIENCE = 120.0


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        if process.poll() is not None:
            pytest.fail(f"the run ended too early:\n{process.communicate()[1]}")
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def copy_of(finished: Any, folder: Path, *, without: str) -> Any:
    """The same study with the same inputs, part of its run taken away."""
    study, _ = finished
    new = type(study)(folder)
    new.recipe.write_text(study.recipe.read_text())
    shutil.copytree(study.out, new.out)
    for path in new.out.glob(without):
        shutil.rmtree(path)
    for name in ("summary.json", "table.csv", "report.html"):
        (new.out / name).unlink()
    return new


def assert_same_result(study: Any, finished: Any) -> None:
    whole, _ = finished
    assert study.summary() == whole.summary()
    fingerprints = [s.manifest("repnoise-*")["model"]["fingerprint"] for s in (study, whole)]
    assert fingerprints[0] == fingerprints[1]


def test_ctrl_c_during_the_defence(finished: Any, cli: Callable[..., Any], tmp_path: Path) -> None:
    study = copy_of(finished, tmp_path, without="repnoise-*")

    def a_few_steps() -> bool:
        return any(len(path.read_text().splitlines()) >= 5 for path in study.out.glob("repnoise-*/train.jsonl"))

    process = study.start("--quiet")
    wait_for(a_few_steps, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, err
    assert out == ""
    assert "repnoise: interrupted. What was finished is kept; run the same command again" in err
    assert "Traceback" not in err
    assert study.manifest("repnoise-*")["status"] == "interrupted"
    (checkpoint,) = study.out.glob("repnoise-*/checkpoints/checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert 5 <= step < 80

    base = (study.out / "base" / "manifest.json").stat().st_mtime_ns
    answer = cli("run", study.recipe, "--out", study.out)
    assert answer.code == 0, answer.err
    assert (study.out / "base" / "manifest.json").stat().st_mtime_ns == base
    assert not list(study.out.glob("repnoise-*/checkpoints"))
    (log,) = study.out.glob("repnoise-*/train.jsonl")
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 81))
    assert_same_result(study, finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopped_during_the_attacks(
    number: signal.Signals, finished: Any, cli: Callable[..., Any], tmp_path: Path
) -> None:
    """With worker processes: none survives, finished cells stay as they are."""
    study = copy_of(finished, tmp_path, without="*/attacks/*")
    process = study.start("--jobs", "2", "--quiet")
    wait_for(study.attacks, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == (1 if number == signal.SIGINT else -signal.SIGKILL), err
    if number == signal.SIGINT:
        assert "repnoise: interrupted. What was finished is kept; run the same command again" in err
    assert "Traceback" not in err
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=PATIENCE)
    assert not alive

    done = {path: path.stat().st_mtime_ns for path in study.attacks()}
    assert 1 <= len(done) < 6
    answer = cli("run", study.recipe, "--out", study.out)
    assert answer.code == 0, answer.err
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(study.attacks()) == 6
    assert_same_result(study, finished)
