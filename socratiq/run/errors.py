"""How a script ends when something is wrong: one clear line, an exit status, no traceback for a user's mistake."""

import errno
import os
import re
import signal
import sys

# The disk, a quota or a file cannot hold more.
FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class UserError(Exception):
    """A mistake that the user can correct. The message is one line that names the file, row, field and what to do."""


class Stopped(BaseException):  # not an Exception, so that no `except Exception` on the way out swallows it
    """SIGINT or SIGTERM arrived, and everything worth keeping is on the disk: Stopped(line to say, exit status)."""


def main(function) -> None:
    """Run a script's main function and turn what it raises into one line on stderr and an exit status.

    UserError and a path that cannot be used -> 2, SIGINT -> 130, SIGTERM -> 143, a full disk -> 1. Any other exception
    is a bug and keeps its traceback.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop_now)
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that is not UTF-8 shows \u2019 instead of ending the run
        sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries draw their progress bars into files as well
    try:
        return function()
    except UserError as error:
        line, status = f"error: {' '.join(str(error).split())}", 2
    except Stopped as stop:
        line, status = stop.args
    except BrokenPipeError:  # the reader of our output went away (`... | head`)
        sys.stderr.close()
        sys.exit(1)
    except Exception as error:
        line, status = _system_error(error)
        if not line:
            raise
    say(line)
    sys.exit(status)


def _system_error(error: Exception) -> tuple[str, int]:
    """The line and exit status for a full disk or a path that cannot be used; "" for any other exception."""
    found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors has the system's number in its text only
    number = int(found[1]) if found else getattr(error, "errno", None)
    path = getattr(error, "filename", None)
    where = path or "a file of the output folder"
    if number in FULL_DISK:
        return f"error: no space left on the disk while writing {where}; free some and run the same command again", 1
    if number and (path or found or isinstance(error, PermissionError)):
        reason = os.strerror(number)
        return f"error: {where}: {reason}; name another place, or see that this one exists and can be written", 2
    return "", 1


def stop_now(number: int, frame, then: str = "") -> None:
    """A signal handler: raise Stopped, or end the process at once while a module is being imported.

    Libraries catch exceptions around their imports: some would go on, others print hundreds of lines. `then` follows
    the line "SIGINT: stopped".
    """
    message = f"{signal.Signals(number).name}: stopped{then}"
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os.write(2, f"{message}\n".encode() if speaks() else b"")  # print is not safe in a signal handler
            os._exit(128 + number)
        frame = frame.f_back
    raise Stopped(message, 128 + number)


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


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def bar(iterable=None, **options):
    """tqdm that keeps quiet when the output is not a terminal."""
    from tqdm import tqdm

    return tqdm(iterable, **{"disable": None if speaks() else True, "dynamic_ncols": True, "leave": False, **options})
