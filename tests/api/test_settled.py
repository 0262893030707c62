"""A weight whose zeros are in place is used as it is; whoever writes to it gets the mask's product back."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import gossamer


def start(method="static", **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    opt = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, opt, gossamer.attach(model, method, optimizer=opt, density=0.25, **options)


def step(model, opt, handle):
    opt.zero_grad()
    model(torch.randn(5, 16)).square().sum().backward()
    opt.step()
    handle.step()


def parts(model):
    held = model[0].parametrizations.weight
    return held.original, held[0]


def test_training_makes_no_second_copy_of_the_weights():
    model, opt, handle = start()
    for _ in range(2):
        original, mask = parts(model)
        assert model[0].weight.data_ptr() == original.data_ptr()
        with torch.no_grad():
            assert model[0].weight.data_ptr() != original.data_ptr()  # who evaluates may have put in other weights
        step(model, opt, handle)
        assert not original.grad[~mask.mask].any() and original.grad[mask.mask].any()


@pytest.mark.parametrize("how", ["in place", "other data", "a state", "another mask", "another parameter"])
def test_whatever_is_written_is_cut_in_the_next_pass(how):
    model, *_ = start()
    original, mask = parts(model)
    full = torch.ones_like(original)
    with torch.no_grad():
        if how == "in place":
            original.add_(1)
        elif how == "other data":
            original.data = full
        elif how == "a state":
            state = model.state_dict() | {"0.parametrizations.weight.original": full}
            model.load_state_dict(state)
        elif how == "another mask":
            mask.mask.logical_and_(torch.arange(16) % 2 == 0)
        else:
            model[0].parametrizations.weight.original = nn.Parameter(full)
    assert not model[0].weight[~mask.mask].any() and model[0].weight.any()


def test_a_copy_has_a_weight_of_its_own():
    model, *_ = start()
    twin, file = copy.deepcopy(model), io.BytesIO()
    original, mask = parts(twin)
    original.data.add_(1)  # torch cannot see this write
    assert not twin[0].weight[~mask.mask].any()
    torch.save(mask, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).mask, mask.mask)


def test_a_product_and_no_product_train_alike():
    runs = []
    for settled in (True, False):
        model, opt, handle = start("rigl", total_steps=8, every=2)
        for _ in range(6):
            if not settled:
                for layer in (model[0], model[2]):
                    layer.parametrizations.weight[0]._settled = None
            torch.manual_seed(handle.steps)
            step(model, opt, handle)
        runs.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values()))


def test_who_writes_operators_down_gets_the_product_too():
    model, *_ = start()
    original, _ = parts(model)
    x_BI = torch.randn(5, 16)
    graph = make_fx(lambda x_BI: model(x_BI))(x_BI)
    with torch.no_grad():
        original.add_(1)
    assert torch.equal(graph(x_BI), model(x_BI))


def test_inference_tensors_and_swapped_parameters_are_never_used_as_they_are():
    model = nn.Sequential(nn.Linear(16, 8))
    with torch.inference_mode():
        gossamer.attach(model, "static", density=0.25)  # its mask counts no versions
        assert int((model[0].weight != 0).sum()) == 32
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model, *_ = start()
        assert model.double()[0].weight.dtype is torch.float64
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_masks_that_are_mapped_over_take_the_mask_s_place():
    model, *_ = start()
    _, mask = parts(model)
    full = torch.ones_like(mask.mask)
    both = torch.stack([mask.mask, full & (torch.arange(16) % 2 == 0)])
    weights = dict(model.named_parameters())
    x_BI, name = torch.randn(5, 16), "0.parametrizations.weight.0.mask"
    outputs = vmap(lambda kept: functional_call(model, {**weights, name: kept}, (x_BI,)))(both)
    assert torch.equal(outputs[0], model(x_BI)) and not torch.equal(outputs[0], outputs[1])
