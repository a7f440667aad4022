"""The share of an evaluation's time that is not spent in the models that answer, score and judge.

    python benchmarks/evaluation.py --model checkpoints/smollm2-135m-instruct --limit 16 --tasks gsm8k safety

CPU time of one process (insensitive to a busy machine): of the whole evaluation, the engine, the log-likelihoods, the
judge, the similarity's encoder, and loading the weights. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ptst.open as opening
from ptst.eval import run_evaluation
from ptst.evaluation import answers
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.sentence_encoder import SentenceEncoder
from ptst.evaluation.tasks import requests
from ptst.generation.engine import Engine

SPENT: Counter[str] = Counter()


def timed(owner: object, name: str, what: str) -> None:
    """Wrap a function so that its CPU seconds are added to SPENT[what]."""
    inner = getattr(owner, name)

    def outer(*args, **kwargs):
        began = time.process_time()
        try:
            return inner(*args, **kwargs)
        finally:
            SPENT[what] += time.process_time() - began

    setattr(owner, name, outer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--tasks", nargs="+", default=["gsm8k", "safety", "over-refusal", "nll"])
    parser.add_argument("--max-new-tokens", type=int, help="shorter answers make the share larger")
    args = parser.parse_args()
    timed(Engine, "run", "engine")
    timed(answers, "token_log_probabilities", "likelihood")
    timed(requests, "judge_answers", "judge")
    timed(SentenceEncoder, "encode", "encoder")
    timed(opening, "load_decoder", "weights")
    with tempfile.TemporaryDirectory() as folder:
        asked = {"model": args.model, "limit": args.limit, "tasks": tuple(args.tasks)}
        config = EvalConfig(**asked, max_new_tokens=args.max_new_tokens, out=Path(folder) / "out")
        began = time.process_time()
        run_evaluation(config)
        total = time.process_time() - began
    models = sum(SPENT[k] for k in ("engine", "likelihood", "judge", "encoder"))
    figures = {"total_cpu_s": round(total, 3), **{k: round(v, 3) for k, v in SPENT.items()}}
    figures["share_outside_models"] = round(1 - models / total, 4)
    figures["share_outside_models_and_weights"] = round(1 - (models + SPENT["weights"]) / total, 4)
    print(json.dumps({**vars(args), **figures}))


if __name__ == "__main__":
    main()
