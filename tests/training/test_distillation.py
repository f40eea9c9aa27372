"""Distillation: teacher placements give the same results, and a run depends on its teacher's weights."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from compare import assert_same_bits, lines, tensors
from launcher import Launch, train
from restarts import EVERY_STEP, wait_for_step
from safetensors.torch import load_file, save_file

from cifar_dist.data.augment.augmentation import AugmentedBatch
from cifar_dist.data.batches import gather_batch
from cifar_dist.data.dataset import Split
from cifar_dist.distill.teacher import (
    TeacherConfig,
    build_teacher,
    init_params_on_meta,
    load_sharded,
)
from cifar_dist.distributed.context import rank_mesh
from cifar_dist.models.backbones import create_backbone
from cifar_dist.models.classifier import ModelConfig, build_model
from cifar_dist.recipe.load import load_recipe
from cifar_dist.recipe.teachers import find_teacher
from cifar_dist.run_folder.checkpoint import checkpoints
from cifar_dist.utils.errors import UserError
from cifar_dist.utils.files import sha256
from recipes import RecipeMaker, TeacherMaker, with_teachers

MODELS = {  # with what makes each hard to shard
    "test_resnet": "BatchNorm statistics",
    "test_vit": "parameters of one row",
    "test_vit_relpos": "non-persistent buffers",
    "test_nfnet": "scalar parameters",
    "resnet8x4": "nested Sequentials of blocks",
    "wrn_16_2": "norms outside the blocks",
}


@pytest.mark.parametrize(
    ("backbone", "world_size"),
    [
        ("test_resnet", 2),
        pytest.param("test_vit", 2, marks=pytest.mark.fault),
        pytest.param("test_vit_relpos", 2, marks=pytest.mark.fault),
        pytest.param("test_vit", 4, marks=pytest.mark.fault),
    ],
)
def test_replicated_sharded_and_cached_teachers_train_alike(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker, backbone: str, world_size: int
) -> None:
    """24 steps in four micro-batches, the teacher at 64 px, the student at 32.

    Sharded and replicated agree bit for bit, cached within the rounding of logits to float16.
    """
    teacher("big", backbone=backbone, image_size=64)
    sections = with_teachers("big") | {"augment": {"views": 2}}
    path = recipe(
        run={"epochs": 4, "micro_batches": 4, "batch_size": 10}, optim={"lr": 1e-5}, **sections
    )
    command = Launch("cache_logits", [path, "teacher.placement=cached"], cwd=tmp_path, world_size=2)
    assert command.wait() == [0, 0], command.output
    for placement in ("replicated", "sharded", "cached"):
        output = train(
            path,
            f"name={placement}",
            f"teacher.placement={placement}",
            cwd=tmp_path,
            world_size=world_size,
        )
        assert f"{world_size} process(es)" in output
        if placement != "cached":
            assert f"teacher runs/big: {backbone} at 64 px" in output
            counts = re.findall(r"parameters on each rank: (.*)", output)[0].split()
            per_rank = [int(number.replace(",", "")) for number in counts]
            total = int(re.findall(r"px, ([\d,]+) parameters", output)[0].replace(",", ""))
            assert len(per_rank) == world_size
            assert sum(per_rank) == (total if placement == "sharded" else world_size * total)
    replicated = lines(tmp_path / "runs/replicated")
    assert replicated[-1]["step"] == 24
    assert all(line["distill"] > 0 for line in replicated if "distill" in line)
    assert_same_bits(tmp_path / "runs/replicated", tmp_path / "runs/sharded")
    for ours, theirs in zip(lines(tmp_path / "runs/cached"), replicated, strict=True):
        if "distill" in theirs:
            assert ours["distill"] == pytest.approx(theirs["distill"], rel=2e-3)
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_resume_with_sharded_teachers_matches_uninterrupted_run(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    """Two teachers of different sizes and heads, sharded over two processes, replicated on one.

    SIGKILL of a single process within an epoch and a metric window (6 and 5 steps); two resume.
    """
    teacher("big", image_size=48)
    teacher("cosines", head="cosine", losses={"arcface": {"scale": 20}})
    path = recipe(**with_teachers("big", "cosines", weight=2.0, placement="sharded"))
    train(path, "name=one", cwd=tmp_path)
    train(path, "name=two", cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/one", tmp_path / "runs/two")
    arguments = [path, "name=killed", f"run.save_every_minutes={EVERY_STEP}"]
    process = Launch("train", arguments, cwd=tmp_path)
    wait_for_step(process, tmp_path / "runs/killed", 8)
    process.kill()
    assert not (tmp_path / "runs/killed/summary.json").exists()
    output = train(*arguments, cwd=tmp_path, world_size=2)
    assert "resuming from step" in output
    assert_same_bits(tmp_path / "runs/one", tmp_path / "runs/killed")


def test_distillation_warm_up_follows_the_epoch_and_resumes_exactly(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    """With a teacher and a student that timm lacks; four epochs of 6 steps, one record each."""
    teacher("big", backbone="resnet8x1")
    keys = with_teachers("big") | {"model": {"backbone": "wrn_10_1", "drop_rate": 0.1}}
    keys["losses"] = {"cross_entropy": {"weight": 0.5}, "dkd": {"weight": 2.0, "warmup_epochs": 3}}
    path = recipe(run={"log_every_steps": 6}, **keys)
    train(path, "name=straight", cwd=tmp_path)
    records = [line for line in lines(tmp_path / "runs/straight") if line["kind"] == "train"]
    assert [line["epoch"] for line in records] == [1, 2, 3, 4]
    for line, factor in zip(records, (1 / 3, 2 / 3, 1, 1), strict=True):
        expected = 0.5 * line["cross_entropy"] + factor * 2.0 * line["dkd"]
        assert line["loss"] == pytest.approx(expected, rel=1e-5)
    arguments = [path, "name=killed", f"run.save_every_minutes={EVERY_STEP}"]
    process = Launch("train", arguments, cwd=tmp_path)
    wait_for_step(process, tmp_path / "runs/killed", 8)
    process.kill()
    assert not (tmp_path / "runs/killed/summary.json").exists()
    assert "resuming from step" in train(*arguments, cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/straight", tmp_path / "runs/killed")


def test_teacher_affects_training_but_is_in_no_checkpoint(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    folder = teacher("big", backbone="test_vit")
    path = recipe(run={"epochs": 1}, **with_teachers("big", placement="sharded"))
    train(path, cwd=tmp_path, world_size=2)
    train(recipe("alone", run={"epochs": 1}), cwd=tmp_path, world_size=2)
    run, alone = tmp_path / "runs/tiny", tmp_path / "runs/alone"
    assert tensors(run).keys() == tensors(alone).keys()
    assert not torch.equal(tensors(run)["logits"], tensors(alone)["logits"])
    (newest,) = checkpoints(run / "checkpoints")
    theirs = {path.name for path in checkpoints(alone / "checkpoints")[0].iterdir()}
    assert {path.name for path in newest.iterdir()} == theirs
    weights = checkpoints(folder / "checkpoints")[0] / "model.safetensors"
    shapes = {tensor.shape for tensor in load_file(weights).values() if tensor.ndim > 2}
    assert shapes.isdisjoint(tensor.shape for tensor in tensors(run).values())
    digest = sha256(weights)
    assert json.loads((newest / "progress.json").read_text())["teachers"] == [digest]
    assert json.loads((run / "environment.json").read_text())["teachers"] == [digest]


def test_teacher_is_the_average_if_its_run_has_one(tmp_path: Path, recipe: RecipeMaker) -> None:
    train(recipe("big", run={"epochs": 1}), cwd=tmp_path)
    train(recipe(run={"epochs": 1}, **with_teachers("big")), cwd=tmp_path)
    average = checkpoints(tmp_path / "runs/big/checkpoints")[0] / "average.safetensors"
    environment = json.loads((tmp_path / "runs/tiny/environment.json").read_text())
    assert environment["teachers"] == [sha256(average)]


@pytest.mark.parametrize(("world_size", "over"), [(2, "world"), (3, "world"), (4, "node")])
def test_sharded_teachers_match_replicated_ones_and_keep_only_their_rows(
    tmp_path: Path, teacher: TeacherMaker, world_size: int, over: str
) -> None:
    """Each rank has ceil(rows / ranks) of each parameter; `node`: two machines of two ranks."""
    folders = [teacher(name, backbone=name, image_size=32) for name in MODELS]
    if world_size == 2:  # 28 million parameters, and masks on the device of the parameters
        swin = "swin_tiny_patch4_window7_224"
        folders.append(teacher(swin, backbone=swin, image_size=64))
        coat = "coat_lite_tiny"  # blocks share parameters
        folders.append(teacher(coat, backbone=coat, image_size=32))
    sharing = world_size if over == "world" else 2
    processes = Launch(
        "sharded_teacher",
        [over, *folders],
        cwd=tmp_path,
        world_size=world_size,
        environment={"LOCAL_WORLD_SIZE": str(sharing)},
    )
    assert processes.wait() == [0] * world_size, processes.output
    for rank in range(world_size):
        results = json.loads((tmp_path / f"rank_{rank}.json").read_text())
        assert list(results) == [str(folder) for folder in folders]
        for folder, result in results.items():
            assert result["world_size"] == world_size
            assert result["equal"] == [True] * 4, folder
            for name, (whole, local, storage) in result["shapes"].items():
                if whole:
                    rows = -(-whole[0] // sharing)
                    first = min(rank % sharing * rows, whole[0])
                    assert local == [min(rows, whole[0] - first), *whole[1:]], name
                    assert storage <= rows * torch.Size(whole[1:]).numel(), name


def test_teacher_logits_are_those_of_its_evaluation(teacher: TeacherMaker) -> None:
    """It is in eval mode: logits do not depend on other images, and a call changes no state."""
    folder = teacher("cosines", head="cosine", drop_rate=0.5, losses={"arcface": {"scale": 20}})
    trained, device = find_teacher(TeacherConfig(run=str(folder))), torch.device("cpu")
    model = build_model(trained.model, 100, load_file(trained.weights)).eval()
    built = build_teacher(
        [TeacherConfig(run=str(folder), placement="sharded")],
        [trained],
        num_classes=100,
        device=device,
        mesh=lambda over: rank_mesh(device, 1, over=over),
    )
    assert built is not None
    images, rows = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8), torch.arange(6)
    batch = gather_batch(Split(images=images, labels=rows), rows, epoch=0, micro_batch=0)
    view = AugmentedBatch(images=images, labels=rows, view_ids=rows)
    teacher_logits = built(view, batch)
    assert torch.equal(teacher_logits, 20 * model(images).logits)
    assert torch.equal(built(view, batch), teacher_logits)
    assert teacher_logits.dtype == torch.float32
    assert not teacher_logits.requires_grad
    single = built(AugmentedBatch(images=images[:1], labels=rows[:1], view_ids=rows[:1]), batch)
    torch.testing.assert_close(single, teacher_logits[:1])


def test_init_params_on_meta_keeps_buffer_values() -> None:
    config = ModelConfig(backbone="test_vit_relpos", image_size=32)
    with init_params_on_meta():
        backbone = create_backbone(config, pretrained=False)
    assert all(parameter.is_meta for parameter in backbone.parameters())
    buffers = dict(create_backbone(config, pretrained=False).named_buffers())
    assert buffers.keys() > backbone.state_dict().keys() - dict(backbone.named_parameters()).keys()
    for name, buffer in backbone.named_buffers():
        assert torch.equal(buffer, buffers[name])
    assert not any(p.is_meta for p in create_backbone(config, pretrained=False).parameters())


def test_sharding_a_model_with_computed_buffers_is_an_error(teacher: TeacherMaker) -> None:
    swin = "swinv2_tiny_window8_256"
    folder = teacher("swin", backbone=swin, image_size=64)
    trained = find_teacher(TeacherConfig(run=str(folder)))
    with pytest.raises(UserError, match=r"buffers cannot be rebuilt; use placement: replicated"):
        load_sharded(trained, 100, mesh=None)  # type: ignore[arg-type]


def test_missing_teacher_is_an_error(tmp_path: Path, recipe: RecipeMaker) -> None:
    path = recipe(**with_teachers("missing"))
    output = train(path, cwd=tmp_path, world_size=2, expect=2)
    assert output.count("error:") == 1
    assert "runs/missing is not a run folder" in output
    (tmp_path / "runs/missing").mkdir()
    (tmp_path / "runs/missing/recipe.yaml").write_text("name: missing\n")
    output = train(path, cwd=tmp_path, world_size=2, expect=2)
    assert "runs/missing has no checkpoint yet: train it first" in output
    assert "parameters" in train(path, "--dry-run", cwd=tmp_path)


def test_resuming_with_another_teacher_is_an_error(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    teacher("big")
    path = recipe(run={"epochs": 1}, **with_teachers("big"))
    train(path, cwd=tmp_path)
    assert "finished, top1" in train(path, "teacher.placement=sharded", cwd=tmp_path)
    shutil.rmtree(tmp_path / "runs/big")
    teacher("big", seed=1)
    output = train(path, cwd=tmp_path, world_size=2, expect=2)
    assert output.count("error:") == 1
    assert "weights of teacher runs/big:" in output
    assert "--fork runs/tiny" in output


def test_teacher_whose_weights_do_not_fit_is_an_error(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    folder = teacher("big")
    content = (folder / "recipe.yaml").read_text()
    (folder / "recipe.yaml").write_text(content.replace("test_resnet", "test_vit"))
    for placement in ("replicated", "sharded"):
        path = recipe(**with_teachers("big", placement=placement))
        output = train(path, cwd=tmp_path, world_size=2, expect=2)
        assert output.count("error:") == 1
        assert (
            "the teacher runs/big: the saved model: neither names nor shapes fit test_vit" in output
        )
        assert "Traceback" not in output


def test_sharded_teacher_needs_a_world_size_that_divides_the_micro_batches(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    teacher("big")
    path = recipe(run={"micro_batches": 3, "epochs": 1}, **with_teachers("big"))
    train(path, cwd=tmp_path, world_size=2)
    output = train(
        path, "name=a", "teacher.placement=sharded", cwd=tmp_path, world_size=2, expect=2
    )
    assert output.count("error:") == 1
    assert "3 micro-batches on 2 processes" in output
    assert "placement: replicated" in output


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"losses": {"dkd": {}}}, "losses.dkd needs a teacher"),
        ({"teacher": {"run": "runs/big"}}, "no loss uses the teacher"),
    ],
)
def test_distillation_loss_and_teacher_need_each_other(
    tmp_path: Path, recipe: RecipeMaker, sections: dict[str, Any], message: str
) -> None:
    output = train(recipe(**sections), cwd=tmp_path, expect=2)
    assert output.count("error:") == 1
    assert message in output


# ----------------------------------------------------------------------------- files, train_mode


def test_file_as_teacher_matches_its_run(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    """Replicated and sharded, with a cosine head and the scale of its run's loss."""
    folder = teacher("big", head="cosine", image_size=48, losses={"arcface": {"scale": 20}})
    weights = checkpoints(folder / "checkpoints")[0] / "model.safetensors"
    exported = shutil.copy(weights, tmp_path / "big.safetensors")
    path = recipe(run={"epochs": 1}, **with_teachers("big"))
    train(path, "name=from_run", cwd=tmp_path, world_size=2)
    content = yaml.safe_load(path.read_text())
    model = {"backbone": "test_resnet", "head": "cosine", "image_size": 48}
    content["teacher"] = {"run": "big.safetensors", "model": model, "logit_scale": 20}
    path.write_text(yaml.safe_dump(content))
    train(path, "name=from_file", "teacher.placement=sharded", cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/from_run", tmp_path / "runs/from_file")
    wrong = train(path, "name=wrong", "teacher.model.backbone=test_vit", cwd=tmp_path, expect=2)
    assert "the teacher big.safetensors" in wrong
    half = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(half, exported)
    for placement in ("replicated", "sharded"):
        options = [f"name=half_{placement}", f"teacher.placement={placement}"]
        train(path, *options, cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/half_replicated", tmp_path / "runs/half_sharded")
    Path(exported).write_bytes(b"not a file of tensors")
    assert "error: " in train(path, "name=wrong", cwd=tmp_path, expect=2)
    Path(exported).unlink()
    assert "big.safetensors does not exist" in train(path, "name=wrong", cwd=tmp_path, expect=2)


@pytest.mark.parametrize(
    ("keys", "remedy"),
    [
        ({"run": "a.safetensors"}, "add a `model` section"),
        ({"run": "runs/a", "model": {}}, "a run folder has its own"),
        ({"run": "a.safetensors", "model": {"head": "cosine"}}, "needs logit_scale"),
        ({"run": "runs/a", "placement": "cached", "train_mode": True}, "no fixed logits"),
    ],
)
def test_invalid_teacher_config_is_an_error(
    recipe: RecipeMaker, keys: dict[str, Any], remedy: str
) -> None:
    sections = with_teachers("a") | {"teacher": keys, "augment": {"views": 2}}
    with pytest.raises(ValueError, match=remedy):
        load_recipe(recipe(**sections))


def test_train_mode_teacher_uses_batch_statistics(
    tmp_path: Path, recipe: RecipeMaker, teacher: TeacherMaker
) -> None:
    """Results differ from eval mode, and are the same for one and two processes and after a kill."""
    teacher("big", drop_rate=0.3)
    path = recipe(run={"epochs": 2}, **with_teachers("big"))
    train(path, "name=frozen", cwd=tmp_path)
    train(path, "name=one", "teacher.train_mode=true", cwd=tmp_path)
    train(path, "name=two", "teacher.train_mode=true", cwd=tmp_path, world_size=2)
    assert_same_bits(tmp_path / "runs/one", tmp_path / "runs/two")
    frozen, one = (tensors(tmp_path / f"runs/{name}") for name in ("frozen", "one"))
    assert not torch.equal(frozen["logits"], one["logits"])
    arguments = [path, "name=killed", "teacher.train_mode=true"]
    arguments += [f"run.save_every_minutes={EVERY_STEP}"]
    process = Launch("train", arguments, cwd=tmp_path)
    wait_for_step(process, tmp_path / "runs/killed", 8)
    process.kill()
    train(*arguments, cwd=tmp_path)
    assert_same_bits(tmp_path / "runs/one", tmp_path / "runs/killed")
