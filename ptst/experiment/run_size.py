"""How much there is to compute in a training, before it begins: of the run of a grid, from its examples and steps."""

from collections.abc import Sequence
from dataclasses import dataclass

from ptst.data.example_arrays import lengths_of
from ptst.data.examples import Mixture
from ptst.data.order import Step
from ptst.data.packing import assign_micro_batches, share_prefixes, to_batch
from ptst.data.steps import taken_by
from ptst.model.config import DecoderConfig
from ptst.text.encode import Example
from ptst.training.config import TrainSettings
from ptst.training.memory import MOST, count_parameters

SAMPLED = 200  # examples at most that are looked at for a mean


@dataclass(frozen=True)
class RunSize:
    """A training: optimizer steps, tokens trained on, tokens of forward passes that it takes, tokens that a constraint
    reads before it, and the mean number of tokens in an answer."""

    steps: int
    tokens: int
    amount: float
    before: float
    answer: float

    @classmethod
    def of(
        cls, settings: TrainSettings, config: DecoderConfig, device: str, mixture: Mixture, steps: Sequence[Step]
    ) -> "RunSize":
        """Of a run that takes these steps."""
        examples = mixture.examples
        taken, lengths = taken_by(steps), lengths_of(examples)
        tokens, seen = sum(lengths[i] for i in taken), len(taken)
        trained = tokens * _share_trained([examples[i] for i in taken[:: max(1, seen // SAMPLED)]])
        limit = settings.micro_batch_tokens
        limit = MOST["cuda" if device == "cuda" else "cpu"] if limit == "auto" else limit
        computed = tokens * (1.0 if settings.dropout else _share_computed(examples, steps, limit))
        head = config.vocab_size * config.hidden_size / count_parameters(config)  # computed for what is trained alone
        forward = computed * (1 - head) + trained * head
        # The backward pass of a product takes two products, or one where its weights are frozen.
        amount = forward * (3 if settings.full else 2)
        before = float(sum(lengths)) if settings.token_constraint else 0.0
        return cls(len(steps), tokens, amount, before, trained / seen if seen else 0.0)


def _share_trained(examples: Sequence[Example]) -> float:
    return sum(sum(e.loss_mask[1:]) for e in examples) / max(1, sum(len(e.ids) for e in examples))


def _share_computed(examples: Sequence[Example], steps: Sequence[Step], micro_batch_tokens: int) -> float:
    """The share of the tokens that is computed, where documents of a micro-batch share their prefix; from four
    steps."""
    whole = shared = 0
    for step in steps[:: max(1, len(steps) // 4)][:4]:
        group = [examples[i] for i in step.examples[:SAMPLED]]
        for places in assign_micro_batches([len(e.ids) for e in group], micro_batch_tokens):
            batch = to_batch([group[i] for i in places])
            whole, shared = whole + len(batch.tokens), shared + len(share_prefixes(batch).tokens)
    return shared / whole if whole else 1.0
