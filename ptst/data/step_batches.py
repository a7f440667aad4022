"""An optimizer step's examples as micro-batches: the one way in which training, validation and the audit build them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ptst.data.example_arrays import example_length
from ptst.data.packing import Batch, rank_micro_batches, share_prefixes, to_batch
from ptst.text.encode import Example


@dataclass(frozen=True)
class MicroBatch:
    """`examples`: the index of each document's example. `whole`: every document with all of its tokens. `computed`:
    the same loss from fewer tokens, where documents share a prefix."""

    examples: list[int]
    whole: Batch
    computed: Batch


@dataclass(frozen=True)
class StepBatches:
    """The micro-batches of one of `size` ranks for a step that takes the examples of these indices. `share`: documents
    share prefixes. `check` is called with every micro-batch before it is computed, and may raise."""

    examples: Sequence[Example]
    step: Sequence[int]
    micro_batch_tokens: int
    rank: int = 0
    size: int = 1
    share: bool = True
    check: Callable[[MicroBatch], None] = lambda _batch: None

    def __len__(self) -> int:
        return len(self._groups())

    def __iter__(self) -> Iterator[MicroBatch]:
        for group in self._groups():
            numbers = [self.step[i] for i in group]
            whole = to_batch([self.examples[i] for i in numbers])
            batch = MicroBatch(numbers, whole, share_prefixes(whole) if self.share else whole)
            self.check(batch)
            yield batch

    def _groups(self) -> list[list[int]]:
        lengths = [example_length(self.examples, i) for i in self.step]
        return rank_micro_batches(lengths, self.micro_batch_tokens, self.rank, self.size)
