"""Compile every kernel ahead of time, without a GPU: does it compile, fit into shared memory, and stay in registers?

    python -m ptst.kernels.compile            a table for sm_80 (A100) and sm_90 (H100, H200); of the others attention
    python -m ptst.kernels.compile --model    what the main loops of sm_90 do, and their bounds (main_loops.py)
    python -m ptst.kernels.compile --loops    writes main_loops.json, for the Triton that is installed
    python -m ptst.kernels.compile --readme   writes the tables in kernels/README.md

The kernels' own launch code runs on meta tensors over a stub driver, so that each launch is compiled with exactly the
specialization it has on a GPU (divisibility of pointers and strides, constants). Nothing runs. Exits with 1 on failure:
also where one of the main loops that README shows has grown by more than 5 % against main_loops.json.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from ptst.kernels import (
    attention_decode,
    flash_attention,
    linear_cross_entropy,
    lora,
    lora_folded,
    main_loops,
    multi_lora,
    rms_norm,
    rope,
    sampling,
    swiglu,
)
from ptst.kernels.flash_blocks import SHARED
from ptst.kernels.machine_code import Loop, disassemble, loops

# Bytes that a thread of a float32 kernel may spill: ptxas stops at 64 registers for the sake of more warps, whatever
# the block shape, and no float32 model is trained on a GPU for its speed.
FEW = 24
FULL = (80, 90)  # for these every kernel, for the others attention's
README = Path(__file__).resolve().parent / "README.md"
# Llama's shapes in bfloat16, a line for each kernel.
SHOWN = re.compile(
    r"(attention|decode) bfloat16 D=\d+ (W=0|K=8.*)|lora bfloat16 I=4096 O=4096.*|"
    r"folded bfloat16 E=4096 F=11008 r=16 [\w, ]+|rms_norm bfloat16 H=4096 (residual.*|"
    r"frozen)|(swiglu|loss) bfloat16 .=11008( and h)?|rope bfloat16 D=128.*|"
    r"sampling V=128256|multi_lora bfloat16 T=64.*"
)


@dataclass(frozen=True)
class Compiled:
    """The compiler's report on one launch. `stack` and `local` are bytes per thread, above 0 if registers spill."""

    name: str
    note: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    warps: int
    blocks: str  # block shapes, by the kernel's names
    wgmma: bool  # whether it uses the warpgroup MMA of sm_90
    stages: int = 1
    tma_bytes: int = 0  # of all tiles that descriptors copy in one passage
    tiles: int = 0  # such tiles
    main: Loop | None = None  # read where bounds are computed: half precision on sm_90
    edge: Loop | None = None

    @property
    def faults(self) -> list[str]:
        spills = ["spills"] if self.stack + self.local > FEW * ("float32" in self.note) else []
        large = ["too much shared memory"] if self.shared > SHARED[self.arch] else []
        multiplies = self.name in ("forward", "dq", "dkdv") and "attention" in self.note and "float32" not in self.note
        wide = "D=256" in self.note and self.name != "forward"  # flash_blocks.py says why
        slow = ["no warpgroup MMA"] if multiplies and self.arch == 90 and not (self.wgmma or wide) else []
        return spills + large + slow


class _Launcher:
    def __init__(self, source, metadata):
        pass

    def __call__(self, *_args, **_named):
        pass


class _Stub(DriverBase):
    """A driver that knows its target and launches nothing."""

    def __init__(self, target: GPUTarget):
        self.target = target
        self.launcher_cls = _Launcher
        properties = {"max_shared_mem": SHARED[target.arch], "multiprocessor_count": 132, "sm_clock_rate": 1}
        properties |= {"mem_clock_rate": 1, "mem_bus_width": 1}
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda _device: properties,
            load_binary=lambda *_args: (None, None, 0, 0, 1024),
            unload_module=lambda _module: None,
        )

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, _type):
        return "void*"

    def get_current_target(self):
        return self.target

    def get_active_torch_device(self):
        return torch.device("meta")

    def get_current_device(self):
        return 0

    def set_current_device(self, _device):
        pass

    def get_current_stream(self, _device=0):
        return 0

    def get_device_capability(self, _device=0):
        return divmod(self.target.arch, 10)

    def get_benchmarker(self):
        return lambda f, quantiles=None, **_named: (f(), [1.0, 1.0, 1.0])[1]


@contextlib.contextmanager
def recording(arch: int, note: str) -> Iterator[list[Compiled]]:
    """Compile and record every launch inside, for `arch`."""
    import triton.runtime.jit as runtime

    found: list[Compiled] = []
    kept, run = driver._active, runtime.JITFunction.run
    driver.set_active(_Stub(GPUTarget("cuda", arch, 32)))
    disassembled = arch == main_loops.ARCH and SHOWN.fullmatch(note)

    def compile_only(self, *args, grid, warmup, **named):
        self.device_caches.clear()  # cached by device, which is always the same one here
        kernel = run(self, *args, grid=grid, warmup=True, **named)
        kernel = kernel.result() if hasattr(kernel, "result") else kernel
        usage = _usage(kernel.asm["cubin"])
        main, edges = loops(disassemble(kernel.asm["cubin"])) if disassembled else (None, [])
        tiles = [a for a in args if type(a).__name__ == "TensorDescriptor"]
        found.append(
            Compiled(
                self.__name__.lstrip("_"),
                note,
                arch,
                usage.get("REG", 0),
                usage.get("STACK", 0),
                usage.get("LOCAL", 0),
                kernel.metadata.shared,
                kernel.metadata.num_warps,
                " ".join(f"{k}={v}" for k, v in named.items() if k.startswith("B") and k.isupper()),
                "wgmma.mma_async" in kernel.asm["ptx"],
                kernel.metadata.num_stages,
                sum(math.prod(t.block_shape) * t.base.element_size() for t in tiles),
                len(tiles),
                main,
                edges[-1] if edges else None,
            )
        )
        return kernel

    runtime.JITFunction.run = compile_only
    try:
        yield found
    finally:
        runtime.JITFunction.run, driver._active = run, kept


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        out = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", out)}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def attention_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Forward and backward for the models' head sizes, two documents, with and without a window."""
    forward, backward = flash_attention.op._init_fn, flash_attention.backward_op._init_fn
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for heads, kv_heads, head_dim, window in (
            (32, 8, 64, 0),
            (32, 8, 96, 0),
            (32, 8, 128, 0),
            (32, 8, 128, 4096),
            (28, 4, 128, 0),
            (16, 8, 256, 4096),
        ):
            q, k = (meta(512, n, head_dim, dtype=dtype) for n in (heads, kv_heads))
            lse, bounds = meta(heads, 512), [0, 200, 512]
            group = "" if heads == 32 else f" H={heads} K={kv_heads}"  # Qwen2's: no power of two
            note = f"attention {str(dtype).removeprefix('torch.')} D={head_dim} W={window}{group}"
            yield note, partial(forward, q, k, k, bounds, bounds, window)
            yield note, partial(backward, q, q, k, k, q, lse, bounds, bounds, window)


def decode_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """One request over a cache without blocks, its keys split; many over blocks of 16."""
    decode = attention_decode._op._init_fn
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for head_dim, heads in ((64, 32), (128, 32), (128, 8), (128, 4)):
            q, k = (
                meta(64, 32 if heads > 4 else 28, head_dim, dtype=dtype),
                meta(64, 1024, heads, head_dim, dtype=dtype),
            )
            lengths = meta(64, dtype=torch.long)
            note = f"decode {str(dtype).removeprefix('torch.')} D={head_dim} K={heads}"
            yield f"{note} split", partial(decode, q[:1], k, k, None, lengths[:1], 0, 4)
            table, blocks = meta(64, 40, dtype=torch.int32), k.view(4096, 16, heads, head_dim)
            yield f"{note} blocks", partial(decode, q, blocks, blocks, table, lengths, 0, 1)


def lora_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Llama-2-7B's q, k and v at rank 16, gate and up at rank 64, the adapter in float32; an odd shape."""
    shrink, expand, gradient = (f._init_fn for f in (lora.shrink, lora.expand, lora.weight_gradient))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for T, I, O, R in ((4096, 4096, 4096, 48), (4096, 4096, 11008, 192), (77, 33, 45, 3)):
            x, y, z = (meta(T, n, dtype=dtype) for n in (I, O, R))
            a, b = meta(R, I), meta(O, R)
            note = f"lora {str(dtype).removeprefix('torch.')} I={I} O={O} R={R}"
            yield note, partial(shrink, x, a, 1.0)
            yield f"{note} e", partial(shrink, y, b.t(), 2.0)
            yield note, partial(expand, y, z, b, 2.0)
            yield f"{note} dx", partial(expand, x, z, a.t(), 1.0)
            yield f"{note} dA", partial(gradient, z, x, 1.0, False)
            yield f"{note} dB", partial(gradient, z, y, 2.0, True)


def folded_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """A layer of Llama-2-7B with rank 16 on all projections, and one of rank 64; an odd shape."""
    for dtype in (torch.bfloat16, torch.float32):
        for T, E, F, r in ((4096, 4096, 11008, 16), (4096, 4096, 11008, 64), (77, 33, 45, 3)):
            note, R = f"folded {str(dtype).removeprefix('torch.')} E={E} F={F} r={r}", -(-r // 8) * 8
            x, y, d = (meta(T, n, dtype=dtype) for n in (E, 2 * F, F + R))
            w, rstd = meta(E, dtype=dtype), meta(T)
            all3, all2 = (-(-n * r // 8) * 8 for n in (3, 2))
            a3, a2, a = meta(all3, E, dtype=dtype), meta(all2, E, dtype=dtype), meta(R, F, dtype=dtype)
            e3, dx3, z2, z = (meta(T, n, dtype=dtype) for n in (all3, E + all3, all2, R))
            yield f"{note} qkv", partial(lora_folded.norm_shrink, x, w, a3, 1e-5)
            yield f"{note} qkv", partial(lora_folded.norm_backward, dx3, x, (w, rstd), a3, x)
            yield f"{note} gate_up", partial(lora_folded.norm_shrink, x, w, a2, 1e-5)
            yield f"{note} down", partial(lora_folded.swiglu_shrink, y, a)
            yield f"{note} o", partial(lora_folded.add_product, x, x, z, meta(E, E + R, dtype=dtype)[:, E:])
            dx = meta(T, E + R, dtype=dtype)
            back = partial(lora_folded.add_product, dx[:, :E], None, dx[:, E:], meta(R, E, dtype=dtype).t())
            yield f"{note} o, dx", back
            sums = lora_folded.Sums(meta(2, 8 * E * r + 8 * F * r), 2048)
            yield f"{note} down, dx", partial(lora_folded.swiglu_backward, d, y, a, z2, (r, r), 2.0, sums)
            given = partial(lora_folded.gradients, e3, x, (w, rstd), e3, [x, x, x], [r, r, r], 2.0, sums)
            yield f"{note} qkv, dA and dB", given
            yield f"{note} o, dA and dB", partial(lora_folded.gradients, z, x, None, z, [x], [r], 2.0, sums)
            mask = lora_folded.Mask(meta(T, dtype=torch.long), meta(T, dtype=torch.int32), 16, 214748365, 1 / 0.95)
            yield f"{note} qkv, dropout", partial(lora_folded.norm_shrink, x, w, a3, 1e-5, mask)
            yield f"{note} qkv, dropout", partial(lora_folded.norm_backward, dx3, x, (w, rstd), a3, x, mask)
            yield f"{note} down, dropout", partial(lora_folded.swiglu_shrink, y, a, mask)
            back = partial(lora_folded.swiglu_backward, d, y, a, z2, (r, r), 2.0, sums, mask)
            yield f"{note} down, dx, dropout", back
            yield f"{note} qkv, dA and dB, dropout", partial(given, mask=mask)
            yield f"{note} o, dropout", partial(lora_folded.shrink_dropped, x, meta(R, E, dtype=dtype), mask)
            back = partial(lora_folded.add_product, dx[:, :E], None, dx[:, E:], meta(R, E, dtype=dtype).t(), mask)
            yield f"{note} o, dx, dropout", back


def loss_launch(logits_nV: torch.Tensor, targets_n: torch.Tensor, losses_n: torch.Tensor) -> None:
    """The loss's own kernel, between its two multiplications."""
    grid, V = (logits_nV.shape[0],), logits_nV.shape[1]
    for grad in (False, True):
        linear_cross_entropy._softmax_gradient[grid](
            *(logits_nV, targets_n, targets_n, losses_n, V, 0.75),
            WEIGHTED=False, GRAD=grad, BLOCK=linear_cross_entropy.BLOCK, num_warps=8,
        )  # fmt: skip


def multi_lora_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Eight adapters of rank 16 on q, k and v and on a feed-forward block: decoding, prompts, and an odd shape."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for T, I, O, R in ((64, 4096, 6144, 48), (4096, 4096, 28672, 32), (7, 33, 45, 3)):
            y, x, which = meta(T, O, dtype=dtype), meta(T, I, dtype=dtype), meta(T, dtype=torch.int32)
            ranks = meta(8, dtype=torch.int32)
            stacked = multi_lora.Stacked(meta(8, R, I, dtype=dtype), meta(8, R, O, dtype=dtype), ranks)
            note = f"multi_lora {str(dtype).removeprefix('torch.')} T={T} I={I} O={O} R={R}"
            yield note, partial(multi_lora.launch_shrink, x, which, stacked)
            z = meta(4 if T == 64 else 1, T, R)
            yield note, partial(multi_lora.launch_expand, y, z, which, stacked)


def sampling_launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Llama-3's vocabulary, Llama-2's, and an odd one."""
    for V in (128256, 32000, 301):
        given = meta(64, V), meta(64, dtype=torch.int32), meta(2, 64, dtype=torch.float64)
        yield f"sampling V={V}", partial(sampling.launch, *given)


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel with the shapes that matter: Llama-2-7B's, and an odd one without any divisibility."""
    for module in (lora, rms_norm, rope, swiglu):
        vars(module)["use_triton"] = lambda *_: True
    yield from attention_launches()
    yield from decode_launches()
    yield from lora_launches()
    yield from folded_launches()
    yield from multi_lora_launches()
    yield from sampling_launches()
    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for T, H, F, Q, K, D in ((512, 4096, 11008, 32, 8, 128), (7, 33, 77, 3, 1, 20)):
            x, w, g = meta(T, H, dtype=dtype), meta(H, dtype=dtype), meta(T, F, dtype=dtype)
            r, cos = meta(T), meta(T, 1, D // 2)
            q, k = (meta(T, n, D, dtype=dtype) for n in (Q, K))
            # The operators' bodies: a call of the operator would send meta tensors to the fake kernels.
            norm, norm_back = rms_norm._op._init_fn, rms_norm._backward_op._init_fn
            rotate, act, act_back = rope._op._init_fn, swiglu._op._init_fn, swiglu._backward_op._init_fn
            yield f"rms_norm {kind} H={H}", partial(norm, x, None, w, 1e-5)
            rows = meta(T * Q, D, dtype=dtype)  # queries by head, as Qwen3 normalizes them
            yield f"rms_norm {kind} H={D} heads", partial(norm, rows, None, meta(D, dtype=dtype), 1e-6)
            back = partial(norm_back, rows, None, rows, meta(D, dtype=dtype), meta(T * Q), True)
            yield f"rms_norm {kind} H={D} heads, dw", back
            yield f"rms_norm {kind} H={H} residual", partial(norm, x, x, w, 1e-5)
            yield f"rms_norm {kind} H={H} frozen", partial(norm_back, x, None, x, w, r, False)
            yield f"rms_norm {kind} H={H} residual, dw", partial(norm_back, x, x, x, w, r, True)
            yield f"swiglu {kind} F={F}", partial(act, g, g)
            yield f"swiglu {kind} F={F}", partial(act_back, g, g, g, False)
            yield f"swiglu {kind} F={F} and h", partial(act_back, g, g, g, True)
            logits, ids = meta(T, F, dtype=dtype), meta(T, dtype=torch.long)
            yield f"loss {kind} V={F}", partial(loss_launch, logits, ids, r)
            yield f"rope {kind} D={D} Q={Q} K={K}", partial(rotate, q, k, cos, cos, False)


def readme_section(compiled: list[Compiled]) -> str:
    """The text between the marks in README: Triton's version and the launches of SHOWN, then the main loops."""
    lines = [f"As Triton {triton.__version__} compiles them (`python -m ptst.kernels.compile --readme`):", ""]
    lines += ["| kernel | launch | architecture | blocks | warps | registers | spilled | shared |", "|" + "---|" * 8]
    for c in compiled:
        if SHOWN.fullmatch(c.note) and c.arch in FULL:
            sizes = f"{c.warps} | {c.registers} | {c.stack + c.local} | {c.shared / 1024:.1f} KiB |"
            lines.append(f"| {c.name} | {c.note} | sm_{c.arch} | {c.blocks} | {sizes}")
    lines += ["", *main_loops.markdown([c for c in compiled if SHOWN.fullmatch(c.note)])]
    return "\n".join(["", *lines, ""])


def readme_parts() -> list[str]:
    """README before, between and after the marks."""
    found = re.fullmatch(r"(.*<!-- compiled -->\n)(.*)(<!-- end -->.*)", README.read_text(), re.S)
    assert found, f"{README} lacks the marks"
    return list(found.groups())


def compile_all(arch: int, chosen: Iterator[tuple[str, Callable[[], object]]]) -> tuple[list[Compiled], int]:
    """What was compiled, a line printed for each, and the number of faults."""
    flash_attention.ARCH = arch
    compiled: list[Compiled] = []
    failed = 0
    for note, launch in chosen:
        with recording(arch, note) as found:
            launch()
        compiled += found
        for c in found:
            failed += bool(c.faults)
            sizes = f"{c.warps:5d} {c.registers:9d} {c.stack:5d} {c.shared:8d}"
            print(f"{c.name:16} {c.note:38} sm_{c.arch:3} {sizes}  {', '.join(c.faults)}", flush=True)
        if not found:
            failed += 1
            print(f"{note}: nothing was compiled")
    return compiled, failed


def shown(*architectures: int) -> list[Compiled]:
    """The launches of SHOWN, compiled; their lines go to standard error."""
    with contextlib.redirect_stdout(sys.stderr):
        chosen = [launch for launch in launches() if SHOWN.fullmatch(launch[0])]
        return [c for arch in architectures for c in compile_all(arch, iter(chosen))[0]]


def main() -> None:
    chosen = sys.argv[1:]
    if len(chosen) > 1 or not set(chosen) <= {"--model", "--loops", "--readme"}:
        sys.exit(f"ptst.kernels.compile: {' '.join(chosen)} is none of --model, --loops, --readme")
    if chosen == ["--model"]:
        print("\n".join(main_loops.markdown(shown(main_loops.ARCH))))
        return
    before, section, after = readme_parts()
    if chosen == ["--readme"]:
        README.write_text(before + readme_section(shown(*FULL)) + after)
        return
    if chosen == ["--loops"]:
        main_loops.write(triton.__version__, shown(main_loops.ARCH))
        return
    print(f"triton {triton.__version__}")
    print(f"{'kernel':16} {'launch':38} {'arch':6} {'warps':>5} {'registers':>9} {'stack':>5} {'shared':>8}")
    failed, compiled = 0, []
    for arch in SHARED:
        found, faults = compile_all(arch, launches() if arch in FULL else attention_launches())
        compiled += found
        failed += faults
    if f"Triton {triton.__version__} " in section and section != readme_section(compiled):
        failed += 1
        print("kernels/README.md is out of date: python -m ptst.kernels.compile --readme")
    for fault in main_loops.grown(triton.__version__, compiled):
        failed += 1
        print(fault)
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
