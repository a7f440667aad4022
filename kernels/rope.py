r"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in Llama's rotate-half layout.

A head of D elements is D/2 pairs (x_i, x_{i + D/2}); pair i at position p turns by the angle p * f_i,

    f_i = theta^(-2i/D),   y_i = x_i cos - x_{i+D/2} sin,   y_{i+D/2} = x_{i+D/2} cos + x_i sin.

Rotation is orthogonal, so the backward pass is the rotation by the negative angle.
Llama 3.1 divides slow frequencies by `factor` and blends in between ("llama3" scaling).

Shapes: T tokens, H heads, D head_dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def frequencies(head_dim: int, theta: float, scaling=None) -> Tensor:
    """Angle per position of each pair, float32 (D/2,). `scaling` has Llama 3.1's four figures, or is None."""
    f_D2 = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if scaling is None:
        return f_D2
    # Wavelengths longer than the original context / low_freq_factor are stretched by `factor`, shorter than
    # context / high_freq_factor left alone, and blended linearly (in cycles per context) in between.
    cycles = scaling.original_max_positions * f_D2 / (2 * math.pi)
    blend = ((cycles - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return (1 - blend) * f_D2 / scaling.factor + blend * f_D2


def tables(positions_T: Tensor, frequencies_D2: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, float32, (T, 1, D/2) each: made once per forward pass and used by every layer."""
    angles_TD2 = positions_T[:, None].float() * frequencies_D2
    return angles_TD2.cos()[:, None], angles_TD2.sin()[:, None]


def rope(x_THD: Tensor, cos_T1D2: Tensor, sin_T1D2: Tensor) -> Tensor:
    """Rotate every head of `x_THD` by its token's angles; computed in float32, returned in x's dtype."""
    a, b = x_THD.float().chunk(2, dim=-1)
    return torch.cat((a * cos_T1D2 - b * sin_T1D2, b * cos_T1D2 + a * sin_T1D2), dim=-1).to(x_THD.dtype)
