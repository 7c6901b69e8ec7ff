"""The run folder: atomic files, what counts as done, row checks, the lock."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from report_study import row

from repnoise.errors import RunError
from repnoise.store import files, lock
from repnoise.store.files import append_jsonl, disk_guard, read_jsonl, write_json, write_text, write_yaml
from repnoise.store.lock import InUseError, folder_lock, is_free
from repnoise.store.provenance import canonical_hash, git_state
from repnoise.store.rows import check_row
from repnoise.store.run import MANIFEST_KEYS, Run

START = {"stage": "base", "name": "base", "hash": "0123456789"}


def no_temporaries(folder: Path) -> bool:
    return not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_hash_ignores_order_and_sees_values() -> None:
    one = canonical_hash({"a": 1e-4, "b": [1, 2], "p": Path("x/y")})
    assert len(one) == 10
    assert int(one, 16) >= 0
    assert one == canonical_hash({"p": "x/y", "b": (1, 2), "a": 0.0001})
    assert one != canonical_hash({"a": 1e-4, "b": [2, 1], "p": "x/y"})


@pytest.mark.parametrize("bad", [{"a": float("nan")}, {"a": object()}, {1, 2}])
def test_hash_refuses_what_json_cannot_say(bad: object) -> None:
    with pytest.raises(RunError, match="Convert the value"):
        canonical_hash(bad)


def test_a_kill_before_the_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json(tmp_path / "a.json", {"old": True})

    def killed(source: str, target: str) -> None:
        assert Path(source).parent == tmp_path, "the temporary file must be on the same file system"
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"new": True})
    assert json.loads(path.read_text()) == {"old": True}
    assert no_temporaries(tmp_path)


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_says_where_and_what_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    path = write_text(tmp_path / "a.txt", "old")

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, where, full)
    with pytest.raises(RunError, match=r"disk is full.*a\.txt.*MiB free.*run the same command again"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert no_temporaries(tmp_path)


def test_disk_guard_knows_the_error_of_safetensors_and_lets_others_pass(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="disk is full"), disk_guard(tmp_path / "model"):
        raise RuntimeError("I/O error: No space left on device (os error 28)")
    with pytest.raises(ValueError, match="other"), disk_guard(tmp_path):
        raise ValueError("other")


def test_json_refuses_nan_and_writes_text_as_it_is(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="finite"):
        write_json(tmp_path / "a.json", {"a": float("inf")})
    assert not (tmp_path / "a.json").exists()
    assert "é" in write_yaml(tmp_path / "a.yaml", {"b": "é", "a": 1}).read_text(encoding="utf-8")


def test_a_torn_last_line_is_dropped_only_on_request(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    append_jsonl(path, {"step": 1})
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    assert read_jsonl(path, torn_end=True) == [{"step": 1}]
    with pytest.raises(RunError, match="line 2 is not JSON"):
        read_jsonl(path)


def test_only_a_done_manifest_with_the_same_hash_counts(tmp_path: Path) -> None:
    run = Run(tmp_path / "base")
    assert not run.is_done("0123456789")
    run.start(**START, seeds=[1], arguments={"a": 1}, recipe={"study": "x"})
    assert run.manifest() is None
    assert json.loads(run.progress_path.read_text())["status"] == "running"
    assert not run.is_done("0123456789")
    run.write_rows("sandbox", [row("stability", 0.5)])
    manifest = run.finish(model={"fingerprint": "f"})
    assert tuple(manifest) == MANIFEST_KEYS
    assert manifest["versions"]["repnoise"]
    assert not run.progress_path.exists()
    assert not (run.path / ".lock").exists()
    assert run.is_done("0123456789")
    assert not run.is_done("9876543210")
    run.manifest_path.write_text('{"schema": 1, "status": "do')
    assert not run.is_done("0123456789")
    run.manifest_path.write_text('{"schema": 2, "status": "done", "hash": "0123456789"}')
    with pytest.raises(RunError, match="schema 2"):
        run.is_done("0123456789")


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("loss is\nNaN"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_a_body_that_raises_is_recorded_in_one_line(tmp_path: Path, error: BaseException, status: str) -> None:
    run = Run(tmp_path)
    with contextlib.suppress(type(error)), run.start(**START):
        raise error
    manifest = run.manifest()
    assert manifest is not None
    assert manifest["status"] == status
    assert "\n" not in manifest["error"]
    assert type(error).__name__ in manifest["error"]
    assert not run.is_done("0123456789")
    with run.start(**START):  # the lock is free again
        run.finish()
    assert run.is_done("0123456789")


def test_a_body_without_finish_is_not_done(tmp_path: Path) -> None:
    run = Run(tmp_path)
    with pytest.raises(RunError, match="without finish"), run.start(**START):
        pass
    assert not run.is_done("0123456789")


def test_a_full_disk_while_failing_does_not_hide_the_first_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path)

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ValueError, match="first"), run.start(**START):  # noqa: PT012
        monkeypatch.setattr(files.os, "replace", full)
        raise ValueError("first")
    monkeypatch.undo()
    with run.start(**START):
        run.finish()


def test_restart_keeps_rows_of_the_same_hash_and_drops_those_of_another(tmp_path: Path) -> None:
    run = Run(tmp_path)
    found = []
    for hash in ("a" * 10, "a" * 10, "b" * 10):
        with contextlib.suppress(ValueError), run.start(stage="base", name="base", hash=hash):
            found.append(len(run.read_rows()))
            run.write_rows("sandbox", [row("stability", 0.5)])
            raise ValueError
    assert found == [0, 1, 0]


def test_rows_go_through_numpy_and_back(tmp_path: Path) -> None:
    run = Run(tmp_path)
    given = row("loss", np.float32(0.5), n=np.int64(3), lo=np.float64(0.4), hi=0.6, layer=2, step=10)
    del given["evaluation"]
    run.write_rows("loss", [given])
    assert run.read_rows() == run.read_rows("loss")
    assert run.read_rows()[0] == {
        **row("loss", 0.5, "loss"),
        "n": 3,
        "lo": 0.4,
        "hi": 0.6,
        "layer": 2,
        "step": 10,
    }
    assert run.read_rows("other") == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"value": None}, "nothing measured"),
        ({"value": float("nan")}, "not measured"),
        ({"value": float("inf")}, "overflowed"),
        ({"value": True}, "not Real"),
        ({"n": 0}, "nothing measured"),
        ({"n": 1.5}, "not Integral"),
        ({"lo": 0.5}, "go together"),
        ({"lo": 0.9, "hi": 0.1}, "above hi"),
        ({"categorie": "x"}, "unknown key 'categorie'"),
        ({"metric": 3}, "not str"),
    ],
)
def test_bad_rows_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(RunError, match=words):
        check_row({**row("m", 0.5), **change})


def test_all_faults_of_a_row_at_once() -> None:
    with pytest.raises(RunError, match=r"value is missing; n is missing; lo is missing"):
        check_row({"evaluation": "e", "metric": "m"})


def test_no_rows_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="never 0"):
        Run(tmp_path).write_rows("sandbox", [])
    with pytest.raises(RunError, match="file name"):
        Run(tmp_path).write_rows("../x", [row("m", 1.0)])


def test_a_second_process_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with Run(tmp_path).start(**START) as run:
        code = (
            "import sys; from pathlib import Path; from repnoise.store.run import Run\n"
            "Run(Path(sys.argv[1])).start(stage='base', name='base', hash='0')"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert f"in use by process {os.getpid()}" in done.stderr
        run.finish()


@pytest.mark.parametrize("content", ["", "{", '{"pid": 4194304999, "host": "HOST"}', '{"pid": 1, "host": "HOST"}'])
def test_a_stale_lock_is_taken_over(tmp_path: Path, content: str) -> None:
    """Whoever wrote it on this machine, the kernel knows that nobody holds it."""
    (tmp_path / ".lock").write_text(content.replace("HOST", platform.node()))
    with folder_lock(tmp_path) as path:
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_another_machine_is_respected(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text('{"pid": 1, "host": "elsewhere", "since": "noon"}')
    gone = r"process 1 on elsewhere since noon\..*If it is surely gone, delete"
    with pytest.raises(InUseError, match=gone) as caught, folder_lock(tmp_path):
        pass
    assert not caught.value.alive
    assert (tmp_path / ".lock").exists()


def test_threads_exclude_each_other(tmp_path: Path) -> None:
    inside, most = 0, 0
    guard = threading.Lock()

    def attempt() -> None:
        nonlocal inside, most
        left = 8
        while left:
            with contextlib.suppress(InUseError), folder_lock(tmp_path):
                with guard:
                    inside += 1
                    most = max(most, inside)
                time.sleep(0.001)
                with guard:
                    inside -= 1
                left -= 1

    threads = [threading.Thread(target=attempt) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert list(tmp_path.iterdir()) == []


def test_processes_exclude_each_other(tmp_path: Path) -> None:
    """Each adds one to a number in a file, many times, in the lock: no addition is lost."""
    (tmp_path / "number").write_text("0")
    code = (
        "import sys, time; from pathlib import Path; from repnoise.store.lock import InUseError, folder_lock\n"
        "folder, left = Path(sys.argv[1]), 60\n"
        "while left:\n"
        "    try:\n"
        "        with folder_lock(folder):\n"
        "            number = int((folder / 'number').read_text()); time.sleep(0.001)\n"
        "            (folder / 'number').write_text(str(number + 1)); left -= 1\n"
        "    except InUseError: time.sleep(0.0005)\n"
    )
    workers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(3)]
    assert [worker.wait(timeout=120) for worker in workers] == [0, 0, 0]
    assert (tmp_path / "number").read_text() == "180"


def test_a_killed_holder_frees_the_lock_and_its_children_do_not_hold_it(tmp_path: Path) -> None:
    code = (
        "import os, sys, time; from pathlib import Path; from repnoise.store.lock import folder_lock\n"
        "with folder_lock(Path(sys.argv[1])):\n"
        "    if os.fork() == 0: print('held', flush=True)\n"
        "    time.sleep(30)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InUseError, match=f"in use by process {holder.pid} on ") as caught, folder_lock(tmp_path):
            pass
        assert caught.value.alive
        assert not is_free(tmp_path)
        holder.kill()
        holder.wait()
        assert is_free(tmp_path)
        with folder_lock(tmp_path):  # the forked child is alive still
            os.killpg(holder.pid, 0)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(holder.pid, signal.SIGKILL)
        holder.communicate()


def test_a_forked_child_that_leaves_frees_nothing(tmp_path: Path) -> None:
    try:
        with folder_lock(tmp_path) as path:
            child = os.fork()
            if child == 0:
                raise InterruptedError
            os.waitpid(child, 0)
            assert path.exists()
            assert not is_free(tmp_path)
    except InterruptedError:
        os._exit(0)


def test_a_file_system_without_locks_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*args: object, **more: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lock.FileLock, "acquire", none)
    with pytest.raises(RunError, match=r"cannot be locked.*NFS has them unless.*another --out"), folder_lock(tmp_path):
        pass


def test_a_held_run_is_started_without_a_second_lock(tmp_path: Path) -> None:
    run = Run(tmp_path / "base")
    with run.held():
        with pytest.raises(InUseError), Run(run.path).start(**START):
            pass
        with run.start(**START):
            run.finish()
        assert run.is_done(START["hash"])
        assert not is_free(run.path)
    assert is_free(run.path)


def test_git_state_is_null_outside_a_checkout(tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text("")
    assert git_state(tmp_path / "file.py") is None


def test_report_and_runs_import_no_torch() -> None:
    code = "import sys, repnoise.report; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
