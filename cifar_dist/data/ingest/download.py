"""Floor 1. One file over http(s), which a broken connection does not send back to the start."""

from __future__ import annotations

import errno
import hashlib
import socket
from contextlib import suppress
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, getproxies, urlopen

from tqdm import tqdm

from cifar_dist.data.ingest.archive import MAX_ARCHIVE_BYTES
from cifar_dist.distributed import signals
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.network import RESPONSE_SECONDS, responds

TIMEOUT_SECONDS = 5  # to connect, and of silence
OUR_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # not the network's errors


def download(
    url: str, part: Path, *, md5: str | None = None, remedy: str = "get it in another way"
) -> None:
    """Fetch `url` into `part`, going on where an earlier try ended; UserError if that fails."""
    have = part.stat().st_size if part.exists() else 0
    try:
        place = urlsplit(url)
        port = place.port or (443 if place.scheme == "https" else 80)
    except ValueError as error:
        raise UserError(f"{url} cannot be fetched ({error}); {remedy}") from None
    if place.hostname and not getproxies():
        where = (place.hostname, port)

        def reach() -> None:
            with suppress(ConnectionRefusedError):  # an answer; the request below will say so
                socket.create_connection(where, timeout=RESPONSE_SECONDS).close()

        if not responds(reach):
            raise UserError(f"{url} cannot be fetched ({place.hostname} does not answer); {remedy}")
    try:
        request = Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            total = _receive(response, part, have)
    except HTTPError as error:
        if error.code != 416 or not have:
            raise UserError(f"{url} answers {error.code} {error.reason}; {remedy}") from error
        if error.headers.get("Content-Range") != f"bytes */{have}":
            part.unlink()  # what is here is no beginning of what is there
            return download(url, part, md5=md5, remedy=remedy)
        total = have
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, OSError) and error.errno in OUR_DISK:
            raise
        reason = getattr(error, "reason", error)
        raise UserError(f"{url} cannot be fetched ({reason}); run it again, or {remedy}") from error
    size = part.stat().st_size
    if total is not None and size < total:
        raise UserError(f"{url} broke off after {size:,} of {total:,} bytes; run it again to go on")
    if md5 is not None:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        if found.hexdigest() != md5:
            part.unlink()
            raise UserError(f"{url} sent something else than CIFAR-100 (its md5 differs); {remedy}")


def _receive(response: HTTPResponse, part: Path, have: int) -> int | None:
    """Write the answer to `part`; the whole file's size, if the server says it."""
    resumed = response.status == 206
    if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        raise ValueError("it sent another range than was asked for")
    start = have if resumed else 0
    length = response.headers.get("Content-Length")
    total = None if length is None else start + int(length)
    with (
        part.open("ab" if resumed else "wb") as file,
        tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while chunk := response.read(1 << 20):
            if signals.stop_signal():  # where a training prepares; what is there is gone on with
                raise KeyboardInterrupt
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > MAX_ARCHIVE_BYTES:
                part.unlink()
                raise ValueError("it is larger than CIFAR-100")
    return total
