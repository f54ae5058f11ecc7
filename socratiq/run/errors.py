"""How a script ends when something is wrong: one clear line, an exit status, no traceback for a user's mistake."""

import errno
import os
import re
import signal
import sys

# The disk, a quota or a file cannot hold more.
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# The path cannot be used, or its folder was removed meanwhile: for the user to put right, not a bug.
BAD_PATH = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST}


class UserError(Exception):
    """A mistake that the user can correct. The message is one line that names the file, row, field and what to do."""


class Stopped(BaseException):  # not an Exception, so that no `except Exception` on the way out swallows it
    """SIGINT or SIGTERM arrived, and everything worth keeping is on the disk. `status` is 130 or 143."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def main(function) -> None:
    """Run a script's main function and turn what it raises into one line on stderr and an exit status.

    UserError and a path that cannot be used -> 2, SIGINT -> 130, SIGTERM -> 143, a full disk -> 1. Any other exception
    is a bug and keeps its traceback.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _on_signal)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that is not UTF-8 shows \u2019 instead of ending the run
        sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries draw their progress bars into files as well
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
        number, path = _system_error(error)
        if number in FULL_DISK:
            line = f"no space left on the disk while writing {path or 'the output folder'}"
            _leave(f"error: {line}; free some and run the same command again", 1)
        if number in BAD_PATH:
            reason = os.strerror(number)
            _leave(f"error: {path or 'a file'}: {reason}; choose another place or change its permissions", 2)
        if number == errno.ENOENT:
            _leave(f"error: {path or 'a file'} is gone; was its folder removed meanwhile?", 2)
        raise


def _system_error(error: Exception) -> tuple[int | None, str | None]:
    """The system's error number and the path, None where there is none. safetensors has the number in its text only."""
    if isinstance(error, OSError):
        denied = errno.EACCES if isinstance(error, PermissionError) else None
        return error.errno or denied, error.filename
    found = re.search(r"\(os error (\d+)\)", str(error))
    return found and int(found[1]), None


def _on_signal(number, frame):
    stop_now(number, frame, "terminated" if number == signal.SIGTERM else "interrupted")


def stop_now(number: int, frame, message: str) -> None:
    """For signal handlers: raise Stopped, or end the process at once while a module is being imported.

    Libraries catch exceptions around their imports: some would go on, others print hundreds of lines.
    """
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{message}\n".encode() if speaks() else b"")  # print is not safe in a signal handler
            os._exit(128 + number)
        frame = frame.f_back
    raise Stopped(message, 128 + number)


def _leave(line: str, status: int) -> None:
    say(line)
    sys.exit(status)


def warn(line: str) -> None:
    """One line of warning on stderr."""
    say(f"warning: {line}")


def say(line: str) -> None:
    """One line on stderr. Of several processes on a machine (torchrun) only the first speaks."""
    if speaks():
        print(line, file=sys.stderr, flush=True)


def speaks() -> bool:
    """Whether this process is the only one on its machine, or the first."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def bar(iterable=None, **options):
    """tqdm that keeps quiet when the output is not a terminal."""
    from tqdm import tqdm

    return tqdm(iterable, **{"disable": None if speaks() else True, "dynamic_ncols": True, "leave": False, **options})
