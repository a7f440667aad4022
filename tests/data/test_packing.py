"""A batch that contradicts itself, or asks for ids that the model does not have, is refused on the host."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptst.data.packing import Batch

GOOD = Batch([5, 6, 7], [0, 1, 0], [0, 2, 3], [6, -1, -1], [0, 1])


@pytest.mark.parametrize("lie", [[0, 2], [1, 3], [0, 3, 2, 3], [0, 2, 4], []])
def test_boundaries_that_lie(lie):
    with pytest.raises(ValueError, match="must rise from 0 to the 3 tokens"):
        replace(GOOD, cu_seqlens=lie)


def test_rows_of_different_lengths():
    with pytest.raises(ValueError, match="3 tokens have 2 positions and 3 targets"):
        replace(GOOD, positions=[0, 1])


@pytest.mark.parametrize(("key", "ids"), [("tokens", [5, 8, 7]), ("tokens", [5, -1, 7]), ("targets", [6, 8, -2])])
def test_ids_that_the_model_does_not_have(key, ids):
    GOOD.check_ids(8)
    wrong = next(i for i in ids if not 0 <= i < 8)
    with pytest.raises(ValueError, match=f"{key[:-1]} {wrong} at place 1 is not one of the model's 8 ids"):
        replace(GOOD, **{key: ids}).check_ids(8)
