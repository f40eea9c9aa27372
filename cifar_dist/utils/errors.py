"""Floor 0. A mistake that a person can mend is one sentence with the remedy, and exit code 2."""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Callable

USER_ERROR = 2  # exit code
USER_ERRNOS = (  # errors of the storage that a person can do something about
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM),
    *(errno.EIO, errno.ESTALE),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),  # of an --output
)
INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended


class UserError(ValueError):
    """One sentence for the person at the keyboard: what is wrong and what to do about it.

    Any other exception is a bug of ours and keeps its traceback.
    """


def is_main_rank() -> bool:
    """Whether this process speaks for its group, told by the launcher's environment alone."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def user_message(error: UserError | OSError) -> str | None:
    """What is wrong and what to do about it; None for an error that nobody but us can mend."""
    if isinstance(error, UserError):
        return str(error)
    if error.errno in USER_ERRNOS:
        return f"{error.filename2 or error.filename or 'a file'}: {error.strerror}; free or choose another place"
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message; torch's go on with advice and traces."""
    return str(error).partition("\n")[0]


def print_error(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)


def run_command(main: Callable[[list[str]], int]) -> int:
    """Run a command's `main(arguments)` and return its exit code; 2 and one sentence for a UserError.

    Errors of the storage (disk full, no permission) are the person's to mend as well. With
    --traceback both keep their trace.
    """
    arguments = sys.argv[1:]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name need not fit the terminal
            stream.reconfigure(errors="backslashreplace")
    try:
        return main(arguments)
    except KeyboardInterrupt:
        print("interrupted; what was written is complete", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # who read our output, like `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (UserError, OSError) as error:
        sentence = user_message(error)
        if sentence is None or "--traceback" in arguments:
            raise
        if is_main_rank():
            print_error(sentence)
        return USER_ERROR
