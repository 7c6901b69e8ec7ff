"""The run folder: one stage on disk, with its manifest, rows and samples. Needs no torch.

    STUDY/base/  STUDY/control-<kind>/  STUDY/<defence>-<hash>/     below each: attacks/<attack>-<hash>/
        recipe.yaml  manifest.json  progress.json  train.jsonl  model/  rows/<evaluation>.jsonl  samples/

`manifest.json` is written last and atomically; only one with status "done" and the expected hash marks a run
as complete. While a stage runs there is `progress.json` and no manifest.

    run = Run(study / "repnoise-3f0c9a1b2d")
    if not run.is_done(hash):
        with run.start(stage="defend", name="repnoise", hash=hash, seeds=[0], arguments={...}):
            run.write_rows("sandbox", rows)
            run.finish(model={"fingerprint": ...})
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from numbers import Integral, Real
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

from repnoise.errors import RunError
from repnoise.files import (
    append_jsonl,
    disk_guard,
    folder_lock,
    now,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_text,
    write_yaml,
)

__all__ = [
    "SCHEMA",
    "Run",
    "append_jsonl",
    "canonical_hash",
    "check_name",
    "check_row",
    "disk_guard",
    "folder_lock",
    "git_state",
    "now",
    "one_line",
    "package_versions",
    "read_json",
    "read_jsonl",
    "write_json",
    "write_jsonl",
    "write_text",
    "write_yaml",
]

SCHEMA = 1
PACKAGES = ("repnoise", "torch", "transformers", "accelerate", "datasets", "peft", "safetensors")
MANIFEST_KEYS = (
    *(
        "schema",
        "status",
        "stage",
        "name",
        "hash",
        "parent",
        "seeds",
        "versions",
        "python",
        "platform",
        "git",
    ),
    *("data", "model", "started", "finished", "seconds", "error", "arguments"),
)


# ---------------------------------------------------------------------------------- names and hashes


def canonical_hash(obj: Any) -> str:
    """Ten hex digits of the SHA-256 of `obj` as JSON with sorted keys; paths count as text, no NaN."""

    def plain(value: Any) -> Any:
        if isinstance(value, PurePath):
            return str(value)
        raise TypeError(f"{type(value).__name__} is not JSON")

    try:
        text = json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False, default=plain)
    except (TypeError, ValueError) as error:
        raise RunError(
            f"Cannot hash these settings: {error}. Allowed: dicts with text keys, lists, text, finite "
            "numbers, booleans, None and paths. Convert the value before hashing."
        ) from error
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def check_name(name: str, what: str) -> str:
    """`name` if it is safe as one part of a file name, else a RunError."""
    if not name or name.startswith(".") or not all(c.isalnum() or c in "._-" for c in name):
        raise RunError(f"{what} {name!r} cannot be a file name. Allowed: letters, digits, '.', '_', '-'; no '.' first.")
    return name


# ---------------------------------------------------------------------------------- where it ran


@functools.cache
def package_versions() -> dict[str, str | None]:
    """Installed versions of the packages that decide the numbers; None where one is not installed."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def git_state(source: Path | None = None) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that tracks this file; None for an installed package."""
    source = source or Path(__file__).resolve()

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source.parent), *arguments]
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        return subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=10, env=environment
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", source.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def one_line(error: BaseException | str) -> str:
    """An error as one line without a traceback."""
    text = str(error) if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return " ".join(text.split()).rstrip(": ")[:500]


# ---------------------------------------------------------------------------------- rows

ROW_KEYS = {  # key: type, may be None, must be there
    "evaluation": (str, False, True),
    "metric": (str, False, True),
    "value": (Real, False, True),
    "n": (Integral, False, True),
    "lo": (Real, True, True),
    "hi": (Real, True, True),
    "seed": (Integral, True, True),
    "split": (str, True, False),
    "layer": (Integral, True, False),
    "category": (str, True, False),
    "attack": (str, True, False),
    "step": (Integral, True, False),
    "judge": (str, True, False),
    "decoding": (str, True, False),
    "items": (list, True, False),
}


def check_row(row: Mapping[str, Any], where: str = "A row") -> dict[str, Any]:
    """`row` with plain numbers, in the order of the schema, or a RunError that names every fault.

    `value` is finite and `n` at least 1: nothing measured is an error, never 0. `step` marks a point along an
    attack, `judge` who labelled, `decoding` how the answers were generated; `items` are the values whose mean
    `value` is, in the order of the data, so that two models can be compared item by item.
    """
    faults = [f"unknown key {key!r}" for key in row if key not in ROW_KEYS]
    checked: dict[str, Any] = {}
    for key, (kind, optional, required) in ROW_KEYS.items():
        value = row.get(key)
        if key not in row:
            if required:
                faults.append(f"{key} is missing")
            continue
        if value is not None and hasattr(value, "item"):  # a number of numpy or torch
            value = value.item()
        if value is None:
            if not optional:
                faults.append(f"{key} is None: nothing measured is an error, never 0")
        elif isinstance(value, bool) or not isinstance(value, kind):
            faults.append(f"{key} is {value!r}, not {kind.__name__}")
        elif kind is Real and not math.isfinite(value):
            faults.append(f"{key} is {value}: not measured, or it overflowed (leave such a row out)")
        elif kind is list and not all(isinstance(item, Real) and math.isfinite(item) for item in value):
            faults.append(f"{key} holds something that is no finite number")
        checked[key] = value
    if not faults:
        if checked["n"] < 1:
            faults.append(f"n is {checked['n']}: nothing measured is an error, never 0")
        if (checked["lo"] is None) != (checked["hi"] is None):
            faults.append("lo and hi go together")
        elif checked["lo"] is not None and checked["lo"] > checked["hi"]:
            faults.append(f"lo {checked['lo']} is above hi {checked['hi']}")
    if faults:
        name = f"{row.get('evaluation')}/{row.get('metric')}"
        raise RunError(f"{where} ({name}) is wrong: {'; '.join(faults)}. Allowed keys: {', '.join(ROW_KEYS)}.")
    return checked


# ---------------------------------------------------------------------------------- the run


class Run:
    """One run folder. `start` locks it; `finish` or `fail` writes the manifest and unlocks it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest_path = self.path / "manifest.json"
        self.progress_path = self.path / "progress.json"
        self._record: dict[str, Any] | None = None
        self._began = 0.0
        self._lock = contextlib.ExitStack()

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None where there is none. A damaged or newer one is a RunError."""
        if not self.manifest_path.exists():
            return None
        manifest = read_json(self.manifest_path)
        if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
            got = manifest.get("schema") if isinstance(manifest, dict) else type(manifest).__name__
            raise RunError(
                f"{self.manifest_path} has schema {got!r}; this version reads {SCHEMA}. Use the "
                "version of repnoise that wrote it, or another --out folder."
            )
        return manifest

    def is_done(self, hash: str) -> bool:
        """True only for a manifest with status "done" and this hash. An unreadable manifest is not done."""
        try:
            json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        manifest = self.manifest() or {}
        return manifest.get("status") == "done" and manifest.get("hash") == hash

    def start(
        self,
        *,
        stage: str,
        name: str,
        hash: str,
        parent: str | None = None,
        seeds: Sequence[int] = (),
        arguments: Mapping[str, Any] | None = None,
        data: Any = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> Run:
        """Lock the folder, drop the old manifest and write progress.json (and recipe.yaml).

        Rows, samples and train.jsonl of the same hash stay, so that a crashed stage can go on; those of
        another hash are removed, so that two settings never mix. `stage` is "base", "control",
        "defend" or "attack".
        """
        with disk_guard(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(folder_lock(self.path))
        try:
            if self._last_hash() not in (None, hash):
                for folder in ("rows", "samples"):
                    shutil.rmtree(self.path / folder, ignore_errors=True)
                (self.path / "train.jsonl").unlink(missing_ok=True)
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            self._record = {
                "schema": SCHEMA,
                "status": "running",
                "stage": stage,
                "name": name,
                "hash": hash,
                "parent": parent,
                "seeds": list(seeds),
                "versions": dict(package_versions()),
                "python": platform.python_version(),
                "platform": platform.platform(),
                "git": git_state(),
                "data": data,
                "model": None,
                "started": now(),
                "arguments": dict(arguments or {}),
            }
            self._began = time.monotonic()
            write_json(self.progress_path, {**self._record, "pid": os.getpid()})
            self.manifest_path.unlink(missing_ok=True)
            if recipe is not None:
                write_yaml(self.path / "recipe.yaml", dict(recipe))
        except BaseException:
            self._record = None
            self._lock.close()
            raise
        return self

    def progress(self, **fields: Any) -> None:
        """Rewrite progress.json with these fields added (step, of, loss, ...)."""
        write_json(self.progress_path, {**self._open(), "pid": os.getpid(), "updated": now(), **fields})

    def finish(self, *, model: Any = None, data: Any = None) -> dict[str, Any]:
        """Write the manifest with status "done": the last thing a stage does."""
        return self._close("done", None, model=model, data=data)

    def fail(self, error: BaseException | str) -> dict[str, Any]:
        """Write the manifest as "failed" ("interrupted" for Ctrl-C or exit) with the error in one line."""
        stopped = isinstance(error, KeyboardInterrupt | SystemExit | GeneratorExit)
        return self._close("interrupted" if stopped else "failed", one_line(error))

    def __enter__(self) -> Run:
        self._open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._record is None:
            return
        if error is not None:
            with contextlib.suppress(RunError, OSError):  # a full disk must not hide the first error
                self.fail(error)
            self._record = None
            self._lock.close()
            return
        self.fail("the stage ended without finish()")
        raise RunError(f"The stage in {self.path} ended without finish(); it is recorded as failed.")

    # -- rows and samples

    def write_rows(self, evaluation: str, rows: Iterable[Mapping[str, Any]], *, settings: str | None = None) -> Path:
        """Check and write rows/<evaluation>.jsonl. No rows at all is an error.

        `settings`: hash of what made these rows; `has_rows` asks for it.
        """
        check_name(evaluation, "The evaluation")
        checked = [check_row({"evaluation": evaluation, **row}) for row in rows]
        if not checked:
            raise RunError(
                f"Evaluation {evaluation!r} gave no rows. Nothing measured is an error, never 0: check "
                "that its data is not empty."
            )
        for row in checked:
            if row["evaluation"] != evaluation:
                raise RunError(f"A row of {row['evaluation']!r} was written as {evaluation!r}.")
        index = self._index()
        if index.pop(evaluation, None) is not None:  # never beside rows that they did not make
            write_json(self.path / "rows" / "index.json", index)
        path = write_jsonl(self.path / "rows" / f"{evaluation}.jsonl", checked)
        if settings is not None:
            write_json(self.path / "rows" / "index.json", {**index, evaluation: settings})
        return path

    def has_rows(self, evaluation: str, settings: str) -> bool:
        """True if the rows of `evaluation` are there and were written with these `settings`."""
        written = (self.path / "rows" / f"{evaluation}.jsonl").exists()
        return written and self._index().get(evaluation) == settings

    def _index(self) -> dict[str, str]:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.path / "rows" / "index.json").read_text(encoding="utf-8"))
            return found if isinstance(found, dict) else {}
        return {}

    def read_rows(self, evaluation: str | None = None) -> list[dict[str, Any]]:
        """The checked rows of one evaluation, or of all in order of file name; [] where none were written."""
        folder = self.path / "rows"
        files = sorted(folder.glob("*.jsonl")) if evaluation is None else [folder / f"{evaluation}.jsonl"]
        return [check_row(row, where=str(f)) for f in files if f.exists() for row in read_jsonl(f)]

    def write_samples(self, evaluation: str, samples: Iterable[Mapping[str, Any]]) -> Path:
        """Prompts and generations, for whoever asks for them; no report reads this file."""
        check_name(evaluation, "The evaluation")
        return write_jsonl(self.path / "samples" / f"{evaluation}.jsonl", samples)

    # -- inside

    def _open(self) -> dict[str, Any]:
        if self._record is None:
            raise RunError(f"The run {self.path} is not started: call start() first.")
        return self._record

    def _last_hash(self) -> str | None:
        for path in (self.manifest_path, self.progress_path):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                return str(json.loads(path.read_text(encoding="utf-8")).get("hash"))
        return None

    def _close(self, status: str, error: str | None, model: Any = None, data: Any = None) -> dict[str, Any]:
        record = self._open()
        record.update(
            status=status,
            error=error,
            finished=now(),
            seconds=round(time.monotonic() - self._began, 3),
            model=model,
            data=record["data"] if data is None else data,
        )
        manifest = {key: record[key] for key in MANIFEST_KEYS}
        write_json(self.manifest_path, manifest)
        self.progress_path.unlink(missing_ok=True)
        self._record = None
        self._lock.close()
        return manifest
