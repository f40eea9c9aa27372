"""Is this a place to train at? Start it as the training will be started; it says what is in the way."""

from __future__ import annotations

import hashlib
import platform
import secrets
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist

import cifar_dist
from cifar_dist.data.batches import count_steps
from cifar_dist.data.dataset import SPLITS, data_digest, read_digest, read_split
from cifar_dist.distributed.context import Ranks
from cifar_dist.distributed.launch import adopt_slurm_ranks, end_processes, start_processes
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe, to_yaml
from cifar_dist.tracking.tracker import decide_mode
from cifar_dist.training.resume import check_world
from cifar_dist.utils.cli import add_recipe, command_parser
from cifar_dist.utils.errors import UserError, first_line, is_main_rank, run_command, sentence_of
from cifar_dist.utils.files import make_folder
from cifar_dist.utils.host import machine
from cifar_dist.utils.log import log_to_terminal
from cifar_dist.utils.precision import check_precision

MEET_SECONDS = 60
SEE_SECONDS = 5  # for a file of another machine to appear; network file systems cache folders
CLOCKS_SECONDS = 5
NODE_BUS = 50  # GB/s that the bus between a machine's GPUs has at least, PCIe 5 or NVLink
GRADIENT_BYTES = 100 << 20  # those of a ResNet-50 in float32


@dataclass(frozen=True)
class Finding:
    """One line of the table; `fine` is None for what is only good to know."""

    what: str
    fine: bool | None
    says: str


def same(ranks: Ranks, what: str, value: str, remedy: str) -> Finding:
    """Whether all ranks have the same of something."""
    seen = ranks.each(value)
    other = [rank for rank, theirs in enumerate(seen) if theirs != seen[0]]
    says = f"{seen[0]} on all ranks"
    if other:
        says = f"{seen[0]} on rank 0, {seen[other[0]]} on rank {other[0]}; {remedy}"
    return Finding(what, not other, says)


def code_digest() -> str:
    """SHA-256 of the package's own files, shortened."""
    digest = hashlib.sha256()
    for path in sorted(Path(cifar_dist.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def devices(ranks: Ranks, device: torch.device) -> Finding:
    """Which device each rank has; two ranks on one GPU cannot talk by NCCL."""
    mine = platform.processor() or "CPU"
    if device.type == "cuda":
        mine = (
            f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_properties(device).uuid}"
        )
    seen = Counter(ranks.each(f"{machine()} {mine}"))
    if device.type == "cuda" and max(seen.values()) > 1:
        return Finding("devices", False, "two ranks share a GPU; start one task a GPU")
    machines = Counter(name.partition(",")[0] for name in ranks.each(machine()))
    here = ", ".join(f"{count} on {name}" for name, count in machines.items())
    return Finding("devices", True, f"{ranks.world_size} x {device.type}: {here}")


def shared_folder(ranks: Ranks, folder: Path) -> Finding:
    """Whether each rank sees within 5 s what every other has written to the folder."""
    mine = ranks.main_does(lambda: f".doctor_{secrets.token_hex(4)}_")  # another may be at work

    def write() -> None:
        make_folder(folder)
        (folder / f"{mine}{ranks.rank}").write_text(str(ranks.rank))

    try:
        ranks.together(write)
    except (UserError, OSError) as error:
        with suppress(OSError):  # nothing of it is there
            (folder / f"{mine}{ranks.rank}").unlink()
        return Finding("run.output", False, sentence_of(error) or str(error))
    wanted = {f"{mine}{rank}" for rank in range(ranks.world_size)}
    begun = time.monotonic()
    while True:
        missing = wanted - {path.name for path in folder.glob(f"{mine}*")}
        if not missing or time.monotonic() - begun > SEE_SECONDS:
            break
        time.sleep(0.1)
    blind = [rank for rank, names in enumerate(ranks.each(sorted(missing))) if names]
    slowest = max(ranks.each(time.monotonic() - begun))
    (folder / f"{mine}{ranks.rank}").unlink()
    if blind:
        says = f"rank {blind[0]} does not see what others write; choose a shared run.output"
        return Finding("run.output", False, f"{folder}: {says}")
    free = shutil.disk_usage(folder).free / 2**30
    return Finding(
        "run.output",
        free > 1,
        f"{folder}: seen by all after {slowest:.1f} s, {free:,.0f} GiB free",
    )


def data(recipe: Recipe, ranks: Ranks) -> Finding:
    """Whether all ranks see the same data, whole, and enough for a step."""
    path = Path(recipe.data.path)
    if not all(ranks.each((path / "digest.json").exists())):
        says = f"{path}: some rank sees none; run python -m cifar_dist.prepare"
        return Finding("data", False, says)

    def digest() -> str:
        for name in SPLITS:
            read_split(path, name)
        rows = read_digest(path)["train"]["rows"]
        count_steps(rows - recipe.data.holdout, recipe.run.batch_size)
        return data_digest(path)[:12]

    try:
        seen = ranks.together(digest)
    except (UserError, OSError) as error:
        return Finding("data", False, str(error))
    return same(ranks, "data", seen[ranks.rank], "prepare it once, in a shared folder")


def clocks(ranks: Ranks) -> Finding:
    """How far the machines' clocks lie apart; only what people read depends on them."""
    ranks.each(0)  # a barrier: all ranks look at about the same time
    seen = ranks.each(time.time())
    apart = max(seen) - min(seen)
    return Finding("clocks", None if apart < CLOCKS_SECONDS else False, f"{apart:.2f} s apart")


def traffic(ranks: Ranks, device: torch.device) -> list[Finding]:
    """What an all-reduce of gradients and a vote cost here; nothing for a process that is alone."""
    if ranks.world_size == 1:
        return []
    gradients = torch.zeros(GRADIENT_BYTES // 4, device=device)
    seconds = fastest(lambda: dist.all_reduce(gradients), device)
    bus = 2 * (ranks.world_size - 1) / ranks.world_size * GRADIENT_BYTES / seconds / 1e9
    size = f"{GRADIENT_BYTES >> 20} MiB in {seconds * 1e3:.1f} ms"
    vote = fastest(lambda: ranks.largest([0.0]), device)
    says = f"{size}: {bus:.2f} GB/s (bus), {dist.get_backend()}"
    slow = device.type == "cuda" and len(set(ranks.each(machine()))) == 1 and bus < NODE_BUS
    if slow:
        says += f"; GPUs of one machine reach {NODE_BUS} or more (`nvidia-smi topo -m`, NCCL_DEBUG=INFO)"
    return [
        Finding("all-reduce", False if slow else None, says),
        Finding("vote", None, f"{vote * 1e3:.2f} ms"),
    ]


def fastest(act: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of five."""
    times = []
    for _ in range(5):
        begun = time.perf_counter()
        act()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return min(times)


def tried(ranks: Ranks, what: str, act: Callable[[], str]) -> Finding:
    """What `act` says on rank 0, or the sentence of the UserError that some rank met."""
    try:
        return Finding(what, True, ranks.together(act)[0])
    except (UserError, OSError) as error:
        return Finding(what, False, str(error))


def examine(recipe: Recipe, ranks: Ranks, device: torch.device) -> list[Finding]:
    """All findings; every rank calls it, and each gets the same."""

    def precision() -> str:
        check_precision(recipe.run.precision, device)
        return f"{recipe.run.precision} on {device.type}"

    def shards() -> str:
        shards = recipe.run.shards or ranks.world_size
        check_world(recipe, shards=shards, world_size=ranks.world_size)
        return f"{shards} shards of {recipe.run.batch_size} rows on {ranks.world_size} processes"

    packages = " ".join(f"{name} {version(name)}" for name in ("torch", "timm", "accelerate"))
    versions = f"Python {platform.python_version()} {packages}"
    mode, reason = decide_mode(recipe.tracking.mode) if ranks.is_main else ("off", "")
    return [
        devices(ranks, device),
        same(ranks, "code", code_digest(), "install the same everywhere"),
        same(ranks, "versions", versions, "install the same everywhere"),
        same(
            ranks,
            "recipe",
            hashlib.sha256(to_yaml(recipe).encode()).hexdigest()[:12],
            "start all from one file",
        ),
        data(recipe, ranks),
        tried(ranks, "precision", precision),
        tried(ranks, "shards", shards),
        shared_folder(ranks, Path(recipe.run.output)),
        clocks(ranks),
        *traffic(ranks, device),
        Finding("W&B", None, f"{mode} ({reason})"),
    ]


def main(arguments: list[str]) -> int:
    parser = command_parser(
        "doctor",
        "Check a launch on the spot: start it as the training will be started. Exit code 0: train; "
        "2: something is in the way.",
        "python -m cifar_dist.doctor recipes/r18_32.yaml",
        "accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml -m cifar_dist.doctor "
        "recipes/r50_224.yaml",
        "sbatch --nodes=2 --ntasks-per-node=4 --gpus-per-node=4 slurm/doctor.sh recipes/r50_224.yaml",
    )
    add_recipe(parser, "a YAML file, see recipes/")
    options = parser.parse_intermixed_args(arguments)
    adopt_slurm_ranks()
    log_to_terminal()
    recipe = load_recipe(options.recipe, options.overrides)
    try:
        accelerator = start_processes(timeout_seconds=MEET_SECONDS, threads=recipe.run.threads)
        ranks = Ranks.of(accelerator, timeout=timedelta(seconds=MEET_SECONDS))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise UserError(
            f"the processes did not meet within {MEET_SECONDS} s ({first_line(error)}): "
            f"is MASTER_ADDR the first machine's address as seen from {socket.gethostname()}, "
            "and its MASTER_PORT open between the machines?"
        ) from None
    except RuntimeError as error:
        raise UserError(
            f"the processes cannot start together ({first_line(error)}); if that is about an address or "
            "a socket, set GLOO_SOCKET_IFNAME, and on GPUs NCCL_SOCKET_IFNAME, to the interface of the "
            "network between the machines (`ip addr`)"
        ) from None
    findings = examine(recipe, ranks, accelerator.device)
    end_processes(accelerator)
    if is_main_rank():
        for finding in findings:
            mark = {True: "ok ", False: "BAD", None: "   "}[finding.fine]
            print(f"{mark}  {finding.what:<11} {finding.says}")
    return 2 if any(finding.fine is False for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
