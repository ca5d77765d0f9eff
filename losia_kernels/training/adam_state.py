"""What AdamW keeps beside a subnet, and in which form.

Bytes a trained value of a bfloat16 model: the subnet, its gradient, both moments and the remainder
(the weight itself is the model's). 8-bit moments have 4 bytes more for every 256 values of a row.

    subnet                            gradient kept            moments float32  bfloat16   int8
    float32 (master="float32")        to the step                           16        12     10
                                      of one layer (in_backward)            12         8      6
    bfloat16 + remainder ("split"):    to the step                           14        10      8
    the same float32 values           of one layer (in_backward)            12         8      6
    bfloat16, stochastic ("none")      to the step                           12         8      6
                                      of one layer (in_backward)            10         6      4
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers.module import SubnetModule
from ..ops.rounding import accumulate_dtype, code_blocks
from ..parallel.placement import Placement, local, placed_as

MOMENTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.uint8}
SUBNET_STATE = ("step", "exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale", "remainder")


@dataclass(frozen=True)
class AdamState:
    """The form of all subnets' state.

    Args:
        moments: "float32", "bfloat16" or "int8".
        split: the subnets are bfloat16, and the state has the 16 bits that they lack.

    bfloat16 and int8 moments are rounded stochastically: to nearest, a second moment would never
    decay. int8 are codes of bitsandbytes' dynamic map with a scale for each 256 values
    (``losia_kernels.ops.rounding``).
    """

    moments: str = "float32"
    split: bool = False

    def check(self, layers: list[SubnetModule]) -> None:
        """Raise ValueError for an unknown form, or naming a layer that cannot have it."""
        if self.moments not in MOMENTS:
            raise ValueError(
                f"LoSiAAdamW: moments must be one of {', '.join(MOMENTS)}, got {self.moments!r}"
            )
        for layer in layers:
            if self.split and layer.subnet.dtype != torch.bfloat16:
                raise ValueError(
                    f"LoSiAConfig.master='split' keeps subnets in bfloat16 and what they lack "
                    f"beside them, but {layer.name}'s is {layer.subnet.dtype}: convert a bfloat16 "
                    f"model, or place bfloat16 layers with master=False"
                )
            if self.moments != "float32" and layer.subnet.dtype == torch.float64:
                raise ValueError(
                    f"LoSiAAdamW: {layer.name} is float64, moments={self.moments!r} are not for it"
                )

    def check_placement(self, placement: Placement) -> None:
        """Raise ValueError for a form that weights cannot have where they live."""
        if self.split:
            placement.check_gatherable(
                "LoSiAConfig.master='split' (under fully_shard keep 'float32', or take "
                "moments='bfloat16' or 'int8')",
                torch.int16,
            )

    def stochastic(self, subnet: Tensor) -> bool:
        """Whether anything of it is rounded by chance."""
        return self.moments != "float32" or (
            subnet.dtype in (torch.bfloat16, torch.float16) and not self.split
        )

    def make(self, subnet: Tensor) -> dict[str, Tensor]:
        """The state before the first step; all zeros, also of a scale and of a remainder, mean zero
        moments and the subnet's own values. The step is on the CPU, as torch keeps it: reading it
        does not wait for the GPU."""
        dtype = self._dtype(subnet)
        # whatever torch's defaults are
        state = {"step": torch.tensor(0.0, dtype=torch.float32, device="cpu")}
        state |= {key: torch.zeros_like(subnet, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")}
        if dtype == torch.uint8:
            state |= {f"{key}_scale": _scales(subnet) for key in ("exp_avg", "exp_avg_sq")}
        if self.split:
            state["remainder"] = torch.zeros_like(subnet, dtype=torch.int16)
        return state

    def check_loaded(self, layer: SubnetModule, state: dict) -> None:
        """Raise ValueError if a checkpoint's state of ``layer`` has another form."""
        then = state.get("exp_avg")
        if then is not None and then.dtype != self._dtype(layer.subnet):
            raise ValueError(
                f"{layer.name}: the checkpoint's moments are {then.dtype}, this run keeps "
                f"{self._dtype(layer.subnet)}; resume with the same moments"
            )
        if then is not None and ("remainder" in state) != self.split:
            raise ValueError(
                f"{layer.name}: the checkpoint was made with another LoSiAConfig.master"
            )

    def _dtype(self, subnet: Tensor) -> torch.dtype:
        return (
            MOMENTS[self.moments] if self.moments != "float32" else accumulate_dtype(subnet.dtype)
        )


def _scales(subnet: Tensor) -> Tensor:
    """``[k_out, blocks]``, cut by rows as a sharded subnet is."""
    here = local(subnet)
    zeros = torch.zeros(
        here.shape[0], code_blocks(here.shape[1]), dtype=torch.float32, device=here.device
    )
    return placed_as(zeros, subnet.shape[0], subnet)
