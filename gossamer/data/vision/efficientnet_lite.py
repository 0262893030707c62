"""EfficientNet-Lite0 with the parameter names of the packaged checkpoint.

Shapes: N images, 3 channels, H and W pixels (multiples of 32), K classes.
"""

from __future__ import annotations

from torch import Tensor, nn

# (blocks, kernel, stride of the first block, expansion, output channels); no squeeze-and-excite in Lite.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD = 32, 1280


def same_padding(kernel: int, stride: int) -> nn.ZeroPad2d:
    """TensorFlow's SAME padding for sides that the stride divides: kernel - stride, the odd one last."""
    before = (kernel - stride) // 2
    after = kernel - stride - before
    return nn.ZeroPad2d((before, after, before, after))


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """(x − mean) / sqrt(variance + 1e-3) per channel, scaled and shifted."""
    # TensorFlow's epsilon, which the checkpoint was trained with.
    return nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01)


class MBConv(nn.Module):
    """Expand by 1x1, filter each channel by kernel x kernel, project by 1x1; residual where shapes allow."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, expansion: int):
        super().__init__()
        hidden = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.expands = expansion != 1
        if self.expands:
            self._expand_conv = nn.Conv2d(inputs, hidden, 1, bias=False)
            self._bn0 = batch_norm(hidden)
        self._pad = same_padding(kernel, stride)
        self._depthwise_conv = nn.Conv2d(hidden, hidden, kernel, stride, groups=hidden, bias=False)
        self._bn1 = batch_norm(hidden)
        self._project_conv = nn.Conv2d(hidden, outputs, 1, bias=False)
        self._bn2 = batch_norm(outputs)
        self._act = nn.ReLU6(inplace=True)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW = self._act(self._bn0(self._expand_conv(x_NCHW))) if self.expands else x_NCHW
        y_NCHW = self._act(self._bn1(self._depthwise_conv(self._pad(y_NCHW))))
        y_NCHW = self._bn2(self._project_conv(y_NCHW))
        return x_NCHW + y_NCHW if self.residual else y_NCHW


def _blocks() -> nn.ModuleList:
    blocks, inputs = nn.ModuleList(), STEM
    for count, kernel, first_stride, expansion, outputs in STAGES:
        for index in range(count):
            stride = first_stride if index == 0 else 1
            blocks.append(MBConv(inputs, outputs, kernel=kernel, stride=stride, expansion=expansion))
            inputs = outputs
    return blocks


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: 16 MBConv blocks without squeeze-and-excite, 4.65M parameters, logits `[N, K]`.

    Args:
        classes: K, the width of the last layer.

    Reference: Tan and Le, arXiv:1905.11946; the Lite variant is TensorFlow's edge release of it.
    """

    def __init__(self, classes: int = 1000):
        super().__init__()
        self._pad = same_padding(3, 2)
        self._conv_stem = nn.Conv2d(3, STEM, 3, 2, bias=False)
        self._bn0 = batch_norm(STEM)
        self._blocks = _blocks()
        self._conv_head = nn.Conv2d(STAGES[-1][-1], HEAD, 1, bias=False)
        self._bn1 = batch_norm(HEAD)
        self._act = nn.ReLU6(inplace=True)
        self._dropout = nn.Dropout(0.2)
        self._fc = nn.Linear(HEAD, classes)

    def forward(self, x_N3HW: Tensor) -> Tensor:
        x_NCHW = self._act(self._bn0(self._conv_stem(self._pad(x_N3HW))))
        for block in self._blocks:
            x_NCHW = block(x_NCHW)
        x_NCHW = self._act(self._bn1(self._conv_head(x_NCHW)))
        return self._fc(self._dropout(x_NCHW.mean(dim=(2, 3))))
