"""Answers of an endpoint per second: `ptst eval`'s asking, recorded, against a bare loop over the client.

    python benchmarks/api_throughput.py [--in-flight 50] [--latency 0.2] [--requests 2000] [--rounds 5]

The bare loop is `AsyncOpenAI` under a semaphore and a gather; it keeps nothing. Ours builds the messages, asks, checks,
and has each answer on disk before the next is asked for. Both ask the same server, a process of its own that answers
after the latency, in turn, each in a new process, so that neither finds the other's connections or garbage.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

KEY = "sk-benchmark"
ANSWER = "It is hard to say. " * 8


async def _serve(latency: float, pipe: Connection) -> None:
    """A server that says the same to everything: HTTP/1.1 with connections kept open."""
    reply = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m-1",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": ANSWER}, "finish_reason": "stop"},
        ],
        "usage": {"prompt_tokens": 150, "completion_tokens": 40, "total_tokens": 190},
    }
    body = json.dumps(reply).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                header = await reader.readuntil(b"\r\n\r\n")
                lines = header.lower().split(b"\r\n")
                length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length"))
                await reader.readexactly(length)
                await asyncio.sleep(latency)
                writer.write(head + body)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    pipe.send(server.sockets[0].getsockname()[1])
    async with server:
        await server.serve_forever()


def _server(latency: float, pipe: Connection) -> None:
    asyncio.run(_serve(latency, pipe))


def _prompts(count: int) -> list:
    from ptst.evaluation.tasks.task import Prompt
    from ptst.text.segments import Conversation, Message

    return [Prompt(Conversation((Message("user", f"Is {i} a prime number?"),), f"row {i}")) for i in range(count)]


def bare(url: str, count: int, in_flight: int) -> float:
    """Seconds of the loop that anybody would write."""
    from openai import AsyncOpenAI

    from ptst.text.templates import TEMPLATES, api_messages

    asked = [api_messages(p.conversation, TEMPLATES["chat:llama"]) for p in _prompts(count)]

    async def run() -> None:
        free = asyncio.Semaphore(in_flight)
        async with AsyncOpenAI(api_key=KEY, base_url=url) as client:

            async def ask(messages: list) -> str | None:
                async with free:
                    done = await client.chat.completions.create(
                        model="m", messages=messages, max_tokens=64, temperature=0, seed=0
                    )
                return done.choices[0].message.content

            assert all(text == ANSWER for text in await asyncio.gather(*map(ask, asked)))

    began = time.perf_counter()
    asyncio.run(run())
    return time.perf_counter() - began


def ours(url: str, count: int, in_flight: int) -> float:
    """Seconds of `ptst eval`'s asking, from prompts to answers on disk."""
    from ptst.api.endpoint import MODEL_KEYS, Address, Endpoint
    from ptst.evaluation.hosted_answers import HostedAnswerer
    from ptst.evaluation.measure import show_progress
    from ptst.generation.request import Sampling
    from ptst.progress import ProgressLine
    from ptst.settings import ApiSettings
    from ptst.text.templates import FAMILIES, TEMPLATES

    settings = ApiSettings(api_concurrency=in_flight)
    endpoint = Endpoint(Address.of(url, MODEL_KEYS), settings.api_timeout, settings.api_retries)
    prompts = _prompts(count)
    with tempfile.TemporaryDirectory() as folder, ProgressLine("answers", count) as line:
        answerer = HostedAnswerer(
            endpoint, "m", TEMPLATES["chat:llama"], FAMILIES["plain"], settings, "m", show_progress(line)
        )
        import openai  # noqa: F401 (as in the bare loop, before the clock starts)

        path = Path(folder, "answers.jsonl")
        began = time.perf_counter()
        answers = answerer.answer(prompts, Sampling(64), path)
        took = time.perf_counter() - began
        assert all(answer.text == ANSWER for answer in answers)
        assert path.read_bytes().count(b"\n") == count
    return took


def _timed(name: str, pipe: Connection, *arguments: object) -> None:
    pipe.send({"bare": bare, "ours": ours}[name](*arguments))  # type: ignore[arg-type]


def measure(name: str, *arguments: object) -> float:
    """In a process of its own."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_timed, args=(name, there, *arguments))
    process.start()
    while process.is_alive() and not here.poll(0.2):
        pass
    seconds = here.recv()
    process.join()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-flight", type=int, default=50)
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = KEY
    for name in [n for n in os.environ if n.lower().endswith("_proxy")]:
        del os.environ[name]
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_server, args=(args.latency, there), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{here.recv()}/v1"
    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    for number in range(args.rounds):
        for name in ("bare", "ours") if number % 2 else ("ours", "bare"):
            rates[name].append(args.requests / measure(name, url, args.requests, args.in_flight))
    server.terminate()
    most = args.in_flight / args.latency
    print(
        f"{args.requests} requests, {args.in_flight} in flight, {args.latency:g} s each: at most {most:.0f} answers/s"
    )
    for name, found in rates.items():
        print(f"{name}: {statistics.median(found):.1f} answers/s ({', '.join(f'{r:.1f}' for r in found)})")
    ratios = [a / b for a, b in zip(rates["ours"], rates["bare"], strict=True)]
    print(f"ours / bare: {statistics.median(ratios):.2f} ({', '.join(f'{r:.2f}' for r in ratios)})")


if __name__ == "__main__":
    main()
