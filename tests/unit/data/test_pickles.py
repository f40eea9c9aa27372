"""Untrusted pickles and archives: CIFAR's structure is read, everything else is refused unexecuted."""

from __future__ import annotations

import gzip
import hashlib
import io
import lzma
import os
import pickle
import random
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from small_data import cifar_10_members, first_rows, small_data, with_classes

from cifar_dist.data.ingest import archive, safe_pickle
from cifar_dist.data.ingest.archive import CIFAR_10, CIFAR_100, DATASETS, Published, read_members
from cifar_dist.data.ingest.pickles import BATCH_LABELS, RawSplit, read_meta, read_pickle
from cifar_dist.data.ingest.synthetic import pickle_members
from cifar_dist.utils.errors import UserError

TRAIN, TEST, META = small_data()
MEMBERS = pickle_members(TRAIN, TEST, META)
TINY = first_rows(TRAIN, 2)
MUTANTS = 1667  # for each of six protocols: 10,000 in total
EVENTS: list[str] = []
WATCHING = False


def _watch(event: str, arguments: tuple[Any, ...]) -> None:
    if WATCHING:
        EVENTS.append(f"{event} {arguments!r:.80}")


sys.addaudithook(_watch)


def read(data: bytes, split: str = "train") -> RawSplit:
    return read_pickle(io.BytesIO(data), split, META)


def labels_of(raw: RawSplit) -> dict[bytes, list[int]]:
    """Return the labels as in a file of CIFAR-100, or of CIFAR-10 without superclasses."""
    fine, coarse = raw.fine_labels.tolist(), raw.coarse_labels.tolist()
    return {b"fine_labels": fine, b"coarse_labels": coarse} if coarse else {b"labels": fine}


def fields(raw: RawSplit, file: str = "train", **overrides: Any) -> dict[Any, Any]:
    return {
        b"filenames": [name.encode() for name in raw.filenames],
        b"batch_label": BATCH_LABELS[file].encode(),
        **labels_of(raw),
        b"data": np.array(raw.images),
    } | {key.encode(): value for key, value in overrides.items()}


def same(one: RawSplit, other: RawSplit) -> bool:
    arrays = ("images", "fine_labels", "coarse_labels")
    return one.filenames == other.filenames and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays
    )


def python2(raw: RawSplit, protocol: int, file: str = "train") -> bytes:
    """Return a pickle as numpy 1 under Python 2 wrote it, with byte strings as source or by length."""

    def text(value: bytes) -> bytes:
        if protocol == 0:
            return b"S" + repr(value)[1:].encode() + b"\n"
        short = b"U" + bytes([len(value)]) if len(value) < 256 else None
        return (short or b"T" + len(value).to_bytes(4, "little")) + value

    def integer(value: int) -> bytes:
        if protocol == 0:
            return b"I%d\n" % value
        return (
            b"K%c" % value if 0 <= value < 256 else b"J" + value.to_bytes(4, "little", signed=True)
        )

    def items(values: list[bytes]) -> bytes:
        return (
            b"(l" + b"".join(v + b"a" for v in values)
            if protocol == 0
            else b"](" + b"".join(values) + b"e"
        )

    rows, columns = raw.images.shape
    dtype = b"cnumpy\ndtype\n(" + text(b"u1") + integer(0) + integer(1) + b"tR("
    dtype += integer(3) + text(b"|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
    matrix = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(" + integer(0) + b"t"
    matrix += text(b"b") + b"tR(" + integer(1) + b"(" + integer(rows) + integer(columns) + b"t"
    matrix += dtype + b"I00\n" + text(raw.images.tobytes()) + b"tb"
    values = {
        b"data": matrix,
        b"batch_label": text(BATCH_LABELS[file].encode()),
        **{
            name: items([integer(label) for label in labels])
            for name, labels in labels_of(raw).items()
        },
        b"filenames": items([text(name.encode()) for name in raw.filenames]),
    }
    pairs = [text(key) + value for key, value in values.items()]
    if protocol == 0:
        return b"(dp0\n" + b"".join(pair + b"s" for pair in pairs) + b"."
    return b"\x80\x02}q\x01(" + b"".join(pairs) + b"u."


@pytest.mark.parametrize("protocol", range(6))
def test_every_protocol_reads_back(protocol: int) -> None:
    data = pickle.dumps(fields(TRAIN), protocol=protocol)
    assert same(read(data), TRAIN)
    for module in (b"numpy._core.multiarray", b"numpy._core.numeric"):  # names in numpy 1
        older = module.replace(b"_core", b"core")
        data = data.replace(b"%c%b" % (len(module), module), b"%c%b" % (len(older), older))
        data = data.replace(module, older)
    assert b"numpy._core" not in data
    assert same(read(data), TRAIN)
    text_keys = {key.decode(): value for key, value in fields(TRAIN).items()}
    assert same(read(pickle.dumps(text_keys, protocol=protocol)), TRAIN)


@pytest.mark.parametrize("protocol", [0, 2])
def test_python_2_reads_back(protocol: int) -> None:
    data = python2(TRAIN, protocol)
    oracle = pickle.loads(data, encoding="bytes")
    assert np.array_equal(oracle[b"data"], TRAIN.images)
    assert same(read(data), TRAIN)


def test_meta_reads_back() -> None:
    assert read_meta(io.BytesIO(MEMBERS["meta"])) == META


TRAIN_10, TEST_10, META_10 = with_classes(10)
# The published batches.meta, byte for byte, as Python 2 wrote it.
OFFICIAL_META_10 = (
    b"\x80\x02}q\x01(U\x13num_cases_per_batchq\x02M\x10'U\x0blabel_namesq\x03]q\x04(U\x08airplaneq\x05"
    b"U\nautomobileq\x06U\x04birdq\x07U\x03catq\x08U\x04deerq\tU\x03dogq\nU\x04frogq\x0bU\x05horseq\x0c"
    b"U\x04shipq\rU\x05truckq\x0eeU\x07num_visq\x0fM\x00\x0cu."
)


def read_10(data: bytes, file: str = "data_batch_2") -> RawSplit:
    return read_pickle(io.BytesIO(data), file, META_10)


def test_official_meta_of_cifar_10_reads_back() -> None:
    assert hashlib.md5(OFFICIAL_META_10).hexdigest() == CIFAR_10.md5["batches.meta"]
    meta = read_meta(io.BytesIO(OFFICIAL_META_10), "batches.meta")
    names = "airplane automobile bird cat deer dog frog horse ship truck"
    assert meta.fine_label_names == names.split()
    assert meta.coarse_label_names == []


@pytest.mark.parametrize("protocol", range(6))
def test_cifar_10_reads_back(protocol: int) -> None:
    content = fields(TRAIN_10, "data_batch_2")
    assert same(read_10(pickle.dumps(content, protocol=protocol)), TRAIN_10)
    if protocol in (0, 2):
        data = python2(TRAIN_10, protocol, "data_batch_2")
        assert pickle.loads(data, encoding="bytes").keys() == content.keys()
        assert same(read_10(data), TRAIN_10)


TINY_10 = first_rows(TRAIN_10, 2)
WRONG_10 = {
    "another batch": (fields(TINY_10, "data_batch_1"), "batch_label is not 'training batch 2 of 5'"),
    "CIFAR-100's keys": (fields(TINY) | {b"batch_label": b"training batch 2 of 5"}, "with the keys"),
    "a label of 10": (fields(TINY_10, "data_batch_2", labels=[0, 10]), "labels contains values outside 0..9"),
    "a label of -1": (fields(TINY_10, "data_batch_2", labels=[0, -1]), "outside 0..9"),
    "a missing label": (fields(TINY_10, "data_batch_2", labels=[0]), "numbers of images, labels and"),
    "no rows": (fields(first_rows(TRAIN_10, 0), "data_batch_2", labels=[]), "rows of 3072 bytes"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_10)
def test_other_content_is_not_cifar_10(name: str) -> None:
    value, reason = WRONG_10[name]
    with pytest.raises(UserError, match=reason) as caught:
        read_10(pickle.dumps(value, protocol=4))
    assert str(caught.value).startswith("the data_batch_2 pickle is invalid: ")
    assert str(caught.value).endswith("; use the official CIFAR-10 files")


def test_hostile_pickles_are_refused_as_cifar_10_too() -> None:
    global WATCHING
    read_10(python2(TINY_10, 0, "data_batch_2"))  # triggers what Python itself imports on first use
    EVENTS.clear()
    accepted = []
    cases = hostile(TINY_10, "data_batch_2")
    for slow in ("a million lists", "deep nesting"):  # the interpreter is the same
        del cases[slow]
    for name, data in cases.items():
        WATCHING = True
        try:
            read_10(data)
            accepted.append(name)
        except UserError:
            continue
        finally:
            WATCHING = False
    assert (accepted, EVENTS) == ([], [])


class Call:
    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def hostile(tiny: RawSplit, file: str = "train") -> dict[str, bytes]:
    """Return damaged, hostile and wrong variants of a valid pickle by name."""

    def content(**overrides: Any) -> dict[Any, Any]:
        return fields(tiny, file, **overrides)

    def stream(body: bytes) -> bytes:
        return b"\x80\x02" + body + b"."

    def with_data(value: Any, protocol: int = 2) -> bytes:
        return pickle.dumps(content(data=value), protocol=protocol)

    good = python2(tiny, 2, file)
    images = np.array(tiny.images)
    huge = (2**40).to_bytes(8, "little")
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\0tU\x01btR"
    cases = {
        "os.system": with_data(Call(os.system, "touch /tmp/owned")),
        "os.system, protocol 4": with_data(Call(os.system, "touch /tmp/owned"), 4),
        "posix.system": stream(b"cposix\nsystem\n(U\x05touchtR"),
        "eval": with_data(Call(eval, "open('/tmp/owned', 'w')")),
        "exec": stream(b"c__builtin__\nexec\n(U\x04passtR"),
        "exec, Python 3": stream(b"cbuiltins\nexec\n(U\x04passtR"),
        "getattr": with_data(Call(getattr, "", "join")),
        "getattr of a module": stream(b"cbuiltins\ngetattr\n(cos\nsystem\nU\x08__call__tR"),
        "import": with_data(Call(__import__, "antigravity")),
        "open": with_data(Call(open, "/tmp/owned", "w")),
        "numpy runs strings": stream(b"cnumpy.testing._private.utils\nrunstring\n(U\x04pass}tR"),
        "numpy.load": stream(b"cnumpy\nload\n(U\x04/tmptR"),
        "numpy.memmap": stream(b"cnumpy\nmemmap\n(U\x0a/etc/passwdtR"),
        "numpy.fromfile": stream(b"cnumpy\nfromfile\n(U\x0a/etc/passwdtR"),
        "a dotted name": pickle.dumps(0, protocol=4)[:2] + b"\x8c\x05numpy\x8c\x0fdtype.__class__\x93.",
        "a name below a name": stream(b"cnumpy\ndtype.type\n(tR"),
        "another codec": stream(b"c_codecs\nencode\n(X\x01\0\0\0aX\x05\0\0\0rot13tR"),
        "codecs.open": stream(b"ccodecs\nopen\n(X\x04\0\0\0/tmptR"),
        "decode": stream(b"c_codecs\ndecode\n(U\x01aU\x03hextR"),
        "encode called through NEWOBJ": stream(b"c_codecs\nencode\n(X\x01\0\0\0at\x81"),
        "persistent id": stream(b"U\x01aQ"),
        "persistent id, protocol 0": b"Pos.system\n.",
        "extension 1": stream(b"\x82\x01"),
        "extension 2": stream(b"\x83\x01\x00"),
        "extension 4": stream(b"\x84\x01\0\0\0"),
        "INST": b"(S'touch /tmp/owned'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'touch /tmp/owned'\no.",
        "OBJ of a known name": stream(b"(cnumpy\nndarray\nK\x01o"),
        "NEWOBJ": stream(b"cnumpy\nndarray\n(K\x01t\x81"),
        "NEWOBJ_EX": b"\x80\x04cnumpy\nndarray\n)}\x92.",
        "BUILD with __setstate__": stream(array + b"}U\x0c__setstate__cos\nsystem\nsb"),
        "BUILD with a dict": stream(array + b"}U\x06pixelsU\x01asb"),
        "BUILD of a name": stream(b"cnumpy\nndarray\n}U\x08__dict__U\x01asb"),
        "BUILD with slots": stream(array + b"N}U\x01aU\x01bs\x86b"),
        "dtype with a state": stream(b"cnumpy\ndtype\n(U\x02u1K\0K\x01tR(K\x04U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0}tb"),
        "a buffer from outside": b"\x80\x05\x97.",
        "a read-only buffer": b"\x80\x05C\x01a\x98.",
        "objects": with_data(images.astype(object)),
        "objects, protocol 5": with_data(images.astype(object), 5),
        "float32": with_data(images.astype(np.float32)),
        "int8": with_data(images.astype(np.int8)),
        "records": with_data(np.zeros(2, dtype=[("a", "u1")])),
        "Fortran order": with_data(np.asfortranarray(images)),
        "Fortran order, protocol 5": with_data(np.asfortranarray(images), 5),
        "Fortran flag": good.replace(b"I00\n", b"I01\n"),
        "images in four dimensions": with_data(images.reshape(-1, 3, 32, 32)),
        "one dimension": with_data(images.reshape(-1)),
        "too narrow": with_data(images[:, :3071]),
        "no rows": pickle.dumps(fields(first_rows(TRAIN, 0)), protocol=2),
        "a short buffer": good.replace(b"K\x02M", b"K\x03M").replace(b"K\x02J", b"K\x03J"),
        "a negative shape": good.replace(b"(K\x02J", b"(J\xfe\xff\xff\xffJ"),
        "an array without state": good[: good.index(b"(K\x01(K\x02")] + good[good.index(b"tbU\x0b") + 2 :],
        "a matrix built twice": good.replace(b"tbU\x0bbatch", b"tb" + b"(tbU\x0bbatch"),
        "a list for data": with_data(images.tolist()),
        "bytes for data": with_data(images.tobytes()),
        "a huge BINBYTES8": b"\x80\x04\x8e" + huge + b"abc.",
        "a huge BYTEARRAY8": b"\x80\x05\x96" + huge + b"abc.",
        "a huge BINUNICODE8": b"\x80\x04\x8d" + huge + b"abc.",
        "a negative BINSTRING": stream(b"T\xff\xff\xff\xffabc"),
        "a huge frame": b"\x80\x04\x95" + huge + b"N.",
        "a huge memo": stream(b"Nr\xff\xff\xff\xff"),
        "a huge integer": b"I" + b"9" * 100_000 + b"\n.",
        "a text encoded again and again": stream(
            b"X\xff\0\0\0" + b"a" * 255 + b"q\0" + b"c_codecs\nencode\n(h\0X\x06\0\0\0latin1tR" * 1000
        ),
        "a million lists": stream(b"]" * 3_000_000),
        "deep nesting": stream(b"N" + b"\x85" * 1_000_000),
        "a list inside itself": stream(b"]q\0h\0a"),
        "data after the end": good + b"cos\nsystem\n(U\x01atR.",
        "two values": stream(b"N" + good[2:-1]),
        "an open mark": stream(b"(" + good[2:-1]),
        "no end": good[:-1],
        "nothing": b"",
        "not a pickle": b"\x1f\x8b hello",
        "an empty stack": b"\x80\x02.",
        "an unknown memo": stream(b"h\x07"),
        "a float": stream(b"G" + b"\0" * 8),
        "a set": pickle.dumps({1, 2}, protocol=4),
        "EMPTY_SET": b"\x80\x04\x8f.",
        "FROZENSET": b"\x80\x04(\x91.",
        "POP": stream(b"N0" + good[2:-1]),
        "POP_MARK": stream(b"(1" + good[2:-1]),
        "DUP": stream(b"N2" + good[2:-1]),
        "PERSID": good[:2] + b"Pos.system\n" + good[2:],
        "SETITEM of a list": stream(b"]U\x01aNs"),
        "SETITEM of a repeated key": stream(b"}U\x01aNsU\x01aNs"),
        "SETITEM without a value": stream(b"}s"),
        "a list": pickle.dumps([content()], protocol=2),
        "an extra key": pickle.dumps(content(more=1), protocol=2),
        "a repeated key": good[:-2] + b"U\x0bbatch_labelU\x15training batch 1 of 1u.",
        "a number as key": pickle.dumps({1: 2}, protocol=2),
        "a list as key": stream(b"}]Ns"),
        "test for train": MEMBERS["test"],
        "meta for train": MEMBERS["meta"],
        "a fine label of 100": pickle.dumps(content(fine_labels=[0, 100]), protocol=2),
        "a fine label of -1": pickle.dumps(content(fine_labels=[0, -1]), protocol=2),
        "a coarse label of 20": pickle.dumps(content(coarse_labels=[0, 20]), protocol=2),
        "a missing label": pickle.dumps(content(fine_labels=[1]), protocol=2),
        "an extra label": pickle.dumps(content(coarse_labels=[1, 1, 1]), protocol=2),
        "labels of bool": pickle.dumps(content(fine_labels=[True, False]), protocol=2),
        "labels of text": pickle.dumps(content(fine_labels=["1", "2"]), protocol=2),
        "labels as an array": pickle.dumps(content(fine_labels=np.array([1, 2])), protocol=2),
        "labels as a matrix": pickle.dumps(content(fine_labels=images), protocol=2),
        "two superclasses": pickle.dumps(content(fine_labels=[5, 5], coarse_labels=[1, 2]), protocol=2),
        "a missing filename": pickle.dumps(content(filenames=[b"a"]), protocol=2),
        "filenames of numbers": pickle.dumps(content(filenames=[1, 2]), protocol=2),
        "a lone surrogate, protocol 0": pickle.dumps(content(filenames=["\ud800", "a"]), protocol=0),
        "a lone surrogate, protocol 2": pickle.dumps(content(filenames=["\ud800", "a"]), protocol=2),
        "a filename that is not a text": pickle.dumps(content(filenames=[b"\xff", b"a"]), protocol=2),
    }  # fmt: skip
    for key in (b"data", b"filenames", *labels_of(tiny)):
        others = {name: value for name, value in content().items() if name != key}
        cases[f"no {key.decode()}"] = pickle.dumps(others, protocol=2)
    return cases


HOSTILE = hostile(TINY)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused_without_executing_code(name: str) -> None:
    global WATCHING
    read(python2(TINY, 0))  # triggers what Python itself imports on first use
    EVENTS.clear()
    started = time.process_time()
    error = ""
    WATCHING = True
    try:
        read(HOSTILE[name])
    except UserError as raised:
        error = str(raised)
    finally:
        WATCHING = False
    assert error.startswith("the train pickle is invalid: ")
    assert "\n" not in error
    assert EVENTS == []
    assert time.process_time() - started < 5
    assert not Path("/tmp/owned").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a text encoded again and again", "encodes more text than it contains"),
        ("a million lists", "too many opcodes"),
        ("a repeated key", "repeated key"),
        ("a huge BYTEARRAY8", "truncated"),
        ("Fortran flag", "not a uint8 matrix in C order"),
        ("an array without state", "does not have rows of 3072 bytes"),
        ("a lone surrogate, protocol 0", "surrogates not allowed"),
        ("EMPTY_SET", r"opcode b'\\x8f' does not occur"),
        ("POP_MARK", "opcode b'1' does not occur"),
        ("PERSID", "opcode b'P' does not occur"),
        ("SETITEM of a list", "repeated key or a key that is not a text"),
    ],
)
def test_error_names_the_reason(name: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        read(HOSTILE[name])


def test_hostile_pickles_differ_from_the_valid_pickle_they_derive_from() -> None:
    """The original is valid, so each case fails because of its modification."""
    assert len(HOSTILE) >= 31
    assert same(read(python2(TINY, 2)), TINY)
    assert python2(TINY, 2) not in HOSTILE.values()


def test_audit_hook_detects_the_lookups_of_pickle_load() -> None:
    global WATCHING
    EVENTS.clear()
    WATCHING = True
    try:
        pickle.loads(b"cbuiltins\neval\n(S'1 + 1'\ntR.")
    finally:
        WATCHING = False
    assert any(event.startswith("pickle.find_class") for event in EVENTS)


@pytest.mark.parametrize("key", ["fine_label_names", "coarse_label_names"])
@pytest.mark.parametrize(
    "names", [[], ["a"], ["a"] * 100, ["a"] * 20, [*map(str, range(100)), ""], 7]
)
def test_wrong_meta_is_refused(key: str, names: Any) -> None:
    value = {
        "fine_label_names": META.fine_label_names,
        "coarse_label_names": META.coarse_label_names,
    }
    with pytest.raises(UserError, match="the meta pickle is invalid"):
        read_meta(io.BytesIO(pickle.dumps(value | {key: names}, protocol=2)))


@pytest.mark.parametrize("protocol", range(6))
def test_mutated_pickles_are_valid_or_refused_and_execute_nothing(protocol: int) -> None:
    """The audit hook also detects imports and name lookups."""
    global WATCHING
    data = pickle.dumps(fields(TINY), protocol=protocol) if protocol != 1 else python2(TINY, 0)
    pixels = TINY.images.tobytes()[:64]
    start = data.find(pixels)
    in_pixels = range(start, start + TINY.images.size) if start >= 0 else range(0)
    positions = [position for position in range(len(data)) if position not in in_pixels]
    rng, valid = random.Random(protocol), 0
    read(data)  # triggers what Python itself imports on first use
    EVENTS.clear()
    for _ in range(MUTANTS):
        mutant = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 5])):
            position = min(rng.choice(positions), len(mutant) - 1)
            match rng.randrange(4):
                case 0:
                    mutant[position] ^= 1 << rng.randrange(8)
                case 1:
                    mutant[position] = rng.randrange(256)
                case 2:
                    del mutant[position : position + rng.randrange(1, 9)]
                case 3:
                    mutant[position:position] = rng.randbytes(rng.randrange(1, 5))
        WATCHING = True
        try:
            raw = read(bytes(mutant))
        except UserError:
            continue
        finally:
            WATCHING = False
        valid += 1
        assert raw.images.shape == (len(raw.filenames), 3072)
        assert raw.images.dtype == np.uint8
        assert 0 <= raw.fine_labels.min() <= raw.fine_labels.max() < 100
        assert 0 <= raw.coarse_labels.min() <= raw.coarse_labels.max() < 20
    assert EVENTS == []
    assert valid < 0.6 * MUTANTS


def entry(
    name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, link
    return info


def write_archive(path: Path, *extra: tarfile.TarInfo, without: str = "", prefix: str = "") -> Path:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in MEMBERS.items():
            if name != without:
                tar.addfile(entry(f"{prefix}cifar-100-python/{name}", len(data)), io.BytesIO(data))
        for info in extra:
            tar.addfile(info, io.BytesIO(b"x" * info.size))
    pack = {".gz": gzip.compress, ".xz": lzma.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(packed.getvalue()))  # type: ignore[operator]
    return path


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tar.xz"])
@pytest.mark.parametrize("prefix", ["", "./"])
def test_archives_are_read(tmp_path: Path, name: str, prefix: str) -> None:
    published, members = read_members(write_archive(tmp_path / name, prefix=prefix))
    assert (published, members) == (CIFAR_100, MEMBERS)
    assert not published.is_official(members)


def test_folders_are_read(tmp_path: Path) -> None:
    inner = tmp_path / "cifar-100-python"
    inner.mkdir()
    for name, data in MEMBERS.items():
        (inner / name).write_bytes(data)
    assert read_members(tmp_path) == read_members(inner) == (CIFAR_100, MEMBERS)
    (inner / "meta").unlink()
    with pytest.raises(UserError, match="meta is missing"):
        read_members(inner)


ATTACKS = {
    "a symbolic link": entry("cifar-100-python/test", kind=tarfile.SYMTYPE, link="/etc/passwd"),
    "a hard link": entry("cifar-100-python/test", kind=tarfile.LNKTYPE, link="cifar-100-python/train"),
    "a device": entry("cifar-100-python/test", kind=tarfile.CHRTYPE),
    "a pipe": entry("cifar-100-python/test", kind=tarfile.FIFOTYPE),
    "a folder": entry("cifar-100-python/test", kind=tarfile.DIRTYPE),
    "an absolute name": entry("/cifar-100-python/test", 10),
    "a name with ..": entry("../cifar-100-python/test", 10),
    "a name with .. in the middle": entry("cifar-100-python/../cifar-100-python/test", 10),
    "another file": entry("cifar-100-python/other", 10),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_archives_cannot_access_other_files(tmp_path: Path, name: str) -> None:
    path = write_archive(tmp_path / "a.tar.gz", ATTACKS[name], without="test")
    with pytest.raises(UserError, match=r"regular file|has no cifar-100-python/test"):
        read_members(path)
    assert list(tmp_path.iterdir()) == [path]


def test_other_members_of_an_archive_are_ignored(tmp_path: Path) -> None:
    extra = entry("../../owned", 4), entry("/owned", 4), entry("l", kind=tarfile.SYMTYPE, link="/")
    path = write_archive(tmp_path / "a.tar.gz", *extra)
    assert read_members(path) == (CIFAR_100, MEMBERS)
    assert list(tmp_path.iterdir()) == [path]


def test_duplicate_members_are_refused(tmp_path: Path) -> None:
    for name in ("cifar-100-python/test", "./cifar-100-python/test"):
        with pytest.raises(UserError, match="occurs twice"):
            read_members(write_archive(tmp_path / "a.tar", entry(name, 3)))


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
@pytest.mark.parametrize("name", ["cifar-100-python/train", "other"])
def test_decompression_bombs_are_refused(tmp_path: Path, kind: bytes, name: str) -> None:
    bomb = tmp_path / "a.tar.gz"
    header = entry(name, 2**33, kind).tobuf(tarfile.GNU_FORMAT)
    bomb.write_bytes(gzip.compress(header) + gzip.compress(bytes(20_000_000), 1) * 30)
    with pytest.raises(UserError, match=r"more than CIFAR|too large"):
        read_members(bomb)


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    path = write_archive(
        tmp_path / "a.tar", *(entry(f"{n}") for n in range(archive.MAX_ARCHIVE_MEMBERS))
    )
    with pytest.raises(UserError, match="too many members"):
        read_members(path)


def test_endless_chains_of_tar_headers_are_refused(tmp_path: Path) -> None:
    """tarfile recurses into each of them."""
    long_name = entry("././@LongLink", 10, tarfile.GNUTYPE_LONGNAME)
    block = long_name.tobuf(tarfile.GNU_FORMAT) + b"x" * 10 + b"\0" * 502
    (tmp_path / "a.tar").write_bytes(block * 3000)
    with pytest.raises(UserError, match="cannot be read"):
        read_members(tmp_path / "a.tar")


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    for name in ("a.tar", "a.tar.gz", "a.tar.xz"):
        whole = write_archive(tmp_path / name).read_bytes()
        for size in (0, 5, 100, 700, len(whole) // 2):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(UserError):
                read_members(tmp_path / name)
    for data in (b"hello", gzip.compress(b"hello"), lzma.compress(b"hello")):
        (tmp_path / "b").write_bytes(data)
        with pytest.raises(UserError):
            read_members(tmp_path / "b")
    with pytest.raises(UserError, match="cannot be read"):
        read_members(tmp_path / "absent.tar")


def write_tar(path: Path, *names: str) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            tar.addfile(entry(name))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("train", MEMBERS["train"])


def write_folder(path: Path, *names: str) -> None:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"label": [1]}), path)


FILES_10 = [
    f"cifar-10-batches-py/{name}" for name in ("data_batch_1", "test_batch", "batches.meta")
]
FILES_100 = [f"cifar-100-python/{name}" for name in MEMBERS]
IMAGES = [f"cat/{n}.{kind}" for n in range(600) for kind in ("png", "JPEG")]
OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a zip archive": (write_zip, "is a zip archive, which has to be unpacked first"),
    "npz": (lambda path: np.savez(path.open("wb"), images=TINY.images), "is a NumPy file"),
    "npy": (lambda path: np.save(path.open("wb"), TINY.images), "is a NumPy file"),
    "Parquet": (write_parquet, "is a Parquet file"),
    "one of the three": (lambda path: path.write_bytes(MEMBERS["train"]), "is a single pickle file"),
    "CIFAR-10": (lambda path: write_tar(path, *FILES_10), "is CIFAR-10, not CIFAR-100"),
    "a folder of CIFAR-10": (lambda path: write_folder(path, *FILES_10), "is CIFAR-10, not CIFAR-100"),
    "the files of CIFAR-10": (lambda path: write_folder(path, "data_batch_1"), "is CIFAR-10, not"),
    "images": (lambda path: write_folder(path, *IMAGES), "is a folder of image files"),
    "an archive of images": (lambda path: write_tar(path, *IMAGES), "is an archive of image files"),
    "the binary version": (lambda path: write_folder(path, "train.bin"), "not of the Python version"),
    "Parquet files": (lambda path: write_folder(path, "data/a.parquet"), "is a folder of Parquet files"),
    "the archive's folder": (lambda path: write_folder(path, "a.tar.gz"), "is a folder of archives"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_other_data_are_named_as_what_they_are(tmp_path: Path, name: str) -> None:
    write, what = OTHERS[name]
    write(tmp_path / "source")
    with pytest.raises(UserError) as caught:
        read_members(tmp_path / "source", [CIFAR_100])
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/source is ")
    assert what in message
    assert f"; {CIFAR_100.remedy}" in message
    if "CIFAR-10" not in name:
        with pytest.raises(UserError, match=r"give cifar-100-python.* or cifar-10-python\.tar\.gz"):
            read_members(tmp_path / "source")


@pytest.mark.parametrize("write", [write_tar, write_folder])
@pytest.mark.parametrize("names", [FILES_100, ["cifar-100-binary/train.bin"], ["train"]])
def test_cifar_100_is_named_where_cifar_10_is_expected(
    tmp_path: Path, write: Callable[..., None], names: list[str]
) -> None:
    write(tmp_path / "source", *names)
    with pytest.raises(
        UserError, match="source is CIFAR-100, not CIFAR-10; give cifar-10-"
    ) as caught:
        read_members(tmp_path / "source", [CIFAR_10])
    assert "or choose cifar100 (--dataset of prepare, data.path=data/cifar100" in str(caught.value)


@pytest.mark.parametrize("published", DATASETS.values(), ids=DATASETS)
def test_data_set_of_a_source_is_found(tmp_path: Path, published: Published) -> None:
    """In an archive, a folder and its parent, which may contain other files."""
    members = MEMBERS if published is CIFAR_100 else cifar_10_members(TRAIN_10, TEST_10, META_10)
    folder = tmp_path / "downloads" / published.folder
    folder.mkdir(parents=True)
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        for name, data in members.items():
            tar.addfile(entry(f"{published.folder}/{name}", len(data)), io.BytesIO(data))
            (folder / name).write_bytes(data)
    (folder.parent / "test").touch()
    for source in (tmp_path / "a.tar.gz", folder, folder.parent):
        assert read_members(source) == read_members(source, [published]) == (published, members)
    (folder / published.test).unlink()
    with pytest.raises(UserError, match=f"{published.test} is missing; {published.remedy}"):
        read_members(folder)


REAL = os.environ.get("CIFAR100_ARCHIVE")


@pytest.mark.skipif(REAL is None, reason="CIFAR100_ARCHIVE is not set to the official archive")
def test_official_pickles_match_pickle_load() -> None:
    published, members = read_members(Path(str(REAL)))
    assert published.is_official(members)
    for split in ("train", "test"):
        started = time.monotonic()
        raw = read(members[split], split)
        assert time.monotonic() - started < 5
        oracle = pickle.loads(members[split], encoding="bytes")
        assert np.array_equal(raw.images, oracle[b"data"])
        assert raw.fine_labels.tolist() == oracle[b"fine_labels"]
        assert raw.coarse_labels.tolist() == oracle[b"coarse_labels"]
        assert [name.encode() for name in raw.filenames] == oracle[b"filenames"]
    assert read_meta(io.BytesIO(members["meta"])).fine_label_names[0] == "apple"
    assert safe_pickle.MAX_OPCODES > 4 * 100_000


NESTED = {  # a tuple instead of a module name, which a dict lookup would hash
    "wide": b")\x94" + b"".join(b"h%ch%c\x86\x94" % (index, index) for index in range(60)),
    "deep": b")" + b"\x85" * 1_500_000,
}


@pytest.mark.parametrize("shape", NESTED)
def test_nested_tuple_as_name_neither_hangs_nor_overflows_the_stack(shape: str) -> None:
    """Runs in a separate process, which could hang or crash."""
    script = (
        "import sys\nfrom cifar_dist.data.ingest.pickles import RawMeta, read_pickle\n"
        "from cifar_dist.utils.errors import UserError\n"
        "try: read_pickle(sys.stdin.buffer, 'train', RawMeta(fine_label_names=['a'], coarse_label_names=['b']))\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=b"\x80\x04" + NESTED[shape] + b"\x8c\x01a\x93.",
        stdout=subprocess.PIPE,
        timeout=60,
    )
    assert done.returncode == 0
    assert b"a name is not a text" in done.stdout
