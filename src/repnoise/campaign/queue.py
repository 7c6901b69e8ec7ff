"""Trials shared over one Optuna storage (SQLite, PostgreSQL, MySQL): every trial is run by one worker.

A worker that dies is noticed at once on its own machine, elsewhere by its missing heartbeat, and its trial goes back
into the queue. Needs the extra `search`. The URL may hold a password: it is never written down or shown.

Where we lean on Optuna: `Study.optimize` takes a waiting trial and sends its heartbeat (the heartbeat works with
`optimize` only, as its documentation of `RDBStorage` says). SQLite has no row locks, so a transaction there takes the
write lock when it begins; without that two workers could take the same trial.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ..errors import ConfigError, MissingExtraError, RunError
from ..store.provenance import one_line

if TYPE_CHECKING:
    import optuna

HEARTBEAT = 20  # seconds
GRACE = 120  # seconds without a heartbeat, after which a worker counts as dead
RETRIES = 3  # a trial that killed so many workers is given up
PATIENCE = 60  # seconds that a write waits for other writers of a SQLite file
PAUSE = 1.0  # seconds between two looks at what the others do
SCHEMES = ("sqlite", "postgresql", "mysql")


def open_study(url: str, name: str, *, sampler: Any = None, heartbeat: int = HEARTBEAT) -> optuna.Study:
    """The Optuna study `name` in the storage at `url`, made if it is not there.

    Raises:
        MissingExtraError: optuna or the database's driver is not installed.
        ConfigError: the URL is of no database that we know, or it cannot be opened.
    """
    shown = check_url(url)
    import optuna
    import sqlalchemy

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sqlite = url.startswith("sqlite")
    try:
        with quiet(), _once(url):
            storage = optuna.storages.RDBStorage(
                url,
                engine_kwargs={"connect_args": {"timeout": PATIENCE}} if sqlite else {"pool_pre_ping": True},
                heartbeat_interval=heartbeat,
                grace_period=max(GRACE if heartbeat == HEARTBEAT else 3 * heartbeat, 1),
                heartbeat_stale_trial_callback=_again,
            )
            if sqlite:
                _lock_when_transactions_begin(storage.engine)
            return optuna.create_study(
                storage=storage,
                study_name=name,
                direction="maximize",
                sampler=sampler or optuna.samplers.RandomSampler(),
                load_if_exists=True,
            )
    except ImportError:
        driver = {"postgresql": "psycopg2-binary", "mysql": "pymysql"}.get(url.partition(":")[0].split("+")[0], "it")
        raise MissingExtraError(
            f"The storage {shown} needs a database driver that is not installed.\nNext step: pip install {driver}"
        ) from None
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, RuntimeError) as error:
        cause = one_line(getattr(error, "orig", None) or error).replace(url, shown)
        raise ConfigError(
            f"the storage {shown} cannot be opened: {cause}. Allowed: sqlite:///FILE in a folder that exists,"
            " postgresql://USER:PASSWORD@HOST/DATABASE or mysql+pymysql://USER:PASSWORD@HOST/DATABASE."
        ) from None


def check_url(url: str) -> str:
    """The URL without its password.

    Raises:
        MissingExtraError: optuna is not installed.
        ConfigError: it is no URL of a database that we know.
    """
    try:
        import optuna  # noqa: F401
        from sqlalchemy.engine import make_url
        from sqlalchemy.exc import ArgumentError
    except ImportError:
        raise MissingExtraError(
            "A storage needs optuna, which is not installed.\nNext step: pip install 'repnoise[search]'"
        ) from None
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        parsed = None
    if parsed is None or parsed.get_backend_name() not in SCHEMES:
        raise ConfigError(
            "--storage is no URL of a database. Allowed: sqlite:///FILE, postgresql://USER:PASSWORD@HOST/DATABASE,"
            " mysql+pymysql://USER:PASSWORD@HOST/DATABASE. (What was given is not shown: it may hold a password.)"
        )
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError("--storage sqlite:// without a file cannot be shared. Write sqlite:///FILE.")
    return parsed.render_as_string(hide_password=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Heartbeats are marked as experimental in Optuna; that is our concern and not the user's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="optuna")
        warnings.filterwarnings("ignore", message=".*experimental.*")
        yield


@contextlib.contextmanager
def _once(url: str) -> Iterator[None]:
    """One after another: two processes that make the tables of a SQLite file at the same time trip over each other."""
    from sqlalchemy.engine import make_url

    file = make_url(url).database if url.startswith("sqlite") else None
    there = file is not None and Path(file).parent.is_dir()
    with FileLock(f"{file}.lock") if there else contextlib.nullcontext():
        yield


def _lock_when_transactions_begin(engine: Any) -> None:
    from sqlalchemy import event

    @event.listens_for(engine, "connect")
    def manual(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # the driver begins no transactions of its own

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # connections from before the listeners


# ---- the queue --------------------------------------------------------------------------------------------


def folder_id(folder: Path) -> str:
    """A name that this folder alone has, the same for every machine that sees it."""
    path = folder / ".storage-id"
    for _ in range(50):
        with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            file.write(secrets.token_hex(5))
        found = path.read_text(encoding="utf-8")
        if len(found) == 10:
            return found
        time.sleep(0.1)  # another worker is writing it
    raise RunError(f"{path} is damaged. Delete it and run the same command again.")


@contextlib.contextmanager
def kept_error(trial: optuna.Trial) -> Iterator[None]:
    """Write into the trial who works on it and, if the body fails, the error in one line."""
    trial.set_user_attr("worker", _me())
    try:
        yield
    except Exception as error:
        import optuna

        if not isinstance(error, optuna.TrialPruned):
            trial.set_user_attr("error", str(error)[:1500] if str(error) else type(error).__name__)
        raise


def run_trials(
    study: optuna.Study,
    objective: Callable[[optuna.Trial], float],
    *,
    more: Callable[[Sequence[Any]], bool],
    meanwhile: Callable[[], None] = lambda: None,
    pause: float = PAUSE,
) -> None:
    """Run trials until none waits, `more(trials)` asks for no new one, and nobody runs one any more.

    `meanwhile` is called before and after each.
    """
    from optuna.trial import TrialState

    while True:
        meanwhile()
        take_up(study)
        trials = study.get_trials(deepcopy=False)
        states = {trial.state for trial in trials}
        if TrialState.WAITING in states or more(trials):
            with quiet():
                study.optimize(objective, n_trials=1, catch=(Exception,))
        elif TrialState.RUNNING in states:
            time.sleep(pause)
        else:
            return


# ---- dead workers -----------------------------------------------------------------------------------------


def take_up(study: optuna.Study) -> None:
    """Put the trials of dead workers back into the queue."""
    import optuna
    from optuna.trial import TrialState

    with quiet():
        optuna.storages.fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _is_dead(trial.user_attrs.get("worker")):
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except ValueError:  # another worker was faster
                continue
            _again(study, trial)


def _again(study: optuna.Study, trial: Any) -> None:
    kept = {key: value for key, value in trial.user_attrs.items() if key not in ("worker", "error")}
    retries = kept.get("retries", 0) + 1
    if retries <= RETRIES:
        study.enqueue_trial(trial.params, user_attrs={**kept, "retries": retries})


def _me() -> dict[str, Any]:
    return {"host": platform.node(), "pid": os.getpid(), "birth": _birth(os.getpid())}


def _birth(pid: int) -> float | None:
    """When the process started, seconds since 1970: tells it from a later one of the same id; None: no such process."""
    import psutil  # type: ignore[import-untyped]

    try:
        return None if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE else psutil.Process(pid).create_time()
    except psutil.NoSuchProcess:
        return None


def _is_dead(worker: Any) -> bool:
    """True for a worker of this machine that is gone; others are known by their heartbeat only."""
    if not isinstance(worker, Mapping) or worker.get("host") != platform.node():
        return False
    birth = _birth(int(worker["pid"]))
    return birth is None or abs(birth - float(worker["birth"])) > 1.0
