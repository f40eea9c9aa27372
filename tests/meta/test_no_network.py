"""Run on a node without a network: packets are dropped, and the name server does not answer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from recipes import RecipeMaker

ROOT = Path(__file__).parents[2]
# A network namespace whose addresses all lead to the loopback, which drops foreign packets.
NODE = """
ip link set lo up && ip addr add 10.99.0.1/32 dev lo && ip route add default dev lo src 10.99.0.1 &&
mount --bind resolv.conf /etc/resolv.conf && exec "$@"
"""
TIMED = """
import sys, time
from cifar_dist.tracking.tracker import decide_mode
from cifar_dist.utils.errors import UserError
from cifar_dist.models.backbones import fetch_pretrained
from cifar_dist.models.classifier import ModelConfig
from cifar_dist.data.ingest.preparation import prepare
from pathlib import Path

def seconds(act):
    begun = time.perf_counter()
    try:
        print(act(), file=sys.stderr)
    except UserError as error:
        print(error, file=sys.stderr)
    return time.perf_counter() - begun

import json
print(json.dumps({
    "tracking": seconds(lambda: decide_mode("online")),
    "weights": seconds(lambda: fetch_pretrained(ModelConfig(backbone="resnet18", pretrained=True))),
    "data": seconds(lambda: prepare("https://data.example.org/cifar.tar.gz", Path("data"))),
}))
"""


def on_a_node(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    (cwd / "resolv.conf").write_text("nameserver 10.99.0.53\n")
    environment = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
    environment |= {"PYTHONPATH": str(ROOT), "WANDB_API_KEY": "0" * 40, "HF_HOME": str(cwd / "hub")}
    return subprocess.run(
        [
            "unshare",
            "--net",
            "--mount",
            "bash",
            "-c",
            NODE,
            "node",
            *(str(part) for part in command),
        ],
        cwd=cwd,
        env=environment | variables,
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(autouse=True)
def name_spaces(tmp_path: Path) -> None:
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("a network of our own needs Linux, root and ip")
    if on_a_node("true", cwd=tmp_path).returncode:
        pytest.skip("this machine allows no name spaces")


@pytest.mark.fault
def test_nothing_waits_longer_than_five_seconds(tmp_path: Path) -> None:
    done = on_a_node(sys.executable, "-c", TIMED, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "does not answer" in done.stderr
    assert "model.weights=PATH" in done.stderr
    waited = json.loads(done.stdout)
    assert max(waited.values()) < 5, waited
    done = on_a_node(sys.executable, "-c", TIMED, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert json.loads(done.stdout)["weights"] < 1, "waited although there is no network"


@pytest.mark.fault
def test_run_without_network_is_complete(tmp_path: Path, recipe: RecipeMaker) -> None:
    """W&B switches to offline and does not delay the end."""
    command = [sys.executable, "-m", "cifar_dist.train", recipe(tracking={"mode": "online"})]
    done = on_a_node(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "W&B: offline (api.wandb.ai does not answer)" in done.stdout
    assert len(list(tmp_path.glob("runs/tiny/wandb/offline-run-*"))) == 1
    assert json.loads((tmp_path / "runs/tiny/summary.json").read_text())["finished"]
