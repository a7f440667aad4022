"""Training on a CPU beside transformers + PEFT: real tokens per CPU-second, and peak memory.

    python benchmarks/train_cpu.py                            built-in word problems
    python benchmarks/train_cpu.py --data train.jsonl         GSM8K (or any file with question and answer columns)
    python benchmarks/train_cpu.py --out results/train_cpu.json

SmolLM2-135M, LoRA r 16, alpha 32 on all seven linears, AdamW, gradients clipped at 1. Both train the same examples
under the same template, step for step. Ours packs whole examples into micro-batches of --micro-batch-tokens and
computes a prefix that they share once; the peer takes --peer-rows examples at once, padded to the longest of them (8 is
transformers' default), labels -100 on prompt and pads, sdpa attention, in whichever of float32 and bfloat16 is faster
here. Runs alternate, each in a child process of its own whose CPU time (user and system) over the measured steps and
whose peak resident memory are read from the kernel; CPU time does not count what other processes take. All tokens of
the examples are counted, pads are not. The floor is the time that the step's products alone would take at the rate of
a large product, measured in the same child.

The peer runs from another working directory: the folder `kernels` here has the name of a package on the index.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, LR, CLIP = 16, 32.0, 1e-4, 1.0
Example = list[list[int]]  # [token ids, one trained-or-not flag each]


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def trained(example: Example) -> int:
    return sum(example[1][1:])


def measure(step, groups: list[list[Example]]) -> dict:
    """Losses and CPU seconds of every step; the first one warms up and is not among the measured."""
    losses, times = [], []
    for group in groups:
        start = cpu_seconds()
        losses.append(step(group))
        times.append(cpu_seconds() - start)
    tokens = sum(len(ids) for group in groups[1:] for ids, _ in group)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"losses": losses, "seconds": sum(times[1:]), "tokens": tokens, "peak_bytes": peak}


def product_rate() -> float:
    """FLOP per CPU-second of a product of the feed-forward's shape."""
    import torch

    x, w = torch.randn(2048, 576), torch.randn(1536, 576)
    y = torch.empty(2048, 1536)
    times = []
    for _ in range(8):
        start = time.process_time()
        torch.mm(x, w.t(), out=y)
        times.append(time.process_time() - start)
    return 2 * 2048 * 576 * 1536 / statistics.median(times[1:])


def ours(spec: dict) -> dict:
    import torch

    sys.path.insert(0, str(ROOT))
    from ptst.data.packing import share_prefixes, to_batch
    from ptst.model.lora import LoraConfig, add_lora
    from ptst.model.loss import batch_loss
    from ptst.model.weights import load_decoder
    from ptst.text.encode import Example

    decoder = load_decoder(Path(spec["model"]))
    parameters = list(add_lora(decoder, LoraConfig(RANK, ALPHA)).values())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    computed = []

    def step(group: list[Example]) -> float:
        divisor, total = sum(map(trained, group)), 0.0
        computed.append(0)
        for row in rows(group, spec["micro_batch_tokens"]):
            batch = share_prefixes(to_batch([Example(ids, [bool(f) for f in flags]) for ids, flags in row]))
            loss = batch_loss(decoder, batch, divisor)
            loss.backward()
            total += float(loss.detach())
            computed[-1] += len(batch.tokens)
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    rates = [product_rate()]
    told = measure(step, spec["groups"])
    rates.append(product_rate())
    measured = [e for group in spec["groups"][1:] for e in group]
    flops = step_flops(decoder, parameters, measured, sum(computed[1:]))
    told["computed"] = sum(computed[1:]) / told["tokens"]
    return told | {"flops": flops, "rate": statistics.mean(rates), "floor": flops / statistics.mean(rates)}


def step_flops(decoder, parameters, examples: list[Example], tokens: int) -> float:
    """Products of forward and backward on so many computed tokens: frozen weights twice, the head on trained rows,
    adapters three times, attention at its exact triangle with the backward pass at 2.5 times the forward one."""
    c = decoder.config
    frozen = sum(p.numel() for n, p in decoder.named_parameters() if ".layers." in f".{n}" and p.dim() == 2)
    adapters = sum(p.numel() for p in parameters)
    pairs = sum(len(ids) * (len(ids) + 1) // 2 for ids, _ in examples)
    attention = 3.5 * 4 * pairs * c.num_heads * c.head_dim * c.num_layers
    head = 4 * decoder.head_VE.numel() * sum(map(trained, examples))
    return 4.0 * (frozen - adapters) * tokens + 6.0 * adapters * tokens + attention + head


def rows(group: list[Example], micro_batch_tokens: int) -> list[list[Example]]:
    """Whole examples in rows of at most so many tokens, first fit, longest first."""
    filled: list[list[Example]] = []
    for example in sorted(group, key=lambda e: -len(e[0])):
        room = (r for r in filled if sum(len(i) for i, _ in r) + len(example[0]) <= micro_batch_tokens)
        place = next(room, None)
        if place is None:
            filled.append(place := [])
        place.append(example)
    return filled


def peer(spec: dict) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, spec["dtype"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, attn_implementation="sdpa")
    model.config.use_cache = False
    model = get_peft_model(
        model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    ).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)

    def step(group: list[Example]) -> float:
        divisor, total = sum(map(trained, group)), 0.0
        for start in range(0, len(group), spec["peer_rows"]):
            part = group[start : start + spec["peer_rows"]]
            longest = max(len(ids) for ids, _ in part)
            tokens = torch.zeros(len(part), longest, dtype=torch.long)
            labels, mask = torch.full_like(tokens, -100), torch.zeros_like(tokens)
            for i, (ids, flags) in enumerate(part):
                tokens[i, : len(ids)], mask[i, : len(ids)] = torch.tensor(ids), 1
                labels[i, : len(ids)] = torch.tensor([t if f else -100 for t, f in zip(ids, flags, strict=True)])
            # transformers takes the mean over the batch; this makes it the batch's share of the step's.
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
            loss = loss * (sum(map(trained, part)) / divisor)
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total

    return measure(step, spec["groups"])


def child(which: str, spec: dict, threads: int) -> dict:
    """Run one side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec))
        command = [sys.executable, str(Path(__file__).resolve()), "--child", which, "--spec", str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment |= {"TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the child process of {which} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def encoded(model: Path, data: str, template: str, count: int, seed: int) -> list[Example]:
    """Examples of a source under a template, in a seeded order."""
    from ptst.data import sources
    from ptst.data.examples import prepare
    from ptst.model.config import DecoderConfig
    from ptst.text.detect import detect_format
    from ptst.text.prompt_format import PromptFormat
    from ptst.text.templates import find_family, find_template
    from ptst.text.tokenizer import load_tokenizer

    shape = DecoderConfig.from_folder(model)
    tokenizer = load_tokenizer(model, shape.vocab_size)
    source = sources.load(data, "train")
    prompt_format = PromptFormat(
        find_template(template), find_family("gsm8k"), detect_format(model, tokenizer), tokenizer
    )
    examples, _ = prepare(source, prompt_format, shape.max_positions, "drop", "all")
    if len(examples) < count:
        raise SystemExit(f"{data} has {len(examples)} examples; {count} are needed")
    return [[e.ids, [int(f) for f in e.loss_mask]] for e in random.Random(seed).sample(examples, count)]


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", type=Path, default=ROOT / "checkpoints" / "smollm2-135m-instruct")
    flags.add_argument("--data", default="word-problems:800", help="a source as ptst.train's --data")
    flags.add_argument("--template", default="chat:vanilla", help="chat:llama: all begin with one system prompt")
    flags.add_argument("--examples", type=int, default=16, help="examples of an optimizer step")
    flags.add_argument("--steps", type=int, default=2, help="measured steps of a run, after one that warms up")
    flags.add_argument("--rounds", type=int, default=3, help="runs of each side, alternating")
    flags.add_argument("--micro-batch-tokens", type=int, default=2048)
    flags.add_argument("--peer-rows", type=int, default=8)
    flags.add_argument("--peer-dtype", choices=("best", "float32", "bfloat16"), default="best")
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--out", type=Path, help="JSON file for the results, rewritten after every pair")
    flags.add_argument("--child", choices=("ours", "peer"), help=argparse.SUPPRESS)
    flags.add_argument("--spec", type=Path, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.child:
        spec = json.loads(args.spec.read_text())
        print(json.dumps(ours(spec) if args.child == "ours" else peer(spec)))
        return

    sys.path.insert(0, str(ROOT))
    from benchmarks.measure import machine, write_json

    n = args.examples
    examples = encoded(args.model.resolve(), args.data, args.template, n * (args.steps + 1), args.seed)
    groups = [examples[i : i + n] for i in range(0, len(examples), n)]
    base = {
        "model": str(args.model.resolve()),
        "micro_batch_tokens": args.micro_batch_tokens,
        "peer_rows": args.peer_rows,
    }
    result: dict = {"machine": machine(), "settings": {k: str(v) for k, v in vars(args).items()}}
    dtype = args.peer_dtype
    if dtype == "best":
        short = [[[ids[:96], flags[:96]] for ids, flags in groups[0][:2]]] * 2
        trial = {d: child("peer", base | {"groups": short, "dtype": d}, args.threads) for d in ("float32", "bfloat16")}
        result["peer_dtypes"] = {d: t["tokens"] / t["seconds"] for d, t in trial.items()}
        dtype = max(result["peer_dtypes"], key=result["peer_dtypes"].get)
        print("peer, real tokens per CPU-second of a short trial:", result["peer_dtypes"], "->", dtype, flush=True)
    tokens = [len(ids) for ids, _ in examples]
    padded = sum(
        len(part) * max(len(ids) for ids, _ in part)
        for group in groups
        for part in (group[i : i + args.peer_rows] for i in range(0, n, args.peer_rows))
    )
    share = sum(map(trained, examples)) / sum(tokens)
    print(
        f"{args.data} under {args.template}: {statistics.mean(tokens):.0f} tokens a row, {share:.0%} of them trained; "
        f"the peer's batches are {1 - sum(tokens) / padded:.0%} padding; {args.threads} thread(s)"
    )
    result |= {"padding": 1 - sum(tokens) / padded, "trained_share": share, "peer_dtype": dtype, "pairs": []}
    spec = base | {"groups": groups, "dtype": dtype}
    for number in range(args.rounds):
        a, b = child("ours", spec, args.threads), child("peer", spec, args.threads)
        pair = {"ours": a, "peer": b, "speed": a["tokens"] / a["seconds"] / (b["tokens"] / b["seconds"])}
        pair |= {"memory": a["peak_bytes"] / b["peak_bytes"], "loss_gap": abs(a["losses"][0] - b["losses"][0])}
        result["pairs"].append(pair)
        print(
            f"pair {number + 1}: ours {a['tokens'] / a['seconds']:.1f}, peer {b['tokens'] / b['seconds']:.1f} tokens "
            f"per CPU-second, {pair['speed']:.2f} x; peak {a['peak_bytes'] / 1e9:.2f} and {b['peak_bytes'] / 1e9:.2f} "
            f"GB, {pair['memory']:.2f} x; the products alone are {a['floor'] / a['seconds']:.0%} of our time "
            f"(at {a['rate'] / 1e9:.0f} GFLOP/s); losses {a['losses']} and {b['losses']}",
            flush=True,
        )
        if args.out:
            write_json(args.out, result)
        if pair["loss_gap"] > 1e-3 and dtype == "float32":
            raise SystemExit("the first losses differ: the two do not train the same thing, so no speed is compared")
    print("speed, min / median / max:", spread([p["speed"] for p in result["pairs"]]))
    print("peak memory, min / median / max:", spread([p["memory"] for p in result["pairs"]]))


if __name__ == "__main__":
    main()
