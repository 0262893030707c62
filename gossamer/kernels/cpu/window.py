"""Where a kernel window stands on an image: size, stride, padding and dilation, and the sizes that follow.

Shapes: H and W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.core.errors import FormatError

Pair = tuple[int, int]


@dataclass(frozen=True)
class Window:
    """A sliding window over an image.

    Args:
        kernel: height and width of the kernel, at least 1.
        stride: steps down and across, at least 1.
        padding: zeros above, left of, below and right of the image, at least 0; they may all differ.
        dilation: distance between taps, down and across, at least 1.

    Raises:
        FormatError: a number is out of range.

    Example:
        >>> Window((3, 3), stride=(2, 2), padding=(0, 0, 1, 1)).output(224, 224)
        (112, 112)
    """

    kernel: Pair
    stride: Pair = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)

    def __post_init__(self) -> None:
        if min(*self.kernel, *self.stride, *self.dilation) < 1 or min(self.padding) < 0:
            raise FormatError(f"kernel, stride and dilation are at least 1 and padding at least 0, got {self}")

    @property
    def taps(self) -> int:
        """Weights of one kernel."""
        return self.kernel[0] * self.kernel[1]

    def output(self, high: int, wide: int) -> Pair:
        """Height and width of the result. Raises FormatError when the window does not fit into the padded image."""
        top, left, bottom, right = self.padding
        spans = [(k - 1) * d for k, d in zip(self.kernel, self.dilation)]
        rooms = high + top + bottom - spans[0] - 1, wide + left + right - spans[1] - 1
        if min(rooms) < 0 or min(high, wide) < 1:
            raise FormatError(f"{self} does not fit into an image of {high} x {wide} pixels")
        return rooms[0] // self.stride[0] + 1, rooms[1] // self.stride[1] + 1


@dataclass(frozen=True)
class Depth:
    """A window's third axis, before height and width.

    Args:
        kernel: slices of the kernel, at least 1.
        stride: steps from slice to slice, at least 1.
        front, back: slices of zeros before and behind the volume, at least 0.
        dilation: distance between taps, at least 1.

    Raises:
        FormatError: a number is out of range.

    Example:
        >>> Depth(3, stride=2, front=1, back=1).output(8)
        4
    """

    kernel: int = 1
    stride: int = 1
    front: int = 0
    back: int = 0
    dilation: int = 1

    def __post_init__(self) -> None:
        if min(self.kernel, self.stride, self.dilation) < 1 or min(self.front, self.back) < 0:
            raise FormatError(f"kernel, stride and dilation are at least 1 and padding at least 0, got {self}")

    def output(self, deep: int) -> int:
        """Slices of the result. Raises FormatError when the window does not fit into the padded volume."""
        room = deep + self.front + self.back - (self.kernel - 1) * self.dilation - 1
        if room < 0 or deep < 1:
            raise FormatError(f"{self} does not fit into a volume of {deep} slices")
        return room // self.stride + 1


def same_padding(kernel: Pair, stride: Pair, dilation: Pair, high: int, wide: int) -> tuple[int, int, int, int]:
    """Padding (top, left, bottom, right) by which an image of H x W gives ceil(H / stride) x ceil(W / stride).

    An odd sum puts the larger half below and on the right, as TensorFlow's "SAME" and torch's "same" do.

    Example:
        >>> same_padding((3, 3), (2, 2), (1, 1), 224, 224)
        (0, 0, 1, 1)
    """
    sums = []
    for k, s, d, n in zip(kernel, stride, dilation, (high, wide)):
        sums.append(max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n))
    down, across = sums
    return down // 2, across // 2, down - down // 2, across - across // 2
