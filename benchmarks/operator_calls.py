"""What a call of an operator costs the host, whatever it computes: `ptst.kernels.operators` against torch's custom_op.

    python benchmarks/operator_calls.py

A dummy that allocates its outputs, called without gradients, with them, and with its backward pass. CPU time, the least
of five passes that take turns; compare the ratio, not the microseconds.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from ptst.kernels.operators import Operator

CALLS = 2000


def forward(x_TH: Tensor, weight_H: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return x_TH.new_empty(x_TH.shape), x_TH.new_empty(x_TH.shape[0])


def backward(dy_TH: Tensor, x_TH: Tensor, weight_H: Tensor) -> tuple[Tensor, Tensor]:
    return x_TH.new_empty(x_TH.shape), weight_H.new_empty(weight_H.shape)


def registered(make, kind: str):
    """The dummy, registered by `make(name, function)`."""
    op, back = make(f"dummy_{kind}", forward), make(f"dummy_{kind}_backward", backward)
    op.register_fake(forward)
    back.register_fake(backward)

    def setup(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.mark_non_differentiable(output[1])

    op.register_autograd(lambda ctx, dy, _: (*back(dy, *ctx.saved_tensors), None), setup_context=setup)
    return op


def seconds(call) -> float:
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS


def main() -> None:
    torch.set_num_threads(1)
    x, weight, dy = torch.ones(4, 8, requires_grad=True), torch.ones(8, requires_grad=True), torch.ones(4, 8)
    frozen = x.detach(), weight.detach()
    operators = {
        "custom_op": registered(lambda n, f: torch.library.custom_op(f"ptst::{n}", f, mutates_args=()), "custom"),
        "ours": registered(Operator, "ours"),
    }
    ways = {
        "no gradient": lambda op: lambda: op(*frozen, 1e-5),
        "forward": lambda op: lambda: op(x, weight, 1e-5),
        "forward and backward": lambda op: lambda: torch.autograd.grad(op(x, weight, 1e-5)[0], (x, weight), dy),
    }
    for way, call in ways.items():
        least = dict.fromkeys(operators, float("inf"))
        for _ in range(5):
            for name, op in operators.items():
                least[name] = min(least[name], seconds(call(op)))
        told = ", ".join(f"{name} {value * 1e6:.1f} us" for name, value in least.items())
        print(f"{way}: {told}, ratio {least['ours'] / least['custom_op']:.2f}")


if __name__ == "__main__":
    main()
