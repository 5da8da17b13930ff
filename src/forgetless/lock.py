"""One process at a time writes to a run's folder, and says who it is."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from pathlib import Path
from typing import IO, Any

from .errors import ConfigError

try:
    import fcntl

    def lock(file: IO[str]) -> None:
        """The system's lock on the file, which goes with the process. Raises OSError: EWOULDBLOCK or EACCES where another process has it."""
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

except ImportError:  # Windows
    import msvcrt

    def lock(file: IO[str]) -> None:
        """Of a byte far behind the text: one that is locked cannot be read there."""
        file.seek(1 << 30)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)


NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # a file system that cannot lock, as some network ones


class FolderLock:
    """Held from its making until `release`, by the system's lock on the file `.lock`, which goes with the process that holds it.

    In the file: {"pid", "host"} of the holder, empty when nobody holds it. One whose process is gone is stale, and taken over. On a file system that cannot lock, what is
    written there decides alone. Raises OSError where the file cannot be made, ConfigError where another process holds it.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self._file = self.path.open("a+", encoding="utf-8")
        try:
            self._take()
        except BaseException:
            self._file.close()
            raise
        self._file.truncate(0)
        self._file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        self._file.flush()

    def _take(self) -> None:
        try:
            lock(self._file)
            if os.path.samestat(os.fstat(self._file.fileno()), os.stat(self.path)):
                return
        except FileNotFoundError:
            pass  # whoever held it has just closed and removed it
        except OSError as error:
            if error.errno in NO_LOCKS:
                return self._take_by_name()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
        found = holder(self.path)
        who = f" (pid {found['pid']} on {found['host']})" if found else ""
        if found and not alive(found):  # a lock goes to the children too, such as the workers that load the data
            who = f" (a child of pid {found['pid']} on {found['host']}, which is gone itself)"
        raise ConfigError(f"output_dir {self.path.parent}: another process is running there{who}; wait for it, or choose another folder")

    def _take_by_name(self) -> None:
        found = holder(self.path)
        if alive(found):
            elsewhere = f", which cannot be asked from {socket.gethostname()}" if found["host"] != socket.gethostname() else ""
            raise ConfigError(
                f"output_dir {self.path.parent}: another process is running there (pid {found['pid']} on {found['host']}{elsewhere}; the file system has no locks, "
                f"so what .lock says counts). Wait for it; if that process is gone, or is none of forgetless, remove {self.path} and start again"
            )

    def release(self) -> None:
        with contextlib.suppress(OSError):
            self._file.truncate(0)
        self._file.close()


def holder(path: Path) -> dict[str, Any] | None:
    """Who wrote the lock file last, None where nobody is named."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"pid": int(found["pid"]), "host": str(found["host"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def alive(found: dict[str, Any] | None) -> bool:
    """May the process that a lock names still run? Of another machine nobody can tell, so yes."""
    if found is None:
        return False
    if found["host"] != socket.gethostname() or os.name == "nt":  # there os.kill(pid, 0) would be a Ctrl-C, and the lock itself tells
        return True
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
