"""Oracle of the gather: any dtype, a copy, so exact."""

import torch
from torch import Tensor


def gather_features_ref(x: Tensor, idx: Tensor) -> Tensor:
    """X_S of Eq. 9, in x's own dtype (a copy, so exact): ``x [..., n]``, ``idx [k]`` -> ``[...,
    k]``."""
    return torch.stack([x[..., i] for i in idx.tolist()], dim=-1)
