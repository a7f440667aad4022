r"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): y = w * x / sqrt(mean(x^2) + eps), statistics in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Normalize each row of `x_TH` to unit root mean square and scale by `weight_H`; returned in x's dtype."""
    return torch.nn.functional.rms_norm(x_TH, x_TH.shape[-1:], weight_H, eps)
