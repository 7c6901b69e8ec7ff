"""One process at a time in a folder: a lock of the kernel, which frees it when its holder ends, however it ends.

The kernel locks `folder`/.lock.flock; `folder`/.lock says who holds it: process, machine, since when. Both go when the
lock is given back. What a killed process of this machine left behind means nothing. A `.lock` of another machine is
respected, since not every network file system carries locks from machine to machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from repnoise.errors import RunError

from .files import disk_guard, now


class InUseError(RunError):
    """Somebody else holds the folder.

    Attributes:
        alive: the kernel says so. False: only the `.lock` of another machine does, and its process may be gone.
    """

    alive = True


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[Path]:
    """Hold the lock of `folder`; gives the path of `.lock`. It does not wait, and children do not inherit it.

    Raises:
        InUseError: another process, or another thread of this one, holds it.
        RunError: the file system has no locks, or cannot be written.
    """
    path, kernel = folder / ".lock", folder / ".lock.flock"
    lock = FileLock(kernel, fallback_to_soft=False, thread_local=False)
    try:
        with disk_guard(path):
            lock.acquire(blocking=False)
    except Timeout:
        raise _in_use(folder, _holder(path), alive=True) from None
    except OSError as error:
        raise RunError(
            f"{folder} cannot be locked: {os.strerror(error.errno or 0)}. Its file system must have locks (flock; NFS"
            " has them unless it is mounted with nolock). Choose another --out folder."
        ) from error
    me = os.getpid()
    try:
        holder = _holder(path)
        if holder.get("host") not in (None, platform.node()):
            raise _in_use(folder, holder, alive=False)
        with disk_guard(path):
            path.write_text(json.dumps({"pid": me, "host": platform.node(), "since": now()}), encoding="utf-8")
        try:
            yield path
        finally:
            if os.getpid() == me:  # and not a forked child on its way out
                path.unlink(missing_ok=True)
    finally:
        if os.getpid() == me:
            with contextlib.suppress(OSError):  # while it is locked: who waits for it sees that it is gone
                kernel.unlink()
        lock.release()


def is_free(folder: Path) -> bool:
    """Whether nobody holds the folder's lock at this moment."""
    if not folder.is_dir():
        return True
    try:
        with folder_lock(folder):
            return True
    except InUseError:
        return False


def _in_use(folder: Path, holder: Mapping[str, Any], *, alive: bool) -> InUseError:
    who = "another process"
    if "pid" in holder:
        who = f"process {holder['pid']} on {holder.get('host')} since {holder.get('since')}"
    gone = "" if alive else f" If it is surely gone, delete {folder / '.lock'}."
    error = InUseError(f"{folder} is in use by {who}. Wait for it, stop it, or choose another --out folder.{gone}")
    error.alive = alive
    return error


def _holder(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        holder = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(holder, dict):
            return holder
    return {}
