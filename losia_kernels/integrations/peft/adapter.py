"""LoSiAAdapter: one adapter of one linear, a LoSiALinear on the base layer's own weight."""

import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...layers.indices import NAMES as INDICES
from ...layers.linear import LoSiALinear
from ...layers.module import Membership
from ...layers.subnet import Subnet
from ...layers.writers import SubnetParameter
from ...parallel.placement import check_whole
from ...training.timeline import driver_of

BLOCKS = ("block_out_idx", "block_in_idx", "block_values")


class LoSiAAdapter(LoSiALinear):
    """Trains a subnet of ``base_layer.weight`` in place, and can take all that it ever trained out
    again, bit for bit.

    It keeps a block for each place its subnet has been: ``block_out_idx [n, k_out]``,
    ``block_in_idx [n, k_in]`` and ``block_values [n, k_out, k_in]`` in the weight's dtype. While
    the adapter is in the weight (``in_weight``) these are the values that each block replaced, in
    order, so that writing them back last to first restores the base. While it is out they are the
    trained ones, as in a state dict. Once the blocks would be as large as the weight, one block of
    the whole weight replaces them.

    ``generator`` draws the first subnet. The subnet is float32; see ``set_master_``. ``place`` is
    the membership that the adapter has whenever it is trained.
    """

    adoptable = False

    def __init__(
        self,
        base_layer: nn.Module,
        rank_factor: tuple[float, float],
        generator: torch.Generator,
        name: str,
        alignment: int,
    ):
        nn.Module.__init__(self)
        # in a tuple, so that it is no submodule: it belongs to the tuner layer
        self._base = (base_layer,)
        self.name = name
        self.out_features, self.in_features = self.matrix.shape
        self.keeps_input = False
        self.in_weight = False
        self.add_subnet_(rank_factor, True, generator, name, alignment)
        # no buffers: DistributedDataParallel would send them round at every forward
        self.block_out_idx = self.out_idx[None].clone()
        self.block_in_idx = self.in_idx[None].clone()
        self.block_values = self.current_subnet.gather(self.matrix.detach())[None]

    @property
    def weight(self) -> Tensor:
        weight = self._base[0].weight
        check_whole(weight, self.name, "through PEFT LoSiA trains whole ones: use apply_losia")
        return weight

    @property
    def bias(self) -> Tensor | None:
        return self._base[0].bias

    @property
    def matrix(self) -> Tensor:
        return self.weight.T if isinstance(self._base[0], Conv1D) else self.weight

    @property
    def membership(self) -> Membership | None:  # type: ignore[override]
        """The place in the timeline, which only an adapter has that is in the weight and
        trained."""
        return self.place if self.in_weight and self.subnet.requires_grad else None

    @membership.setter
    def membership(self, place: Membership | None) -> None:
        self.place = place

    # the subnet and the weight --------------------------------------------------------------------

    def finish_step_(self) -> None:
        """Write the subnet into the weight if an optimizer that knows nothing of the weight has
        changed it.

        Not in compiled code, which needs an optimizer that does.
        """
        if not torch.compiler.is_compiling():
            self._warn_of_foreign_steps()
            self.sync_(finish=True)

    def _warn_of_foreign_steps(self) -> None:
        """The words are the same for all layers, so that Python says them once."""
        driver = driver_of(self)
        stepped = self._agreement.stepped_by is not None
        if stepped and (driver is None or not driver.drives):
            warnings.warn(
                "LoSiA: the subnets of a PEFT adapter are stepped by an optimizer that does not know them, and will "
                "stay where they were drawn: use LoSiAAdamW, attach(optimizer, model), or in a Trainer "
                "trainer.add_callback(LoSiACallback(trainer))",
                stacklevel=2,
            )

    def _subnet_counts(self) -> bool | None:
        return super()._subnet_counts() if self.in_weight else None  # else: when it enters

    def write_back_(self) -> None:
        if self.in_weight and not self.subnet.is_meta:
            super().write_back_()

    def set_master_(self, master: bool) -> None:
        """Keep the subnet in float32 (True) or in the weight's dtype."""
        self.master = master
        if self.subnet.dtype != self._subnet_dtype:
            self.subnet = SubnetParameter(
                self.subnet.detach().to(self._subnet_dtype), self.subnet.requires_grad
            )
            self._count_subnet_()
            self._agreement.carry(None, self.weight, self.subnet)

    @torch.no_grad()
    def move_subnet_(self, subnet: Subnet) -> None:
        if not self.in_weight:
            raise RuntimeError(
                f"{self.name}: a subnet can only move while its adapter is active and enabled"
            )
        super().move_subnet_(subnet)
        self._keep_block()

    # what has been trained, and what was there before ---------------------------------------------

    def blocks(self) -> Iterator[tuple[int, Subnet]]:
        """The blocks in the order in which the subnet came to them, numbered."""
        for number, (out_idx, in_idx) in enumerate(
            zip(self.block_out_idx, self.block_in_idx, strict=True)
        ):
            yield number, Subnet(out_idx, in_idx)

    def _keep_block(self) -> None:
        """Keep what is at the current subnet, before it is trained."""
        if self.block_values[0].shape == self.matrix.shape:
            return
        *_, (last, block) = self.blocks()
        untrained = _same_bits(block.gather(self.matrix), self.block_values[last])
        # calibration moves subnets that have not been trained
        kept = last if untrained else last + 1
        if (kept + 1) * self.subnet.numel() >= self.matrix.numel():
            base = self.matrix.clone(memory_format=torch.contiguous_format)
            self._restore(base)
            everything = [torch.arange(size, device=base.device) for size in base.shape]
            self.block_out_idx, self.block_in_idx, self.block_values = (
                t[None] for t in (*everything, base)
            )
            return
        here = self.out_idx, self.in_idx, self.current_subnet.gather(self.matrix)
        for name, new in zip(BLOCKS, here, strict=True):
            setattr(self, name, torch.cat([getattr(self, name)[:kept], new[None]]))

    def _restore(self, matrix: Tensor) -> None:
        for number, block in reversed(list(self.blocks())):
            _scatter_(matrix, block, self.block_values[number])

    @torch.inference_mode(False)
    @torch.no_grad()
    def enter_(self) -> None:
        """Write the adapter's values into the weight and keep what was there."""
        matrix, trained = self.matrix, self.block_values
        replaced = torch.empty_like(trained, dtype=matrix.dtype)
        for number, block in self.blocks():
            replaced[number] = block.gather(matrix)
            _scatter_(matrix, block, trained[number].to(matrix.dtype))
        self.block_values, self.in_weight = replaced, True
        self.write_back_()

    @torch.inference_mode(False)
    @torch.no_grad()
    def leave_(self) -> None:
        """Take the adapter out of the weight: the base again, bit for bit."""
        trained = self.trained_values()
        self._restore(self.matrix)
        self.block_values, self.in_weight = trained, False

    @torch.no_grad()
    def trained_values(self) -> Tensor:
        """The adapter's final values, ``[n, k_out, k_in]`` in the weight's dtype; those of
        overlapping blocks agree."""
        if not self.in_weight:
            return self.block_values
        self.finish_step_()
        matrix = self.matrix
        return torch.stack([block.gather(matrix) for _, block in self.blocks()])

    # state ----------------------------------------------------------------------------------------

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        for name in BLOCKS:
            setattr(self, name, fn(getattr(self, name)))
        return self

    def __setattr__(self, name, value) -> None:
        if name in INDICES or (name in BLOCKS and isinstance(value, nn.Parameter)):
            raise ValueError(
                f"{self.name}: transformers loads this LoSiA adapter tensor by tensor, past the weight "
                f"it belongs in: load it by peft.PeftModel.from_pretrained(base_model, folder), not by "
                f"load_adapter or from_pretrained(folder) of a transformers model"
            )
        super().__setattr__(name, value)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        tensors = self.block_out_idx, self.block_in_idx, self.trained_values()
        destination.update(
            {prefix + name: tensor for name, tensor in zip(BLOCKS, tensors, strict=True)}
        )

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        """The tuner layer has taken the adapter out of the weight. The number of blocks is the
        checkpoint's."""
        loaded = [state_dict.pop(prefix + name, None) for name in BLOCKS]
        if loaded[0] is not None:
            self._check_blocks(*loaded)
            for name, tensor in zip(BLOCKS, loaded, strict=True):
                setattr(self, name, tensor.detach().to(self.out_idx.device, copy=True))
        else:
            missing_keys += [prefix + name for name in BLOCKS]
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def check_loadable(self, state_dict: dict, prefix: str) -> None:
        """Raise ValueError for a state dict that has some of the adapter's tensors and not all: what
        came of them would be neither the trained weights nor the base."""
        keys = [prefix + name for name in (*BLOCKS, "out_idx", "in_idx", "subnet")]
        missing = [key for key in keys if key not in state_dict]
        if 0 < len(missing) < len(keys):
            raise ValueError(
                f"{self.name}: the adapter is incomplete, it lacks {', '.join(missing)}; nothing was "
                f"loaded"
            )

    def _check_blocks(self, out_idx: Tensor, in_idx: Tensor, values: Tensor) -> None:
        if values.shape != (len(out_idx), *out_idx.shape[1:], *in_idx.shape[1:]) or len(
            in_idx
        ) != len(out_idx):
            raise ValueError(
                f"{self.name}: the checkpoint's blocks do not agree: {tuple(out_idx.shape)} outputs, "
                f"{tuple(in_idx.shape)} inputs, {tuple(values.shape)} values"
            )
        for block in map(Subnet, out_idx, in_idx):
            block.check((self.out_features, self.in_features), self.name)


def _scatter_(matrix: Tensor, block: Subnet, values: Tensor) -> None:
    matrix[block.out_idx[:, None], block.in_idx] = values


def _same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))
