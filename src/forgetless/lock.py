"""One process at a time writes to a run's folder, and says who it is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

from .errors import ConfigError

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # a file system that cannot lock, as some network ones


class FolderLock:
    """Held from its making until `release`, by the system's lock on the file `.lock`, which goes with the process that holds it.

    In the file: {"pid", "host"} of the holder, empty when nobody holds it. One whose process is gone is stale, and taken over. On a file system that cannot lock, what is
    written there decides alone. Raises OSError where the file cannot be made, ConfigError where another process holds it.
    """

    def __init__(self, folder: Path):
        self.path = folder / ".lock"
        self._file = self.path.open("a+")
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
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
        found = json.loads(path.read_text())
        return {"pid": int(found["pid"]), "host": str(found["host"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def alive(found: dict[str, Any] | None) -> bool:
    """May the process that a lock names still run? Of another machine nobody can tell, so yes."""
    if found is None:
        return False
    if found["host"] != socket.gethostname():
        return True
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
