"""Models and cells of a grid from its settings alone, without its data and its model."""

from pathlib import Path

from ptst.evaluation.tasks.table import find_task
from ptst.experiment import plan
from ptst.experiment.config import GridConfig
from ptst.experiment.paper.cells import PaperCell
from ptst.experiment.paper.recipes import measures


def outline(config: GridConfig) -> tuple[list[plan.GridModel], list[plan.GridCell]]:
    """Models and cells, tasks under the names that results will have; rungs of the ladder are made from the data, and
    left out. Raises UserError as `load_templates`, and for an unknown task."""
    train, test = (list(plan.load_templates(names)) for names in (config.train_templates, config.test_templates))
    named = [text.partition("=")[0] for text in config.tuned]
    models = plan.plan_models(train, config.seeds, config.at_epochs, named, config.defenses)
    cells = plan.plan_cells(models, test, [task_key(spec) for spec in config.tasks])
    return models, [c for c in cells if measures(config.recipe, c.model.is_base, c.model.defense, c.task)]


def task_key(spec: str) -> str:
    """The key of a task's results, without reading its data: `safety:advbench` of `safety:advbench:FILE`."""
    task, data = find_task(spec)
    if not data:
        return task.name
    return f"{task.name}:{Path(data).stem if Path(data).suffix and ':' not in data else data.partition(':')[0]}"


def answer_tokens(config: GridConfig, cells: list[plan.GridCell], table: tuple[PaperCell, ...]) -> int | None:
    """Tokens of all answers at their longest, by the sizes of the paper's sets; None for a task of unknown size."""
    sizes = {each.set.removesuffix("-gcg"): each.prompts for each in table}
    names, longest = [cell.task.partition(":")[2] or cell.task for cell in cells], config.eval.max_new_tokens
    if longest is None or not sizes.keys() >= set(names):
        return None
    return sum(min(sizes[name], config.eval.limit) * longest for name in names) * config.eval.decode_seeds
