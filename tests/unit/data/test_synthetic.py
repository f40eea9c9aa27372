"""Synthetic data: deterministic, with the structure of CIFAR-100 and recognizable classes."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from small_data import write_pickles

from cifar_dist.data.dataset import content_digest
from cifar_dist.data.ingest.archive import read_members
from cifar_dist.data.ingest.pickles import check_hierarchy, read_meta, read_pickle
from cifar_dist.data.ingest.synthetic import COLORS, SHAPES, draw_synthetic

TRAIN, TEST, META = draw_synthetic(train_per_class=6, test_per_class=2)
FIRST_NAME = "yellow_star_s_000000.png"
FIRST_PIXELS = [134, 93, 127, 128, 146, 104, 143, 121, 133, 145, 245, 147, 134, 163, 222, 127, 83, 92, 93, 120, 119, 116, 103, 84, 134, 137, 255, 109, 136, 129, 241, 133, 128, 99, 114, 131, 129, 115, 139, 130, 128, 127, 60, 112, 142, 145, 50, 125]  # fmt: skip


def test_data_has_the_structure_of_cifar() -> None:
    assert TRAIN.images.shape == (600, 3072)
    assert TEST.images.shape == (200, 3072)
    assert TRAIN.images.dtype == np.uint8
    assert np.bincount(TRAIN.fine_labels, minlength=100).tolist() == [6] * 100
    assert np.bincount(TEST.fine_labels, minlength=100).tolist() == [2] * 100
    assert np.bincount(TRAIN.coarse_labels, minlength=20).tolist() == [30] * 20
    check_hierarchy(TRAIN, TEST)
    assert (len(set(META.fine_label_names)), len(set(META.coarse_label_names))) == (100, 20)
    assert (np.diff(TRAIN.fine_labels) < 0).any()  # shuffled


def test_data_depends_on_the_arguments_only() -> None:
    same = draw_synthetic(train_per_class=6, test_per_class=2)
    other = draw_synthetic(train_per_class=6, test_per_class=2, seed=1)
    assert content_digest(same[0], META) == content_digest(TRAIN, META)
    assert content_digest(same[1], META) == content_digest(TEST, META)
    assert not np.array_equal(other[0].images, TRAIN.images)
    images = {image.tobytes() for image in np.concatenate([TRAIN.images, TEST.images])}
    assert len(images) == 800


def test_first_image_has_not_changed() -> None:
    assert TRAIN.filenames[0] == FIRST_NAME
    assert TRAIN.images[0].reshape(3, 32, 32)[:, ::8, ::8].reshape(-1).tolist() == FIRST_PIXELS


def test_shapes_have_the_color_of_their_class() -> None:
    squares = TRAIN.fine_labels // 10 == list(SHAPES).index("square")
    images = TRAIN.images[squares].reshape(-1, 3, 32, 32).astype(float) / 255
    distance = np.abs(images[:, None] - np.array(list(COLORS.values()))[None, :, :, None, None])
    matches = (distance.max(axis=2) < 0.3).sum(axis=(2, 3))  # pixels close to each of ten colors
    of_class = matches[np.arange(len(matches)), TRAIN.fine_labels[squares] % 10]
    assert (of_class > 30).mean() > 0.9
    assert len(COLORS) == len(SHAPES) == 10


def test_written_pickles_can_be_read(tmp_path: Path) -> None:
    write_pickles(tmp_path, TRAIN, TEST, META)
    assert sorted(p.name for p in (tmp_path / "cifar-100-python").iterdir()) == [
        "meta",
        "test",
        "train",
    ]
    _, members = read_members(tmp_path)
    meta = read_meta(io.BytesIO(members["meta"]))
    for name, raw in (("train", TRAIN), ("test", TEST)):
        result = read_pickle(io.BytesIO(members[name]), name, meta)
        assert content_digest(result, meta) == content_digest(raw, META)
