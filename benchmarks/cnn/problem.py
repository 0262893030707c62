"""Mobile networks with real ImageNet weights, one image, 1x1 convolutions pruned in groups of four output channels."""

from torch import nn

from benchmarks.harness import Case
from benchmarks.networks import Network

NAME, TITLE = "cnn", "Mobile networks, 1x1 convolutions in groups of four rows, batch 1, float32"
# Fifty layers deep, so rounding adds up; logits of a heavily pruned network are small beside what they are sums of.
TOLERANCE = 1e-3
NETWORKS = ("mobilenetv2", "efficientnet-lite0")
ZEROS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9)
CASES = [
    Case(f"{n}-{z}", {"network": n, "density": round(1 - z, 2)}, quick=z in (0.0, 0.9)) for n in NETWORKS for z in ZEROS
]
GROUPS = {
    "best dense engine": (
        "torch_channels_last",
        "torch_compile",
        "onnxruntime_fp32",
        "openvino_fp32",
        "deepsparse_dense",
    ),
    "DeepSparse": ("deepsparse_fp32",),
}
PANEL = ("network",)


def dense_case(case):
    """Dense engines run the network as it was trained."""
    return f"{case.labels['network']}-0.0"


def build(case):
    from gossamer import prune
    from gossamer.data import foolbox_images, load_model, normalise

    name, density = case.labels["network"], case.labels["density"]
    model = load_model(name)
    if density < 1:
        prune(model, "magnitude", density=density, pattern="([o] {4}) [i] h w", targets=pointwise(model))
    return Network(model, normalise(foolbox_images().images[:1], name))


def pointwise(model):
    """The 1x1 convolutions: nine tenths of the work of these networks."""
    found = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    return [n for n, m in found if m.kernel_size == (1, 1) and m.groups == 1]


def exact(case, data):
    return data.exact()


def export(case, data, folder):
    data.export(folder)
