"""A batch that contradicts itself, or has ids that the model lacks, is refused on the host; a prefix that documents
share is computed once if nothing in it is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ptst.data.packing import MIN_SHARED_PREFIX, Batch, largest_micro_batch, share_prefixes, to_batch
from ptst.text.encode import Example

GOOD = Batch([5, 6, 7], [0, 1, 0], [0, 2, 3], [6, -1, -1], [0, 1])


@pytest.mark.parametrize("lie", [[0, 2], [1, 3], [0, 3, 2, 3], [0, 2, 4], []])
def test_boundaries_that_lie(lie):
    with pytest.raises(ValueError, match="must rise from 0 to the number of tokens, 3"):
        replace(GOOD, cu_seqlens=lie)


def test_rows_of_different_lengths():
    with pytest.raises(ValueError, match="3 tokens have 2 positions and 3 labels"):
        replace(GOOD, position_ids=[0, 1])


@pytest.mark.parametrize(("key", "ids"), [("tokens", [5, 8, 7]), ("tokens", [5, -1, 7]), ("labels", [6, 8, -2])])
def test_ids_that_the_model_does_not_have(key, ids):
    GOOD.check_ids(8)
    wrong = next(i for i in ids if not 0 <= i < 8)
    with pytest.raises(ValueError, match=f"{key[:-1]} {wrong} at index 1 is not one of the model's 8 ids"):
        replace(GOOD, **{key: ids}).check_ids(8)


LEAST = MIN_SHARED_PREFIX
SYSTEM = list(range(100, 100 + LEAST))


def document(*ids: int, trained: int = 1) -> Example:
    """A system prompt, these ids after it, the last `trained` of them trained."""
    ids = (*SYSTEM, *ids)
    return Example(list(ids), [i >= len(ids) - trained for i in range(len(ids))])


def test_a_shared_prefix_is_kept_once():
    other = Example([1, 2, 3], [False, False, True])
    whole = to_batch([other, document(5, 6, 7), document(5, 8, 9), other, document(5, 9, 9, 9)])
    batch = share_prefixes(whole)
    assert batch.tokens == [1, 2, 3, *SYSTEM, 5, 6, 7, 8, 9, 1, 2, 3, 9, 9, 9]  # the 5 after the system prompt, too
    assert batch.shared_prefixes == [(0, 0), (0, 0), (3, LEAST + 1), (0, 0), (3, LEAST + 1)]
    assert batch.cu_seqlens == [
        0,
        3,
        LEAST + 6,
        LEAST + 8,
        LEAST + 11,
        LEAST + 14,
    ]
    assert batch.position_ids[LEAST + 6 : LEAST + 9] == [
        LEAST + 1,
        LEAST + 2,
        0,
    ]
    assert batch.labels[LEAST + 5 : LEAST + 8] == [-1, 9, -1]
    assert batch.num_trained == whole.num_trained == 5


def test_no_trained_label_is_left_out_with_a_prefix():
    """The last common token predicts a trained one in the second document, and stays there."""
    batch = share_prefixes(to_batch([document(5, 5, 5, 6), document(5, 5, 7), document(5, 5, 5, 5, trained=2)]))
    assert [size for _, size in batch.shared_prefixes] == [0, LEAST + 1, LEAST + 1]
    assert batch.num_trained == 4


def test_documents_that_share_too_little():
    short = [Example([*SYSTEM[:-1], i], [False] * LEAST) for i in range(3)]
    early = [document(5), document(6, trained=LEAST)]
    alike = to_batch([document(5, 6), document(5, 7)])
    assert share_prefixes(alike) is not alike
    moved = replace(alike, position_ids=[*range(LEAST + 2), *range(1, LEAST + 3)])
    for batch in (to_batch(short), to_batch(early), moved):
        assert share_prefixes(batch) is batch


def test_the_largest_micro_batch_is_counted_as_it_is_computed():
    alone = Example([1] * (LEAST + 9), [False] * (LEAST + 8) + [True], 3)
    examples = [document(1, 2), document(3, 4, 5), document(6, 7), alone]
    steps = [[0, 1, 2], [3]]
    assert largest_micro_batch(examples, steps, 10 * LEAST) == len(alone.ids)  # more than a prefix and seven ids
    assert largest_micro_batch(examples, steps[:1], 10 * LEAST) == LEAST + 7
    assert largest_micro_batch(examples, steps[:1], LEAST) == LEAST + 3  # each example alone
