"""Work shared over one Optuna storage (SQLite, PostgreSQL, MySQL): every piece is a trial that one worker takes.

A worker that dies is noticed at once on its own machine, elsewhere by its missing heartbeat, and its piece goes back
into the queue. Needs the extra `search`. The URL may hold a password: it is never written down or shown.

Where we lean on Optuna: `Study.optimize` takes a waiting trial and sends its heartbeat (the heartbeat works with
`optimize` only, as its documentation of `RDBStorage` says). SQLite has no row locks, so a transaction there takes the
write lock when it begins; without that two workers could take the same trial.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, MissingExtraError, RunError
from ..store.provenance import one_line

if TYPE_CHECKING:
    import optuna

HEARTBEAT = 20  # seconds
GRACE = 120  # seconds without a heartbeat, after which a worker counts as dead
RETRIES = 3  # a piece that killed so many workers is given up
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
    try:
        import fcntl
    except ImportError:
        file = None
    if file is None or not Path(file).parent.is_dir():
        yield
        return
    with open(f"{file}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
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


def queue(study: optuna.Study, pieces: Mapping[str, Mapping[str, Any]]) -> None:
    """Put every piece that nobody waits for or works on into the queue.

    Two workers that start together may both do so; `work_off` takes the first of the two only.
    """
    from optuna.trial import TrialState

    take_up(study)
    latest: dict[Any, Any] = {trial.user_attrs.get("key"): trial for trial in study.get_trials(deepcopy=False)}
    for key, piece in pieces.items():
        last = latest.get(key)
        if last is None or last.state not in (TrialState.WAITING, TrialState.RUNNING):
            after = -1 if last is None else last.number
            study.enqueue_trial({}, user_attrs={"key": key, "piece": dict(piece), "after": after})


def work_off(
    study: optuna.Study,
    do: Callable[[dict[str, Any]], None],
    *,
    pause: float = PAUSE,
) -> None:
    """Take pieces until none waits and nobody works on one. An error of a piece is kept in its trial.

    Args:
        do: gets the piece, with `dead` = {"host", "pid", "birth"} of the worker that died of it, if any.
    """
    import optuna

    def objective(trial: optuna.Trial) -> float:
        piece = trial.user_attrs.get("piece")
        if piece is None or _is_double(study, trial):
            raise optuna.TrialPruned
        with kept_error(trial):
            began = time.monotonic()
            do({**piece, "dead": trial.user_attrs.get("dead")})
            return time.monotonic() - began

    run_trials(study, objective, more=lambda trials: False, pause=pause)


def _is_double(study: optuna.Study, trial: optuna.Trial) -> bool:
    """Whether an earlier trial of the same round has the same piece: queued by a worker that started with ours."""
    after, key = trial.user_attrs.get("after", -1), trial.user_attrs.get("key")
    return any(
        after < other.number < trial.number
        and other.user_attrs.get("key") == key
        and other.state.name != "PRUNED"
        and (other.state.name != "FAIL" or "error" in other.user_attrs)  # its worker died: ours is the next try
        for other in study.get_trials(deepcopy=False)
    )


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
    pause: float = PAUSE,
) -> None:
    """Run trials until none waits, `more(trials)` asks for no new one, and nobody runs one any more."""
    from optuna.trial import TrialState

    while True:
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


def why_not(study: optuna.Study, key: str) -> str:
    """Why a piece is not done, from its last trial."""
    found = [trial for trial in study.get_trials(deepcopy=False) if trial.user_attrs.get("key") == key]
    if not found:
        return "nobody took it"
    error = found[-1].user_attrs.get("error")
    if error:
        return str(error)
    tries = found[-1].user_attrs.get("retries", 0) + 1
    return f"its worker died or was stopped, {tries} time{'s' if tries > 1 else ''}"


# ---- dead workers -----------------------------------------------------------------------------------------


def take_up(study: optuna.Study) -> None:
    """Put the pieces of dead workers back into the queue."""
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
        dead = trial.user_attrs.get("worker")
        study.enqueue_trial(trial.params, user_attrs={**kept, "dead": dead, "retries": retries})


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


def free_lock(folder: Path, dead: Any) -> None:
    """Remove the folder's lock if the dead worker of another machine holds it; nobody else can know that it is gone."""
    path = folder / ".lock"
    if not isinstance(dead, Mapping):
        return
    with contextlib.suppress(OSError, ValueError, AttributeError):
        holder = json.loads(path.read_text(encoding="utf-8"))
        if (holder.get("host"), holder.get("pid")) == (dead.get("host"), dead.get("pid")):
            path.unlink()
