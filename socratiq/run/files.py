"""Files that are either the old or the new version, never half of one.

Whole files are written beside their place, synced and renamed. Append-only files are JSON lines: one object a line, so
that a line cut off by a kill can be told from a whole one.
"""

import json
import os
from pathlib import Path

from socratiq.run.errors import UserError


def atomic_write(path: str | Path, data: str | bytes) -> None:
    """Write `data` beside `path`, sync it to the disk and rename it into place."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


class replacing:
    """`with replacing(path) as temporary:` write the file or folder `temporary`; it becomes `path` if all went well."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.temporary = self.path.with_name(f".{self.path.name}.partial")

    def __enter__(self) -> Path:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        remove(self.temporary)  # left behind by a kill
        return self.temporary

    def __exit__(self, kind, value, traceback) -> None:
        if kind is not None:
            remove(self.temporary)
            return
        for file in [self.temporary, *self.temporary.rglob("*")] if self.temporary.is_dir() else [self.temporary]:
            sync(file)
        if self.temporary.is_dir():
            remove(self.path)  # a folder cannot be renamed over a filled one
        os.replace(self.temporary, self.path)
        sync(self.path.parent)


def sync(path: str | Path) -> None:
    """Wait until the file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: str | Path) -> None:
    """Remove a file or a folder, if it is there."""
    import shutil

    path = Path(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock(file) -> bool:
    """Lock an open file for this process alone; False if another process holds it. The lock dies with the process."""
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass
    return True


def to_json(value) -> str:
    """One line of JSON, in the spelling that every file of the project uses."""
    return json.dumps(value, ensure_ascii=False)


def append_jsonl(path: str | Path, value, fsync: bool = False) -> None:
    """Append one object as a line; with `fsync` it is on the disk when this returns."""
    with open(path, "ab") as file:
        file.write((to_json(value) + "\n").encode())
        file.flush()
        if fsync:
            os.fsync(file.fileno())


def read_jsonl(path: str | Path, repair: bool = False) -> list[dict]:
    """All objects of a JSON-lines file; a missing file holds none.

    With `repair`, a last line that a kill cut off is removed from the file. Any other line that is not a JSON object
    raises UserError with its line number.
    """
    path = Path(path)
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1  # a line is whole when its newline is there
    if repair and whole < len(content):
        with open(path, "r+b") as file:
            file.truncate(whole)
        content = content[:whole]
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path} line {number}: not JSON ({error}); mend or remove the line") from None
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number}: expected a JSON object, found {type(row).__name__}")
        rows.append(row)
    return rows
