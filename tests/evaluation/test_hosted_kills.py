"""An evaluation of a model behind an endpoint, killed at random instants: the same answers, none asked for twice."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.stand_in import KEY
from tests.stand_in.process import stand_in_process

pytest.importorskip("openai", reason="needs the package openai")

KILLS = 6
PROMPTS = 60


def command(url: str, out: Path) -> list[str]:
    flags = f"--model openai:gpt-4o --base-url {url} --tasks prompts:{out.parent}/requests.jsonl --limit {PROMPTS}"
    more = f"--temperature 1 --decode-seeds 2 --api-concurrency 6 --template chat:llama --out {out}"
    return [sys.executable, "-m", "ptst.eval", *flags.split(), *more.split()]


def answers(out: Path) -> dict[tuple[int, int], str]:
    """Those that are on the disk, without what a kill left of a line."""
    found = {}
    for path in (out / "answers").glob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            assert (row["index"], row["seed"]) not in found
            found[row["index"], row["seed"]] = row["text"]
    return found


def came(requests: list[dict]) -> list[tuple[str, int]]:
    """Prompt and seed of every request; a kill cuts one off while it is sent."""
    whole = [r["body"] for r in requests if "messages" in r["body"]]
    return [(body["messages"][1]["content"], body["seed"]) for body in whole]


@pytest.mark.thorough
@pytest.mark.timeout(600)
def test_killed_at_any_instant_it_asks_for_the_rest(tmp_path):
    (tmp_path / "requests.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {i} twice."}) + "\n" for i in range(PROMPTS))
    )
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith("OPENAI_") and not k.lower().endswith("_proxy")
    }
    environment |= {"PYTHONPATH": str(ROOT), "OPENAI_API_KEY": KEY, "PTST_HOME": os.environ["PTST_HOME"]}
    draw = random.Random(7)
    with stand_in_process("--port", "0", "--latency", "0.1") as server:

        def start(out: str) -> subprocess.Popen:
            line = command(server.url, tmp_path / out)
            return subprocess.Popen(
                line, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
            )

        whole = start("whole")
        assert whole.wait() == 0, whole.communicate()[1].decode()
        asked = len(server.requests)
        assert asked == 2 * PROMPTS
        kills = 0
        while kills < KILLS:
            before = len(answers(tmp_path / "killed"))
            process = start("killed")
            wait = draw.randint(1, 25)  # more answers, then the kill
            while process.poll() is None and len(answers(tmp_path / "killed")) < before + wait:
                time.sleep(0.03)
            if process.poll() is not None:
                assert process.returncode == 0, process.communicate()[1].decode()
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            kept, sent = answers(tmp_path / "killed"), len(server.requests)
            last = start("killed") if kills == KILLS else None
            if last is not None:
                assert last.wait() == 0, last.communicate()[1].decode()
                later = set(came(server.requests[sent:]))
                assert not later & {(f"Say {index} twice.", seed) for index, seed in kept}
        requests = came(server.requests[asked:])
        # Only what was under way at a kill, at most six at once, is asked for again.
        assert len(set(requests)) == 2 * PROMPTS and len(requests) <= 2 * PROMPTS + 6 * KILLS
    assert answers(tmp_path / "killed") == answers(tmp_path / "whole")
    results = [json.loads((tmp_path / out / "results.json").read_text()) for out in ("whole", "killed")]
    for found in results:
        del found["out"]
    assert results[0] == results[1]
