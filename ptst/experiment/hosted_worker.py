"""A worker on a grid of models behind an endpoint: it starts jobs and waits for them, and asks for answers."""

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ptst.errors import UserError
from ptst.evaluation.hosted_answers import ModelFailed, served
from ptst.evaluation.measure import show_progress
from ptst.experiment.hosted_grid import HostedGrid
from ptst.experiment.plan import GridCell, GridModel
from ptst.experiment.workers import Worker
from ptst.progress import ProgressLine


class HostedWorker(Worker):
    """This process's part of the work. What no prompt can pass (a wrong key, no credit) ends it: ModelFailed."""

    grid: HostedGrid

    def _fine_tune(self, model: GridModel) -> None:
        from ptst.hosted.fine_tune import fine_tune_hosted

        self.grid.write_template(model)
        fine_tune_hosted(self.grid.train_config(model))

    def _together(self, first: GridCell, others: Sequence[GridCell]) -> list[GridCell]:
        return [first]

    def _measure(self, cells: Sequence[GridCell]) -> None:
        (cell,) = cells
        if not self._has_sound_answers(cell):
            return
        began, what = time.monotonic(), f"{cell.model.name} under {cell.asked}: {cell.task}"
        with ProgressLine(what, len(self._prompts(cell)), first=None) as progress:
            answerer = replace(self.grid.answerer(cell), on_progress=show_progress(progress))
            try:
                results = self._by_decoding(cell, answerer)
            except ModelFailed:
                raise
            except UserError as error:
                self._fail(cell.name, error)
                return
        self._write(cell, results, {"seconds": time.monotonic() - began})

    def _more(self, cell: GridCell) -> dict[str, Any]:
        counts = served([self.grid.cell_file(cell, "answers.jsonl")]).to_json(self.grid.config.eval.api_price)
        return {"served": {"model": self.grid.name_of(cell.model), **counts}}
