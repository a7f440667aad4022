"""Defences in weight space: the equations, for one weight at a time, each with its source.

None of them trains: what comes out is computed from the weights of the tuned model, of the aligned model that was
tuned, and for some of the model before its alignment (unaligned) and of a safe model. A function computes in the
precision of what it gets; the caller gives float32 or better and rounds the result once (ptst/defenses/compose.py).

Shapes: O outputs and I inputs of a projection, r rank of an adapter or of a direction.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


def interpolate(aligned: Tensor, tuned: Tensor, alpha: float) -> Tensor:
    """(1 - alpha) aligned + alpha tuned, for every weight of the model: exactly the aligned at 0 and the tuned at 1.

    WiSE-FT, Wortsman et al. 2022 (arXiv 2109.01903); theta_0 and theta_1 in its code (src/wise_ft.py)."""
    return torch.lerp(aligned, tuned, alpha)


def add_safety_vector(
    tuned: Tensor, aligned: Tensor, unaligned: Tensor, scale: float, drop: Tensor | None = None
) -> Tensor:
    """tuned + scale (aligned - unaligned), for every weight of the model: task arithmetic with a safety vector.

    `drop`: what `drop_and_rescale` left of the update, which takes the place of tuned - aligned. RESTA, Bhardwaj et al.
    2024 (arXiv 2402.11746): a safety vector, of the aligned model minus an unaligned one, is added to the weights."""
    start = tuned if drop is None else aligned + drop
    return start + scale * (aligned - unaligned)


def drop_and_rescale(update: Tensor, rate: float, generator: torch.Generator) -> Tensor:
    """Each value of an update is dropped with probability `rate`, and those that stay are divided by 1 - rate, so that
    the expected update is the same. DARE, Yu et al. 2024 (arXiv 2311.03099)."""
    kept = torch.rand(update.shape, generator=generator) >= rate  # on the CPU: the same values on every device
    return torch.where(kept.to(update.device), update / (1 - rate), torch.zeros_like(update))


@dataclass(frozen=True)
class Update:
    """What tuning added to a projection (O, I): `left` (O, I), or the product of `left` (O, r) and `right` (r, I), as
    an adapter has it. A projection from the left acts on `left` alone, so that an adapter stays one."""

    left: Tensor
    right: Tensor | None = None

    @property
    def dense(self) -> Tensor:
        """The update as one matrix (O, I)."""
        return self.left if self.right is None else self.left @ self.right

    def inner(self, left: Tensor) -> float:
        """The inner product of this update and one with another `left`, as vectors of O * I values."""
        if self.right is None:
            return float((self.left * left).sum())
        return float((self.left @ (self.right @ self.right.t()) * left).sum())  # <L R, L' R> = <L R R', L'>


@dataclass(frozen=True)
class Projected:
    """An update after C. `cosine`: between the update and C times it, which says how much of it lies where the
    alignment changed the projection; `size`: the length of C times it, in lengths of the update. Both None where there
    is nothing to compare."""

    update: Update
    cosine: float | None = None
    size: float | None = None


def project(left: Tensor, direction_OI: Tensor, kind: str) -> Tensor:
    """C left, where the direction V = aligned - unaligned of the same projection says what the alignment changed.

    `scaled`: C = V V' / |V|, |V| the Frobenius norm: Safe LoRA, Hsu et al. 2024 (arXiv 2405.16833), its fast form
    and what its code uses (model.py, get_aligned_matrix). It is no projection: it scales by the squared singular values
    of V over |V|, too, so that a small V shrinks the update. `orthogonal`: V (V' V)^+ V', the projection onto the
    columns of V, which the fast form stands for; of a V of full row rank it is the identity."""
    if kind == "orthogonal":
        basis_Or, values_r, _ = torch.linalg.svd(direction_OI, full_matrices=False)
        smallest = max(direction_OI.shape) * torch.finfo(values_r.dtype).eps * values_r.max()
        basis_Or = basis_Or[:, values_r > smallest]
        return basis_Or @ (basis_Or.t() @ left)
    return direction_OI @ (direction_OI.t() @ left) / torch.linalg.matrix_norm(direction_OI)


def projected(update: Update, direction_OI: Tensor, kind: str) -> Projected:
    """Safe LoRA's replacement C dW of an update dW, with the cosine between the two. Where there is nothing to compare,
    because the update is zero or the alignment left the projection as it was (V = 0), the update stays. One that C
    makes zero has no direction left: its cosine is 0."""
    square = update.inner(update.left)
    if square <= 0 or not direction_OI.any():
        return Projected(update)
    after = replace(update, left=project(update.left, direction_OI, kind))
    inner, after_square = update.inner(after.left), after.inner(after.left)
    if after_square <= 0:
        return Projected(after, 0.0, 0.0)
    return Projected(after, inner / (square * after_square) ** 0.5, (after_square / square) ** 0.5)


def merge_updates(tuned: Tensor, safe: Tensor, safe_share: float) -> Tensor:
    """(1 - safe_share) tuned + safe_share safe, of two dense updates (O, I) of one projection.

    SafeMERGE, Djuhera et al. 2025 (arXiv 2503.17239), with its linear merge. Its code lets peft merge the A
    and the B of the two adapters apart, each by the root of its share, which adds cross terms; this is the sum."""
    return torch.lerp(tuned, safe, safe_share)
