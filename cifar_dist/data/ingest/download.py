"""Download one file over http(s), resuming after a broken connection."""

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
from cifar_dist.utils.files import with_path
from cifar_dist.utils.network import RESPONSE_SECONDS, responds

TIMEOUT_SECONDS = 5  # to connect, and between two reads
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


def download(
    url: str, part: Path, *, md5: str | None = None, remedy: str = "get the file in another way"
) -> None:
    """Download `url` to `part`, resuming from an existing `part`; raise UserError on failure."""
    offset = part.stat().st_size if part.exists() else 0
    _check_host(url, remedy)
    try:
        request = Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
        with urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            total = _receive(response, part, offset)
    except HTTPError as error:
        if error.code != 416 or not offset:
            raise UserError(f"{url} returns {error.code} {error.reason}; {remedy}") from error
        if error.headers.get("Content-Range") != f"bytes */{offset}":
            part.unlink()  # `part` is not the beginning of the file
            return download(url, part, md5=md5, remedy=remedy)
        total = offset
    except (OSError, HTTPException, ValueError) as error:
        if isinstance(error, OSError) and error.errno in DISK_ERRORS:
            with with_path(part):
                raise
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{url} cannot be downloaded ({reason}); run the command again, or {remedy}"
        ) from error
    size = part.stat().st_size
    if total is not None and size < total:
        raise UserError(
            f"{url}: download interrupted after {size:,} of {total:,} bytes; run the command again to "
            "resume"
        )
    if md5 is not None:
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False))
        if digest.hexdigest() != md5:
            part.unlink()
            raise UserError(f"{url} is not the published archive (its MD5 differs); {remedy}")


def _check_host(url: str, remedy: str) -> None:
    """UserError if the host does not answer within seconds; proxies are left to urllib."""
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise UserError(f"{url} cannot be downloaded ({error}); {remedy}") from None
    if parts.hostname and not getproxies():
        address = (parts.hostname, port)

        def connect() -> None:
            with suppress(ConnectionRefusedError):  # the request below reports it
                socket.create_connection(address, timeout=RESPONSE_SECONDS).close()

        if not responds(connect):
            raise UserError(
                f"{url} cannot be downloaded ({parts.hostname} does not answer); {remedy}"
            )


def _receive(response: HTTPResponse, part: Path, offset: int) -> int | None:
    """Write the response to `part`; return the size of the whole file, or None if unknown."""
    resumed = response.status == 206
    if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {offset}-"):
        raise ValueError("the server sent another range than requested")
    start = offset if resumed else 0
    length = response.headers.get("Content-Length")
    total = None if length is None else start + int(length)
    with (
        part.open("ab" if resumed else "wb") as file,
        tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=None) as bar,
    ):
        while chunk := response.read(1 << 20):
            if signals.stop_signal():  # of a training run; the next one resumes the download
                raise KeyboardInterrupt
            file.write(chunk)
            bar.update(len(chunk))
            if file.tell() > MAX_ARCHIVE_BYTES:
                part.unlink()
                raise ValueError("the file is larger than any CIFAR archive")
    return total
