"""One process at a time in a folder."""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from repnoise.errors import RunError

from .files import disk_guard, now


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[Path]:
    """Hold `folder`/.lock (created with O_EXCL). A live holder is a RunError, a dead one is replaced."""
    path = folder / ".lock"
    with _takeover_guard(folder):
        for _ in range(3):
            try:
                with disk_guard(path):
                    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                break
            except FileExistsError:
                holder = _holder(path)
                if _is_alive(holder):
                    raise RunError(
                        f"{folder} is in use by process {holder.get('pid')} on {holder.get('host')} since "
                        f"{holder.get('since')}. Wait for it, stop it, or choose another --out folder. "
                        f"If it is surely gone, delete {path}."
                    ) from None
                path.unlink(missing_ok=True)
        else:
            raise RunError(f"Could not lock {folder}: another process keeps taking {path}. Try again.")
        mine = {"pid": os.getpid(), "host": platform.node(), "since": now(), "birth": _birth(os.getpid())}
        try:
            with disk_guard(path):
                os.write(handle, json.dumps(mine).encode())
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)
    try:
        yield path
    finally:
        holder = _holder(path)
        if holder.get("pid") in (os.getpid(), None):  # not ours any more after a fork or a takeover
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _takeover_guard(folder: Path) -> Iterator[None]:
    """Let one process at a time look at and replace the lock file; without flock there is only O_EXCL."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # file systems without flock
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _holder(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(holder, dict):
            return holder
    return {}


def _is_alive(holder: Mapping[str, Any]) -> bool:
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid < 1:
        return False  # empty or damaged: its writer died between creating and filling it
    if holder.get("host") != platform.node() or os.name == "nt":
        return True  # cannot be asked from here (and on Windows signal 0 is Ctrl-C)
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass
    return holder.get("birth") in (None, _birth(pid))


def _birth(pid: int) -> str | None:
    """When the process started, in kernel ticks: tells it from a later one of the same id. None: unknown."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    return None
