"""Do chat formats give the ids that transformers' `apply_chat_template` gives? For a table of chat templates, a folder
is made for each, with a small byte-level tokenizer that has the control tokens which the template names; then random
conversations are encoded both ways. Needs `pip install -e .[bench]`.

    python benchmarks/chat_templates.py TEMPLATES.json                     {name: {"chat_template", "bos_token", ...}}
    python benchmarks/chat_templates.py TEMPLATES.json --json FILE         the figures for machines, too
    python benchmarks/chat_templates.py --masks                            loss masks, where templates have them

Each conversation is `same` (all ids), `named` (a known difference explains the texts' difference), or `wrong`. Loss
masks are compared with `return_assistant_tokens_mask`, which needs templates with `{% generation %}`: five shapes of
such are here.
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from ptst.errors import UserError
from ptst.text.chat_template import open_chat_template
from ptst.text.owner_check import Sides, explain
from ptst.text.probes import probe
from ptst.text.prompt_format import PromptFormat, open_prompt_format
from ptst.text.segments import Conversation, Message
from ptst.text.templates import find_template

TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
MARKER = re.compile(
    r"<\|[^<>|\s]+\|>|<\uff5c[^<>\uff5c]+\uff5c>|</?s>|<(?:start|end)_(?:of_turn|message)>|\[/?[A-Z_]{4,}\]"
)
WORDS = (
    *("the", "sum", "of", "apples", "don't", "na\u00efve", "\u65e5\u672c\u8a9e", "\U0001f600", "x**2", "f(x):", "3.14"),
    *("\n", "\n\n", "    return x", "<b>", "{x}", "%s", "a\tb", "e\u0301", "1,080", "2024"),
)
SPLIT = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_END = "{% endgeneration %}{{ '\n' }}{% else %}"
MASKED = {
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}" + _END + "{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{{ 'assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ '\n\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|eot_id|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|eot_id|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>{{ '\n\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>{{ '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + eos_token }}" + _END + "{{ m.content + eos_token + '\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{{ '\n' }}{% endif %}"
    ),
    "vicuna": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}"
        "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ASSISTANT:' }}"
        "{% else %}{% generation %}{{ ' ' + m.content + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}"
        "{{ '\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<end_of_turn>' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<end_of_turn>' }}{% endif %}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>{{ 'model\n' }}{% endif %}"
    ),
}


def make_folder(folder: Path, entry: dict) -> Path:
    """A folder with a chat template, and a byte-level tokenizer whose control tokens are those that it names."""
    template = entry["chat_template"]
    template = template if isinstance(template, str) else template["default"]
    tokens = {name: entry[name] for name in TOKENS if entry.get(name)}
    markers = MARKER.findall(template)
    if " [/INST]" in template:  # [INST] is text there
        markers = [name for name in markers if "INST" not in name]
    names = list(dict.fromkeys([*tokens.values(), *markers]))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u010a", "\u010a"), ("\u0120", "a"), ("t", "h"), ("th", "e"), ("\u0120", "the"), ("i", "n")]
    vocab = {token: i for i, token in enumerate((*names, *letters, *(a + b for a, b in merges)))}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokens, "chat_template": template}))
    return folder


def conversations(count: int, names: list[str]) -> list[Conversation]:
    """One to five turns; half with a system prompt, one in ten with outer whitespace; some spell control tokens, whose
    ids transformers would put into the message: those are compared as texts."""
    rng = random.Random(0)

    def text() -> str:
        words = " ".join(rng.choices(WORDS, k=rng.randint(1, 12))).strip() or "hi"
        words = words if rng.random() < 0.98 else f"{words} {rng.choice(names)}"
        return f" {words}\n" if rng.random() < 0.02 else words

    out = []
    for _ in range(count):
        turns = [Message(("user", "assistant")[i % 2], text()) for i in range(rng.randint(1, 5))]
        out.append(Conversation((*([Message("system", text())] if rng.random() < 0.5 else []), *turns)))
    return out


def compare(folder: Path, count: int, peer: PreTrainedTokenizerFast) -> tuple[PromptFormat, Counter, str]:
    """How many conversations have the same ids, how many differ by a known difference, and the first wrong one."""
    p = open_prompt_format(folder, find_template("chat:plain"), "plain", allow_role_markers=True)
    probes = probe(open_chat_template(folder, p.tokenizer.implied))
    found: Counter = Counter()
    first = ""
    for row in conversations(count, list(p.tokenizer.control_names.values())):
        messages = [{"role": m.role, "content": m.content} for m in row.messages]
        asked = {"add_generation_prompt": not row.answered}
        try:
            text = peer.apply_chat_template(messages, tokenize=False, **asked)
        except Exception:
            found["refused by theirs"] += 1
            continue
        try:
            ours = p.encode(row, "last")
        except UserError:
            found["refused by ours"] += 1
            continue
        theirs = peer(text, add_special_tokens=False)["input_ids"]
        if ours.ids == list(theirs):
            found["same"] += 1
            continue
        system = row.system
        sides = Sides(p.chat_format, p.tokenizer, system, row.turns, text, probes.default, probes.ignores_flag)
        moved = "system-in-user-turn" in p.chat_format.differences and system is not None
        names = ("system-in-user-turn",) if moved else explain(sides)
        spelled = any(name in m.content for m in row.messages for name in p.tokenizer.control_names.values())
        if names is None and "text-dependent" in p.chat_format.differences:
            names = ("text-dependent",)
        if names == () and ours.token_boundaries:
            names = ("token-boundary",)
        if names == () and spelled:
            names = ("a message spells a control token",)
        if names == () and getattr(peer, "legacy", None) is not None:
            names = ("dummy-space",)
        found[", ".join(names) if names else "wrong"] += 1
        if not names and not first:
            first = f"{messages} ours {p.tokenizer.decode(ours.ids)!r} theirs {text!r}"
    return p, found, first


def templates(path: Path, count: int, out: Path | None) -> None:
    table = json.loads(path.read_text())
    figures = {}
    for name, entry in table.items():
        with tempfile.TemporaryDirectory() as folder:
            here = make_folder(Path(folder) / "model", entry)
            start = time.perf_counter()
            try:
                open_prompt_format(here, find_template("chat:plain"), "plain")
            except UserError as error:
                figures[name] = {"refused": error.cause if isinstance(error.cause, str) else str(error)}
                print(f"{name}: refused: {figures[name]['refused']}")
                continue
            seconds = time.perf_counter() - start
            p, found, first = compare(here, count, PreTrainedTokenizerFast.from_pretrained(here))
        chat_format = p.chat_format.name.partition(":")[0]
        figures[name] = {"chat_format": chat_format, "found": p.found, "seconds": round(seconds, 2), **found}
        print(f"{name}: {chat_format}, {dict(found)} {first}", flush=True)
    opened = [f for f in figures.values() if "refused" not in f]
    wrong = sum(f.get("wrong", 0) > 0 for f in opened)
    print(f"{len(figures)} templates: {len(opened)} open, {wrong} of them wrong, {len(figures) - len(opened)} refused")
    if out:
        out.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")


def masks(count: int) -> None:
    for name, template in MASKED.items():
        with tempfile.TemporaryDirectory() as folder:
            tokens = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
            here = make_folder(Path(folder) / "model", tokens)
            peer = PreTrainedTokenizerFast.from_pretrained(here)
            for chosen in (None, "derived"):
                p = open_prompt_format(here, find_template("chat:plain"), "plain", chosen, allow_role_markers=True)
                rows = [c for c in conversations(count, ["x"]) if c.answered]
                same = 0
                for row in rows:
                    messages = [{"role": m.role, "content": m.content} for m in row.messages]
                    theirs = peer.apply_chat_template(
                        messages, return_assistant_tokens_mask=True, return_dict=True, tokenize=True
                    )
                    ours = p.encode(row)
                    mine = ours.ids, list(map(int, ours.loss_mask))
                    same += mine == (list(theirs["input_ids"]), list(theirs["assistant_masks"]))
                print(f"{name}: {p.chat_format.name}: ids and loss masks agree in {same} of {len(rows)} conversations")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("templates", type=Path, nargs="?")
    flags.add_argument("--count", type=int, default=1000)
    flags.add_argument("--json", type=Path)
    flags.add_argument("--masks", action="store_true")
    args = flags.parse_args()
    # Of the known difference fixed-date, undone here.
    chat_template_utils.datetime = type("Day", (), {"now": staticmethod(lambda: date(2024, 7, 26))})
    if args.templates:
        templates(args.templates, args.count, args.json)
    if args.masks:
        masks(args.count)


if __name__ == "__main__":
    main()
