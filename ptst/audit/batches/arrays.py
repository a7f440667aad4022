"""A batch of any trainer as flat arrays: keys by their usual names, rows one after another, documents parted.

A padded batch has B rows of T tokens, a packed one a row of several documents. Trainers say where documents begin in
six ways: `cu_seqlens`, lengths, a number per token, an attention mask that counts documents, positions that begin
again, or one document per row. Labels are aligned with the tokens where the model shifts them (Hugging Face), shifted
by one where it does not.
"""

from array import array as packed_ints
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from ptst.errors import UserError

IGNORED = -1  # a label that the loss ignores, whatever number the trainer has for it
IGNORE_INDICES = (-100, -1)
MAX_ID = 2**31 - 1
# What each array is called by trainers.
KEYS = {
    "input_ids": ("input_ids", "tokens", "input"),
    "labels": ("labels", "targets", "target"),
    "loss_mask": ("loss_mask", "completion_mask", "assistant_masks", "assistant_mask"),
    "attention_mask": ("attention_mask",),
    "position_ids": ("position_ids", "input_pos", "positions"),
    "cu_seqlens": ("cu_seqlens", "cu_seq_lens_q", "cu_seqlens_q", "cu_seq_lens"),
    "seq_lens": ("seq_lens", "seq_lengths"),
    "seq_idx": ("seq_idx", "sequence_ids", "segment_ids", "document_ids"),
}
# What says nothing of tokens or labels, or the same once more.
SILENT = frozenset(("token_type_ids", "special_tokens_mask", "length", "lengths", "num_items_in_batch"))
SILENT |= {"cu_seq_lens_k", "cu_seqlens_k", "cu_seqlens_argmin", "max_length_q", "max_length_k"}
SILENT |= {"max_seqlen", "max_seqlen_q", "max_seqlen_k", "token_count", "token_counts"}
Ints = np.ndarray


@dataclass(frozen=True)
class BatchArrays:
    """T tokens of all rows: `ids`, `labels` (IGNORED where there is none), and, where the batch has them, `mask` (the
    attention mask) and `positions`. `rows`: bounds of the rows. `starts`, `ends`: of the documents, padding outside
    where it is known. `parted`: what says where documents begin ("" for one per row). `real`: which tokens are not
    padding, None where nothing says so. `wrong`: boundaries that do not fit, in words. `floats`: names of arrays that
    are floating-point. `unread`: what is in the batch and cannot be judged, and why."""

    ids: Ints
    labels: Ints
    rows: Ints
    starts: Ints
    ends: Ints
    ignore_index: int
    mask: Ints | None = None
    positions: Ints | None = None
    real: Ints | None = None
    parted: str = ""
    wrong: str = ""
    floats: tuple[str, ...] = ()
    unread: tuple[tuple[str, str], ...] = ()

    @property
    def row_of(self) -> Ints:
        """The row of each document."""
        return np.searchsorted(self.rows, self.starts, side="right") - 1


def read_arrays(
    batch: Any, ignore_index: int = -100, pad_id: int | None = None, stops: Iterable[int] = ()
) -> BatchArrays:
    """A batch as flat arrays. `stops`: ids that end an answer, of which the first in a padding of the same id counts as
    text. Raises UserError for what is no batch: arrays of other lengths, ids or labels that are none, a missing key."""
    given, unknown = _named(batch)
    masks = [_flat("the loss mask", value) for value in given.pop("loss_mask", ())]
    flat = {name: _flat(name, value) for name, value in given.items()}
    floats = tuple(name for name in ("input_ids", "labels") if name in flat and flat[name][0].dtype.kind == "f")
    ids, lengths = flat["input_ids"]
    ids = _whole("input_ids", ids)
    if not len(ids):
        raise UserError("the batch has no tokens", "give a batch with at least one")
    lengths = np.array([len(ids)]) if lengths is None else lengths
    rows = np.concatenate(([0], np.cumsum(lengths)))
    unread = dict.fromkeys(unknown, "this key is not read")
    labels, ignore_index = _labels(flat, masks, ids, lengths, ignore_index)
    mask, positions = (_beside(name, flat, ids, lengths, unread) for name in ("attention_mask", "position_ids"))
    starts, ends, parted = _documents(flat, rows, mask, positions)
    wrong = "" if parted not in ("cu_seqlens", "seq_lens") else _unfit(parted, flat[parted], rows, ids, labels)
    if wrong:
        others = {name: found for name, found in flat.items() if name not in ("cu_seqlens", "seq_lens")}
        starts, ends, parted = _documents(others, rows, mask, positions)
    stops = frozenset(stops)
    real = mask != 0 if mask is not None else ids != pad_id if pad_id is not None else None
    if real is not None:
        starts, ends = _without_padding(starts, ends, real, keep=mask is None and pad_id in stops)
    elif parted:
        starts, ends = _without_filling(starts, ends, rows, ids, labels)
    return BatchArrays(
        *(ids, labels, rows, starts, ends, ignore_index, mask, positions, real, parted, wrong, floats),
        unread=tuple(unread.items()),
    )


def _named(batch: Any) -> tuple[dict[str, Any], list[str]]:
    """The arrays by their usual names (of loss masks all that count), and keys that are not read. A list of rows is
    their columns; a pair is inputs and labels."""
    if isinstance(batch, tuple) and len(batch) == 2 and hasattr(batch[0], "keys"):
        batch = {**batch[0], "labels": batch[1]}
    if isinstance(batch, (list, tuple)) and batch and all(isinstance(row, Mapping) for row in batch):
        batch = {key: [row[key] for row in batch] for key in batch[0] if all(key in row for row in batch)}
    if not hasattr(batch, "keys"):
        raise UserError(f"a {type(batch).__name__} is no batch", "give a mapping with input_ids and labels")
    keys = [key for key in batch.keys() if batch[key] is not None]  # noqa: SIM118 (anything with keys)
    found: dict[str, Any] = {}
    for name, spellings in KEYS.items():
        there = [key for key in spellings if key in keys]
        if there:
            found[name] = batch[there[0]] if name != "loss_mask" else [batch[key] for key in there]
    said = f"it has {', '.join(map(str, keys)) or 'no keys'}"
    if "input_ids" not in found:
        raise UserError("the batch has no input_ids", said)
    if "labels" not in found and "loss_mask" not in found:
        raise UserError("the batch has neither labels nor a loss mask", said)
    if "labels" in found and "loss_mask" in keys:
        found["loss_mask"] = [batch["loss_mask"]]  # Megatron's labels are everywhere, and this says which count
    elif "labels" in found:
        found.pop("loss_mask", None)
    known = {key for spellings in KEYS.values() for key in spellings} | SILENT
    return found, [str(key) for key in keys if key not in known]


def _flat(name: str, value: Any) -> tuple[np.ndarray, Ints | None]:
    """An array's values row by row, and the rows' lengths: None for a single row. Raises UserError for text, objects
    and other nesting than rows."""
    array = _array(name, value)
    if isinstance(array, np.ndarray):
        if array.ndim == 1:
            return array, None
        if array.ndim == 2:
            return array.reshape(-1), np.full(array.shape[0], array.shape[1])
        if name not in ("attention_mask", "position_ids") or not array.ndim:
            raise UserError(f"{name} has {array.ndim} dimensions", "give one row, or rows of tokens")
        return array, None
    lengths = np.array([len(part) for part in array])
    return np.concatenate(array), lengths


def _array(name: str, value: Any) -> np.ndarray | list[np.ndarray]:
    """One array, or one per row where rows differ in length."""
    try:
        if hasattr(value, "detach"):  # a tensor of torch, which is not imported here
            value = value.detach().cpu().numpy()
        if not isinstance(value, np.ndarray):
            value = list(value)
            if (quick := _from_lists(value)) is not None:
                return quick
            if value and isinstance(value[0], list) and len({len(part) for part in value}) == 1:
                return _numbers(name, np.array(value))
            if value and _is_row(value[0]):
                parts = [_array(name, part) for part in value]
                if any(not isinstance(part, np.ndarray) for part in parts):
                    raise ValueError("rows within rows differ in length")
                whole: list[np.ndarray] = [part for part in parts if isinstance(part, np.ndarray)]
                if len({part.shape for part in whole}) == 1:
                    return np.stack(whole)
                if any(part.ndim != 1 for part in whole):
                    raise ValueError("rows within rows differ in length")
                return [_numbers(name, part) for part in whole]
            value = np.array(value) if value else np.zeros(0, np.int64)
        elif value.dtype == object and value.ndim == 1 and len(value) and _is_row(value[0]):
            return _array(name, list(value))
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        reason = "rows within rows differ in length" if "inhomogeneous" in str(error) else error
        raise UserError(f"{name} is no array of whole numbers ({reason})", "give ids in rows") from None
    return _numbers(name, value)


def _from_lists(value: list[Any]) -> np.ndarray | None:
    """A list of ints, or rows of one length, four times as fast as numpy reads them; None for anything else."""
    nested = bool(value) and isinstance(value[0], list)
    if nested and len({len(part) if isinstance(part, list) else -1 for part in value}) > 1:
        return None
    try:
        flat = np.frombuffer(packed_ints("q", list(chain.from_iterable(value)) if nested else value), np.int64)
    except (TypeError, OverflowError):
        return None
    return flat.reshape(len(value), -1) if nested and len(flat) else None if nested else flat


def _is_row(value: Any) -> bool:
    return hasattr(value, "__len__") and not isinstance(value, (str, bytes, Mapping)) and np.ndim(value) != 0


def _numbers(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        what = "objects" if array.dtype == object else f"values of type {array.dtype}"
        raise UserError(f"{name} holds {what}, not whole numbers", "give ids in rows")
    if array.dtype.kind == "u" and array.size and array.max() > MAX_ID:
        raise UserError(f"{name} holds {array.max()}, which is no id", f"ids are whole numbers up to {MAX_ID}")
    return array


def _whole(name: str, array: np.ndarray, lowest: int | None = None) -> Ints:
    """As whole numbers of 64 bits. Raises UserError for NaN, fractions and numbers that are no ids."""
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            at = int(np.flatnonzero(~np.isfinite(array))[0])
            raise UserError(f"{name} holds {array[at]} at index {at}", "give whole numbers")
        if ((array != np.floor(array)) | (np.abs(array) > MAX_ID)).any():
            at = int(np.flatnonzero((array != np.floor(array)) | (np.abs(array) > MAX_ID))[0])
            raise UserError(f"{name} holds {array[at]} at index {at}", "give whole numbers")
    array = array.astype(np.int64, copy=False)
    if array.size and (array.max() > MAX_ID or (lowest is not None and array.min() < lowest)):
        at = int(np.flatnonzero((array > MAX_ID) | (array < (lowest or -MAX_ID)))[0])
        raise UserError(f"{name} holds {array[at]} at index {at}, which is no id", f"ids are 0 to {MAX_ID}")
    return array


def _same_length(name: str, found: tuple[np.ndarray, Ints | None], lengths: Ints) -> None:
    array, own = found
    own = np.array([len(array)]) if own is None else own
    if len(own) != len(lengths) or (own != lengths).any():
        if len(own) != len(lengths):
            cause = f"input_ids has {_rows(lengths)} and {name} {_rows(own)}"
        else:
            row = int(np.flatnonzero(own != lengths)[0])
            cause = f"input_ids has {lengths[row]} tokens and {name} {own[row]} in row {row}"
        raise UserError(cause, "give arrays of the same length")


def _rows(lengths: Ints) -> str:
    return f"1 row of {lengths[0]} tokens" if len(lengths) == 1 else f"{len(lengths)} rows"


def _labels(
    flat: Mapping[str, Any], masks: list[tuple[np.ndarray, Ints | None]], ids: Ints, lengths: Ints, ignore_index: int
) -> tuple[Ints, int]:
    """The labels, IGNORED where the loss ignores them, and the number that the batch has for it."""
    for mask in masks:
        _same_length("the loss mask", mask, lengths)
    counts = np.ones(len(ids), bool)
    for found, _ in masks:
        counts &= found != 0
    if "labels" not in flat:
        return np.where(counts, ids, IGNORED), ignore_index
    _same_length("labels", flat["labels"], lengths)
    labels = _whole("labels", flat["labels"][0])
    below = labels < 0
    if below.any():
        lowest, highest = int(labels.min()), int(labels[below].max())
        if lowest == highest and lowest in IGNORE_INDICES:
            ignore_index = lowest
        if lowest != highest or lowest != ignore_index:
            wrong = next(int(v) for v in np.unique(labels[below]) if v != ignore_index)
            at = int(np.flatnonzero(labels == wrong)[0])
            cause = f"labels holds {wrong} at index {at}, which is neither an id nor the ignore index {ignore_index}"
            raise UserError(cause, "ignore a token with one number everywhere")
        labels = np.where(below, IGNORED, labels)
    if ignore_index >= 0:
        labels = np.where(labels == ignore_index, IGNORED, labels)
    return np.where(counts, labels, IGNORED) if masks else labels, ignore_index


def _beside(name: str, flat: dict[str, Any], ids: Ints, lengths: Ints, unread: dict[str, str]) -> Ints | None:
    """An array that has an entry for each token; None where there is none, or one that is not read."""
    if name not in flat:
        return None
    array, own = flat[name]
    if array.ndim != 1:
        unread[name] = f"it has {array.ndim} dimensions"
        return None
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        unread[name] = "it is one to be added to scores"
        return None
    size = int(lengths[0])
    if name == "position_ids" and len(lengths) > 1 and len(array) == size and (lengths == size).all():
        return np.tile(_whole(name, array), len(lengths))  # one row of positions for all
    _same_length(name, (array, own), lengths)
    return _whole(name, array)


def _documents(flat: dict[str, Any], rows: Ints, mask: Ints | None, positions: Ints | None) -> tuple[Ints, Ints, str]:
    """Starts and ends of documents, and what says so."""
    total, name = int(rows[-1]), next((name for name in ("cu_seqlens", "seq_lens") if name in flat), "")
    if name:
        return (*_by_lengths(name, flat[name], rows), name)
    numbered = None
    if "seq_idx" in flat:
        numbered, name = _whole("seq_idx", flat["seq_idx"][0].reshape(-1)), "seq_idx"
        if len(numbered) != total:
            raise UserError(f"input_ids has {total} tokens and seq_idx {len(numbered)}", "give one for each token")
    elif mask is not None and mask.max(initial=0) > 1:
        numbered, name = mask, "attention_mask"
    begins = np.zeros(total, bool)
    begins[rows[:-1][np.diff(rows) > 0]] = True
    if numbered is not None:
        begins[1:] |= numbered[1:] != numbered[:-1]
    elif positions is not None:  # of several zeros in a row, as padding has, the first is one
        begins[1:] |= (positions[1:] == 0) & (positions[:-1] != 0)
    starts = np.flatnonzero(begins)
    if numbered is None and positions is not None and len(starts) >= len(rows):
        name = "position_ids"
    return starts, np.append(starts[1:], total), name


def _parts(name: str, found: tuple[Ints, Ints | None], rows: Ints) -> list[tuple[Ints, int, int]]:
    """(numbers as given, first token, number of tokens) of all rows together, or of each row that has its own."""
    values, own = found
    values = _whole(name, values)
    if own is None or (len(own) == 1 and len(rows) != 2):
        return [(values, 0, int(rows[-1]))]
    return list(zip(np.split(values, np.cumsum(own)[:-1]), rows[:-1].tolist(), np.diff(rows).tolist(), strict=False))


def _by_lengths(name: str, found: tuple[Ints, Ints | None], rows: Ints) -> tuple[Ints, Ints]:
    """Documents by their bounds or lengths."""
    if _of_each_row(name, found, rows):
        return rows[:-1], rows[:-1] + found[0]
    starts, ends = [], []
    for values, first, size in _parts(name, found, rows):
        bounds = _bounds(name, values)
        bounds = bounds[(bounds >= 0) & (bounds <= size)] + first
        starts.append(bounds[:-1])
        ends.append(bounds[1:])
    return np.concatenate(starts), np.concatenate(ends)


def _of_each_row(name: str, found: tuple[Ints, Ints | None], rows: Ints) -> bool:
    """Whether lengths are those of the rows without their padding, rather than of documents."""
    values, own = found
    return (
        name == "seq_lens"
        and own is None
        and len(values) == len(rows) - 1 > 1
        and bool((values <= np.diff(rows)).all())
    )


def _bounds(name: str, values: Ints) -> Ints:
    """0 and the end of each document; what fills the array up (the last bound again, -1, lengths of 0) is left out."""
    if name == "seq_lens":
        return np.concatenate(([0], np.cumsum(values[values > 0])))
    if len(values):
        rising = np.concatenate(([True], values[1:] > np.maximum.accumulate(values)[:-1]))
        values = values[rising & (values >= 0)]
    return values


def _unfit(name: str, found: tuple[Ints, Ints | None], rows: Ints, ids: Ints, labels: Ints) -> str:
    """What of boundaries does not fit the rows, in words. Padding may lie behind the last one."""
    if _of_each_row(name, found, rows):
        return ""
    parts = _parts(name, found, rows)
    if len(parts) > 1 and len(parts) != len(rows) - 1:
        return f"there are {len(parts)} rows of {name} for {len(rows) - 1} rows"
    for number, (values, first, size) in enumerate(parts):
        bounds = _bounds(name, values)
        falls = name == "cu_seqlens" and bool((np.diff(values[values >= 0]) < 0).any())
        fits = len(bounds) > 1 and bounds[0] == 0 and bounds[-1] <= size and not falls
        if fits and bounds[-1] < size:
            rest = slice(first + int(bounds[-1]), first + size)
            fits = bool((labels[rest] == IGNORED).all()) and len(np.unique(ids[rest])) == 1
        if not fits:
            shown = ", ".join(map(str, values[:8].tolist())) + (", ..." if len(values) > 8 else "")
            where = f" in row {number}" if len(parts) > 1 else ""
            ends = f" (they end at {bounds[-1]})" if len(bounds) else ""
            return f"{name} [{shown}]{ends} do not divide {size} tokens{where}"
    return ""


def _without_filling(starts: Ints, ends: Ints, rows: Ints, ids: Ints, labels: Ints) -> tuple[Ints, Ints]:
    """The documents without those at the end of a row that are one id over and over, without labels: padding."""
    same = np.concatenate(([0], np.cumsum(ids[1:] == ids[:-1])))
    trained = np.concatenate(([0], np.cumsum(labels != IGNORED)))
    filling = (same[ends - 1] - same[starts] == ends - 1 - starts) & (trained[ends] == trained[starts])
    keep = ~(filling & np.isin(ends, rows) & ~np.isin(starts, rows))
    return starts[keep], ends[keep]


def _without_padding(starts: Ints, ends: Ints, real: Ints, keep: bool) -> tuple[Ints, Ints]:
    """The documents without padding at their ends; documents of padding alone are left out. `keep`: the first of the
    padding behind a document is its terminator."""
    places = np.flatnonzero(real)
    low, high = np.searchsorted(places, starts), np.searchsorted(places, ends)
    some = high > low
    if keep:
        last = places[high[some] - 1] + 1
        return places[low[some]], np.minimum(last + 1, ends[some])
    return places[low[some]], places[high[some] - 1] + 1
