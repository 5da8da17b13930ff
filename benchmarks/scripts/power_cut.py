"""A folder as the log of the calls that wrote to it tells it, and what a power cut may leave of it; for faults.py, the log is that of tests/faults.c.

What is sure to be there: of a file the bytes, of a folder the names, that it had when it was synced last. POSIX promises no more.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LOST = ("data", "all", "mixed")  # what was not synced: the data, data and names, or of each file and folder one or the other


@dataclass
class Call:
    """One call that succeeded; `number` counts those that failed too."""

    number: int
    op: str
    a: str  # below the run's folder
    b: str
    offset: int
    data: bytes


def read_log(raw: bytes, root: Path) -> list[Call]:
    stream, calls = io.BytesIO(raw), []
    while head := stream.readline():
        number, op, a, b, offset, size = head.decode().rstrip("\n").split("\t")
        a, b = (os.path.relpath(p, root) if p.startswith("/") else p for p in (a, b))
        calls.append(Call(int(number), op, a, b, int(offset), stream.read(int(size))))
    return calls


@dataclass
class File:
    now: bytes = b""
    safe: bytes = b""  # what is sure to be there after a power cut


@dataclass
class Folder:
    now: dict = field(default_factory=dict)  # name: File, Folder, or the target of a symbolic link
    safe: dict = field(default_factory=dict)


class Disk:
    """A folder as it is, and as a power cut may leave it: of a file the bytes, of a folder the names, that were there when it was synced last."""

    def __init__(self, path: Path):
        self.files: dict[int, File] = {}
        self.root = self._load(path)

    def _load(self, path: Path) -> Folder:
        found: dict = {}
        for entry in os.scandir(path):
            if entry.is_symlink():
                found[entry.name] = os.readlink(entry.path)
            elif entry.is_dir():
                found[entry.name] = self._load(Path(entry.path))
            elif entry.inode() in self.files:
                found[entry.name] = self.files[entry.inode()]
            else:
                content = Path(entry.path).read_bytes()
                found[entry.name] = self.files[entry.inode()] = File(content, content)
        return Folder(found, dict(found))

    def find(self, path: str):
        node = self.root
        for part in Path(path).parts:
            node = node.now[part]
        return node

    def apply(self, call: Call) -> None:
        if call.a.endswith(" (deleted)"):
            return
        last = call.b if call.op in ("rename", "link", "symlink") else call.a
        within, name = self.find(str(Path(last).parent)), Path(last).name
        match call.op:
            case "create":
                within.now[name] = File()
            case "mkdir":
                within.now[name] = Folder()
            case "symlink":
                within.now[name] = call.a
            case "link":
                within.now[name] = self.find(call.a)
            case "rename":
                within.now[name] = self.find(str(Path(call.a).parent)).now.pop(Path(call.a).name)
            case "unlink" | "rmdir":
                del within.now[name]
            case "empty":
                within.now[name].now = b""
            case "truncate":
                within.now[name].now = within.now[name].now[: call.offset].ljust(call.offset, b"\0")
            case "write":
                old = within.now[name].now.ljust(call.offset, b"\0")
                within.now[name].now = old[: call.offset] + call.data + old[call.offset + len(call.data) :]
            case "fsync":
                node = self.find(call.a)
                node.safe = node.now if isinstance(node, File) else dict(node.now)
            case "mmap":
                raise RuntimeError(f"{call.a} is written through memory, which the log does not see")

    def held(self) -> dict[str, str]:
        """sha256 of each file, and where each link leads, by its path."""

        def walk(node: Folder, path: str) -> Iterator[tuple[str, str]]:
            for name, child in node.now.items():
                if isinstance(child, Folder):
                    yield from walk(child, f"{path}{name}/")
                else:
                    yield f"{path}{name}", f"-> {child}" if isinstance(child, str) else hashlib.sha256(child.now).hexdigest()

        return dict(sorted(walk(self.root, "")))

    def unsynced(self, node=None, path: str = "") -> list[str]:
        """What a power cut could take."""
        node = self.root if node is None else node
        if isinstance(node, str):
            return []
        out = [] if node.now == node.safe or isinstance(node, Folder) else [path]
        if isinstance(node, Folder):
            out += [f"{path}/{name}".lstrip("/") for name in node.now.keys() | node.safe.keys() if node.now.get(name) is not node.safe.get(name)]
            for name, child in node.now.items():
                out += self.unsynced(child, f"{path}/{name}".lstrip("/"))
        return sorted(set(out))

    def write(self, path: Path, lost: str, draw: random.Random) -> None:
        """The folder after the power went: "nothing" lost, or one of LOST."""
        path.mkdir()
        self._write(self.root, path, lost, draw)

    def _write(self, node: Folder, path: Path, lost: str, draw: random.Random) -> None:
        names = node.safe if lost == "all" or (lost == "mixed" and draw.random() < 0.5) else node.now
        for name, child in names.items():
            if isinstance(child, Folder):
                (path / name).mkdir()
                self._write(child, path / name, lost, draw)
            elif isinstance(child, str):
                (path / name).symlink_to(child)
            else:
                sure = len(child.safe) if child.now.startswith(child.safe) else 0  # what was appended to stays
                half = child.now[: (sure + len(child.now)) // 2]
                kept = {"nothing": child.now, "mixed": draw.choice([child.now, child.safe, half])}.get(lost, child.safe)
                (path / name).write_bytes(kept)
