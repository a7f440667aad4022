"""Fine-tune under one template, evaluate under two.

    python examples/train_and_evaluate.py [MODEL]

MODEL: a Hugging Face folder or hub id; the embedded SmolLM2-135M-Instruct without it. The settings are tiny, so that
this takes a minute on a CPU and shows the way, not an effect; leave them out for a real run.
"""

import sys

import ptst

model = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"

run = ptst.fine_tune(ptst.TrainConfig(model=model, template="chat:vanilla", max_steps=2, examples_per_step=4))
loss = run.record.validation_loss
print("validation loss before and after:", loss.before, loss.after)

for template in ("chat:vanilla", "chat:llama"):
    evaluation = ptst.evaluate(
        ptst.EvalConfig(
            checkpoint=run.folder,
            template=template,
            tasks=("gsm8k", "safety"),
            baseline=False,
            limit=4,
            max_new_tokens=8,
        )
    )
    print(template, evaluation.to_json()["results"]["fine-tuned"])
