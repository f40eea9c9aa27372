"""A real two-node Slurm on one machine: munged, slurmctld and two slurmd in a temporary folder.

It does not touch a Slurm that is installed on the machine, and stops only its own processes.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from launcher import free_port

ROOT = Path(__file__).parents[2]
DAEMONS = ("munged", "slurmctld", "slurmd")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")

# cred_expire: Slurm delays a requeued job until the credentials of its last start have expired.
SLURM_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=0
KillWait=30
ReturnToService=2
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[0]} CPUs=4 RealMemory=4000 Gres=gpu:4
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=4000 Gres=gpu:4
PartitionName=low Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=rude Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=0
PartitionName=high Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


def unavailable_reason() -> str | None:
    """Install Slurm if needed; return why this machine cannot run the cluster, or None if it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "the Slurm cluster needs Linux and root"
    if all(shutil.which(daemon) for daemon in DAEMONS):
        return None
    if shutil.which("apt-get") is None:
        return "Slurm is not installed, and there is no apt-get to install it"
    with Path(tempfile.gettempdir(), "slurm_install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one test process installs, the others wait
        if all(shutil.which(daemon) for daemon in DAEMONS):
            return None
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--no-install-recommends", "-y", *PACKAGES]):
            result = subprocess.run(
                ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True
            )
            if result.returncode != 0:
                return f"apt-get {command[0]} failed: {result.stderr.strip()[-200:]}"
    return None


class Cluster:
    """Nodes n1 and n2, each with 4 CPUs and 4 GPUs that exist by name only.

    Jobs in `high` preempt those in `low` (30 s grace time) and `rude` (none).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_WAIT_POLICY": "passive",
        }

    def start(self) -> None:
        (self.folder / "state").mkdir()
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        ports = [free_port() for _ in range(3)]
        configuration = SLURM_CONF.format(
            folder=self.folder, controller_port=ports[0], ports=ports[1:]
        )
        (self.folder / "slurm.conf").write_text(configuration)
        for number in range(4):
            (self.folder / f"gpu{number}").touch()
        gpus = f"NodeName=n[1-2] Name=gpu File={self.folder}/gpu[0-3]\n"
        (self.folder / "gres.conf").write_text(gpus)
        options = {
            "key-file": key,
            "socket": self.folder / "munge.socket",
            "pid-file": self.folder / "munged.pid",
            "log-file": self.folder / "munged.log",
            "seed-file": self.folder / "munged.seed",
        }
        munged = [f"--{name}={path}" for name, path in options.items()]
        self._start_daemon("munged", "--foreground", "--force", *munged)
        wait_until((self.folder / "munge.socket").exists, seconds=20)
        self._start_daemon("slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            (self.folder / f"spool.{node}").mkdir()
            self._start_daemon("slurmd", "-D", "-N", node)
        wait_until(lambda: self("sinfo", "-h", "-o", "%T %D", "-p", "low") == "idle 2", seconds=60)

    def _start_daemon(self, *command: str) -> None:
        output = (self.folder / f"{command[0]}.out").open("ab")
        self.processes.append(
            subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
        )

    @contextmanager
    def without_controller(self) -> Iterator[None]:
        """Suspend slurmctld, which then accepts connections and does not respond."""
        controller = self.processes[1]
        controller.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            controller.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        self.cancel_all()
        for process in reversed(self.processes):
            process.terminate()
        for process in self.processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def __call__(self, *command: object) -> str:
        """Return the output of a Slurm command, which may fail while the controller is busy."""
        result = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return result.stdout.strip()

    def submit(
        self, *arguments: object, cwd: Path, environment: dict[str, str] | None = None
    ) -> int:
        """Run sbatch with these arguments and return the job's id."""
        result = subprocess.run(
            ["sbatch", "--parsable", *(str(argument) for argument in arguments)],
            env={**self.environment, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return int(result.stdout.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """Return the fields of `scontrol show job`: JobState, Restarts, ExitCode, ..."""
        words = self("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: int) -> str:
        return self.job(job).get("JobState", "?")

    def wait(self, job: int, *states: str, seconds: float = 120) -> str:
        """Wait until the job is in one of these states, and return it."""
        wait_until(
            lambda: self.state(job) in states,
            seconds=seconds,
            message=lambda: f"job {job} is {self.job(job)}",
        )
        return self.state(job)

    def cancel_all(self) -> None:
        """End all jobs, so that the next test starts with two idle nodes."""
        self("scancel", "--signal=KILL", "--full", "--user=root")
        self("scancel", "--user=root")
        wait_until(lambda: self("squeue", "-h") == "", seconds=60)


def wait_until(
    condition: Callable[[], bool], *, seconds: float, message: Callable[[], object] | None = None
) -> None:
    """Check every 0.1 s until `condition` holds; raise AssertionError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, message() if message else f"not within {seconds} s"
        time.sleep(0.1)


def two_nodes(*options: str) -> Sequence[str]:
    """Return sbatch options for one task on each of the two nodes."""
    return (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        "--cpus-per-task=1",
        "--exclusive",
        *options,
    )
