"""One training step and one generated token of Llama-2-7B's geometry, in bfloat16 with random weights, on a CPU.

    python benchmarks/rehearse_7b.py [--temporary FOLDER] [--out FILE.json] [flags of ptst.train]

Writes 13.5 GB of weights in three files into a temporary folder; runs `ptst.train --dry-run` and the same command for
one step of the paper's recipe (LoRA of rank 8 on q_proj and v_proj; eight rows of our own, activation checkpointing);
opens the run anew and generates one token. Prints the peak of each process, the first beside the plan's. Needs a
machine of 24 GiB, of which the plan and 1 GB more are free, 14 GB of disk, and some minutes. The tokenizer is a small
one of bytes. Exits with 1 where the peak is not within 10 % of the plan. A process that leaves the machine less than
0.8 GB is ended.
"""

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.big_model import LLAMA_2_7B, write_weights
from benchmarks.measure import machine
from benchmarks.memory_plan import TOLERANCE
from ptst.system_memory import free_memory
from tests.tiny import write_tokenizer

FLAGS = ["--recipe", "llama2-gsm8k", "--dtype", "bfloat16", "--max-steps", "1", "--template", "vanilla"]
FLAGS += ["--examples-per-step", "8", "--micro-batch-tokens", "1024", "--activation-checkpointing", "block"]
SPARE = 1e9  # that the plan must leave
LEAST = 0.8e9  # below which a process is ended
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


def guarded_peak(command: list[str]) -> int:
    """Largest resident set of a command in bytes; it is ended where it leaves others too little memory."""
    with tempfile.TemporaryFile("w+") as log:
        process, peak = subprocess.Popen(command, stdout=log, stderr=log), 0
        try:
            while process.poll() is None:
                if found := re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()):
                    peak = int(found[1]) * 1024
                if free_memory("cpu") < LEAST:
                    raise SystemExit(f"ended at {peak / 1e9:.1f} GB: the machine had no more memory")
                time.sleep(0.1)
        finally:
            process.kill()
        log.seek(0)
        print(log.read()[-3000:], flush=True)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return peak


def rehearse(temporary: Path, flags: list[str], samples: bool = True, layers: int = 32) -> dict[str, float]:
    """Seconds and bytes by what they are of. `samples`: a token is generated, too."""
    found: dict[str, float] = {}

    def clocked(name: str, since: float) -> None:
        found[f"{name}_seconds"] = round(time.perf_counter() - since, 1)
        print(name, found[f"{name}_seconds"], "s", flush=True)

    folder, run, start = temporary / "model", temporary / "run", time.perf_counter()
    folder.mkdir()
    write_tokenizer(folder)
    found["weights"] = write_weights(folder, LLAMA_2_7B | {"num_hidden_layers": layers}, torch.bfloat16)
    clocked("writing", start)
    rows = [
        {"question": f"What is {i} times {i + 3}?" + " Explain." * 12, "answer": "It is so. " * 12} for i in range(8)
    ]
    data = temporary / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, "-m", "ptst.train", "--model", str(folder), "--data", str(data), *FLAGS, *flags]
    planned = subprocess.run([*command, "--dry-run", "--json"], check=True, stdout=subprocess.PIPE, text=True)
    found["planned"] = json.loads(planned.stdout.splitlines()[-1])["peak"]
    if (free := free_memory("cpu")) < found["planned"] + SPARE:
        raise SystemExit(f"not run: it takes {found['planned'] / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free")
    start = time.perf_counter()
    found["training"] = guarded_peak([*command, "--out", str(run)])
    clocked("training", start)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("loss" in row for row in metrics) and (run / "adapter_model.safetensors").exists()
    found["ratio"] = found["training"] / found["planned"]
    if not samples:
        return found
    start = time.perf_counter()
    found["sampling"] = guarded_peak([sys.executable, "-c", SAMPLE, str(run)])
    clocked("sampling", start)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--temporary", type=Path, help="where the weights are written for a while")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--layers", type=int, default=32, help="fewer, for a part of the model")
    parser.add_argument("--train-only", action="store_true", help="generate no token")
    options, flags = parser.parse_known_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the folder is removed, then, too
    with tempfile.TemporaryDirectory(dir=options.temporary) as temporary:
        found = rehearse(Path(temporary), flags, not options.train_only, options.layers)
    shown = {name: f"{found.get(name, 0) / 1e9:.2f} GB" for name in ("planned", "training", "sampling")}
    print(f"planned {shown['planned']}, training {shown['training']} (ratio {found['ratio']:.3f}), ", end="")
    print(f"sampling {shown['sampling']}")
    if options.out:
        options.out.write_text(
            json.dumps({"machine": machine(), "layers": options.layers, "flags": flags, **found}, indent=1)
        )
    return int(abs(found["ratio"] - 1) > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
