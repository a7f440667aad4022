"""The server against the engine that it runs on: throughput at 32 concurrent requests, and the time to the first token.

    python benchmarks/serve.py --out benchmarks/results/serve.json

The engine alone runs in one process, `python -m ptst.serve` in another, the clients in this one, over loopback. Both
have the same weights, options and prompts (problems under chat:llama, greedy, new ones in every round), and take turns;
a ratio is that of one turn of each, so that what else the machine does meets both. The clients' own work counts against
the server. `threads`: those that compute, in either process. `cpu_ratio`: CPU seconds of the engine's process over
those of the server's, which a busy machine changes little; the clients' are not in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TEMPLATE = "chat:llama"


def questions(count: int) -> list[str]:
    """Different problems, as many as asked for."""
    from ptst.data import sources

    found = [c.messages[-2].content for c in sources.load(sources.DEFAULT, "train").conversations]
    return [f"{found[i % len(found)]} (Problem {i}.)" for i in range(count)]


def engine_alone(args: argparse.Namespace) -> None:
    """In the child process: a turn for each line of standard input, {"questions", "new_tokens", "batch"}."""
    import torch

    from ptst.generation.engine import Engine
    from ptst.generation.request import EngineOptions, Request, Sampling
    from ptst.open import open_model
    from ptst.text.segments import Conversation, Message

    torch.set_num_threads(args.threads)
    model = open_model(str(args.model), TEMPLATE)
    p = model.prompt_format
    options = EngineOptions(args.concurrent, args.max_length)
    engine = Engine(model.load(), p.stop_ids, options, decode=p.tokenizer.decode_answer)
    print("ready", flush=True)
    for line in sys.stdin:
        turn = json.loads(line)
        ids = [p.encode(Conversation((Message("user", q),))).ids for q in turn["questions"]]
        sampling = Sampling(turn["new_tokens"])
        began, first, done = time.perf_counter(), {}, {}

        def on_event(event, began=began, first=first):
            if event.token_ids or event.answer:
                first.setdefault(event.id, time.perf_counter() - began)

        requests = [
            Request(prompt, sampling, i, keep_cached=True, stream=turn["stream"]) for i, prompt in enumerate(ids)
        ]
        engine.run(requests, done.__setitem__, on_event)
        seconds = time.perf_counter() - began
        answers = [done[i].text for i in range(len(ids))]
        tokens = sum(len(done[i].token_ids) for i in range(len(ids)))
        print(
            json.dumps({"seconds": seconds, "tokens": tokens, "first": list(first.values()), "answers": answers}),
            flush=True,
        )


class Served:
    """Clients of the server, each with a connection of its own."""

    def __init__(self, port: int, model: str, process: subprocess.Popen):
        self.port, self.model, self.process = port, model, process

    def turn(self, turn: dict, concurrent: int) -> dict:
        return asyncio.run(self._turn(turn, concurrent))

    async def _turn(self, turn: dict, concurrent: int) -> dict:
        queue = list(enumerate(turn["questions"]))[::-1]
        answers: list[str] = [""] * len(queue)
        first: list[float] = []
        tokens = 0

        async def client() -> None:
            nonlocal tokens
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            while queue:
                index, question = queue.pop()
                body = {"model": self.model, "messages": [{"role": "user", "content": question}], "temperature": 0}
                body |= {"max_tokens": turn["new_tokens"], "stream": turn["stream"]}
                data = json.dumps(body).encode()
                head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                sent = time.perf_counter()
                writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
                length = 0
                while (line := (await reader.readline()).strip()) != b"":
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split()[1])
                if not turn["stream"]:
                    reply = json.loads(await reader.readexactly(length))
                    answers[index] = reply["choices"][0]["message"]["content"]
                    tokens += reply["usage"]["completion_tokens"]
                    first.append(time.perf_counter() - sent)
                    continue
                begun = False
                while (size := int(await reader.readline(), 16)) > 0:
                    chunk = await reader.readexactly(size + 2)
                    if chunk.startswith(b"data: {"):
                        choice = json.loads(chunk[6:])["choices"][0]
                        text = choice["delta"].get("content") or ""
                        answers[index] += text
                        if not begun and (text or choice["finish_reason"]):
                            first.append(time.perf_counter() - sent)
                            begun = True
                await reader.readline()
            writer.close()

        began = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(min(concurrent, len(queue)))))
        return {"seconds": time.perf_counter() - began, "tokens": tokens, "first": first, "answers": answers}


class Alone:
    """The engine's process."""

    def __init__(self, args: argparse.Namespace, environment: dict):
        command = [sys.executable, __file__, "--child", *sys.argv[1:]]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        assert self.process.stdout.readline() == "ready\n"

    def turn(self, turn: dict, _concurrent: int) -> dict:
        self.process.stdin.write(json.dumps(turn) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


def start_server(args: argparse.Namespace, environment: dict) -> Served:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "ptst.serve", "--model", str(args.model), "--template", TEMPLATE]
    command += ["--port", str(port), "--batch-size", str(args.concurrent), "--max-length", str(args.max_length)]
    command += ["--threads", str(args.threads), "--dtype", "float32"]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as answer:
                return Served(port, json.load(answer)["data"][0]["id"], process)
        except OSError:
            assert process.poll() is None, "the server has ended"
            time.sleep(0.2)


def measure(args: argparse.Namespace) -> dict:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(args.threads)}
    alone = Alone(args, environment)
    served = start_server(args, environment)
    ask = iter(questions(args.rounds * (args.requests + 2 * args.concurrent + args.single) + 16))
    take = lambda n: [next(ask) for _ in range(n)]  # noqa: E731
    both = {"engine": alone, "served": served}
    cases = {
        "throughput": (args.requests, args.new_tokens, False, args.concurrent),
        "throughput, streamed": (args.concurrent, args.new_tokens, True, args.concurrent),
        "first token, alone": (1, 1, True, 1),
        "first token, all at once": (args.concurrent, 1, True, args.concurrent),
    }
    rows: list[dict] = []
    try:
        for which in both.values():
            which.turn({"questions": take(2), "new_tokens": 2, "stream": True}, 2)
        for number in range(args.rounds):
            for case, (count, new_tokens, stream, concurrent) in cases.items():
                for _ in range(args.single if count == 1 else 1):
                    turn = {"questions": take(count), "new_tokens": new_tokens, "stream": stream}
                    order = list(both) if number % 2 else list(both)[::-1]
                    found = {name: timed(both[name], turn, concurrent) for name in order}
                    rows.append(row(case, found))
                    print(rows[-1], flush=True)
    finally:
        alone.process.kill()
        served.process.terminate()
        served.process.wait(30)
    return summary(rows, args)


def timed(which: Alone | Served, turn: dict, concurrent: int) -> dict:
    """A turn, with the CPU seconds of the process that computes it."""
    before = cpu_seconds(which.process.pid)
    found = which.turn(turn, concurrent)
    return {**found, "cpu": cpu_seconds(which.process.pid) - before}


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process, by Linux's account."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def row(case: str, found: dict[str, dict]) -> dict:
    """One turn of each: the server's value over the engine's."""
    same = sum(a == b for a, b in zip(found["engine"]["answers"], found["served"]["answers"], strict=True))
    out = {"case": case, "same_answers": same, "of": len(found["engine"]["answers"])}
    for name, turn in found.items():
        tokens = found["engine"]["tokens"]  # equal answers, so equal work
        value = tokens / turn["seconds"] if case.startswith("throughput") else sum(turn["first"]) / len(turn["first"])
        out[name] = round(value, 4)
    ratio = out["served"] / out["engine"]
    return {**out, "ratio": round(ratio, 4), "cpu_ratio": round(found["engine"]["cpu"] / found["served"]["cpu"], 4)}


def summary(rows: list[dict], args: argparse.Namespace) -> dict:
    out: dict = {"concurrent": args.concurrent, "threads": args.threads, "new_tokens": args.new_tokens, "cases": {}}
    for case in dict.fromkeys(r["case"] for r in rows):
        own = [r for r in rows if r["case"] == case]
        ratios = sorted(r["ratio"] for r in own)
        out["cases"][case] = {
            "ratio": median(ratios),
            "lowest": ratios[0],
            "highest": ratios[-1],
            "cpu_ratio": median(r["cpu_ratio"] for r in own),
            "engine": median(r["engine"] for r in own),
            "served": median(r["served"] for r in own),
            "turns": len(own),
            "same_answers": f"{sum(r['same_answers'] for r in own)} of {sum(r['of'] for r in own)}",
        }
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=None, help="model folder; left out: the embedded model")
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64, help="in a turn of throughput")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--single", type=int, default=4, help="turns of a single request in a round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.model = args.model or "smollm2-135m-instruct"
    if args.child:
        engine_alone(args)
        return
    from benchmarks.measure import machine, write_json

    result = {**measure(args), "model": str(args.model), "machine": machine()}
    print(json.dumps(result, indent=1))
    if args.out:
        write_json(args.out, result)


if __name__ == "__main__":
    main()
