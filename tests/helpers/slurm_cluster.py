"""A real Slurm of two nodes on one machine: own munged, slurmctld and two slurmd in a temporary folder.

Nothing of the machine's own Slurm is read or written; all processes end with the cluster, by their id.
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

# cred_expire: Slurm holds a requeued job back until the credentials of its last start have expired.
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


def why_not() -> str | None:
    """Why this machine cannot run the cluster, after installing what it lacks; None when it can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm of our own needs Linux and root"
    if all(shutil.which(daemon) for daemon in DAEMONS):
        return None
    if shutil.which("apt-get") is None:
        return "no Slurm is installed, and there is no apt-get to install it"
    with Path(tempfile.gettempdir(), "slurm_install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process of the tests installs, the others wait
        if all(shutil.which(daemon) for daemon in DAEMONS):
            return None
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--no-install-recommends", "-y", *PACKAGES]):
            done = subprocess.run(
                ["apt-get", "-qq", *command], env=environment, capture_output=True, text=True
            )
            if done.returncode != 0:
                return f"apt-get {command[0]} failed: {done.stderr.strip()[-200:]}"
    return None


class Cluster:
    """Nodes n1 and n2, each with 4 CPUs and 4 GPUs by name only.

    Partitions: `low` and `rude` are preempted by `high`, with 30 s of grace and with none.
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
        self._run_beside("munged", "--foreground", "--force", *munged)
        wait_until((self.folder / "munge.socket").exists, seconds=20)
        self._run_beside("slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            (self.folder / f"spool.{node}").mkdir()
            self._run_beside("slurmd", "-D", "-N", node)
        wait_until(lambda: self("sinfo", "-h", "-o", "%T %D", "-p", "low") == "idle 2", seconds=60)

    def _run_beside(self, *command: str) -> None:
        output = (self.folder / f"{command[0]}.out").open("ab")
        self.processes.append(
            subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
        )

    @contextmanager
    def without_controller(self) -> Iterator[None]:
        """slurmctld hangs: it takes connections and answers none."""
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
        """What a command of Slurm prints; it may fail while the controller is busy."""
        done = subprocess.run(
            [str(part) for part in command],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return done.stdout.strip()

    def submit(
        self, *arguments: object, cwd: Path, environment: dict[str, str] | None = None
    ) -> int:
        """sbatch with these arguments; the job's id."""
        done = subprocess.run(
            ["sbatch", "--parsable", *(str(argument) for argument in arguments)],
            env={**self.environment, **(environment or {})},
            cwd=cwd,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, ..."""
        words = self("scontrol", "--oneliner", "show", "job", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, job: int) -> str:
        return self.job(job).get("JobState", "?")

    def wait(self, job: int, *states: str, seconds: float = 120) -> str:
        """Until the job is in one of these states; which one."""
        wait_until(
            lambda: self.state(job) in states,
            seconds=seconds,
            otherwise=lambda: f"job {job} is {self.job(job)}",
        )
        return self.state(job)

    def cancel_all(self) -> None:
        """End every job, so that the next test finds two idle nodes."""
        self("scancel", "--signal=KILL", "--full", "--user=root")
        self("scancel", "--user=root")
        wait_until(lambda: self("squeue", "-h") == "", seconds=60)


def wait_until(
    true: Callable[[], bool], *, seconds: float, otherwise: Callable[[], object] | None = None
) -> None:
    """Look every 0.1 s; AssertionError with what `otherwise` says when it does not come true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, otherwise() if otherwise else f"not in {seconds} s"
        time.sleep(0.1)


def two_nodes(*options: str) -> Sequence[str]:
    """Options of sbatch for one task on each of the two nodes."""
    return (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=1",
        "--cpus-per-task=1",
        "--exclusive",
        *options,
    )
