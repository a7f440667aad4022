"""The training loss of a batch: the decoder and the fused head and cross-entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ptst.data.packing import IGNORE_INDEX, Batch
from ptst.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probabilities
from ptst.kernels.transfer import to_device
from ptst.model.decoder import Decoder


def batch_loss(decoder: Decoder, batch: Batch, divisor: float) -> Tensor:
    """Summed loss (nats) of a batch's trained tokens, divided by `divisor`: a scalar, differentiable. Raises UserError
    for token ids outside the decoder's vocabulary."""
    hidden_TE, labels_T, trained_N = _hidden(decoder, batch)
    return linear_cross_entropy(hidden_TE, decoder.head_VE, labels_T, divisor, trained_N=trained_N)


def constrained_loss(
    decoder: Decoder, batch: Batch, divisor: float, betas_N: Tensor, reference_N: Tensor
) -> tuple[Tensor, Tensor]:
    """The constrained objective (ptst/training/constraint.py) summed over a batch's N trained tokens, and their
    cross-entropy, which has no gradient; each divided by `divisor`. `betas_N`, `reference_N`: strengths of the
    constraint, and the reference's log-probabilities. Raises UserError as `batch_loss`.

    The objective's gradient is that of cross-entropy with a weight for each token, which needs the token's probability
    first: the head is multiplied once more, the decoder is not."""
    hidden_TE, labels_T, trained_N = _hidden(decoder, batch)
    head_VE = decoder.head_VE
    logprobs_N = linear_log_probabilities(hidden_TE.detach(), head_VE.detach(), labels_T, trained_N)
    beyond_N = betas_N * (logprobs_N - reference_N)
    weights_T = torch.zeros(len(labels_T), dtype=logprobs_N.dtype, device=logprobs_N.device)
    weights_T[trained_N] = 2 * torch.sigmoid(-beyond_N)
    weighted = linear_cross_entropy(hidden_TE, head_VE, labels_T, divisor, weights_T, trained_N)
    objective = (2 / betas_N * F.softplus(-beyond_N)).sum() / divisor
    # The value of one, with the gradient of the other.
    return weighted + (objective - weighted).detach(), -logprobs_N.sum() / divisor


def _hidden(decoder: Decoder, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states and labels of a batch's tokens, and the indices of the trained ones."""
    batch.check_ids(decoder.config.vocab_size)
    # Computed on the host, which would otherwise wait for the device to count the labels.
    trained = [i for i, label in enumerate(batch.labels) if label != IGNORE_INDEX]
    trained_N = to_device(trained, decoder.device, torch.long)
    ids_3T = to_device([batch.tokens, batch.labels, batch.position_ids], decoder.device, torch.long)
    tokens_T, labels_T, position_ids_T = ids_3T.unbind()
    hidden_TE = decoder.documents(tokens_T, batch.cu_seqlens, position_ids_T, batch.shared_prefixes)
    return hidden_TE, labels_T, trained_N
