"""How long does `ptst.audit.check_batch` take? CPU time for a batch of 4,096 tokens, the median of 1,000 calls.

python benchmarks/check_batch.py
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from ptst.audit import check_batch

BOS, EOS = 1, 2
KNOWN = {"bos_id": BOS, "eos_id": EOS, "pad_id": 0, "vocab_size": 32000}
CALLS = 1000


def padded() -> dict[str, np.ndarray]:
    """8 rows of 512 tokens, the second half of each trained."""
    ids = np.random.default_rng(0).integers(5, 30000, (8, 512))
    ids[:, 0], ids[:, -1] = BOS, EOS
    labels = np.where(np.arange(512) < 256, -100, ids)
    return {"input_ids": ids, "labels": labels, "attention_mask": np.ones_like(ids)}


def packed() -> dict[str, np.ndarray]:
    """32 documents of 128 tokens in one row."""
    index = np.arange(4096) % 128
    ids = np.random.default_rng(0).integers(5, 30000, 4096)
    ids[index == 0], ids[index == 127] = BOS, EOS
    batch = {"input_ids": ids, "labels": np.where(index < 64, -100, ids), "position_ids": index}
    return {k: v[None] for k, v in batch.items()} | {"cu_seq_lens_q": np.arange(0, 4097, 128, dtype=np.int32)}


def main() -> None:
    kinds = {"arrays": lambda a: a, "tensors": torch.tensor, "lists": lambda a: a.tolist()}
    for layout in (padded, packed):
        for kind, convert in kinds.items():
            batch = {name: convert(array) for name, array in layout().items()}
            assert not check_batch(batch, **KNOWN)
            times = []
            for _ in range(CALLS):
                start = time.process_time()
                check_batch(batch, **KNOWN)
                times.append(time.process_time() - start)
            print(f"{layout.__name__}, {kind:8} {1e3 * statistics.median(times):6.2f} ms")


if __name__ == "__main__":
    main()
