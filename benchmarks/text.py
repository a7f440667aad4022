"""How fast do conversations become token ids with a loss mask? Rows per second of CPU time, ours against transformers'
`apply_chat_template(return_assistant_tokens_mask=True)`, both given all rows at once, in turn in one process. Needs
`pip install -e .[bench]`.

    python benchmarks/text.py                                       word problems, the default model's tokenizer
    python benchmarks/text.py --data gsm8k.jsonl --model FOLDER     other rows, another tokenizer (ChatML or Llama-2)
    python benchmarks/text.py --json FILE                           the figures for machines, too

The peer gets a chat template with `{% generation %}` blocks, which it needs for its mask and few models ship. Ours also
checks, in the time measured, that the prompt is a prefix of the training ids and that the ids decode to the text.
`checked`: ours with every row compared with the audit's reference formats, which encode it again by themselves.
`own_share`, `checked_share`: of the peer's CPU time, the median of all rounds; below 1 ours is faster. Then: the cost
of all the audit's rules, over all rows (once per run) and on every batch, the latter relative to a training step.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # CPU time, not cores, is compared

import torch

from ptst.audit.account.ledger import Ledger, LedgerSource
from ptst.audit.account.step_rule import StepRule
from ptst.audit.documents import check_documents
from ptst.audit.setup import Setup
from ptst.data import sources
from ptst.data.packing import Batch, pack, share_prefixes
from ptst.data.step_batches import MicroBatch
from ptst.model.config import LoraConfig
from ptst.model.lora import add_lora
from ptst.model.loss import batch_loss
from ptst.model.weights import load_decoder
from ptst.text.prompt_format import PromptFormat, open_prompt_format
from ptst.text.templates import find_template
from ptst.training.watch import document_check

DEFAULT = Path("checkpoints/smollm2-135m-instruct")
ROUNDS = 7
TIMES = 20  # that a short piece of work is repeated
# The peer's templates: the same text as ours, with generation blocks around the answers.
PEER = {
    "chatml": (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ m['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
    ),
    "llama2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
}


def seconds(work) -> float:
    """CPU time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def audit_cost(encoded: list, source: sources.Source, prompt_format: PromptFormat, folder: Path) -> dict[str, float]:
    """CPU seconds of all rules over the data, and of training's ledger on one micro-batch; the latter also as a share
    of a training step on it (forward and backward with an adapter), where the folder has weights; and in milliseconds
    per 4,096 tokens."""
    examples = [replace(e, row=i) for i, e in enumerate(encoded)]
    rows, setup = source.conversations, Setup(prompt_format)
    cost = {"audit_s": seconds(lambda: [check_documents(b, rows, setup) for b in pack(examples, 2048)])}
    batch = pack(examples[:64], 2048)[0]
    cost["watch_s"] = min(watch_cost(examples, rows, batch) for _ in range(ROUNDS))
    cost["watch_ms_4096"] = cost["watch_s"] / len(batch.tokens) * 4096 * 1000
    if (folder / "model.safetensors").exists():
        decoder = load_decoder(folder, torch.float32)
        add_lora(decoder, LoraConfig(16, 32.0), 0)
        cost["step_s"] = min(seconds(lambda: batch_loss(decoder, batch, 1.0).backward()) for _ in range(2))
        cost["watch_share"] = cost["watch_s"] / cost["step_s"]
    return cost


def watch_cost(examples: list, rows: tuple, batch: Batch) -> float:
    """CPU seconds in which the ledger of a run checks and counts a micro-batch."""
    own = LedgerSource("data", 1.0, 0, len(rows), tuple(range(len(rows))))
    rule, check = StepRule(2048, len(rows)), document_check(rows, examples)
    taken = MicroBatch([], batch, share_prefixes(batch))
    ledgers = [Ledger([own], rule, check) for _ in range(TIMES)]
    for ledger in ledgers:
        ledger.begin_step(1, 0.0)
    return seconds(lambda: [ledger.take(taken) for ledger in ledgers]) / TIMES


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", default="word-problems:2000")
    flags.add_argument("--model", type=Path, default=DEFAULT)
    flags.add_argument("--template", default="chat:plain")
    flags.add_argument("--chat-format", help="default: as the folder says")
    flags.add_argument("--json", type=Path)
    args = flags.parse_args()

    source = sources.load(args.data)
    template = find_template(args.template)
    prompt_format = open_prompt_format(args.model, template, source.family, args.chat_format)
    chat_format = prompt_format.chat_format.name

    def ours() -> list:
        prompt_format.tokenizer._known.clear()  # of the round before
        return prompt_format.encode_all(source.conversations)

    oracle = Setup(prompt_format).oracle

    def checked() -> None:
        oracle.tokenizer._remembered.clear()
        wanted = oracle.references(source.conversations)
        for example, reference in zip(ours(), wanted, strict=True):
            assert (example.ids, example.loss_mask) == (reference.ids, reference.loss_mask)

    figures = {"rows": len(source.conversations), "format": chat_format, "tokenizer": args.model.name}
    figures |= {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
    encoded = ours()
    figures["tokens"] = sum(len(e.ids) for e in encoded)
    try:
        import transformers

        peer = transformers.AutoTokenizer.from_pretrained(args.model)
    except ImportError:
        peer = None
    if peer is None or args.template != "chat:plain" or chat_format not in PEER:
        figures["ours_s"] = min(seconds(ours) for _ in range(ROUNDS))
    else:
        figures["transformers"] = transformers.__version__
        rows = [[{"role": m.role, "content": m.content} for m in c.messages] for c in source.conversations]
        asked = {"chat_template": PEER[chat_format], "return_assistant_tokens_mask": True, "return_dict": True}

        def theirs() -> dict:
            return peer.apply_chat_template(rows, **asked)

        answers = theirs()
        ids, masks = answers["input_ids"], answers["assistant_masks"]
        figures["same_ids"] = sum(e.ids == list(i) for e, i in zip(encoded, ids, strict=True))
        figures["same_masks"] = sum(list(map(int, e.loss_mask)) == list(m) for e, m in zip(encoded, masks, strict=True))
        turns = [(seconds(ours), seconds(checked), seconds(theirs)) for _ in range(ROUNDS)]
        figures["ours_s"], figures["checked_s"], figures["theirs_s"] = (min(t) for t in zip(*turns, strict=True))
        for at, name in enumerate(("own_share", "checked_share")):
            figures[name] = statistics.median(turn[at] / turn[2] for turn in turns)
    figures |= audit_cost(encoded, source, prompt_format, args.model)
    for key, value in figures.items():
        print(f"{key:>14}  {value:.4g}" if isinstance(value, float) else f"{key:>14}  {value}")
    print(f"{'rows/s':>14}  {figures['rows'] / figures['ours_s']:.0f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
