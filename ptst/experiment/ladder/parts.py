"""What a study consists of: a grid folder for every alignment and training data, each worked on in passes.

A pass is a grid of these settings in that folder; later passes add cells. So the whole ladder is tested for safety
alone, and the other tasks at its home rungs, and distances for the models without a defence: each would cost as much
again.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ptst.defense_names import NONE
from ptst.errors import Setting, UserError
from ptst.evaluation.tasks.table import base
from ptst.experiment.config import GridConfig
from ptst.experiment.ladder import gather
from ptst.experiment.ladder.outcomes import data_name
from ptst.experiment.ladder.recipe import CONTROL_RUNGS, CONTROL_TESTS, DISTANCE, EVERYWHERE, HOME, SECOND_RUNGS
from ptst.experiment.ladder.rungs import ALL, RUNGS
from ptst.experiment.plan import slug

AS_IT_IS = "base"  # the alignment's name where the model is tested as it is


@dataclass(frozen=True)
class StudyPart:
    """A grid folder. `align_seed`: of the alignment that its model comes from; None where the model is tested as it is.
    `passes`: settings of its grids, of the model before its alignment."""

    align_seed: int | None
    data: str
    passes: tuple[GridConfig, ...]

    @property
    def folder(self) -> Path:
        return self.passes[0].folder

    @property
    def alignment(self) -> str:
        return AS_IT_IS if self.align_seed is None else f"seed{self.align_seed}"

    @property
    def name(self) -> str:
        """Of the folder, and in what is said of it."""
        return f"{slug(self.data)}.{self.alignment}"

    def of_model(self, folder: Path) -> tuple[GridConfig, ...]:
        """The passes with the aligned model of this folder, which came of the study's model."""
        if self.align_seed is None:
            return self.passes
        return tuple(replace(config, model=str(folder)) for config in self.passes)

    def gathered(self) -> gather.Part:
        return gather.Part(self.folder, self.alignment, self.data, self.passes[0].seeds)


def plan_parts(config: GridConfig) -> list[StudyPart]:
    """The parts of a study, those of its first training data first. Raises UserError for data of the same name."""
    check_distinct_data(config)
    found = list[StudyPart]()
    for data in (config.data, *([config.second_data] if config.second_data else [])):
        for number, seed in enumerate(config.alignments or (None,)):
            name = data_name(data)
            part = StudyPart(seed, name, ())
            seeds = config.seeds[number :: max(1, len(config.alignments))]
            whole = replace(
                config,
                recipe=None,
                defense=config.defended,
                quick=False,
                alignments=(),
                second_data=None,
                control_templates=config.control_templates if data == config.data else (),
                data=data,
                seeds=seeds,
                defenses=config.defenses if data == config.data else (NONE,),
                ladder=_rungs(config) if data == config.data else _rungs(config, SECOND_RUNGS),
                tasks=tuple(_task_for(task, config.data, name) for task in config.tasks),
                out=config.folder / part.name,
            )
            found.append(replace(part, passes=tuple(_passes(whole))))
    return found


def check_distinct_data(config: GridConfig) -> None:
    """Raise UserError for second training data that would be called, and kept, as the first are."""
    if config.second_data and slug(data_name(config.second_data)) == slug(data_name(config.data)):
        cause = (Setting("second_data"), f" {config.second_data} has the name of the data {config.data} in the results")
        raise UserError(cause, "name other data, or rename the file")


def _rungs(config: GridConfig, among: Collection[str] = ()) -> tuple[str, ...]:
    """The rungs that are asked for; only `among` some, where any of these is asked for."""
    every = tuple(RUNGS) if ALL in config.ladder else config.ladder
    return tuple(rung for rung in every if rung in among) or config.ladder


def _passes(config: GridConfig) -> Sequence[GridConfig]:
    """The passes of a part, of which the last is the ladder: the grid's own results are its."""
    controls, config = config.control_templates, replace(config, control_templates=())
    everywhere = tuple(task for task in config.tasks if base(task) in EVERYWHERE)
    far = tuple(task for task in config.tasks if base(task) == DISTANCE)
    home = tuple(task for task in config.tasks if task not in (*everywhere, *far))
    passes = []
    if home:
        passes.append(replace(config, tasks=home, ladder=_rungs(config, HOME)))
    if far:
        undefended = tuple(d for d in config.defenses if d == NONE) or config.defenses
        passes.append(replace(config, tasks=far, defenses=undefended))
    if everywhere and controls:
        control = replace(config, train_templates=controls, defenses=(NONE,), tasks=everywhere)
        passes.append(replace(control, test_templates=CONTROL_TESTS, ladder=CONTROL_RUNGS))
    if everywhere:
        passes.append(replace(config, tasks=everywhere))
    return passes


def _task_for(task: str, main: str, data: str) -> str:
    """A task on the main training data's problems, on those of these data."""
    name, _, rest = task.partition(":")
    known = data_name(main)
    return f"{name}:{data}{rest.removeprefix(known)}" if rest.partition(":")[0] == known else task


def aligned_name(model: str, seed: int) -> str:
    """The folder name of an aligned model; that of seed 0 has no number."""
    return f"aligned-{slug(Path(model).name)}" + (f"-seed{seed}" if seed else "")
