"""Untrusted pickles and archives: CIFAR's structure is read, everything else is refused unexecuted."""

from __future__ import annotations

import gzip
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
from small_data import first_rows, small_data

from cifar_dist.data.ingest import archive, safe_pickle
from cifar_dist.data.ingest.archive import is_official, read_members
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


def read(data: bytes, split: Any = "train") -> RawSplit:
    return read_pickle(io.BytesIO(data), split)


def fields(raw: RawSplit, **overrides: Any) -> dict[Any, Any]:
    return {
        b"filenames": [name.encode() for name in raw.filenames],
        b"batch_label": BATCH_LABELS["train"].encode(),
        b"fine_labels": raw.fine_labels.tolist(),
        b"coarse_labels": raw.coarse_labels.tolist(),
        b"data": np.array(raw.images),
    } | {key.encode(): value for key, value in overrides.items()}


def same(one: RawSplit, other: RawSplit) -> bool:
    arrays = ("images", "fine_labels", "coarse_labels")
    return one.filenames == other.filenames and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays
    )


def python2(raw: RawSplit, protocol: int, order: bytes = b"I00\n", version: int = 1) -> bytes:
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
    matrix += (
        text(b"b") + b"tR(" + integer(version) + b"(" + integer(rows) + integer(columns) + b"t"
    )
    matrix += dtype + order + text(raw.images.tobytes()) + b"tb"
    values = {
        b"data": matrix,
        b"batch_label": text(BATCH_LABELS["train"].encode()),
        b"fine_labels": items([integer(label) for label in raw.fine_labels.tolist()]),
        b"coarse_labels": items([integer(label) for label in raw.coarse_labels.tolist()]),
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


class Call:
    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.reduced


def hostile() -> dict[str, bytes]:
    def stream(body: bytes) -> bytes:
        return b"\x80\x02" + body + b"."

    def with_data(value: Any, protocol: int = 2) -> bytes:
        return pickle.dumps(fields(TINY, data=value), protocol=protocol)

    good = python2(TINY, 2)
    images = np.array(TINY.images)
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
        "a list": pickle.dumps([fields(TINY)], protocol=2),
        "an extra key": pickle.dumps(fields(TINY, more=1), protocol=2),
        "a repeated key": good[:-2] + b"U\x0bbatch_labelU\x15training batch 1 of 1u.",
        "a number as key": pickle.dumps({1: 2}, protocol=2),
        "a list as key": stream(b"}]Ns"),
        "test for train": MEMBERS["test"],
        "meta for train": MEMBERS["meta"],
        "a fine label of 100": pickle.dumps(fields(TINY, fine_labels=[0, 100]), protocol=2),
        "a fine label of -1": pickle.dumps(fields(TINY, fine_labels=[0, -1]), protocol=2),
        "a coarse label of 20": pickle.dumps(fields(TINY, coarse_labels=[0, 20]), protocol=2),
        "a missing label": pickle.dumps(fields(TINY, fine_labels=[1]), protocol=2),
        "an extra label": pickle.dumps(fields(TINY, coarse_labels=[1, 1, 1]), protocol=2),
        "labels of bool": pickle.dumps(fields(TINY, fine_labels=[True, False]), protocol=2),
        "labels of text": pickle.dumps(fields(TINY, fine_labels=["1", "2"]), protocol=2),
        "labels as an array": pickle.dumps(fields(TINY, fine_labels=np.array([1, 2])), protocol=2),
        "labels as a matrix": pickle.dumps(fields(TINY, fine_labels=images), protocol=2),
        "two superclasses": pickle.dumps(fields(TINY, fine_labels=[5, 5], coarse_labels=[1, 2]), protocol=2),
        "a missing filename": pickle.dumps(fields(TINY, filenames=[b"a"]), protocol=2),
        "filenames of numbers": pickle.dumps(fields(TINY, filenames=[1, 2]), protocol=2),
        "a lone surrogate, protocol 0": pickle.dumps(fields(TINY, filenames=["\ud800", "a"]), protocol=0),
        "a lone surrogate, protocol 2": pickle.dumps(fields(TINY, filenames=["\ud800", "a"]), protocol=2),
        "a filename that is not a text": pickle.dumps(fields(TINY, filenames=[b"\xff", b"a"]), protocol=2),
    }  # fmt: skip
    for key in ("data", "filenames", "fine_labels"):
        others = {name: value for name, value in fields(TINY).items() if name != key.encode()}
        cases[f"no {key}"] = pickle.dumps(others, protocol=2)
    return cases


HOSTILE = hostile()


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
    "names", [[], ["a"], ["a"] * 100, ["a"] * 20, list(map(str, range(101))), 7]
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
    members = read_members(write_archive(tmp_path / name, prefix=prefix))
    assert members == MEMBERS
    assert not is_official(members)


def test_folders_are_read(tmp_path: Path) -> None:
    inner = tmp_path / "cifar-100-python"
    inner.mkdir()
    for name, data in MEMBERS.items():
        (inner / name).write_bytes(data)
    assert read_members(tmp_path) == read_members(inner) == MEMBERS
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
    assert read_members(path) == MEMBERS
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
    with pytest.raises(UserError, match=r"more than CIFAR-100|too large"):
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


CIFAR_10 = [
    f"cifar-10-batches-py/{name}" for name in ("data_batch_1", "test_batch", "batches.meta")
]
IMAGES = [f"cat/{n}.{kind}" for n in range(600) for kind in ("png", "JPEG")]
OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a zip archive": (write_zip, "is a zip archive, which has to be unpacked first"),
    "npz": (lambda path: np.savez(path.open("wb"), images=TINY.images), "is a NumPy file"),
    "npy": (lambda path: np.save(path.open("wb"), TINY.images), "is a NumPy file"),
    "Parquet": (write_parquet, "is a Parquet file"),
    "one of the three": (lambda path: path.write_bytes(MEMBERS["train"]), "is a single pickle file"),
    "CIFAR-10": (lambda path: write_tar(path, *CIFAR_10), "is CIFAR-10, not CIFAR-100"),
    "a folder of CIFAR-10": (lambda path: write_folder(path, *CIFAR_10), "is CIFAR-10, not CIFAR-100"),
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
        read_members(tmp_path / "source")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/source is ")
    assert what in message
    assert message.endswith("; " + archive.REMEDY)


REAL = os.environ.get("CIFAR100_ARCHIVE")


@pytest.mark.skipif(REAL is None, reason="CIFAR100_ARCHIVE is not set to the official archive")
def test_official_pickles_match_pickle_load() -> None:
    members = read_members(Path(str(REAL)))
    assert is_official(members)
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
        "import sys\nfrom cifar_dist.data.ingest.pickles import read_pickle\n"
        "from cifar_dist.utils.errors import UserError\n"
        "try: read_pickle(sys.stdin.buffer, 'train')\n"
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
