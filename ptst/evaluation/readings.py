"""What a model makes of a prompt itself, next to the prompt of its training: the answers of the task `distance`."""

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field

import torch

from ptst.evaluation.edit_distance import edit_share
from ptst.evaluation.tasks.distance import Reading
from ptst.generation.multi_lora import Adapter
from ptst.generation.read import ReadPrompt, read_prompts
from ptst.generation.score import Watch
from ptst.model.decoder import Decoder


@dataclass(frozen=True)
class Readings:
    """Prompts that were read already, by the model's fingerprint and their ids: the prompts of the training are
    compared with those of every test template. A model without a fingerprint is read anew."""

    known: MutableMapping[tuple[str, tuple[int, ...]], ReadPrompt] = field(default_factory=dict)

    def read(
        self, model: str, decoder: Decoder, prompts: Sequence[list[int]], adapter: Adapter | None, watch: Watch
    ) -> list[ReadPrompt]:
        """As `read_prompts`."""
        if not model:
            return read_prompts(decoder, prompts, adapter, watch)
        keys = [(model, tuple(ids)) for ids in prompts]
        missing = list(dict.fromkeys(key for key in keys if key not in self.known))
        found = read_prompts(decoder, [list(ids) for _, ids in missing], adapter, watch)
        self.known.update(zip(missing, found, strict=True))
        return [self.known[key] for key in keys]


def compare(ids: list[int], read: ReadPrompt, trained_ids: list[int] | None, trained: ReadPrompt | None) -> Reading:
    """A prompt next to that of the training, where there is one."""
    share = cosine = None
    if trained_ids is not None and trained is not None:
        share = edit_share(trained_ids, ids)
        cosine = float(torch.cosine_similarity(read.state_E.double(), trained.state_E.double(), dim=0))
    return Reading(ids[1:], "", "stop", read.logprobs, edit_share=share, cosine=cosine)
