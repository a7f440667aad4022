"""`python -m ptst.align`: align a small chat model, so that an experiment can measure how it loses its safety."""

import sys
from typing import Any

from ptst import cli
from ptst.experiment.align_config import AlignConfig
from ptst.progress import printable, say
from ptst.training.launch import refuse_several


def run_alignment(config: AlignConfig) -> dict[str, Any]:
    """Align with words of progress; returns what `--json` prints. SystemExit with 130 or 143 after a signal."""
    say(f"ptst.align: {config.model}")
    from ptst.experiment.alignment import StepEvaluation, align
    from ptst.threads import choose_threads
    from ptst.training.interrupt import Interrupted

    config.check()
    refuse_several("ptst.align")
    choose_threads(config.threads, config.out)
    try:
        record = align(config)
    except Interrupted as stopped:
        say(f"{stopped}; resume with the same command")
        raise SystemExit(stopped.exit_code) from None
    evaluations = [StepEvaluation.from_json(row) for row in record.evaluations or []]
    for evaluation in evaluations:
        print(printable(str(evaluation)))
    if record.met:
        out = printable(str(config.out))
        print(f"aligned after step {evaluations[-1].step}: {out} is a model folder for --model")
    else:
        print(f"no step up to {evaluations[-1].step} met all three conditions, so no model was kept")
    return {"out": str(config.out), "met": record.met, "counts": record.counts, "evaluations": record.evaluations}


def main() -> None:
    result = cli.run(run_alignment, AlignConfig, "align")
    sys.exit(0 if result is None or result["met"] else 1)


if __name__ == "__main__":
    main()
