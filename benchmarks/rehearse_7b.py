"""One training step and one generated token of Llama-2-7B's geometry, in bfloat16 with random weights, on a CPU.

    python benchmarks/rehearse_7b.py [--temporary FOLDER] [--out FILE.json] [flags of ptst.train]

Writes 13.5 GB of weights in three files into a temporary folder; runs `ptst.train --dry-run` and the same command for
one step of the paper's recipe (LoRA of rank 8 on q_proj and v_proj; other data and fewer tokens); opens the run anew and
generates one token. Prints the peak of each process, the first beside the plan's. Needs 24 GiB of memory, of which 16 are
free, 14 GB of disk, and ten minutes. The tokenizer is a small one of bytes. Exits with 1 where the peak is not within
10 % of the plan.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.big_model import LLAMA_2_7B, write_weights
from benchmarks.measure import machine
from benchmarks.memory_plan import TOLERANCE, peak_bytes
from ptst.system_memory import free_memory
from tests.tiny import write_tokenizer

FLAGS = [
    "--recipe",
    "llama2-gsm8k",
    "--data",
    "word-problems",
    "--limit",
    "8",
    "--dtype",
    "bfloat16",
    "--max-steps",
    "1",
]
FLAGS += ["--template", "vanilla", "--examples-per-step", "8", "--micro-batch-tokens", "1024", "--too-long", "drop"]
NEEDED = 16e9
SAMPLE = """
import sys
from pathlib import Path
import torch
from ptst.generation.engine import generate
from ptst.generation.request import EngineOptions, Sampling
from ptst.open import open_model
model = open_model(checkpoint=Path(sys.argv[1]))
decoder = model.load(torch.bfloat16)
prompt = model.prompt_format.tokenizer.encode("2 + 2 =")
(answer,) = generate(decoder, [prompt], model.prompt_format.stop_ids, Sampling(1), EngineOptions(1, 64))
assert not answer.error, answer
print("token", answer.token_ids, file=sys.stderr)
"""


def rehearse(temporary: Path, flags: list[str]) -> dict[str, float]:
    """Seconds and bytes by what they are of."""
    found: dict[str, float] = {}

    def clocked(name: str, since: float) -> None:
        found[f"{name}_seconds"] = round(time.perf_counter() - since, 1)
        print(name, found[f"{name}_seconds"], "s", flush=True)

    folder, run, start = temporary / "model", temporary / "run", time.perf_counter()
    folder.mkdir()
    write_tokenizer(folder)
    found["weights"] = write_weights(folder, LLAMA_2_7B, torch.bfloat16)
    clocked("writing", start)
    command = [sys.executable, "-m", "ptst.train", "--model", str(folder), *FLAGS, *flags]
    planned = subprocess.run([*command, "--dry-run", "--json"], check=True, stdout=subprocess.PIPE, text=True)
    found["planned"] = json.loads(planned.stdout.splitlines()[-1])["peak"]
    start = time.perf_counter()
    found["training"] = peak_bytes([*command, "--out", str(run)])
    clocked("training", start)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in row for row in metrics) and (run / "adapter_model.safetensors").exists()
    start = time.perf_counter()
    found["sampling"] = peak_bytes([sys.executable, "-c", SAMPLE, str(run)])
    clocked("sampling", start)
    return found | {"ratio": found["training"] / found["planned"]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--temporary", type=Path, help="where the weights are written for a while")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options, flags = parser.parse_known_args()
    if (free := free_memory("cpu")) < NEEDED:
        raise SystemExit(f"not run: {free / 1e9:.1f} GB of memory are free, and it takes {NEEDED / 1e9:.0f}")
    with tempfile.TemporaryDirectory(dir=options.temporary) as temporary:
        found = rehearse(Path(temporary), flags)
    shown = {name: f"{found[name] / 1e9:.2f} GB" for name in ("planned", "training", "sampling")}
    print(f"planned {shown['planned']}, training {shown['training']} (ratio {found['ratio']:.3f}), ", end="")
    print(f"sampling {shown['sampling']}")
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "flags": flags, **found}, indent=1))
    return int(abs(found["ratio"] - 1) > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
