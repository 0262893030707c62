"""One training step of a 784-4096-4096-10 network on Fashion-MNIST whose two large layers keep 1 to 20 %."""

from benchmarks.harness import Case
from benchmarks.training_mlp import network

NAME, TITLE = "training_mlp", "A training step (forward, backward, Adam) of a sparse 784-4096-4096-10 network"
# Loss and gradients of the first step in float32.
TOLERANCE = 1e-4
CASES = [
    Case(f"{batch}-{density}", {"batch": batch, "density": density}, quick=density == 0.01)
    for batch in (128,)
    for density in (0.2, 0.1, 0.05, 0.01)
]
GROUPS = {
    "masked dense training": ("torch_masked",),
    "best dense": ("torch_masked", "torch_masked_gradient"),
    "torch CSR": ("torch_csr",),
}
MEASURES = {"bytes": "weights, gradients, optimizer, supports: bytes"}
PANEL = "batch"


def dense_case(case):
    """Masks cost the same whatever they hide."""
    return f"{case.labels['batch']}-0.01"


def build(case):
    return network.start(case.labels["batch"], case.labels["density"])


def exact(case, data):
    """Loss and gradients of the first step, kept entries only, in float64."""
    net = network.masked(data).double()
    loss = network.loss_of(net, data.x_TK.double(), data.y_T)
    loss.backward()
    return network.gradients(loss, net, data)


def work(case, data):
    """Three products a layer, less the gradient by the pictures."""
    first, second = (int(mask.sum()) for mask in data.masks)
    return {"flops": 2 * case.labels["batch"] * (2 * first + 3 * second + 3 * 10 * network.WIDTH)}
