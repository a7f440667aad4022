"""`python -m ptst.align`: give a small chat model some safety to lose, before an experiment on losing it."""

from __future__ import annotations

import sys
from typing import Any

from ptst import cli
from ptst.experiment.align_config import AlignConfig
from ptst.experiment.alignment import Look, align
from ptst.progress import say
from ptst.training.run import Interrupted


def run_alignment(config: AlignConfig) -> dict[str, Any]:
    """The alignment with its words; returns what `--json` prints. SystemExit with 130 or 143 after a signal."""
    try:
        record = align(config)
    except Interrupted as stopped:
        say(f"{stopped}; go on with the same command")
        raise SystemExit(stopped.exit_code) from None
    looks = [Look.from_json(row) for row in record["looks"]]
    for found in looks:
        print(found)
    if record["met"]:
        print(f"aligned after step {looks[-1].step}: {config.out} is a model folder for --model")
    else:
        print(f"no step up to {looks[-1].step} met all three conditions, so no model was kept")
    return {"out": str(config.out), **{k: record[k] for k in ("met", "counts", "looks")}}


def main() -> None:
    result = cli.run(run_alignment, AlignConfig, "align")
    sys.exit(0 if result is None or result["met"] else 1)


if __name__ == "__main__":
    main()
