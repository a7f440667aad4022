"""settings.json of a grid folder: what makes its rows and cells what they are, so that no two experiments mix in it."""

from __future__ import annotations

import dataclasses
from typing import Any

from ptst.errors import UserError
from ptst.experiment.locks import lock
from ptst.experiment.plan import distinct
from ptst.experiment.run import Grid
from ptst.model.config import read_json
from ptst.model.weights import pick_dtype
from ptst.text.templates import with_default_system_prompt
from ptst.training import run_folder
from ptst.training.resume import differences, weights_fingerprint

# By name, what commands may add to: contents of templates, fingerprints of what is trained on and tested with.
_GROWING = ("templates", "sources", "test_data")


def claim(grid: Grid) -> None:
    """Make the folder a grid of these settings, or add to it what is new: templates and tasks. Raises UserError, with
    the differences, where it is one of others, and where it holds something else."""
    path = grid.out / "settings.json"
    agreed(grid)  # before anything is written there
    with lock(grid.out / "locks", "settings", wait=True):
        now = agreed(grid)
        if not path.exists() or now != read_json(path):
            run_folder.write_json(path, now)


def agreed(grid: Grid, aligned: bool = True) -> dict[str, Any]:
    """The folder's settings with what this grid adds to them; nothing is written. `aligned`: the model that is tested
    is there already. Raises UserError as `claim`."""
    path = grid.out / "settings.json"
    # Looked at before settings.json is: whoever claims the folder writes that first.
    found = [p.name for p in grid.out.iterdir()] if grid.out.exists() else []
    if any(name != "locks" and not name.startswith(".settings.json.") for name in found) and not path.exists():
        raise UserError(f"{grid.out} is no grid folder and not empty; choose another --out, so that nothing mixes")
    model = next(iter(grid.models.values()))
    templates = {name: template for name, (template, _) in {**grid.train_templates, **grid.test_templates}.items()}
    new: dict[str, Any] = {
        "kind": "grid",
        "flags": grid.config.flags(),
        "model_name": grid.config.model,
        "weights": weights_fingerprint(grid.base),
        "chat_format": model.prompt_format.chat_format.name,
        "family": model.prompt_format.family.name,
        "data": grid.config.data,
        "templates": {
            name: dataclasses.asdict(with_default_system_prompt(t, grid.base)) for name, t in templates.items()
        },
        "sources": {name: source.fingerprint for name, source in grid.sources.items()},
        "test_data": {key: data.fingerprint for key, (_, data) in grid.tests.tasks.items()},
        "dtype": str(pick_dtype(grid.config.eval.dtype)).removeprefix("torch."),
    }
    if not path.exists():
        return new
    old = read_json(path)
    if not isinstance(old, dict) or old.get("kind") != "grid" or "flags" not in old:
        raise UserError(f"{path} is not that of a grid; choose another --out")
    if not aligned:
        new |= {key: old.get(key) for key in ("weights", "model_name")}
    kept = {key: old.get(key, {}) for key in _GROWING}
    common = {key: {k: v for k, v in new[key].items() if k in kept[key]} for key in _GROWING}
    was = {key: {k: kept[key][k] for k in common[key]} for key in _GROWING}
    if found := differences(old | was, new | common, frozenset()):
        raise UserError(f"{grid.out} holds a grid of other settings: {'; '.join(found)}; give those, or another --out")
    for key, what in (("templates", "template"), ("test_data", "task")):
        distinct(what, [*kept[key], *new[key]])
    return old | {key: kept[key] | new[key] for key in _GROWING}
