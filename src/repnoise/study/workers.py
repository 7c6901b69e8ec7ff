"""Work in several processes: clear errors, nothing lost, nobody left behind."""

from __future__ import annotations

import functools
import logging
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from ..errors import RepNoiseError, RunError

SHOWN = 5
LOOK = 1.0  # seconds between two calls of `meanwhile`
Finished = Generator[tuple[int, BaseException | None], None, None]


def carry_out(
    work: Callable[..., None],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int,
    here: Any,
    build: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> Finished:
    """`work(here, *task)` for every task in this process, or `in_processes` where several may run at a time.

    Yields (index of the task, its error or None) as they finish. Ctrl-C passes.
    """
    if min(jobs, len(tasks)) > 1:
        yield from in_processes(work, tasks, min(jobs, len(tasks)), build, arguments)
        return
    for index, task in enumerate(tasks):
        failed: BaseException | None = None
        try:
            work(here, *task)
        except Exception as error:
            failed = error
        yield index, failed


def in_processes(
    work: Callable[..., None],
    tasks: Sequence[tuple[Any, ...]],
    jobs: int,
    build: Callable[..., Any],
    arguments: tuple[Any, ...],
    *,
    meanwhile: Callable[[], None] = lambda: None,
) -> Finished:
    """Run `work(built, *task)` for every task, `jobs` at a time; each process makes `built = build(*arguments)` once.

    Yields (index of the task, its error or None) as they finish; between them `meanwhile` is called, once a second. A
    process has its share of the cores, no bars and no log. When the caller stops early (Ctrl-C, an error) the
    processes are killed at once; when the caller itself is killed they end by themselves.

    Raises:
        RunError: a process died without a word.
    """
    import torch

    threads = max(1, torch.get_num_threads() // jobs)
    pool = ProcessPoolExecutor(
        jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_begin, initargs=(threads,)
    )
    pickled = pickle.dumps((build, arguments))
    complete = False
    try:
        with _sigint_held():
            futures = {pool.submit(_do, work, pickled, task): index for index, task in enumerate(tasks)}
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, LOOK, FIRST_COMPLETED)
            for future in finished:
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise RunError(
                        "a worker process died without a word, killed by the system or for lack of memory."
                        " What was finished is kept; run the same command again with fewer --jobs."
                    ) from error
                yield futures[future], error
            meanwhile()
        complete = True
    finally:
        if not complete:
            for process in list((pool._processes or {}).values()):  # its own; Python 3.14 has kill_workers() for it
                process.kill()
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


# ---- in the processes -------------------------------------------------------------------------------------


def _begin(threads: int) -> None:
    """What every process starts with."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(threads)
    transformers_logging.disable_progress_bar()  # those of huggingface_hub too, which ours follow
    logging.getLogger("repnoise").setLevel(logging.ERROR)  # the main process has given every notice


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


@functools.cache
def _built(pickled: bytes) -> Any:
    build, arguments = pickle.loads(pickled)  # ours, from the process that started this one
    return build(*arguments)


def _do(work: Callable[..., None], pickled: bytes, task: tuple[Any, ...]) -> None:
    work(_built(pickled), *task)


# ---- what the user sees -----------------------------------------------------------------------------------


@contextmanager
def progress_bar(total: int, what: str, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A bar with the time left on stderr; call the value with how many pieces are finished."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, desc=f"{what}s", unit=what, disable=quiet, dynamic_ncols=True) as bar:

        def at(done: int) -> None:
            bar.update(min(done, total) - bar.n)

        yield at


class Failures:
    """Errors of independent pieces of work, raised together when all of them have had their turn."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, total
        self.found: list[tuple[str, BaseException]] = []

    def add(self, label: str, error: BaseException) -> None:
        self.found.append((label, error))

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
