"""How fast weights are loaded, against reading the same files and against safetensors' own `load_file`.

    python benchmarks/load_weights.py [--layers 8] [--dtype bfloat16] [--rounds 3] [--temporary FOLDER]

Writes a model of Llama-2-7B's layers (all 32 by default) in bfloat16, in shards of 5 GB. Each way is timed in a process
of its own, in turn, with the files out of the page cache (cold) and in it (warm, where they fit into half of the free
memory). Prints seconds and bytes per second, and ours over the others' from the medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.big_model import LLAMA_2_7B, write_weights
from ptst.system_memory import free_memory

CHUNK = 1 << 24
WAYS = {
    "ours": """
import torch
from ptst.model.weights import load_decoder
start()
kept = load_decoder(folder, getattr(torch, dtype))
""",
    "readinto": f"""
buffer = bytearray({CHUNK})
start()
for path in files:
    with open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
""",
    "load_file": """
import torch
from safetensors.torch import load_file
start()
kept = [{k: t.to(getattr(torch, dtype)).add_(0) for k, t in load_file(path).items()} for path in files]
""",
}
HEAD = """
import sys, time
from pathlib import Path
folder, dtype = Path(sys.argv[1]), sys.argv[2]
files = sorted(folder.glob("*.safetensors"))
def start():
    global since
    since = time.perf_counter()
"""
TAIL = """
print(time.perf_counter() - since)
"""


def seconds(way: str, folder: Path, dtype: str, cold: bool) -> float:
    """Of one load in a process of its own."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            if cold:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while file.read(CHUNK):
                    pass
    command = [sys.executable, "-c", HEAD + WAYS[way] + TAIL, str(folder), dtype]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=LLAMA_2_7B["num_hidden_layers"])
    parser.add_argument("--dtype", default="bfloat16", help="of the loaded weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--temporary", type=Path, help="where the weights are written for a while")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(dir=options.temporary) as temporary:
        folder = Path(temporary)
        config = LLAMA_2_7B | {"num_hidden_layers": options.layers}
        size = write_weights(folder, config, torch.bfloat16)
        os.sync()
        states = {"cold": True} | ({"warm": False} if 4 * size < free_memory("cpu") else {})
        for _ in range(options.rounds):
            for state, cold in states.items():
                for way in WAYS:
                    found.setdefault(f"{state} {way}", []).append(seconds(way, folder, options.dtype, cold))
    medians = {name: statistics.median(each) for name, each in found.items()}
    for name, median in medians.items():
        ratio = medians[f"{name.split()[0]} ours"] / median
        runs = ", ".join(f"{each:.1f}" for each in found[name])
        print(f"{name:15} {median:6.1f} s ({runs}), {size / median / 1e9:.2f} GB/s; ours takes {ratio:.2f} of it")
    if options.out:
        options.out.write_text(json.dumps({"bytes": size, "seconds": found}, indent=1))


if __name__ == "__main__":
    main()
