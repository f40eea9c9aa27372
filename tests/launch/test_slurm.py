"""slurm/*.sh on a real two-node Slurm: time-limit warnings, requeues, preemption, cancellation."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from compare import assert_same_bits
from launcher import Launch
from slurm_cluster import ENDED, ROOT, Cluster, two_nodes, unavailable_reason, wait_until

from cifar_dist.distributed import slurm
from cifar_dist.run_folder.checkpoint import checkpoints
from cifar_dist.utils.process import process_start_time
from recipes import RecipeMaker

LONG = {"epochs": 100, "eval_every_epochs": 50, "save_every_minutes": 0.01}


@pytest.fixture(scope="module")
def whole_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = unavailable_reason()
    if reason is not None:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def cluster(whole_cluster: Cluster) -> Iterator[Cluster]:
    yield whole_cluster
    whole_cluster.cancel_all()


def newest_step(run: Path) -> int:
    saved = checkpoints(run / "checkpoints")
    return int(saved[0].name.removeprefix("step_")) if saved else -1


class Job:
    """One submission of slurm/train.sh on both nodes, into a run folder."""

    def __init__(self, cluster: Cluster, *arguments: object, cwd: Path, partition: str = "low"):
        self.cluster, self.cwd = cluster, cwd
        options = ["--partition", partition, *two_nodes()]
        self.id = cluster.submit(*options, ROOT / "slurm/train.sh", *arguments, cwd=cwd)

    @property
    def output(self) -> str:
        path = self.cwd / f"slurm-{self.id}.out"
        return path.read_text() if path.exists() else ""

    def wait(self, *states: str, seconds: float = 120) -> str:
        try:
            return self.cluster.wait(self.id, *states, seconds=seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.output}") from None

    def wait_for_step(self, run: Path, step: int) -> None:
        def saved() -> bool:
            assert self.cluster.state(self.id) not in ENDED, self.output
            return newest_step(run) >= step

        wait_until(saved, seconds=120, message=lambda: self.output)

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.id)["Restarts"])


def train_uninterrupted(path: Path, cwd: Path) -> None:
    """Train the recipe without Slurm, into runs/straight."""
    ranks = Launch("train", [path, "name=straight"], cwd=cwd, world_size=2)
    assert ranks.wait(600) == [0, 0], ranks.output


def test_warned_job_is_requeued_and_matches_uninterrupted_run(
    tmp_path: Path, recipe: RecipeMaker, cluster: Cluster
) -> None:
    path = recipe(run=LONG | {"epochs": 80})  # 480 steps, some seconds
    job = Job(cluster, path, cwd=tmp_path)
    run = tmp_path / "runs/tiny"
    job.wait_for_step(run, 1)
    cluster("scancel", "--signal=USR1", job.id)  # to the whole step, as --signal=USR1@180
    train_uninterrupted(path, tmp_path)
    assert job.wait(*ENDED) == "COMPLETED", job.output
    assert job.restarts == 1, job.output
    assert "saved before the time limit; requeued" in job.output
    assert "resuming from step" in job.output
    assert "2 process(es) on cpu" in job.output
    assert json.loads((run / "summary.json").read_text())["world_size"] == 2
    assert_same_bits(tmp_path / "runs/straight", run)


@pytest.mark.fault
def test_requeued_finished_job_exits_at_once(
    tmp_path: Path, recipe: RecipeMaker, cluster: Cluster
) -> None:
    job = Job(cluster, recipe(), cwd=tmp_path)
    assert job.wait(*ENDED) == "COMPLETED", job.output
    metrics = tmp_path / "runs/tiny/metrics.jsonl"
    before = metrics.read_bytes()
    cluster("scontrol", "requeue", job.id)
    job.wait("RUNNING")
    started = time.monotonic()
    assert job.wait(*ENDED) == "COMPLETED", job.output
    assert job.output.count("tiny: finished, top1") == 2
    assert job.restarts == 1
    assert metrics.read_bytes() == before
    print(f"a requeued finished job ends after {time.monotonic() - started:.1f} s")


@pytest.mark.fault
@pytest.mark.parametrize("partition", ["low", "rude"])
def test_each_preemption_is_one_requeue(
    tmp_path: Path, recipe: RecipeMaker, cluster: Cluster, partition: str
) -> None:
    """Preemption by Slurm itself, with a grace time of 30 s and with none."""
    path = recipe(run=LONG | {"epochs": 150})
    job = Job(cluster, path, cwd=tmp_path, partition=partition)
    run = tmp_path / "runs/tiny"
    step = 0
    for preemption in range(1, 4):
        job.wait("RUNNING")
        job.wait_for_step(run, step + 1)
        higher = cluster.submit("--partition=high", *two_nodes("--wrap=sleep 1"), cwd=tmp_path)
        cluster.wait(higher, "COMPLETED")
        assert job.restarts == preemption, job.output
        step = newest_step(run)
    train_uninterrupted(path, tmp_path)
    assert job.wait(*ENDED, seconds=240) == "COMPLETED", job.output
    assert job.restarts == 3, job.output
    assert_same_bits(tmp_path / "runs/straight", run)


@pytest.mark.fault
def test_requeues_with_changing_workers_match_uninterrupted_run(
    tmp_path: Path, recipe: RecipeMaker, cluster: Cluster
) -> None:
    """Albumentations workers receive each signal too; their number changes with each restart."""
    albumentations = {"albumentations": [{"HorizontalFlip": {"p": 0.5}}], "workers": 1}
    path = recipe(run=LONG | {"epochs": 200}, augment=albumentations)
    run = tmp_path / "runs/tiny"
    text = path.read_text()
    job = Job(cluster, path, cwd=tmp_path)
    step = 0
    for workers in (2, 1, 3):
        job.wait("RUNNING")
        job.wait_for_step(run, step + 1)
        path.write_text(text.replace("workers: 1", f"workers: {workers}"))
        cluster("scancel", "--signal=USR1", job.id)
        job.wait("PENDING", "COMPLETED")
        step = newest_step(run)
    path.write_text(text)
    train_uninterrupted(path, tmp_path)
    assert job.wait(*ENDED, seconds=240) == "COMPLETED", job.output
    assert job.restarts == 3, job.output
    assert_same_bits(tmp_path / "runs/straight", run)


@pytest.mark.fault
def test_slurm_warns_before_the_time_limit(
    tmp_path: Path, recipe: RecipeMaker, cluster: Cluster
) -> None:
    """--signal=USR1@180 in a job of four minutes: Slurm sends the signal in the first two."""
    path = recipe(run=LONG | {"epochs": 100_000})
    options = ["--time=4", *two_nodes()]
    job = Job(cluster, path, cwd=tmp_path)
    cluster.cancel_all()
    job.id = cluster.submit(*options, ROOT / "slurm/train.sh", path, cwd=tmp_path)
    job.wait("RUNNING")
    job.wait("PENDING", seconds=200)
    assert "saved before the time limit" in job.output
    assert job.restarts == 1
    saved = newest_step(tmp_path / "runs/tiny")
    assert f"stopped by SIGUSR1 at step {saved}," in job.output


@pytest.mark.fault
def test_cancelled_job_saves_and_stays_cancelled(
    tmp_path: Path, recipe: RecipeMaker, cluster: Cluster
) -> None:
    path = recipe(run=LONG | {"epochs": 100_000, "save_every_minutes": 60})
    job = Job(cluster, path, cwd=tmp_path)
    run = tmp_path / "runs/tiny"
    wait_until((run / "metrics.jsonl").exists, seconds=60, message=lambda: job.output)
    cluster("scancel", job.id)
    assert job.wait(*ENDED) == "CANCELLED"
    assert (run / "stopped").read_text() == "SIGTERM\n", job.output
    assert newest_step(run) > 0
    wait_until(lambda: cluster("squeue", "-h") == "", seconds=30)
    assert job.restarts == 0


@pytest.mark.fault
def test_job_with_a_killed_rank_is_requeued(
    tmp_path: Path, recipe: RecipeMaker, cluster: Cluster
) -> None:
    """A crash after a new checkpoint is requeued."""
    path = recipe(run=LONG | {"epochs": 150})
    job = Job(cluster, path, cwd=tmp_path)
    run = tmp_path / "runs/tiny"
    for crash in (1, 2):
        job.wait("RUNNING")
        job.wait_for_step(run, newest_step(run) + 1)
        signal_a_task(job, signal.SIGKILL, random.Random(crash))
        wait_until(lambda: "; requeued" in job.output, seconds=60)
        job.wait("PENDING")
        assert job.restarts == crash, job.output
    train_uninterrupted(path, tmp_path)
    assert job.wait(*ENDED, seconds=240) == "COMPLETED", job.output
    assert "crashed with code" in job.output
    assert_same_bits(tmp_path / "runs/straight", run)


@pytest.mark.fault
@pytest.mark.parametrize("forever", [False, True], ids=["25 s", "too long"])
def test_controller_is_down_when_the_job_ends(
    tmp_path: Path, recipe: RecipeMaker, cluster: Cluster, forever: bool
) -> None:
    """slurmctld hangs from before the warning; it comes back after 25 s, or too late."""
    path = recipe(run=LONG)
    job = Job(cluster, path, cwd=tmp_path)
    run = tmp_path / "runs/tiny"
    job.wait_for_step(run, 1)
    with cluster.without_controller():
        signal_a_task(job, signal.SIGUSR1, random.Random(0))
        saved = lambda: "stopped by SIGUSR1" in job.output  # noqa: E731
        wait_until(saved, seconds=60, message=lambda: job.output)
        given_up = "did not respond for two minutes, so this job was not requeued"
        if forever:
            wait_until(lambda: given_up in job.output, seconds=400, message=lambda: job.output)
        else:
            time.sleep(25)
    if forever:
        assert job.wait(*ENDED) == "FAILED", job.output
        job = Job(cluster, path, cwd=tmp_path)
    assert job.wait(*ENDED, seconds=300) == "COMPLETED", job.output
    assert job.restarts == (0 if forever else 1)
    assert "resuming from step" in job.output
    assert (given_up in job.output) is False


def signal_a_task(job: Job, number: signal.Signals, choice: random.Random) -> list[int]:
    """Send a signal to one of the job's two ranks, and return the process ids of both."""
    pids = []
    for process in Path("/proc").iterdir():
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
            command = (process / "cmdline").read_bytes()
        except OSError:
            continue
        is_task = {f"SLURM_JOB_ID={job.id}".encode(), b"SLURM_STEP_NUM_TASKS=2"} <= set(variables)
        if is_task and command.startswith(b"python\0-m\0cifar_dist.train"):
            pids.append(int(process.name))
    assert len(pids) == 2
    os.kill(choice.choice(pids), number)
    return pids


@pytest.mark.fault
@pytest.mark.parametrize(
    ("number", "limit"), [(signal.SIGKILL, 5), (signal.SIGSTOP, 10)], ids=["killed", "hung"]
)
def test_lost_rank_ends_all_tasks_in_time(
    tmp_path: Path, recipe: RecipeMaker, cluster: Cluster, number: signal.Signals, limit: int
) -> None:
    """A killed rank ends the others at once, a hung one within 5 s after the timeout of 5 s."""
    path = recipe(run=LONG | {"epochs": 100_000, "timeout_seconds": 5, "save_every_minutes": 60})
    job = Job(cluster, path, cwd=tmp_path)
    metrics = tmp_path / "runs/tiny/metrics.jsonl"
    wait_until(metrics.exists, seconds=120, message=lambda: job.output)
    started = time.monotonic()
    pids = signal_a_task(job, number, random.Random(0))
    wait_until(lambda: not any(process_start_time(pid) for pid in pids), seconds=60)
    seconds = time.monotonic() - started
    print(f"{number.name} to one rank: both have ended after {seconds:.1f} s")
    assert seconds < limit
    job.wait("FAILED", seconds=60)  # not requeued, since nothing was saved
    if number == signal.SIGSTOP:
        assert "no progress for run.timeout_seconds=5" in job.output
        assert "does not respond" in job.output


@pytest.mark.fault
def test_user_error_is_not_requeued(tmp_path: Path, recipe: RecipeMaker, cluster: Cluster) -> None:
    job = Job(cluster, recipe(), "model.backbone=resnet_18", cwd=tmp_path)
    assert job.wait(*ENDED) == "FAILED"
    assert job.output.count("did you mean resnet18") == 1
    assert job.restarts == 0


def test_crash_without_preemption_is_not_requeued(tmp_path: Path, cluster: Cluster) -> None:
    """Slurm prints no PreemptTime in this partition; a job that always crashes must end."""
    options = ["--partition=high", *two_nodes(), ROOT / "slurm/train.sh"]
    job = cluster.submit(*options, cwd=tmp_path, environment={"MODULE": "no_such_module"})
    assert cluster.wait(job, *ENDED) == "FAILED"
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert "No module named no_such_module" in output
    assert "requeued" not in output
    assert cluster.job(job)["Restarts"] == "0"


@pytest.mark.fault
def test_every_task_of_an_array_is_requeued(tmp_path: Path, cluster: Cluster) -> None:
    """The last task has the id of the whole array, for which scontrol lists all tasks."""
    (tmp_path / "second_try.py").write_text(
        "import os\nraise SystemExit(0 if int(os.environ.get('SLURM_RESTART_COUNT', 0)) else 75)\n"
    )
    options = [
        "--array=0-2",
        "--cpus-per-task=1",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        ROOT / "slurm/train.sh",
    ]
    variables = {"MODULE": "second_try", "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    job = cluster.submit(*options, cwd=tmp_path, environment=variables)
    wait_until(lambda: cluster("squeue", "-h") == "", seconds=180)
    tasks = cluster("scontrol", "--oneliner", "show", "job", job).splitlines()
    assert len(tasks) == 3
    for line in tasks:
        assert " JobState=COMPLETED " in line, line
        assert " Restarts=1 " in line, line


def test_student_without_a_teacher_is_not_submitted(tmp_path: Path, recipe: RecipeMaker) -> None:
    submitted = tmp_path / "sbatch"
    submitted.write_text("#!/bin/sh\ntouch submitted\n")
    submitted.chmod(0o755)
    path = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = ROOT / "slurm/teacher_student.sh"
    command: list[str | Path] = ["bash", script, recipe("a"), recipe("b")]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert "b.yaml has no teacher" in done.stderr
    assert not (tmp_path / "submitted").exists()


def test_first_host_matches_scontrol(whole_cluster: Cluster) -> None:
    for nodes in ("n1", "n[1-2]", "n[08-11,3],login", "rack1-n[1-2],b", "gpu-7,gpu-8", "n[1,5]"):
        hosts = whole_cluster("scontrol", "show", "hostnames", nodes).split()
        assert slurm.first_host(nodes) == hosts[0]


def test_tasks_of_a_node() -> None:
    assert [slurm.tasks_of("4(x2),1", node) for node in range(3)] == [4, 4, 1]
    assert slurm.tasks_of("2", 0) == 2


def task(**changes: str) -> dict[str, str]:
    """Return the environment of task 5 of 8, the second task on the second of two nodes."""
    variables = {
        "SLURM_JOB_ID": "40001",
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NODEID": "1",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_STEP_NODELIST": "gpu[03-04]",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    }
    return variables | changes


@pytest.mark.parametrize(("visible", "local_rank"), [(4, "1"), (1, "0"), (2, "1"), (0, "1")])
def test_local_rank_is_modulo_the_visible_devices(visible: int, local_rank: str) -> None:
    assert slurm.torch_env(task(), visible_devices=visible) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(15000 + 40001 % 17000),
    }


def test_only_tasks_of_srun_get_variables() -> None:
    assert slurm.torch_env({}, visible_devices=4) == {}
    assert slurm.torch_env(task(RANK="0"), visible_devices=4) == {}  # started by a launcher
    assert slurm.torch_env(task(SLURM_STEP_NUM_TASKS="1"), visible_devices=4) == {}
    batch_script = {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}
    assert slurm.torch_env(batch_script, visible_devices=4) == {}
    given = task(MASTER_ADDR="10.0.0.1", MASTER_PORT="7")
    assert slurm.torch_env(given, visible_devices=4)["MASTER_ADDR"] == "10.0.0.1"


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda p: p.name)
def test_scripts_parse_and_use_the_same_first_port(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    if script.name == "train.sh":
        first = f"MASTER_PORT=$(({slurm.FIRST_PORT} + SLURM_JOB_ID % {slurm.PORTS}))"
        assert first in script.read_text()


@pytest.mark.fault
def test_doctor_on_two_nodes(tmp_path: Path, recipe: RecipeMaker, cluster: Cluster) -> None:
    """The job's first port is in use by another process."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    script = "slurm/doctor.sh"
    job = cluster.submit(*two_nodes("--hold"), script, recipe(), cwd=tmp_path)
    with socket.create_server(("127.0.0.1", slurm.port(job))):
        cluster("scontrol", "release", job)
        assert cluster.wait(job, *ENDED) == "COMPLETED"
    output = (tmp_path / f"slurm-{job}.out").read_text()
    assert "2 x cpu" in output
    assert "BAD" not in output


@pytest.mark.fault
def test_array_trains_recipes_times_seeds(
    tmp_path: Path, recipe: RecipeMaker, cluster: Cluster
) -> None:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    for name in ("a", "b"):
        recipe(name, run={"epochs": 1, "micro_batches": 1})
    variables = {"RECIPES": "a.yaml b.yaml", "SEEDS": "3 4"}
    options = ["--array=0-3", "--cpus-per-task=1", "slurm/table.sh"]
    job = cluster.submit(*options, cwd=tmp_path, environment=variables)
    wait_until(lambda: cluster("squeue", "-h") == "", seconds=240)
    runs = {path.parent.name for path in tmp_path.glob("runs/*/summary.json")}
    assert runs == {"a_seed3", "a_seed4", "b_seed3", "b_seed4"}, job
    done = subprocess.run(
        ["bash", "slurm/table.sh"],
        cwd=tmp_path,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "2 recipes x 2 seeds: sbatch --array=0-3" in done.stderr


@pytest.mark.fault
def test_teacher_logits_and_student_are_three_jobs(
    tmp_path: Path, recipe: RecipeMaker, cluster: Cluster
) -> None:
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    short = {"epochs": 1}
    recipe("teacher", run=short, augment={"views": 2})
    recipe(
        "student",
        run=short,
        augment={"views": 2},
        losses={"cross_entropy": {"weight": 0.5}, "distill": {"weight": 0.5}},
        teacher={"run": "runs/teacher", "placement": "cached"},
    )
    done = subprocess.run(
        ["bash", "slurm/teacher_student.sh", "teacher.yaml", "student.yaml"],
        cwd=tmp_path,
        env={**cluster.environment, "SBATCH_OPTIONS": " ".join(two_nodes())},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [
        "teacher",
        "its logits",
        "student",
    ]
    wait_until(lambda: cluster("squeue", "-h") == "", seconds=400)
    logs = "\n".join(path.read_text() for path in sorted(tmp_path.glob("slurm-*.out")))
    assert (tmp_path / "runs/student/summary.json").exists(), logs


@pytest.mark.fault
def test_preempted_trial_of_a_sweep_is_resumed_elsewhere(
    tmp_path: Path, recipe: RecipeMaker, middle_data: Path, cluster: Cluster
) -> None:
    """Two workers, one of which is preempted: each trial has the bits of an undisturbed run."""
    run = {"epochs": 30, "eval_every_epochs": 10, "batch_size": 25, "save_every_minutes": 60}
    path = recipe(run=run, data={"path": str(middle_data)}, tracking={"mode": "off"})
    rates = [0.001, 0.002, 0.003, 0.004]
    sweep = {
        "recipe": str(path),
        "set": {"data.val_size": 100},
        "search": {"optim.lr": {"choices": rates}},
        "sampler": {"name": "grid"},
    }
    (tmp_path / "lr.yaml").write_text(yaml.safe_dump(sweep))
    (tmp_path / "slurm").symlink_to(ROOT / "slurm")  # sweep.sh runs slurm/train.sh
    one_node = ["--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1"]
    options = ["--partition=low", "--array=0-1", "--exclusive", *one_node]
    job = cluster.submit(*options, ROOT / "slurm/sweep.sh", tmp_path / "lr.yaml", cwd=tmp_path)
    folders = [tmp_path / f"lr/trial_{number:04d}" for number in range(len(rates))]

    def both_train() -> bool:
        return sum((folder / "metrics.jsonl").exists() for folder in folders) >= 2

    wait_until(both_train, seconds=120, message=lambda: outputs(tmp_path))
    high = ["--partition=high", "--exclusive", *one_node]
    higher = cluster.submit(*high, "--wrap=sleep 15", cwd=tmp_path)
    cluster.wait(higher, "COMPLETED")

    def all_finished() -> bool:
        return all((folder / "predictions.safetensors").exists() for folder in folders)

    wait_until(all_finished, seconds=300, message=lambda: outputs(tmp_path))
    wait_until(lambda: cluster("squeue", "-h", "-j", job) == "", seconds=60)
    text = outputs(tmp_path)
    assert "; requeued" in text
    assert "lr/best.yaml" in text
    logs = [file.read_text() for file in sorted((tmp_path / "lr/logs").glob("*.txt"))]
    assert any("resuming from step" in log for log in logs)
    for number, rate in enumerate(rates):
        words = ["data.val_size=100", f"optim.lr={rate}", f"name=alone_{number}"]
        ranks = Launch("train", [path, *words], cwd=tmp_path)
        assert ranks.wait(600) == [0], ranks.output
        assert_same_bits(tmp_path / f"runs/alone_{number}", folders[number])


def outputs(folder: Path) -> str:
    """Return the output of all jobs."""
    return "\n".join(file.read_text() for file in sorted(folder.glob("slurm-*.out")))
