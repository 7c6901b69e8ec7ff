"""Work for the processes of test_pipeline.py; a spawned process must be able to import it, so it is light."""

from __future__ import annotations

import os
import time
from pathlib import Path

from repnoise.errors import DataError

_folder: Path


def begin(folder: Path) -> None:
    global _folder
    _folder = folder


def work(name: str, seconds: float = 0.0) -> None:
    (_folder / f"{name}.started").write_text(str(os.getpid()))
    if name == "wrong":
        raise DataError("the row is bad")
    if name == "broken":
        raise IndexError("of our own making")
    if name == "killed":
        os._exit(9)
    time.sleep(seconds)
    (_folder / name).write_text("")
