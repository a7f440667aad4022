"""`python -m ptst.defend`: a safer model from a tuned one, computed in weight space."""

from typing import Any

from ptst import cli
from ptst.defenses.command_config import DefendConfig
from ptst.progress import printable, say


def run_defense(config: DefendConfig) -> dict[str, Any]:
    """Write a defended model and say how it is used; returns what `--json` prints. Raises UserError for a user's
    mistakes."""
    config.check()
    say(f"ptst.defend: opening {config.checkpoint or config.tuned or 'the latest run'}")  # imports take seconds

    from ptst.defenses.write import defend_model
    from ptst.threads import choose_threads

    choose_threads(config.threads)
    record = defend_model(config)
    out = printable(str(config.out))
    if config.adapter_only:
        print(f"{out} is an adapter: --model {printable(record.made_of['aligned']['name'])} --adapter {out}")
    else:
        print(f"{out} is a model folder for --model")
    return {"out": str(config.out), **record.to_json()}


def main() -> None:
    cli.run(run_defense, DefendConfig, "defend")


if __name__ == "__main__":
    main()
