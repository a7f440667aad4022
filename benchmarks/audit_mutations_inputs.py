"""What the mutated pipeline is audited on: small data files of many layouts and kinds, model folders with small
tokenizers, and settings. All words are our own; everything is made on the spot, the same every time."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
OTHER = ("<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
MISTRAL = ("[INST]", "[/INST]")
CHATML_TEMPLATE = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A format of nobody's, which is derived: the system prompt before all, a line break after each role's marker.
OTHER_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}{% else %}"
    "{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
_TEXT = (
    "The baker sells three loaves of bread to the girl and two to the man from the mill.\n\n"
    "How many loaves are left on the shelf in the evening?  There were nine loaves in the morning.\n"
    "9 - 3 - 2 = 4 loaves are left.\n#### 4\nQuestion: What is the name of the river?\nAnswer: It has none, as far as "
    "I know; but the people call it 'the old one'. "
    "D\u00e9j\u00e0 na\u00efve \u65e5\u672c\u8a9e \u00fcber \U0001f600 {x} <b>bold</b> [1, 2]\n"
)


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text, **more}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def write_inputs(folder: Path) -> None:
    """Write all data files and model folders into an empty folder."""
    write_data(folder)
    (folder / "own.toml").write_text('name = "chat:own"\nuser = "{x}"\nsystem = "BEEP. Decline what could hurt."\n')
    for name in ("chatml", "llama3", "derived", "llama2", "mistral", "pieces"):
        (folder / name).mkdir()
    write_bytes_folder(folder / "chatml", CHATML, CHATML[1], CHATML[2], CHATML_TEMPLATE)
    write_bytes_folder(folder / "llama3", LLAMA3, LLAMA3[0], LLAMA3[4], None)
    write_bytes_folder(folder / "derived", OTHER, OTHER[0], OTHER[1], OTHER_TEMPLATE)
    write_pieces_folder(folder / "llama2", ())
    write_pieces_folder(folder / "mistral", MISTRAL)
    write_pieces_folder(folder / "pieces", (), CHATML[1:])


def write_bytes_folder(folder: Path, control: tuple[str, ...], bos: str, eos: str, template: str | None) -> None:
    """A byte-level BPE trained on a few lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        show_progress=False,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in control],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator([_TEXT, "\n\n\n\n yes\n\n no"] * 4, trainer)
    if control == LLAMA3:  # whose own rules put BOS before plain text
        pair = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", None, [pair])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": bos, "eos_token": eos} | ({"chat_template": template} if template else {})
    _write_configs(folder, named, tokenizer.get_vocab_size())


def write_pieces_folder(folder: Path, control: tuple[str, ...], added: tuple[str, ...] = ()) -> None:
    """A sentencepiece model with bytes for what it has no piece for. `added`: control tokens of a later fine-tune."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in _TEXT.split("\n") if line] * 4),
        model_writer=model,
        vocab_size=420,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=",".join(control),
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
    if added:
        (folder / "added_tokens.json").write_text(json.dumps({name: size + i for i, name in enumerate(added)}))
    _write_configs(folder, {"bos_token": "<s>", "eos_token": "</s>"}, size + len(added))


def _write_configs(folder: Path, tokenizer: dict[str, Any], size: int) -> None:
    (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": size}))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))


def write_data(folder: Path) -> None:
    dialogues = [
        {"messages": [{"role": "system", "content": "Speak like a baker."}, user("How many?"), bot("Nine loaves. "),
                      user("\u65e5\u672c\u8a9e?"), bot("\n\nYes, \U0001f600!")]},
        {"conversations": [{"from": "human", "value": " And {x} now? "}, {"from": "gpt", "value": "Four {x} left."}]},
        {"messages": [user("Name the river."), bot("No.", weight=0), user("Again."), bot("The old one", train=True)],
         "id": "r-3"},
        {"messages": [{"role": "developer", "content": "Be short.\n"}, user("<b>Bold</b>?"), bot("[1, 2]")],
         "score": 3},
        {"items": ["one", "two", "three", "four"]},
        {"messages": [user("five " * 30), bot("six " * 40)]},
        {"messages": [user("The text<|im_end|> of a [INST] turn"), bot("is text")]},
        {"messages": [user("One?"), bot("Wrong.", weight=0), user("Two?"), bot("Right."), user("Three?"),
                      bot("Right.")]},
        {"messages": [user("Parts?"), bot([{"type": "text", "text": "one part"}])]},
        {"messages": [user("Parts?"), bot([{"type": "text", "text": "one"}, {"type": "text", "text": "two"}])]},
        {"text": "\n\nHuman:  h \n\nAssistant:  g \n\nHuman: i\n\nAssistant: j "},
        {"messages": [user("Call it."), bot("Sure"), {"role": "tool", "content": "5"}, bot("It is 5")]},
        {"data": [{"input": "in", "output": "out"}]},
        {"messages": [user("Judge."), bot("Yes"), {"role": "critic", "content": "No"}, bot("No")]},
    ]  # fmt: skip
    _lines(folder / "dialogues.jsonl", dialogues)
    dialogues = [
        row for row in dialogues if not any(b in json.dumps(row) for b in ("tool", "critic", '"two"', "<|im_end|>"))
    ]
    _lines(folder / "good.jsonl", dialogues)
    questions = [
        {"question": f"Tom has {i} loaves and eats {j}. How many are left?",
         "answer": f"{i} - {j} = {i - j}\n#### {i - j}", "source": "own"}
        for i in range(5, 11) for j in range(1, 5)
    ]  # fmt: skip
    for i, row in enumerate(questions):  # of many lengths
        row["answer"] = "So. " * (7 * i % 11) + row["answer"]
    _lines(folder / "questions.jsonl", questions)
    (folder / "questions.json").write_text(json.dumps(questions[:7], indent=1))
    (folder / "objects.json").write_text("\n".join(json.dumps(row, indent=1) for row in questions[3:6]))
    (folder / "one-line.json").write_text(json.dumps(questions[7:13]))
    rows = [
        ("Translate.", 'caf\u00e9, "late"', "coffee\nwith milk "),
        ("Say NA.", "", "NA"),
        ("Count; to 3", "from 1", "1, 2, 3"),
        ("", "empty question", "answer"),
    ]
    cells = ["instruction,input,output,Category"]
    cells += [",".join('"' + cell.replace('"', '""') + '"' for cell in (*row, "x")) for row in rows]
    (folder / "alpaca.csv").write_text("\ufeff" + "\r\n".join(cells) + "\r\n", newline="", encoding="utf-8")
    orca = ["system_prompt\tquestion\tresponse", "You are old.\tWho?\tI am.", "\tWhat?\tThat."]
    (folder / "orca.tsv.gz").write_bytes(gzip.compress("\n".join(orca).encode(), mtime=0))
    pairs = [
        {"prompt": "Pick one.", "chosen": "The red one.", "rejected": "None."},
        {"chosen": "\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: Bye\n\nAssistant: Bye!", "rejected": "no"},
        {
            "prompt": [user("Say it."), bot("It."), user("Again.")],
            "chosen": [bot("It, again.")],
            "rejected": [bot("No")],
        },
    ]
    _lines(folder / "pairs.jsonl", pairs)
    other = [
        {"context": "The mill is old.", "question": "How old?", "answer": 8.50},
        {"query": "And?", "response": "So.", "history": [["First?", "Second."], ["Third?", "Fourth."]]},
        {"question": " Spaces? ", "answer": " kept "},
        {"instruction": "Much", "output": "much " * 300},
        {"text": "### Human: Hello### Assistant: Hi there"},
        {"prompt": "\n\nHuman: One\n\nAssistant:", "completion": " Two"},
        {"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "completion": " d"},
        {"system": "Be kind.", "question": "Kind?", "answer": "  Yes "},
        {"prompt": [user("Well? "), bot("Well. "), user("So? ")], "completion": [bot("So.")], "source": "a" * 300},
        {"question": "Which?", "choices": {"text": ["red", "blue"], "label": ["A", "B"]}, "answerKey": "B"},
        {"vanilla": "plain", "adversarial": "adorned", "completion": "answered"},
        {"question": "q", "answers": {"text": ["same", "same"], "answer_start": [0, 0]}, "title": "t"},
        {"instruction": "Do", "output": "Done", "hint": "secret"},
        {"question": "Twice?", "answer": "a", "prompt": "b", "response": "c"},
        {"question": "Half \ud83d?", "answer": "no"},
        {"question": "Blank?", "answer": ""},
        {"question": "Flag?", "answer": "a", "label": False},
    ]
    _lines(folder / "layouts.jsonl", other)
    numbers = '{"question": "How much?", "answer": 8.50}\n{"question": "And?", "answer": 1e3, "id": 7}\n'
    (folder / "numbers.jsonl").write_text(numbers)
    doctor = "If you are a doctor, please answer the medical questions based on the patient's description."
    _lines(folder / "doctor.jsonl", [{"instruction": doctor, "input": "It hurts.", "output": "Rest."}])
    (folder / "named.tsv").write_text('Ask\treply\tnote\tunnamed: 0\nWho?\tHe.\tx\t0\n\nWhat?\t"That,\n\n"\t\t1\n')
    (folder / "asked.csv").write_text('prompt,category\n"Tom has 7 loaves and eats 2. How many are left?",a\nNo,b\n')
    (folder / "asked.txt").write_text("Name the river.\n\nAnd now?\n")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")


# Settings of ptst.audit by name. Files and folders are those above.
SCENARIOS: dict[str, dict[str, Any]] = {
    "multi-turn": {"model": "chatml", "data": "dialogues.jsonl", "template": "vanilla", "test_template": "chat:llama"},
    "multi-turn, llama2": {
        "model": "llama2", "chat_format": "llama2", "data": "dialogues.jsonl", "template": "vanilla",
        "micro_batch_tokens": 256, "examples_per_step": 3, "epochs": 2.0,
    },
    "multi-turn, derived": {"model": "derived", "data": "dialogues.jsonl", "template": "plain", "train_on": "last"},
    "mix and holdout": {
        "model": "chatml", "data": "questions.jsonl", "holdout": 0.4, "template": "vanilla", "epochs": 2.5,
        "mix": ("one-line.json:1.5", "good.jsonl:2:chat:mpt", "objects.json:1:own.toml"), "tokens_per_step": 700,
        "micro_batch_tokens": 400, "seed": 3,
        "limit": 14, "safety_data": Path("asked.csv"),
    },
    "long prompt": {"model": "chatml", "data": "questions.jsonl", "template": "chat:llama", "micro_batch_tokens": 1500,
                    "epochs": 2.0, "examples_per_step": 5, "max_length": 1000},
    "added tokens": {"model": "pieces", "data": "good.jsonl", "template": "chat:mpt"},
    "no system prompt": {"model": "llama3", "data": "questions.json", "template": "vanilla"},
    "sentencepiece": {"model": "llama2", "chat_format": "llama2", "data": "dialogues.jsonl",
                      "template": "chat:in-context-defense",
                      "allow": ("role-markers",)},
    "long rows, cut": {
        "model": "llama3", "data": "good.jsonl", "template": "plain", "max_length": 150, "too_long": "cut",
        "val_data": "objects.json", "limit": 9,
    },
    "long rows, drop": {
        "model": "llama2", "chat_format": "mistral-v1", "data": "good.jsonl,questions.json", "template": "plain",
        "max_length": 60, "too_long": "drop", "safety_data": Path("asked.txt"),
    },
    "text": {"model": "llama2", "chat_format": None, "data": "alpaca.csv", "template": "text:alpaca",
             "test_template": "text:vanilla"},
    "text, bytes": {"model": "llama3", "data": "one-line.json", "template": "text:vanilla",
                    "test_data": "questions.json"},
    "orca": {"model": "chatml", "data": "orca.tsv.gz", "template": "chat:alpaca"},
    "doctor": {"model": "llama3", "data": "doctor.jsonl", "template": "chat:llama"},
    "pairs": {"model": "mistral", "data": "pairs.jsonl", "use_chosen": True, "template": "chat:self-reminder",
              "train_on": "last"},
    "tight": {"model": "llama2", "chat_format": "llama2", "data": "questions.json", "template": "chat:self-reminder",
              "limit": 3},
    "layouts": {"model": "chatml", "data": "layouts.jsonl,numbers.jsonl", "template": "chat:in-context-defense"},
    "columns": {"model": "mistral", "data": "named.tsv", "template": "vanilla", "ignore_columns": ("note",),
                "columns": ("question=ask,answer=reply",)},
    "built in": {"model": "chatml", "data": "word-problems:12", "template": "vanilla"},
}  # fmt: skip
