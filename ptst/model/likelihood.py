"""Loss of whole documents under a decoder: the one place where flat rows meet the fused head and loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ptst.data.packing import IGNORE_INDEX, Batch
from ptst.kernels.linear_cross_entropy import linear_cross_entropy
from ptst.model.decoder import Decoder


def batch_loss(decoder: Decoder, batch: Batch, divisor: float) -> Tensor:
    """Summed loss (nats) of a batch's trained tokens over `divisor`: a scalar, differentiable.

    Raises UserError for ids outside the decoder's vocabulary.
    """
    batch.check_ids(decoder.config.vocab_size)
    tokens_T = torch.tensor(batch.tokens, device=decoder.device)
    targets_T = torch.tensor(batch.labels, device=decoder.device)
    positions_T = torch.tensor(batch.position_ids, device=decoder.device)
    hidden_TE = decoder.documents(tokens_T, batch.cu_seqlens, positions_T, batch.shared_prefixes)
    # The trained rows are known here, so the device need not be asked for them.
    rows_N = torch.tensor([i for i, t in enumerate(batch.labels) if t != IGNORE_INDEX], dtype=torch.long)
    return linear_cross_entropy(hidden_TE, decoder.head_VE, targets_T, divisor, rows_N=rows_N.to(decoder.device))
