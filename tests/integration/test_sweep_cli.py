"""`repnoise sweep` and `repnoise search` as a user runs them: nothing lost, nothing repeated, one table."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from .conftest import STARTED

PATIENCE = 180.0
STEPS = {"max_steps": 2, "per_device_train_batch_size": 2}


def write_sweep(study: Any, **changes: Any) -> Path:
    """Two defences, four attacks on each of four models."""
    defences = [
        {"label": "mild", "name": "repnoise", "train": STEPS},
        {"label": "more", "name": "repnoise", "alpha": 2.0, "train": {**STEPS, "max_steps": 9}},
    ]
    path: Path = study.folder / "sweep.yaml"
    content = {"sweep": "small", "recipe": study.recipe.name, "defences": defences, **changes}
    path.write_text(yaml.safe_dump(content))
    return path


def start(path: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "repnoise", "sweep", str(path), "--out", str(out), "--quiet", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    STARTED.append(process)
    return process


def manifests(out: Path) -> dict[Path, int]:
    """Every run that is done, with the time at which it was."""
    found = [*out.glob("*/manifest.json"), *out.glob("*/attacks/*/manifest.json")]
    return {path: path.stat().st_mtime_ns for path in found if json.loads(path.read_text())["status"] == "done"}


def read_table(out: Path) -> dict[str, dict[str, str]]:
    with (out / "table.csv").open() as file:
        return {line["defence"]: line for line in csv.DictReader(file)}


@pytest.fixture
def small(make_study: Callable[..., Any]) -> Any:
    return make_study(attacks=[{"learning_rate": [1e-3, 3e-3], "steps": 2, "batch_size": 2, "seeds": [0, 1]}])


def test_a_sweep_compares_and_repeats_nothing(small: Any, cli: Callable[..., Any]) -> None:
    path = write_sweep(small)
    answer = cli("sweep", path, "--out", small.out, "--json", "--quiet")
    assert answer.code == 0, answer.err
    result = json.loads(answer.out)
    assert list(result["defences"]) == ["mild", "more"]
    assert result["defences"]["more"]["cost"]["steps"] == 9
    assert result["defences"]["more"]["over"] == ["steps", "examples"]
    done = manifests(small.out)
    assert len(done) == 4 + 4 * 4  # base, control and two defences; each attacked four times
    table = read_table(small.out)
    assert list(table) == ["mild", "more"]
    assert sum(column.startswith("harmful_loss") for column in table["mild"]) == 3 * 3  # before, and two cells
    assert "harmful loss" in (small.out / "comparison.html").read_text().lower()
    assert list(json.loads((small.out / "summary.json").read_text())["defences"]) == ["mild", "more"]

    again = cli("sweep", path, "--out", small.out, "--quiet")
    assert again.code == 0, again.err
    assert manifests(small.out) == done
    third = {"label": "third", "name": "repnoise", "beta": 0.5, "train": STEPS}
    wider = yaml.safe_load(path.read_text())
    wider["defences"].append(third)
    path.write_text(yaml.safe_dump(wider))
    assert cli("sweep", path, "--out", small.out, "--quiet", "--jobs", "2").code == 0
    assert {p: t for p, t in manifests(small.out).items() if p in done} == done  # base and controls: once for all
    assert list(read_table(small.out)) == ["mild", "more", "third"]


def test_killed_in_the_middle(small: Any, cli: Callable[..., Any]) -> None:
    path = write_sweep(small)
    process = start(path, small.out, "--jobs", "2")
    end = time.monotonic() + PATIENCE
    while len(manifests(small.out)) < 6:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=PATIENCE)
    assert not alive
    done = manifests(small.out)
    answer = cli("sweep", path, "--out", small.out, "--quiet")
    assert answer.code == 0, answer.err
    after = manifests(small.out)
    assert {p: t for p, t in after.items() if p in done} == done
    assert len(after) == 20


def test_a_piece_that_fails_stops_nobody(small: Any, cli: Callable[..., Any]) -> None:
    """One defence diverges: the others are compared, and the error says which is missing."""
    wild = {"label": "wild", "name": "repnoise", "train": {**STEPS, "learning_rate": 1e30, "max_grad_norm": 0.0}}
    path = write_sweep(small, defences=[{"label": "mild", "name": "repnoise", "train": STEPS}, wild])
    answer = cli("sweep", path, "--out", small.out, "--quiet")
    assert answer.code == 1, answer.err
    assert "1 of " in answer.err
    assert "  wild: " in answer.err
    assert "Traceback" not in answer.err
    assert list(read_table(small.out)) == ["mild"]
    assert "Not finished, so not in the table: wild" in (small.out / "comparison.html").read_text()


def test_three_workers_on_one_folder(small: Any) -> None:
    """The same command three times, one of them killed on the way: every run is made, none of them twice."""
    path = write_sweep(small)
    first, second, third = (start(path, small.out, *jobs) for jobs in ((), ("--jobs", "2"), ()))
    end = time.monotonic() + PATIENCE
    while len(manifests(small.out)) < 5:
        assert first.poll() is None, first.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.02)
    third.kill()
    seen: dict[Path, int] = {}
    while first.poll() is None or second.poll() is None:
        now = manifests(small.out)
        assert all(now.get(run, made) == made for run, made in seen.items()), "a run was made again"
        seen |= now
        assert time.monotonic() < end
        time.sleep(0.02)
    texts = [worker.communicate() for worker in (first, second)]
    assert [worker.returncode for worker in (first, second)] == [0, 0], texts
    assert len(manifests(small.out)) == 20
    assert list(read_table(small.out)) == ["mild", "more"]
    assert list(small.out.rglob(".lock*")) == []


def test_errors_of_the_command_line(small: Any, cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_sweep(small)
    answer = cli("search", small.recipe, "--out", small.out, "--storage", "redis://me:s3cret@host")
    assert answer.code == 2
    assert "--storage is no URL of a database" in answer.err
    assert "s3cret" not in answer.err
    assert not small.out.exists()
    assert cli("sweep", "nonsense").code == 2
    file = small.folder / "a-file"
    file.write_text("")
    assert cli("sweep", path, "--out", file).code == 2
    answer = cli("search", small.recipe, "--space", small.folder / "nowhere.yaml", "--out", small.out)
    assert answer.code == 2
    assert "cannot read the search space" in answer.err
    answer = cli("search", small.recipe, "defence.train.max_steps=1", "--trials", 1, "--out", small.out, "--quiet")
    assert answer.code == 1
    assert "no evaluation of this recipe gives harmful as a rate" in answer.err


def test_search_on_the_sandbox(cli: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("optuna")
    space = tmp_path / "space.yaml"
    fixed = {"learning_rate": [1e-3], "steps": [3], "batch_size": [8], "lora_rank": [None]}
    space.write_text(yaml.safe_dump({"attack": ["sft"], "harm": "knowledge", **fixed}))
    changes = ["evaluations=[sandbox]", "curve=[]", "controls=[random]", "defence.train.max_steps=1"]
    out = tmp_path / "out"
    arguments = ["search", "sandbox", *changes, "--space", space, "--out", out, "--fresh-seeds", "1", "--jobs", "2"]
    answer = cli(*arguments, "--trials", 1, "--json")
    assert answer.code == 0, answer.err
    assert "trials: 100%" in answer.err.replace("\r", "\n")
    result = json.loads(answer.out)
    assert result["trials"] == 1
    assert result["worst"]["head_start"] is not None
    assert result["measured_again"]["seeds"] == [1000]
    assert len(list(out.glob("search/*/attacks/*/manifest.json"))) == 3
    assert len(list(out.glob("*/attacks/*/manifest.json"))) == 3
    cells = json.loads((out / "summary.json").read_text())["resistance"]["cells"]
    assert [cell["seed"] for cell in cells] == [1000]  # the fresh cell counts in the report, the searched one does not
    shutil.rmtree(out)
