"""Floor 0. A mistake that a person can mend is one sentence with the remedy, and exit code 2."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

MENDABLE = (  # errors of the storage that a person can do something about
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),  # of an --output
)
INTERRUPTED = 130  # as a shell reports a process that Ctrl-C ended


class UserError(ValueError):
    """One sentence for the person at the keyboard: what is wrong and what to do about it.

    Any other exception is a bug of ours and keeps its traceback.
    """


class LonelyError(UserError):
    """One that other ranks do not know of, so this one says it, whichever it is."""


def is_main_rank() -> bool:
    """Whether this process speaks for its group, told by the launcher's environment alone."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def run_command(main: Callable[[list[str]], int]) -> int:
    """Run a command's `main(arguments)` and return its exit code; 2 and one sentence for a UserError.

    Errors of the storage (disk full, no permission) are the person's to mend as well. With
    --traceback both keep their trace.
    """
    arguments = sys.argv[1:]
    try:
        return main(arguments)
    except KeyboardInterrupt:
        print("interrupted; what was written is complete", file=sys.stderr, flush=True)
        return INTERRUPTED
    except BrokenPipeError:  # who read our output, like `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        if "--traceback" in arguments:
            raise
        sentence, known_to_all = str(error), not isinstance(error, LonelyError)
    except OSError as error:
        if error.errno not in MENDABLE or "--traceback" in arguments:
            raise
        sentence = f"{error.filename2 or error.filename or 'a file'}: {error.strerror}; free or choose another place"
        known_to_all = True
    if is_main_rank() or not known_to_all:
        print(f"error: {sentence}", file=sys.stderr, flush=True)
    return 2
