"""What a base in fewer bits costs in quality, on the embedded model and the built-in word problems.

    python benchmarks/quantized.py [--steps 20] [--model MODEL] [--out FILE.json]

For the base in float32, int8 and nf4: validation loss (nats per trained token) before training, and after a short
run of LoRA over it (`ptst.train`, the same examples in the same order); of the adapter trained over each, the loss over
the base in float32, too; and the mean KL divergence, in nats per trained token, of the untrained base's next-token
distribution from float32's. Bytes are those of the frozen weights as the memory plan has them.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import machine
from ptst.open import open_model
from ptst.settings import EMBEDDED_MODEL
from ptst.text.encode import Example
from ptst.training.config import TrainConfig
from ptst.training.evaluate import validation_loss
from ptst.training.fine_tune import fine_tune
from ptst.training.memory import frozen_bytes
from ptst.training.parallel import ALONE
from ptst.training.run_plan import plan_run

KINDS = ("none", "int8", "nf4")
MICRO_BATCH = 1024


@torch.no_grad()
def divergence(config: TrainConfig, kind: str, examples: list[Example]) -> float:
    """Mean KL divergence over the trained tokens."""
    opened = open_model(config.model)
    exact = opened.load_base()
    other = replace(opened, quantized=kind).load_base()
    total, count = 0.0, 0
    for example in examples:
        p, q = (d.logits(torch.tensor(example.ids))[:-1].log_softmax(-1) for d in (exact, other))
        chosen = torch.tensor(example.loss_mask[1:])
        total += float((p.exp() * (p - q)).sum(-1)[chosen].double().sum())
        count += int(chosen.sum())
    return total / count


def measure(config: TrainConfig, kind: str, folder: Path) -> dict[str, float]:
    config = replace(config, quantize=kind, out=folder / kind)
    done = fine_tune(config)
    assert done is not None and done.record.validation_loss is not None
    losses, opened = done.record.validation_loss, open_model(checkpoint=done.folder)
    found = {"before": losses.before, "after": losses.after}
    examples = list(plan_run(config).validation.examples)
    over_float32 = replace(opened, quantized="none").load()
    found["after, over float32"] = validation_loss(over_float32, examples, MICRO_BATCH, ALONE)
    found["KL"] = 0.0 if kind == "none" else divergence(config, kind, examples)
    found["bytes"] = frozen_bytes(opened.config, torch.bfloat16, config.quantize)
    return {name: float(value or 0.0) for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--model", default=EMBEDDED_MODEL)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    config = TrainConfig(model=options.model, max_steps=options.steps, micro_batch_tokens=MICRO_BATCH, dtype="float32")
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for kind in KINDS:
            found[kind] = measure(config, kind, Path(temporary))
            words = ", ".join(f"{name} {value:.4f}" for name, value in found[kind].items() if name != "bytes")
            print(f"{kind:5} {found[kind]['bytes'] / 1e9:.3f} GB over bfloat16, {words}", flush=True)
    if options.out:
        options.out.write_text(json.dumps({"machine": machine(), "steps": options.steps, "cases": found}, indent=1))


if __name__ == "__main__":
    main()
