"""Work in several processes: clear errors, nothing lost, nobody left behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from ..errors import RepNoiseError, RunError

SHOWN = 5


def in_processes(
    work: Callable[..., None],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int,
    begin: Callable[..., None],
    arguments: tuple[Any, ...],
) -> Generator[tuple[int, BaseException | None], None, None]:
    """Run `work(*task)` for every task, `jobs` at a time, each process after `begin(*arguments)`.

    Yields (index of the task, its error or None) as they finish. When the caller stops early (Ctrl-C, an
    error) the processes are killed at once; when the caller itself is killed they end by themselves.

    Raises:
        RunError: a process died without a word.
    """
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(begin, arguments)
    )
    complete = False
    try:
        with _sigint_held():
            futures = {pool.submit(work, *task): index for index, task in enumerate(tasks)}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                raise RunError(
                    "a worker process died without a word, killed by the system or for lack of memory."
                    " What was finished is kept; run the same command again with fewer --jobs."
                ) from error
            yield futures[future], error
        complete = True
    finally:
        if not complete:
            for child in set(multiprocessing.active_children()) - before:
                child.kill()
        pool.shutdown(cancel_futures=True)


@contextmanager
def _sigint_held() -> Iterator[None]:
    """Processes started inside never see Ctrl-C; this one gets it afterwards. Nothing happens on Windows."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _begin(begin: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    begin(*arguments)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@contextmanager
def progress_bar(total: int, what: str, quiet: bool) -> Iterator[Callable[[], None]]:
    """A bar with the time left on stderr; call the value once for each piece that is finished."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc=f"{what}s", unit=what, disable=quiet, dynamic_ncols=True) as bar:
        yield lambda: bar.update() and None


class Failures:
    """Errors of independent pieces of work, raised together when all of them have had their turn."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.found: list[tuple[str, BaseException]] = []

    def add(self, label: str, error: BaseException) -> None:
        self.found.append((label, error))

    @contextmanager
    def collect(self, label: str) -> Iterator[None]:
        """Keep an error of the body for later. Ctrl-C passes."""
        try:
            yield
        except Exception as error:
            self.add(label, error)

    def raise_if_any(self) -> None:
        """Raise one error for all; wrong input (exit code 2) only if each of them is that."""
        if not self.found:
            return
        lines = [f"  {label}: {_text(error)}" for label, error in self.found[:SHOWN]]
        if len(self.found) > SHOWN:
            lines.append(f"  ... and {len(self.found) - SHOWN} more")
        message = (
            f"{len(self.found)} of {self.total} {self.what}s failed:\n" + "\n".join(lines) + "\n"
            "What was finished is kept; run the same command again to repeat these only."
        )
        first = self.found[0][1]
        wrong_input = all(isinstance(e, RepNoiseError) and e.exit_code == 2 for _, e in self.found)
        raise (type(first) if wrong_input else RunError)(message) from first


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, RepNoiseError) else f"{type(error).__name__}: {error}"
