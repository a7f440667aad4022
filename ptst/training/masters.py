"""Master weights: what the optimizer updates where the weights themselves are too coarse.

A bfloat16 weight w moves only in steps of about |w| / 256: at a learning rate of 2e-5 almost none ever does, and a
moment of AdamW that is bfloat16 cannot decay. A trained bfloat16 weight therefore has a float32 copy, its master, to
which gradients are added and moments belong; after each step the weight is its master, rounded (Micikevicius et al.
2018, arXiv 1710.03740, section 3.1). With stochastic rounding the copy exists only while it is updated, one weight
matrix after another, and is rounded up or down at random such that the mean is right (Gupta et al. 2015, arXiv
1502.02551): four bytes a weight less, and some noise. A weight of float32 or wider is its own master.
"""

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ptst.training.schedule import WeightUpdate


class Masters:
    """The masters of `parameters`, by the same names. Their gradients are sums in float32 over micro-batches, taken
    from each backward pass by hooks. `seed`: of the rounding, if `update` is "stochastic"."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], update: WeightUpdate, seed: int):
        self.parameters, self.stochastic, self.seed = parameters, update == "stochastic", seed
        self.weights = {name: self._master(p) for name, p in parameters.items()}

    def _master(self, parameter: nn.Parameter) -> nn.Parameter:
        if torch.promote_types(parameter.dtype, torch.float32) == parameter.dtype:
            return parameter
        master = nn.Parameter(parameter.detach().float())
        if self.stochastic:
            master.untyped_storage().resize_(0)

        def take_gradient(p: Tensor) -> None:
            assert p.grad is not None
            master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
            p.grad = None

        parameter.register_post_accumulate_grad_hook(take_gradient)
        return master

    @property
    def tensors(self) -> Mapping[str, nn.Parameter]:
        """What a checkpoint must hold, the optimizer's state aside."""
        return self.parameters if self.stochastic else self.weights

    @property
    def written(self) -> Collection[Tensor]:
        """The tensors that a step writes."""
        return self.parameters.values()

    @torch.no_grad()
    def write(self) -> None:
        """Round the masters that are kept into the weights."""
        for name, parameter in self.parameters.items():
            if parameter is not self.weights[name] and not self.stochastic:
                parameter.copy_(self.weights[name])

    @torch.no_grad()
    def step(self, optimizer: Optimizer, number: int) -> None:
        """Optimizer step `number`, and the weights after it. `optimizer` has the masters in one group, in order."""
        if not self.stochastic:
            optimizer.step()
            self.write()
            return
        (group,) = optimizer.param_groups
        masters = list(self.weights.values())
        for name, master in self.weights.items():
            parameter, group["params"] = self.parameters[name], [master]
            if parameter is master:
                optimizer.step()
                continue
            master.untyped_storage().resize_(4 * master.numel())
            master.copy_(parameter)
            optimizer.step()
            seed = hashlib.blake2b(f"{self.seed}:{number}:{name}".encode(), digest_size=7).digest()
            generator = torch.Generator(parameter.device).manual_seed(int.from_bytes(seed))
            parameter.copy_(round_stochastically(master, generator))
            master.untyped_storage().resize_(0)
        group["params"] = masters


def round_stochastically(x: Tensor, generator: torch.Generator) -> Tensor:
    """Finite float32 numbers as bfloat16, each rounded to one of its two neighbours, with probabilities such that the
    mean is x."""
    noise = torch.randint(2**16, x.shape, generator=generator, dtype=torch.int32, device=x.device)
    return (x.view(torch.int32) + noise).bitwise_and_(-(2**16)).view(torch.float32).to(torch.bfloat16)
