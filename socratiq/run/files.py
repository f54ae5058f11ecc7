"""Files that hold either the old or the new version, never half of one.

A file is written beside its place, synced and renamed. Append-only files are JSON lines, one object a line, so that a
line cut off by a kill can be told from a complete one.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write `data` beside `path`, sync it to the disk and rename it into place."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """`with replacing(path) as temporary:` write the file or folder `temporary`; it becomes `path` if all went well."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)  # left behind by a kill
    try:
        yield temporary
        for file in (temporary, *temporary.rglob("*")):
            sync(file)
        if temporary.is_dir():
            remove(path)  # a folder cannot be renamed over a filled one
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        remove(temporary)  # there only if something went wrong


def sync(path: str | Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def remove(path: str | Path) -> None:
    """Remove a file or a folder, if it is there."""
    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock(file) -> bool:
    """Lock an open file for this process alone; False if another process holds it.

    The lock dies with the process. A file system without locks grants every lock.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, (BlockingIOError, PermissionError))
    return True


def to_json(value) -> str:
    """One line of JSON, spelled as in every file of the project."""
    return json.dumps(value, ensure_ascii=False)


def append_jsonl(path: str | Path, value) -> None:
    """Append one object as a line."""
    with open(path, "ab") as file:
        file.write(f"{to_json(value)}\n".encode())
