"""Files that last: written whole or not at all, hashed, and shared with an earlier commit where nothing changed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # what trying in another way would not help
Manifest = dict[str, dict[str, Any]]  # path below a folder -> {"sha256", "bytes"}


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def read(path: Path) -> str:
    """The text of a file, every byte of it told: no newline is translated, and what is not UTF-8 is replaced, so that it comes to the hashes. "" where there is no file."""
    return path.read_bytes().decode("utf-8", errors="replace") if path.is_file() else ""


def lines_of(text: str) -> list[str]:
    """With their ends. str.splitlines would also end one at U+2028 and its like, which JSON leaves in strings as they are."""
    return io.StringIO(text, newline="\n").readlines()


def write(path: Path, text: str) -> None:
    """UTF-8, no newline translated: the bytes that are hashed are those of the text, on every system."""
    path.write_bytes(text.encode("utf-8"))


def write_atomic(path: Path, text: str) -> None:
    """Replace a file so that a reader, or a crash, sees the old text or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """A file's bytes, or a folder's names, to the disk. Windows opens no folder: there names are left to the file system's journal."""
    if os.name == "nt" and path.is_dir():
        return
    fd = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs only what may be written to
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(folder: Path) -> None:
    for directory, _, files in os.walk(folder):
        for file in files:
            sync(Path(directory) / file)
        sync(Path(directory))


def manifest(folder: Path) -> Manifest:
    """Every file below `folder`, by its path there."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): {"sha256": file_sha256(p), "bytes": p.stat().st_size} for p in files}


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, or a copy where the file system has none."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in FULL:
            raise
        shutil.copyfile(source, target)


def link_unchanged(folder: Path, files: Manifest, earlier: Path, earlier_files: Manifest) -> None:
    """Replace each of `files` in `folder` that lies in `earlier` with the same bytes by a hard link to it. Where the file system has none, the copy stays."""
    known = {entry["sha256"]: path for path, entry in earlier_files.items()}
    for path, entry in files.items():
        source = earlier / known.get(entry["sha256"], "")
        # the bytes themselves, not what was once written of them: a damaged file must not spread
        if source == earlier or not source.is_file() or os.path.samefile(source, folder / path) or file_sha256(source) != entry["sha256"]:
            continue
        beside = (folder / path).with_name(f".{Path(path).name}.link")
        with contextlib.suppress(OSError):
            os.link(source, beside)
            beside.replace(folder / path)
        beside.unlink(missing_ok=True)
