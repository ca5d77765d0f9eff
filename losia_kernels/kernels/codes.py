"""What kernels and plain torch must agree on about moments in fewer bits. Imports no triton."""

import functools

import torch
from torch import Tensor

CODE_BLOCK = 256  # neighbours along the inputs that share one scale, as in bitsandbytes and torchao
# xor of the seed: three roundings of an element are independent
FIRST_MOMENT, SECOND_MOMENT = 0x3C6EF372, 0x5A827999


@functools.lru_cache
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """The 256 values in [-1, 1] or [0, 1] that codes stand for, ascending: bitsandbytes' dynamic
    map, float32.

    Seven decades, each cut into twice as many equal cells as the one below it; the values are the
    cells' centres, and 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        cells = 2**decade if signed else 2 ** (decade + 1)
        centres = [
            10.0 ** (decade - 6) * (0.1 + 0.9 * (cell + 0.5) / cells) for cell in range(cells)
        ]
        values += centres + [-centre for centre in centres if signed]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)
