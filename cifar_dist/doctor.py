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
from cifar_dist.data.batches import num_steps_per_epoch
from cifar_dist.data.dataset import SPLITS, data_digest, read_digest, read_split
from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.launch import destroy_distributed, init_distributed, set_slurm_env
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.schema import Recipe, to_yaml
from cifar_dist.tracking.tracker import decide_mode
from cifar_dist.training.resume import check_world_size
from cifar_dist.utils.cli import add_recipe, command_parser
from cifar_dist.utils.errors import UserError, first_line, is_main_rank, run_command, user_message
from cifar_dist.utils.files import make_folder
from cifar_dist.utils.host import host_id
from cifar_dist.utils.log import log_to_terminal
from cifar_dist.utils.precision import check_precision

MEET_SECONDS = 60
SEE_SECONDS = 5  # for a file of another machine to appear; network file systems cache folders
CLOCKS_SECONDS = 5
NODE_BUS = 50  # GB/s that the bus between a machine's GPUs has at least, PCIe 5 or NVLink
GRADIENT_BYTES = 100 << 20  # those of a ResNet-50 in float32


@dataclass(frozen=True)
class Check:
    """One line of the table; `fine` is None for what is only good to know."""

    name: str
    ok: bool | None
    message: str


def same(context: DistContext, what: str, value: str, remedy: str) -> Check:
    """Whether all ranks have the same of something."""
    seen = context.all_gather_object(value)
    other = [rank for rank, theirs in enumerate(seen) if theirs != seen[0]]
    says = f"{seen[0]} on all ranks"
    if other:
        says = f"{seen[0]} on rank 0, {seen[other[0]]} on rank {other[0]}; {remedy}"
    return Check(what, not other, says)


def code_digest() -> str:
    """SHA-256 of the package's own files, shortened."""
    digest = hashlib.sha256()
    for path in sorted(Path(cifar_dist.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def devices(context: DistContext, device: torch.device) -> Check:
    """Which device each rank has; two ranks on one GPU cannot talk by NCCL."""
    mine = platform.processor() or "CPU"
    if device.type == "cuda":
        mine = (
            f"{torch.cuda.get_device_name(device)} {torch.cuda.get_device_properties(device).uuid}"
        )
    seen = Counter(context.all_gather_object(f"{host_id()} {mine}"))
    if device.type == "cuda" and max(seen.values()) > 1:
        return Check("devices", False, "two ranks share a GPU; start one task a GPU")
    machines = Counter(name.partition(",")[0] for name in context.all_gather_object(host_id()))
    here = ", ".join(f"{count} on {name}" for name, count in machines.items())
    return Check("devices", True, f"{context.world_size} x {device.type}: {here}")


def shared_folder(context: DistContext, folder: Path) -> Check:
    """Whether each rank sees within 5 s what every other has written to the folder."""
    mine = context.run_on_main(lambda: f".doctor_{secrets.token_hex(4)}_")  # another may be at work

    def write() -> None:
        make_folder(folder)
        (folder / f"{mine}{context.rank}").write_text(str(context.rank))

    try:
        context.run_on_all(write)
    except (UserError, OSError) as error:
        with suppress(OSError):  # nothing of it is there
            (folder / f"{mine}{context.rank}").unlink()
        return Check("run.output_dir", False, user_message(error) or str(error))
    wanted = {f"{mine}{rank}" for rank in range(context.world_size)}
    begun = time.monotonic()
    while True:
        missing = wanted - {path.name for path in folder.glob(f"{mine}*")}
        if not missing or time.monotonic() - begun > SEE_SECONDS:
            break
        time.sleep(0.1)
    blind = [rank for rank, names in enumerate(context.all_gather_object(sorted(missing))) if names]
    slowest = max(context.all_gather_object(time.monotonic() - begun))
    (folder / f"{mine}{context.rank}").unlink()
    if blind:
        says = f"rank {blind[0]} does not see what others write; choose a shared run.output_dir"
        return Check("run.output_dir", False, f"{folder}: {says}")
    free = shutil.disk_usage(folder).free / 2**30
    return Check(
        "run.output_dir",
        free > 1,
        f"{folder}: seen by all after {slowest:.1f} s, {free:,.0f} GiB free",
    )


def data(recipe: Recipe, context: DistContext) -> Check:
    """Whether all ranks see the same data, whole, and enough for a step."""
    path = Path(recipe.data.path)
    if not all(context.all_gather_object((path / "digest.json").exists())):
        says = f"{path}: some rank sees none; run python -m cifar_dist.prepare"
        return Check("data", False, says)

    def digest() -> str:
        for name in SPLITS:
            read_split(path, name)
        rows = read_digest(path)["train"]["rows"]
        num_steps_per_epoch(rows - recipe.data.val_size, recipe.run.batch_size)
        return data_digest(path)[:12]

    try:
        seen = context.run_on_all(digest)
    except (UserError, OSError) as error:
        return Check("data", False, str(error))
    return same(context, "data", seen[context.rank], "prepare it once, in a shared folder")


def clocks(context: DistContext) -> Check:
    """How far the machines' clocks lie apart; only what people read depends on them."""
    context.all_gather_object(0)  # a barrier: all ranks look at about the same time
    seen = context.all_gather_object(time.time())
    apart = max(seen) - min(seen)
    return Check("clocks", None if apart < CLOCKS_SECONDS else False, f"{apart:.2f} s apart")


def traffic(context: DistContext, device: torch.device) -> list[Check]:
    """What an all-reduce of gradients and a vote cost here; nothing for a process that is alone."""
    if context.world_size == 1:
        return []
    gradients = torch.zeros(GRADIENT_BYTES // 4, device=device)
    seconds = fastest(lambda: dist.all_reduce(gradients), device)
    bus = 2 * (context.world_size - 1) / context.world_size * GRADIENT_BYTES / seconds / 1e9
    size = f"{GRADIENT_BYTES >> 20} MiB in {seconds * 1e3:.1f} ms"
    vote = fastest(lambda: context.all_reduce_max([0.0]), device)
    says = f"{size}: {bus:.2f} GB/s (bus), {dist.get_backend()}"
    slow = (
        device.type == "cuda"
        and len(set(context.all_gather_object(host_id()))) == 1
        and bus < NODE_BUS
    )
    if slow:
        says += f"; GPUs of one machine reach {NODE_BUS} or more (`nvidia-smi topo -m`, NCCL_DEBUG=INFO)"
    return [
        Check("all-reduce", False if slow else None, says),
        Check("vote", None, f"{vote * 1e3:.2f} ms"),
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


def tried(context: DistContext, what: str, act: Callable[[], str]) -> Check:
    """What `act` says on rank 0, or the sentence of the UserError that some rank met."""
    try:
        return Check(what, True, context.run_on_all(act)[0])
    except (UserError, OSError) as error:
        return Check(what, False, str(error))


def examine(recipe: Recipe, context: DistContext, device: torch.device) -> list[Check]:
    """All findings; every rank calls it, and each gets the same."""

    def precision() -> str:
        check_precision(recipe.run.precision, device)
        return f"{recipe.run.precision} on {device.type}"

    def micro_batches() -> str:
        micro_batches = recipe.run.micro_batches or context.world_size
        check_world_size(recipe, micro_batches=micro_batches, world_size=context.world_size)
        return f"{micro_batches} micro-batches of {recipe.run.batch_size} rows on {context.world_size} processes"

    packages = " ".join(f"{name} {version(name)}" for name in ("torch", "timm", "accelerate"))
    versions = f"Python {platform.python_version()} {packages}"
    mode, reason = decide_mode(recipe.tracking.mode) if context.is_main else ("off", "")
    return [
        devices(context, device),
        same(context, "code", code_digest(), "install the same everywhere"),
        same(context, "versions", versions, "install the same everywhere"),
        same(
            context,
            "recipe",
            hashlib.sha256(to_yaml(recipe).encode()).hexdigest()[:12],
            "start all from one file",
        ),
        data(recipe, context),
        tried(context, "precision", precision),
        tried(context, "micro_batches", micro_batches),
        shared_folder(context, Path(recipe.run.output_dir)),
        clocks(context),
        *traffic(context, device),
        Check("W&B", None, f"{mode} ({reason})"),
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
    set_slurm_env()
    log_to_terminal()
    recipe = load_recipe(options.recipe, options.overrides)
    try:
        accelerator = init_distributed(timeout_seconds=MEET_SECONDS, threads=recipe.run.threads)
        context = DistContext.of(accelerator, timeout=timedelta(seconds=MEET_SECONDS))
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
    findings = examine(recipe, context, accelerator.device)
    destroy_distributed(accelerator)
    if is_main_rank():
        for finding in findings:
            mark = {True: "ok ", False: "BAD", None: "   "}[finding.ok]
            print(f"{mark}  {finding.name:<11} {finding.message}")
    return 2 if any(finding.ok is False for finding in findings) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
