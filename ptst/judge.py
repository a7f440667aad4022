"""`python -m ptst.judge`: stored answers judged at any time, by any number of judges."""

import sys
from pathlib import Path
from typing import Any

from ptst import cli
from ptst.evaluation.judge_config import JudgeConfig
from ptst.evaluation.judges import JUDGES
from ptst.progress import printable, say


def run_judging(config: JudgeConfig) -> dict[str, Any]:
    """Judge and print the tables; returns what `--json` prints. Raises UserError for a user's mistakes."""
    config.check()
    say("ptst.judge: starting")  # imports take seconds

    from ptst.evaluation.judging import judge_answers
    from ptst.threads import resume_threads

    resume_threads(config.threads, None)
    told = judge_answers(config)
    print(printable(told.pop("markdown")), file=sys.stderr if config.json else sys.stdout, end="")
    say(f"verdicts and report in {told['out']}")
    return told


def one_flag(arguments: list[str], flag: str = "--judge") -> list[str]:
    """Arguments in which a flag that comes several times comes once, with all its values: not with a folder or file
    that follows them."""
    values, rest = list[str](), list[str]()
    in_flag = False
    for argument in arguments:
        if argument.startswith("-"):
            in_flag = argument == flag
        if argument.startswith(f"{flag}="):
            values.append(argument.partition("=")[2])
        elif argument != flag:
            is_path = argument.partition(":")[0] not in JUDGES and Path(argument).exists()
            (values if in_flag and not is_path else rest).append(argument)
    return [*rest, flag, *values] if values or flag in arguments else rest


def main() -> None:
    sys.argv[1:] = one_flag(sys.argv[1:])
    cli.run(run_judging, JudgeConfig, "judge")


if __name__ == "__main__":
    main()
