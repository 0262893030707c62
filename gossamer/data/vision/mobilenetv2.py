"""MobileNetV2, width 1.0, with the parameter names of the common ImageNet checkpoint.

Shapes: N images, 3 channels, H and W pixels (multiples of 32), K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

# (expansion, output channels, blocks, stride of the first block): Table 2 of the paper.
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
STEM, HEAD = 32, 1280


def conv_bn_relu6(inputs: int, outputs: int, *, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, batch norm, ReLU6."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """Expand by 1x1, filter each channel by 3x3, project by 1x1; add the input where shapes allow."""

    def __init__(self, inputs: int, outputs: int, *, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        expand = [conv_bn_relu6(inputs, hidden)] if expansion != 1 else []
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            *expand,
            conv_bn_relu6(hidden, hidden, kernel=3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = self.conv(x_NCHW)
        return x_NCHW + y_NCHW if self.residual else y_NCHW


def _blocks() -> list[nn.Module]:
    blocks, inputs = [], STEM
    for expansion, outputs, count, first_stride in STAGES:
        for index in range(count):
            stride = first_stride if index == 0 else 1
            blocks.append(InvertedResidual(inputs, outputs, stride=stride, expansion=expansion))
            inputs = outputs
    return blocks


class MobileNetV2(nn.Module):
    """MobileNetV2 1.0: 17 inverted residual blocks, 3.50M parameters, logits `[N, K]`.

    Args:
        classes: K, the width of the last layer.

    Reference: Sandler et al., arXiv:1801.04381.
    """

    def __init__(self, classes: int = 1000):
        super().__init__()
        stem = conv_bn_relu6(3, STEM, kernel=3, stride=2)
        self.features = nn.Sequential(stem, *_blocks(), conv_bn_relu6(STAGES[-1][1], HEAD))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(HEAD, classes))

    def forward(self, x_N3HW: Tensor) -> Tensor:
        return self.classifier(self.features(x_N3HW).mean(dim=(2, 3)))
