"""Definitions of the ImageNet networks whose weights are packaged."""

from gossamer.data.vision.efficientnet_lite import EfficientNetLite0
from gossamer.data.vision.mobilenetv2 import MobileNetV2

__all__ = ["EfficientNetLite0", "MobileNetV2"]
