"""Sample from the base model and from several adapters in one batch.

    python examples/sample_adapters.py [MODEL [RUN ...]]

MODEL: a Hugging Face folder or hub id; the embedded SmolLM2-135M-Instruct without it. RUN: run folders of ptst.train
over that model; without them, two adapters are trained for a single step each.
"""

import sys

import ptst

name = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
runs = sys.argv[2:]
if not runs:
    tiny = {"model": name, "max_steps": 1, "examples_per_step": 1}
    runs = [ptst.fine_tune(ptst.TrainConfig(template=t, **tiny)).folder for t in ("chat:vanilla", "chat:llama")]

model = ptst.open_model(name, "chat:vanilla", family="gsm8k")
question = "Ann has 17 pens and buys 25. How many does she have now?"
adapters = [None, *runs]  # None: the base model
sampling = ptst.Sampling(max_new_tokens=24, temperature=0.7, seed=0)

answers = ptst.generate(model, [question] * len(adapters), sampling, runs=adapters)
for adapter, answer in zip(adapters, answers, strict=True):
    print(f"{adapter or 'base model'}: {answer.text!r} ({len(answer.token_ids)} tokens, {answer.finish_reason})")
