"""q, k and v as columns of one tensor, and so their gradients: one product makes all three, and one takes them back.

Shapes: T tokens, Q query heads, K key/value heads, D head_dim; q (T, Q, D) or (T, Q D), k and v likewise with K.
"""

import math

from torch import Tensor

_OWN = "ptst_gradient"  # set on the memory of gradients


def joined(*parts: Tensor) -> Tensor | None:
    """The (T, N) tensor whose columns `parts` (T, ...) are, one after another from first to last, or None."""
    first = parts[0]
    at, memory = first.storage_offset(), first.untyped_storage()._cdata
    widths = [math.prod(part.shape[1:]) for part in parts]
    for part, width in zip(parts, widths, strict=True):
        inner = [math.prod(part.shape[axis + 1 :]) for axis in range(1, part.dim())]
        place = (len(part), part.untyped_storage()._cdata, part.storage_offset(), list(part.stride()))
        if place != (len(first), memory, at, [sum(widths), *inner]):
            return None
        at += width
    return first.as_strided((len(first), sum(widths)), (sum(widths), 1))


def gradients_like(q_TQD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> tuple[Tensor, ...]:
    """Uninitialized memory for dq, dk and dv: columns of one tensor where q, k and v are, else a tensor each."""
    shapes = [x.shape[1:] for x in (q_TQD, k_TKD, v_TKD)]
    if joined(q_TQD, k_TKD, v_TKD) is None:
        return tuple(x.new_empty(x.shape) for x in (q_TQD, k_TKD, v_TKD))
    widths = [math.prod(shape) for shape in shapes]
    whole = q_TQD.new_empty((len(q_TQD), sum(widths)))
    setattr(whole.untyped_storage(), _OWN, True)
    return tuple(x.unflatten(1, shape) for x, shape in zip(whole.split(widths, 1), shapes, strict=True))


def own_gradients(*parts: Tensor) -> Tensor | None:
    """The tensor that `gradients_like` made `parts` of, which the function that they are for may change in place; None
    for any others, which someone else may hold."""
    whole = joined(*parts)
    return whole if whole is not None and hasattr(whole.untyped_storage(), _OWN) else None
