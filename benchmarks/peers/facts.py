"""What a library trains, read from its batches alone: which tokens of a conversation are labels, where documents begin,
what was cut, doubled or left out. Nothing here uses ptst, so that the audit's findings can be held against it.

A document's tokens are spelled as bytes, the messages are searched in them in order, and each token gets a part:

    bos, open        before the first message
    system, user, answer
    header, join     between a question and its answer: role markers; a lone space that joins the answer to them
    close            between an answer and the token that ends it (Llama 2's space)
    end              the control token that ends an answer
    after            behind it, up to the next message
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

IGNORED = -100
PARTS = ("bos", "open", "system", "user", "header", "join", "answer", "close", "end", "after")
LENGTHS = ("cu_seq_lens_q", "cu_seqlens")


class Speller:
    """The bytes of each token of a folder's tokenizer.json, and which ids are control tokens."""

    def __init__(self, folder: Path):
        read = json.loads((folder / "tokenizer.json").read_text())
        byte_level = "ByteLevel" in json.dumps(read.get("decoder"))
        self._bytes: dict[int, bytes] = {}
        letters = {letter: byte for byte, letter in enumerate(_byte_letters())}
        for token, i in read["model"]["vocab"].items():
            if byte_level:
                self._bytes[i] = bytes(letters[c] for c in token if c in letters)
            elif len(token) == 6 and token.startswith("<0x"):
                self._bytes[i] = bytes([int(token[3:5], 16)])
            else:
                self._bytes[i] = token.replace("\u2581", " ").encode()
        self.control = set()
        for added in read["added_tokens"]:
            self._bytes[added["id"]] = added["content"].encode()
            if added["special"]:
                self.control.add(added["id"])
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        ids = {added["content"]: added["id"] for added in read["added_tokens"]}
        self.bos = ids.get(settings.get("bos_token"))

    def __call__(self, token: int) -> bytes:
        return self._bytes.get(token, b"\xff")

    def words(self, ids: list[int]) -> str:
        return "|".join(self(i).decode(errors="replace") for i in ids)


def _byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@dataclass
class Document:
    """One document of a batch. `inside`: it does not begin its row, so its first token may be predicted as well."""

    ids: list[int]
    labels: list[int]
    positions: list[int] | None
    inside: bool

    @property
    def trained(self) -> list[bool]:
        """Which tokens the loss asks for; the first of a row is predicted by none."""
        return [label != IGNORED and (i > 0 or self.inside) for i, label in enumerate(self.labels)]


def documents(batch: dict) -> Iterator[Document]:
    """A batch's documents: by lengths, by a numbered mask, by positions that begin again, else one in each row."""
    rows, labels = batch["input_ids"], batch["labels"]
    masks = batch.get("attention_mask") or _masks(rows, labels)
    positions = batch.get("position_ids")
    for i, row in enumerate(rows):
        place = positions[i] if positions else None
        starts = _starts(batch, i, masks[i], place, len(row))
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            kept = [t for t in range(start, end) if masks[i][t]]
            if kept:
                first, last = kept[0], kept[-1] + 1
                own = place[first:last] if place else None
                made = Document(row[first:last], labels[i][first:last], own, inside=start > starts[0])
                if len(set(made.ids)) > 1 or any(made.trained):  # else padding that the arrays count as tokens
                    yield made


def _masks(rows: list, labels: list) -> list[list[int]]:
    """Which tokens are no padding, where a library gives no mask: the row with the longest ignored run of one id at
    its end shows what pads."""
    runs = [_run(ids, marks) for ids, marks in zip(rows, labels, strict=True)]
    pad = max(zip(runs, [ids[-1] for ids in rows], strict=True))
    masks = []
    for ids, run in zip(rows, runs, strict=True):
        cut = run if pad[0] > 1 and ids[-1] == pad[1] else 0
        masks.append([1] * (len(ids) - cut) + [0] * cut)
    return masks


def _run(ids: list[int], labels: list[int]) -> int:
    length = 0
    while length < len(ids) and ids[-1 - length] == ids[-1] and labels[-1 - length] == IGNORED:
        length += 1
    return length


def _starts(batch: dict, row: int, mask: list[int], positions: list[int] | None, size: int) -> list[int]:
    for name in LENGTHS:
        if batch.get(name):
            flat = batch[name] if isinstance(batch[name][0], int) else batch[name][row]
            return [start for start in flat if start < size]
    if batch.get("seq_lens"):
        sums = [0]
        for length in batch["seq_lens"][row][:-1]:
            sums.append(sums[-1] + length)
        return [start for start in sums if start < size]
    if max(mask, default=0) > 1:
        return [i for i in range(size) if i == 0 or mask[i] != mask[i - 1]]
    if positions is not None and any(positions):
        return [i for i in range(size) if i == 0 or (positions[i] == 0 and mask[i])]
    return [0]


@dataclass
class Parts:
    """Counts over documents. `trained` and `total` by part."""

    trained: Counter = field(default_factory=Counter)
    total: Counter = field(default_factory=Counter)
    seen: Counter = field(default_factory=Counter)
    sample: dict[str, str] = field(default_factory=dict)  # the first trained tokens of a part, as text


def take_apart(document: Document, rows: list, speller: Speller, into: Parts) -> list[int]:
    """Count the document's tokens by part; returns the rows that begin in it."""
    pieces = [speller(i) for i in document.ids]
    text = b"".join(pieces)
    begun = sorted((at, number) for number, row in enumerate(rows) if (at := _begin(text, row)) >= 0)
    into.seen["documents"] += 1
    into.seen["joined"] += len(begun) > 1
    into.seen["headless"] += not begun
    starts_with = document.ids[:2]
    into.seen["bos"] += starts_with[:1] == [speller.bos]
    into.seen["double_bos"] += starts_with == [speller.bos] * 2
    into.seen["positions_from_zero"] += document.positions is not None and document.positions[0] == 0
    marks = bytearray(len(text))  # the part of each byte, by number
    cuts = [*[at for at, _ in begun[1:]], *[len(text)] * bool(begun)]
    for (_, number), limit in zip(begun, cuts, strict=True):
        _mark(text, rows[number], limit, marks, into.seen)
    if begun:
        _count(document, pieces, marks, speller, into)
    return [number for _, number in begun]


def _variants(content: str) -> list[bytes]:
    spelled = (content, content.rstrip(), content.lstrip(), content.strip())
    return [v.encode() for v in dict.fromkeys(spelled) if v]


def _begin(text: bytes, row: list) -> int:
    """Where a row's first question begins (its first 20 characters, if it was cut), or -1."""
    first = next(m["content"] for m in row if m["role"] == "user").strip().encode()
    at = text.find(first)
    return at if at >= 0 else text.find(first[:20]) if len(first) > 60 else -1


def _mark(text: bytes, row: list, limit: int, marks: bytearray, seen: Counter) -> None:
    """Write the parts of one conversation over its bytes."""
    cursor = _begin(text, row)
    for message in row:
        if message["role"] == "system":
            at, length = _find(text, message["content"], 0, limit)
            seen["system_missing"] += at < 0
        else:
            at, length = _find(text, message["content"], cursor, limit)
        if at < 0:
            seen["cut_before_answer"] += message["role"] == "assistant"
            continue
        part = "answer" if message["role"] == "assistant" else message["role"]
        if part == "answer":
            header = slice(cursor, at)
            marks[header] = bytes([PARTS.index("header") + 1]) * (at - cursor)
            # First line breaks may be the answer's, or the header's where the template trims: they are not counted.
            begin = at
            if message["content"][0] == "\n":
                while text[at : at + 1] == b"\n" and length:
                    at, length = at + 1, length - 1
                while begin > cursor and text[begin - 1 : begin] == b"\n":
                    begin -= 1
                marks[begin:at] = bytes([PARTS.index("join") + 1]) * (at - begin)
            whole = message["content"].strip().encode()
            seen["cut_answers"] += length < len(whole)
            told = message["content"].lstrip("\n").encode()
            seen["stripped"] += len(whole) <= length < len(told)
            seen["answers"] += 1
        marks[at : at + length] = bytes([PARTS.index(part) + 1]) * length
        if part != "system":
            cursor = at + length


def _find(text: bytes, content: str, start: int, limit: int) -> tuple[int, int]:
    """Place and length of a message; of one that was cut, of what is there."""
    for variant in _variants(content):
        at = text.find(variant, start)
        if 0 <= at < limit:
            return at, len(variant)
    whole = content.strip().encode()
    at = text.find(whole[:8], start) if len(whole) > 8 else -1
    if not 0 <= at < limit:
        kept = next((n for n in range(min(7, len(whole)), 1, -1) if text[start:limit].endswith(whole[:n])), 0)
        return (limit - kept, kept) if kept else (-1, 0)
    length = 8
    while length < len(whole) and text[at + length : at + length + 1] == whole[length : length + 1]:
        length += 1
    return at, length


def _count(document: Document, pieces: list[bytes], marks: bytearray, speller: Speller, into: Parts) -> None:
    at, ended, before = 0, True, "open"
    labeled: dict[str, list[int]] = {}
    for i, (piece, trained) in enumerate(zip(pieces, document.trained, strict=True)):
        inside = [marks[b] for b in range(at, at + len(piece)) if marks[b]]
        at += len(piece)
        texts = [number for number in inside if PARTS[number - 1] not in ("header", "join")]
        if texts:
            part = PARTS[max(texts, key=texts.count) - 1]
            ended, before = part != "answer", part
        elif inside:
            lone = piece == b" " or PARTS[inside[-1] - 1] == "join"
            part = "join" if lone else "header"
        elif i == 0 and document.ids[0] == speller.bos:
            part = "bos"
        elif before == "answer" and not ended:
            ended = document.ids[i] in speller.control
            part = "end" if ended else "close"
        else:
            part = "after" if before == "answer" else "open"
        into.total[part] += 1
        into.trained[part] += trained
        if trained and (not labeled.get(part) or labeled[part][-1] == i - 1):
            labeled.setdefault(part, []).append(i)
    into.seen["ends_without_end"] += before == "answer" and not ended
    for part, places in labeled.items():
        into.sample.setdefault(part, speller.words([document.ids[i] for i in places]))
