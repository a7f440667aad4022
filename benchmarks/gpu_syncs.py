"""Where the host waits for the GPU: every synchronization of ten decode steps and of three training steps, by line.

    python benchmarks/gpu_syncs.py --out FILE.json

torch's own watch (torch.cuda.set_sync_debug_mode) sees copies and reads that wait, not the event that the engine waits
for on purpose. Also the time that capturing a graph takes, by size. Without a GPU the same steps run and nothing waits.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.decode_step import engine_at_work
from benchmarks.measure import DEVICE, DTYPE, ON_GPU, machine, write_json
from benchmarks.train_gpu import random_decoder
from ptst.generation.cuda_graphs import DecodeGraphs
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora
from ptst.text.encode import Example
from ptst.training.trainer import Trainer, TrainerConfig

ROOT = Path(__file__).resolve().parents[1]
OURS = tuple(str(ROOT / folder) for folder in ("ptst", "kernels"))


@contextmanager
def watched(found: Counter[str]):
    """Counts the lines of ours below which torch waited for the device."""

    def note(message, *_args, **_named) -> None:
        ours = [
            f for f in traceback.extract_stack() if f.filename.startswith((str(ROOT / "ptst"), str(ROOT / "kernels")))
        ]
        line = (
            f"{Path(ours[-1].filename).relative_to(ROOT)}:{ours[-1].lineno} {ours[-1].line}" if ours else str(message)
        )
        found[line] += 1

    kept = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            if ON_GPU:
                torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = kept


def decoding(name: str) -> dict[str, object]:
    decoder = random_decoder(name, 2048)
    captures: dict[str, float] = {}
    capture = DecodeGraphs._capture

    def timed(self, size, adapter):
        start = time.perf_counter()
        captured = capture(self, size, adapter)
        captures[str(size)] = time.perf_counter() - start
        return captured

    DecodeGraphs._capture = timed
    try:
        for requests in (8, 4, 1):
            engine, found = engine_at_work(decoder, requests, 40), Counter[str]()
            for _ in range(4):
                engine.step()
            with watched(found):
                for _ in range(10 if ON_GPU else 2):
                    engine.step()
    finally:
        DecodeGraphs._capture = capture
    return {"waits_in_ten_decode_steps": dict(found), "seconds_of_a_capture": captures}


def training(name: str) -> dict[str, object]:
    decoder = random_decoder(name, 2048)
    parameters = add_lora(decoder, LoraConfig())
    generator = torch.Generator().manual_seed(0)
    rows = []
    for n in range(24):
        ids = torch.randint(0, decoder.config.vocab_size, (20 + 5 * (n % 7),), generator=generator).tolist()
        rows.append(Example(ids, [i >= 8 for i in range(len(ids))], row=n))
    trainer = Trainer(decoder, parameters, rows, TrainerConfig(examples_per_step=4, micro_batch_tokens=80))
    found = Counter[str]()
    trainer.step()  # compiles and allocates
    with watched(found):
        losses = [trainer.step().loss for _ in range(3)]
    return {"waits_in_three_training_steps": dict(found), "losses": losses}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", default="tiny")
    flags.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "gpu_syncs.json")
    args = flags.parse_args()
    told: dict[str, object] = machine() | {"on": DEVICE, "dtype": str(DTYPE)}
    for part in (decoding, training):
        told |= part(args.model)
        write_json(args.out, told)
    print({k: v for k, v in told.items() if "waits" in k or "capture" in k})


if __name__ == "__main__":
    main()
