"""The stacks in bfloat16: weights rounded once, activations wherever an engine rounds them, groups of four rows."""

import dataclasses

import torch

from benchmarks.harness import Case
from benchmarks.stacks import problem as stacks

NAME, TITLE = "bf16", "Stacks of convolutions and linear layers, bfloat16, groups of four rows"
# Eight bits of every activation are kept between layers; six to eight layers add that up.
TOLERANCE = 3e-2
CASES = [
    dataclasses.replace(c, labels={k: v for k, v in c.labels.items() if k != "pattern"})
    for c in stacks.CASES
    if c.labels["pattern"] == "rows by 4"
]
GROUPS = {"best dense bf16 engine": ("openvino_bf16", "torch_bf16"), "best dense fp32 engine": ("openvino_fp32",)}
PANEL = ("stack",)


def dense_case(case):
    """Dense engines multiply zeros like any numbers: they are timed once per stack."""
    return f"{case.labels['stack']}-rows-by-4-0.9"


def build(case):
    data = stacks.build(Case(case.id, {**case.labels, "pattern": "rows by 4"}))
    rounded = (dataclasses.replace(a, w_MK=a.w_MK.bfloat16().float()) for a in data.layers)
    return dataclasses.replace(data, layers=tuple(rounded), x=data.x.to(torch.bfloat16).float())


def work(case, data):
    return {"bf16_flops": data.kept_flops}


exact, export = stacks.exact, stacks.export
