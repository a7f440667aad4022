"""Registration of operators with torch, for less of the host's time than torch.library.custom_op takes.

`custom_op` wraps each call in Python twice more: to look at the devices of its arguments, and for outputs that are
inputs. `define` and `impl` do neither; schema, fake kernel and autograd formula are the same, and so is what
torch.compile, opcheck, checkpointing and FSDP see. For operators that change none of their arguments: the others need
custom_op, which tells autograd of the change. `benchmarks/operator_calls.py` sets the two beside each other.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_LIBRARY = torch.library.Library("ptst", "FRAGMENT")
Function = TypeVar("Function", bound=Callable[..., Any])

OPERATORS: dict[str, "Operator"] = {}  # by ptst::name


class Operator:
    """`ptst::name`, as a function; what custom_op returns, as far as it is used here."""

    def __init__(self, name: str, body: Callable[..., Any]):
        self.name, self._init_fn = name, body
        schema = torch.library.infer_schema(body, mutates_args=())
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
        self._overload = getattr(torch.ops.ptst, name).default
        self.__doc__ = body.__doc__
        OPERATORS[f"ptst::{name}"] = self

    def __call__(self, *args: Any) -> Any:
        return self._overload(*args)

    def register_fake(self, fake: Function) -> Function:
        """`fake` gives outputs without values, for tensors without values."""
        torch.library.register_fake(f"ptst::{self.name}", fake, lib=_LIBRARY)
        return fake

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        torch.library.register_autograd(f"ptst::{self.name}", backward, setup_context=setup_context, lib=_LIBRARY)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: registers a function of tensors and numbers, by its annotations, as `ptst::name`. The function must
    change none of its arguments and return none of them."""
    return lambda body: Operator(name, body)
