"""Each Triton kernel alone: time of a launch from a captured graph, without the host and without what surrounds it.

    python benchmarks/kernels_alone.py --out FILE.json            all, row by row into FILE.json
    python benchmarks/kernels_alone.py --only attention decode    some
    python benchmarks/kernels_alone.py --once [--small]           every launch once, for compute-sanitizer and ncu
    python benchmarks/kernels_alone.py --once --jobs 12           compiles all of them at once

An operation is run once and its launches are noted; each is then repeated by itself, over several copies of its
operands where these would fit into the L2 cache. Rates count the work of kernels/README.md: attention's pairs at the
exact triangle, the least bytes elsewhere; shares are of a large product and a large copy in the same run. Without a
GPU: tiny shapes in Triton's interpreter, which shows that the script works and measures nothing.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"  # read when Triton is first imported
os.environ["PTST_KERNELS"] = "triton"

from torch import Tensor

from benchmarks.measure import DEVICE, ON_GPU, ceilings, device_is_well, graph_milliseconds, machine, write_json
from ptst.kernels import linear_cross_entropy as loss_file
from ptst.kernels.attention import packed_attention
from ptst.kernels.attention_decode import decode_attention
from ptst.kernels.attention_prefill import chunks_of, prefill_attention
from ptst.kernels.lora import Projections, lora_group
from ptst.kernels.rms_norm import add_rms_norm, rms_norm
from ptst.kernels.rope import apply_rope, frequencies, tables
from ptst.kernels.swiglu import swiglu

HALF = torch.bfloat16 if ON_GPU else torch.float32
L2_BYTES = 256 << 20  # more than any GPU's L2 cache: operands of a case, all copies together
# FLOPs of attention's kernels in units of P H D, P pairs (kernels/README.md): the backward pass counts as 10, scores
# and dP once, but each of its kernels has the products that it does.
ATTENTION = {"forward": 4, "dq": 6, "dkdv": 8}


@dataclass
class Case:
    """`make()` returns an operation on new operands, forward or backward. `flops`, `bytes`: of the operation, which the
    sum of its launches must move; `of_launch`: FLOPs of single launches, by the kernel's name."""

    kernel: str
    shape: str
    make: Callable[[], Callable[[], object]]
    flops: float = 0.0
    bytes: float = 0.0
    of_launch: dict[str, float] = field(default_factory=dict)
    whole: bool = False  # timed with all that it does, torch's products too


def made(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=HALF) * scale


def backward(function: Callable[..., object], *leaves: Tensor) -> Callable[[], object]:
    """The backward pass of a function, whose forward pass is over."""
    inputs = [x.detach().requires_grad_() for x in leaves]
    outs = function(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    given = [torch.randn_like(o) for o in outs]
    return lambda: torch.autograd.grad(outs, inputs, given, retain_graph=True, allow_unused=True)


def attention(small: bool) -> Iterator[Case]:
    sizes = {"Llama-2-7B": (32, 32, 128, None), "Llama-3-8B": (32, 8, 128, None), "Mistral-7B": (32, 8, 128, 4096)}
    sizes["SmolLM2-135M"] = (9, 3, 64, None)
    lengths = (4096, 8192, 16384)
    if small:
        sizes, lengths = {"tiny": (2, 1, 16, None), "tiny window": (2, 1, 16, 20)}, (40,)
    for name, (H, K, D, window) in sizes.items():
        for T in lengths:
            if (window or 0) >= T:
                continue
            cut = max(0, T - (window or T))
            units = (T * (T + 1) - cut * (cut + 1)) // 2 * H * D

            def forward_of(H=H, K=K, D=D, T=T, window=window):
                q, k, v = made(T, H, D), made(T, K, D), made(T, K, D)
                return lambda: packed_attention(q, k, v, [0, T], window=window)

            def backward_of(H=H, K=K, D=D, T=T, window=window):
                return backward(
                    lambda q, k, v: packed_attention(q, k, v, [0, T], window=window),
                    *(made(T, n, D) for n in (H, K, K)),
                )

            each = {name: float(n * units) for name, n in ATTENTION.items()}
            yield Case("attention forward", f"{name} T={T}", forward_of, 4.0 * units, of_launch=each)
            yield Case("attention backward", f"{name} T={T}", backward_of, 10.0 * units, of_launch=each)


def thin(small: bool) -> Iterator[Case]:
    """Norm, rotary embedding, SwiGLU and LoRA's low-rank kernels at Llama-3-8B's widths."""
    T, H, F, Q, K, D = (5, 40, 72, 4, 2, 16) if small else (8192, 4096, 14336, 32, 8, 128)
    size = HALF.itemsize
    w = made(H)
    n = T * H * size
    shape = f"{T} x {H}"

    def of(function, *shapes):
        return lambda: (lambda xs: lambda: function(*xs))([made(*s) for s in shapes])

    def back(function, *shapes):
        return lambda: backward(function, *(made(*s) for s in shapes))

    def norm(x):
        return rms_norm(x, w, 1e-5)

    def add_norm(x, r):
        return add_rms_norm(x, r, w, 1e-5)

    yield Case("rms_norm forward", shape, of(norm, (T, H)), bytes=2.0 * n)
    yield Case("rms_norm backward", shape, back(norm, (T, H)), bytes=3.0 * n)
    yield Case("rms_norm backward, dw", shape, back(lambda x, w: rms_norm(x, w, 1e-5), (T, H), (H,)), bytes=3.0 * n)
    yield Case("add_rms_norm forward", shape, of(add_norm, (T, H), (T, H)), bytes=4.0 * n)
    yield Case("add_rms_norm backward", shape, back(add_norm, (T, H), (T, H)), bytes=4.0 * n)
    n = T * F * size
    yield Case("swiglu forward", f"{T} x {F}", of(swiglu, (T, F), (T, F)), bytes=3.0 * n)
    yield Case("swiglu backward", f"{T} x {F}", back(swiglu, (T, F), (T, F)), bytes=5.0 * n)
    both = of(lambda d, g, u: torch.ops.ptst.swiglu_backward(d, g, u, True), *[(T, F)] * 3)
    yield Case("swiglu backward and h", f"{T} x {F}", both, bytes=6.0 * n)
    cos, sin = tables(torch.arange(T, device=DEVICE), frequencies(D, 1e4).to(DEVICE))
    rotated = of(lambda q, k: apply_rope(q, k, cos, sin), (T, Q, D), (T, K, D))
    yield Case("rope", f"{T} x ({Q} + {K}) x {D}", rotated, bytes=2.0 * T * (Q + K) * D * size)
    weights = [made(o, H, scale=H**-0.5) for o in (H, H // 4, H // 4)]
    flat = [torch.randn(s, device=DEVICE) * 0.02 for o in (H, H // 4, H // 4) for s in ((16, H), (o, 16))]

    def lora(x, *flat):
        return lora_group(x, weights, Projections.from_flat(weights, flat, 2.0).adapters, 2.0)

    def lora_backward():
        return backward(lora, made(T, H), *flat)

    yield Case("lora forward", f"q|k|v T={T} r=16", lambda: (lambda x: lambda: lora(x, *flat))(made(T, H)))
    yield Case("lora backward", f"q|k|v T={T} r=16", lora_backward)


def loss(small: bool) -> Iterator[Case]:
    """The whole loss with its products, in chunks as chosen and as they were before (1,046 rows for 128,256 tokens);
    head frozen and trained."""
    sizes = {"tiny": (5, 8, 50)} if small else {"Llama-3-8B": (8192, 4096, 128256), "Llama-2-7B": (8192, 4096, 32000)}
    for name, (T, H, V) in sizes.items():
        targets = torch.randint(0, V, (T,), device=DEVICE)
        rows = torch.arange(T, device=DEVICE)
        for label, chunk, trained in (("", None, False), (", 1046 rows", 1046, False), (", head trained", None, True)):
            if chunk and V < 100_000:
                continue

            def make(T=T, H=H, V=V, chunk=chunk, trained=trained, targets=targets, rows=rows):
                h, e = made(T, H).requires_grad_(), made(V, H, scale=0.05).requires_grad_(trained)

                def work():
                    kept = loss_file._chunk
                    loss_file._chunk = (lambda *_: chunk) if chunk else kept
                    try:
                        return loss_file.linear_cross_entropy(h, e, targets, float(T), trained_N=rows)
                    finally:
                        loss_file._chunk = kept

                return work

            flops = (6.0 if trained else 4.0) * T * H * V
            yield Case(f"loss{label}", f"{name} T={T}", make, flops, whole=True)
    T, V = (5, 50) if small else (2048, 128256)

    def softmax():
        logits, targets = made(T, V), torch.randint(0, V, (T,), device=DEVICE)
        return lambda: loss_file._losses(logits, targets, None, True, 0.75)

    yield Case("softmax_gradient", f"{T} x {V}", softmax, bytes=3.0 * T * V * HALF.itemsize)


def decode(small: bool) -> Iterator[Case]:
    """As the engine has it: blocks of 32 tokens, heads first in memory, int32."""
    sizes = {"Llama-2-7B": (32, 32, 128), "Llama-3-8B": (32, 8, 128)}
    amounts = [(1, 4096), (16, 4096), (64, 4096), (256, 1024), (256, 400)]
    if small:
        sizes, amounts = {"tiny": (4, 2, 16)}, [(3, 70)]
    P = 32
    for name, (H, K, D) in sizes.items():
        for R, L in amounts:

            def make(H=H, K=K, D=D, R=R, L=L):
                blocks = -(-L // P)
                q = made(R, H, D)
                k, v = (made(R * blocks, K, P, D).transpose(1, 2) for _ in range(2))
                table = torch.randperm(R * blocks, device=DEVICE).view(R, blocks).int()
                lengths = torch.full((R,), L, device=DEVICE, dtype=torch.int32)
                return lambda: decode_attention(q, k, v, lengths, longest=L, table_RN=table)

            yield Case("decode", f"{name} {R} x {L}", make, bytes=2.0 * R * L * K * D * HALF.itemsize)


def prefill(small: bool) -> Iterator[Case]:
    """Over pages of 32 tokens, heads first: a whole prompt, a chunk of one, and short continuations of many, which are
    a matter of bytes."""
    sizes = {"Llama-2-7B": (32, 32, 128), "Llama-3-8B": (32, 8, 128)}
    amounts = [(1, 4096, 4096), (1, 1024, 8192), (64, 16, 528)]
    if small:
        sizes, amounts = {"tiny": (4, 2, 16)}, [(2, 20, 50)]
    P = 32
    for name, (H, K, D) in sizes.items():
        for R, n, L in amounts:

            def make(H=H, K=K, D=D, R=R, n=n, L=L):
                q, pages = made(R * n, H, D), -(-L // P)
                k, v = (made(R * pages, K, P, D).transpose(1, 2) for _ in range(2))
                table = torch.randperm(R * pages, device=DEVICE).view(R, pages).int()
                chunks = chunks_of([(n, L)] * R, H // K, D, HALF, q.device)
                return lambda: prefill_attention(q, k, v, chunks, table_RN=table)

            flops = 4.0 * R * (n * (L - n) + n * (n + 1) // 2) * H * D
            moved = 2.0 * R * (L * K + n * H) * D * HALF.itemsize
            work = {"bytes": moved} if R > 2 else {"flops": flops, "of_launch": {"prefill": flops}}
            yield Case("prefill", f"{name} {R} x {n} of {L}", make, **work)


KINDS = {"attention": attention, "thin": thin, "loss": loss, "decode": decode, "prefill": prefill}


def launches(work: Callable[[], object]) -> list[tuple[str, Callable[[], object]]]:
    """(kernel, the launch again) for each Triton launch of an operation, which runs once."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    owner = JITFunction if ON_GPU else InterpretedFunction
    run, found = owner.run, []

    def noted(self, *args, **named):
        found.append((self.__name__.lstrip("_"), lambda: run(self, *args, **named)))
        return run(self, *args, **named)

    owner.run = noted
    try:
        work()
    finally:
        owner.run = run
    return found


def rows_of(case: Case, most: dict[str, float]) -> Iterator[dict[str, object]]:
    """A row for each launch, and one for all of them; of an operation that is timed whole, one."""
    named = {"kernel": case.kernel, "shape": case.shape}
    copies = 1 + int(L2_BYTES // case.bytes) if case.bytes and ON_GPU else 1
    works = [case.make() for _ in range(min(copies, 64))]
    if case.whole:
        ms = graph_milliseconds(works[0])
        yield {**named, "launch": "whole", "ms": ms, **rates(case.flops, case.bytes, ms, most)}
        return
    repeated = [launches(work) for work in works]
    total = 0.0
    for place, (name, _) in enumerate(repeated[0]):
        again = [found[place][1] for found in repeated]
        ms = graph_milliseconds(lambda again=again: [f() for f in again]) / len(again)
        total += ms
        yield {**named, "launch": name, "ms": ms, **rates(case.of_launch.get(name, 0.0), 0.0, ms, most)}
    yield {**named, "launch": "all", "ms": total, **rates(case.flops, case.bytes, total, most)}


def rates(flops: float, moved: float, ms: float, most: dict[str, float]) -> dict[str, float]:
    found: dict[str, float] = {}
    for unit, amount in (("tflops", flops / 1e9), ("gbs", moved / 1e6)):
        if amount and ms:
            found[unit] = amount / ms
            found["share"] = found[unit] / most[unit]
    return found


def once(kinds: list[str], small: bool, share: int, of: int) -> int:
    """Run every case once, or every `of`-th; returns how many failed."""
    failed, number = 0, 0
    for kind in kinds:
        for case in KINDS[kind](small):
            number += 1
            if number % of != share:
                continue
            try:
                case.make()()
                if ON_GPU:
                    torch.cuda.synchronize()
            except Exception as error:
                failed += 1
                print(f"{case.kernel} {case.shape}: {type(error).__name__}: {str(error)[:300]}", flush=True)
                if not device_is_well():
                    break
    return failed


def in_parallel(arguments: list[str], jobs: int) -> int:
    """The same command in so many processes, each with its share; the worst exit code."""
    line = [sys.executable, str(Path(__file__).resolve()), *arguments]
    running = [subprocess.Popen([*line, "--share", str(i), str(jobs)]) for i in range(jobs)]
    return max(process.wait() for process in running)


def main() -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    flags.add_argument("--out", type=Path)
    flags.add_argument("--seconds", type=float, default=float("inf"), help="begin no new case after so long")
    flags.add_argument("--once", action="store_true")
    flags.add_argument("--small", action="store_true", help="tiny shapes, as without a GPU")
    flags.add_argument("--jobs", type=int, default=1, help="processes, with --once")
    flags.add_argument("--share", type=int, nargs=2, default=(0, 1), help=argparse.SUPPRESS)
    args = flags.parse_args()
    small = args.small or not ON_GPU
    if args.once and args.jobs > 1:
        return in_parallel(["--only", *args.only, "--once", *(["--small"] if small else [])], args.jobs)
    torch.manual_seed(0)
    if not ON_GPU:
        from tests.kernels import interpreter

        interpreter.install()
    if args.once:
        return int(once(args.only, small, *args.share) > 0)
    start, most = time.monotonic(), ceilings()
    told = machine() | {"ceilings": most, "rows": (rows := []), "left_out": (left_out := [])}
    failed = False
    for kind in args.only:
        for case in KINDS[kind](small):
            if time.monotonic() - start > args.seconds:
                left_out.append(f"{case.kernel} {case.shape}")
                continue
            try:
                for row in rows_of(case, most):
                    rows.append(row)
                    print(row, flush=True)
            except Exception as error:
                failed = True
                said = f"{type(error).__name__}: {str(error)[:300]}"
                rows.append({"kernel": case.kernel, "shape": case.shape, "error": said})
                print(rows[-1], flush=True)
            if args.out:
                write_json(args.out, told)
            if failed and not device_is_well():
                print("the device is lost: whatever ran after this would fail too", flush=True)
                return 3
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
