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
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from repnoise.errors import RunError
from repnoise.store.files import (
    disk_guard,
    now,
    read_json,
    read_jsonl,
    write_json,
    write_jsonl,
    write_yaml,
)
from repnoise.store.lock import folder_lock

from .provenance import check_name, git_state, one_line, package_versions
from .rows import check_row

SCHEMA = 1
MANIFEST_KEYS = (
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
    "data",
    "model",
    "started",
    "finished",
    "seconds",
    "error",
    "arguments",
    "depends",
    "changed",
)


class Run:
    """One run folder. `start` locks it; `finish` or `fail` writes the manifest and unlocks it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.manifest_path = self.path / "manifest.json"
        self.progress_path = self.path / "progress.json"
        self._record: dict[str, Any] | None = None
        self._began = 0.0
        self._lock = contextlib.ExitStack()
        self._held = False

    def manifest(self) -> dict[str, Any] | None:
        """The manifest, or None where there is none. A damaged or newer one is a RunError."""
        if not self.manifest_path.exists():
            return None
        return self._checked(read_json(self.manifest_path))

    def _checked(self, manifest: Any) -> dict[str, Any]:
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
            found = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        manifest = self._checked(found)
        return manifest.get("status") == "done" and manifest.get("hash") == hash

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the folder's lock, so that what is asked of the folder stays true; `start` inside takes it over."""
        with disk_guard(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        with folder_lock(self.path):
            self._held = True
            try:
                yield
            finally:
                self._held = False

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
        depends: Mapping[str, Any] | None = None,
        changed: Sequence[str] = (),
    ) -> Run:
        """Lock the folder, drop the old manifest and write progress.json (and recipe.yaml).

        Rows, samples and train.jsonl of the same hash stay, so that a crashed stage can go on; those of
        another hash are removed, so that two settings never mix.

        Args:
            stage: "base", "control", "defend" or "attack".
            depends: what `hash` is the hash of.
            changed: in words, what of it is not as it was in an earlier run of the same role.
        """
        if not self._held:
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
                "depends": dict(depends) if depends is not None else None,
                "changed": list(changed),
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

    def write_rows(self, evaluation: str, rows: Iterable[Mapping[str, Any]], *, settings: Any = None) -> Path:
        """Check and write rows/<evaluation>.jsonl. No rows at all is an error.

        `settings`: what made these rows, as data for JSON; `has_rows` asks for it.
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

    def has_rows(self, evaluation: str, settings: Any) -> bool:
        """True if the rows of `evaluation` are there and were written with these `settings`."""
        written = (self.path / "rows" / f"{evaluation}.jsonl").exists()
        return written and self.settings_of(evaluation) == settings

    def settings_of(self, evaluation: str) -> Any:
        """What made the rows of `evaluation`; None: unknown."""
        return self._index().get(evaluation)

    def _index(self) -> dict[str, Any]:
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
