"""How much there is to compute in a study, before it begins: for its display, and for `ptst status`."""

from collections.abc import Mapping, Sequence

from ptst.experiment.align_estimate import alignment_items
from ptst.experiment.amounts import Amounts
from ptst.experiment.config import GridConfig
from ptst.experiment.grid import Grid
from ptst.experiment.ladder.parts import StudyPart, aligned_name
from ptst.experiment.plan import plan_cells, plan_models
from ptst.experiment.run import align_config
from ptst.experiment.status.items import Items, by_name
from ptst.experiment.status.study_plan import StudyPlan
from ptst.records import CHECKPOINTS


def study_plan(config: GridConfig, parts: Sequence[StudyPart], grids: Mapping[str, Sequence[Grid]]) -> StudyPlan:
    """What there is to do in every part. `grids`: those of the passes over one part of each training data, from whose
    counts the others' follow, which differ in seeds alone."""
    amounts = {data: [Amounts(grid) for grid in found] for data, found in grids.items()}
    items = {part.folder.name: _part(part, amounts[part.data]) for part in parts}
    seeds = dict.fromkeys(part.align_seed for part in parts if part.align_seed is not None)
    folders = [CHECKPOINTS / aligned_name(config.model, seed) for seed in seeds]
    aligned = alignment_items(align_config(config, folders[0]), folders) if folders else {}
    return StudyPlan(config.folder, items, aligned)


def _part(part: StudyPart, amounts: Sequence[Amounts]) -> Items:
    """What there is to do in a part, over all its passes."""
    found: dict = {}
    for of_pass, counted in zip(part.passes, amounts, strict=True):
        grid = counted.grid
        trained, tuned = list(grid.train_templates), list(grid.tuned)
        models = plan_models(trained, of_pass.seeds, of_pass.at_epochs, tuned, of_pass.defenses)
        cells = plan_cells(models, list(grid.test_templates), list(grid.tasks), grid.rungs)
        found |= by_name(counted.items(models, cells))
    return found
