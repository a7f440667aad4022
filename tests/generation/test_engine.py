"""The engine: an answer depends on its request alone, whatever else is in the batch; those that end leave nothing."""

from __future__ import annotations

import itertools
import random
import signal

import pytest
import torch

from benchmarks.divergence import divergences
from ptst.generation.cuda_graphs import DecodeGraphs
from ptst.generation.engine import Engine, generate
from ptst.generation.kv_cache import BLOCK_SIZE, bytes_per_token
from ptst.generation.request import EngineOptions, Request, Sampling
from ptst.generation.sampling import sample
from ptst.generation.scheduler import MAX_BYPASSED
from ptst.generation.score import token_log_probabilities
from ptst.kernels.cpu import use_numba
from ptst.model.weights import load_decoder
from ptst.text.tokenizer import load_tokenizer
from tests.tiny import FAMILIES, write_tiny_model

STOPS = set(range(0, 300, 9))  # many, so that answers end at different lengths
PREFIX = list(range(10, 90))
CLOSE = 1e-3  # logits this close may swap when sums are taken in another order


def prompts(count: int) -> list[list[int]]:
    """Two templates' shared prefixes and none, ragged."""
    generator = torch.Generator().manual_seed(3)
    prefixes = (PREFIX, PREFIX[::-1] + PREFIX, [])
    return [prefixes[n % 3] + torch.randint(3, 290, (1 + n % 23,), generator=generator).tolist() for n in range(count)]


@pytest.fixture(scope="module")
def decoders(tmp_path_factory):
    """A plain decoder and one with a sliding window shorter than the prompts."""
    plain = load_decoder(write_tiny_model(tmp_path_factory.mktemp("a")))
    window = write_tiny_model(tmp_path_factory.mktemp("b"), architectures=["MistralForCausalLM"], sliding_window=21)
    families = {k: load_decoder(write_tiny_model(tmp_path_factory.mktemp(k), **v)) for k, v in FAMILIES.items()}
    return {"plain": plain, "window": load_decoder(window), **families}


@pytest.fixture(scope="module")
def decoder(decoders):
    return decoders["plain"]


def answers(decoder, requests, stops=STOPS, **settings) -> dict:
    other = {name: settings.pop(name) for name in ("decode", "adapters") if name in settings}
    engine = Engine(decoder, stops, EngineOptions(max_length=400, **settings), **other)
    done: dict = {}
    engine.run(requests, lambda i, c: done.__setitem__(i, c))
    assert not engine.busy
    return done


def same(decoder, asked, a: dict, b: dict) -> None:
    """Equal answers, but for choices between logits closer than CLOSE."""
    ids = range(len(asked))
    found = divergences(decoder, asked, [a[i].token_ids for i in ids], [b[i].token_ids for i in ids], STOPS)
    assert all(d.gap <= CLOSE for d in found), found
    assert len(found) <= len(asked) // 10


@pytest.mark.parametrize("kind", ["plain", "window"])
def test_greedy_answers_are_the_same_however_they_are_batched(decoders, kind):
    decoder, asked = decoders[kind], prompts(20)
    requests = [Request(p, Sampling(6 + i % 9), i) for i, p in enumerate(asked)]
    alone = answers(decoder, requests, batch_size=1, prefix_caching=False, max_prefill_tokens=1000)
    assert len({len(c.token_ids) for c in alone.values()}) > 4
    assert {c.finish_reason for c in alone.values()} == {"stop", "length"}
    shuffled = random.Random(0).sample(requests, len(requests))
    for order, (batch, chunk, share) in itertools.product(
        (requests, requests[::-1], shuffled), ((7, 5, True), (64, 64, False), (64, 512, True), (1, 33, True))
    ):
        got = answers(decoder, order, batch_size=batch, max_prefill_tokens=chunk, prefix_caching=share)
        same(decoder, asked, alone, got)
        assert [c.finish_reason for c in got.values()].count("length") > 2


class _Replayed:
    """Stands in for a captured graph where there is no GPU: it computes the step anew."""

    def __init__(self, graphs: DecodeGraphs, size: int, adapter: str | None):
        self.inputs = torch.zeros(size, graphs.columns(adapter), dtype=torch.int32)
        self.graph = self
        graphs._step(self.inputs, adapter)
        self.step = lambda: graphs._step(self.inputs, adapter)
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        self.step()


@pytest.mark.parametrize("kind", ["plain", "window", *FAMILIES])
@pytest.mark.parametrize("graphs", [False, True])
def test_a_gpus_way_gives_the_same_answers(decoders, kind, graphs, monkeypatch):
    """Block tables for the decode kernel, tokens read one step late, whole steps replayed: on a CPU."""
    decoder, asked = decoders[kind], prompts(12)
    requests = [Request(p, Sampling(9, 0.8 * (i % 2), seed=3, logprobs=True), i) for i, p in enumerate(asked)]
    wanted = answers(decoder, requests, batch_size=4)
    monkeypatch.setenv("PTST_KERNELS", "reference")  # not through the loops of a CPU
    engine, done = Engine(decoder, STOPS, EngineOptions(batch_size=4, max_length=400)), {}
    engine._lag, engine.cache.on_gpu = 1, True
    captured: list[_Replayed] = []

    def capture(self: DecodeGraphs, size: int, adapter: str | None) -> _Replayed:
        captured.append(_Replayed(self, size, adapter))
        return captured[-1]

    if graphs:
        monkeypatch.setattr(DecodeGraphs, "_capture", capture)
        engine._runner.graphs = DecodeGraphs(engine.forward, engine.cache, engine._runner.newest_tokens, 400)
        engine._runner.graphs.prepare()
        assert [len(c.inputs) for c in captured] == [4, 2, 1]
    engine.run(requests, done.__setitem__)
    assert {i: (c.token_ids, c.finish_reason) for i, c in done.items()} == {
        i: (c.token_ids, c.finish_reason) for i, c in wanted.items()
    }
    for i, c in done.items():
        assert c.logprobs == pytest.approx(wanted[i].logprobs, abs=1e-4)
    assert engine.statistics.tokens == sum(len(c.token_ids) for c in wanted.values())
    assert sum(c.replays for c in captured) >= 10 * graphs
    assert len(captured) == 3 * graphs  # none in the middle


def test_sampled_answers_do_not_depend_on_neighbours_or_arrival(decoder):
    asked = prompts(10)

    def request(i: int, seed: int = 7) -> Request:
        return Request(asked[i], Sampling(8, temperature=1.3, top_p=0.95, top_k=50, seed=seed), f"r{i}")

    alone = {f"r{i}": answers(decoder, [request(i)], batch_size=1)[f"r{i}"].token_ids for i in range(10)}
    for order in (range(10), reversed(range(10))):
        got = answers(decoder, [request(i) for i in order], batch_size=5)
        assert {i: c.token_ids for i, c in got.items()} == alone
    # By definition: one number a token, from the request's own generator.
    ids, numbers = list(asked[4]), request(4).sampling.generator("r4")
    for token in alone["r4"]:
        logits = decoder.logits(torch.tensor(ids))[-1:]
        assert int(sample(logits, [request(4).sampling], [numbers.random()])) == token
        ids.append(token)
    assert len(ids) > len(asked[4]) + 2
    other = answers(decoder, [request(i, seed=8) for i in range(10)])
    assert sum(c.token_ids != alone[i] for i, c in other.items()) > 5


def test_a_shared_prefix_is_computed_once(decoder):
    asked = [[*PREFIX, 100 + i, 5] for i in range(9)]
    engine = Engine(decoder, {2}, EngineOptions(batch_size=9, max_length=200))
    done: dict = {}
    engine.run([Request(p, Sampling(3), i) for i, p in enumerate(asked)], done.__setitem__)
    s = engine.statistics
    assert s.cached_tokens == 9 * len(PREFIX)
    assert {a.num_cached_tokens for a in done.values()} == {len(PREFIX)}
    assert s.prompt_tokens == len(PREFIX) + 9 * 2
    assert s.tokens == 27
    # Ten block tables, and the full blocks of the prefix are held once.
    assert s.blocks_peak == -(-len(PREFIX) // BLOCK_SIZE) + 9
    assert s.answers == 9
    assert "tokens/s, ETA " in s.progress(20)


def test_a_long_prompt_is_prefilled_while_others_decode(decoder):
    engine = Engine(decoder, {2}, EngineOptions(batch_size=2, max_prefill_tokens=4, max_length=400))
    engine.add(Request([5, 6], Sampling(40), "short"))
    engine.step()
    engine.add(Request(list(range(3, 103)), Sampling(2), "long"))
    for _ in range(25):
        assert [e.id for e in engine.step()] in (["short"], ["short", "long"])
    assert engine.statistics.prompt_tokens == 102


def test_the_shortest_is_answered_though_longer_ones_never_end(decoder):
    engine = Engine(decoder, {2}, EngineOptions(batch_size=2, max_length=60))
    stream = (Request(list(range(3, 23)), Sampling(2), i) for i in range(MAX_BYPASSED + 10))
    for _ in range(3):
        engine.add(next(stream))
    engine.add(Request([5], Sampling(1), "short"))
    while not any(e.id == "short" for e in engine.step()):
        while len(engine._scheduler.waiting) < 4:
            engine.add(next(stream))


def test_bypassed_requests_share_prefixes_as_others_do(decoder):
    engine = Engine(decoder, {2}, EngineOptions(batch_size=2, max_length=200))
    stream = (Request([5 + i, *range(3, 120)], Sampling(2), i) for i in range(MAX_BYPASSED + 10))
    for _ in range(2):
        engine.add(next(stream))
    asked = [Request([*PREFIX, 9 + i], Sampling(1), f"short {i}") for i in range(2)]
    for request in asked:
        engine.add(request)
    while engine.busy:
        engine.step()
        while len(engine._scheduler.waiting) < 4 and (request := next(stream, None)):
            engine.add(request)
    assert engine.statistics.cached_tokens == 2 * len(PREFIX)


def test_a_conversation_continues_from_the_prefix_cache(decoder):
    engine, done = Engine(decoder, {2}, EngineOptions(batch_size=1, max_length=400)), {}
    first = list(range(3, 60))
    engine.run([Request(first, Sampling(10), 1, keep_cached=True)], done.__setitem__)
    second = first + done[1].token_ids + [7, 8, 9]
    saved = engine.statistics.cached_tokens
    engine.run([Request(second, Sampling(10), 2, keep_cached=True)], done.__setitem__)
    assert engine.statistics.cached_tokens - saved == len(first) + 9  # the last token's keys were never needed
    assert done[2].token_ids == generate(decoder, [second], {2}, Sampling(10))[0].token_ids
    changed = [*first[:40], 9, 9]  # another turn of events
    engine.run([Request(changed, Sampling(10), 3)], done.__setitem__)
    assert done[3].token_ids == generate(decoder, [changed], {2}, Sampling(10))[0].token_ids


def test_stop_strings_and_text(decoder, tiny_folder):
    decode = load_tokenizer(tiny_folder).decode_answer
    asked = prompts(6)
    free = answers(decoder, [Request(p, Sampling(30), i) for i, p in enumerate(asked)], {2}, decode=decode)
    stops = tuple({c.text[9:11] for c in free.values()})
    said: dict = {}
    engine, done = Engine(decoder, {2}, EngineOptions(batch_size=3, max_length=400), decode=decode, stream=True), {}

    def hear(event) -> None:
        said[event.id] = said.get(event.id, "") + event.text

    engine.run([Request(p, Sampling(30, stop_strings=stops), i) for i, p in enumerate(asked)], done.__setitem__, hear)
    for i, whole in free.items():
        end = min(whole.text.find(s) for s in stops if s in whole.text)
        assert done[i].text == said[i] == whole.text[:end]
        assert done[i].finish_reason == "stop_string"
        assert not done[i].truncated
        assert done[i].token_ids == whole.token_ids[: len(done[i].token_ids)]
        assert len(done[i].token_ids) < 30


def test_log_probabilities_of_what_was_made(decoder):
    asked = prompts(5)
    got = answers(decoder, [Request(p, Sampling(6, 0.7, logprobs=True), i) for i, p in enumerate(asked)], {2})
    pairs = [(p, got[i].token_ids) for i, p in enumerate(asked) if got[i].token_ids]
    scored = token_log_probabilities(decoder, [(p + a, [False] * len(p) + [True] * len(a)) for p, a in pairs])
    for i, row in enumerate(scored):
        assert got[i].logprobs == pytest.approx(row, abs=1e-4)


def test_one_bad_request_harms_no_other(decoder):
    good = [Request([5, 6], Sampling(4), "a"), Request([7, 8, 9], Sampling(4), "b")]
    wanted = {i: c.token_ids for i, c in answers(decoder, good).items()}
    got = answers(decoder, [good[0], Request([], Sampling(4), "x"), Request([999], Sampling(4), "y"), good[1]])
    assert {i: got[i].token_ids for i in ("a", "b")} == wanted
    assert [got[i].finish_reason for i in "xy"] == ["error", "error"]
    assert "request 'x': the prompt has no tokens" in got["x"].error


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 1.0, "top_k": 5}])
def test_a_model_that_says_not_a_number_is_an_error(tmp_path, how):
    decoder = load_decoder(write_tiny_model(tmp_path, tie_word_embeddings=False))
    with torch.no_grad():
        decoder.embed_tokens.weight[7] = float("nan")
    stop = {-1}
    sampling = Sampling(3, **how)
    good = [Request([5, 6], sampling, i) for i in range(3)]
    wanted = {i: c.token_ids for i, c in answers(decoder, good, stop).items()}
    requests = [Request([5, 7] * 40, sampling, "b"), *good]
    together = answers(decoder, requests, stop)
    got = answers(decoder, requests, stop, batch_size=1)
    assert got["b"].finish_reason == "error"
    assert "not a number" in got["b"].error
    # It harms no neighbour, and what it left in the cache does not reach those who come after it.
    assert {i: got[i].token_ids for i in range(3)} == {i: together[i].token_ids for i in range(3)} == wanted
    assert together["b"].finish_reason == "error"
    assert all(len(ids) == 3 for ids in wanted.values())


def test_a_model_that_ends_up_with_no_number_harms_no_neighbour_and_no_draft(tmp_path):
    folder = write_tiny_model(tmp_path, tie_word_embeddings=False)
    whole, broken = load_decoder(folder), load_decoder(folder)
    long, short = Request(list(range(100, 180)), Sampling(6), "long"), Request([11, 12, 13], Sampling(6), "short")
    asked = [Request([a, a + 1], Sampling(6), a) for a in range(20, 60)]
    alone = answers(whole, [long, short, *asked], {-1})
    said = {*long.prompt, *short.prompt, *alone["long"].token_ids, *alone["short"].token_ids}
    bad = next(r for r in asked if alone[r.id].token_ids[0] not in {*said, *r.prompt})
    with torch.no_grad():
        broken.embed_tokens.weight[alone[bad.id].token_ids[0]] = float("nan")
    got = answers(broken, [long, short, bad], {-1})  # the last row is the one that breaks, when it decodes
    assert got[bad.id].finish_reason == "error"
    assert (got["long"].token_ids, got["short"].token_ids) == (alone["long"].token_ids, alone["short"].token_ids)
    # Drafts from a failed answer would contain, for a prompt that begins like it, the very token that broke it.
    first, wrong = alone["short"].token_ids[0], alone[bad.id].token_ids[0]
    got = answers(broken, [Request([first, wrong] * 2, Sampling(6), "bad"), short], {-1}, batch_size=1)
    assert (got["bad"].finish_reason, got["short"].token_ids) == ("error", alone["short"].token_ids)


def test_prefixes_do_not_evict_each_other(decoder):
    """Three groups with long prefixes, and memory for little more than one request."""
    generator = torch.Generator().manual_seed(0)
    prefixes = torch.randint(3, 290, (3, 600), generator=generator).tolist()
    memory = 41 * BLOCK_SIZE * bytes_per_token(decoder.config, torch.float32)
    engine = Engine(decoder, {-1}, EngineOptions(batch_size=8, kv_memory=memory))
    for i in range(12):
        engine.add(Request([*prefixes[i % 3], 5 + i], Sampling(200), i))
    for _ in range(20):
        engine.step()
    assert engine.statistics.tokens > 10
    assert engine.statistics.prompt_tokens < 3 * 601


def test_requests_that_cannot_be_answered_get_their_errors_at_once(decoder):
    taken = itertools.count()
    engine, seen = Engine(decoder, {2}, EngineOptions(batch_size=2, max_length=64)), []
    engine.run((Request([], Sampling(1), next(taken)) for _ in range(50)), lambda i, _: seen.append((i, next(taken))))
    assert len(seen) == 50
    assert max(now - i for i, now in seen) < 20


def test_an_interrupted_step_leaves_the_decoder_as_it_was(decoder):
    """Ctrl-C somewhere inside a step: the interrupt comes out at once, and another engine answers as ever."""

    def interrupt(*_):
        raise KeyboardInterrupt

    requests = [Request(p, Sampling(9), i) for i, p in enumerate(prompts(12))]
    wanted = answers(decoder, requests)
    before = signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for tenth in range(1, 11):
            signal.setitimer(signal.ITIMER_REAL, 0.002 * tenth)
            try:
                answers(decoder, requests)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
            assert not torch.is_inference_mode_enabled()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 2
    assert answers(decoder, requests) == wanted


def test_mistakes(decoder):
    engine = Engine(decoder, {2}, EngineOptions(batch_size=2, max_length=64, kv_memory=1 << 16))
    for request, told in (
        (Request([], Sampling(1), 3), "request 3: the prompt has no tokens"),
        (
            Request([5] * 2040, Sampling(9), 3),
            "request 3: a prompt of 2040 tokens and 9 new ones exceed the model's 2048",
        ),
        (Request([5, 300], Sampling(9), 3), r"token 300 is outside 0\.\.299"),
        (Request([5, None], Sampling(9), 3), r"token None is outside 0\.\.299"),
        (Request([5] * 300, Sampling(9), 3), r"the engine was made for 2 x 64 tokens \(max_length\)"),
        (Request([5], Sampling(9), 3, "nobody"), "there is no adapter 'nobody'"),
        (Request([5], Sampling(9, stop_strings=("a",)), 3), "stop strings need `decode`"),
    ):
        with pytest.raises(ValueError, match=told):
            engine.add(request)
    engine.add(Request([5], Sampling(1), 3))
    with pytest.raises(ValueError, match="another unfinished request has this id"):
        engine.add(Request([5], Sampling(1), 3))
    assert not engine.cancel("nobody")
    with pytest.raises(ValueError, match="batch_size is 0; it must be at least 1"):
        Engine(decoder, {2}, EngineOptions(batch_size=0))
    with pytest.raises(ValueError, match="max_prefill_tokens is 0; it must be at least 1"):
        Engine(decoder, {2}, EngineOptions(max_prefill_tokens=0))
    with pytest.raises(ValueError, match="kv_memory is 1e-06 GB"):
        Engine(decoder, {2}, EngineOptions(kv_memory=100))
    with pytest.raises(ValueError, match="streaming text needs"):
        Engine(decoder, {2}, stream=True)


def test_the_budget_named_in_a_refusal_is_enough_and_no_less_is(decoder):
    import re

    def need(kv: int) -> None:
        Engine(decoder, {2}, EngineOptions(kv_memory=kv)).check(Request([5] * 300, Sampling(9), 3))

    with pytest.raises(ValueError, match="raise kv_memory") as refused:
        need(1 << 16)
    enough = round(1e9 * float(re.search(r"kv_memory to (\S+) GB", str(refused.value)).group(1)))
    need(enough)
    with pytest.raises(ValueError, match="raise kv_memory"):
        need(enough - 1000)  # it is told in kilobytes, rounded up


@pytest.mark.parametrize("way", ["auto", "reference"])
def test_a_16_bit_model_answers_alike_in_any_company(tmp_path, way, monkeypatch):
    """Copied prefixes, draft tokens, mixed steps: over a KV cache of 16 bits where Numba reads it."""
    monkeypatch.setenv("PTST_KERNELS", way)
    decoder = load_decoder(write_tiny_model(tmp_path), torch.bfloat16)
    common = list(range(3, 3 + BLOCK_SIZE + 9))
    requests = [Request(common + p, Sampling(9), i) for i, p in enumerate(prompts(6))]
    engine = Engine(decoder, STOPS, EngineOptions(batch_size=4, max_length=400))
    wide = way == "reference" or not use_numba(torch.empty(0))
    assert engine.cache.data.dtype == (torch.float32 if wide else torch.bfloat16)
    assert (engine.cache.arrays is None) == wide
    done = {}
    engine.run(requests, done.__setitem__)
    assert engine.statistics.cached_tokens > 0
    alone = {}
    options = EngineOptions(batch_size=1, max_length=400, max_prefill_tokens=17)
    for request in requests:
        Engine(decoder, STOPS, options).run([request], alone.__setitem__)
    assert {i: c.token_ids for i, c in done.items()} == {i: c.token_ids for i, c in alone.items()}
