"""`python -m ptst.study`: the outcomes of a study or of grids in one file, and everything computed from them."""

import sys
from typing import Any

from ptst import cli
from ptst.experiment.ladder.study_config import StudyConfig
from ptst.progress import printable, say


def run_command(config: StudyConfig) -> dict[str, Any]:
    """Gather and analyse, or write pages anew; returns what `--json` prints. Raises UserError for a user's mistakes."""
    config.check()
    say("ptst.study: reading")  # imports take seconds

    from ptst.experiment.ladder.analyse import analyse

    told = analyse(config)
    if config.docs is not None:
        say(f"changed: {', '.join(told['changed']) or 'nothing'}")
        return told
    print(printable(told.pop("markdown")), file=sys.stderr if config.json else sys.stdout, end="")
    say(f"outcomes.json, report.md and, of a ladder, ladder.svg in {told['out']}")
    return told


def main() -> None:
    cli.run(run_command, StudyConfig, "study")


if __name__ == "__main__":
    main()
