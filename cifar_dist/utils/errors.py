"""User errors: one sentence that names the problem and its remedy, and exit code 2."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import TextIO

USER_ERROR = 2  # exit code
INTERRUPTED = 130  # exit code that shells report for a process that Ctrl-C ended
USER_ERRNOS = (  # storage errors that the user can fix
    *(errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM),
    *(errno.EIO, errno.ESTALE, errno.EFBIG),
    *(errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG),
)


class UserError(ValueError):
    """An error that the user can fix; its message says what is wrong and what to do.

    Any other exception is a bug and keeps its traceback.
    """


def is_main_rank() -> bool:
    """Return whether this is rank 0, by the launcher's environment variables alone."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def user_message(error: UserError | OSError) -> str | None:
    """Return what is wrong and what to do about it, or None if the error is a bug."""
    if isinstance(error, UserError):
        return str(error)
    if error.errno in USER_ERRNOS:
        path = error.filename2 or error.filename or "a file"
        return f"{path}: {error.strerror}; free space or choose another path"
    return None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if it has none.

    The messages of torch continue with advice and stack traces.
    """
    return (str(error) or type(error).__name__).splitlines()[0]


def print_error(message: str) -> None:
    print_to_stderr(f"error: {message}")


def print_to_stderr(line: str) -> None:
    """Print a line to stderr, unless its reader has exited."""
    try:
        print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:
        discard_output(sys.stderr)


def discard_output(stream: TextIO) -> None:
    """Send what a stream has buffered and all that follows to the null device.

    Otherwise a stream whose reader has exited raises an error again when Python exits.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flush_stdout() -> None:
    """Flush stdout before Python exits, which would change the exit code if its reader has exited."""
    try:
        sys.stdout.flush()
    except OSError as error:
        discard_output(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            raise OSError(error.errno, error.strerror, "standard output") from None


def open_closed_streams() -> None:
    """Open the null device as each standard stream that is closed, as after `>&-` in a shell.

    Otherwise Python has None instead of the stream, and the next file to be opened would receive what
    libraries print.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:  # the new descriptor is the lowest free one, which is this one
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  until the process ends


def exit_on_interrupt(number: int, frame: FrameType | None) -> None:
    """Handle Ctrl-C while a command imports its modules: nothing has been written yet."""
    if is_main_rank():
        os.write(2, b"\ninterrupted\n")
    os._exit(INTERRUPTED)


def run_command(main: Callable[[list[str]], int]) -> int:
    """Run a command's `main(arguments)` and return its exit code.

    Rank 0 prints a UserError, or a storage error that the user can fix, as one sentence; the exit
    code is 2 then. With --traceback these errors are raised instead.
    """
    arguments = sys.argv[1:]
    open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file name may not fit the terminal's encoding
            stream.reconfigure(errors="backslashreplace")
    interrupted = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, exit_on_interrupt):
        signal.signal(signal.SIGINT, interrupt)
    try:
        try:
            return main(arguments)
        finally:
            flush_stdout()
    except BrokenPipeError:  # the reader of our output has exited, as `head` does
        discard_output(sys.stdout)
        return 0
    except (UserError, OSError) as error:
        message = user_message(error)
        if message is None or "--traceback" in arguments:
            raise
        if is_main_rank():
            print_error(message)
        return USER_ERROR
    except BaseException as error:
        # A library may turn the KeyboardInterrupt into another exception.
        if not interrupted and not isinstance(error, KeyboardInterrupt):
            raise
        if is_main_rank():
            print_to_stderr("interrupted; all written files are complete")
        return INTERRUPTED
