"""Nothing in src/ is of POSIX alone but what stands under a guard or is listed here with its reason; and the guards' other sides work. Windows itself is not tried."""

from __future__ import annotations

import ast
import errno
import importlib.util
import os
import sys
import types
from pathlib import Path

import pytest

from forgetless import files, lineage, record
from forgetless.errors import ConfigError
from forgetless.history import verify
from forgetless.lineage import RunFolder
from forgetless.loop import run

SRC = Path(files.__file__).parent
MODULES = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "posix", "syslog", "readline"}
OF_OS = {
    "fork", "forkpty", "getuid", "geteuid", "getgid", "setsid", "killpg", "kill", "getpgid", "mkfifo", "statvfs", "fchmod", "fchown", "chown", "nice", "uname",
    "getloadavg", "sysconf", "wait", "waitpid", "O_DIRECTORY", "O_NOFOLLOW", "symlink", "link", "rename", "readlink", "sched_getaffinity", "sched_setaffinity",
    "cpu_count_online", "posix_fallocate", "pread", "pwrite", "sync",
}  # fmt: skip
OF_SIGNAL = {"SIGKILL", "SIGALRM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGSTOP", "SIGCONT", "SIGCHLD", "setitimer", "alarm", "pause"}
METHODS = {"symlink_to", "hardlink_to", "link_to", "rename", "readlink"}  # of a path: no links, or a target that is there, may refuse it
PLACES = ("/tmp", "/proc", "/dev/", "/sys/", "/etc/", "/var/")
CAUGHT = {"OSError", "ImportError", "AttributeError", "ModuleNotFoundError"}

# (file, what): why it may stand there without a guard
ALLOWED = {
    ("lineage.py", ".rename"): "a task's folder takes its name after what was there has been removed",
    ("lineage.py", ".readlink"): "only of what is_symlink has said to be a link",
    ("dropin.py", ".rename"): "into a name that nothing has: an empty folder there is removed first",
    ("export.py", ".rename"): "within a folder that was made for it",
    ("lock.py", "os.kill"): "asks for a process by signal 0; the line before returns on Windows, where that would be a Ctrl-C",
}


def found(source: str) -> list[str]:
    """What of `source` is POSIX's alone, or reads text by the machine's own encoding, and stands under no guard."""
    hits: list[str] = []

    def names(node: ast.expr | None) -> set[str]:
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} if node else set(CAUGHT)

    def guards(test: ast.expr) -> bool:
        text = ast.unparse(test)
        return "os.name" in text or "sys.platform" in text or "hasattr(" in text

    def hit(node: ast.AST) -> str | None:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            roots = {(a.name if isinstance(node, ast.Import) else node.module or "").split(".")[0] for a in node.names}
            return next(iter(roots & MODULES), None)
        of = node.value.id if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) else ""
        if of == "os" and node.attr in OF_OS or of == "signal" and node.attr in OF_SIGNAL:
            return f"{of}.{node.attr}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(PLACES):
            return node.value
        if isinstance(node, ast.Call):
            given = {k.arg: k.value for k in node.keywords}
            if {"preexec_fn", "start_new_session"} & given.keys():
                return "subprocess of a session of its own"
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
            of_module = isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) and node.func.value.id == "os"
            if name in METHODS and isinstance(node.func, ast.Attribute) and not of_module:
                return f".{name}"
            mode = next((a.value for a in (*node.args, given.get("mode")) if isinstance(a, ast.Constant) and str(a.value) in MODES), "r")
            if (name in ("read_text", "write_text") or name == "open" and not of_module and "b" not in mode) and "encoding" not in given:
                return f"{name} without encoding"
        return None

    def walk(node: ast.AST, guarded: bool) -> None:
        what = hit(node)
        if what and (not guarded or "encoding" in what):
            hits.append(what)
        if isinstance(node, ast.Try):
            caught = set().union(*(names(h.type) for h in node.handlers)) if node.handlers else set()
            for child in node.body:
                walk(child, guarded or bool(caught & CAUGHT))
            for part in (*node.handlers, *node.orelse, *node.finalbody):
                walk(part, guarded)
        else:
            suppressed = isinstance(node, ast.With) and any(
                "suppress(" in ast.unparse(i.context_expr) and names(i.context_expr) & CAUGHT for i in node.items
            )
            asked = isinstance(node, (ast.If, ast.IfExp)) and guards(node.test)
            for child in ast.iter_child_nodes(node):
                walk(child, guarded or suppressed or asked)

    walk(ast.parse(source), False)
    return hits


MODES = {first + more for first in "rwax" for more in ("", "b", "+", "t", "b+", "+b")}


@pytest.mark.parametrize(
    "source, what",
    [
        ("import fcntl", "fcntl"),
        ("def f():\n    from resource import getrusage", "resource"),
        ("os.fork()", "os.fork"),
        ("os.link(a, b)", "os.link"),
        ("a.symlink_to(b)", ".symlink_to"),
        ("a.rename(b)", ".rename"),
        ("signal.SIGKILL", "signal.SIGKILL"),
        ("f('/tmp/x')", "/tmp/x"),
        ("open('/proc/cpuinfo', encoding='utf-8')", "/proc/cpuinfo"),
        ("path.read_text()", "read_text without encoding"),
        ("path.write_text(x)", "write_text without encoding"),
        ("open(path, 'a')", "open without encoding"),
        ("path.open()", "open without encoding"),
        ("subprocess.run(x, preexec_fn=f)", "subprocess of a session of its own"),
    ],
)
def test_the_search_finds(source, what):
    assert found(source) == [what]


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    import fcntl\nexcept ImportError:\n    import msvcrt",
        "try:\n    os.link(a, b)\nexcept OSError:\n    shutil.copyfile(a, b)",
        "with contextlib.suppress(OSError):\n    os.link(a, b)",
        "if os.name != 'nt':\n    os.kill(a, 0)",
        "open(path, 'rb')",
        "path.open('wb')",
        "path.read_text(encoding='utf-8')",
        "os.open(path, os.O_RDONLY)",
    ],
)
def test_what_is_guarded_is_let_pass(source):
    assert found(source) == []


def test_the_source_is_of_no_one_system():
    here: dict[tuple[str, str], int] = {}
    for path in sorted(SRC.rglob("*.py")):
        for what in found(path.read_text(encoding="utf-8")):
            here[path.relative_to(SRC).as_posix(), what] = 1
    assert sorted(here.keys() - ALLOWED.keys()) == []
    assert sorted(ALLOWED.keys() - here.keys()) == [], "listed, and not there any more"


def test_a_folder_is_synced_where_the_system_opens_folders_and_a_file_everywhere(tmp_path, monkeypatch):
    opened = []

    def note(path, flags):
        opened.append((Path(path).name, flags))
        return os.open(path, flags)

    (tmp_path / "file").write_bytes(b"x")
    for name in ("posix", "nt"):
        monkeypatch.setattr(files, "os", types.SimpleNamespace(**vars(os) | {"name": name, "open": note}))
        files.sync(tmp_path)
        files.sync(tmp_path / "file")
    assert opened == [(tmp_path.name, os.O_RDONLY), ("file", os.O_RDONLY), ("file", os.O_RDWR)]


def test_a_link_that_cannot_be_made_is_a_copy_and_a_full_disk_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"bytes")
    code = errno.EPERM

    def refuse(*_):
        raise OSError(code, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    files.link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"bytes" and not os.path.samefile(tmp_path / "a", tmp_path / "b")
    code = errno.ENOSPC
    with pytest.raises(OSError, match="no links here"):
        files.link_or_copy(tmp_path / "a", tmp_path / "c")


def test_hashed_text_has_the_same_bytes_everywhere(tmp_path):
    files.write(tmp_path / "a", "one\ntwo ä\n")
    assert (tmp_path / "a").read_bytes() == b"one\ntwo \xc3\xa4\n"
    for path in (SRC / "lineage.py", SRC / "state.py"):  # whose files are hashed: no write that translates newlines
        assert "write_text(" not in path.read_text(encoding="utf-8")


def test_the_lock_without_fcntl(tmp_path, monkeypatch):
    import fcntl

    def locking(fd, mode, n):  # as Windows answers
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PermissionError(errno.EACCES, "Permission denied") from None

    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(LK_NBLCK=2, locking=locking))
    spec = importlib.util.spec_from_file_location("forgetless.lock_without_fcntl", SRC / "lock.py")
    lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lock)
    held = lock.FolderLock(tmp_path)
    assert lock.holder(tmp_path / ".lock")["pid"] == os.getpid()
    with pytest.raises(ConfigError, match=f"another process is running there .pid {os.getpid()}"):
        lock.FolderLock(tmp_path)
    held.release()
    lock.FolderLock(tmp_path).release()
    monkeypatch.setattr(lock, "os", types.SimpleNamespace(**vars(os) | {"name": "nt", "kill": None}))  # asking would end the process
    assert lock.alive({"pid": 1, "host": lock.socket.gethostname()})


def test_peak_memory_without_resource(monkeypatch):
    import psutil

    info = types.SimpleNamespace(memory_info=lambda: types.SimpleNamespace(peak_wset=1234))
    monkeypatch.setitem(sys.modules, "resource", None)
    monkeypatch.setattr(psutil, "Process", lambda: info)
    assert record.resident_bytes() == 1234


def test_a_run_where_there_are_no_links_to_folders(small_run, monkeypatch):
    """`model` is a copy then, made anew with each commit, and taken for our own; where links are there again it is one."""
    from transformers import AutoModelForCausalLM

    from forgetless.state import model_sha256

    real = Path.symlink_to

    def refuse(*_, **__):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    config = small_run("seqft", tasks=("colour", "animal"), keep="last 1", train={"max_steps": 1, "bf16": False, "use_cpu": True})
    run(config | {"tasks": config["tasks"][:1]})
    path = Path(config["output_dir"])
    first = model_sha256(AutoModelForCausalLM.from_pretrained(path / "model"))
    assert not (path / "model").is_symlink() and first == RunFolder(path, lock=False).lines()[0]["model_sha256"]
    (path / ".model").mkdir()  # of a copy that a kill has cut short
    run(config)
    second = model_sha256(AutoModelForCausalLM.from_pretrained(path / "model"))
    assert second == RunFolder(path, lock=False).lines()[1]["model_sha256"] != first and not (path / ".model").exists()
    assert not verify(path)["damage"]
    monkeypatch.setattr(Path, "symlink_to", real)
    with RunFolder(path) as folder:
        (path / lineage.COPY_OF).write_text("tasks/another/model", encoding="utf-8")
        folder.repair()
    assert (path / "model").is_symlink() and not (path / lineage.COPY_OF).exists()
    monkeypatch.setattr(Path, "symlink_to", refuse)
    (path / "model").unlink()
    RunFolder(path).close()
    (path / "model").mkdir()  # of somebody else, who has no note of ours beside it
    with pytest.raises(ConfigError, match="model is not the link"):
        RunFolder(path)
