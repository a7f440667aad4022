"""`python -m ptst.export`: a run as a folder that transformers, peft, vLLM and llama.cpp load."""

from typing import Any

from ptst import cli
from ptst.exporting.config import ExportConfig
from ptst.progress import say


def run_export(config: ExportConfig) -> dict[str, Any]:
    """Export and say what was written; returns what `--json` prints. Raises UserError for a user's mistakes."""
    config.check_settings()
    say(f"ptst.export: opening {config.checkpoint or config.model or 'the latest run'}")  # imports take seconds

    from ptst.exporting.export import export_model

    report = export_model(config)
    for line in report.compared:
        say(line)
    size = sum(report.files.values())
    say(f"wrote {len(report.files)} files, {size / 1e6:.1f} MB, to {report.out}")
    return report.to_json()


def main() -> None:
    cli.run(run_export, ExportConfig, "export")


if __name__ == "__main__":
    main()
