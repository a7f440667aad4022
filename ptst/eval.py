"""`python -m ptst.eval`: helpfulness and safety of a model, or of a finished run and its base model."""

import time
from typing import Any

from ptst import cli
from ptst.evaluation.config import EvalConfig
from ptst.progress import open_console, say
from ptst.training.launch import refuse_several


def run_evaluation(config: EvalConfig) -> dict[str, Any]:
    """Evaluate and print the table; returns what `--json` prints. Raises UserError for a user's mistakes."""
    began = time.monotonic()
    config.check()
    refuse_several("ptst.eval")
    say("ptst.eval: starting")  # imports and data take seconds

    from ptst.evaluation.evaluate import IncompleteEvaluation, evaluate
    from ptst.threads import choose_threads

    choose_threads(config.threads)
    try:
        result = evaluate(config)
    except IncompleteEvaluation as error:
        open_console(stderr=True).print(error.result.table())
        raise
    told = result.to_json()
    screen = open_console(stderr=config.json)  # with --json, standard output carries the object alone
    screen.print(result.table())
    if told["remark"]:
        screen.print(told["remark"])
    say(f"finished in {time.monotonic() - began:.0f} s; answers and results in {result.out}")
    say(f"another judge of the same answers: ptst judge {result.out} --judge NAME")
    return told


def main() -> None:
    cli.run(run_evaluation, EvalConfig, "eval")


if __name__ == "__main__":
    main()
