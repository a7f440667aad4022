"""`python -m ptst.tune_kernels`: time attention's block shapes on this machine's GPU, and keep the fastest."""

from dataclasses import dataclass
from itertools import product
from typing import Any

from ptst import cli
from ptst.errors import Setting, UserError
from ptst.progress import printable
from ptst.settings import CommandSettings


@dataclass(frozen=True, kw_only=True)
class TuneKernelsConfig(CommandSettings):
    """Time the block shapes of the attention kernels on this machine's GPU, once; the fastest are kept in
    $PTST_HOME/kernels and used from then on. Results may change in their last digits."""

    head_dims: tuple[int, ...] = (64, 128)
    """Sizes of a head."""
    groups: tuple[int, ...] = (1, 4)
    """Query heads for each key head."""
    tokens: int = 8192
    """Tokens of the document that is timed."""

    def check(self) -> None:
        """Raise UserError for settings that make no sense."""
        for name, values, most in (("head_dims", self.head_dims, 256), ("groups", self.groups, 64)):
            if wrong := [value for value in values if not 1 <= value <= most]:
                raise UserError((Setting(name), f" has {wrong[0]}"), f"each must be from 1 to {most}")
        if not 128 <= self.tokens <= 131072:
            raise UserError((Setting("tokens"), f" is {self.tokens}"), "it must be from 128 to 131072")


def run_tune_kernels(config: TuneKernelsConfig) -> dict[str, Any]:
    """Tune, write the file and print what was chosen; returns what `--json` prints. Raises UserError without a GPU."""
    config.check()
    import torch

    from ptst.kernels.dispatch import triton
    from ptst.kernels.tune import gpu_timer, tune
    from ptst.kernels.tuned import write_tuned

    if not torch.cuda.is_available() or triton is None:
        raise UserError("there is no GPU here, and nothing else uses these kernels", "run it on a machine with one")
    gpu = torch.cuda.get_device_name()
    major, minor = torch.cuda.get_device_capability()
    timer = gpu_timer(config.tokens)
    entries: dict[str, dict[str, Any]] = {}
    path = write_tuned(gpu, {})  # a file that cannot be read or written is told before minutes of timing
    for head_dim, group in product(config.head_dims, config.groups):
        for name, entry in tune(timer, 10 * major + minor, head_dim, group):
            entries[name] = entry
            write_tuned(gpu, {name: entry})  # each at once: an interruption leaves what was found
            if not config.json:
                print(printable(f"{name}: {entry['milliseconds']:.3f} ms with {entry['blocks']}"), flush=True)
    if not config.json:
        print(printable(f"kept in {path}"))
    return {"gpu": gpu, "file": str(path), "entries": entries}


def main() -> None:
    cli.run(run_tune_kernels, TuneKernelsConfig, "tune_kernels")


if __name__ == "__main__":
    main()
