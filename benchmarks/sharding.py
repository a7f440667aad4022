"""What a rank holds where weights are spread over ranks, and what that costs, on CPUs over gloo.

    python benchmarks/sharding.py [--ranks 1 2 4] [--out FILE.json]

A model of random weights (69 million parameters) takes two steps, with all weights or an adapter trained, once with its
weights spread over the ranks and once whole on each. Prints the largest peak of a rank beyond what it held before the
model was loaded, the plan's figure for the same, and the tokens that all ranks together compute in a second; of the
last, ratios within one run of this script are comparable, nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.measure import machine
from benchmarks.memory_plan import HEADS, write_model
from ptst.hub.locate import locate_model
from ptst.runs import CHECKPOINTS

SIZE = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 16, "vocab_size": 49_152}
STEPS = ["--micro-batch-tokens", "256", "--examples-per-step", "8", "--max-steps", "3", "--data", "word-problems:24"]
METHODS = {"full": ["--full"], "lora": []}


def rank(out: Path, flags: list[str]) -> None:
    """Train as one of the ranks, and note the memory of this one."""
    from ptst import train
    from ptst.system_memory import peak_resident_memory
    from ptst.training import fine_tune

    plan_run, noted = fine_tune.plan_run, {}

    def planned(*arguments):
        plan = plan_run(*arguments)
        memory = plan.memory
        noted.update(before=memory.process, planned=memory.peak - memory.process)
        return plan

    fine_tune.plan_run = planned
    sys.argv = ["ptst.train", *flags]
    train.main()
    noted["measured"] = peak_resident_memory() - noted.pop("before")
    out.with_suffix(f".{os.environ['RANK']}.json").write_text(json.dumps(noted))


def measure(folder: Path, model: Path, ranks: int, flags: list[str]) -> dict:
    run, note = folder / "run", folder / "note"
    line = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(ranks),
        __file__,
        "--rank",
        str(note),
    ]
    asked = ["--model", str(model), "--val-data", "word-problems:2", "--out", str(run), *STEPS, *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run([*line, *asked], env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    notes = [json.loads(note.with_suffix(f".{r}.json").read_text()) for r in range(ranks)]
    rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
    speeds = [row["time"]["tokens_per_second"] for row in rows if row["kind"] == "step"]
    subprocess.run(["rm", "-r", str(run)], check=True)
    return {**max(notes, key=lambda n: n["measured"]), "tokens_per_second": max(speeds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = {"machine": machine(), "cases": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_model(folder / "model", locate_model("smollm2-135m-instruct", CHECKPOINTS), {**HEADS, **SIZE})
        for method in arguments.methods:
            for ranks in arguments.ranks:
                for shard in ("none", "full") if ranks > 1 else ("none",):
                    found = measure(folder, folder / "model", ranks, [*METHODS[method], "--shard", shard])
                    results["cases"].append({"method": method, "ranks": ranks, "shard": shard, **found})
                    measured, planned = (found[key] / 1e9 for key in ("measured", "planned"))
                    print(
                        f"{method:5} {ranks} ranks, shard {shard}: {measured:.2f} GB a rank, planned {planned:.2f} "
                        f"({measured / planned:.2f}), {found['tokens_per_second']:.0f} tokens/s",
                        flush=True,
                    )
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()
