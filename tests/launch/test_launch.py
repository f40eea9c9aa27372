"""Launchers and ways to start a run: each one trains or stops with one sentence."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compare import assert_same_bits, largest_difference
from launcher import free_port, rank_variables, start_rank, train

from cifar_dist.run_folder.checkpoint import checkpoints, find_corruption
from recipes import RecipeMaker

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "accelerate_configs"


def run(
    *command: object, cwd: Path, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *(str(part) for part in command)],
        cwd=cwd,
        env={**os.environ, "OMP_WAIT_POLICY": "passive", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )


def world_size(cwd: Path) -> int:
    return json.loads((cwd / "runs/tiny/summary.json").read_text())["world_size"]


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        (["--config_file", CONFIGS / "cpu_2.yaml"], 2),
        (["--cpu", "--num_processes", "2"], 1),  # Accelerate starts one, and the log says so
    ],
    ids=["cpu_2", "cpu flag"],
)
def test_accelerate_launch(
    tmp_path: Path, recipe: RecipeMaker, launcher: list[object], processes: int
) -> None:
    port = ["--main_process_port", free_port()] if processes > 1 else []
    command = ["accelerate.commands.launch", *launcher, *port, "-m", "cifar_dist.train", recipe()]
    done = run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert f"{processes} process(es) on cpu" in done.stdout
    assert world_size(tmp_path) == processes


@pytest.mark.fault
def test_torchrun(tmp_path: Path, recipe: RecipeMaker) -> None:
    command = ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    done = run(*command, "-m", "cifar_dist.train", recipe(), cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert world_size(tmp_path) == 2


def test_plain_srun(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Two tasks with the environment that srun gives them."""
    port = str(free_port())
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "cifar_dist.train", str(recipe())],
            cwd=tmp_path,
            env={
                **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")},
                "SLURM_JOB_ID": "1",
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_NODEID": "0",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_STEP_NODELIST": "localhost",
                "SLURM_STEP_TASKS_PER_NODE": "2",
                "MASTER_PORT": port,
                "OMP_WAIT_POLICY": "passive",
            },
            stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    assert world_size(tmp_path) == 2


def test_recipe_overrides_launcher_settings(tmp_path: Path, recipe: RecipeMaker) -> None:
    output = train(
        recipe(run={"epochs": 1}),
        cwd=tmp_path,
        environment={
            "ACCELERATE_MIXED_PRECISION": "fp16",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
            "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        },
    )
    for key in ("run.precision", "run.micro_batches", "run.compile"):
        assert output.count(f"the recipe decides ({key})") == 1
    assert ", fp32," in output


@pytest.mark.parametrize(
    "name",
    ["ACCELERATE_USE_FSDP", pytest.param("ACCELERATE_USE_DEEPSPEED", marks=pytest.mark.fault)],
)
def test_other_backends_are_refused(tmp_path: Path, recipe: RecipeMaker, name: str) -> None:
    output = train(recipe(), cwd=tmp_path, expect=2, environment={name: "true"})
    assert "accelerate_configs/" in output


@pytest.mark.fault
def test_ranks_with_different_recipes_are_refused(tmp_path: Path, recipe: RecipeMaker) -> None:
    port = free_port()
    command = ["-m", "cifar_dist.train", recipe()]
    processes = [
        start_rank([*command, f"run.seed={rank}"], cwd=tmp_path, rank=rank, world_size=2, port=port)
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert "rank 1 has another recipe than rank 0" in errors[0]


def catches(pid: int, number: signal.Signals) -> bool:
    """Return whether the process has a handler for the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        pytest.param(signal.SIGUSR1, marks=pytest.mark.fault),
    ],
)
def test_signal_during_startup_saves_a_checkpoint(
    tmp_path: Path, recipe: RecipeMaker, number: signal.Signals
) -> None:
    """The signal arrives before the first step and is read at the first poll."""
    path = recipe(run={"epochs": 1000})
    process = subprocess.Popen(
        [sys.executable, "-m", "cifar_dist.train", str(path)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
    )
    while not catches(process.pid, signal.SIGUSR1):  # Python itself catches SIGINT from its start
        assert process.poll() is None
        time.sleep(0.01)
    assert not (tmp_path / "runs").exists()
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert f"stopped by {number.name}" in output
    assert (tmp_path / "runs/tiny/stopped").read_text() == f"{number.name}\n"
    checkpoint = tmp_path / "runs/tiny/checkpoints/step_00000000"
    assert find_corruption(checkpoint) is None
    # No step was done, so another recipe may continue and replace the checkpoint.
    train(path, "run.epochs=1", "optim.lr=0.01", cwd=tmp_path)
    assert not checkpoint.exists()


@pytest.mark.fault
@pytest.mark.skipif(
    subprocess.run(["env", "--block-signal=USR1,TERM", "true"], capture_output=True).returncode
    != 0,
    reason="needs coreutils 8.31",
)
def test_signals_within_five_seconds_of_exec_save_and_resume(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    """Ten restarts, with signals to ranks and workers, as slurm/train.sh starts them: the same bits."""
    albumentations = {"albumentations": [{"HorizontalFlip": {"p": 0.5}}], "workers": 2}
    path = recipe(run={"epochs": 40}, augment=albumentations)
    train(path, "name=straight", cwd=tmp_path, world_size=2)
    command = ["env", "--block-signal=USR1,TERM", sys.executable, "-m", "cifar_dist.train"]
    steps = []
    for attempt in range(10):
        port = free_port()
        ranks = [
            subprocess.Popen(
                [*command, str(path)],
                cwd=tmp_path,
                env=os.environ | rank_variables(rank, 2, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
            for rank in range(2)
        ]
        time.sleep(attempt * 5 / 9)
        for rank in ranks:
            os.killpg(rank.pid, signal.SIGUSR1 if attempt % 2 else signal.SIGTERM)
        outputs = [rank.communicate(timeout=240)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [75, 75], outputs
        assert (tmp_path / "runs/tiny/stopped").exists()
        newest = checkpoints(tmp_path / "runs/tiny/checkpoints")[0]
        assert find_corruption(newest) is None
        steps.append(int(newest.name.removeprefix("step_")))
    assert steps == sorted(steps)
    print(f"saved at steps {steps}")
    train(path, cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/tiny")


def test_ctrl_c_saves_although_the_launcher_forwards_it(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port"]
    command += [str(free_port()), "--config_file", str(CONFIGS / "cpu_2.yaml")]
    command += ["-m", "cifar_dist.train", str(recipe(run={"epochs": 2000}))]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    metrics = tmp_path / "runs/tiny/metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert "stopped by SIGINT" in output, output
    assert (tmp_path / "runs/tiny/stopped").read_text() == "SIGINT\n"


def test_dry_run_prints_the_cost_and_writes_nothing(tmp_path: Path) -> None:
    done = run(
        "cifar_dist.train", "--dry-run", ROOT / "recipes/r50_224.yaml", "run.epochs=2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout
    # torchvision's published 4.09 G multiply-adds are 8.18 GFLOPs
    assert "\nFLOPs per image   8.18 G forward" in done.stdout
    assert "\nsteps             2 epochs x 97 = 194\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_missing_data_or_weights_is_one_sentence(tmp_path: Path, recipe: RecipeMaker) -> None:
    output = train(
        recipe(data={"path": "nowhere", "source": str(tmp_path / "absent.tar.gz")}),
        cwd=tmp_path,
        expect=2,
    )
    assert output.count("error:") == 1
    assert "absent.tar.gz" in output
    output = train(
        recipe("weightless", model={"pretrained": True, "backbone": "resnet18"}),
        cwd=tmp_path,
        expect=2,
        environment={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "empty")},
    )
    assert output.count("error:") == 1
    assert "model.weights" in output


def test_unknown_names_are_refused_before_the_download(tmp_path: Path, recipe: RecipeMaker) -> None:
    source = f"http://127.0.0.1:{free_port()}/archive.tar.gz"
    path = recipe(data={"path": "nowhere", "source": source})
    output = train(path, "model.backbone=resnet_18", cwd=tmp_path, expect=2)
    assert "did you mean resnet18" in output
    output = train(path, "model.backbone=resnet9x4", cwd=tmp_path, expect=2)
    assert "did you mean resnet8x4" in output
    assert "choose adam" in train(path, "optim.name=adamv", cwd=tmp_path, expect=2)
    assert "cannot be downloaded" in train(path, cwd=tmp_path, expect=2)


def test_missing_synthetic_data_is_generated_by_one_rank(
    tmp_path: Path, recipe: RecipeMaker
) -> None:
    path = recipe(
        run={"epochs": 1, "batch_size": 1000}, data={"path": "data/sample", "source": "sample"}
    )
    output = train(path, cwd=tmp_path, world_size=2)
    assert output.count("This is synthetic data, not CIFAR-100") == 2  # first and last
    assert (tmp_path / "data/sample/cifar-100-python/train").exists()


@pytest.mark.parametrize("damage", ["flip", pytest.param("cut", marks=pytest.mark.fault)])
def test_damaged_data_is_refused_before_the_first_step(
    tmp_path: Path, recipe: RecipeMaker, data: Path, damage: str
) -> None:
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    table = copy / "train/data-00000-of-00001.arrow"
    content = bytearray(table.read_bytes())
    content[len(content) // 2] ^= 1
    table.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    output = train(recipe(data={"path": str(copy)}), cwd=tmp_path, world_size=2, expect=2)
    assert output.count("error:") == 1
    assert str(table) in output
    assert "cifar_dist.prepare --force" in output
    assert not (tmp_path / "runs/tiny/metrics.jsonl").exists()


@pytest.mark.fault
def test_compiled_training_matches_eager(tmp_path: Path, recipe: RecipeMaker) -> None:
    for compiled in ("false", "true"):
        train(
            recipe(
                model={"backbone": "test_vit"}, optim={"name": "sgd", "lr": 0.01}, run={"epochs": 1}
            ),
            f"name=compile_{compiled}",
            f"run.compile={compiled}",
            "run.micro_batches=1",
            "model.drop_rate=0.0",
            cwd=tmp_path,
        )
    difference = largest_difference(tmp_path / "runs/compile_false", tmp_path / "runs/compile_true")
    assert difference < 1e-5


@pytest.mark.fault
def test_two_machines_without_slurm(tmp_path: Path, recipe: RecipeMaker) -> None:
    """Start accelerate_configs/multi_node.yaml as its header shows, with one process per machine."""
    port, path = free_port(), recipe()
    launchers = []
    for machine in range(2):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [str(CONFIGS / "multi_node.yaml"), "--machine_rank", str(machine)]
        command += ["--num_processes", "2", "--main_process_ip", "127.0.0.1"]
        command += ["--main_process_port", str(port), "-m", "cifar_dist.train", str(path)]
        launchers.append(
            subprocess.Popen(
                command,
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [launcher.communicate(timeout=240)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert "2 process(es) on cpu" in outputs[0]
    assert world_size(tmp_path) == 2


ENDLESS = {"epochs": 100_000, "eval_every_epochs": 100_000, "timeout_seconds": 5}


@pytest.mark.fault
@pytest.mark.parametrize(
    ("kind", "message", "limit"),
    [
        ("killed", "rank 1 has died, last heartbeat after step", 20),
        ("leaving", "rank 1 has died, last heartbeat after step", 20),
        ("raising", "after step 7.", 20),
        ("ahead", "ranks are at different steps (rank: step): 0: ", 20),
        ("disk full", "/dev/full: No space left on device; free space or choose another path", 20),
        # 30 s of the limit are torchrun's
        ("stopped", "rank 1 does not respond, last heartbeat after step", 50),
    ],
)
def test_failing_rank_ends_an_accelerate_launch(
    tmp_path: Path, recipe: RecipeMaker, kind: str, message: str, limit: int
) -> None:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port"]
    command += [str(free_port()), "--config_file", str(CONFIGS / "cpu_2.yaml")]
    command += ["-m", "faulty_rank", str(recipe(run=ENDLESS))]
    environment = os.environ | {
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}",
        "FAULT": f"{kind}:1:7",
    }
    environment |= {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    seconds = time.time() - float(done.stdout.split("FAULT ")[1].split()[0])
    print(f"{kind}: the launcher ends after {seconds:.1f} s")
    assert done.returncode == 1, done.stdout  # the launcher's, for every exit code of a rank
    assert message in done.stdout
    assert seconds < limit
