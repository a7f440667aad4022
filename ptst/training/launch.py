"""How this process was started: alone, or as one of several ranks by torchrun, Slurm, MPI or anything that sets RANK,
WORLD_SIZE, MASTER_ADDR and MASTER_PORT. Told by environment variables, without torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from ptst.errors import UserError

# Names by launcher: rank, number of ranks, rank on this node.
_LAUNCHERS = {
    "a launcher": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "mpiexec": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
PATIENCE = 600  # seconds for a step and its checkpoint after a signal; torchrun's own 30 are too few for a large model
_REMEDY = (
    "launch with torchrun --nproc-per-node N -m ptst.train ..., or set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and "
    "MASTER_PORT for every rank"
)


@dataclass(frozen=True)
class Launch:
    """A rank among `size`. `local_rank` None: not told. `nodes`: None where the launcher does not tell it either."""

    rank: int = 0
    size: int = 1
    local_rank: int | None = None
    nodes: int | None = 1
    torchrun: bool = False
    address: str = ""

    @property
    def several(self) -> bool:
        """Whether there is a group of ranks to join; torchrun's may be of one."""
        return self.size > 1 or self.torchrun

    def again(self, arguments: str) -> str:
        """The command that starts ranks like these anew, with other arguments after `python`."""
        if not self.several:
            return f"python {arguments}"
        if not self.torchrun:
            return f"python {arguments} (on {self.size} ranks, by the launcher that started these)"
        torchrun = f"torchrun --shutdown-timeout {PATIENCE}"
        if not self.nodes or self.nodes == 1:
            return f"{torchrun} --nproc-per-node {self.size} {arguments}"
        meet = f"--rdzv-backend c10d --rdzv-endpoint {self.address}:29500"
        each = f"--nnodes {self.nodes} --nproc-per-node {self.size // self.nodes}"
        return f"{torchrun} {each} {meet} {arguments} (on every node)"


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """What the environment tells. Raises UserError where it shows several processes, but not how they find each other:
    each would train on its own."""
    found = next((launcher for launcher in _LAUNCHERS.items() if _size(environ, launcher[1]) > 1), None)
    torchrun = "TORCHELASTIC_RUN_ID" in environ
    if torchrun:
        found = "torchrun", _LAUNCHERS["a launcher"]
    if found is None:
        return Launch()
    name, (rank, size, local) = found
    missing = [key for key in (rank, "MASTER_ADDR", "MASTER_PORT") if not environ.get(key)]
    if missing:
        cause = f"this is one of {environ[size]} processes of {name} ({size}), but {' and '.join(missing)} is not set"
        raise UserError(cause, _REMEDY)
    _check_numbers(environ, rank, size)
    local_rank, nodes = environ.get(local, ""), environ.get("GROUP_WORLD_SIZE", "")
    return Launch(
        _number(environ, rank),
        _number(environ, size),
        int(local_rank) if local_rank.isdecimal() else None,
        int(nodes) if nodes.isdecimal() else None,
        torchrun,
        environ["MASTER_ADDR"],
    )


def refuse_several(command: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise UserError where a launcher has started several processes of a command that computes in one: each would do
    all of the work, in the same folder."""
    for name, names in _LAUNCHERS.items():
        if (size := _size(environ, names)) > 1:
            cause = f"{command} computes in one process, and {name} has started {size} ({names[1]})"
            raise UserError(
                cause, "start one, without a launcher; several processes can share the cells of a ptst.grid"
            )


def worker_ranks(environ: Mapping[str, str] = os.environ) -> tuple[int, int | None]:
    """(rank, rank on this node) of one of several processes that a launcher has started and that need not find each
    other; (0, None) for one alone. The second is None where the launcher does not tell it."""
    for rank, size, local in _LAUNCHERS.values():
        if _size(environ, (rank, size, local)) > 1:
            number = _number(environ, rank) if environ.get(rank) else 0
            return number, int(environ[local]) if environ.get(local, "").isdecimal() else None
    return 0, None


def _size(environ: Mapping[str, str], names: tuple[str, str, str]) -> int:
    """The number of ranks by one launcher's names; 1 where it does not tell."""
    if names[1] == "SLURM_NTASKS" and "SLURM_PROCID" not in environ:
        return 1  # the shell of an allocation, or a script outside of srun
    if not environ.get(names[1]):
        return 1
    if not (size := _number(environ, names[1])):
        raise UserError(f"{names[1]} is 0 in the environment: there is at least one process", _REMEDY)
    return size


def _check_numbers(environ: Mapping[str, str], rank: str, size: str) -> None:
    """Raise UserError for a rank that the group does not have, which would wait for one that nobody starts, and for
    what is no port."""
    number, count, port = _number(environ, rank), _number(environ, size), _number(environ, "MASTER_PORT")
    if number >= count:
        raise UserError(f"{rank} is {number}, and {size} is {count}: ranks go from 0 to {count - 1}", _REMEDY)
    if not 0 < port < 2**16:
        raise UserError(f"MASTER_PORT is {port}", "it must be from 1 to 65535, the same for every rank")


def _number(environ: Mapping[str, str], name: str) -> int:
    if not environ[name].isdecimal():
        raise UserError(f"{name} is {environ[name]!r} in the environment, not a number", _REMEDY)
    return int(environ[name])
