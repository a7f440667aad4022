"""Each equation in float64 against the same formula written out in numpy, from the papers and the authors' code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptst.defenses import weight_space
from ptst.defenses.weight_space import Update

O, I, R = 7, 5, 2
CLOSE = {"rtol": 0, "atol": 1e-12}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


ALIGNED, TUNED, BEFORE, SAFE = (random(O, I, seed=seed) for seed in range(4))


def numpy_cosine(one: np.ndarray, other: np.ndarray) -> float:
    return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_wise_ft(alpha):
    found = weight_space.interpolate(ALIGNED, TUNED, alpha)
    wanted = (1 - alpha) * ALIGNED.numpy() + alpha * TUNED.numpy()
    assert np.allclose(found.numpy(), wanted, **CLOSE)


def test_wise_ft_is_exact_at_its_ends_and_where_nothing_was_tuned():
    aligned, tuned = ALIGNED.float(), TUNED.float()
    assert torch.equal(weight_space.interpolate(aligned, tuned, 0.0), aligned)
    assert torch.equal(weight_space.interpolate(aligned, tuned, 1.0), tuned)
    assert torch.equal(weight_space.interpolate(aligned, aligned, 0.3), aligned)


def test_resta():
    found = weight_space.add_safety_vector(TUNED, ALIGNED, BEFORE, 0.7)
    assert np.allclose(found.numpy(), TUNED.numpy() + 0.7 * (ALIGNED.numpy() - BEFORE.numpy()), **CLOSE)


def test_resta_with_dare_starts_from_what_is_left_of_the_update():
    left = torch.where(random(O, I, seed=9) > 0, (TUNED - ALIGNED) / 0.5, torch.zeros(()))
    found = weight_space.add_safety_vector(TUNED, ALIGNED, BEFORE, 0.7, left)
    wanted = ALIGNED.numpy() + left.numpy() + 0.7 * (ALIGNED.numpy() - BEFORE.numpy())
    assert np.allclose(found.numpy(), wanted, **CLOSE)


def test_dare_drops_the_share_and_keeps_the_mean():
    update = random(200, 100) + 3.0
    found = weight_space.drop_and_rescale(update, 0.3, torch.Generator().manual_seed(0))
    dropped = found == 0
    assert abs(float(dropped.double().mean()) - 0.3) < 4 * (0.3 * 0.7 / update.numel()) ** 0.5
    assert torch.allclose(found[~dropped], update[~dropped] / 0.7, **CLOSE)
    assert abs(float(found.mean() / update.mean()) - 1) < 0.02
    assert torch.equal(found, weight_space.drop_and_rescale(update, 0.3, torch.Generator().manual_seed(0)))
    assert not torch.equal(found, weight_space.drop_and_rescale(update, 0.3, torch.Generator().manual_seed(1)))
    assert torch.equal(weight_space.drop_and_rescale(update, 0.0, torch.Generator()), update)


def by_the_authors_code(left: np.ndarray, right: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, float]:
    """C B and the cosine of C B A with B A, as SafeLoRA.projected_weighted computes them: C as a matrix (O, O)."""
    c = v @ v.T / np.sqrt((v**2).sum())
    return c @ left, numpy_cosine((c @ left) @ right, left @ right)


def test_safe_lora_of_an_adapter():
    b, a = random(O, R, seed=5), random(R, I, seed=6)
    found = weight_space.projected(Update(b, a), ALIGNED - BEFORE, "scaled")
    wanted, wanted_cosine = by_the_authors_code(b.numpy(), a.numpy(), (ALIGNED - BEFORE).numpy())
    assert np.allclose(found.update.left.numpy(), wanted, **CLOSE) and found.update.right is a
    assert found.cosine == pytest.approx(wanted_cosine, abs=1e-12) and found.cosine < 0.95
    assert found.size == pytest.approx(np.linalg.norm(wanted @ a.numpy()) / np.linalg.norm(b.numpy() @ a.numpy()))


def test_safe_lora_of_a_dense_update():
    found = weight_space.projected(Update(TUNED - ALIGNED), ALIGNED - BEFORE, "scaled")
    left = (TUNED - ALIGNED).numpy()
    wanted, wanted_cosine = by_the_authors_code(left, np.eye(I), (ALIGNED - BEFORE).numpy())
    assert np.allclose(found.update.dense.numpy(), wanted, **CLOSE)
    assert found.cosine == pytest.approx(wanted_cosine, abs=1e-12)


def test_an_update_as_product_and_as_matrix_is_the_same():
    b, a = random(O, R, seed=5), random(R, I, seed=6)
    for kind in ("scaled", "orthogonal"):
        thin, dense = (
            weight_space.projected(update, ALIGNED - BEFORE, kind) for update in (Update(b, a), Update(b @ a))
        )
        assert torch.allclose(thin.update.dense, dense.update.dense, **CLOSE)
        assert (thin.cosine, thin.size) == pytest.approx((dense.cosine, dense.size), abs=1e-12)


def test_the_orthogonal_projection():
    """Of a direction of rank 2: P dW is the nearest matrix with columns in its span, P P = P; by normal equations."""
    v = random(O, R, seed=7) @ random(R, I, seed=8)
    update = Update(TUNED - ALIGNED)
    found = weight_space.projected(update, v, "orthogonal")
    columns = v.numpy()[:, :R]
    nearest = columns @ np.linalg.lstsq(columns, update.left.numpy(), rcond=None)[0]
    assert np.allclose(found.update.dense.numpy(), nearest, rtol=0, atol=1e-10)
    again = weight_space.projected(found.update, v, "orthogonal")
    assert torch.allclose(again.update.dense, found.update.dense, rtol=0, atol=1e-10)
    assert (again.cosine, again.size) == pytest.approx((1.0, 1.0))
    # Of a projection, the cosine is the share of the length that is left.
    assert found.cosine == pytest.approx(found.size, abs=1e-10) and found.size < 0.95


def test_of_full_row_rank_the_orthogonal_projection_changes_nothing():
    update = Update((TUNED - ALIGNED).t().contiguous())
    found = weight_space.projected(update, random(I, O, seed=7), "orthogonal")
    assert torch.allclose(found.update.dense, update.dense, rtol=0, atol=1e-10)
    assert (found.cosine, found.size) == pytest.approx((1.0, 1.0))


def test_where_there_is_nothing_to_compare():
    update, zero = Update(TUNED - ALIGNED), torch.zeros(O, I, dtype=torch.float64)
    kept = weight_space.projected(update, zero, "scaled")
    assert kept.update is update and kept.cosine is None  # the alignment did not change the projection
    assert weight_space.projected(Update(zero), ALIGNED - BEFORE, "scaled").cosine is None  # nor did tuning
    across = torch.zeros_like(zero)
    across[0] = 1.0  # the direction knows the first output alone, the update all others
    beside = update.left.clone()
    beside[0] = 0.0
    gone = weight_space.projected(Update(beside), across, "scaled")
    assert not gone.update.dense.any() and (gone.cosine, gone.size) == (0.0, 0.0)


def test_the_fast_form_scales_with_the_direction():
    """C is no projection: a direction a tenth as long leaves a tenth of the update, at the same cosine."""
    update, v = Update(TUNED - ALIGNED), ALIGNED - BEFORE
    one, small = (weight_space.projected(update, factor * v, "scaled") for factor in (1.0, 0.1))
    assert torch.allclose(small.update.dense, 0.1 * one.update.dense, **CLOSE)
    assert (small.cosine, small.size) == pytest.approx((one.cosine, 0.1 * one.size))


def test_safe_merge():
    tuned, safe = TUNED - ALIGNED, SAFE - ALIGNED
    found = weight_space.merge_updates(tuned, safe, 0.2)
    assert np.allclose(found.numpy(), 0.8 * tuned.numpy() + 0.2 * safe.numpy(), **CLOSE)
