"""Batches of samples made by hand, for Trainers that are not TRL's."""

from dataclasses import dataclass

import numpy as np
import torch

IGNORE = -100


@dataclass(frozen=True)
class Collator:
    """Pads samples on the right to the longest of the batch: int64 ``[batch, length]`` tensors.

    Plain samples get an ``attention_mask``. Packed rows get ``position_ids`` instead; there each
    token of the padding, all at position 0, is a document of its own.
    """

    pad_token_id: int

    def __call__(self, samples: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
        packed = "position_ids" in samples[0]
        shape = len(samples), max(len(sample["input_ids"]) for sample in samples)
        batch = {
            "input_ids": torch.full(shape, self.pad_token_id),
            "labels": torch.full(shape, IGNORE),
        }
        batch["position_ids" if packed else "attention_mask"] = torch.zeros(
            shape, dtype=torch.int64
        )
        for row, sample in enumerate(samples):
            size = len(sample["input_ids"])
            for key, values in sample.items():
                batch[key][row, :size] = torch.from_numpy(values)
            if not packed:
                batch["attention_mask"][row, :size] = 1
        return batch
