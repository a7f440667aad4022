"""How much of an evaluation's time goes elsewhere than into the models that answer, score and judge.

    python benchmarks/evaluation.py --model checkpoints/smollm2-135m-instruct --limit 16 --tasks gsm8k safety

CPU time of one process, so that a busy machine does not count: of the whole evaluation, of the sampler, the likelihood
of references, the judge and the similarity's encoder, and of reading the weights. Prints one JSON object.
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

import ptst.evaluation.tasks.helpfulness as helpfulness
import ptst.evaluation.tasks.judged as judged

from ptst import open_model
from ptst.eval import run_evaluation
from ptst.evaluation.config import EvalConfig
from ptst.evaluation.sentence_encoder import SentenceEncoder
from ptst.generation.engine import Engine

SPENT: Counter[str] = Counter()


def timed(owner: object, name: str, what: str) -> None:
    """Replace a function by itself, its CPU seconds added to SPENT[what]."""
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
    parser.add_argument("--max-new-tokens", type=int, help="shorter answers: the share elsewhere grows")
    args = parser.parse_args()
    timed(Engine, "run", "sampler")
    timed(helpfulness, "score", "likelihood")
    timed(judged, "judge_answers", "judge")
    timed(SentenceEncoder, "encode", "encoder")
    timed(open_model, "load_decoder", "weights")
    with tempfile.TemporaryDirectory() as folder:
        asked = {"model": args.model, "limit": args.limit, "tasks": tuple(args.tasks)}
        config = EvalConfig(**asked, max_new_tokens=args.max_new_tokens, out=Path(folder) / "out")
        began = time.process_time()
        run_evaluation(config)
        total = time.process_time() - began
    models = sum(SPENT[k] for k in ("sampler", "likelihood", "judge", "encoder"))
    told = {"total_cpu_s": round(total, 3), **{k: round(v, 3) for k, v in SPENT.items()}}
    told["share_outside_models"] = round(1 - models / total, 4)
    told["share_outside_models_and_weights"] = round(1 - (models + SPENT["weights"]) / total, 4)
    print(json.dumps({**vars(args), **told}))


if __name__ == "__main__":
    main()
