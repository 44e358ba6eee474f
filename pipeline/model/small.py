"""A trunk for two CPU cores: small greyscale images such as 32 x 32 glyphs.

Its cost is chosen by measurement, one core, 32 x 32, batch 128, forward and backward, fp32, channels last: a
stride-2 stem keeps the largest maps cheap; ReLU trains 10 % faster than PReLU; a residual connection costs
nothing measurable.
"""

from __future__ import annotations

from torch import Tensor, nn

from pipeline.model.resnet import initialise_convolutions


class _Unit(nn.Module):
    """A 3x3 convolution with BatchNorm and ReLU; with `residual`, its input is added before the ReLU."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, residual: bool) -> None:
        super().__init__()
        assert not residual or (stride == 1 and channels_in == channels_out), "a residual unit keeps its shape"
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.residual = residual

    def forward(self, maps_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.norm(self.conv(maps_BCHW))
        if self.residual:
            out_BCHW = out_BCHW + maps_BCHW
        return nn.functional.relu(out_BCHW, inplace=True)


class SmallTrunk(nn.Module):
    """A stride-2 stem of `width` channels, then two stages of 2 and 4 times as many.

    Each stage is a stride-2 convolution followed by `depth` stride-1 ones with a residual connection each.
    images_BCHW of side S become maps of side ceil(S / 8) with 4 * `width` channels.
    """

    total_stride = 8

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        self.out_channels = 4 * width
        self.stem = _Unit(channels, width, stride=2, residual=False)
        self.stages = nn.Sequential(
            self._stage(width, 2 * width, depth),
            self._stage(2 * width, 4 * width, depth),
        )
        initialise_convolutions(self)

    @staticmethod
    def _stage(channels_in: int, channels_out: int, depth: int) -> nn.Sequential:
        down = _Unit(channels_in, channels_out, stride=2, residual=False)
        return nn.Sequential(down, *(_Unit(channels_out, channels_out, 1, residual=True) for _ in range(depth)))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Return maps_BCHW, (B, 4 * width, ceil(H / 8), ceil(W / 8))."""
        maps_BCHW: Tensor = self.stages(self.stem(images_BCHW))
        return maps_BCHW
