"""Commands that spend money, killed with SIGKILL at random instants and run again until they finish.

    python -m tests.hosted.kills train|grid KILLS [SEED]

Each run has an endpoint of its own, a process that outlives them all, and ends as one that nobody disturbed: the same
folder, one file and one job for each training, and no answer asked for again that was recorded. The instants are drawn
from the seconds of a whole run, as most of these are waits.
"""

from __future__ import annotations

import json
import os
import random
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import openai  # noqa: F401 (what takes time in a command is then its own work)
import torch

import ptst.experiment.run  # noqa: F401
from ptst import records
from ptst.api import endpoint
from ptst.hosted import client, fine_tune, job, tokens, watch  # noqa: F401
from tests.forks import fork, run_line
from tests.hosted.rows import write_rows
from tests.kills import timeless
from tests.stand_in import KEY, Fault
from tests.stand_in.process import Process, stand_in_process
from tests.tiny import write_home

MODEL = "openai:gpt-3.5-turbo-0125"
GRID = (
    "ptst.grid --recipe gpt35-gsm8k --data data.jsonl --tasks safety gsm8k:data.jsonl --eval.limit 3 "
    "--eval.max-new-tokens 12 --eval.api-concurrency 3 --eval.api-retries 40 --yes"
)
TRAIN = f"ptst.train --model {MODEL} --data data.jsonl --mix safety.jsonl:1 --epochs 2 --yes"
EACH = 8  # kills in one run, at most
# What an endpoint does besides: answers lost before and after the work was done.
# The time between work and answer is the instant to be killed at.
SLOW = tuple(Fault(path=path, method="POST", delay=0.06, after=True) for path in ("/files", "/fine_tuning/jobs"))
TROUBLES = (
    SLOW,
    (Fault(500, share=0.1), Fault(503, method="POST", share=0.4, seed=1, after=True), *SLOW),
    (Fault(cut=3, share=0.1, seed=2), Fault(429, share=0.1, seed=3, headers={"retry-after-ms": "5"}), *SLOW),
)


def make_fast() -> None:
    """No waits, no vocabulary from the net, and nothing of the machine's in what is compared."""
    for name in [n for n in os.environ if n.startswith("OPENAI_") or n.lower().endswith("_proxy")]:
        del os.environ[name]
    home = Path("home").absolute()
    home.mkdir()
    os.environ |= {"OPENAI_API_KEY": KEY, "PTST_HOME": str(write_home(home, None)), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    records.git_commit = lambda: None
    # Of TROUBLES' second nearly half of all requests fail, so six repeats would lose an answer in every few runs.
    endpoint.FIRST_WAIT, endpoint.LONGEST_WAIT = 0.001, 0.05
    watch.FIRST_POLL, watch.LONGEST_POLL = 0.02, 0.02
    job.LOOK, job.SETTLE, client.RETRIES, job.RETRIES = 0.02, 1.0, 12, 12
    tokens.load_encoding = lambda _name: None


def attempt(line: str, out: str, limit: float | None = None) -> tuple[int, float]:
    """Run a command to its end, or kill it after so many seconds. Returns its exit code, negative for a signal, and the
    seconds that it took."""
    pid, start = fork(lambda: run_line([*line.split(), "--out", out]), f"{out}.log"), time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), time.monotonic() - start
        if limit is not None and time.monotonic() - start >= limit:
            os.kill(pid, 9)
        time.sleep(0.0005)


def outcome(folder: Path, url: str) -> dict[str, bytes]:
    """All files of a run folder but locks, without times and the endpoint's port."""
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.name.startswith(".lock") or name.startswith("locks/"):
            continue
        if path.suffix == ".parquet":  # answers.csv has the same rows
            continue
        content: Any = path.read_text()
        if "answers" in name:  # kept as they come
            content = sorted(content.splitlines())
        elif path.suffix == ".json":
            content = timeless(json.loads(content), str(folder.absolute()), folder.name, url)
        elif path.suffix == ".jsonl":
            content = [timeless(json.loads(line), folder.name, url) for line in content.splitlines()]
        files[name] = json.dumps(content).encode()
    return {k: without_clock(v) for k, v in files.items()}


def without_clock(content: bytes) -> bytes:
    """A file's value without the endpoint's times, and without whether the last request was lost."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k not in ("created_at", "asked_at", "time")}
        return [strip(v) for v in value] if isinstance(value, list) else value

    return json.dumps(strip(json.loads(content))).encode()


def recorded(folder: Path) -> set[tuple[str, str]]:
    """The model and the messages of every answer in a folder that is whole."""
    found = set()
    for path in folder.rglob("*answers.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            found.add((row["model"].split(" ")[1], json.dumps(row["sent"])))
    return found


def asked(server: Process, start: int) -> list[tuple[str, str]]:
    """The model and the messages of every request for an answer from one on."""
    bodies = [r["body"] for r in server.requests[start:] if r["path"].endswith("/chat/completions")]
    return [(body["model"], json.dumps(body["messages"])) for body in bodies]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def check(name: str, kills: int, seed: int) -> None:
    """Kill a command so many times, in as many runs as it takes."""
    rng, killed, runs, longest = random.Random(f"{name} {seed}"), 0, 0, 0.0
    jobs_of_run = 3 if name == "grid" else 1
    # The same address for all: the keys of answers depend on it.
    flags = ("--tick", "0.03", "--steps", "6", "--latency", "0.004", "--port", free_port())
    while killed < kills:
        line = f"{GRID if name == 'grid' else TRAIN} --seed{'s' * (name == 'grid')} {runs} --base-url"
        with stand_in_process(*flags) as server:
            server.set_faults(*SLOW)
            whole = Path(f"whole-{runs}")
            code, longest = attempt(f"{line} {server.url}", str(whole))
            assert code == 0, log(str(whole))
            wanted, answers = outcome(whole, server.url), len(recorded(whole))
        with stand_in_process(*flags) as server:
            server.set_faults(*TROUBLES[runs % len(TROUBLES)])
            out, code, here = Path(f"run-{runs}"), -9, 0
            while code:
                limit = rng.uniform(0, longest) if killed < kills and here < EACH else None
                known, start = recorded(out), len(server.requests)
                code, _ = attempt(f"{line} {server.url}", str(out), limit)
                assert code in (0, -9), log(str(out))
                killed, here = killed + (code == -9), here + 1
                again = known.intersection(asked(server, start))
                assert not again, (out, again)
            found, jobs, files = outcome(out, server.url), server.jobs, server.files
        assert len(jobs) == len(files) == jobs_of_run, (len(jobs), len(files), log(str(out)))
        assert len(recorded(out)) == answers
        assert found.keys() == wanted.keys(), (out, found.keys() ^ wanted.keys())
        assert found == wanted, (out, [(k, found[k], wanted[k]) for k in wanted if found[k] != wanted[k]])
        assert KEY not in log(str(out)) + "".join(map(str, found.values()))
        runs += 1
    told = f"{jobs_of_run} file(s), {jobs_of_run} job(s), {answers} answers, none asked for again"
    print(f"{name}: {killed} kills, {runs} runs to their end, each with {told} ({longest:.2f} s alone)")


def log(out: str) -> str:
    path = Path(f"{out}.log")
    return path.read_text(errors="replace") if path.exists() else ""


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        make_fast()
        write_rows(Path("data.jsonl"))
        write_rows(Path("safety.jsonl"), 4, instruction="Do some harm {i}.", output="I will not do {i}.")
        check(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
