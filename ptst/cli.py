"""What every command shares: settings from flags and files, one sentence for a user's mistake, the `ptst` command.

Standard output carries the result alone (with `--json`, one object as its last line); progress goes to standard error.
Modules that take seconds to import are imported by a command's `run`, after its command line has been parsed.
"""

import dataclasses
import errno
import importlib
import os
import re
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from types import FrameType
from typing import Any, TypeVar, get_type_hints

import ptst.ctrl_c  # noqa: F401 (before the imports that take time)
from ptst.audit.findings import OLD_RULES
from ptst.errors import UserError, unknown_name
from ptst.settings import CommandSettings

Config = TypeVar("Config", bound=CommandSettings)

COMMANDS = {
    "train": "fine-tune a chat model under a template",
    "eval": "measure helpfulness and safety under a template",
    "grid": "the whole matrix of training and test templates",
    "judge": "judge stored answers, by several judges",
    "report": "one page from the folder of a grid, a study or an evaluation",
    "status": "where a grid, a study or a run is: done, running, left, failed",
    "study": "outcomes of a study in one file; its tables, contrasts and figure",
    "audit": "show and check every token that reaches the loss",
    "chat": "talk to a model under a template",
    "export": "write a run as a folder that other programs load",
    "serve": "serve models under templates by OpenAI's API",
    "push": "upload a run or an exported folder to the hub",
    "align": "give a small chat model some safety to lose",
    "defend": "compute a safer model from a tuned one, in weight space",
    "tune-kernels": "time the attention kernels' block shapes on this machine's GPU",
}
# Earlier spellings, for one version.
_OLD_FLAGS = {"micro-tokens": "micro-batch-tokens", "recompute": "activation-checkpointing"}
_OLD_SWITCHES = {"tensorboard": ("log", "tensorboard")}  # a flag without a value, and the flag and value that it is now


@contextmanager
def _quiet_pipe() -> Iterator[None]:
    """Inside, a reader that goes away (`| head`) ends the command as it ends any other."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()  # or the interpreter does it at its end, with a traceback
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)


def _is_unread() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except OSError:  # no file (a test's, a notebook's)
        return False
    return any(event & select.POLLERR for _, event in poll.poll(0))


@_quiet_pipe()
def main() -> None:
    """The console command: `ptst train ...` is `python -m ptst.train ...`."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in ("-h", "--help"):
        print("usage: ptst COMMAND [flags]; ptst COMMAND --help lists them\n")
        print("\n".join(f"  {command:14}{meaning}" for command, meaning in COMMANDS.items()))
    elif name == "--version":
        from ptst import __version__

        print(f"ptst {__version__}")
    elif name in COMMANDS:
        sys.argv[:2] = [f"ptst {name}"]
        module = "audit.__main__" if name == "audit" else name.replace("-", "_")
        importlib.import_module(f"ptst.{module}").main()
    else:
        _fail("ptst", str(unknown_name("command", name, COMMANDS)))


@_quiet_pipe()
def run(
    command: Callable[[Config], dict[str, Any] | None],
    config_type: type[Config],
    name: str,
    start: Callable[[list[str]], tuple[Config, str] | None] = lambda _arguments: None,
) -> dict[str, Any] | None:
    """Parse the command line into `config_type`, call `command`, return its result. A user's mistake exits with 2,
    Ctrl-C with 130; a bug keeps its traceback. `start`: from the arguments, the settings to start from and a
    description for --help (a recipe's, say)."""
    arguments = _renamed(sys.argv[1:])
    prog = f"ptst.{name}"
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _acknowledge)
    try:
        import tyro

        default, description = start(arguments) or (config_type(), "")
        if file := value_of(arguments, "--config"):
            from ptst.config_file import read_config

            default = read_config(file, default, name)
        config = tyro.cli(config_type, prog=prog, args=arguments, default=default, description=description or None)
        if config.print_config:
            from ptst.config_file import to_toml

            print(to_toml(config), end="")
            return None
        result = command(config)
    except (Exception, KeyboardInterrupt) as error:
        _end(error, prog, config_type, "--debug" in arguments)
        raise
    if config.json and result is not None:
        from ptst.progress import printable_json

        print(printable_json(result))
    return result


def _end(error: BaseException, prog: str, config_type: type, debug: bool) -> None:
    """Exit with a sentence for what is no bug; returns for a bug, which keeps its traceback."""
    if isinstance(error, KeyboardInterrupt) or (_comes_of_interrupt(error) and not debug):
        _fail(prog, "stopped", 128 + signal.SIGINT)
    if debug or (isinstance(error, BrokenPipeError) and _is_unread()):
        return
    if isinstance(error, (UserError, OSError)):
        _fail(prog, _sentence(error, config_type))
    if isinstance(error, ModuleNotFoundError) and (error.name or "ptst").partition(".")[0] != "ptst":
        _fail(prog, f"the package {error.name} is not installed; the installation is incomplete: install ptst again")


def _comes_of_interrupt(error: BaseException) -> bool:
    """Whether Ctrl-C made an import fail, say."""
    before: BaseException | None = error
    while before is not None and not isinstance(before, KeyboardInterrupt):
        before = before.__cause__ or before.__context__
    return before is not None


def _acknowledge(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: a word at once, though cleaning up may take a moment."""
    with suppress(OSError):  # nobody may be there to read it
        os.write(sys.stderr.fileno(), b"\nstopping ...\n")
    signal.default_int_handler(number, frame)


def _sentence(error: Exception, config_type: type) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}the disk is full; make room, and run this again"
    if not isinstance(error, UserError):
        return str(error)
    return error.tell(lambda setting: flag_of(config_type, setting, error.group))


def flag_of(config_type: type, setting: str, group: str = "") -> str:
    """A setting as it is typed: in the group that the message speaks of, where that has it."""
    spelled = setting.replace("_", "-")
    kind = get_type_hints(config_type).get(group)
    in_group = kind is not None and setting in {f.name for f in dataclasses.fields(kind)}
    return f"--{group}.{spelled}" if in_group else f"--{spelled}"


def value_of(arguments: list[str], flag: str) -> str | None:
    """What follows a flag on the command line, before that is parsed."""
    after = [b for a, b in pairwise(arguments) if a == flag]
    return next(iter(after + [a.partition("=")[2] for a in arguments if a.startswith(f"{flag}=")]), None)


def _renamed(arguments: list[str]) -> list[str]:
    """Arguments with earlier spellings of flags replaced, each with a note."""
    out: list[str] = []
    added: dict[str, list[str]] = {}
    for argument in arguments:
        found = re.fullmatch(r"--((?:train\.|eval\.)?)([a-z_-]+)(=.*)?", argument)
        if found and found[2] in _OLD_SWITCHES and not found[3]:
            flag, value = _OLD_SWITCHES[found[2]]
            print(f"note: --{found[1]}{found[2]} is now --{found[1]}{flag} {value}", file=sys.stderr)
            added.setdefault(f"--{found[1]}{flag}", []).append(value)
            continue
        new = found and _OLD_FLAGS.get(found[2].replace("_", "-"))
        if found and new:
            print(f"note: --{found[1]}{found[2]} is now --{found[1]}{new}", file=sys.stderr)
            argument = f"--{found[1]}{new}{found[3] or ''}"
        elif argument in OLD_RULES and "allow" in next((a for a in reversed(out) if a.startswith("--")), ""):
            print(f"note: the audit rule {argument} is now {OLD_RULES[argument]}", file=sys.stderr)
            argument = OLD_RULES[argument]
        out.append(argument)
    for flag, values in added.items():  # together with values that are given
        place = out.index(flag) + 1 if flag in out else len(out)
        out[place:place] = values if flag in out else [flag, *values]
    return out


def _fail(prog: str, error: object, code: int = 2) -> None:
    from ptst.progress import console

    console.print(f"{prog}: {' '.join(str(error).split())}", style="red" if code == 2 else "")
    sys.exit(code)
