"""The prepare command: files, downloads from a local server, and errors that leave nothing behind."""

from __future__ import annotations

import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from small_data import cifar_10_members, first_rows, small_data, with_classes, write_pickles

from cifar_dist.data.dataset import (
    class_names,
    content_digest,
    data_digest,
    load_split,
    read_digest,
    read_split,
)
from cifar_dist.data.ingest import download as download_module
from cifar_dist.data.ingest.archive import CIFAR_10, CIFAR_100, DATASETS
from cifar_dist.data.ingest.download import download
from cifar_dist.data.ingest.pickles import RawSplit
from cifar_dist.data.ingest.preparation import prepare
from cifar_dist.data.ingest.synthetic import pickle_members
from cifar_dist.distributed import signals
from cifar_dist.recipe.load import load_recipe, validate
from cifar_dist.recipe.runs import training_data
from cifar_dist.recipe.schema import Recipe
from cifar_dist.training.start import ensure_data
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
DATA_10 = with_classes(10)


def packed_10() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, data in cifar_10_members(*DATA_10).items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Return the inode, which changes when a file is rewritten, and the bytes of all files."""
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


def test_archive_and_folder_give_the_same_data(source: str, output: Path, tmp_path: Path) -> None:
    prepare(source, output, allow_unofficial=True)
    assert read_digest(output)["content"] == "other"
    assert read_digest(output)["train"]["sha256"] == content_digest(TRAIN, META)
    assert len(load_split(output, "test", "cpu").labels) == 23
    write_pickles(tmp_path, TRAIN, TEST, META)
    for name, folder in (("one", tmp_path), ("two", tmp_path / "cifar-100-python")):
        prepare(str(folder), tmp_path / name, allow_unofficial=True)
        assert read_digest(tmp_path / name) == read_digest(output)
    assert sorted(path.name for path in output.parent.iterdir()) == ["data"]


def test_cifar_10_archive_and_folder_give_the_same_data(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(packed_10())
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, data in cifar_10_members(*DATA_10).items():
        (folder / name).write_bytes(data)
    train, test, meta = DATA_10
    for source, dataset in ((tmp_path / "a.tar.gz", CIFAR_10), (folder, None)):
        output = tmp_path / f"from_{source.name}"
        prepare(str(source), output, dataset=dataset, allow_unofficial=True)
        digest = read_digest(output)
        assert digest["content"] == "other"
        assert digest["train"] == {"rows": 64, "sha256": content_digest(train, meta)}
        assert digest["test"] == {"rows": 23, "sha256": content_digest(test, meta)}
        assert read_split(output, "train").filenames == train.filenames


def test_data_set_other_than_expected_is_refused(source: str, output: Path, tmp_path: Path) -> None:
    """The data set is that of the URL, of --dataset, or that after which data.path is named."""
    source_10 = tmp_path / "ten.tar.gz"
    source_10.write_bytes(packed_10())
    is_10, is_100 = (
        "is CIFAR-10, not CIFAR-100; give cifar-100-",
        "is CIFAR-100, not CIFAR-10; give",
    )
    assert_refused(str(source_10), output, is_10, dataset=CIFAR_100, allow_unofficial=True)
    assert_refused(source, output, is_100, dataset=CIFAR_10, allow_unofficial=True)
    assert_refused(CIFAR_100.url, output, is_100, dataset=CIFAR_10)
    for name, wrong, match in (("cifar100", str(source_10), is_10), ("cifar10", source, is_100)):
        with pytest.raises(UserError, match=match):
            ensure_data(recipe_with(output / name, wrong))
    command = r"not the official CIFAR-10; to use it, run `.*--dataset cifar10 --allow-unofficial"
    with pytest.raises(UserError, match=command):
        ensure_data(recipe_with(output, str(source_10)))


def test_published_files_are_recognized(
    output: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Published MD5s are those of small files here; see test_official_meta_of_cifar_10_reads_back."""
    members = cifar_10_members(*DATA_10)
    md5 = {name: hashlib.md5(data).hexdigest() for name, data in members.items()}
    small = replace(CIFAR_10, md5=md5)
    monkeypatch.setitem(DATASETS, "cifar10", small)
    source = tmp_path / "ten.tar.gz"
    source.write_bytes(packed_10())
    prepare(str(source), output, dataset=small)
    assert read_digest(output)["content"] == "cifar10"
    recipe = recipe_with(output, str(source))
    environment = {"data": data_digest(output)}
    assert training_data(recipe, environment, output) == "CIFAR-10"
    at_url = recipe_with(output, CIFAR_10.url)
    assert training_data(at_url, environment, tmp_path / "absent") == "CIFAR-10"
    capsys.readouterr()
    prepare(None, output, dataset=small)  # complete, so nothing is downloaded
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="contains other data"):
        prepare(None, output, dataset=CIFAR_100)


def test_synthetic_data_include_their_pickles(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare("sample", output)
    assert read_digest(output)["content"] == "sample"
    assert read_digest(output)["train"]["rows"] == 6000
    assert len(class_names(output)) == 100
    written = tree(output)
    assert sum("cifar-100-python" in name for name in written) == 3
    printed = capsys.readouterr().out
    assert "6,000 + 1,000 rows" in printed
    names: dict[str, list[object]] = {}
    exec("\n".join(line.strip() for line in printed.splitlines()[1:]), names)
    assert (len(names["train"]), len(names["test"])) == (6000, 1000)
    prepare("sample", output)
    assert "nothing to do" in capsys.readouterr().out
    assert tree(output) == written
    prepare("sample", output, force=True)
    rewritten = tree(output)
    assert {path: data for path, (_, data) in rewritten.items()} == {
        path: data for path, (_, data) in written.items()
    }
    assert rewritten != written


def test_second_call_does_nothing(
    source: str, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(source, output, allow_unofficial=True)
    before = tree(output)
    prepare(source, output, allow_unofficial=True)
    assert "nothing to do" in capsys.readouterr().out
    assert tree(output) == before


def test_other_data_are_replaced_only_with_force(source: str, output: Path, tmp_path: Path) -> None:
    prepare(source, output, allow_unofficial=True)
    before = tree(output)
    other = tmp_path / "other.tar.gz"
    other.write_bytes(packed(first_rows(TRAIN, 50)))
    for new_source, allow_unofficial in ((str(other), True), ("sample", False), (None, False)):
        with pytest.raises(UserError, match="contains other data"):
            prepare(new_source, output, allow_unofficial=allow_unofficial)
        assert tree(output) == before
    prepare(str(other), output, allow_unofficial=True, force=True)
    assert read_digest(output)["train"]["rows"] == 50


def test_damage_is_reported_and_repaired_with_force(source: str, output: Path) -> None:
    prepare(source, output, allow_unofficial=True)
    table = output / "test" / "data-00000-of-00001.arrow"
    damaged = bytearray(table.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    table.write_bytes(damaged)
    with pytest.raises(UserError, match=r"does not match its SHA-256 digest.*--force"):
        prepare(source, output, allow_unofficial=True)
    prepare(source, output, allow_unofficial=True, force=True)
    read_split(output, "test")


@pytest.mark.parametrize("force", [False, True])
def test_folder_with_foreign_files_is_never_touched(
    source: str, output: Path, tmp_path: Path, force: bool
) -> None:
    output.mkdir(parents=True)
    (output / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not written by cifar_dist"):
        prepare(source, output, allow_unofficial=True, force=force)
    assert (output / "thesis.tex").read_text() == "years of work"
    (output / "thesis.tex").rename(tmp_path / "thesis.tex")
    prepare(source, output, allow_unofficial=True)  # an empty folder is accepted
    (tmp_path / "thesis.tex").rename(output / "train" / "thesis.tex")
    before = tree(output)
    with pytest.raises(UserError, match=r"contains train/thesis\.tex"):
        prepare(source, output, allow_unofficial=True, force=True)
    assert tree(output) == before


def test_folder_with_pickles_is_never_touched(output: Path) -> None:
    write_pickles(output, TRAIN, TEST, META)
    before = tree(output)
    with pytest.raises(UserError, match="not written by cifar_dist"):
        prepare("sample", output, force=True)
    assert tree(output) == before


@pytest.mark.parametrize("force", [False, True])
def test_dataset_of_another_program_is_never_touched(
    source: str, output: Path, tmp_path: Path, force: bool
) -> None:
    """`save_to_disk` writes the same files, except the digest."""
    prepare(source, tmp_path / "ours", allow_unofficial=True)
    datasets.load_from_disk(str(tmp_path / "ours")).save_to_disk(str(output))
    before = tree(output)
    with pytest.raises(UserError, match="not written by cifar_dist"):
        prepare(source, output, allow_unofficial=True, force=force)
    assert tree(output) == before
    with pytest.raises(UserError, match="not written by cifar_dist"):
        load_split(output, "test")


def test_caches_and_clutter_of_other_programs_are_ignored(source: str, output: Path) -> None:
    output.mkdir(parents=True)
    (output / ".DS_Store").touch()
    prepare(source, output, allow_unofficial=True)
    for name in (".DS_Store", "train/Thumbs.db", "test/._state.json"):
        (output / name).touch()
    test = datasets.load_from_disk(str(output))["test"]
    test.map(lambda row: {"double": 2 * row["fine_label"]})
    assert list(output.glob("test/cache-*.arrow"))
    prepare(source, output, allow_unofficial=True)
    assert len(load_split(output, "test").labels) == 23
    prepare(source, output, allow_unofficial=True, force=True)
    assert not list(output.glob("test/cache-*.arrow"))


def assert_refused(source: str | None, output: Path, match: str, **options: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        prepare(source, output, **options)
    assert "\n" not in str(caught.value)
    assert not output.parent.exists()


def test_errors_leave_nothing_behind(source: str, output: Path, tmp_path: Path) -> None:
    assert_refused(source, output, "not the official CIFAR-100; .*--allow-unofficial")
    assert_refused(str(tmp_path / "absent"), output, "does not exist", allow_unofficial=True)
    assert_refused("ftp://example.org/a", output, "does not exist", allow_unofficial=True)
    Path(source).write_bytes(ARCHIVE[:5000])
    assert_refused(source, output, "cannot be read", allow_unofficial=True)
    members = pickle_members(TRAIN, TEST, META)
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, data in members.items():
        (folder / name).write_bytes(data)
    (folder / "test").write_bytes(members["train"])
    assert_refused(str(folder), output, "batch_label is not", allow_unofficial=True)
    (folder / "test").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    assert_refused(str(folder), output, r"names os\.system", allow_unofficial=True)
    relabeled = first_rows(TEST, 23)
    relabeled.coarse_labels[:] = (relabeled.coarse_labels + 1) % 20
    (folder / "test").write_bytes(pickle_members(TRAIN, relabeled, META)["test"])
    assert_refused(str(folder), output, "has two coarse classes", allow_unofficial=True)


def recipe_with(path: Path, source: str) -> Recipe:
    return validate({"name": "a", "data": {"path": str(path), "source": source}}, where="here")


def test_errors_name_the_command_or_the_recipe_key_that_helps(
    server: Server, source: str, output: Path, tmp_path: Path
) -> None:
    absent = server.url.replace("small.tar.gz", "absent")
    other_folder = "choose another folder (--output of prepare, data.path of a recipe)"
    for data_source, path, remedy in (
        (
            source,
            output,
            f"`python -m cifar_dist.prepare --allow-unofficial --source {source} --output",
        ),
        (absent, output, f"`python -m cifar_dist.prepare --source FILE --output {output}`"),
        (source, Path(source), other_folder),
        (source, Path(source) / "data", other_folder),
        (str(tmp_path / "no"), output, "(--source of prepare, data.source of a recipe)"),
    ):
        with pytest.raises(UserError, match=re.escape(remedy)):
            ensure_data(recipe_with(path, data_source))


def test_mistyped_data_path_is_refused_with_the_nearest_data(tmp_path: Path, data: Path) -> None:
    shutil.copytree(data, tmp_path / "sample")
    path, typo = tmp_path / "a.yaml", tmp_path / "sampel"
    path.write_text(f"name: a\ndata: {{path: {tmp_path}/sample, source: sample}}")
    assert ensure_data(load_recipe(path, [f"data.path={tmp_path}/sample"]))
    with pytest.raises(UserError) as caught:
        ensure_data(load_recipe(path, [f"data.path={typo}"]))
    assert f"{typo} has no data; did you mean {tmp_path}/sample? If not, run `" in str(caught.value)
    assert f"cifar_dist.prepare --output {typo}`" in str(caught.value)
    assert not typo.exists()


def test_output_that_is_a_file_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for output in (tmp_path / "file", tmp_path / "file" / "data"):
        with pytest.raises(UserError, match=r"not written by cifar_dist|not a folder"):
            prepare(source, output, allow_unofficial=True, force=True)
    assert (tmp_path / "file").read_text() == "text"


def test_temporary_folders_of_killed_processes_are_removed(source: str, output: Path) -> None:
    temporary = output.with_name(f".{output.name}.123.part")
    foreign = output.with_name(f".{output.name}.mine.part")
    for folder in (temporary, foreign):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    prepare(source, output, allow_unofficial=True)
    assert not temporary.exists()
    assert foreign.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_stop_signal_ends_the_wait_for_data(
    output: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setenv("RANK", "1")  # waits for rank 0
    monkeypatch.setattr(signals, "_received", [])
    signals._record(number, None)
    results: list[bool] = []
    thread = threading.Thread(
        target=lambda: results.append(ensure_data(recipe_with(output, "sample"))), daemon=True
    )
    thread.start()
    thread.join(5)
    assert results == [False]


def test_concurrent_processes_write_the_data_once(source: str, output: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from cifar_dist.data.ingest.preparation import prepare;"
        "prepare(sys.argv[1], Path(sys.argv[2]), allow_unofficial=True)"
    )
    command = [sys.executable, "-c", code, source, str(output)]
    folder = Path(__file__).parents[3]
    both = [subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE) for _ in range(2)]
    skipped = sorted("nothing to do" in process.communicate()[0].decode() for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert skipped == [False, True]
    assert list(output.parent.iterdir()) == [output]


def test_command_prints_one_line_on_error_and_succeeds_with_allow_unofficial(
    source: str, tmp_path: Path
) -> None:
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
    """Serves `data`, whole or from an offset, with at most `max_bytes` per response."""

    data, max_bytes, ranges = ARCHIVE, 10**9, True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requested: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/small.tar.gz"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        data, requested = self.server.data, self.headers.get("Range")
        self.server.requested.append(requested)
        start = int(requested[6:-1]) if requested and self.server.ranges else 0
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
            self.wfile.write(data[start : start + self.server.max_bytes])

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


def test_url_is_downloaded(server: Server, output: Path) -> None:
    prepare(server.url, output, allow_unofficial=True)
    assert read_digest(output)["train"]["sha256"] == content_digest(TRAIN, META)
    assert list(output.parent.iterdir()) == [output]


def test_interrupted_download_resumes(server: Server, output: Path) -> None:
    server.max_bytes = len(ARCHIVE) // 3 + 1
    for sent in (server.max_bytes, 2 * server.max_bytes):
        with pytest.raises(UserError, match=r"interrupted after .*; run the command again"):
            prepare(server.url, output, allow_unofficial=True)
        (part,) = output.parent.iterdir()
        assert part.name.endswith(".part")
        assert part.read_bytes() == ARCHIVE[:sent]
    prepare(server.url, output, allow_unofficial=True)
    offsets = [f"bytes={count * server.max_bytes}-" for count in (1, 2)]
    assert server.requested == [None, *offsets]
    assert read_digest(output)["train"]["rows"] == 64
    assert list(output.parent.iterdir()) == [output]


def test_download_restarts_if_the_server_ignores_ranges(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(b"the beginning of something")
    server.ranges = False
    download(server.url, part)
    assert part.read_bytes() == ARCHIVE


def test_complete_part_is_not_downloaded_again(server: Server, tmp_path: Path) -> None:
    part = tmp_path / "part"
    part.write_bytes(ARCHIVE)
    download(server.url, part, md5=hashlib.md5(ARCHIVE).hexdigest())
    assert part.read_bytes() == ARCHIVE
    part.write_bytes(ARCHIVE + b"more than there is")
    download(server.url, part)
    assert part.read_bytes() == ARCHIVE
    assert server.requested[-1] is None


def test_download_with_another_md5_is_refused_and_deleted(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"MD5 differs.*in another way"):
        download(server.url, tmp_path / "part", md5="0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_download_that_is_not_an_archive_is_deleted(server: Server, output: Path) -> None:
    server.data = b"<html>please log in</html>"
    assert_refused(server.url, output, "cannot be read", allow_unofficial=True)


def test_download_larger_than_cifar_is_aborted(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_module, "MAX_ARCHIVE_BYTES", len(ARCHIVE) - 1)
    with pytest.raises(UserError, match="larger than any CIFAR archive"):
        download(server.url, tmp_path / "part")
    assert list(tmp_path.iterdir()) == []


def test_network_errors_are_reported_with_a_remedy(server: Server, output: Path) -> None:
    absent = server.url.replace("small.tar.gz", "absent")
    assert_refused(absent, output, "returns 404 Not Found; .*--source FILE", allow_unofficial=True)
    assert_refused("http://[", output, "cannot be downloaded", allow_unofficial=True)
    with Server() as closed:
        url = closed.url
    assert_refused(url, output, "refused.*--source FILE", allow_unofficial=True)


REAL = os.environ.get("CIFAR100_ARCHIVE")


@pytest.mark.skipif(REAL is None, reason="CIFAR100_ARCHIVE is not set to the official archive")
def test_official_cifar_100(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    prepare(None, output)  # already complete, so nothing is downloaded
    assert "nothing to do" in capsys.readouterr().out
