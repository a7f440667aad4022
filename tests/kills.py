"""Commands killed with SIGKILL at random instants and run again until they finish: the end is as if nothing had been.

    python -m tests.kills MODE KILLS [SEED]

Each attempt is forked from this process, which has run the same command once before: what takes time in a command is
then its own work, not imports. The instant is drawn from the CPU seconds of a whole run, since these do not depend on
what else the machine does.
"""

import json
import math
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from ptst import records
from ptst.data.builtin import alignment_set
from ptst.experiment import alignment
from ptst.experiment.alignment import StepEvaluation
from ptst.generation.request import Sampling
from ptst.training import evaluate, heartbeat, parallel
from tests.forks import fork, run_line
from tests.ports import held_port
from tests.tiny import write_tiny_model

ROWS = [{"instruction": f"What is {i} and {i}?", "response": f"It is {2 * i}."} for i in range(4)]
TRAIN = "ptst.train --data word-problems:12 --val-data word-problems:2 --examples-per-step 2 --seed 3 --save-every 1"
LORA = f"{TRAIN} --rank 2 --eval-every 2"
EVAL = "ptst.eval --checkpoint trained --template chat:llama --tasks safety gsm8k nll --limit 4 --max-new-tokens 6"
GRID = (
    "ptst.grid --train-templates chat:vanilla chat:llama --test-templates chat:llama --tasks safety nll "
    "--data word-problems:2 --train.rank 2 --train.val-data word-problems:2 --train.examples-per-step 1 "
    "--train.save-every 1 --eval.limit 3 --eval.max-new-tokens 4 --eval.batch-size 4"
)
ALIGN = "ptst.align --refused 0 --max-steps 8 --check-every 2 --examples-per-step 3 --lr 1e-2 --own-answers 1"


@dataclass(frozen=True)
class Mode:
    """A command, without its model and folder, and how many processes of it work together."""

    line: str
    processes: int = 1
    ranks: bool = False
    repeatable: bool = False
    """Whether the command may be given again when it has finished."""


MODES = {
    "lora": Mode(f"{LORA} --dropout 0.1"),
    "full": Mode(f"{TRAIN} --full --dtype bfloat16 --eval-every 3 --keep 1"),
    "mixed": Mode(f"{LORA} --mix rows.jsonl:2 word-problems:4:1 --at-epochs 0.5 1"),
    "evaluation": Mode(EVAL),
    "alignment": Mode(ALIGN, repeatable=True),
    "grid": Mode(GRID, processes=2, repeatable=True),
    "ranks": Mode(LORA, processes=2, ranks=True),
    "sharded": Mode(f"{TRAIN} --full --shard full --eval-every 3 --at-epochs 0.5 --keep 1", processes=2, ranks=True),
}


def make_small() -> None:
    """Less of everything that has no setting, for all that is forked from here."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    records.git_commit = lambda: None
    evaluate.MAX_NEW_TOKENS = 4
    heartbeat.BEAT, heartbeat.GRACE, parallel.TO_COME = 0.05, 10.0, timedelta(seconds=20)
    alignment.OWN, alignment.OPENING = Sampling(6, temperature=0.7), Sampling(2)
    harmful, benign = alignment_set.stopping()
    few = alignment_set.harmless()[:3], alignment_set.refusals()[:6], (harmful[:2], benign[:2])
    alignment_set.harmless, alignment_set.refusals, alignment_set.stopping = (lambda one=one: one for one in few)
    StepEvaluation.meets = lambda self, _config, _before: self.step == 6


def run(line: str, out: str) -> None:
    """A command in this process, as the shell starts it."""
    words = line.split()
    run_line([*words, *([] if "--checkpoint" in words else ["--model", "model"]), "--out", out])


def start(mode: Mode, out: str, number: int = 0, port: int = 0) -> int:
    """Start one of the processes of a mode; its words go to a file."""

    def work() -> None:
        if mode.ranks:
            rank = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": mode.processes, "MASTER_PORT": port}
            os.environ |= {k: str(v) for k, v in rank.items()} | {"MASTER_ADDR": "127.0.0.1"}
        run(mode.line, out)

    return fork(work, f"{out}.{number}.log")


def attempt(mode: Mode, out: str, limits: list[float]) -> tuple[list[int], list[float]]:
    """Run all processes to their end, each killed after its limit of CPU seconds. Returns exit codes, negative for a
    signal, and CPU seconds."""
    with held_port() as port:
        return wait_for([start(mode, out, i, port) for i in range(mode.processes)], limits)


def wait_for(pids: list[int], limits: list[float]) -> tuple[list[int], list[float]]:
    codes: dict[int, int] = {}
    spent = [0.0] * len(pids)
    while len(codes) < len(pids):
        for i, pid in enumerate(pids):
            if pid in codes:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[pid] = os.waitstatus_to_exitcode(status)
                continue
            spent[i] = int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
            if spent[i] >= limits[i]:
                os.kill(pid, 9)
        time.sleep(0.0005)
    return [codes[pid] for pid in pids], spent


def is_finished(mode: Mode, out: Path, codes: list[int]) -> bool:
    """Whether there is nothing left to do. The results of a grid, and the model's folder of an alignment, are tidied
    after their record is finished, by the same command."""
    path = out / "run.json"
    finished = path.exists() and json.loads(path.read_text())["status"] == "finished"
    return finished and (not mode.repeatable or not any(codes))


def outcome(folder: Path) -> dict[str, bytes]:
    """All files of a folder but locks and what workers say of themselves, without times; answers, which are kept as
    they come, in their order."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name, content = str(path.relative_to(folder)), path.read_bytes() if path.is_file() else b""
        if path.is_dir() or name.startswith(("locks/", ".lock", "workers/")) or path.name == "state.json":
            continue
        if path.suffix == ".json":
            content = json.dumps(timeless(json.loads(content), str(folder.absolute()), folder.name)).encode()
        elif path.name == "metrics.jsonl":
            content = json.dumps([timeless(json.loads(line)) for line in content.splitlines()]).encode()
        elif "answers" in name:
            content = b"\n".join(sorted(content.splitlines()))
        files[name] = content
    return files


def timeless(value: Any, *names: str) -> Any:
    if isinstance(value, dict):
        return {k: timeless(v, *names) for k, v in value.items() if k not in ("time", "finished_at")}
    if isinstance(value, list):
        return [timeless(v, *names) for v in value]
    for name in names if isinstance(value, str) else ():
        value = value.replace(name, "")
    return value


def check(name: str, kills: int, seed: int) -> None:
    """Kill the processes of a mode so many times, in as many runs as it takes, and compare the end of every run."""
    mode, rng = MODES[name], random.Random(f"{name} {seed}")
    os.mkdir("model")
    write_tiny_model(Path("model"))
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    make_small()
    if name == "evaluation":
        run(LORA, "trained")
    with suppress(SystemExit):
        run(mode.line, "first")
    never = [math.inf] * mode.processes
    codes, takes = attempt(mode, "whole", never)
    assert not any(codes), logs("whole")
    wanted = outcome(Path("whole"))
    killed = runs = 0
    while killed < kills:
        out, codes = Path(f"run-{runs}"), [1]
        while not is_finished(mode, out, codes):
            limits = [rng.uniform(0, seconds) for seconds in takes]
            if mode.processes > 1 and rng.random() < 0.5:
                limits[rng.randrange(mode.processes)] = math.inf  # a survivor
            codes, _ = attempt(mode, str(out), limits if killed < kills else never)
            # A rank ends where another one has been killed.
            others = {1, 2} if mode.ranks and -9 in codes else set()
            assert set(codes) <= {0, -9} | others and "Traceback" not in logs(str(out)), (codes, logs(str(out)))
            killed += codes.count(-9)
        found = outcome(out)
        assert found.keys() == wanted.keys(), (out, found.keys() ^ wanted.keys())
        assert found == wanted, (out, [k for k in wanted if found[k] != wanted[k]])
        runs += 1
        shutil.rmtree(out)
    print(f"{name}: {killed} kills, {runs} runs to their end, each as one alone of {sum(takes):.2f} CPU s", flush=True)


def logs(out: str) -> str:
    return "\n".join(p.read_text(errors="replace")[-3000:] for p in sorted(Path().glob(f"{out}.*.log")))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        check(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
