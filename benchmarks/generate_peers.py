"""One run of a peer's generation, as JSON on standard output; started by benchmarks/generate.py, from elsewhere.

    python -P benchmarks/generate_peers.py transformers JOB.json
    python -P benchmarks/generate_peers.py llama.cpp JOB.json

It imports nothing of this project: its folder `kernels` would be taken for the package that transformers looks for.
"""

from __future__ import annotations

import json
import resource
import sys
import time


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def transformers(job: dict) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=getattr(torch, job["dtype"]), attn_implementation="sdpa"
    ).eval()
    pad = job["stop_ids"][0]
    # Prompts of like length together: the fewest pads.
    order = sorted(range(len(job["prompts"])), key=lambda i: len(job["prompts"][i]))

    def answer(indices: list[int], new_tokens: int) -> list[list[int]]:
        prompts = [job["prompts"][i] for i in indices]
        longest = max(map(len, prompts))
        ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=job["stop_ids"],
            pad_token_id=pad,
            prompt_lookup_num_tokens=job.get("lookup"),
        )
        answers = []
        for row in out[:, longest:].tolist():
            end = next((i for i, t in enumerate(row) if t in job["stop_ids"]), len(row))
            answers.append(row[:end])
        return answers

    with torch.inference_mode():
        answer(order[:1], 2)

        def timed(new_tokens: int) -> dict:
            answers: list[list[int]] = [[]] * len(order)
            began, wall = cpu_seconds(), time.perf_counter()
            for start in range(0, len(order), job["batch_size"]):
                group = order[start : start + job["batch_size"]]
                for i, a in zip(group, answer(group, new_tokens), strict=True):
                    answers[i] = a
            result = {"cpu_seconds": cpu_seconds() - began, "seconds": time.perf_counter() - wall}
            return {**result, "tokens": sum(map(len, answers)), "answers": answers}

        first = timed(1) if job.get("decode_alone") else None
        return {**timed(job["new_tokens"]), "first": first}


def llama_cpp(job: dict) -> dict:
    """llama.cpp through xllamacpp's server class: a model file of its own (quantized), its own kernels."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = job["gguf"]
    params.n_parallel = job["batch_size"]
    params.n_ctx = job["batch_size"] * (max(map(len, job["prompts"])) + job["new_tokens"] + 8)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)

    def tokens(prompt: list[int]) -> int:
        request = {"prompt": prompt, "n_predict": job["new_tokens"], "temperature": 0, "cache_prompt": True}
        return server.handle_completions(request)["usage"]["completion_tokens"]

    from concurrent.futures import ThreadPoolExecutor

    began, wall = cpu_seconds(), time.perf_counter()
    with ThreadPoolExecutor(job["batch_size"]) as pool:
        made = sum(pool.map(tokens, job["prompts"]))
    return {"cpu_seconds": cpu_seconds() - began, "seconds": time.perf_counter() - wall, "tokens": made}


if __name__ == "__main__":
    with open(sys.argv[2]) as file:
        job = json.load(file)
    print("RESULT " + json.dumps({"transformers": transformers, "llama.cpp": llama_cpp}[sys.argv[1]](job)), flush=True)
