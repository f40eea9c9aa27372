"""Help, option errors and user errors of all commands."""

from __future__ import annotations

import errno
import importlib
import io
import itertools
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
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
COMMANDS = sorted(
    path.stem for path in PACKAGE.glob("*.py") if "\ndef main(arguments" in path.read_text()
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_and_describes_each_option(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    module = importlib.import_module(f"cifar_dist.{command}")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    usage, described = text.split("\n\n", 1)
    assert usage.startswith(f"usage: python -m cifar_dist.{command} ")
    assert re.search(rf"examples?:\n(.*\n)?  .*cifar_dist\.{command} ?", text)
    assert "--traceback" in usage
    assert max(len(line) for line in described.partition("\n\n")[0].splitlines()) <= 80
    options = text.partition("\noptions:\n")[2].partition("\nexample")[0]
    entries = re.split(r"\n(?=  \S)", options.rstrip())
    assert len(entries) >= 2
    for entry in entries:  # "  --name VALUE  its help", or its help on the next line
        assert re.search(r"\S {2,}\S|\n {10,}\S", entry.strip()), f"no help: {entry}"


def test_default_outputs_are_ignored_by_git() -> None:
    if not (PACKAGE.parent / ".git").exists():
        pytest.skip("not a git clone")
    outputs = [
        "data/cifar100/digest.json",
        "ensemble/ensemble.json",
        "exported/r18_224_timm/config.json",
        "report.html",
        "runs/r18_32/evaluation/evaluation.json",
    ]
    command = ["git", "-C", str(PACKAGE.parent), "check-ignore", *outputs]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == outputs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["runs/a", "--flip"],
            r"unrecognized arguments: --flip; did you mean --tta-flip\?; see `python -m",
        ),
        (["runs/a", "--split", "valid"], "invalid choice: 'valid'"),
        ([], "arguments are required: run"),
    ],
)
def test_misspelled_option_is_one_sentence(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        evaluate.main(arguments)
    assert str(error.value).endswith("; see `python -m cifar_dist.evaluate --help`")


@pytest.mark.parametrize(
    ("main", "old", "new"),
    [
        (evaluate.main, "--flips", "--tta-flip"),
        (predict.main, "--picture=a.png", "--save-image"),
        (predict.main, "--dataset=test", "--rows"),
        (prepare.main, "--any-content", "--allow-unofficial"),
        (ensemble.main, "--equal", "--uniform"),
    ],
)
def test_old_options_name_the_new_ones(
    main: Callable[[list[str]], int], old: str, new: str
) -> None:
    with pytest.raises(
        UserError, match=rf"unrecognized arguments: .*{old}; it is now called {new};"
    ):
        main(["runs/a", old])


def test_unwritable_output_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["command"])
    for name in ("folder", "file/inside", "n" * 300):

        def write(arguments: list[str], path: Path = tmp_path / name) -> int:
            atomic_write(path, "content")
            return 0

        assert run_command(write) == 2
        assert re.match(rf"error: .*{name[:4]}.*; free space or choose", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc, in which nothing can be created")
def test_uncreatable_output_is_one_sentence(
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

    for path, main in itertools.product(
        (Path("/proc/absent"), Path("/proc/absent/inner")), (file, folder, data)
    ):
        monkeypatch.setattr(sys, "argv", ["command", str(path)])
        assert run_command(main) == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"error: /proc/absent.*: cannot be created; choose .*\n", error)


def test_output_is_checked_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*arguments: object, **options: object) -> None:
        raise AssertionError

    # Commands import inside `main`: a module first imported now would keep a patched function.
    for module in pkgutil.walk_packages([str(PACKAGE)], "cifar_dist."):
        importlib.import_module(module.name)
    monkeypatch.setattr("cifar_dist.data.dataset.load_split", work)
    monkeypatch.setattr("cifar_dist.inference.trained_model.load_trained_model", work)
    monkeypatch.setattr("cifar_dist.inference.stored_run.read_run", work)
    (tmp_path / "file").write_text("content")
    for path in (tmp_path, tmp_path / "file/inside", tmp_path / ("n" * 300)):
        for main, words in (
            (near_duplicates.main, ["--output", str(path)]),
            (report.main, ["runs/a", "--output", str(path)]),
            (report.main, ["runs/a", "--latex", str(path)]),
            (predict.main, ["runs/a", "a.png", "--json", str(path)]),
            (predict.main, ["runs/a", "a.png", "--save-image", str(path)]),
        ):
            with pytest.raises(OSError, match=re.escape(str(tmp_path))):
                main(words)
    for path in (tmp_path / "file", tmp_path / "new/folder/output.json"):
        with pytest.raises(AssertionError):
            near_duplicates.main(["--output", str(path)])
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "content"


def test_unprintable_name_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"caf\xe9 \xc3\xbc.png")

    def fail(arguments: list[str]) -> int:
        print(name)
        raise UserError(name)

    streams = {}
    for stream in ("stdout", "stderr"):
        streams[stream] = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
        monkeypatch.setattr(sys, stream, streams[stream])
    assert run_command(fail) == 2
    for stream, start in ("stdout", b""), ("stderr", b"error: "):
        streams[stream].seek(0)
        assert streams[stream].buffer.read() == start + b"caf\\udce9 \\xfc.png\n"


def test_closed_pipe_does_not_end_the_command() -> None:
    """`command | head -1` prints no traceback, and the command continues after its output."""
    script = (
        "import sys; from cifar_dist.utils.log import log, log_to_terminal; log_to_terminal()\n"
        "for line in range(20000): log.info(f'line {line}')\n"
        "print('done', file=sys.stderr)"
    )
    command = f"{sys.executable} -c {shlex.quote(script)} | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("line 0\n", "done\n")


def test_help_without_a_reader_succeeds() -> None:
    read, write = os.pipe()
    os.close(read)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "cifar_dist.train", "--help"]
    done = subprocess.run(command, env=environment, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


STREAMS = {  # what a shell or a launcher does with the standard streams
    "closed stdout": ">&-",
    "closed stderr": "2>&-",
    "closed stdout and stderr": ">&- 2>&-",
    "closed stdin": "<&-",
    "stdout without a reader": "> >(exit)",
    "stderr without a reader": "2> >(exit)",
}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("streams", STREAMS.values(), ids=STREAMS)
def test_missing_streams_change_no_exit_code(tmp_path: Path, streams: str) -> None:
    """Log lines, prints, progress bars, --help and errors; the next file is not standard output."""
    script = tmp_path / "command.py"
    script.write_text(
        "import os, sys, time\n"
        "from cifar_dist.utils.errors import UserError, run_command\n"
        "from cifar_dist.utils.log import log, log_to_terminal, progress_bar\n"
        "def main(arguments):\n"
        "    time.sleep(0.1)  # until the readers have exited\n"
        "    log_to_terminal()\n"
        "    log.info('line')\n"
        "    progress_bar(0, 1, enabled=True).update()\n"
        "    with open('file', 'w'):\n"
        "        os.system('echo from another program')\n"
        "        print('printed')\n"
        "    if 'error' in arguments:\n"
        "        raise UserError('message')\n"
        "    return 75\n"
        "sys.exit(run_command(main))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(PACKAGE.parent)}
    for arguments, code in ("", 75), ("error", 2):
        command = f"{sys.executable} {script} {arguments} {streams}"
        done = subprocess.run(
            ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert done.stderr in ("", "error: message\n")
        assert (tmp_path / "file").read_text() == ""


def test_traceback_option_raises_user_errors(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def user_error(arguments: list[str]) -> int:
        raise UserError("no such recipe; see recipes/")

    def full_disk(arguments: list[str]) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x")

    for main, message in (
        (user_error, "no such recipe; see recipes/"),
        (full_disk, "runs/x: No space left"),
    ):
        monkeypatch.setattr(sys, "argv", ["command"])
        assert run_command(main) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
        monkeypatch.setattr(sys, "argv", ["command", "--traceback"])
        with pytest.raises((UserError, OSError)):
            run_command(main)


def test_bug_keeps_its_traceback_and_ctrl_c_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
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
def test_options_between_overrides(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["recipes/debug.yaml", *words]) == 0
    output = capsys.readouterr().out
    assert "run: {epochs: 3," in output
    assert "seed: 7," in output


@pytest.mark.parametrize("option", [["--checkpoint", "step_1"], ["--json", "output.json"]])
def test_options_before_images(option: list[str]) -> None:
    with pytest.raises(UserError, match="runs/absent is not a run folder"):
        predict.main(["runs/absent", *option, "cat.png"])


@pytest.mark.parametrize("command", [report, ensemble])
def test_options_between_runs(command) -> None:
    with pytest.raises(UserError, match="runs/absent is not a run folder"):
        command.main(["runs/absent", "--output", "absent", "runs/b"])


def test_options_before_overrides_of_the_doctor() -> None:
    with pytest.raises(UserError, match=r"debug.yaml: run\.epochs: "):
        doctor.main(["recipes/debug.yaml", "--traceback", "run.epochs=-2"])


@pytest.mark.parametrize("command", [train, cache_logits, doctor])
def test_missing_recipe_is_the_only_missing_argument(command) -> None:
    with pytest.raises(UserError, match=r"required: recipe; "):
        command.main(["--traceback"])
