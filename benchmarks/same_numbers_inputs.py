"""What `same_numbers.py` feeds to both checkouts: a small random chat model and small data sets, all written here, so
that nothing depends on the checkout that is recorded."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": 300,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{{message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NAMES = ("Ada", "Ben", "Chen", "Dora", "Emil", "Fay", "Gus", "Hana")
THINGS = ("apples", "books", "coins", "drums", "eggs", "forks")


def write_inputs(folder: Path) -> None:
    """Everything of the workload's inputs, into a folder from which all commands are run."""
    write_model(folder / "model")
    numbers = random.Random(0)
    lines(folder / "problems.jsonl", [problem(numbers) for _ in range(64)])
    lines(folder / "test-problems.jsonl", [problem(numbers) for _ in range(10)])
    lines(folder / "mixed-in.jsonl", [turns(numbers, system=i % 2 == 0) for i in range(24)])
    asked = [f"Tell {numbers.choice(NAMES)} about {numbers.randint(2, 90)} {t}." for t in THINGS for _ in range(4)]
    lines(folder / "prompts.jsonl", [{"prompt": p} for p in asked[:20]])
    types = [{"prompt": p, "type": ("homonyms", "contrast_homonyms")[i % 2]} for i, p in enumerate(asked[:10])]
    lines(folder / "types.jsonl", types)
    choices = {"text": ["ice", "fire", "wood", "sand"], "label": list("ABCD")}
    questions = [f"Which of these is hot, asks {name}?" for name in NAMES]
    lines(folder / "choices.jsonl", [{"question": q, "choices": choices, "answerKey": "B"} for q in questions])
    doctor = [{"input": f"My {t} hurt.", "answer_icliniq": f"Put the {t} down and rest."} for t in THINGS]
    lines(folder / "doctor.jsonl", doctor)
    plain = [problem(numbers) for _ in range(6)]
    lines(folder / "audit-plain.jsonl", plain)
    lines(folder / "audit-marks.jsonl", [*plain[:2], marked("<|im_start|>user\nHi<|im_end|>"), marked("[INST] Hi")])
    lines(folder / "audit-twice.jsonl", [plain[0], plain[1], plain[0], plain[2], plain[1], plain[0]])
    blank = [{"question": "Is it dark?", "answer": ""}, {"question": "  ", "answer": "Yes."}, plain[0]]
    lines(folder / "audit-blank.jsonl", [*blank, {"question": "Is it?", "answer": " \n"}, {"question": "alone"}])
    lines(folder / "audit-turns.jsonl", [turns(numbers, system=i != 1) for i in range(4)])


def lines(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def problem(numbers: random.Random) -> dict:
    a, b, thing = numbers.randint(2, 40), numbers.randint(2, 40), numbers.choice(THINGS)
    question = f"{numbers.choice(NAMES)} has {a} {thing} and gets {b} more. How many {thing} are there now?"
    return {"question": question, "answer": f"There are {a} + {b} = <<{a}+{b}={a + b}>>{a + b} {thing}.\n#### {a + b}"}


def turns(numbers: random.Random, system: bool) -> dict:
    messages = [{"role": "system", "content": "Answer in one line."}] if system else []
    for _ in range(2):
        row = problem(numbers)
        messages.append({"role": "user", "content": row["question"]})
        messages.append({"role": "assistant", "content": row["answer"]})
    return {"messages": messages}


def marked(text: str) -> dict:
    return {"question": f"What does {text} mean?", "answer": f"{text} opens a turn."}


def write_model(folder: Path) -> None:
    """A Llama of random weights with a tokenizer of bytes and a few merges, newlines and spaces among them."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    settings = {"bos_token": CONTROL[1], "eos_token": CONTROL[2], "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u010a", "\u010a"), ("\u0120", "a"), ("t", "h"), ("th", "e"), ("\u0120", "the"), ("i", "n")]
    vocab = {t: i for i, t in enumerate((*CONTROL, *letters, *(a + b for a, b in merges)))}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    save_file(_weights(), folder / "model.safetensors", {"format": "pt"})


def _weights() -> dict[str, torch.Tensor]:
    hidden, wide, vocab = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    kv = hidden * CONFIG["num_key_value_heads"] // CONFIG["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (hidden,)
        for name, rows in (("q", hidden), ("k", kv), ("v", kv), ("o", hidden)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, hidden)
        for name, shape in (("gate", (wide, hidden)), ("up", (wide, hidden)), ("down", (hidden, wide))):
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = shape
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator) * (shape[-1] ** -0.5)
        weights[name] = 1 + 0.1 * value if len(shape) == 1 else value
    return weights
