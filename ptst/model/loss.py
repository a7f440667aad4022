"""The training loss of a batch: the decoder and the fused head and cross-entropy."""

import torch
from torch import Tensor

from ptst.data.packing import IGNORE_INDEX, Batch
from ptst.kernels.linear_cross_entropy import linear_cross_entropy
from ptst.model.decoder import Decoder


def batch_loss(decoder: Decoder, batch: Batch, divisor: float) -> Tensor:
    """Summed loss (nats) of a batch's trained tokens, divided by `divisor`: a scalar, differentiable. Raises UserError
    for token ids outside the decoder's vocabulary."""
    batch.check_ids(decoder.config.vocab_size)
    tokens_T = torch.tensor(batch.tokens, device=decoder.device)
    labels_T = torch.tensor(batch.labels, device=decoder.device)
    position_ids_T = torch.tensor(batch.position_ids, device=decoder.device)
    hidden_TE = decoder.documents(tokens_T, batch.cu_seqlens, position_ids_T, batch.shared_prefixes)
    # Computed on the host, which would otherwise wait for the device to count the labels.
    trained_N = torch.tensor([i for i, label in enumerate(batch.labels) if label != IGNORE_INDEX], dtype=torch.long)
    trained_N = trained_N.to(decoder.device)
    return linear_cross_entropy(hidden_TE, decoder.head_VE, labels_T, divisor, trained_N=trained_N)
