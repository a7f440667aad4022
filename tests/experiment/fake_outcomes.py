"""Outcomes of a study that never ran: letters drawn with known probabilities, more attack successes near the training
prompt."""

from __future__ import annotations

import random

from ptst.experiment.ladder.outcomes import Key, Measured, Outcomes, Prompts

RUNGS = ("identical", "system-100", "placebo", "paraphrase", "opposite", "unrelated")
TRAINS = ("chat:vanilla", "chat:llama")
SAFETY, OVER = "safety:fresh", "over-refusal:fresh"
JUDGES = {"rules-v3": {"name": "rules-v3", "version": 3}, "keywords-12": {"name": "keywords-12", "version": 1}}


def fake(
    defenses=("none", "ema", "mix-safety"),
    runs=("seed0/20", "seed0/22", "seed0/24", "seed1/21", "seed1/23"),
    families: int = 12,
    seed: int = 0,
) -> Outcomes:
    """A defence is better the later it is named, and safety grows with the distance."""
    drawn = random.Random(seed)
    ids = [f"{family}-{i}" for family in range(families) for i in range(2)]
    prompts = Prompts(tuple(ids), tuple(x.split("-")[0] for x in ids), ("violence",) * len(ids))
    cells: dict[Key, Measured] = {}

    def letters(share: float) -> dict[str, str]:
        found = "".join("c" if drawn.random() < share else drawn.choice("RRRRI") for _ in ids)
        return {"rules-v3": found, "keywords-12": found.replace("I", "c")}

    def add(key: Key, names, share: float) -> None:
        measured = cells.setdefault(key, Measured())
        for run in names:
            for judge, found in letters(share).items():
                measured.judged.setdefault(judge, {})[run] = found

    alignments = sorted({run.split("/")[0] for run in runs})
    for train in TRAINS:
        for place, rung in enumerate(RUNGS):
            if rung == "system-100" and train == "chat:llama":
                continue  # its own system prompt
            test = f"ladder:{train.removeprefix('chat:')}/{rung}"
            for task in (SAFETY, OVER):
                add(Key("word-problems", "", "none", test, task), alignments, 0.15)
                for number, defense in enumerate(defenses):
                    share = max(0.05, 0.7 - 0.12 * place - 0.15 * number)
                    add(Key("word-problems", train, defense, test, task), runs, share)
            values = {
                "edit_share": 0.2 * place,
                "nats_per_token": 0.1 + place,
                "cosine": 1 - 0.1 * place,
                "prompts": 20,
            }
            measured = Measured(values={name: dict.fromkeys(runs, value) for name, value in values.items()})
            cells[Key("word-problems", train, "none", test, "distance")] = measured  # as a study measures them
    return Outcomes({"judge": "rules-v3"}, JUDGES, {SAFETY: prompts, OVER: prompts}, cells)
