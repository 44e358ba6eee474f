"""The face field's residual networks (IResNet), 18 to 100 layers deep.

Source: Deng, Guo, Xue, Zafeiriou, "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", CVPR 2019,
section 3.1, after Han, Kim, Kim, "Deep Pyramidal Residual Networks", CVPR 2017 (BN-conv-BN-PReLU-conv-BN), in
the layout of InsightFace's `iresnet`: a stride-1 stem and no max pool, so that 112 x 112 faces keep 7 x 7 maps.
"""

from __future__ import annotations

from torch import Tensor, nn

BLOCKS = {
    "iresnet18": (2, 2, 2, 2),
    "iresnet34": (3, 4, 6, 3),
    "iresnet50": (3, 4, 14, 3),
    "iresnet100": (3, 13, 30, 3),
}
_WIDTHS = (64, 128, 256, 512)
_INIT_STD = 0.1  # InsightFace's; BatchNorm makes the output independent of it, the effective learning rate not


class _Block(nn.Module):
    """BN-conv-BN-PReLU-conv-BN with the stride in the second convolution, and nothing after the addition."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.prelu = nn.PReLU(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, stride, padding=1, bias=False)
        self.norm3 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        inner_BCHW = self.prelu(self.norm2(self.conv1(self.norm1(maps_BCHW))))
        out_BCHW: Tensor = self.norm3(self.conv2(inner_BCHW)) + self.shortcut(maps_BCHW)
        return out_BCHW


class IResNetTrunk(nn.Module):
    """3x3 stride-1 stem, then four stages, each halving the side in its first block.

    images_BCHW of side S become maps of side ceil(S / 16) with 512 channels.
    """

    total_stride = 16
    out_channels = _WIDTHS[-1]

    def __init__(self, channels: int, blocks: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, _WIDTHS[0], 3, padding=1, bias=False), nn.BatchNorm2d(_WIDTHS[0]), nn.PReLU(_WIDTHS[0])
        )
        stages: list[nn.Module] = []
        channels_in = _WIDTHS[0]
        for width, count in zip(_WIDTHS, blocks, strict=True):
            first = _Block(channels_in, width, stride=2)
            stages.append(nn.Sequential(first, *(_Block(width, width, stride=1) for _ in range(count - 1))))
            channels_in = width
        self.stages = nn.Sequential(*stages)
        for part in self.modules():
            if isinstance(part, nn.Conv2d):
                nn.init.normal_(part.weight, std=_INIT_STD)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return maps_BCHW, (B, 512, ceil(H / 16), ceil(W / 16))."""
        maps_BCHW: Tensor = self.stages(self.stem(images_BCHW))
        return maps_BCHW
