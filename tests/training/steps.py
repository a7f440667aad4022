"""What the tests of a step share: small examples, and an optimizer that notes the gradient and changes nothing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ptst.model.config import LoraConfig
from ptst.model.decoder import Decoder
from ptst.model.lora import add_lora
from ptst.model.weights import load_decoder
from ptst.text.encode import Example
from ptst.training.parallel import ALONE, World
from ptst.training.trainer import Trainer, TrainerConfig


def examples(count: int, longest: int = 10) -> list[Example]:
    generator = torch.Generator().manual_seed(2)
    out = []
    for n in range(count):
        ids = torch.randint(3, 290, (5 + n % (longest - 4),), generator=generator).tolist()
        out.append(Example(ids, [i >= 1 + n % 3 for i in range(len(ids))], row=n))
    return out


class Recorder:
    """In an optimizer's place: notes each step's gradient."""

    def __init__(self, parameters: list):
        self.param_groups = [{"params": parameters}]
        self.gradients: list[Tensor] = []

    def step(self) -> None:
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.param_groups[0]["params"]]))

    def zero_grad(self, set_to_none: bool = True) -> None:
        for p in self.param_groups[0]["params"]:
            p.grad = None


def trained(decoder: Decoder, full: bool = False, dropout: float = 0.0) -> dict[str, nn.Parameter]:
    """What is trained of a decoder, by name: all weights, or adapters whose B is not zero, the same on every device."""
    if full:
        return dict(decoder.requires_grad_(True).named_parameters())
    named = add_lora(decoder, LoraConfig(rank=2, alpha=4, dropout=dropout))
    generator = torch.Generator().manual_seed(1)
    for name, p in named.items():
        if name.endswith("lora_B"):
            p.data.copy_(torch.empty(p.shape, dtype=p.dtype).normal_(0, 0.1, generator=generator))
    return named


def gradients(
    folder, rows, dtype, world: World = ALONE, full: bool = False, dropout: float = 0.0, **config
) -> list[Tensor]:
    """The gradient of every step of an epoch, in one vector each. B is not zero, so that A has a gradient, too."""
    decoder = load_decoder(folder, dtype)
    named = trained(decoder, full, dropout)
    trainer = Trainer(decoder, named, rows, TrainerConfig(clip=0, **config), world=world)
    trainer.optimizer = recorder = Recorder(list(named.values()))
    for _ in trainer:
        pass
    return recorder.gradients
