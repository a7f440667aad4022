"""Decoding on a GPU: tokens per second of the engine, and of a captured step alone, beside what memory allows.

    python benchmarks/decode_step.py --out FILE.json        random weights of Llama-2-7B's and Llama-3-8B's shapes
    python benchmarks/decode_step.py                        without a GPU: a tiny shape, which measures nothing

All requests have one length and run at once. `engine`: steps as `Engine` takes them, with scheduling, sampling and the
copies to the host. `step`: the captured graph replayed by itself. A step must read all weights but the embedding and
the keys and values of every request once; the share is of a large copy's rate in the same run.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.measure import DTYPE, ON_GPU, ceilings, device_is_well, machine, write_json
from benchmarks.train_gpu import random_decoder
from ptst.generation.engine import Engine
from ptst.generation.kv_cache import bytes_per_token
from ptst.generation.request import EngineOptions, Request, Sampling

STEPS, WARM = (100, 10) if ON_GPU else (4, 2)


def bytes_of_a_step(decoder, requests: int, length: float) -> float:
    weights = sum(p.numel() * p.element_size() for p in decoder.parameters())
    if not decoder.config.tie_embeddings:
        weights -= decoder.embed_tokens.weight.numel() * decoder.embed_tokens.weight.element_size()
    return weights + requests * length * bytes_per_token(decoder.config, DTYPE)


def engine_at_work(decoder, requests: int, prompt: int) -> Engine:
    """An engine whose requests have all begun to answer."""
    new = STEPS + WARM + 8
    options = EngineOptions(batch_size=requests, max_length=prompt + new + 8, prefix_caching=False)
    engine = Engine(decoder, [], options)
    generator = torch.Generator().manual_seed(0)
    for i in range(requests):
        ids = torch.randint(0, decoder.config.vocab_size, (prompt,), generator=generator).tolist()
        engine.add(Request(ids, Sampling(new), i))
    while engine._scheduler.waiting or any(not s.num_scheduled_tokens for s in engine._scheduler.running):
        engine.step()
    return engine


def seconds_of(work, times: int) -> float:
    """Wall time a call on a GPU, whose host is part of it; CPU time without one."""
    clock = time.perf_counter if ON_GPU else time.process_time
    if ON_GPU:
        torch.cuda.synchronize()
    start = clock()
    for _ in range(times):
        work()
    if ON_GPU:
        torch.cuda.synchronize()
    return (clock() - start) / times


def measure(decoder, name: str, requests: int, prompt: int, most: dict[str, float]):
    engine = engine_at_work(decoder, requests, prompt)
    for _ in range(WARM):
        engine.step()
    found = {"engine": seconds_of(engine.step, STEPS)}
    moved = bytes_of_a_step(decoder, requests, prompt + WARM + STEPS / 2)
    graphs = engine._runner.graphs
    if graphs is not None and graphs._captured:
        captured = next(c for (size, _), c in graphs._captured.items() if size >= requests)
        found["step"] = seconds_of(captured.graph.replay, STEPS)
    for what, seconds in found.items():
        row = {"model": name, "requests": requests, "prompt": prompt, "what": what, "ms": seconds * 1e3}
        row |= {"tokens_per_second": requests / seconds, "bytes": moved, "gbs": moved / seconds / 1e9}
        yield row | {"share": row["gbs"] / most["gbs"]}


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", nargs="+", default=["Llama-2-7B", "Llama-3-8B"] if ON_GPU else ["tiny"])
    flags.add_argument("--requests", nargs="+", type=int, default=[1, 64, 256] if ON_GPU else [3])
    flags.add_argument("--prompt", type=int, default=256 if ON_GPU else 20)
    flags.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    flags.add_argument("--out", type=Path)
    args = flags.parse_args()
    start, most = time.monotonic(), ceilings()
    told = machine() | {"ceilings": most, "rows": (rows := [])}
    failed = False
    for name in args.only:
        if time.monotonic() - start > args.seconds:
            continue
        decoder = random_decoder(name, 2048)
        for requests in args.requests:
            if time.monotonic() - start > args.seconds:
                continue
            try:
                rows += measure(decoder, name, requests, args.prompt, most)
            except Exception as error:
                failed = True
                rows.append({"model": name, "requests": requests, "error": f"{type(error).__name__}: {error}"[:300]})
            print(rows[-2:], flush=True)
            if args.out:
                write_json(args.out, told)
            if failed and not device_is_well():
                return 3
        del decoder
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
