"""How a run ends when something is wrong: one clear line, the right exit status, no traceback for a user's mistake."""

import errno
import os
import signal
import sys

# What the system says of a disk, a quota or a file that can hold no more.
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What the system says of a path that cannot be used: the user's to mend, not a bug.
WRONG_PLACE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST}


class UserError(Exception):
    """A mistake the user can mend. The message is one line that names the file, row, field and mend."""


class Stopped(BaseException):  # no `except Exception` on the way out should swallow it
    """SIGINT or SIGTERM arrived, and what had to be brought to the disk is there. `status` is 130 or 143."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def main(function) -> None:
    """Run a script's main function and turn what it raises into one line on stderr and an exit status.

    UserError and a path that cannot be used -> 2, Ctrl-C -> 130, SIGTERM -> 143, a full disk -> 1; anything else is a
    bug and keeps its traceback.
    """
    signal.signal(signal.SIGTERM, _terminated)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # the bars of libraries, which draw them into files as well
    try:
        function()
    except UserError as error:
        _leave(f"error: {' '.join(str(error).split())}", 2)
    except Stopped as stop:
        _leave(str(stop), stop.status)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except BrokenPipeError:  # the reader of our output went away (`... | head`)
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        if number in WRONG_PLACE:
            _leave(f"error: {error.filename}: {error.strerror}; choose another place or change its permissions", 2)
        # safetensors wraps what the system says in an error of its own, hence the look at the text
        if number not in FULL_DISK and not any(f"(os error {full})" in str(error) for full in FULL_DISK):
            raise
        place = getattr(error, "filename", None) or "the output folder"
        _leave(f"error: no space left on the disk while writing {place}; free some and run the same command again", 1)


def _terminated(number, frame):
    raise Stopped("terminated", 128 + number)


def _leave(line: str, status: int) -> None:
    say(line)
    sys.exit(status)


def warn(line: str) -> None:
    """One line of warning on stderr."""
    say(f"warning: {line}")


def say(line: str) -> None:
    """One line on stderr. Of several processes on a machine (torchrun) the first speaks for all."""
    if speaks():
        print(line, file=sys.stderr, flush=True)


def speaks() -> bool:
    """Whether this process is the only one on its machine, or the first."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def bar(iterable=None, **options):
    """tqdm that keeps quiet when the output is not a terminal."""
    from tqdm import tqdm

    return tqdm(iterable, **{"disable": None if speaks() else True, "dynamic_ncols": True, "leave": False, **options})
