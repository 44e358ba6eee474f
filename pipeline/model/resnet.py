"""Bottleneck residual networks, 50 and 101 layers deep.

Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016, table 1 and figure 5
(right), with the stride in the 3x3 convolution of a block instead of its first 1x1 (the variant known as v1.5).
"""

from __future__ import annotations

from torch import Tensor, nn

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}  # blocks of each stage: He et al. 2016, table 1
_EXPANSION = 4  # output channels of a bottleneck, in units of its inner width


def initialise_convolutions(module: nn.Module) -> None:
    """Draw every convolution of `module` from He et al. 2015's normal distribution (fan out, ReLU), in place.

    BatchNorm keeps torch's own start: weight 1, bias 0.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")


class _Bottleneck(nn.Module):
    """1x1 reduce, 3x3 (with the stride), 1x1 expand; the shortcut is projected where the shape changes."""

    def __init__(self, channels_in: int, inner: int, stride: int) -> None:
        super().__init__()
        channels_out = inner * _EXPANSION
        self.conv1 = nn.Conv2d(channels_in, inner, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels_out, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        out_BCHW = nn.functional.relu(self.norm1(self.conv1(maps_BCHW)), inplace=True)
        out_BCHW = nn.functional.relu(self.norm2(self.conv2(out_BCHW)), inplace=True)
        out_BCHW = self.norm3(self.conv3(out_BCHW)) + self.shortcut(maps_BCHW)
        return nn.functional.relu(out_BCHW, inplace=True)


class ResNetTrunk(nn.Module):
    """7x7 stride-2 stem, max pool, four stages of bottlenecks.

    images_BCHW of side S become maps of side ceil(S / 32) with 2048 channels.
    """

    total_stride = 32
    out_channels = 512 * _EXPANSION

    def __init__(self, channels: int, blocks: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, stride=2, padding=1),
        )
        stages: list[nn.Module] = []
        channels_in = 64
        for inner, count, stride in zip((64, 128, 256, 512), blocks, (1, 2, 2, 2), strict=True):
            first = _Bottleneck(channels_in, inner, stride)
            channels_in = inner * _EXPANSION
            rest = [_Bottleneck(channels_in, inner, stride=1) for _ in range(count - 1)]
            stages.append(nn.Sequential(first, *rest))
        self.stages = nn.Sequential(*stages)
        initialise_convolutions(self)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return maps_BCHW, (B, 2048, ceil(H / 32), ceil(W / 32))."""
        maps_BCHW: Tensor = self.stages(self.stem(images_BCHW))
        return maps_BCHW
