import importlib
import importlib.util
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.errors import ConfigError
from pipeline.model.backbones import TRUNKS, Backbone, BackboneConfig, build_backbone
from pipeline.model.small import SmallTrunk

FACES: dict[str, Any] = {"embedding_dim": 512, "image_size": 112, "channels": 3}
ONE_OF_EACH_KIND = ("small", "iresnet18", "resnet50")


def build(name: str = "small", seed: int = 0, **fields: Any) -> Backbone:
    torch.manual_seed(seed)
    return build_backbone(BackboneConfig(name=name, **fields))


def build_on_meta(name: str, **fields: Any) -> Backbone:
    with torch.device("meta"):
        return build_backbone(BackboneConfig(name=name, **fields))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def iresnet_parameters(blocks: list[int], channels: int, side: int, embedding_dim: int) -> int:
    """Count by hand: a convolution has in * out * k^2 weights, a BatchNorm 2 per channel, a PReLU 1 per channel."""
    total = channels * 64 * 9 + 2 * 64 + 64
    before = 64
    for width, repeats in zip([64, 128, 256, 512], blocks, strict=True):
        total += before * width + 2 * width  # projected shortcut of the stage's first block
        for block in range(repeats):
            inside = before if block == 0 else width
            total += 2 * inside + inside * width * 9 + 2 * width + width + width * width * 9 + 2 * width
        before = width
    return total + 2 * 512 + (512 * side * side + 1) * embedding_dim + 2 * embedding_dim


@pytest.mark.parametrize(
    ("name", "blocks", "published_millions", "published_gmacs"),
    [
        ("iresnet18", [2, 2, 2, 2], 24.0, 2.62),
        ("iresnet34", [3, 4, 6, 3], 34.1, 4.48),
        ("iresnet50", [3, 4, 14, 3], 43.6, 6.33),
        ("iresnet100", [3, 13, 30, 3], 65.2, 12.13),
    ],
)
def test_iresnet_has_the_published_size_and_cost(
    name: str, blocks: list[int], published_millions: float, published_gmacs: float
) -> None:
    backbone = build_on_meta(name, **FACES)
    assert count(backbone) == iresnet_parameters(blocks, channels=3, side=7, embedding_dim=512)
    assert round(count(backbone) / 1e6, 1) == published_millions
    # the cost tells where the strides are, which the parameters do not
    assert gmacs(backbone) == pytest.approx(published_gmacs, rel=0.01)


@pytest.mark.parametrize(
    ("name", "torchvision_trunk_parameters", "torchvision_gmacs"),
    [("resnet50", 23_508_032, 4.089), ("resnet101", 42_500_160, 7.801)],
)
def test_resnet_has_the_size_and_cost_of_torchvisions(
    name: str, torchvision_trunk_parameters: int, torchvision_gmacs: float
) -> None:
    backbone = build_on_meta(name, image_size=224, channels=3)
    assert count(backbone.trunk) == torchvision_trunk_parameters
    head_gmacs = 2048 * 7 * 7 * 128 / 1e9
    torchvision_fc_gmacs = 2048 * 1000 / 1e9
    assert gmacs(backbone) - head_gmacs + torchvision_fc_gmacs == pytest.approx(torchvision_gmacs, abs=1e-3)


def gmacs(backbone: Backbone) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone.eval()(torch.empty(1, *backbone.image_shape, device="meta"))
    return float(counter.get_total_flops()) / 2e9


def test_small_has_the_size_counted_by_hand() -> None:
    stem = 1 * 32 * 9 + 64
    first = 32 * 64 * 9 + 128 + 2 * (64 * 64 * 9 + 128)
    second = 64 * 128 * 9 + 256 + 2 * (128 * 128 * 9 + 256)
    head = 256 + (128 * 16 + 1) * 128 + 256
    assert count(build(depth=2)) == stem + first + second + head


@pytest.mark.parametrize(
    ("name", "size", "channels"),
    [*((name, 37, 3) for name in sorted(TRUNKS)), *((name, 8, 1) for name in ONE_OF_EACH_KIND)],
)
def test_features_of_any_image_size(name: str, size: int, channels: int) -> None:
    backbone = build(name, image_size=size, channels=channels, embedding_dim=10)
    features_BD = backbone(torch.randn(3, channels, size, size))
    assert features_BD.shape == (3, 10)
    assert features_BD.dtype == torch.float32
    assert (features_BD < 0).any()  # no ReLU ends the embedding


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_every_trainable_parameter_learns_and_the_last_scale_is_frozen(name: str) -> None:
    backbone = build(name, image_size=40)
    backbone(torch.randn(4, 1, 40, 40)).pow(3).sum().backward()
    without = [key for key, value in backbone.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == ["head.feature_norm.weight"]
    assert (backbone.get_parameter("head.feature_norm.weight") == 1).all()


def test_features_are_centred_to_unit_variance_not_to_unit_length() -> None:
    features_BD = build(embedding_dim=16)(torch.randn(64, 1, 32, 32))
    torch.testing.assert_close(features_BD.mean(0), torch.zeros(16), atol=1e-5, rtol=0)
    torch.testing.assert_close(features_BD.var(0, unbiased=False), torch.ones(16), atol=1e-2, rtol=0)
    assert features_BD.norm(dim=1).std() > 0.1


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_initialisation_follows_the_seed(name: str) -> None:
    first, again, other = build(name, seed=7), build(name, seed=7), build(name, seed=8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    weight = "trunk.stem.conv.weight" if name == "small" else "trunk.stem.0.weight"
    assert not torch.equal(first.get_parameter(weight), other.get_parameter(weight))


@pytest.mark.parametrize(
    ("name", "last_norm", "relu_after"),
    [("small", "norm", True), ("iresnet18", "norm3", False), ("resnet50", "norm3", True)],
)
def test_a_block_whose_branch_is_silent_passes_its_input_on(name: str, last_norm: str, relu_after: bool) -> None:
    stages = build(name, depth=1).trunk.get_submodule("stages") if name == "small" else build(name).trunk.stages
    assert isinstance(stages, nn.Sequential)
    stage = stages[0]
    assert isinstance(stage, nn.Sequential)
    block = stage[1]
    nn.init.zeros_(block.get_submodule(last_norm).get_parameter("weight"))
    channels = next(part for part in block.modules() if isinstance(part, nn.Conv2d)).in_channels
    maps_BCHW = torch.randn(2, channels, 5, 5)
    torch.testing.assert_close(block(maps_BCHW), maps_BCHW.relu() if relu_after else maps_BCHW)


def test_small_map_side_rounds_up() -> None:
    trunk = SmallTrunk(channels=1, width=4, depth=0)
    assert trunk(torch.randn(2, 1, 41, 40)).shape == (2, 16, 6, 5)


@pytest.mark.parametrize("channels", [1, 3])
def test_maps_are_channels_last_and_the_layout_of_the_images_does_not_matter(channels: int) -> None:
    backbone = build(channels=channels).eval()
    maps: list[torch.Tensor] = []
    convolutions = [part for part in backbone.modules() if isinstance(part, nn.Conv2d)]
    for convolution in convolutions:
        assert convolution.weight.is_contiguous(), "ZeRO's flat buffers need contiguous weights"
        convolution.register_forward_hook(lambda _, __, out_BCHW: maps.append(out_BCHW))
    images_BCHW = torch.randn(4, channels, 32, 32)
    features_BD = backbone(images_BCHW)
    assert len(maps) == len(convolutions)
    assert all(one.is_contiguous(memory_format=torch.channels_last) for one in maps)
    torch.testing.assert_close(features_BD, backbone(images_BCHW.to(memory_format=torch.channels_last)))


def test_dropout_acts_in_training_alone() -> None:
    backbone = build(dropout=0.5)
    for norm in (part for part in backbone.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)):
        norm.momentum = 0.0
    images_BCHW = torch.randn(4, 1, 32, 32)
    assert not torch.equal(backbone(images_BCHW), backbone(images_BCHW))
    backbone.eval()
    assert torch.equal(backbone(images_BCHW), backbone(images_BCHW))


def test_small_can_memorise_a_batch() -> None:
    backbone = build(width=8, embedding_dim=8)
    images_BCHW, labels_B = torch.randn(16, 1, 32, 32), torch.arange(16) % 8
    optimiser = torch.optim.SGD(backbone.parameters(), lr=0.1, momentum=0.9)
    for _ in range(40):
        optimiser.zero_grad()
        nn.functional.cross_entropy(4 * backbone(images_BCHW), labels_B).backward()
        optimiser.step()
    assert (backbone(images_BCHW).argmax(1) == labels_B).all()


def test_state_dict_loads_into_a_fresh_backbone() -> None:
    first, second = build("iresnet18", seed=1), build("iresnet18", seed=2)
    images_BCHW = torch.randn(2, 1, 32, 32)
    first(images_BCHW)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(images_BCHW), second.eval()(images_BCHW))


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(AssertionError, match=r"images are \(1, 33, 32\), the backbone takes \(1, 32, 32\)"):
        build()(torch.randn(2, 1, 33, 32))


@pytest.mark.parametrize(
    ("name", "nearest"), [("resnet5", "resnet50"), ("smal", "small"), ("iresnet-100", "iresnet100"), ("timm:", "timm:")]
)
def test_an_unknown_name_is_told_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=f"backbone.name '{name}' is not known: did you mean '{nearest}") as raised:
        BackboneConfig(name=name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fields", [{"width": 64}, {"depth": 2}])
def test_a_field_of_small_is_refused_elsewhere(fields: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="but backbone 'resnet50' has a fixed"):
        BackboneConfig(name="resnet50", **fields)
    assert BackboneConfig(**fields).name == "small"


def test_a_dumped_config_loads_again() -> None:
    config = BackboneConfig(name="iresnet50", channels=3)
    assert BackboneConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    "fields",
    [
        {"embedding_dim": 1},
        {"channels": 2},
        {"dropout": 1.0},
        {"dropout": -0.1},
        {"image_size": 7},
        {"width": 0},
        {"depth": -1},
        {"embeding_dim": 64},
    ],
)
def test_values_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        BackboneConfig(**fields)


@pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is installed")
def test_timm_missing_says_what_to_install() -> None:
    with pytest.raises(ConfigError, match=r"needs the package timm, which is missing: pip install .*\[timm\]"):
        build_backbone(BackboneConfig(name="timm:resnet18"))


@pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm, an optional extra, is not installed")
@pytest.mark.parametrize("network", ["resnet18", "vit_tiny_patch16_224"])
def test_timm_builds_or_says_why_it_does_not_import(network: str) -> None:
    config = BackboneConfig(name=f"timm:{network}", embedding_dim=10, image_size=48)
    try:
        importlib.import_module("timm")
    except (ImportError, RuntimeError):  # a torchvision for another torch
        with pytest.raises(ConfigError, match=r"does not import here .*pip install bct-pipeline\[timm\]"):
            build_backbone(config)
        return
    assert build_backbone(config)(torch.randn(3, 1, 48, 48)).shape == (3, 10)
    with pytest.raises(ConfigError, match=f"did you mean 'timm:{network}'"):
        build_backbone(BackboneConfig(name=f"timm:{network}x"))
