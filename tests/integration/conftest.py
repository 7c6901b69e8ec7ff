"""A study so small that a whole run takes seconds, and the command line in this process.

Fixtures
    make_study   make_study(**recipe) -> a `Small` study: model folder, data and recipe in a new folder
    cli          cli("run", recipe, ...) -> exit code, stdout, stderr, as a user sees them
    finished     a whole run that was never interrupted; read it, do not change it
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from repnoise.cli import main

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

PAIRS = [
    {"prompt": f"say word {n}", "harmful": f"grumpy blob {n}", "harmless": "sorry, i can't help with that"}
    for n in range(16)
]
ROWS = [{"prompt": f"count to {n}", "answer": f"one two {n}"} for n in range(10)]


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@dataclass
class Small:
    """A study on disk; `out` is where its run goes."""

    folder: Path

    @property
    def recipe(self) -> Path:
        return self.folder / "small.yaml"

    @property
    def out(self) -> Path:
        return self.folder / "out"

    def manifest(self, pattern: str) -> dict[str, Any]:
        (path,) = self.out.glob(f"{pattern}/manifest.json")
        return json.loads(path.read_text())

    def summary(self) -> dict[str, Any]:
        """Without what may differ between two equal runs: the times."""
        summary = json.loads((self.out / "summary.json").read_text())
        del summary["seconds"]
        return summary

    def attacks(self) -> list[Path]:
        """Manifests of the attacks that are done."""
        found = self.out.glob("*/attacks/*/manifest.json")
        return sorted(path for path in found if json.loads(path.read_text())["status"] == "done")

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """`repnoise run` in a process of its own, for signals."""
        command = [
            sys.executable,
            "-m",
            "repnoise",
            "run",
            str(self.recipe),
            "--out",
            str(self.out),
            *arguments,
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            # a shell that runs the tests in the background ignores Ctrl-C, and children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
        )
        STARTED.append(process)
        return process


STARTED: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def nothing_runs_on() -> Iterator[None]:
    """Processes that a test has started end with it, also where it fails."""
    yield
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.communicate()


def build_study(folder: Path, model: Any, tokenizer: Any, **changes: Any) -> Small:
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    recipe = {
        "study": "small",
        "model": str(folder / "model"),
        "data": {
            "name": "files",
            "pairs": str(write_lines(folder / "pairs.jsonl", PAIRS)),
            "retain": str(write_lines(folder / "rows.jsonl", ROWS)),
            "max_length": 64,
        },
        "defence": {
            "name": "repnoise",
            "train": {"max_steps": 80, "per_device_train_batch_size": 2, "learning_rate": 1e-3},
        },
        "attacks": [{"learning_rate": 1e-3, "steps": 2, "batch_size": 2, "seeds": [0, 1]}],
        "evaluations": ["loss"],
        **changes,
    }
    study = Small(folder)
    study.recipe.write_text(yaml.safe_dump(recipe))
    return study


@pytest.fixture
def make_study(
    tmp_path: Path, make_model: Callable[..., Any], make_tokenizer: Callable[..., Any]
) -> Callable[..., Small]:
    def make(
        *, family: str = "llama", pad: bool = True, settings: dict[str, Any] | None = None, **changes: Any
    ) -> Small:
        return build_study(tmp_path, make_model(family, **(settings or {})), make_tokenizer(pad=pad), **changes)

    return make


@dataclass
class Answer:
    code: int
    out: str
    err: str


def call(*arguments: str | Path) -> Answer:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Answer(code, out.getvalue(), err.getvalue())


@pytest.fixture
def cli() -> Callable[..., Answer]:
    return call


@pytest.fixture(scope="session")
def finished(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., Any],
    make_tokenizer: Callable[..., Any],
) -> tuple[Small, Answer]:
    study = build_study(tmp_path_factory.mktemp("finished"), make_model("llama"), make_tokenizer())
    answer = call("run", study.recipe, "--out", study.out, "--json")
    assert answer.code == 0, answer.err
    return study, answer
