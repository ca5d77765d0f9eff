"""Launches of the kernels that memory binds, at LLaMA-2 7B's up_proj, for a profiler that counts bytes:

    ncu --clock-control none --metrics dram__bytes_read.sum,lts__t_bytes.sum python -m bench.traffic

What L2 gives the cores is the guess that most predictions rest on (``bench/speed/predicted.py``)."""

import torch

from .speed import ops
from .speed.models import shape_of

WARM_UP, COUNTED = 1, 1
CASES = ("gather_features", "subnet_grad", "subnet_adamw_", "importance_update_")


def main(device: torch.device, tokens: int = 8192) -> None:
    shape = shape_of("llama-2-7b").linears["up_proj"]
    generator = torch.Generator(device).manual_seed(0)
    for name in CASES:
        case = ops.CASES[name](shape, 1 / 8, tokens, torch.bfloat16)
        inputs = case.inputs(generator)
        with torch.no_grad():
            for _ in range(WARM_UP + COUNTED):
                case.forms["ours"](*inputs)
        print(name, flush=True)
    torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(torch.device("cuda"))
