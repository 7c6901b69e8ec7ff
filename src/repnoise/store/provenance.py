"""Where a result came from: hashes of settings, package versions, the commit of the checkout."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import subprocess
from importlib import metadata
from pathlib import Path, PurePath
from typing import Any

from repnoise.errors import RunError

PACKAGES = ("repnoise", "torch", "transformers", "accelerate", "datasets", "peft", "safetensors")


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


def contents(path: Path) -> str:
    """SHA-256 of a file, or of a folder's files with their names in it; hidden ones are left out, links followed."""
    path = path.expanduser().resolve()
    if path.is_file():
        state = path.stat()
        return f"sha256:{_digest(path, state.st_size, state.st_mtime_ns, state.st_ino)[:16]}"
    total = hashlib.sha256()
    inside = (file.relative_to(path) for file in path.rglob("*") if file.is_file())
    for name in sorted(each.as_posix() for each in inside if not any(part.startswith(".") for part in each.parts)):
        total.update(f"{name} {contents(path / name)}\n".encode())
    return f"sha256:{total.hexdigest()[:16]}"


@functools.lru_cache(maxsize=4096)
def _digest(path: Path, *state: int) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()


def check_name(name: str, what: str) -> str:
    """`name` if it is safe as one part of a file name, else a RunError."""
    if not name or name.startswith(".") or not all(c.isalnum() or c in "._-" for c in name):
        raise RunError(f"{what} {name!r} cannot be a file name. Allowed: letters, digits, '.', '_', '-'; no '.' first.")
    return name


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


@functools.cache
def git_state(source: Path | None = None) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that tracks this file; None for an installed package. Asked once a process:
    what runs is the code as it was when it was loaded."""
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
