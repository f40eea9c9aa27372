"""The prepare command, as a person uses it: files, a local server, refusals that leave nothing."""

from __future__ import annotations

import hashlib
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from small_data import cut, small_data

from cifar_dist.data.dataset import class_names, content_digest, load_split, read_digest, read_split
from cifar_dist.data.ingest import download as download_module
from cifar_dist.data.ingest.download import download
from cifar_dist.data.ingest.pickles import RawSplit
from cifar_dist.data.ingest.preparation import prepare
from cifar_dist.data.ingest.synthetic import pickle_members, write_pickles
from cifar_dist.distributed import signals
from cifar_dist.training.resume import ensure_data
from cifar_dist.utils.errors import UserError

TRAIN, TEST, META = small_data()


def packed(train: RawSplit = TRAIN) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in pickle_members(train, TEST, META).items():
            info = tarfile.TarInfo(f"cifar-100-python/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


ARCHIVE = packed()


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below `folder`: its inode (so a rewrite shows) and its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.stat().st_ino, path.read_bytes()) for path in files}


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "small.tar.gz"
    path.write_bytes(ARCHIVE)
    return str(path)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "new" / "data"


def test_an_archive_and_a_folder_give_the_same_data(
    source: str, output: Path, tmp_path: Path
) -> None:
    prepare(source, output, allow_unofficial=True)
    assert read_digest(output)["content"] == "other"
    assert read_digest(output)["train"]["sha256"] == content_digest(TRAIN, META)
    assert len(load_split(output, "test", "cpu").labels) == 23
    write_pickles(tmp_path, TRAIN, TEST, META)
    for name, folder in (("one", tmp_path), ("two", tmp_path / "cifar-100-python")):
        prepare(str(folder), tmp_path / name, allow_unofficial=True)
        assert read_digest(tmp_path / name) == read_digest(output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["data"]


def test_the_sample_keeps_its_pickles(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare("sample", output)
    assert read_digest(output)["content"] == "sample"
    assert read_digest(output)["train"]["rows"] == 6000
    assert len(class_names(output)) == 100
    written = tree(output)
    assert sum("cifar-100-python" in name for name in written) == 3
    said = capsys.readouterr().out
    assert "6,000 + 1,000 rows" in said
    opening: dict[str, list[object]] = {}
    exec("\n".join(line.strip() for line in said.splitlines()[1:]), opening)
    assert (len(opening["train"]), len(opening["test"])) == (6000, 1000)
    prepare("sample", output)
    assert "nothing to do" in capsys.readouterr().out
    assert tree(output) == written
    prepare("sample", output, force=True)
    assert [v[1] for v in tree(output).values()] == [v[1] for v in written.values()]
    assert tree(output) != written


def test_a_second_time_there_is_nothing_to_do(
    source: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(source, output, allow_unofficial=True)
    before = tree(output)
    prepare(source, output, allow_unofficial=True)
    assert "nothing to do" in capsys.readouterr().out
    assert tree(output) == before


def test_other_data_are_replaced_by_force_only(source: str, output: Path, tmp_path: Path) -> None:
    prepare(source, output, allow_unofficial=True)
    before = tree(output)
    other = tmp_path / "other.tar.gz"
    other.write_bytes(packed(cut(TRAIN, 50)))
    for arguments in ((str(other), True), ("sample", False), (None, False)):
        with pytest.raises(UserError, match="holds other data"):
            prepare(arguments[0], output, allow_unofficial=arguments[1])
        assert tree(output) == before
    prepare(str(other), output, allow_unofficial=True, force=True)
    assert read_digest(output)["train"]["rows"] == 50


def test_damage_is_found_and_mended_by_force(source: str, output: Path) -> None:
    prepare(source, output, allow_unofficial=True)
    table = output / "test" / "data-00000-of-00001.arrow"
    damaged = bytearray(table.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    table.write_bytes(damaged)
    with pytest.raises(UserError, match=r"differs from what was written.*--force"):
        prepare(source, output, allow_unofficial=True)
    prepare(source, output, allow_unofficial=True, force=True)
    read_split(output, "test")


@pytest.mark.parametrize("force", [False, True])
def test_a_foreign_folder_is_never_touched(
    source: str, output: Path, tmp_path: Path, force: bool
) -> None:
    output.mkdir(parents=True)
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a data set of ours"):
        prepare(source, output, allow_unofficial=True, force=force)
    assert (output / "thesis.tex").read_text() == "years of work"
    (output / "thesis.tex").rename(tmp_path / "thesis.tex")
    prepare(source, output, allow_unofficial=True)  # an empty folder is nobody's
    (tmp_path / "thesis.tex").rename(output / "train" / "thesis.tex")
    before = tree(output)
    with pytest.raises(UserError, match=r"holds train/thesis\.tex"):
        prepare(source, output, allow_unofficial=True, force=True)
    assert tree(output) == before


def test_a_persons_own_pickles_are_foreign(output: Path) -> None:
    write_pickles(output, TRAIN, TEST, META)
    before = tree(output)
    with pytest.raises(UserError, match="not a data set of ours"):
        prepare("sample", output, force=True)
    assert tree(output) == before


def refused(source: str | None, output: Path, match: str, **options: bool) -> None:
    with pytest.raises(UserError, match=match) as caught:
        prepare(source, output, **options)
    assert "\n" not in str(caught.value)
    assert not output.parent.exists()


def test_refusals_leave_nothing_behind(source: str, output: Path, tmp_path: Path) -> None:
    refused(source, output, "not the official CIFAR-100; .*--allow-unofficial")
    refused(str(tmp_path / "absent"), output, "does not exist", allow_unofficial=True)
    refused("ftp://example.org/a", output, "does not exist", allow_unofficial=True)
    Path(source).write_bytes(ARCHIVE[:5000])
    refused(source, output, "cannot be read", allow_unofficial=True)
    members = pickle_members(TRAIN, TEST, META)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in members.items():
        (folder / name).write_bytes(data)
    (folder / "test").write_bytes(members["train"])
    refused(str(folder), output, "batch_label is not", allow_unofficial=True)
    (folder / "test").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    refused(str(folder), output, r"names os\.system", allow_unofficial=True)
    moved = cut(TEST, 23)
    moved.coarse_labels[:] = (moved.coarse_labels + 1) % 20
    (folder / "test").write_bytes(pickle_members(TRAIN, moved, META)["test"])
    refused(str(folder), output, "lies in two coarse classes", allow_unofficial=True)


def test_who_called_train_is_told_the_whole_command(
    server: Server, source: str, output: Path, tmp_path: Path
) -> None:
    absent = server.url.replace("small.tar.gz", "absent")
    place = "choose another place (--output of prepare, data.path of a recipe)"
    for asked, path, said in (
        (
            source,
            output,
            f"`python -m cifar_dist.prepare --allow-unofficial --source {source} --output",
        ),
        (absent, output, f"`python -m cifar_dist.prepare --source FILE --output {output}`"),
        (source, Path(source), place),
        (source, Path(source) / "data", place),
        (str(tmp_path / "no"), output, "(--source of prepare, data.source of a recipe)"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            ensure_data(path, asked)


def test_a_file_in_the_way_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for output in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(UserError, match=r"not a data set of ours|not a folder"):
            prepare(source, output, allow_unofficial=True, force=True)
    assert (tmp_path / "file").read_text() == "text"


def test_what_a_killed_one_left_goes_away(source: str, output: Path) -> None:
    left = output.with_name(f".{output.name}.123.part")
    other = output.with_name(f".{output.name}.mine.part")
    for folder in (left, other):
        folder.mkdir(parents=True)
        (folder / "begun").touch()
    prepare(source, output, allow_unofficial=True)
    assert not left.exists()
    assert other.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_wait_for_data(
    output: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("RANK", "1")  # which waits for rank 0
    monkeypatch.setattr(signals, "_received", [])
    signals._note(number, None)
    said: list[bool] = []
    waiting = threading.Thread(
        target=lambda: said.append(ensure_data(output, "sample")), daemon=True
    )
    waiting.start()
    waiting.join(5)
    assert said == [False]


def test_two_at_once_write_it_once(source: str, output: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cifar_dist.prepare import prepare;"
        "prepare(sys.argv[1], Path(sys.argv[2]), allow_unofficial=True)"
    )
    command = [sys.executable, "-c", code, source, str(output)]
    folder = Path(__file__).parents[3]
    both = [subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) for _ in range(2)]
    said = sorted("nothing to do" in process.communicate()[0].decode() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert said == [False, True]
    assert list(output.parent.iterdir()) == [output]


def test_the_command_says_one_sentence(source: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cifar_dist.prepare", "--source", source]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["small.tar.gz"]
    command += ["--allow-unofficial", "--output", "data/mine"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "64 + 23 rows" in done.stdout
    assert load_split(tmp_path / "data" / "mine", "train", "cpu").images.shape == (64, 3, 32, 32)


class Server(ThreadingHTTPServer):
    """Serves `data`, whole or from an offset; `cut` bytes and no more are sent in one answer."""

    data, cut, ranges = ARCHIVE, 10**9, True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requested: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/small.tar.gz"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        data, wanted = self.server.data, self.headers.get("Range")
        self.server.requested.append(wanted)
        start = int(wanted[6:-1]) if wanted and self.server.ranges else 0
        if self.path == "/absent":
            self.send_error(404)
        elif start >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.end_headers()
        else:
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.send_header("Content-Length", str(len(data) - start))
            self.end_headers()
            self.wfile.write(data[start : start + self.server.cut])

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_url_is_downloaded(server: Server, output: Path) -> None:
    prepare(server.url, output, allow_unofficial=True)
    assert read_digest(output)["train"]["sha256"] == content_digest(TRAIN, META)
    assert list(output.parent.iterdir()) == [output]


def test_a_broken_download_goes_on(server: Server, output: Path) -> None:
    server.cut = len(ARCHIVE) // 3 + 1
    for sent in (server.cut, 2 * server.cut):
        with pytest.raises(UserError, match=r"broke off after .*; run it again"):
            prepare(server.url, output, allow_unofficial=True)
        (part,) = output.parent.iterdir()
        assert part.name.endswith(".part")
        assert part.read_bytes() == ARCHIVE[:sent]
    prepare(server.url, output, allow_unofficial=True)
    assert server.requested == [None, f"bytes={server.cut}-", f"bytes={2 * server.cut}-"]
    assert read_digest(output)["train"]["rows"] == 64
    assert list(output.parent.iterdir()) == [output]


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(b"the beginning of something")
    server.ranges = False
    download(server.url, part)
    assert part.read_bytes() == ARCHIVE


def test_a_complete_part_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(ARCHIVE)
    download(server.url, part, md5=hashlib.md5(ARCHIVE).hexdigest())
    assert part.read_bytes() == ARCHIVE
    part.write_bytes(ARCHIVE + b"more than there is")
    download(server.url, part)
    assert part.read_bytes() == ARCHIVE
    assert server.requested[-1] is None


def test_a_wrong_md5_is_refused_and_deleted(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"md5 differs.*in another way"):
        download(server.url, tmp_path / "part", md5="0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_is_no_archive_is_deleted(server: Server, output: Path) -> None:
    server.data = b"<html>please log in</html>"
    refused(server.url, output, "cannot be read", allow_unofficial=True)


def test_an_endless_download_is_cut(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "MAX_ARCHIVE_BYTES", len(ARCHIVE) - 1)
    with pytest.raises(UserError, match="larger than CIFAR-100"):
        download(server.url, tmp_path / "part")
    assert list(tmp_path.iterdir()) == []


def test_network_errors_are_one_sentence(server: Server, output: Path) -> None:
    absent = server.url.replace("small.tar.gz", "absent")
    refused(absent, output, "answers 404 Not Found; .*--source FILE", allow_unofficial=True)
    refused("http://[", output, "cannot be fetched", allow_unofficial=True)
    with Server() as closed:
        url = closed.url
    refused(url, output, "refused.*--source FILE", allow_unofficial=True)


REAL = os.environ.get("CIFAR100_ARCHIVE")


@pytest.mark.skipif(REAL is None, reason="CIFAR100_ARCHIVE names no official archive")
def test_the_real_cifar_100(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    datasets = pytest.importorskip("datasets")
    prepare(REAL, output)
    assert read_digest(output)["content"] == "official"
    train, test = (load_split(output, name, "cpu") for name in ("train", "test"))
    assert (train.images.shape, test.images.shape) == ((50_000, 3, 32, 32), (10_000, 3, 32, 32))
    assert np.bincount(train.labels.numpy()).tolist() == [500] * 100
    assert np.bincount(test.labels.numpy()).tolist() == [100] * 100
    mean = train.images.numpy().mean(axis=(0, 2, 3)) / 255
    assert mean.round(4).tolist() == pytest.approx([0.5071, 0.4865, 0.4409], abs=1.1e-4)
    opened = datasets.load_from_disk(output)
    assert opened["train"][49_999]["image"] == train.images[-1].reshape(-1).tolist()
    assert class_names(output)[0] == "apple"
    prepare(None, output)  # complete, so the network is not asked
    assert "nothing to do" in capsys.readouterr().out
