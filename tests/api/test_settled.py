"""A weight whose zeros are in place is used as it is; whoever writes to it gets the mask's product back."""

import copy
import io

import pytest
import torch
from torch import nn

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
