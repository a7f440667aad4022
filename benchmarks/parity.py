"""Is our decoder Hugging Face's? Largest difference of float32 logits, on small random models of each family and on the
default model where it is at hand; limit 1e-4. Needs `pip install -e .[bench]`.

    python benchmarks/parity.py                        compare live, print a table, exit 1 beyond the limit
    python benchmarks/parity.py --record FILE.json     write Hugging Face's figures for the tests
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.random_models import MODELS, SEQUENCES, write_model
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora, load_adapter, save_adapter
from ptst.model.weights import load_decoder

LIMIT = 1e-4
DEFAULT = Path("checkpoints/smollm2-135m-instruct")
# A direction in logit space: its product with every row of logits notices an error at any position.
PROBE = torch.sin(torch.arange(101, dtype=torch.float64))


def peer_logits(folder: Path, sequence: list[int], adapter: Path | None = None) -> torch.Tensor:
    """Hugging Face's float32 logits (T, V) of one sequence, with a PEFT adapter if one is given."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.tensor([sequence])).logits[0]


def record() -> dict:
    """Figures for the tests: the last row of logits, and the probe's product with every row."""
    figures = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            write_model(name, Path(folder))
            rows = [peer_logits(Path(folder), s).double() for s in SEQUENCES]
        figures[name] = [
            {"last": [round(x, 6) for x in r[-1].tolist()], "probe": [round(x, 6) for x in (r @ PROBE).tolist()]}
            for r in rows
        ]
    return figures


def compare() -> dict[str, float]:
    """Largest absolute difference of logits by model; `lora`: a small model with an adapter that peft read."""
    differences = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as path:
            folder = write_model(name, Path(path))
            ours = load_decoder(folder)
            differences[name] = max(
                float((ours.logits(torch.tensor(s)) - peer_logits(folder, s)).abs().max()) for s in SEQUENCES
            )
    with tempfile.TemporaryDirectory() as path, tempfile.TemporaryDirectory() as adapter:
        folder = write_model("smollm2", Path(path))
        config = LoraConfig(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))
        ours = load_decoder(folder)
        for p in add_lora(ours, config).values():
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
        save_adapter(ours, Path(adapter), config, str(folder))
        again = load_decoder(folder)
        load_adapter(again, Path(adapter))
        theirs = peer_logits(folder, SEQUENCES[1], Path(adapter))
        differences["lora"] = float((again.logits(torch.tensor(SEQUENCES[1])) - theirs).abs().max())
    if DEFAULT.is_dir():
        sequence = [(37 * i * i + 5) % 49000 for i in range(64)]
        ours = load_decoder(DEFAULT)
        differences[DEFAULT.name] = float(
            (ours.logits(torch.tensor(sequence)) - peer_logits(DEFAULT, sequence)).abs().max()
        )
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="write Hugging Face's figures to this file and stop")
    parser.add_argument("--json", type=Path, help="also write the differences to this file")
    args = parser.parse_args()
    try:
        import transformers
    except ImportError:
        sys.exit("benchmarks/parity.py compares with transformers: pip install -e .[bench]")
    with torch.no_grad():
        if args.record:
            args.record.write_text(json.dumps(record()) + "\n")
            return
        differences = compare()
    print(f"largest difference of float32 logits, torch {torch.__version__}, transformers {transformers.__version__}")
    for name, value in differences.items():
        print(f"{name:26} {value:.2e}  {'ok' if value <= LIMIT else 'TOO LARGE'}")
    if args.json:
        args.json.write_text(json.dumps(differences, indent=2) + "\n")
    sys.exit(max(differences.values()) > LIMIT)


if __name__ == "__main__":
    main()
