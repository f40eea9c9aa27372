"""Every command explains itself alike, and ends in one sentence where a person can mend it."""

from __future__ import annotations

import errno
import importlib
import re
import sys
from pathlib import Path

import pytest

from cifar_dist.errors import INTERRUPTED, UserError, run_command

PACKAGE = Path(__file__).parents[1] / "cifar_dist"
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
