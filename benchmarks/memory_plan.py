"""The dry run's peak memory against the measured one, for three sizes of model on a CPU.

    python benchmarks/memory_plan.py [--out FILE.json] [--only small/lora ...]

Each case runs `ptst.train --dry-run` and then the same command for two or three steps; the second's peak is the largest
resident set of the process, as the kernel counts it. Two models have random weights, the third is the default model,
whose tokenizer all of them use. Prints measured / planned; exits with 1 where one differs by more than 10 %.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import machine
from ptst.hub.locate import locate_model
from ptst.model.config import DecoderConfig
from ptst.model.decoder import Decoder
from ptst.model.weights import hf_name, save_safetensors
from ptst.runs import CHECKPOINTS

TOLERANCE = 0.1
SIZES = {  # the first has a vocabulary that outweighs its layers
    "small": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "vocab_size": 100_000},
    "middle": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12, "vocab_size": 49_152},
}
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 64}
# bfloat16 is slow on a CPU without AVX-512 or AMX: fewer tokens.
FEW = ["--micro-batch-tokens", "256", "--examples-per-step", "4", "--max-steps", "2"]
MANY = ["--micro-batch-tokens", "1024", "--examples-per-step", "24", "--max-steps", "3"]
BFLOAT16 = [*FEW, "--full", "--dtype", "bfloat16"]
METHODS = {
    "lora": MANY,
    "lora, recomputed": [*MANY, "--activation-checkpointing", "block"],
    "full": [*MANY, "--full"],
    "full, masters": BFLOAT16,
    "full, stochastic": [*BFLOAT16, "--weight-update", "stochastic"],
}
VALIDATION = ["--eval-every", "1"]
# Runs its arguments with output to stderr and prints their peak in KiB.
_STARTER = """
import os, sys
actions = [(os.POSIX_SPAWN_DUP2, 2, 1)]
_, status, usage = os.wait4(os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=actions), 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def write_model(folder: Path, base: Path, size: dict) -> None:
    """A model of random weights with the tokenizer in `base`."""
    folder.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors" and path.is_file():
            shutil.copyfile(path, folder / path.name)
    config = json.loads((base / "config.json").read_text()) | size | HEADS
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig.from_folder(folder))
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.02 if parameter.ndim > 1 else torch.ones_like(parameter))
    save_safetensors(folder / "model.safetensors", {hf_name(k): v for k, v in decoder.state_dict().items()})


def peak_bytes(command: list[str]) -> int:
    """Largest resident set of a command, in bytes."""
    # A small process starts it: the kernel counts what the starting one holds as the new one's, too.
    with tempfile.TemporaryFile() as log:
        starter = subprocess.run([sys.executable, "-c", _STARTER, *command], stdout=subprocess.PIPE, stderr=log)
        if starter.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)}\n{log.read().decode()}")
    return int(starter.stdout) * 1024


def measure(model: Path, flags: list[str], folder: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "ptst.train", "--model", str(model), "--template", "vanilla", *flags]
    planned = subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True, text=True)
    plan = json.loads(planned.stdout.splitlines()[-1])
    measured = peak_bytes([*command, "--out", str(folder)])
    shutil.rmtree(folder)
    return {"planned": plan["peak"], "measured": measured, "ratio": measured / plan["peak"], "plan": plan}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--only", nargs="*", default=[], help="begin of a case's name, as in small/lora")
    options = parser.parse_args()
    base = locate_model("smollm2-135m-instruct", CHECKPOINTS)
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        models = {name: Path(temporary) / name for name in SIZES}
        for name, folder in models.items():
            write_model(folder, base, SIZES[name])
        for size, folder in (models | {"135M": base}).items():
            for method, flags in METHODS.items():
                for validation in ((), VALIDATION):
                    case = f"{size}/{method}{', validation' if validation else ''}"
                    if options.only and not case.startswith(tuple(options.only)):
                        continue
                    results[case] = measure(folder, [*flags, *validation], Path(temporary) / "run")
                    found = results[case]
                    shown = f"planned {found['planned'] / 1e9:.3f} GB, measured {found['measured'] / 1e9:.3f} GB"
                    print(f"{case:35} {shown}, ratio {found['ratio']:.3f}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "cases": results}, indent=1))
    return int(any(abs(found["ratio"] - 1) > TOLERANCE for found in results.values()))


if __name__ == "__main__":
    raise SystemExit(main())
