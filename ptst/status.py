"""`python -m ptst.status`: where a grid, a study, a run or an evaluation is."""

import time
from typing import Any

from ptst import cli
from ptst.experiment.status.config import StatusConfig
from ptst.progress import printable


def run_status(config: StatusConfig) -> dict[str, Any]:
    """Print the report of a folder; returns what `--json` prints. Raises UserError for a user's mistakes."""
    from ptst.experiment.status.report import report

    config.check()
    assert config.folder is not None
    while True:
        found = report(config.folder)
        if not config.json:
            more = [f"  left: {what}" for what in found.left] if config.names else []
            print("\n".join(map(printable, [*found.words(), *more])), flush=True)
        if config.every is None or found.state != "running":
            return found.to_json()
        time.sleep(config.every)


def main() -> None:
    cli.run(run_status, StatusConfig, "status")


if __name__ == "__main__":
    main()
