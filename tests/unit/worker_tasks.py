"""Work for the processes of test_pipeline.py; a spawned process must be able to import it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from repnoise.errors import DataError


def build(folder: Path) -> Path:
    with (folder / "built").open("a") as file:
        file.write(f"{os.getpid()} {torch.get_num_threads()}\n")
    return folder


def work(folder: Path, name: str, seconds: float = 0.0) -> None:
    (folder / f"{name}.started").write_text(str(os.getpid()))
    if name == "wrong":
        raise DataError("the row is bad")
    if name == "broken":
        raise IndexError("of our own making")
    if name == "killed":
        os._exit(9)
    time.sleep(seconds)
    (folder / name).write_text("")
