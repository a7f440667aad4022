"""`python -m ptst.serve`: models under templates behind OpenAI's API (docs/serving.md)."""

import sys

from ptst import cli
from ptst.progress import say
from ptst.serving.config import ServeConfig, read_api_key

LISTS = ("--checkpoint", "--adapter", "--template", "--template-file", "--allow")


def run_serve(config: ServeConfig) -> None:
    """Serve until a signal. Raises UserError for a user's mistakes."""
    config.check()
    key = read_api_key(config)
    from ptst.serving.server import bind, check_packages, serve

    check_packages()
    listening = bind(config)
    say("ptst.serve: loading")  # imports take seconds
    with listening:
        from ptst.serving.models import Catalog
        from ptst.threads import choose_threads

        choose_threads(config.threads)
        catalog = Catalog(config)
        for name, model in catalog.models.items():
            say(f"{name}: {model.prompt_format.described}")
        if not serve(config, catalog, key, listening):
            sys.exit(1)


def gathered(arguments: list[str], flags: tuple[str, ...] = LISTS) -> list[str]:
    """Arguments in which a flag that comes several times comes once, with all its values."""
    values: dict[str, list[str]] = {}
    rest: list[str] = []
    current = rest
    for argument in arguments:
        flag, given, value = argument.partition("=")
        if argument.startswith("-"):
            current = values.setdefault(flag, []) if flag in flags else rest
            current += [value] if current is not rest and given else [argument] if current is rest else []
        else:
            current.append(argument)
    return [*rest, *(word for flag, found in values.items() for word in (flag, *found))]


def main() -> None:
    sys.argv[1:] = gathered(sys.argv[1:])
    cli.run(run_serve, ServeConfig, "serve")


if __name__ == "__main__":
    main()
