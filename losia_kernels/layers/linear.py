"""LoSiALinear: nn.Linear whose trained part is a dense sub-matrix of its weight."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from ..parallel.placement import check_whole
from .agreement import trained_beside
from .first_order import without_derivative
from .inputs import SharedInput, is_recomputed, pays, stand_in
from .module import SubnetModule, carry_hooks_
from .writers import SubnetParameter


class _SubnetLinear(torch.autograd.Function):
    """``y = x W^T + b``, differentiated for x and for the subnet of W only (Section 3.3.1).

    Of x the backward keeps the subnet's input neurons: ``d_subnet = dy[:, out_idx]^T x[:, in_idx]``
    (Eq. 9). With ``keeps_input``, and while the layer observes, it keeps all of x: a ``probe`` gets
    the dense ``dy^T x`` as gradient. ``out_idx`` or ``in_idx`` of None is all neurons;
    ``alignment`` is that of the indices. Outside of compiled code ``layer`` says what is kept, and
    which layers read the same x.
    """

    @staticmethod
    def forward(
        ctx, x, weight, bias, subnet, out_idx, in_idx, probe, alignment, keeps_input, layer
    ):
        # x [..., in], weight [out, in], subnet [k_out, k_in]; subnet only carries the gradient,
        # weight is current
        ctx.whole = probe is not None or in_idx is None or keeps_input
        ctx.observing, ctx.alignment = probe is not None, alignment
        ctx.subnet = None if layer is None else subnet
        shared = None if layer is None else layer.shared_input
        ctx.use = shared.use(x) if shared is not None and pays(x) else None
        if ctx.use is not None and ctx.needs_input_grad[0]:
            ctx.use.join(ctx)
        if ctx.whole:
            kept = x
        elif layer is not None and is_recomputed():
            kept = stand_in(x, len(in_idx))
        elif shared is not None and ctx.use is not None:
            kept = shared.gather(layer, x, ctx.use)
        else:
            kept = ops.gather_features(x, in_idx, alignment)
        ctx.save_for_backward(kept, weight, out_idx, in_idx)
        y = F.linear(x, weight, bias)
        if layer is not None and y._is_view():  # as with a bias: nobody could write it in place
            (y,) = y.unsafe_chunk(1)
        return y

    @staticmethod
    def backward(ctx, dy):
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return _SubnetLinear.gradients(ctx, dy)
        # a second derivative would miss dx's dependence on the subnet
        with torch.no_grad():
            grads = _SubnetLinear.gradients(ctx, dy)
        return without_derivative(grads, (dy, ctx.subnet, ctx.saved_tensors[0]))

    @staticmethod
    def gradients(ctx, dy):
        x, weight, out_idx, in_idx = ctx.saved_tensors
        dx = d_bias = d_subnet = d_weight = None
        if ctx.needs_input_grad[0]:
            use, matrix = ctx.use, weight.to(dy.dtype)
            dx = dy @ matrix if use is None else use.add(dy, matrix)  # [..., in]
        if ctx.needs_input_grad[2]:
            d_bias = dy.reshape(-1, dy.shape[-1]).sum(0)
        if ctx.needs_input_grad[3]:
            in_idx = in_idx if ctx.whole else None
            d_subnet = ops.subnet_grad(dy, x, out_idx, in_idx, ctx.alignment)  # [k_out, k_in]
        if ctx.observing:
            d_weight = dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])  # [out, in]
            if d_weight.dtype == torch.float16 and d_subnet is not None:
                # a GradScaler, which sees only ours, shall back off where full fine-tuning's would
                d_subnet = torch.where(torch.isfinite(d_weight).all(), d_subnet, torch.inf)
        return dx, None, d_bias, d_subnet, None, None, d_weight, None, None, None


class LoSiALinear(SubnetModule, nn.Linear):
    """A linear layer that trains ``weight[out_idx][:, in_idx]`` and adds nothing to the model.

    Works alone with any optimizer plus ``write_back_()`` after its step; ``LoSiAAdamW`` and
    ``attach`` move its subnet too. The first subnet is drawn at random.

    Args:
        in_features, out_features, bias, device, dtype: as of nn.Linear.
        rank_factor: p, selects ``int(p * dim)`` neurons on both sides; or ``(p_out, p_in)``.
        master: keep the subnet in float32; False: in the weight's dtype.
        generator: draws the first subnet; None is torch's default.
        alignment: train runs of that many neighbours (``LoSiAConfig``).

    Attributes:
        weight: ``[out, in]``, frozen, always current: write-back after each update keeps it so.
        out_idx, in_idx: int64 buffers ``[k_out]``, ``[k_in]``, sorted and unique, which the model's
            own ``buffers()`` leave out.
        subnet: Parameter ``[k_out, k_in]``, float32: the master copy of the block, and what an
            optimizer sees.
        keeps_input: keep all of x for the backward, which layers that share it keep together, in
            place of own parts.
        shared_input: what it does together with the layers that read the same input, if any do.

    Raises:
        ValueError: a factor is outside (0, 1] or selects no neuron.
    """

    shared_input: SharedInput | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        rank_factor: float | tuple[float, float] = 1 / 8,
        master: bool = True,
        generator: torch.Generator | None = None,
        alignment: int = 1,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.keeps_input = False
        self.add_subnet_(rank_factor, master, generator, "LoSiALinear", alignment)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank_factor: float | tuple[float, float] = 1 / 8,
        *,
        master: bool = True,
        generator: torch.Generator | None = None,
        name: str = "LoSiALinear",
        alignment: int = 1,
    ) -> "LoSiALinear":
        """A LoSiALinear around ``linear``'s own weight and bias (shared, not copied; both are
        frozen).

        Args:
            linear: of a float32, float16, bfloat16 or float64 weight.
            rank_factor, master, generator, alignment: as of the class.
            name: what errors call the layer.

        Raises:
            ValueError: also for a weight that is sharded or of another dtype.
        """
        check_whole(
            linear.weight,
            name,
            "call apply_losia first, then fully_shard (FSDP2; LoSiA does not train in tensor "
            "parallelism)",
        )
        if linear.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(
                f"{name}: cannot train a subnet of a {linear.weight.dtype} weight; dequantize it "
                f"first"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        carry_hooks_(linear, layer)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.out_features, layer.in_features = layer.matrix.shape
        layer.training = linear.training
        layer.keeps_input = False
        layer.add_subnet_(rank_factor, master, generator, name, alignment)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` -> ``[..., out]``, as nn.Linear, autocast included.

        Outside of torch.compile, a subnet is read anew where the weight was written by others (an
        initialisation, an edit), and the weight follows where the subnet alone was (averages
        swapped in for evaluation, SAM).

        Raises:
            RuntimeError: an optimizer has stepped the subnet, and nobody has written it back; or the
                weight requires a gradient, which it would not get.
        """
        matrix, bias, subnet = self.matrix, self.held("bias"), self.held("subnet")
        training = torch.is_grad_enabled() and subnet.requires_grad
        self.sync_before_use_(training)
        if type(subnet) is not SubnetParameter and self.stands_in(subnet):
            return F.linear(x, self.matrix_with(subnet), bias)
        if not training:
            return F.linear(x, matrix, bias)
        if matrix.requires_grad:
            raise RuntimeError(trained_beside(self.name))
        device = x.device.type
        # "meta" has no autocast, and asking raises
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        given = x
        if autocast and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(device))  # before the function, so it keeps this one
        (k_out, k_in), (out_idx, in_idx) = subnet.shape, self.indices
        return _SubnetLinear.apply(
            x,
            matrix,
            bias,
            subnet,
            None if k_out == self.out_features else out_idx,
            None if k_in == self.in_features else in_idx,
            self._probe,
            self.alignment,
            self.keeps_input and x is given,  # a cast of x is this layer's own
            None if torch.compiler.is_compiling() else self,
        )

    @property
    def gathers(self) -> bool:
        """Whether a part of its input is kept: it trains, not all of it, and does not observe."""
        partial = self.subnet.shape[1] < self.in_features and not self.keeps_input
        return partial and self._probe is None and self.subnet.requires_grad

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "shared_input": None}  # those are no part of a copy

    @staticmethod
    def features_of(linear: Any) -> tuple[int, int]:
        """``(out, in)`` of what ``from_linear`` takes."""
        return linear.out_features, linear.in_features

    def to_plain(self) -> nn.Module:
        """A plain nn.Linear around the same weight and bias."""
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        carry_hooks_(self, linear)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight, linear.bias = self.weight, self.bias
        linear.training = self.training
        return linear


class LoSiAConv1D(LoSiALinear):
    """A LoSiALinear around transformers' ``Conv1D`` (GPT-2), whose ``weight`` stays ``[in, out]``
    as it is saved.

    Made by ``from_linear`` only.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "LoSiAConv1D is made around an existing Conv1D: LoSiAConv1D.from_linear(conv)"
        )

    @property
    def matrix(self) -> Tensor:
        """``[out, in]``, a view: what is written to it is in the weight."""
        return self.weight.T

    @staticmethod
    def features_of(conv: Any) -> tuple[int, int]:
        return conv.nf, conv.nx

    def to_plain(self) -> nn.Module:
        """A plain Conv1D around the same weight and bias."""
        from transformers.pytorch_utils import Conv1D  # there, for the model is of it

        conv = Conv1D.__new__(Conv1D)
        nn.Module.__init__(conv)
        carry_hooks_(self, conv)
        conv.nf, conv.nx = self.out_features, self.in_features
        conv.weight, conv.bias = self.weight, self.bias
        conv.training = self.training
        return conv
