"""Files that are whole or not there: atomic writes, and honest errors when the disk is full.

Every file is written to a temporary name in the same folder, synced and renamed, so a crash or a full disk
leaves the old file as it was.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from repnoise.errors import RunError


def now() -> str:
    """The time in UTC, to the second, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


# What stands in the way lies at the path itself, and another folder helps.
CANNOT_WRITE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.ELOOP,
)


@contextlib.contextmanager
def disk_guard(path: Path) -> Iterator[None]:
    """Turn what a disk refuses of any writer (also safetensors) into a RunError with place and next step."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:
        code = error.errno if isinstance(error, OSError) else None
        if code in CANNOT_WRITE:
            raise RunError(f"Cannot write {path}: {os.strerror(code)}. Choose another folder.") from error
        full = (errno.ENOSPC, errno.EDQUOT)  # safetensors tells of them in its own error type, by text alone
        if code not in full and not any(f"os error {number})" in str(error) for number in full):
            raise
        folder = next((p for p in (path, *path.parents) if p.is_dir()), Path("."))
        free = shutil.disk_usage(folder).free / 2**20
        raise RunError(
            f"The disk is full: could not write {path} ({free:.0f} MiB free there). Nothing that was there "
            "before has been changed. Free some space or choose another --out folder, then run the same "
            "command again: finished stages are skipped."
        ) from error


def write_text(path: Path, text: str) -> Path:
    """Write `text` atomically: temporary file in the same folder, fsync, os.replace, fsync of the folder."""
    path = Path(path)
    temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    with disk_guard(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
        with contextlib.suppress(OSError):  # some file systems cannot sync a folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    return path


def _json_line(obj: Any, where: Path, **options: Any) -> str:
    try:
        return json.dumps(obj, ensure_ascii=False, allow_nan=False, **options)
    except (TypeError, ValueError) as error:
        raise RunError(f"Cannot write {where.name}: {error}. Only plain JSON with finite numbers goes in.") from error


def write_json(path: Path, obj: Any) -> Path:
    return write_text(path, _json_line(obj, Path(path), indent=2) + "\n")


def write_jsonl(path: Path, records: Iterable[Mapping[str, Any]]) -> Path:
    return write_text(path, "".join(_json_line(dict(r), Path(path)) + "\n" for r in records))


def write_yaml(path: Path, obj: Any) -> Path:
    return write_text(path, yaml.safe_dump(obj, sort_keys=False, allow_unicode=True))


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line to a log such as train.jsonl. Not atomic: see `torn_end` below."""
    line = _json_line(dict(record), Path(path)) + "\n"
    with disk_guard(Path(path)), Path(path).open("a", encoding="utf-8") as file:
        file.write(line)


def read_json(path: Path) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(
            f"Cannot read {path}: {error}. Delete it and run the same command again to redo that stage."
        ) from error


def read_jsonl(path: Path, *, torn_end: bool = False) -> list[dict[str, Any]]:
    """All records of a file; with `torn_end` a last line cut off by a kill is dropped instead of refused."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise RunError(f"Cannot read {path}: {error}.") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if torn_end and number == len(lines):
                break
            raise RunError(
                f"{path}, line {number} is not JSON ({error}). Delete the file and redo that stage."
            ) from error
        if not isinstance(record, dict):
            raise RunError(f"{path}, line {number}: expected one JSON object, got {type(record).__name__}.")
        records.append(record)
    return records
