"""Blocks are handed out, shared, moved and returned; none is lost, none has two masters."""

from __future__ import annotations

import random

import pytest
import torch

from ptst.generation.cache import BLOCK, Cache, blocks_for, common
from ptst.model.config import DecoderConfig
from tests.tiny import CONFIG


def new_cache(blocks: int) -> Cache:
    return Cache(DecoderConfig.from_dict(CONFIG), blocks, torch.float32, torch.device("cpu"))


def write(cache: Cache, blocks: list[int], start: int, end: int, mark: float) -> None:
    for j in range(start, end):
        cache.store[:, :, blocks[j // BLOCK], :, j % BLOCK] = mark * 1000 + j


def read(cache: Cache, blocks: list[int], length: int) -> list[float]:
    return [float(cache.store[-1, 1, blocks[j // BLOCK], 0, j % BLOCK, 0]) for j in range(length)]


def test_what_was_written_is_read_whatever_happens_to_the_others():
    chance = random.Random(0)
    cache = new_cache(40)
    alive: list[tuple[object, list[float], int]] = []
    refused = shared = 0
    for mark in range(1, 600):
        action = chance.random()
        if action < 0.5:
            most = chance.randint(1, 6 * BLOCK)
            stored = chance.choice(cache.stored) if cache.stored and chance.random() < 0.6 else None
            length = chance.randint(1, len(stored.ids)) if stored else 0
            most += length
            told = [float(x) for x in stored.ids[:length]] if stored else []
            sequence = cache.admit(most, stored, length)
            if sequence is None:
                refused += 1
                continue
            whole = length // BLOCK
            shared += whole > 0
            assert not whole or sequence.blocks[:whole] == stored.blocks[:whole]
            assert read(cache, sequence.blocks, length) == told
            grown = chance.randint(length, most)
            cache.grow(sequence, grown)
            write(cache, sequence.blocks, length, grown, mark)
            alive.append((sequence, told + [mark * 1000.0 + j for j in range(length, grown)], most))
        elif action < 0.75 and alive:
            sequence, told, _ = alive.pop(chance.randrange(len(alive)))
            cache.release(sequence)
        elif action < 0.85 and alive:
            sequence, told, _ = chance.choice(alive)
            if told:
                cache.keep(sequence, told[: chance.randint(1, len(told))], None)
        for sequence, told, _ in alive:
            assert read(cache, sequence.blocks, len(told)) == told
    assert min(refused, shared) > 5
    for sequence, _told, most in alive:
        cache.grow(sequence, most)  # what was reserved is there
        cache.release(sequence)
    for stored in list(cache.stored):
        cache.forget(stored)
    assert cache.used == 0
    assert cache._promised == 0
    assert not any(cache._references)
    assert sorted(cache._free) == list(range(1, 41))


def test_what_is_reserved_is_not_given_to_others():
    cache = new_cache(4)
    first = cache.admit(3 * BLOCK)
    assert cache.admit(2 * BLOCK) is None
    assert cache.admit(BLOCK) is not None
    cache.grow(first, 3 * BLOCK)
    with pytest.raises(AssertionError, match="more than was reserved"):
        cache.grow(first, 3 * BLOCK + 1)


def test_a_block_is_returned_once():
    cache = new_cache(2)
    sequence = cache.admit(BLOCK)
    cache.grow(sequence, 1)
    blocks = list(sequence.blocks)
    cache.release(sequence)
    sequence.blocks = blocks
    with pytest.raises(AssertionError, match="returned twice"):
        cache.release(sequence)


def test_beginnings_that_are_used_stay_and_the_longest_unused_go_first():
    cache = new_cache(4)
    stored = []
    for mark in range(3):
        sequence = cache.admit(BLOCK)
        cache.grow(sequence, BLOCK)
        stored.append(cache.keep(sequence, [mark] * BLOCK, None))
        cache.release(sequence)
    user = cache.admit(BLOCK + 1, stored[0], BLOCK)
    assert cache.match([1] * (BLOCK + 1), None) == (stored[1], BLOCK)
    assert cache.match([1] * (BLOCK + 1), "other") == (None, 0)
    assert cache.match([1] * 5, None) == (stored[1], 4)  # one token is left to compute
    cache.admit(BLOCK)
    assert cache.stored == [stored[0], stored[2]]
    cache.release(user)


def test_a_beginning_is_not_thrown_away_in_vain():
    cache = new_cache(4)
    held = cache.admit(2 * BLOCK)
    beginning = cache.admit(BLOCK)
    cache.grow(beginning, BLOCK)
    kept = cache.keep(beginning, list(range(BLOCK)), None)
    cache.release(beginning)
    assert cache.admit(3 * BLOCK) is None  # even with the beginning's block there are only two
    assert cache.stored == [kept]
    assert cache.admit(2 * BLOCK) is not None
    assert not cache.stored
    cache.release(held)


def test_sizes():
    assert [blocks_for(n) for n in (0, 1, BLOCK, BLOCK + 1)] == [0, 1, 1, 2]
    cache = new_cache(7)
    assert cache.bytes_for(7) == cache.store.nbytes
    assert [common([1, 2, 3], x) for x in ([1, 2, 3], [1, 2], [1, 9, 3], [4], [])] == [3, 2, 1, 0, 0]
