"""Check a launch before a training starts: processes, code, recipe, data, model, storage, network."""

from __future__ import annotations

import hashlib
import platform
import secrets
import shutil
import socket
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
from accelerate import Accelerator

import cifar_dist
from cifar_dist.data.batches import num_steps_per_epoch
from cifar_dist.data.dataset import SPLITS, class_names, data_digest, read_labels, read_split
from cifar_dist.data.training_rows import select_rows
from cifar_dist.distributed.context import DistContext
from cifar_dist.distributed.launch import destroy_distributed, init_distributed
from cifar_dist.recipe.schema import Recipe, to_yaml
from cifar_dist.recipe.session import format_precision, resolve_precision
from cifar_dist.tracking.tracker import decide_mode
from cifar_dist.training.start import (
    check_world_size,
    describe_model,
    describe_teachers,
    describe_weights,
)
from cifar_dist.utils.errors import UserError, first_line, user_message
from cifar_dist.utils.files import make_folder
from cifar_dist.utils.process import host_id

MEET_SECONDS = 60
VISIBLE_SECONDS = 5  # for a file of another machine to appear; network file systems cache folders
MAX_CLOCK_SKEW_SECONDS = 5
MIN_BUS_BANDWIDTH = 50  # GB/s between the GPUs of one machine, reached by PCIe 5 and NVLink
GRADIENT_BYTES = 100 << 20  # the float32 gradients of a ResNet-50


@dataclass(frozen=True)
class Check:
    """One line of the table; `ok` is None for a line that is information only."""

    name: str
    ok: bool | None
    message: str


def check_equal(context: DistContext, name: str, value: str, remedy: str) -> Check:
    """Check that `value` is equal on all ranks."""
    values = context.all_gather_object(value)
    other = next((rank for rank, theirs in enumerate(values) if theirs != values[0]), None)
    if other is None:
        return Check(name, True, f"{value} on all ranks")
    return Check(name, False, f"{values[0]} on rank 0, {values[other]} on rank {other}; {remedy}")


def code_digest() -> str:
    """Return the first 12 digits of the SHA-256 of the package's source files."""
    digest = hashlib.sha256()
    for path in sorted(Path(cifar_dist.__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def check_devices(context: DistContext, device: torch.device) -> Check:
    """Check that no two ranks share a GPU, which NCCL does not allow."""
    hosts = context.all_gather_object(host_id())
    if device.type == "cuda":
        gpu = str(torch.cuda.get_device_properties(device).uuid)
        gpus = zip(hosts, context.all_gather_object(gpu), strict=True)
        if max(Counter(gpus).values()) > 1:
            return Check("devices", False, "two ranks share a GPU; start one task per GPU")
    machines = Counter(host.partition(",")[0] for host in hosts)
    counts = ", ".join(f"{count} on {host}" for host, count in machines.items())
    return Check("devices", True, f"{context.world_size} x {device.type}: {counts}")


def check_shared_folder(context: DistContext, folder: Path) -> Check:
    """Check that each rank sees within 5 s the files that all other ranks write to the folder."""
    name = "run.output_dir"
    # A random prefix: several doctors may run at once.
    prefix = context.run_on_main(lambda: f".doctor_{secrets.token_hex(4)}_")
    file = folder / f"{prefix}{context.rank}"

    def write() -> None:
        make_folder(folder)
        file.write_text(str(context.rank))

    try:
        context.run_on_all(write)
    except (UserError, OSError) as error:
        with suppress(OSError):
            file.unlink()
        return Check(name, False, user_message(error) or str(error))
    expected = {f"{prefix}{rank}" for rank in range(context.world_size)}
    start = time.monotonic()
    while True:
        missing = expected - {path.name for path in folder.glob(f"{prefix}*")}
        if not missing or time.monotonic() - start > VISIBLE_SECONDS:
            break
        time.sleep(0.1)
    blind = [
        rank
        for rank, any_missing in enumerate(context.all_gather_object(bool(missing)))
        if any_missing
    ]
    slowest = max(context.all_gather_object(time.monotonic() - start))
    file.unlink()
    if blind:
        return Check(
            name,
            False,
            f"{folder}: rank {blind[0]} does not see the files of other ranks; choose a shared "
            "run.output_dir",
        )
    free = shutil.disk_usage(folder).free / 2**30
    message = f"{folder}: visible to all ranks after {slowest:.1f} s, {free:,.0f} GiB free"
    return Check(name, free > 1, message)


def check_data(recipe: Recipe, context: DistContext) -> Check:
    """Check that all ranks see the same undamaged data, and enough of it for a batch."""
    path = Path(recipe.data.path)
    if not all(context.all_gather_object((path / "digest.json").exists())):
        message = f"{path}: not visible to every rank; run python -m cifar_dist.prepare"
        return Check("data", False, message)

    def digest() -> str:
        for split in SPLITS:
            read_split(path, split)
        class_names(path, recipe.data.labels)
        rows, _ = select_rows(recipe.data, read_labels(path, "train", recipe.data.labels))
        num_steps_per_epoch(len(rows), recipe.run.batch_size)
        return data_digest(path)[:12]

    try:
        digests = context.run_on_all(digest)
    except (UserError, OSError) as error:
        return Check("data", False, str(error))
    remedy = "prepare it once, in a shared folder"
    return check_equal(context, "data", digests[context.rank], remedy)


def check_clocks(context: DistContext) -> Check:
    """Check the skew of the machines' clocks, which affects only the times in logs."""
    context.all_gather_object(0)  # a barrier, so that all ranks read their clocks together
    times = context.all_gather_object(time.time())
    skew = max(times) - min(times)
    return Check("clocks", None if skew < MAX_CLOCK_SKEW_SECONDS else False, f"{skew:.2f} s apart")


def check_bandwidth(context: DistContext, device: torch.device) -> list[Check]:
    """Measure an all-reduce of gradients, and the poll of the ranks; [] for a single process."""
    if context.world_size == 1:
        return []
    gradients = torch.zeros(GRADIENT_BYTES // 4, device=device)
    seconds = fastest(lambda: dist.all_reduce(gradients), device)
    bus = 2 * (context.world_size - 1) / context.world_size * GRADIENT_BYTES / seconds / 1e9
    poll = fastest(lambda: context.all_reduce_max([0.0]), device)
    message = (
        f"{GRADIENT_BYTES >> 20} MiB in {seconds * 1e3:.1f} ms: {bus:.2f} GB/s (bus), "
        f"{dist.get_backend()}"
    )
    one_machine = len(set(context.all_gather_object(host_id()))) == 1
    slow = device.type == "cuda" and one_machine and bus < MIN_BUS_BANDWIDTH
    if slow:
        message += (
            f"; expected at least {MIN_BUS_BANDWIDTH} between the GPUs of one machine "
            "(check `nvidia-smi topo -m` and NCCL_DEBUG=INFO)"
        )
    return [
        Check("all-reduce", False if slow else None, message),
        Check("poll", None, f"{poll * 1e3:.2f} ms"),
    ]


def fastest(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of five calls."""
    times = []
    for _ in range(5):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def check_on_all(context: DistContext, name: str, function: Callable[[], str]) -> Check:
    """Return rank 0's message of `function`, or the first error of any rank."""
    try:
        return Check(name, True, context.run_on_all(function)[0])
    except (UserError, OSError) as error:
        return Check(name, False, str(error))


def run_checks(recipe: Recipe, context: DistContext, device: torch.device) -> list[Check]:
    """Run all checks; every rank calls this and gets the same results."""

    resolved = recipe  # a cache of logits depends on the resolved precision

    def precision() -> str:
        nonlocal resolved
        resolved = resolve_precision(recipe, context, device)
        precision = resolved.run.precision
        return f"{format_precision(recipe.run.precision, precision)} on {device.type}"

    def teachers() -> str:
        return context.run_on_main(lambda: describe_teachers(resolved))

    def micro_batches() -> str:
        count = recipe.run.micro_batches or context.world_size
        check_world_size(recipe, micro_batches=count, world_size=context.world_size)
        return f"{count} micro-batches of {recipe.run.batch_size} rows on {context.world_size} processes"

    packages = " ".join(f"{name} {version(name)}" for name in ("torch", "timm", "accelerate"))
    versions = f"Python {platform.python_version()} {packages}"
    recipe_digest = hashlib.sha256(to_yaml(recipe).encode()).hexdigest()[:12]
    install = "install the same version everywhere"
    mode, reason = decide_mode(recipe.tracking.mode) if context.is_main else ("off", "")
    return [
        check_devices(context, device),
        check_equal(context, "code", code_digest(), install),
        check_equal(context, "versions", versions, install),
        check_equal(context, "recipe", recipe_digest, "start all ranks from one file"),
        check_data(recipe, context),
        check_on_all(context, "precision", precision),
        check_on_all(context, "micro_batches", micro_batches),
        check_on_all(context, "model", lambda: describe_model(recipe)),
        check_on_all(context, "weights", lambda: describe_weights(recipe)),
        check_on_all(context, "teachers", teachers),
        check_shared_folder(context, Path(recipe.run.output_dir)),
        check_clocks(context),
        *check_bandwidth(context, device),
        Check("W&B", None, f"{mode} ({reason})"),
    ]


def connect(recipe: Recipe) -> tuple[Accelerator, DistContext]:
    """Join the launcher's process group; UserError with what to check if that fails."""
    try:
        accelerator = init_distributed(timeout_seconds=MEET_SECONDS, threads=recipe.run.threads)
        context = DistContext.of(accelerator, timeout=timedelta(seconds=MEET_SECONDS))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        raise UserError(
            f"the processes did not connect within {MEET_SECONDS} s ({first_line(error)}); check that "
            f"MASTER_ADDR is the first machine's address as seen from {socket.gethostname()}, and "
            "that its MASTER_PORT is open between the machines"
        ) from None
    except RuntimeError as error:
        raise UserError(
            f"the process group cannot start ({first_line(error)}); for an error about an address or "
            "a socket, set GLOO_SOCKET_IFNAME, and on GPUs NCCL_SOCKET_IFNAME, to the interface of "
            "the network between the machines (`ip addr`)"
        ) from None
    return accelerator, context


def check_launch(recipe: Recipe) -> list[Check]:
    """Run all checks of this launch; every rank calls this and gets the same results."""
    accelerator, context = connect(recipe)
    checks = run_checks(recipe, context, accelerator.device)
    destroy_distributed(accelerator)
    return checks
