"""The model runner: computes a step that the scheduler has planned, and samples the next tokens.

The newest token of each running sequence stays on the device, in the sequence's slot, so that a GPU can start the next
step before the host has read the tokens of this one.

Shapes: T tokens of a step, R decoding sequences, N tokens to sample, E hidden_size, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ptst.generation.cuda_graphs import DecodeGraphs
from ptst.generation.forward import AdapterRows, Forward
from ptst.generation.kv_cache import KVCache, common_prefix_length
from ptst.generation.paged_attention import StepAttention
from ptst.generation.request import Statistics
from ptst.generation.sampling import log_probabilities, sample, top_log_probabilities
from ptst.generation.scheduler import RequestSequence, Step
from ptst.generation.transfer import HostCopy
from ptst.kernels.transfer import to_device


@dataclass
class Sampled:
    """The tokens sampled in a step, on their way to the host: one for each of `sequences`, which names a sequence
    several times where draft tokens were accepted. `top_logprobs`: ids and log probabilities of the most likely, as
    many as any of the sequences asks for."""

    sequences: list[RequestSequence]
    tokens: HostCopy
    logprobs: HostCopy | None
    top_logprobs: tuple[HostCopy, HostCopy] | None


class ModelRunner:
    def __init__(self, forward: Forward, cache: KVCache, batch_size: int, max_length: int, statistics: Statistics):
        self.forward, self.cache, self.statistics = forward, cache, statistics
        # One place per slot, and one for the rows that pad a captured graph.
        self.newest_tokens = torch.zeros(batch_size + 1, dtype=torch.long, device=forward.device)
        on_gpu = forward.device.type == "cuda"
        self.graphs = DecodeGraphs(forward, cache, self.newest_tokens, max_length) if on_gpu else None
        if self.graphs is not None:
            self.graphs.prepare()

    def run(self, step: Step) -> Sampled | None:
        """Compute a step and sample; None if no sequence gets a token. Counts the step's tokens as computed."""
        for sequence, n in step.num_tokens:
            self.cache.extend(sequence.table, sequence.num_computed_tokens + n)
        sequences = step.decode
        logits_NV = self._replay(step.decode) if not step.prefill else None
        if logits_NV is None:
            sequences, hidden_NE = self._compute(step)
            logits_NV = self.forward.logits(hidden_NE) if sequences else None
        for sequence, n in step.num_tokens:
            sequence.num_computed_tokens += n
        return None if logits_NV is None else self._sample(sequences, step.draft, logits_NV)

    def _replay(self, sequences: list[RequestSequence]) -> Tensor | None:
        """Logits (R, V) of a pure decode step by one launch of a captured graph; None where that is not possible."""
        adapters = [s.adapter for s in sequences]
        if self.graphs is None or (len(set(adapters)) > 1 and self.forward.stacked is None):
            return None
        slots, positions = [s.slot for s in sequences], [s.num_computed_tokens for s in sequences]
        return self.graphs.logits(slots, positions, [s.table.blocks for s in sequences], adapters)

    def _compute(self, step: Step) -> tuple[list[RequestSequence], Tensor]:
        """The sequences that get a token (one with draft tokens several times), and the hidden states (N, E) that
        predict these."""
        device = self.forward.device
        chunks = [s.prompt[s.num_computed_tokens : s.num_computed_tokens + n] for s, n in step.prefill]
        tokens_T = to_device(step.draft + [t for chunk in chunks for t in chunk], device, torch.long)
        self.statistics.prompt_tokens += sum(map(len, chunks))
        if step.decode:
            slots = to_device([s.slot for s in step.decode], device)
            # A sequence whose logits were not a number has token -1 until the host notices.
            tokens_T = torch.cat((self.newest_tokens[slots].clamp_(min=0), tokens_T))
        spans = [range(s.num_computed_tokens, s.num_computed_tokens + n) for s, n in step.num_tokens]
        positions_T = to_device([position for span in spans for position in span], device)
        attend = StepAttention(
            self.cache,
            [(s.table, s.num_computed_tokens + 1 + j) for s in step.decode for j in range(1 + len(step.draft))],
            [(s.table, s.num_computed_tokens, n) for s, n in step.prefill],
            self.forward.config,
            self.forward.head_norms,
        )
        hidden_TE = self.forward(tokens_T, positions_T, attend, self._adapter_rows(step))
        sequences = [s for s in step.decode for _ in range(1 + len(step.draft))]
        rows, end = list(range(len(sequences))), len(sequences)
        for sequence, n in step.prefill:
            end += n
            if isinstance(sequence, RequestSequence) and sequence.num_computed_tokens + n == len(sequence.prompt):
                rows.append(end - 1)  # the prompt's last token predicts the answer's first
                sequences.append(sequence)
        return sequences, hidden_TE if len(rows) == end else hidden_TE[to_device(rows, device, torch.long)]

    def _adapter_rows(self, step: Step) -> AdapterRows:
        """The rows of each adapter (None: all), or the adapter of each row."""
        rows_of: dict[str | None, list[int]] = {}
        start = 0
        for sequence, n in step.num_tokens:
            rows_of.setdefault(sequence.adapter, []).extend(range(start, start + n))
            start += n
        if len(rows_of) == 1:
            return [(next(iter(rows_of)), None)]
        device = self.forward.device
        if self.forward.stacked is not None:
            names = [s.adapter for s, n in step.num_tokens for _ in range(n)]
            return to_device(self.forward.stacked.which(names), device, torch.int32)
        return [(name, to_device(rows, device)) for name, rows in rows_of.items() if name in self.forward.adapters]

    def _sample(self, sequences: list[RequestSequence], draft: list[int], logits_NV: Tensor) -> Sampled:
        samplings = [s.request.sampling for s in sequences]
        uniforms = []
        for sequence, sampling in zip(sequences, samplings, strict=True):
            uniforms.append(sequence.uniform(sequence.num_scheduled_tokens) if sampling.temperature else 0.0)
            sequence.num_scheduled_tokens += 1
        tokens_N = sample(logits_NV, samplings, uniforms)
        logprobs_N = log_probabilities(logits_NV, tokens_N) if any(s.logprobs for s in samplings) else None
        most = max(s.top_logprobs for s in samplings)
        top = top_log_probabilities(logits_NV, most) if most else None
        if draft:
            # The first sampled token that differs from the draft is the last one that counts: what follows was computed
            # from a wrong token. Its keys and values will be overwritten.
            num_accepted = common_prefix_length(draft, tokens_N.tolist())
            sequence, num_rejected = sequences[0], len(draft) - num_accepted
            sequence.num_scheduled_tokens -= num_rejected
            sequence.num_computed_tokens -= num_rejected
            sequences, tokens_N = sequences[: num_accepted + 1], tokens_N[: num_accepted + 1]
            logprobs_N = None if logprobs_N is None else logprobs_N[: num_accepted + 1]
            self.newest_tokens[sequence.slot] = tokens_N[-1]
        else:
            self.newest_tokens[to_device([s.slot for s in sequences], tokens_N.device)] = tokens_N
        return Sampled(
            sequences,
            HostCopy(tokens_N),
            None if logprobs_N is None else HostCopy(logprobs_N),
            None if top is None else (HostCopy(top[0]), HostCopy(top[1])),
        )
