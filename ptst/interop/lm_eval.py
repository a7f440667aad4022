r"""lm-eval's own command line, with the model class `ptst` registered: it has no entry points for model classes.

    python -m ptst.interop.lm_eval --model ptst --model_args checkpoint=RUN,template=chat:llama \
        --apply_chat_template --tasks gsm8k

Without --batch_size and --device these are `auto`: the engine batches as it does, on the GPU if there is one. lm-eval's
own defaults are 1 and cuda:0.
"""

import sys

from ptst.errors import UserError
from ptst.packages import check_package
from ptst.progress import console


def main() -> None:
    try:
        check_package("lm_eval", "lm-eval's tasks need", "lm-eval")
    except UserError as error:
        _fail(error)
    from lm_eval.__main__ import cli_evaluate

    import ptst.interop.harness_model  # noqa: F401 (registers the class)

    sys.argv[:] = with_defaults(sys.argv)
    try:
        cli_evaluate()
    except UserError as error:
        _fail(error)


def with_defaults(arguments: list[str]) -> list[str]:
    """The command line with batch size and device `auto`, unless it names others or runs nothing."""
    given = {a.partition("=")[0] for a in arguments}
    if not given & {"--model", "-M"} or given & {"--config", "-C"}:
        return arguments
    short = {"--batch_size": "-b", "--device": "--device"}
    return arguments + [part for name, other in short.items() if not given & {name, other} for part in (name, "auto")]


def _fail(error: UserError) -> None:
    console.print(f"ptst.interop.lm_eval: {' '.join(str(error).split())}", style="red")
    sys.exit(2)


if __name__ == "__main__":
    main()
