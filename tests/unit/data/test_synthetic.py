"""The drawn sample: the same pictures each time, the structure of CIFAR-100, classes worth learning."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from cifar_dist.data.dataset import content_digest
from cifar_dist.data.ingest.archive import read_members
from cifar_dist.data.ingest.pickles import check_hierarchy, read_meta, read_pickle
from cifar_dist.data.ingest.synthetic import COLOURS, SHAPES, draw_synthetic, write_pickles

TRAIN, TEST, META = draw_synthetic(train_per_class=6, test_per_class=2)
FIRST_NAME = "yellow_star_s_000000.png"
FIRST_PIXELS = [134, 93, 127, 128, 146, 104, 143, 121, 133, 145, 245, 147, 134, 163, 222, 127, 83, 92, 93, 120, 119, 116, 103, 84, 134, 137, 255, 109, 136, 129, 241, 133, 128, 99, 114, 131, 129, 115, 139, 130, 128, 127, 60, 112, 142, 145, 50, 125]  # fmt: skip


def test_it_has_the_structure_of_cifar() -> None:
    assert TRAIN.images.shape == (600, 3072)
    assert TEST.images.shape == (200, 3072)
    assert TRAIN.images.dtype == np.uint8
    assert np.bincount(TRAIN.fine_labels, minlength=100).tolist() == [6] * 100
    assert np.bincount(TEST.fine_labels, minlength=100).tolist() == [2] * 100
    assert np.bincount(TRAIN.coarse_labels, minlength=20).tolist() == [30] * 20
    check_hierarchy(TRAIN, TEST)
    assert (len(set(META.fine_label_names)), len(set(META.coarse_label_names))) == (100, 20)
    assert (np.diff(TRAIN.fine_labels) < 0).any()  # shuffled


def test_it_depends_on_its_arguments_alone() -> None:
    again = draw_synthetic(train_per_class=6, test_per_class=2)
    other = draw_synthetic(train_per_class=6, test_per_class=2, seed=1)
    assert content_digest(again[0], META) == content_digest(TRAIN, META)
    assert content_digest(again[1], META) == content_digest(TEST, META)
    assert not np.array_equal(other[0].images, TRAIN.images)
    rows = {image.tobytes() for image in np.concatenate([TRAIN.images, TEST.images])}
    assert len(rows) == 800  # no picture of test is one of train


def test_a_known_picture_stays_as_it_is() -> None:
    assert TRAIN.filenames[0] == FIRST_NAME
    assert TRAIN.images[0].reshape(3, 32, 32)[:, ::8, ::8].reshape(-1).tolist() == FIRST_PIXELS


def test_the_colours_are_where_the_shapes_are() -> None:
    names = list(COLOURS)
    squares = TRAIN.fine_labels // 10 == list(SHAPES).index("square")
    images = TRAIN.images[squares].reshape(-1, 3, 32, 32).astype(float) / 255
    near = np.abs(images[:, None] - np.array(list(COLOURS.values()))[None, :, :, None, None])
    hits = (near.max(axis=2) < 0.3).sum(axis=(2, 3))  # pixels close to each of the ten colours
    own = hits[np.arange(len(hits)), TRAIN.fine_labels[squares] % 10]
    assert (own > 30).mean() > 0.9
    assert len(names) == len(SHAPES) == 10


def test_its_pickles_read_back(tmp_path: Path) -> None:
    write_pickles(tmp_path, TRAIN, TEST, META)
    assert sorted(p.name for p in (tmp_path / "cifar-100-python").iterdir()) == [
        "meta",
        "test",
        "train",
    ]
    members = read_members(tmp_path)
    meta = read_meta(io.BytesIO(members["meta"]))
    for name, raw in (("train", TRAIN), ("test", TEST)):
        back = read_pickle(io.BytesIO(members[name]), name)  # type: ignore[arg-type]
        assert content_digest(back, meta) == content_digest(raw, META)
