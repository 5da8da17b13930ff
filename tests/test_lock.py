"""One process at a time writes to a run's folder: who comes second is told who is there, and a lock that outlived its process is taken over."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from forgetless.errors import ConfigError
from forgetless.lock import FolderLock, alive, holder

HERE = socket.gethostname()
HELD = "import sys, pathlib; from forgetless.lock import FolderLock; lock = FolderLock(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def other(tmp_path):
    """A process of its own that holds the lock on tmp_path."""
    with subprocess.Popen([sys.executable, "-c", HELD, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


@pytest.fixture
def no_locks(monkeypatch):
    """As on a network file system without locks."""

    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def written(folder: Path) -> dict | str:
    text = (folder / ".lock").read_text()
    return json.loads(text) if text else ""


def no_such_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_second_process_is_told_who_is_there(tmp_path, other):
    with pytest.raises(ConfigError, match=rf"another process is running there \(pid {other.pid} on {re.escape(HERE)}\); wait for it"):
        FolderLock(tmp_path)
    assert written(tmp_path) == {"pid": other.pid, "host": HERE}  # which looking did not change


def test_so_is_the_same_process(tmp_path):
    lock = FolderLock(tmp_path)
    with pytest.raises(ConfigError, match=f"pid {os.getpid()} on"):
        FolderLock(tmp_path)
    lock.release()
    assert written(tmp_path) == ""
    FolderLock(tmp_path).release()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_lock_goes_with_its_process(tmp_path, other, end):
    other.send_signal(end)
    other.wait()
    assert written(tmp_path) == {"pid": other.pid, "host": HERE}  # it had no time to take its name out
    lock = FolderLock(tmp_path)
    assert written(tmp_path) == {"pid": os.getpid(), "host": HERE}
    lock.release()


def test_a_child_that_outlives_its_process_is_told_from_it(tmp_path):
    held = HELD.replace("print(", "import os; os.fork() and print(")
    with subprocess.Popen([sys.executable, "-c", held, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        process.kill()
        process.wait()
        with pytest.raises(ConfigError, match=f"a child of pid {process.pid} on .*, which is gone itself"):
            FolderLock(tmp_path)
    for _ in range(100):  # its input has ended with the block, and so it does
        with contextlib.suppress(ConfigError):
            return FolderLock(tmp_path).release()
        time.sleep(0.02)
    raise AssertionError("still locked")


@pytest.mark.parametrize("text", ["", "nonsense", "7", '{"pid": "x", "host": "y"}', '{"pid": 1}', "\0\0"])
def test_what_is_written_does_not_matter_where_the_system_locks(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    assert holder(tmp_path / ".lock") is None
    FolderLock(tmp_path).release()


def test_a_lock_file_that_was_removed_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """Whoever held it has closed the folder and taken the file away between our opening it and our lock on it: another process may have made a new one."""
    real = fcntl.flock

    def removed_first(*args):
        (tmp_path / ".lock").unlink()
        return real(*args)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with pytest.raises(ConfigError, match="another process"):
        FolderLock(tmp_path)


def test_an_error_of_the_disk_is_not_taken_for_another_process(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output"):
        FolderLock(tmp_path)


# -- where the file system has no locks -----------------------------------------------------------------------------------------------------


def test_without_locks_what_is_written_decides(tmp_path, no_locks):
    lock = FolderLock(tmp_path)
    with pytest.raises(ConfigError, match="the file system has no locks"):
        FolderLock(tmp_path)
    lock.release()
    FolderLock(tmp_path).release()


def test_without_locks_a_process_that_runs_is_waited_for(tmp_path, other, no_locks):
    with pytest.raises(ConfigError, match=rf"pid {other.pid} on {re.escape(HERE)}; the file system has no locks.*Wait for it"):
        FolderLock(tmp_path)


def test_without_locks_one_whose_process_was_killed_is_taken_over(tmp_path, other, no_locks):
    other.kill()
    other.wait()
    lock = FolderLock(tmp_path)
    assert written(tmp_path) == {"pid": os.getpid(), "host": HERE}
    lock.release()


def test_without_locks_another_machine_cannot_be_asked_and_the_message_says_what_to_do(tmp_path, no_locks):
    (tmp_path / ".lock").write_text(json.dumps({"pid": no_such_process(), "host": "elsewhere"}))
    with pytest.raises(ConfigError) as error:
        FolderLock(tmp_path)
    for part in ("on elsewhere", f"cannot be asked from {HERE}", "if that process is gone", f"remove {tmp_path / '.lock'} and start again"):
        assert part in str(error.value)
    (tmp_path / ".lock").unlink()
    FolderLock(tmp_path).release()


def test_alive():
    assert alive({"pid": os.getpid(), "host": HERE}) and alive({"pid": 1, "host": HERE})  # 1: not ours to signal, or ours; there in any case
    assert not alive({"pid": no_such_process(), "host": HERE}) and not alive(None)
    assert alive({"pid": no_such_process(), "host": "elsewhere"})


# -- the command line ----------------------------------------------------------------------------------------------------------------------


def test_a_reader_asks_for_no_lock(small_run, tmp_path, forgetless_):
    """While a run trains, log and verify look at it; what writes is refused."""
    import forgetless as fl

    path = fl.run(small_run("seqft", tasks=("colour",))).path
    lock = FolderLock(path)
    assert [forgetless_(command, str(path))[0] for command in ("log", "verify")] == [0, 0]
    for command in (["tag", str(path), "colour", "good"], ["gc", str(path), "--keep", "last 1"], ["rollback", str(path), "--to", "colour"]):
        code, _, error = forgetless_(*command)
        assert code == 2 and f"another process is running there (pid {os.getpid()} on {HERE})" in error
    lock.release()
    assert forgetless_("tag", str(path), "colour", "good")[0] == 0
