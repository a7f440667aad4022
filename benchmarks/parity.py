"""Is our decoder Hugging Face's? Largest difference of float32 logits, and of the gradients of all weights in relation
to each gradient's norm, on small random models of each family; of logits also on the default model where it is at hand.
Limit 1e-4. Needs `pip install -e .[bench]`.

    python benchmarks/parity.py                        compare live, print a table, exit 1 beyond the limit
    python benchmarks/parity.py --record tests/model   write Hugging Face's figures for the tests
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.random_models import MODELS, SEQUENCES, tensor, write_model
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora, load_adapter, save_adapter
from ptst.model.weights import hf_name, load_decoder

LIMIT = 1e-4
DEFAULT = Path("checkpoints/smollm2-135m-instruct")
# A direction in logit space: its product with every row of logits notices an error at any position.
PROBE = torch.sin(torch.arange(101, dtype=torch.float64))


def peer(folder: Path):
    """Hugging Face's float32 model, of these weights alone."""
    from transformers import AutoModelForCausalLM

    options = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    model, info = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()


def peer_logits(folder: Path, sequence: list[int], adapter: Path | None = None) -> torch.Tensor:
    """Hugging Face's float32 logits (T, V) of one sequence, with a PEFT adapter if one is given."""
    model = peer(folder)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    with torch.no_grad():
        return model.eval()(torch.tensor([sequence])).logits[0]


def _loss(logits_TV: torch.Tensor) -> torch.Tensor:
    """Of each next token of the second sequence, summed."""
    targets = torch.tensor(SEQUENCES[1][1:])
    return torch.nn.functional.cross_entropy(logits_TV[:-1], targets, reduction="sum")


def peer_gradients(folder: Path) -> dict[str, torch.Tensor]:
    """Of every weight, by Hugging Face's name."""
    model = peer(folder)
    _loss(model(torch.tensor([SEQUENCES[1]])).logits[0]).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def gradients(folder: Path) -> dict[str, torch.Tensor]:
    """Ours: of every weight, by Hugging Face's name."""
    decoder = load_decoder(folder).requires_grad_(True)
    _loss(decoder.logits(torch.tensor(SEQUENCES[1]))).backward()
    return {hf_name(name): p.grad for name, p in decoder.named_parameters()}


def probe_of_gradient(name: str, gradient: torch.Tensor) -> tuple[float, float]:
    """(its norm, its product with a direction of norm 1): an error anywhere in the gradient changes the second."""
    direction = tensor(f"bias {name}", tuple(gradient.shape)).double()
    gradient = gradient.double()
    return float(gradient.norm()), float((gradient * direction).sum() / direction.norm())


def record(folder: Path) -> None:
    """Write figures for the tests: of each model the last row of logits, and the probe's product with every row; and
    the probes of each weight's gradient."""
    figures, of_gradients = {}, {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as path:
            write_model(name, Path(path))
            with torch.no_grad():
                rows = [peer_logits(Path(path), s).double() for s in SEQUENCES]
            probes = {n: probe_of_gradient(n, g) for n, g in peer_gradients(Path(path)).items()}
        figures[name] = [
            {"last": [round(x, 6) for x in r[-1].tolist()], "probe": [round(x, 6) for x in (r @ PROBE).tolist()]}
            for r in rows
        ]
        of_gradients[name] = {n: [float(f"{x:.7g}") for x in pair] for n, pair in probes.items()}
    (folder / "figures.json").write_text(json.dumps(figures) + "\n")
    (folder / "gradients.json").write_text(json.dumps(of_gradients) + "\n")


@torch.no_grad()
def difference_of_logits(folder: Path, sequence: list[int], adapter: Path | None = None) -> float:
    decoder = load_decoder(folder)
    if adapter is not None:
        load_adapter(decoder, adapter)
    return float((decoder.logits(torch.tensor(sequence)) - peer_logits(folder, sequence, adapter)).abs().max())


def difference_of_gradients(folder: Path) -> float:
    ours, theirs = gradients(folder), peer_gradients(folder)
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)


def compare() -> dict[str, float]:
    """Largest differences by model; `lora`: a small model with an adapter that peft read."""
    differences = {}
    for name in MODELS:
        with tempfile.TemporaryDirectory() as path:
            folder = write_model(name, Path(path))
            differences[name] = max(difference_of_logits(folder, s) for s in SEQUENCES)
            differences[f"{name}, gradients"] = difference_of_gradients(folder)
    with tempfile.TemporaryDirectory() as path, tempfile.TemporaryDirectory() as adapter:
        folder = write_model("smollm2", Path(path))
        config = LoraConfig(rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"))
        ours = load_decoder(folder)
        for p in add_lora(ours, config).values():
            torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
        save_adapter(ours, Path(adapter), config, str(folder))
        differences["lora"] = difference_of_logits(folder, SEQUENCES[1], Path(adapter))
    if DEFAULT.is_dir():
        differences[DEFAULT.name] = difference_of_logits(DEFAULT, [(37 * i * i + 5) % 49000 for i in range(64)])
    return differences


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="write Hugging Face's figures to this folder and stop")
    parser.add_argument("--json", type=Path, help="also write the differences to this file")
    args = parser.parse_args()
    try:
        import transformers
    except ImportError:
        sys.exit("benchmarks/parity.py compares with transformers: pip install -e .[bench]")
    if args.record:
        record(args.record)
        return
    differences = compare()
    print(f"largest differences in float32, torch {torch.__version__}, transformers {transformers.__version__}")
    for name, value in differences.items():
        print(f"{name:26} {value:.2e}  {'ok' if value <= LIMIT else 'TOO LARGE'}")
    if args.json:
        args.json.write_text(json.dumps(differences, indent=2) + "\n")
    sys.exit(max(differences.values()) > LIMIT)


if __name__ == "__main__":
    main()
