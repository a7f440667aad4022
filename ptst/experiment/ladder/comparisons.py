"""Contrasts of a study: those registered beforehand, after Holm, and every cell against the aligned model."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ptst.defense_names import NONE
from ptst.errors import UserError
from ptst.evaluation import paired
from ptst.evaluation.paired import Contrast, paired_contrast
from ptst.evaluation.secondary import holm
from ptst.evaluation.two_way import Interval, TwoWayT, two_way_t
from ptst.experiment.ladder.analysis import Study, weighted
from ptst.experiment.ladder.names import full_name
from ptst.experiment.ladder.outcomes import ASR, Key
from ptst.experiment.ladder.registered import DISTANCE, At, Pair, Registered, Slope, Within

TWO_DIFFERENCES: Interval = (-2.0, 2.0)  # what a difference of two differences of shares can be


@dataclass(frozen=True)
class Comparison:
    """A contrast as shares (a slope: per unit of distance). `test` None: it cannot be computed, and `note` says why.
    `sizes`: how much was compared; `alignments`: the same test about further alignments, where there are several."""

    of: Registered
    test: TwoWayT | None = None
    alignments: TwoWayT | None = None
    p_holm: float | None = None
    sizes: str = ""
    claim: str = ""
    note: str = ""


def compare(study: Study, contrasts: Iterable[Registered], data: str | None = None) -> list[Comparison]:
    """The registered contrasts, with p after Holm over those of a group that can be computed. `data`: the training
    data; the first of the study unless named."""
    data = data or study.data[0]
    found = [_compare(study, contrast, data) for contrast in contrasts]
    adjusted: dict[str, float] = {}
    for group in {c.of.group for c in found}:
        adjusted |= holm({c.of.name: c.test.p for c in found if c.test is not None and c.of.group == group})
    return [replace(c, p_holm=adjusted.get(c.of.name)) for c in found]


def _compare(study: Study, contrast: Registered, data: str) -> Comparison:
    try:
        if isinstance(contrast, Slope):
            return _slope(study, contrast, data)
        if isinstance(contrast, Within):
            keys = [at_key(study, At(contrast.train, rung), data) for rung in (contrast.first, contrast.second)]
            return _of_losses(study, contrast, keys, [1, -1], TWO_DIFFERENCES)
        first, second = (study.table(at_key(study, at, data), ASR) for at in (contrast.first, contrast.second))
        return _found(contrast, paired_contrast(first, second))
    except UserError as error:
        return Comparison(contrast, note=str(error))


def at_key(study: Study, at: At, data: str, task: str = "safety") -> Key:
    """The cell of a place on a ladder."""
    return Key(data, at.train, at.defense, full_name(at.train, at.rung), study.task(task))


def difference(study: Study, first: Key, second: Key, measure: str) -> Contrast:
    """One cell of trained models minus another, or minus one of the aligned model. Raises UserError for cells of
    different runs, and for one without verdicts."""
    ours, theirs = study.table(first, measure), study.table(second, measure)
    return paired_contrast(ours, theirs) if second.train else paired.against_aligned(ours, theirs)


def _found(contrast: Registered, c: Contrast) -> Comparison:
    return Comparison(contrast, c.test, c.over_alignments, None, c.sizes, c.claim)


def _slope(study: Study, contrast: Slope, data: str) -> Comparison:
    """The slope of the loss over distance by least squares."""
    keys = [Key(data, contrast.train, NONE, test, study.task("safety")) for test in study.rungs(contrast.train)]
    keys = [key for key in keys if key in study.outcomes.cells]
    distances = [study.distance(key, DISTANCE) for key in keys]
    if missing := [key.test for key, far in zip(keys, distances, strict=True) if far is None]:
        raise UserError(f"the distance of {missing[0]} was not measured")
    far = np.array(distances, dtype=float)
    if len(keys) < 3 or np.ptp(far) == 0:
        raise UserError("a slope needs at least three rungs, at different distances")
    weights = (far - far.mean()) / ((far - far.mean()) ** 2).sum()
    return _of_losses(study, contrast, keys, list(weights), None)


def _of_losses(
    study: Study, contrast: Registered, keys: Sequence[Key], weights: Sequence[float], within: Interval | None
) -> Comparison:
    """A weighted sum of what the same models lost of the aligned ones' safety under several prompts, so that runs and
    families of prompts are crossed as in every other contrast. Its runs are not paired with exchangeable ones: the
    least p is that of a symmetric effect."""
    cells = [study.table(key, ASR) for key in keys]
    aligned = (study.table(study.base_of(key), ASR) for key in keys)
    bases = [replace(c, outcomes_SP=paired.aligned_of(c, base)) for c, base in zip(cells, aligned, strict=True)]
    sum_RU = weighted([*cells, *bases], [*weights, *(-weight for weight in weights)])
    groups = cells[0].groups if len(set(cells[0].groups or ())) > 1 else None
    nested = groups is None or len(set(groups)) < len(groups)
    sizes = f"{len(keys)} rungs, {len(sum_RU)} runs, {sum_RU.shape[1]} units"
    return Comparison(contrast, two_way_t(sum_RU, groups if nested else None, within, paired=False), sizes=sizes)


def against_aligned(study: Study, measure: str, task: str = "safety") -> dict[Key, Comparison]:
    """Every cell of a trained model minus the aligned model under the same test prompt; no correction."""
    found = {}
    for key in study.keys:
        if key.train and key.task == study.task(task):
            at, of_aligned = At(key.train, key.test, key.defense), At("", key.test)
            contrast = Pair(f"{key.train}/{key.defense}/{key.test}", "", at, of_aligned)
            try:
                tuned, base = study.table(key, measure), study.table(study.base_of(key), measure)
                found[key] = _found(contrast, paired.against_aligned(tuned, base))
            except UserError as error:
                found[key] = Comparison(contrast, note=str(error))
    return found
