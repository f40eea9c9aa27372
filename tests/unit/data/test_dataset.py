"""The dataset on disk: `datasets` opens it, pyarrow reads it without a copy, corruption is reported."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from small_data import first_rows, small_data, with_classes

from cifar_dist.data.dataset import (
    DIGEST,
    INFO,
    TABLE,
    class_names,
    content_digest,
    data_digest,
    load_split,
    open_splits,
    read_digest,
    read_hierarchy,
    read_split,
    write_dataset,
)
from cifar_dist.data.ingest.pickles import RawSplit
from cifar_dist.utils.errors import UserError

TRAIN, TEST, META = small_data()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("arrow") / "data"
    write_dataset(root, TRAIN, TEST, META, content="other")
    return root


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "data"))


def test_loaded_data_equal_the_written_data(written: Path) -> None:
    for name, raw in (("train", TRAIN), ("test", TEST)):
        split = load_split(written, name, "cpu")  # type: ignore[arg-type]
        assert split.images.dtype == torch.uint8
        assert split.labels.dtype == torch.int64
        assert torch.equal(split.images, torch.from_numpy(raw.images).view(-1, 3, 32, 32))
        assert torch.equal(split.labels, torch.from_numpy(raw.fine_labels))
    raw_train = read_split(written, "train")
    assert raw_train.filenames == TRAIN.filenames
    assert np.array_equal(raw_train.coarse_labels, TRAIN.coarse_labels)
    assert class_names(written) == tuple(META.fine_label_names)
    digest = read_digest(written)
    assert (digest["content"], digest["train"]["rows"], digest["test"]["rows"]) == ("other", 64, 23)
    assert not [path for path in written.parent.iterdir() if path != written]


@pytest.mark.parametrize("count", [2, 10, 12])
def test_any_number_of_classes_without_superclasses(tmp_path: Path, count: int) -> None:
    datasets = pytest.importorskip("datasets")
    train, test, meta = with_classes(count)
    root = tmp_path / "data"
    write_dataset(root, train, test, meta, content="other")
    assert class_names(root) == read_hierarchy(root).fine == tuple(meta.fine_label_names)
    assert read_hierarchy(root).coarse == ()
    assert load_split(root, "train").labels.max() == count - 1
    assert np.array_equal(read_split(root, "test").fine_labels, test.fine_labels)
    assert read_digest(root)["train"]["sha256"] == content_digest(train, meta)
    assert set(datasets.load_from_disk(root)["train"].features) == {
        "image",
        "fine_label",
        "filename",
    }
    for ask in (class_names, read_hierarchy):
        with pytest.raises(
            UserError, match=r"labels=coarse: .*data has no superclasses; use data\.labels"
        ):
            ask(root, "coarse")
    wrong = replace(train, fine_labels=train.fine_labels + 1)
    write_dataset(root, wrong, test, meta, content="other")
    assert_refused(root, rf"labels outside 0\.\.{count - 1}")


def test_superclasses_are_labels_of_the_same_images(written: Path) -> None:
    fine = load_split(written, "train")
    for coarse in (
        load_split(written, "train", labels="coarse"),
        open_splits(written, "cpu", labels="coarse")[0],
    ):
        assert torch.equal(coarse.labels, read_hierarchy(written).coarse_of_fine[fine.labels])
        assert torch.equal(coarse.images, fine.images)
    hierarchy = read_hierarchy(written, "coarse")
    assert hierarchy.fine == class_names(written, "coarse") == tuple(META.coarse_label_names)
    assert (hierarchy.coarse, hierarchy.coarse_of_fine.tolist()) == ((), [-1] * 20)


def test_datasets_library_opens_it(written: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    opened = datasets.load_from_disk(written)
    assert {name: len(split) for name, split in opened.items()} == {"train": 64, "test": 23}
    features = opened["train"].features
    assert features["image"] == datasets.List(datasets.Value("uint8"), length=3072)
    assert features["fine_label"].names == META.fine_label_names
    assert features["coarse_label"].names == META.coarse_label_names
    row = opened["test"][22]
    assert row["image"] == TEST.images[22].tolist()
    assert row["filename"] == TEST.filenames[22]
    assert row["coarse_label"] == TEST.coarse_labels[22]
    assert opened["train"].data.column("image").num_chunks == 1
    other = tmp_path / "other"
    write_dataset(other, first_rows(TRAIN, 60), TEST, META, content="other")
    reopened = datasets.load_from_disk(other)  # `datasets` keys its caches by the fingerprint
    assert reopened["test"]._fingerprint == opened["test"]._fingerprint
    assert reopened["train"]._fingerprint != opened["train"]._fingerprint


def test_loading_does_not_import_datasets_or_warn(written: Path) -> None:
    code = (
        "import sys, pathlib; from cifar_dist.data.dataset import load_split;"
        f"load_split(pathlib.Path({str(written)!r}), 'train', 'cpu'); assert 'datasets' not in sys.modules"
    )
    folder = Path(__file__).parents[3]
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_images_are_memory_mapped(written: Path) -> None:
    first, second = load_split(written, "train", "cpu"), load_split(written, "train", "cpu")
    allocated = pa.total_allocated_bytes()
    assert first.images.data_ptr() != second.images.data_ptr()  # two mappings of one file
    assert allocated < first.images.nbytes


def test_digest_depends_on_all_content(written: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "copy", TRAIN, TEST, META, content="other")
    assert data_digest(tmp_path / "copy") == data_digest(written)
    digest = content_digest(TRAIN, META)
    images = TRAIN.images.copy()
    images[3, 7] ^= 1
    labels, names = (TRAIN.fine_labels + 1) % 100, [*TRAIN.filenames[1:], TRAIN.filenames[0]]
    others = [
        content_digest(replace(TRAIN, images=images), META),
        content_digest(replace(TRAIN, fine_labels=labels), META),
        content_digest(replace(TRAIN, coarse_labels=TRAIN.coarse_labels + 1), META),
        content_digest(replace(TRAIN, filenames=names), META),
        content_digest(first_rows(TRAIN, 63), META),
        content_digest(TRAIN, replace(META, fine_label_names=META.fine_label_names[::-1])),
    ]
    assert len({digest, *others}) == 7


def test_writing_replaces_the_dataset_atomically(root: Path) -> None:
    (root / "old").write_text("")
    write_dataset(root, TEST, TRAIN, META, content="sample", extra_files={"a/b": b"c"})
    assert read_digest(root)["train"]["rows"] == 23
    assert (root / "a" / "b").read_bytes() == b"c"
    assert not (root / "old").exists()
    broken = replace(TRAIN, filenames=TRAIN.filenames[1:])
    with pytest.raises(pa.ArrowInvalid):
        write_dataset(root, broken, TEST, META, content="other")
    assert read_digest(root)["train"]["rows"] == 23
    assert list(root.parent.iterdir()) == [root]


@pytest.mark.parametrize("text", ['{"train": {"rows": Infinity, "sha256": ""}}', "[" * 200_000])
def test_invalid_digest_is_refused(root: Path, text: str) -> None:
    (root / "digest.json").write_text(text)
    with pytest.raises(UserError, match=r"digest\.json"):
        read_digest(root)


def assert_refused(root: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_split(root, "train", "cpu")
    assert "\n" not in str(caught.value)
    assert f"python -m cifar_dist.prepare --force --output {root}" in str(caught.value)


def table(root: Path) -> Path:
    return root / "train" / TABLE


def test_flipped_bit_in_any_column_is_detected(root: Path) -> None:
    whole = table(root).read_bytes()
    positions = (
        whole.index(TRAIN.images.tobytes()) + 5,
        whole.index(TRAIN.fine_labels.tobytes()),
        whole.index(TRAIN.coarse_labels.tobytes()),
        whole.index(TRAIN.filenames[0].encode()),
    )
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1
        table(root).write_bytes(damaged)
        assert_refused(root, "does not match its SHA-256 digest")


def test_open_splits_detects_damage_in_the_final_check(root: Path) -> None:
    train, test, check = open_splits(root, "cpu")
    check()
    for split, name in (train, "train"), (test, "test"):
        assert torch.equal(split.images, load_split(root, name).images)  # type: ignore[arg-type]
        assert torch.equal(split.labels, load_split(root, name).labels)  # type: ignore[arg-type]
    damaged = bytearray(table(root).read_bytes())
    damaged[damaged.index(TRAIN.images.tobytes()) + 5] ^= 1
    table(root).write_bytes(damaged)
    _, _, check = open_splits(root, "cpu")
    with pytest.raises(UserError, match="does not match its SHA-256 digest"):
        check()


def test_flipped_bits_outside_the_pixels_are_detected_or_harmless(root: Path) -> None:
    whole, rng = table(root).read_bytes(), random.Random(0)
    pixels = whole.index(TRAIN.images.tobytes())
    positions = [p for p in range(len(whole)) if not pixels <= p < pixels + TRAIN.images.size]
    detected = 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[rng.choice(positions)] ^= 1 << rng.randrange(8)
        table(root).write_bytes(damaged)
        try:
            raw: RawSplit = read_split(root, "train")
        except UserError:
            detected += 1
        else:
            assert np.array_equal(raw.images, TRAIN.images)
            assert np.array_equal(raw.fine_labels, TRAIN.fine_labels)
            assert raw.filenames == TRAIN.filenames
    assert detected > 100


def test_truncated_file_is_refused(root: Path) -> None:
    whole = table(root).read_bytes()
    for length in (0, 3, 100, 1000, len(whole) // 2, len(whole) - 4000):
        table(root).write_bytes(whole[:length])
        assert_refused(root, TABLE)


@pytest.mark.parametrize("name", [f"train/{TABLE}", f"train/{INFO}"])
def test_missing_file_is_named(root: Path, name: str) -> None:
    (root / name).unlink()
    assert_refused(root, f"{name}: is missing")


@pytest.mark.parametrize("name", [f"train/{INFO}", DIGEST])
@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "null", '{"features": 3, "train": 3}'])
def test_damaged_json_is_named(root: Path, name: str, text: str) -> None:
    (root / name).write_text(text)
    assert_refused(root, name)


def test_reordered_class_names_are_detected(root: Path) -> None:
    info = json.loads((root / "train" / INFO).read_text())
    info["features"]["fine_label"]["names"].reverse()
    (root / "train" / INFO).write_text(json.dumps(info))
    assert_refused(root, "does not match its SHA-256 digest")


def rewrite(root: Path, columns: dict[str, pa.Array] | None = None, chunk: int = 64) -> None:
    with pa.ipc.open_stream(table(root).read_bytes()) as reader:
        data = reader.read_all()
    for name, column in (columns or {}).items():
        data = data.set_column(data.column_names.index(name), name, column)
    with pa.ipc.new_stream(table(root), data.schema) as writer:
        writer.write_table(data, max_chunksize=chunk)


def test_tables_with_other_chunks_values_or_types_are_refused(root: Path) -> None:
    whole = table(root).read_bytes()
    rewrite(root)
    load_split(root, "train", "cpu")  # another encoding of the same content is accepted
    rewrite(root, chunk=10)
    assert_refused(root, "has 7 record batches instead of one")
    for column, match in (
        (pa.array([*TRAIN.fine_labels[:-1], None]), "has null values"),
        (pa.array(["x"] * 64), "fine|parse|string"),
        (pa.array(TRAIN.fine_labels[::-1].copy()), "does not match"),
    ):
        table(root).write_bytes(whole)
        rewrite(root, {"fine_label": column})
        assert_refused(root, match)
    table(root).write_bytes(whole)
    rewrite(root, {"image": pa.array(TRAIN.images.tolist(), pa.list_(pa.uint8()))})
    assert_refused(root, "has images of type list")


def test_missing_row_is_detected(root: Path) -> None:
    with pa.ipc.open_stream(table(root).read_bytes()) as reader:
        data = reader.read_all().slice(0, 63)
    with pa.ipc.new_stream(table(root), data.schema) as writer:
        writer.write_table(data)
    assert_refused(root, "has 63 rows instead of 64")


def test_labels_out_of_range_are_refused_despite_a_valid_digest(tmp_path: Path) -> None:
    wrong = replace(TRAIN, fine_labels=TRAIN.fine_labels + 100)
    write_dataset(tmp_path / "data", wrong, TEST, META, content="other")
    assert_refused(tmp_path / "data", r"labels outside 0\.\.99")
