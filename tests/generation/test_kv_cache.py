"""Blocks are allocated, shared, copied and freed; none is lost, none has two owners."""

from __future__ import annotations

import random

import pytest
import torch

from ptst.generation.kv_cache import BLOCK_SIZE, MAX_KEPT, KVCache, blocks_for, common_prefix_length
from ptst.model.config import DecoderConfig
from tests.tiny import CONFIG


def new_cache(blocks: int) -> KVCache:
    return KVCache(DecoderConfig.from_dict(CONFIG), blocks, torch.float32, torch.device("cpu"))


def write(cache: KVCache, blocks: list[int], start: int, end: int, mark: float) -> None:
    for j in range(start, end):
        cache.data[:, :, blocks[j // BLOCK_SIZE], :, j % BLOCK_SIZE] = mark * 1000 + j


def read(cache: KVCache, blocks: list[int], length: int) -> list[float]:
    return [float(cache.data[-1, 1, blocks[j // BLOCK_SIZE], 0, j % BLOCK_SIZE, 0]) for j in range(length)]


def test_what_was_written_is_read_whatever_happens_to_the_others():
    chance = random.Random(0)
    cache = new_cache(40)
    alive: list[tuple[object, list[float], int]] = []
    refused = shared = 0
    for mark in range(1, 600):
        action = chance.random()
        if action < 0.5:
            most = chance.randint(1, 6 * BLOCK_SIZE)
            stored = chance.choice(cache.prefixes) if cache.prefixes and chance.random() < 0.6 else None
            length = chance.randint(1, len(stored.token_ids)) if stored else 0
            most += length
            told = [float(x) for x in stored.token_ids[:length]] if stored else []
            sequence = cache.allocate(most, stored, length)
            if sequence is None:
                refused += 1
                continue
            whole = length // BLOCK_SIZE
            shared += whole > 0
            assert not whole or sequence.blocks[:whole] == stored.blocks[:whole]
            assert read(cache, sequence.blocks, length) == told
            grown = chance.randint(length, most)
            cache.extend(sequence, grown)
            write(cache, sequence.blocks, length, grown, mark)
            alive.append((sequence, told + [mark * 1000.0 + j for j in range(length, grown)], most))
        elif action < 0.75 and alive:
            sequence, told, _ = alive.pop(chance.randrange(len(alive)))
            cache.free(sequence)
        elif action < 0.85 and alive:
            sequence, told, _ = chance.choice(alive)
            if told:
                cache.cache_prefix(sequence, told[: chance.randint(1, len(told))], None)
        for sequence, told, _ in alive:
            assert read(cache, sequence.blocks, len(told)) == told
    assert min(refused, shared) > 5
    for sequence, _told, most in alive:
        cache.extend(sequence, most)  # what was reserved is there
        cache.free(sequence)
    for stored in list(cache.prefixes):
        cache.evict(stored)
    assert cache.num_used == 0
    assert cache._num_reserved == 0
    assert not any(cache._references)
    assert sorted(cache._free) == list(range(1, 41))


def test_what_is_reserved_is_not_given_to_others():
    cache = new_cache(4)
    first = cache.allocate(3 * BLOCK_SIZE)
    assert cache.allocate(2 * BLOCK_SIZE) is None
    assert cache.allocate(BLOCK_SIZE) is not None
    cache.extend(first, 3 * BLOCK_SIZE)
    with pytest.raises(AssertionError, match="more blocks than it reserved"):
        cache.extend(first, 3 * BLOCK_SIZE + 1)


def test_a_block_is_freed_once():
    cache = new_cache(2)
    sequence = cache.allocate(BLOCK_SIZE)
    cache.extend(sequence, 1)
    blocks = list(sequence.blocks)
    cache.free(sequence)
    sequence.blocks = blocks
    with pytest.raises(AssertionError, match="freed twice"):
        cache.free(sequence)


def test_used_prefixes_stay_and_the_least_recently_used_are_evicted_first():
    cache = new_cache(4)
    stored = []
    for mark in range(3):
        sequence = cache.allocate(BLOCK_SIZE)
        cache.extend(sequence, BLOCK_SIZE)
        stored.append(cache.cache_prefix(sequence, [mark] * BLOCK_SIZE, None))
        cache.free(sequence)
    user = cache.allocate(BLOCK_SIZE + 1, stored[0], BLOCK_SIZE)
    assert cache.match_prefix([1] * (BLOCK_SIZE + 1), None) == (stored[1], BLOCK_SIZE)
    assert cache.match_prefix([1] * (BLOCK_SIZE + 1), "other") == (None, 0)
    assert cache.match_prefix([1] * 5, None) == (stored[1], 4)  # one token is left to compute
    cache.allocate(BLOCK_SIZE)
    assert cache.prefixes == [stored[0], stored[2]]
    cache.free(user)


def test_a_prefix_is_not_evicted_in_vain():
    cache = new_cache(4)
    held = cache.allocate(2 * BLOCK_SIZE)
    prefix = cache.allocate(BLOCK_SIZE)
    cache.extend(prefix, BLOCK_SIZE)
    kept = cache.cache_prefix(prefix, list(range(BLOCK_SIZE)), None)
    cache.free(prefix)
    assert cache.allocate(3 * BLOCK_SIZE) is None  # even with the prefix's block there are only two
    assert cache.prefixes == [kept]
    assert cache.allocate(2 * BLOCK_SIZE) is not None
    assert not cache.prefixes
    cache.free(held)


def test_sizes():
    assert [blocks_for(n) for n in (0, 1, BLOCK_SIZE, BLOCK_SIZE + 1)] == [0, 1, 1, 2]
    cache = new_cache(7)
    assert cache.bytes_for(7) == cache.data.nbytes
    assert [common_prefix_length([1, 2, 3], x) for x in ([1, 2, 3], [1, 2], [1, 9, 3], [4], [])] == [3, 2, 1, 0, 0]


def test_finished_sequences_are_kept_up_to_a_number():
    """The ones used last; one that another begins with is not kept twice; those in use are not evicted."""
    cache = new_cache(3 * MAX_KEPT)

    def finish(*token_ids: int, adapter: str | None = None) -> None:
        table = cache.allocate(len(token_ids))
        cache.extend(table, len(token_ids))
        cache.keep_finished(table, list(token_ids), adapter)
        cache.free(table)

    finish(1, 2, 3)
    finish(1, 2)
    assert [p.token_ids for p in cache.prefixes] == [[1, 2, 3]]
    finish(1, 2, adapter="a")
    user = cache.allocate(40, cache.prefixes[0], 3)
    for n in range(2 * MAX_KEPT):
        finish(9, n)
    assert [p.token_ids for p in cache.prefixes] == [[1, 2, 3], *([9, n] for n in range(MAX_KEPT, 2 * MAX_KEPT))]
    cache.free(user)
    for stored in list(cache.prefixes):
        cache.evict(stored)
    assert cache.num_used == 0
