"""`python -m ptst.eval`: helpfulness and safety of a model, or of a finished run and its base model."""

from __future__ import annotations

from typing import Any

from ptst import cli
from ptst.evaluation.config import EvalConfig


def run_evaluation(config: EvalConfig) -> dict[str, Any]:
    """Evaluate and print the table; returns what `--json` prints. Raises UserError for a user's mistakes."""
    from rich.console import Console

    from ptst.evaluation import report
    from ptst.evaluation.evaluate import IncompleteEvaluation, evaluate
    from ptst.progress import say

    try:
        found = evaluate(config)
    except IncompleteEvaluation as error:
        Console(stderr=True).print(report.table(error.result.results, error.result.title, error.result.judge))
        raise
    screen = Console(stderr=config.json)  # with --json, standard output carries the object alone
    screen.print(report.table(found.results, found.title, found.judge))
    record = found.record
    if record["remark"]:
        screen.print(record["remark"])
    say(f"finished in {record['time']['seconds']:.0f} s; answers and figures in {found.out}")
    return {"out": str(found.out)} | {
        k: record[k] for k in ("run", "train_template", "test_template", "results", "remark")
    }


def main() -> None:
    cli.run(run_evaluation, EvalConfig, "eval")


if __name__ == "__main__":
    main()
