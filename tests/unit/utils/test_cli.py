"""Every command explains itself alike, and ends in one sentence where a person can mend it."""

from __future__ import annotations

import errno
import importlib
import io
import itertools
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cifar_dist import (
    cache_logits,
    doctor,
    ensemble,
    evaluate,
    near_duplicates,
    predict,
    prepare,
    report,
    train,
)
from cifar_dist.utils.errors import INTERRUPTED, UserError, run_command
from cifar_dist.utils.files import atomic_folder, atomic_write

PACKAGE = Path(__file__).parents[3] / "cifar_dist"
COMMANDS = sorted(path.stem for path in PACKAGE.glob("*.py") if "\ndef main(" in path.read_text())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example_and_a_word_on_each_option(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    module = importlib.import_module(f"cifar_dist.{command}")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    usage, described = shown.split("\n\n", 1)
    assert usage.startswith(f"usage: python -m cifar_dist.{command} ")
    assert re.search(rf"examples?:\n  .*cifar_dist\.{command} ?", shown)
    assert "--traceback" in usage
    assert max(len(line) for line in described.partition("\n\n")[0].splitlines()) <= 80
    options = shown.partition("\noptions:\n")[2].partition("\nexample")[0]
    entries = re.split(r"\n(?=  \S)", options.rstrip())
    assert len(entries) >= 2
    for entry in entries:  # "  --name VALUE  its help", or its help on the next line
        assert re.search(r"\S {2,}\S|\n {10,}\S", entry.strip()), f"no help: {entry}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["runs/a", "--flip"],
            "unrecognized arguments: --flip; did you mean --tta-flip; `python -m",
        ),
        (["runs/a", "--split", "valid"], "invalid choice: 'valid'"),
        ([], "arguments are required: run"),
    ],
)
def test_a_mistyped_option_is_one_sentence(arguments: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        evaluate.main(arguments)
    assert str(refused.value).endswith("`python -m cifar_dist.evaluate --help` says what there is")


def test_a_place_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["command"])
    for place in ("folder", "file/inside", "n" * 300):

        def write(arguments: list[str], path: Path = tmp_path / place) -> int:
            atomic_write(path, "content")
            return 0

        assert run_command(write) == 2
        assert re.match(rf"error: .*{place[:4]}.*; free or choose", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc takes nothing, and says it is not there")
def test_a_place_where_nothing_can_be_made_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def file(arguments: list[str]) -> int:
        atomic_write(Path(arguments[0]), "content")
        return 0

    def folder(arguments: list[str]) -> int:
        with atomic_folder(Path(arguments[0])):
            return 0

    def data(arguments: list[str]) -> int:
        return prepare.main(["--sample", "--output", arguments[0]])

    for place, main in itertools.product(
        (Path("/proc/absent"), Path("/proc/absent/inner")), (file, folder, data)
    ):
        monkeypatch.setattr(sys, "argv", ["command", str(place)])
        assert run_command(main) == 2
        said = capsys.readouterr().err
        assert re.fullmatch(r"error: /proc/absent.*: nothing can be made there; choose .*\n", said)


def test_a_place_is_tried_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*arguments: object, **options: object) -> None:
        raise AssertionError

    monkeypatch.setattr(near_duplicates, "load_split", work)
    monkeypatch.setattr(predict, "load_usable", work)
    monkeypatch.setattr(report, "read_run", work)
    (tmp_path / "file").write_text("mine")
    for place in (tmp_path, tmp_path / "file/inside", tmp_path / ("n" * 300)):
        for main, words in (
            (near_duplicates.main, ["--output", str(place)]),
            (report.main, ["runs/a", "--output", str(place)]),
            (report.main, ["runs/a", "--latex", str(place)]),
            (predict.main, ["runs/a", "a.png", "--json", str(place)]),
            (predict.main, ["runs/a", "a.png", "--save-image", str(place)]),
        ):
            with pytest.raises(OSError, match=re.escape(str(tmp_path))):
                main(words)
    for place in (tmp_path / "file", tmp_path / "new/folder/seen.json"):
        with pytest.raises(AssertionError):
            near_duplicates.main(["--output", str(place)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"


def test_a_name_that_the_terminal_cannot_show_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"caf\xe9 \xc3\xbc.png")

    def tell(arguments: list[str]) -> int:
        print(name)
        raise UserError(name)

    said = {}
    for stream in ("stdout", "stderr"):
        said[stream] = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
        monkeypatch.setattr(sys, stream, said[stream])
    assert run_command(tell) == 2
    for stream, start in ("stdout", b""), ("stderr", b"error: "):
        said[stream].seek(0)
        assert said[stream].buffer.read() == start + b"caf\\udce9 \\xfc.png\n"


def test_a_reader_that_has_seen_enough_does_not_end_the_work() -> None:
    """`command | head -1`: no trace, and what comes after the printing is done."""
    script = (
        "import sys; from cifar_dist.utils.log import log, log_to_terminal; log_to_terminal()\n"
        "for line in range(20000): log.info(f'line {line}')\n"
        "print('done', file=sys.stderr)"
    )
    command = f"{sys.executable} -c {shlex.quote(script)} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("line 0\n", "done\n")


def test_a_trace_is_there_for_who_asks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(arguments: list[str]) -> int:
        raise UserError("the moon is full; wait a day")

    def full(arguments: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x")

    for main, sentence in (wrong, "the moon is full; wait a day"), (full, "runs/x: No space left"):
        monkeypatch.setattr(sys, "argv", ["command"])
        assert run_command(main) == 2
        assert capsys.readouterr().err.startswith(f"error: {sentence}")
        monkeypatch.setattr(sys, "argv", ["command", "--traceback"])
        with pytest.raises((UserError, OSError)):
            run_command(main)


def test_a_bug_keeps_its_trace_and_ctrl_c_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    def bug(arguments: list[str]) -> int:
        raise ZeroDivisionError

    def interrupted(arguments: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["command"])
    with pytest.raises(ZeroDivisionError):
        run_command(bug)
    assert run_command(interrupted) == INTERRUPTED


@pytest.mark.parametrize(
    "words", list(itertools.permutations(["run.epochs=3", "--dry-run", "run.seed=7"]))
)
def test_options_may_stand_among_the_changes(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["recipes/debug.yaml", *words]) == 0
    said = capsys.readouterr().out
    assert "run: {epochs: 3," in said
    assert "seed: 7," in said


@pytest.mark.parametrize("option", [["--checkpoint", "step_1"], ["--json", "seen.json"]])
def test_options_may_stand_before_pictures(option: list[str]) -> None:
    with pytest.raises(UserError, match="runs/absent is no run folder"):
        predict.main(["runs/absent", *option, "cat.png"])


@pytest.mark.parametrize("command", [report, ensemble])
def test_options_may_stand_between_runs(command) -> None:
    with pytest.raises(UserError, match="runs/absent is no run folder"):
        command.main(["runs/absent", "--output", "absent", "runs/b"])


def test_options_may_stand_before_the_changes_of_a_check() -> None:
    with pytest.raises(UserError, match=r"debug.yaml: run\.epochs: "):
        doctor.main(["recipes/debug.yaml", "--traceback", "run.epochs=-2"])


@pytest.mark.parametrize("command", [train, cache_logits, doctor])
def test_only_the_recipe_is_missing(command) -> None:
    with pytest.raises(UserError, match=r"required: recipe; "):
        command.main(["--traceback"])
