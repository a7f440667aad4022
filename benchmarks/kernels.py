"""Every kernel beside its peers: time, rate, share of this machine's ceiling, extra memory.

    python benchmarks/kernels.py                                  all, at small shapes where there is no GPU
    python benchmarks/kernels.py --only attention loss            some
    python benchmarks/kernels.py --out benchmarks/results/NAME    writes NAME.json, NAME.md and NAME.png as it goes

Peers: eager torch, torch.compile, torch's scaled_dot_product_attention (flash, cuDNN) and varlen_attn, Liger-Kernel and
cut-cross-entropy where they are installed. A peer that cannot do a case is written down with its reason.

`forward` is the call alone, `both` forward and backward, `backward` the latter alone (kernels_alone.py has the single
launches). FLOPs of attention count the pairs that causality, window and documents leave; those of the loss count
trained rows only; bytes are the least that must move.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.measure import (
    DEVICE,
    DTYPE,
    ON_GPU,
    ceilings,
    device_is_well,
    extra_megabytes,
    machine,
    milliseconds,
    write_json,
)
from ptst.kernels.attention import causal_mask, packed_attention
from ptst.kernels.attention_decode import decode_attention
from ptst.kernels.linear_cross_entropy import linear_cross_entropy
from ptst.kernels.lora import lora_group
from ptst.kernels.rms_norm import add_rms_norm, rms_norm
from ptst.kernels.rope import apply_rope, frequencies, tables
from ptst.kernels.swiglu import swiglu

Provider = Callable[..., object]


@dataclass
class Case:
    """One operation at one shape. `leaves` get gradients; `flops` and `bytes` are of the forward pass and of both."""

    kernel: str
    shape: str
    leaves: list[Tensor]
    providers: dict[str, Provider]
    flops: tuple[float, float] | None = None
    bytes: tuple[float, float] | None = None
    backward: bool = True


def made(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE).mul_(scale).requires_grad_()


def peer(module: str, name: str) -> Provider | None:
    """A function of a library, or None where the library is not installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return None


def pairs(bounds: list[int], window: int | None) -> int:
    """(query, key) pairs that causality, documents and the window leave."""

    def triangle(n: int) -> int:
        return n * (n + 1) // 2

    lengths = [b - a for a, b in pairwise(bounds)]
    return sum(triangle(n) - (triangle(max(0, n - window)) if window else 0) for n in lengths)


def sdpa(q: Tensor, k: Tensor, v: Tensor, backend: object) -> Tensor:
    """torch's fused attention over one whole document."""
    from torch.nn.attention import sdpa_kernel

    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    with sdpa_kernel(backend):
        return functional.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Attention over one document with all its scores in memory."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[2] ** -0.5
    scores = scores.masked_fill(~causal_mask(len(q), len(q), window, q.device), float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v)


def attention() -> Iterator[Case]:
    from torch.nn.attention import SDPBackend

    varlen = peer("torch.nn.attention.varlen", "varlen_attn") if ON_GPU else None
    backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION}
    geometries = {"SmolLM2-135M": (9, 3, 64, None), "window": (9, 3, 64, 128)}
    lengths: tuple[int, ...] = (512,)
    if ON_GPU:
        backends["sdpa cuDNN"] = SDPBackend.CUDNN_ATTENTION
        geometries = {"Llama-2-7B": (32, 32, 128, None), "Llama-3-8B": (32, 8, 128, None)}
        geometries["Mistral-7B"] = (32, 8, 128, 4096)
        lengths = (4096, 8192, 16384, 512, 1024, 2048)
    for name, (H, K, D, window) in geometries.items():
        for T in lengths:
            for documents in (1, 8) if T in (lengths[0], 16384) else (1,):
                # Unequal documents, as examples are.
                cuts = sorted({round(T * (i / documents) ** 1.5) for i in range(documents + 1)})
                leaves = [made(T, n, D) for n in (H, K, K)]
                whole = documents == 1 and (window is None or window >= T)
                ours: Provider = partial(packed_attention, cu_seqlens=cuts, window=window)
                providers = {"ptst": ours}
                providers |= {label: partial(sdpa, backend=b) for label, b in backends.items() if whole}
                if documents == 1 and T <= 2048:
                    eager: Provider = partial(eager_attention, window=window)
                    providers |= {"eager": eager, "compile": torch.compile(eager)}
                if varlen is not None:
                    cu = torch.tensor(cuts, dtype=torch.int32, device=DEVICE)
                    longest = max(b - a for a, b in pairwise(cuts))
                    reach = (-1 if window is None else window - 1, 0)
                    bounds = {"cu_seq_q": cu, "cu_seq_k": cu, "max_q": longest, "max_k": longest}
                    providers["varlen_attn"] = partial(varlen, **bounds, window_size=reach, enable_gqa=H != K)
                done = 4 * pairs(cuts, window) * H * D
                shape = f"{name} T={T} documents={documents}"
                yield Case("attention", shape, leaves, providers, flops=(done, 3.5 * done))


def loss() -> Iterator[Case]:
    liger = peer("liger_kernel.ops.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyFunction")
    cut = peer("cut_cross_entropy", "linear_cross_entropy")
    sizes = {"Llama-3-8B": (4096, 128256), "Llama-2-7B": (4096, 32000)} if ON_GPU else {"SmolLM2-135M": (576, 49152)}
    for name, (H, V) in sizes.items():
        for T in (8192, 4096, 2048, 512, 16384) if ON_GPU else (1024,):
            for share in (1.0, 0.3):
                head = made(V, H, scale=0.05).detach()
                targets = torch.randint(0, V, (T,), device=DEVICE)
                targets[torch.randperm(T, device=DEVICE)[round(T * share) :]] = -1
                rows = (targets >= 0).nonzero().squeeze(1)

                def ours(h, head=head, targets=targets, rows=rows):
                    return linear_cross_entropy(h, head, targets, float(len(rows)), trained_N=rows)

                def eager(h, head=head, targets=targets, rows=rows, wide=True):
                    logits = h @ head.t()
                    logits = logits.float() if wide else logits
                    return functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / len(rows)

                providers: dict[str, Provider] = {
                    "ptst": ours,
                    "eager": eager,
                    "eager, logits of trained rows": lambda h, f=eager, r=rows, t=targets: f(h[r], targets=t[r]),
                    "compile": torch.compile(eager),
                }
                if ON_GPU:
                    providers["eager bfloat16"] = lambda h, f=eager: f(h, wide=False)
                    if liger:
                        providers["Liger"] = lambda h, e=head, t=targets: liger.apply(h, e, t, None, None, -1)[0]
                    if cut:
                        providers["cut-cross-entropy"] = lambda h, e=head, t=targets: cut(h, e, t, ignore_index=-1)
                n = len(rows)
                shape = f"{name} T={T} trained={share:.0%}"
                yield Case("loss", shape, [made(T, H)], providers, flops=(2.0 * n * H * V, 4.0 * n * H * V))


def elementwise() -> Iterator[Case]:
    T, H, F, Q, K, D = (8192, 4096, 14336, 32, 8, 128) if ON_GPU else (512, 576, 1536, 9, 3, 64)
    size, w = DTYPE.itemsize, torch.ones(H, device=DEVICE, dtype=DTYPE)

    def case(kernel: str, shape: str, leaves: list[Tensor], ours: Provider, plain: Provider, moved, *more) -> Case:
        providers = {"ptst": ours, "eager": plain, "compile": torch.compile(plain)} | dict(more)
        return Case(kernel, shape, leaves, providers, bytes=(moved[0] * size, sum(moved) * size))

    def norm(x):
        return functional.rms_norm(x, (H,), w, 1e-5)

    def add_norm(x, r):
        return functional.rms_norm(x + r, (H,), w, 1e-5), x + r

    lent = peer("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    more = [("Liger", lambda x: lent.apply(x, w, 1e-5))] if ON_GPU and lent else []
    n = T * H
    # The backward pass reads dy and x and writes dx; with the residual it also reads the sum's gradient.
    yield case("rms_norm", f"{T} x {H}", [made(T, H)], lambda x: rms_norm(x, w, 1e-5), norm, (2 * n, 3 * n), *more)
    both = [made(T, H), made(T, H)]
    yield case("add_rms_norm", f"{T} x {H}", both, lambda x, r: add_rms_norm(x, r, w, 1e-5), add_norm, (4 * n, 4 * n))
    cos, sin = tables(torch.arange(T, device=DEVICE), frequencies(D, 1e4).to(DEVICE))

    def rotated(q, k):
        halves = [x.float().chunk(2, dim=-1) for x in (q, k)]
        return tuple(torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(q.dtype) for a, b in halves)

    n = T * (Q + K) * D
    heads = [made(T, Q, D), made(T, K, D)]
    yield case(
        "rope", f"{T} x ({Q} + {K}) x {D}", heads, lambda q, k: apply_rope(q, k, cos, sin), rotated, (2 * n, 2 * n)
    )

    def gated(g, u):
        return functional.silu(g) * u

    lent_silu = peer("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")
    more = [("Liger", lambda g, u: lent_silu.apply(g, u))] if ON_GPU and lent_silu else []
    n = T * F
    yield case("swiglu", f"{T} x {F}", [made(T, F), made(T, F)], swiglu, gated, (3 * n, 5 * n), *more)


def lora() -> Iterator[Case]:
    I, outs, gate = (4096, (4096, 1024, 1024), (14336, 14336)) if ON_GPU else (576, (576, 192, 192), (1536, 1536))
    for name, sizes in (("q|k|v", outs), ("gate|up", gate)):
        for T in (4096, 16384) if ON_GPU else (512,):
            weights = [made(o, I, scale=0.02).detach() for o in sizes]
            leaves = [made(T, I)]
            for o in sizes:
                leaves += [torch.randn(s, device=DEVICE).mul_(0.02).requires_grad_() for s in ((16, I), (o, 16))]

            def ours(x, *ab, weights=weights):
                return lora_group(x, weights, list(zip(ab[::2], ab[1::2], strict=True)), 2.0)

            def plain(x, *ab, weights=weights):
                low = [(a.to(x.dtype), b.to(x.dtype)) for a, b in zip(ab[::2], ab[1::2], strict=True)]
                return tuple(x @ w.t() + 2.0 * ((x @ a.t()) @ b.t()) for w, (a, b) in zip(weights, low, strict=True))

            done = sum(2.0 * T * (I * o + 16 * (I + o)) for o in sizes)
            thin = sum(2.0 * T * 16 * (I + o) for o in sizes)
            providers = {"ptst": ours, "eager": plain, "compile": torch.compile(plain)}
            yield Case("lora", f"{name} T={T} r=16", leaves, providers, flops=(done, 2 * done + thin))


def decode() -> Iterator[Case]:
    geometries = {"Llama-2-7B": (32, 32, 128), "Mistral-7B": (32, 8, 128)} if ON_GPU else {"SmolLM2-135M": (9, 3, 64)}
    for name, (H, K, D) in geometries.items():
        for R, L in ((1, 4096), (256, 400), (1, 400), (64, 4096)) if ON_GPU else ((32, 300),):
            q = made(R, H, D).detach()
            k, v = (made(R, L, K, D).detach() for _ in range(2))
            lengths = torch.full((R,), L, device=DEVICE)

            def ours(q=q, k=k, v=v, lengths=lengths, L=L):
                return decode_attention(q, k, v, lengths, longest=L)

            def sdpa(q=q, k=k, v=v):
                keys, values = (x.transpose(1, 2) for x in (k, v))
                return functional.scaled_dot_product_attention(q[:, :, None], keys, values, enable_gqa=True)

            moved = 2 * k.numel() * k.element_size()
            providers = {"ptst": ours, "sdpa": sdpa}
            yield Case("decode", f"{name} {R} x {L}", [], providers, bytes=(moved, moved), backward=False)


KERNELS = {
    "attention": attention,
    "loss": loss,
    "lora": lora,
    "decode": decode,
    "elementwise": elementwise,
}


def forward_pass(case: Case, function: Provider) -> Callable[[], object]:
    @torch.no_grad()
    def work():
        return function(*case.leaves)

    return work


def both_passes(case: Case, function: Provider) -> Callable[[], object]:
    """Forward and backward; tensors of values are given a gradient of ones, made beforehand."""

    def outputs() -> tuple[Tensor, ...]:
        out = function(*case.leaves)
        return out if isinstance(out, tuple) else (out,)

    given = [torch.ones_like(o) for o in outputs()]
    return lambda: torch.autograd.grad(outputs(), case.leaves, given, allow_unused=True)


def backward_pass(case: Case, function: Provider) -> Callable[[], object]:
    """Backward alone, again and again over one forward pass; a function that frees what it needs fails here."""
    out = function(*case.leaves)
    outs = out if isinstance(out, tuple) else (out,)
    given = [torch.ones_like(o) for o in outs]
    return lambda: torch.autograd.grad(outs, case.leaves, given, allow_unused=True, retain_graph=True)


def measure(case: Case, most: dict[str, float]) -> Iterator[dict[str, object]]:
    """A row for every provider and pass."""
    passes = {"forward": forward_pass, "both": both_passes, "backward": backward_pass}
    for provider, function in case.providers.items():
        for index, (name, prepared) in enumerate(passes.items()):
            if name != "forward" and not case.backward:
                continue
            row: dict[str, object] = {"kernel": case.kernel, "shape": case.shape, "provider": provider, "pass": name}
            try:
                work = prepared(case, function)
                row["ms"] = milliseconds(work)
                row["extra_mb"] = extra_megabytes(work)
            except Exception as error:  # Triton's errors (a kernel that does not fit) share no other class
                row["error"] = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
                yield row
                if not device_is_well():
                    raise SystemExit("the device is lost: whatever ran after this would fail too") from error
                continue
            for unit, amount, scale in (("tflops", case.flops, 1e9), ("gbs", case.bytes, 1e6)):
                if amount:
                    done = (amount[0], amount[1], amount[1] - amount[0])[index]
                    row[unit] = done / row["ms"] / scale
                    row["share"] = row[unit] / most[unit]
            yield row


def table(rows: list[dict]) -> str:
    """Markdown; the ratio is the peer's time over ours in the same case."""
    lines = ["| kernel | shape | pass | provider | ms | x ptst | rate | of ceiling | extra MB |", "|" + "---|" * 9]
    ours = {(r["kernel"], r["shape"], r["pass"]): r.get("ms") for r in rows if r["provider"] == "ptst"}
    for r in rows:
        start = f"| {r['kernel']} | {r['shape']} | {r['pass']} | {r['provider']} |"
        if "error" in r:
            lines.append(f"{start} {r['error'].replace('|', '/')} | | | | |")
            continue
        rate = f"{r['tflops']:.3g} TFLOP/s" if "tflops" in r else f"{r['gbs']:.4g} GB/s"
        base = ours.get((r["kernel"], r["shape"], r["pass"]))
        ratio = f"{r['ms'] / base:.2f}" if base else ""
        extra = "" if r["extra_mb"] is None else f"{r['extra_mb']:.0f}"
        lines.append(f"{start} {r['ms']:.3f} | {ratio} | {rate} | {r['share']:.0%} | {extra} |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict], path: Path) -> None:
    """One panel per kernel: forward and backward, share of the ceiling by shape and provider."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kept = [r for r in rows if "error" not in r and (r["pass"] == "both" or r["kernel"] == "decode")]
    kernels = list(dict.fromkeys(r["kernel"] for r in kept))
    figure, panels = pyplot.subplots(len(kernels), 1, figsize=(11, 3.2 * len(kernels)), squeeze=False)
    for panel, kernel in zip(panels[:, 0], kernels, strict=True):
        here = [r for r in kept if r["kernel"] == kernel]
        shapes = list(dict.fromkeys(r["shape"] for r in here))
        providers = list(dict.fromkeys(r["provider"] for r in here))
        width = 0.8 / len(providers)
        for number, provider in enumerate(providers):
            found = {r["shape"]: 100 * r["share"] for r in here if r["provider"] == provider}
            places = [i + number * width for i, s in enumerate(shapes) if s in found]
            panel.bar(places, [found[s] for s in shapes if s in found], width, label=provider)
        panel.set_xticks([i + 0.4 - width / 2 for i in range(len(shapes))], shapes, fontsize=6, rotation=20, ha="right")
        panel.set_ylabel("% of ceiling")
        panel.set_title(kernel, loc="left", fontsize=10)
        panel.legend(fontsize=7, ncols=4)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", nargs="+", choices=KERNELS, default=list(KERNELS))
    flags.add_argument("--out", type=Path, help="where to write, without an ending; default: the table is printed")
    flags.add_argument("--seconds", type=float, default=float("inf"), help="begin no new case after so long")
    args = flags.parse_args()
    torch.manual_seed(0)
    start, most, rows, left_out = time.monotonic(), ceilings(), [], []
    told = machine() | {"ceilings": most, "dtype": str(DTYPE).removeprefix("torch.")}
    print(told, flush=True)
    for name in args.only:
        for case in KERNELS[name]():
            if time.monotonic() - start > args.seconds:
                left_out.append(f"{case.kernel} {case.shape}")
                continue
            rows += measure(case, most)
            torch.compiler.reset()
            if args.out:
                write_json(args.out.with_suffix(".json"), told | {"rows": rows, "left_out": left_out})
                args.out.with_suffix(".md").write_text(table(rows))
    print(table(rows))
    if left_out:
        print(f"left out for want of time: {', '.join(left_out)}")
    if args.out:
        plot(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
