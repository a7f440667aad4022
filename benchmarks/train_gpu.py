"""Training at 7B and 8B geometry on a GPU: tokens per second, model FLOP utilization, peak memory, beside the peers.

    python benchmarks/train_gpu.py --out benchmarks/results/train_gpu     writes .json and .md as it goes
    python benchmarks/train_gpu.py --only Llama-3-8B --peers              one geometry, peers too
    python benchmarks/train_gpu.py                                        without a GPU: a tiny geometry on the CPU

Random weights made on the device, bfloat16, LoRA r 16 on all linears (float32 adapters), AdamW, one row of --tokens
tokens a step, no activation checkpointing. Rows are one document, or packed (of about 200 tokens, as GSM8K's), with
--trained of the tokens trained. Peers: transformers + PEFT, and the same with Liger-Kernel's functions, where
installed, on one document of equal length (they have no padding to lose here).

FLOPs: two per multiply-add; frozen products forward and the gradient of their input (4 N a token), adapters thrice,
attention at its exact triangle, backward 2.5 times forward, the head on trained rows alone; for the peers
too, so that their MFU counts useful work. MFU is against the rate of a large product measured in the same run.

Ours needs torch, triton, safetensors and numpy alone. Peers run in a child process from another working directory:
the folder `kernels` here has the name of a package on the index.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 16, 32.0
SIZES = {  # hidden, intermediate, layers, heads, kv heads, head_dim, vocabulary, rope theta, window
    "Llama-2-7B": (4096, 11008, 32, 32, 32, 128, 32000, 1e4, None),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128, 128256, 5e5, None),
    "Mistral-7B": (4096, 14336, 32, 32, 8, 128, 32000, 1e4, 4096),
    "tiny": (64, 160, 2, 4, 2, 16, 512, 1e4, None),
}


def layout(tokens: int, packed: bool) -> list[int]:
    """Where documents begin: one document, or documents of 100 to 300 tokens."""
    if not packed:
        return [0, tokens]
    bounds, length = [0], 100
    while bounds[-1] < tokens:
        bounds.append(min(tokens, bounds[-1] + length))
        length = 100 + (length * 7 + 31) % 201
    return bounds


def made(tokens: int, vocabulary: int, trained: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and the rows that are trained, the same on every side."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (tokens,), generator=generator)
    rows = torch.randperm(tokens - 1, generator=generator)[: round(trained * (tokens - 1))].sort().values
    return ids, rows


def timed(step, repeats: int) -> tuple[float, float | None]:
    """(median seconds of a step, peak bytes); on a CPU CPU seconds, and no peak."""
    if not ON_GPU:
        times = []
        for _ in range(repeats + 1):
            start = time.process_time()
            step()
            times.append(time.process_time() - start)
        return sorted(times[1:])[repeats // 2], None
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return sorted(times)[repeats // 2], torch.cuda.max_memory_allocated()


def flops(name: str, bounds: list[int], rows: int) -> float:
    """Useful work of a step, by the rule above."""
    e, f, layers, heads, kv, d, vocabulary, _, window = SIZES[name]
    shapes = ((heads * d, e), (kv * d, e), (kv * d, e), (e, heads * d), (f, e), (f, e), (e, f))
    frozen, adapters = (layers * sum(x) for x in ((o * i for o, i in shapes), (RANK * (o + i) for o, i in shapes)))
    w = window or 1 << 62
    pairs = sum(
        n * (n + 1) // 2 - max(0, n - w) * (max(0, n - w) + 1) // 2 for n in (b - a for a, b in pairwise(bounds))
    )
    attention = 3.5 * 4 * pairs * heads * d * layers
    return (4.0 * frozen + 6.0 * adapters) * bounds[-1] + 4.0 * vocabulary * e * rows + attention


def random_decoder(name: str, positions: int):
    """A frozen decoder of random weights, made on the device."""
    from ptst.model.config import DecoderConfig
    from ptst.model.decoder import Decoder

    e, f, layers, heads, kv, d, vocabulary, theta, window = SIZES[name]
    config = DecoderConfig(vocabulary, e, f, layers, heads, kv, d, 1e-5, theta, None, positions, window, False)
    default = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    with torch.device("meta"):
        decoder = Decoder(config).requires_grad_(False)
    torch.set_default_dtype(default)
    decoder = decoder.to_empty(device=DEVICE)
    for key, p in decoder.named_parameters():
        torch.nn.init.ones_(p) if "norm" in key else torch.nn.init.normal_(p, std=0.02)
    return decoder


def training_step(name: str, tokens: int, trained: float, packed: bool):
    """(the step of a random decoder with adapters, the documents' boundaries, trained rows)."""
    from ptst.kernels.linear_cross_entropy import linear_cross_entropy
    from ptst.model.fold import fold_adapters
    from ptst.model.lora import LoraConfig, add_lora

    decoder, vocabulary = random_decoder(name, tokens), SIZES[name][6]
    parameters = list(add_lora(decoder, LoraConfig(RANK, ALPHA)).values())
    fold_adapters(decoder)
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    bounds = layout(tokens, packed)
    ids, rows = made(tokens, vocabulary, trained)
    targets = torch.full_like(ids, -1)
    targets[rows] = ids[rows + 1]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(bounds)]).to(DEVICE)
    ids, rows, targets = ids.to(DEVICE), rows.to(DEVICE), targets.to(DEVICE)
    divisor = float(len(rows))

    def step() -> None:
        hidden = decoder.documents(ids, bounds, positions)
        linear_cross_entropy(hidden, decoder.head_VE, targets, divisor, trained_N=rows).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, bounds, len(rows)


def ours(name: str, tokens: int, trained: float, packed: bool, repeats: int, profile: Path | None = None) -> dict:
    sys.path.insert(0, str(ROOT))
    step, bounds, rows = training_step(name, tokens, trained, packed)
    seconds, peak = timed(step, repeats)
    told = {"seconds": seconds, "peak_bytes": peak, "flops": flops(name, bounds, rows)}
    return told | (profiled(step, profile) if profile else {})


def profiled(step, path: Path) -> dict:
    """One step under torch's profiler: a table of what took the device's time into a file (of the CPU's, without a
    GPU), and the share of the step in which a GPU computed."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if ON_GPU else [])]
    with profile(activities=activities) as profiler:
        start = time.perf_counter()
        step()
        if ON_GPU:
            torch.cuda.synchronize()
        wall = time.perf_counter() - start
    events = profiler.key_averages()
    by = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    path.write_text(events.table(sort_by=by, row_limit=40, max_name_column_width=70) + "\n")
    busy = sum(e.self_device_time_total for e in events if e.device_type != torch.autograd.DeviceType.CPU) / 1e6
    return {"profiled_seconds": wall, "busy": busy / wall if ON_GPU else None}


def peer(name: str, tokens: int, trained: float, repeats: int, liger: bool) -> dict:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

    e, f, layers, heads, kv, d, vocabulary, theta, window = SIZES[name]
    shape = dict(  # noqa: C408
        hidden_size=e, intermediate_size=f, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=d, vocab_size=vocabulary, rope_theta=theta, max_position_embeddings=tokens,
        tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    config = MistralConfig(**shape, sliding_window=window) if window else LlamaConfig(**shape)
    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama, apply_liger_kernel_to_mistral

        (apply_liger_kernel_to_mistral if window else apply_liger_kernel_to_llama)()
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPE, attn_implementation="sdpa")
    adapter = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, lora_dropout=0.0, task_type="CAUSAL_LM")
    model = get_peft_model(model, adapter).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.0, fused=True)
    ids, rows = made(tokens, vocabulary, trained)
    labels = torch.full_like(ids, -100)
    labels[rows + 1] = ids[rows + 1]
    ids, labels = ids[None].to(DEVICE), labels[None].to(DEVICE)

    def step() -> None:
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds, peak = timed(step, repeats)
    return {"seconds": seconds, "peak_bytes": peak, "flops": flops(name, [0, tokens], len(rows))}


def child(arguments: list[str]) -> dict:
    """One measurement in a process of its own, so that memory is clean; an error is a result too."""
    with tempfile.TemporaryDirectory() as elsewhere:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", *arguments]
        done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def table(told: dict) -> str:
    lines = [f"{told['machine']['device']}, a product reaches {told['ceiling']:.1f} TFLOP/s", ""]
    lines += ["| model | row | who | tokens/s | TFLOP/s | MFU | peak GB |", "|" + "---|" * 7]
    for r in told["rows"]:
        start = f"| {r['model']} | {r['row']} | {r['who']} |"
        if "error" in r:
            lines.append(f"{start} {r['error'].replace('|', '/')} | | | |")
            continue
        rate = f"{r['tokens_per_second']:.0f} | {r['tflops']:.3g} | {r['mfu']:.1%}"
        peak = "" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 1e9:.1f}"
        lines.append(f"{start} {rate} | {peak} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [n for n in SIZES if (n != "tiny") == ON_GPU]
    flags.add_argument("--only", nargs="+", choices=list(SIZES), default=names)
    flags.add_argument("--tokens", type=int, default=4096 if ON_GPU else 256, help="of a row")
    flags.add_argument("--trained", type=float, default=0.6, help="share of the tokens that are trained")
    flags.add_argument("--repeats", type=int, default=10 if ON_GPU else 3)
    flags.add_argument("--peers", action="store_true", help="measure transformers + PEFT, and Liger, too")
    flags.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after so long")
    flags.add_argument("--out", type=Path, help="where to write .json and .md, without an ending")
    flags.add_argument("--child", nargs=2, metavar=("WHO", "MODEL"), help=argparse.SUPPRESS)
    flags.add_argument("--packed", action="store_true", help=argparse.SUPPRESS)
    flags.add_argument(
        "--profile", type=Path, help="profile one step of ours, one table a case: FILE-<model>-<row>.txt"
    )
    args = flags.parse_args()
    if args.child:
        who, name = args.child
        if who == "ptst":
            print(json.dumps(ours(name, args.tokens, args.trained, args.packed, args.repeats, args.profile)))
        else:
            print(json.dumps(peer(name, args.tokens, args.trained, args.repeats, who.endswith("Liger"))))
        return

    sys.path.insert(0, str(ROOT))
    from benchmarks.measure import ceilings, machine, write_json

    start = time.monotonic()
    told: dict = {"machine": machine(), "ceiling": ceilings()["tflops"], "rows": [], "left_out": []}
    print(told["machine"], f"{told['ceiling']:.1f} TFLOP/s", flush=True)
    if ON_GPU:
        torch.cuda.empty_cache()  # the children need the memory
    cases = [("ptst", False), ("ptst", True)]
    if args.peers:
        cases.append(("transformers + PEFT", False))
        cases += [("transformers + PEFT + Liger", False)] if importlib.util.find_spec("liger_kernel") else []
    for name in args.only:
        for who, packed in cases:
            case = {"model": name, "row": f"{args.tokens}{' packed' if packed else ''}", "who": who}
            if time.monotonic() - start > args.seconds:
                told["left_out"].append(case)
                continue
            given = [who, name, "--tokens", str(args.tokens), "--trained", str(args.trained)]
            if args.profile and who == "ptst":
                given += ["--profile", f"{args.profile.resolve()}-{name}-{case['row'].replace(' ', '-')}.txt"]
            row = case | child([*given, "--repeats", str(args.repeats), *(["--packed"] if packed else [])])
            if "error" not in row:
                row["tokens_per_second"] = args.tokens / row["seconds"]
                row["tflops"] = row["flops"] / row["seconds"] / 1e12
                row["mfu"] = row["tflops"] / told["ceiling"]
            told["rows"].append(row)
            print(row, flush=True)
            if args.out:
                write_json(args.out.with_suffix(".json"), told)
                args.out.with_suffix(".md").write_text(table(told))
    print(table(told))


if __name__ == "__main__":
    main()
