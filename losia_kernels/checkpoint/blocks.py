"""Where two versions of a tensor differ: blocks of outputs x inputs that share no output.

The union of all subnets that a layer ever had is cut so that outputs that changed in the same
inputs form one block. So every entry is stored once, and for every tensor
    out_idx [outputs]    the outputs that changed, block after block
    out_counts [blocks]  outputs of each block
    in_idx [inputs]      the inputs that changed in any block
    in_mask [blocks, inputs / 8]  the inputs of each block, a bit for each of in_idx
    (numpy.packbits)
    values               each block row by row, one after another
Any tensor is taken as a matrix [all but the last dimension, last dimension].
"""

import math

import numpy as np
import torch
from torch import Tensor

# By bytes: values are compared as bits.
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: Tensor) -> Tensor:
    """A view of the tensor as a matrix [all but the last dimension, last dimension] of integers:
    NaN equals itself."""
    *outer, inner = tensor.shape or (1,)
    matrix = tensor.reshape(math.prod(outer), inner)  # also of no values
    return matrix.view(INTEGERS[tensor.element_size()])


def find_blocks(changed: Tensor) -> dict[str, Tensor]:
    """Blocks that share no output and together are exactly where ``changed`` [out, in] is true."""
    out_idx, in_idx = changed.any(1).nonzero().flatten(), changed.any(0).nonzero().flatten()
    patterns = np.packbits(changed[out_idx][:, in_idx].numpy(), axis=1)
    masks, block, counts = np.unique(patterns, axis=0, return_inverse=True, return_counts=True)
    order = torch.from_numpy(np.argsort(block.reshape(-1), kind="stable"))
    return {
        "out_idx": out_idx[order].int(),
        "out_counts": torch.from_numpy(counts).int(),
        "in_idx": in_idx.int(),
        "in_mask": torch.from_numpy(masks),
    }


def _mask(where: dict[str, Tensor]) -> Tensor:
    """Which entries of ``out_idx`` x ``in_idx`` are in a block, [outputs, inputs]."""
    masks = np.unpackbits(where["in_mask"].numpy(), axis=1, count=len(where["in_idx"]))
    return torch.from_numpy(masks.repeat(where["out_counts"].numpy(), axis=0)).bool()


def take(tensor: Tensor, where: dict[str, Tensor]) -> Tensor:
    """The values of the blocks, [values]."""
    touched = bits(tensor)[where["out_idx"].long()[:, None], where["in_idx"].long()]
    return touched[_mask(where)].view(tensor.dtype)


def put_(tensor: Tensor, where: dict[str, Tensor], values: Tensor) -> None:
    """Write the values of the blocks into the contiguous ``tensor``."""
    matrix, place = bits(tensor), (where["out_idx"].long()[:, None], where["in_idx"].long())
    counts = where["out_counts"]
    if (
        len(where["out_idx"]) > matrix.shape[0]
        or len(where["in_idx"]) > matrix.shape[1]
        or (counts < 0).any()
        or int(counts.sum(dtype=torch.int64)) != len(where["out_idx"])
    ):
        raise ValueError("the blocks are larger than the tensor")
    touched = matrix[place]
    touched[_mask(where)] = values.view(matrix.dtype)
    matrix[place] = touched
