"""LoSiALinear: nn.Linear whose trained part is a dense sub-matrix of its weight."""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from .. import ops
from ..ops.adamw import write_subnet_
from ..ops.rounding import accumulate_dtype
from ..parallel.ranks import is_sharded
from .agreement import Agreement
from .subnet import Subnet, subnet_size

_INDICES = ("out_idx", "in_idx")
_ALIVE: "weakref.WeakSet[LoSiALinear]" = (
    weakref.WeakSet()
)  # whose subnets optimizers may step (``_count_writes``)


class _SubnetLinear(torch.autograd.Function):
    """``y = x W^T + b``, differentiated for x and for the subnet of W only (Section 3.3.1).

    Of x the backward keeps the subnet's input neurons: ``d_subnet = dy[:, out_idx]^T x[:, in_idx]``
    (Eq. 9). With ``keeps_input``, and while the layer observes, it keeps all of x: a ``probe`` gets
    the dense ``dy^T x`` as gradient. ``out_idx`` or ``in_idx`` of None is all neurons;
    ``alignment`` is that of the indices.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, subnet, out_idx, in_idx, probe, alignment, keeps_input):
        # x [..., in], weight [out, in], subnet [k_out, k_in]; subnet only carries the gradient,
        # weight is current
        ctx.whole = probe is not None or in_idx is None or keeps_input
        ctx.observing, ctx.alignment = probe is not None, alignment
        ctx.save_for_backward(
            x if ctx.whole else ops.gather_features(x, in_idx, alignment), weight, out_idx, in_idx
        )
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable  # a second derivative would miss dx's dependence on the subnet, silently
    def backward(ctx, dy):
        x, weight, out_idx, in_idx = ctx.saved_tensors
        dx = d_bias = d_subnet = d_weight = None
        if ctx.needs_input_grad[0]:
            dx = dy @ weight.to(dy.dtype)  # [..., in]
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
        return dx, None, d_bias, d_subnet, None, None, d_weight, None, None


class LoSiALinear(nn.Linear):
    """A linear layer that trains ``weight[out_idx][:, in_idx]`` and nothing else; adds nothing to
    the model.

    Attributes: weight: ``[out, in]``, frozen, always current: write-back after each update keeps it
        so. out_idx, in_idx: int64 buffers ``[k_out]``, ``[k_in]``, sorted and unique. subnet:
        Parameter ``[k_out, k_in]``, float32: the master copy of the block, and what an optimizer
        sees. keeps_input: keep all of x for the backward, which layers that share it keep together,
        in place of own parts.

    ``rank_factor`` p selects ``int(p * dim)`` neurons on both sides; a pair selects ``(p_out,
    p_in)``. The first subnet is drawn at random from ``generator`` (torch's default if None).
    ``master=False`` keeps the subnet in the weight's dtype; ``alignment`` trains runs of that many
    neighbours (``LoSiAConfig``). Works alone with any optimizer plus ``write_back_()`` after its
    step. Raises ValueError for a factor outside (0, 1] or one that selects no neuron.
    """

    out_idx: Tensor
    in_idx: Tensor
    losia: Any  # convert.Membership, of a layer that apply_losia has made

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
        self._add_subnet(rank_factor, master, generator, "LoSiALinear", alignment)

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

        ``name`` is what errors call the layer.
        """
        if is_sharded(linear.weight):
            raise ValueError(
                f"{name}: the weight is sharded already; call apply_losia first, then fully_shard (FSDP2; "
                f"LoSiA does not train in tensor parallelism)"
            )
        if linear.weight.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
            raise ValueError(
                f"{name}: cannot train a subnet of a {linear.weight.dtype} weight; dequantize it first"
            )
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.weight, layer.bias = linear.weight, linear.bias
        layer.out_features, layer.in_features = layer.matrix.shape
        layer.training = linear.training
        layer._add_subnet(rank_factor, master, generator, name, alignment)
        return layer

    def _add_subnet(
        self,
        rank_factor: float | tuple[float, float],
        master: bool,
        generator: torch.Generator | None,
        name: str,
        alignment: int = 1,
    ) -> None:
        factors = rank_factor if isinstance(rank_factor, tuple) else (rank_factor, rank_factor)
        features = self.out_features, self.in_features
        k_out, k_in = (
            subnet_size(p, size, name, alignment) for p, size in zip(factors, features, strict=True)
        )
        self.name = name
        self.alignment = alignment
        self.keeps_input = False
        self.master = master
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        first = Subnet.random(
            features, (k_out, k_in), generator or torch.default_generator, alignment
        )
        device = self.weight.device
        self.register_buffer("out_idx", first.out_idx.to(device))
        self.register_buffer("in_idx", first.in_idx.to(device))
        self.subnet = nn.Parameter(
            self.current_subnet.gather(self.matrix.detach()).to(self._subnet_dtype)
        )
        self.fingerprint: int | None = (
            None  # of the weight it was made with; a sharded one cannot be compared any more
        )
        self._agreement = Agreement(self.weight, self.subnet)
        self._probe: Tensor | None = None
        self.observe_callback: Callable[..., None] | None = None
        _ALIVE.add(self)

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[out, in]``, as subnets, gradients and importance see it, however the
        model stores it."""
        return self.weight

    @property
    def _subnet_dtype(self) -> torch.dtype:
        return accumulate_dtype(self.weight.dtype) if self.master else self.weight.dtype

    @property
    def current_subnet(self) -> Subnet:
        """The neurons being trained (shares the buffers)."""
        return Subnet(self.out_idx, self.in_idx)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` -> ``[..., out]``, as nn.Linear, autocast included.

        In training, outside of torch.compile: RuntimeError if the subnet was stepped but not
        written back; where the weight alone was written (an initialisation, an edit), the subnet is
        read from it anew.
        """
        matrix, bias, subnet = (
            self.matrix,
            self.bias,
            self.subnet,
        )  # once: a module's tensors are slow to look up
        training = torch.is_grad_enabled() and subnet.requires_grad
        self.settle_before_use_(training)
        if not training:
            return F.linear(x, matrix, bias)
        device = x.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(
            device
        )  # it has none, and asking raises
        given = x
        if autocast and x.dtype != torch.float64:
            x = x.to(
                torch.get_autocast_dtype(device)
            )  # before the function, so that it keeps the smaller x
        k_out, k_in = subnet.shape
        out_idx = None if k_out == self.out_features else self.out_idx
        in_idx = None if k_in == self.in_features else self.in_idx
        return _SubnetLinear.apply(
            x,
            matrix,
            bias,
            subnet,
            out_idx,
            in_idx,
            self._probe,
            self.alignment,
            self.keeps_input and x is given,  # a cast of x is this layer's own
        )

    # subnet and weight ----------------------------------------------------------------------------

    def note_agreement_(self) -> None:
        """Weight and subnet hold the same values now: whoever has written both says so."""
        self._agreement.note(self.weight, self.subnet)

    @property
    def awaits_write_back(self) -> bool:
        """Whether the subnet alone was written since it last agreed with the weight."""
        return self._agreement.written(self.weight, self.subnet) == (True, False)

    def settle_(self, finish: bool = False) -> None:
        """Make the two agree: what was written alone counts, and of both the weight.

        RuntimeError if that is the subnet, unless it was loaded or ``finish``. Values are compared,
        and the GPU waited for, only after writes by others.
        """
        weight, subnet, agreement = self.weight, self.subnet, self._agreement
        if agreement.holds(weight, subnet):
            return
        written = agreement.written(weight, subnet)
        if written is None or is_sharded(weight):
            return
        if self._agree(self.matrix, subnet, self.current_subnet):
            self.note_agreement_()
        elif written != (True, False):
            self.read_subnet_()
        elif finish or agreement.loaded:
            self.write_back_()
        else:
            raise RuntimeError(
                f"{self.name}: an optimizer has stepped the subnet, but its values are not in the "
                f"weight, with which the model computes: use LoSiAAdamW, attach(optimizer, model), "
                f"or write_back_() after each step"
            )

    def settle_before_use_(self, training: bool) -> None:
        """``settle_``, but an evaluation asks only after a checkpoint was loaded, and compiled code
        never."""
        if not torch.compiler.is_compiling() and (training or self._agreement.loaded):
            self.settle_()

    @staticmethod
    def _agree(matrix: Tensor, values: Tensor, subnet: Subnet) -> bool:
        unreadable = (
            matrix.is_meta or values.is_meta or isinstance(values, FakeTensor)
        )  # then nothing differs
        return unreadable or torch.equal(subnet.gather(matrix), values.to(matrix.dtype))

    @torch.no_grad()
    def write_back_(self) -> None:
        """Round ``subnet`` into ``weight``: after the step of an optimizer that knows nothing of
        the weight."""
        write_subnet_(self.matrix, self.out_idx, self.in_idx, self.subnet)
        self.note_agreement_()

    @torch.no_grad()
    def read_subnet_(self) -> None:
        """Fill ``subnet`` from ``weight``: after something else has written the weight."""
        self.subnet.copy_(self.current_subnet.gather(self.matrix))
        self.note_agreement_()

    def set_subnet_(self, out_idx: Tensor, in_idx: Tensor) -> None:
        """Move the subnet: write the old one back, then train ``weight[out_idx][:, in_idx]``.

        int64 ``[k_out]``, ``[k_in]``, sorted, unique, of the present sizes; else ValueError and
        nothing has changed. The optimizer's moments for ``subnet`` belong to the old weights:
        whoever calls this resets them. Only between a backward and the next forward.
        """
        subnet = Subnet(out_idx, in_idx)
        subnet.check((self.out_features, self.in_features), self.name, self.alignment)
        if subnet.shape != tuple(self.subnet.shape):
            raise ValueError(
                f"{self.name}: the subnet is {tuple(self.subnet.shape)}, the indices give {subnet.shape}"
            )
        self.move_subnet_(subnet)

    @torch.no_grad()
    def move_subnet_(self, subnet: Subnet) -> None:
        """``set_subnet_`` for a subnet known to be valid: no checks, no waiting for the GPU."""
        self.settle_(finish=True)
        self.write_back_()
        self.out_idx.copy_(subnet.out_idx)
        self.in_idx.copy_(subnet.in_idx)
        self.read_subnet_()

    def observe_(self, on_gradient: Callable[..., None] | None) -> None:
        """Call ``on_gradient`` with the dense gradient ``[out, in]`` of every backward, until
        called with None.

        The gradient is whole (summed over the uses of the layer in one backward) and freed right
        after the call. Only from ``losia_linear_cross_entropy`` it comes in blocks:
        ``on_gradient(grad[outputs], outputs)``, from the first output to the last.
        """
        self.observe_callback = on_gradient
        self._probe = None if on_gradient is None else self._make_probe()

    def _make_probe(self) -> Tensor:
        # A leaf of the weight's shape and of no size: autograd sums the dense gradient into it, as
        # for a parameter, while the weight itself stays frozen for optimizers, DDP, FSDP and
        # everyone who looks at requires_grad. A plain tensor even while fully_shard holds the
        # weight in shards; the indices are where the layer computes.
        zero = torch.zeros((), dtype=self.weight.dtype, device=self.out_idx.device)
        probe = zero.expand(self.matrix.shape).requires_grad_()
        owner = weakref.ref(
            self
        )  # Python's garbage collector does not see what a tensor's hook holds

        def hand_over(leaf: Tensor) -> None:
            grad, leaf.grad = leaf.grad, None
            layer = owner()
            if (
                layer is not None and layer.observe_callback is not None
            ):  # else: a graph from before
                layer.observe_callback(grad)

        probe.register_post_accumulate_grad_hook(hand_over)
        return probe

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoSiALinear":
        written = self._agreement.written(self.weight, self.subnet)
        matrix, master, where = self.matrix.detach(), self.subnet.data, self.current_subnet
        super()._apply(fn, recurse)
        if self.subnet.dtype != master.dtype:  # model.bfloat16() must not round the master
            self.subnet.data = master.to(self.subnet.device)
        self.subnet.data = self.subnet.data.to(self._subnet_dtype)
        self._agreement.carry(written, self.weight, self.subnet)
        if (
            self.weight.dtype != matrix.dtype
            and not is_sharded(matrix)
            and self._agree(matrix, master, where)
        ):
            self.write_back_()  # a wider weight can hold what the narrower one could not
        if self._probe is not None:
            self._probe = self._make_probe()  # of the new device and dtype
        return self

    def __getstate__(self) -> dict[str, Any]:
        written = self._agreement.written(self.weight, self.subnet), self._agreement.loaded
        own = {
            "_probe": None,
            "observe_callback": None,
            "_agreement": written,
        }  # a copy observes for nobody
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        written, loaded = state["_agreement"]
        self._agreement = Agreement(self.weight, self.subnet)
        self._agreement.carry(written, self.weight, self.subnet, loaded)
        _ALIVE.add(self)

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Checks indices before they are used. Where the loaded values do not agree the weight
        counts: in a checkpoint of the plain model (no subnet), in averaged ones (whose subnets lay
        elsewhere). A subnet without its weight is written back. Files may hold parts, in any order:
        what is not known yet waits for the layer's use.
        """
        keys = {key for key in ("weight", "subnet", *_INDICES) if prefix + key in state_dict}
        if keys.issuperset(_INDICES):
            name = prefix.removesuffix(".") or self.name
            loaded = Subnet(state_dict[prefix + "out_idx"], state_dict[prefix + "in_idx"])
            loaded.check((self.out_features, self.in_features), name, self.alignment)
            if loaded.shape != tuple(self.subnet.shape):
                raise ValueError(
                    f"{name}: the checkpoint's subnet is {loaded.shape}, ours {tuple(self.subnet.shape)}"
                )
        stepped, edited = self._agreement.written(self.weight, self.subnet) or (False, False)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.fingerprint = None
        if keys == {"weight"} and not self._agree(self.matrix, self.subnet, self.current_subnet):
            self.read_subnet_()  # though its subnet may come yet
        if keys:
            written = stepped or "subnet" in keys, edited or "weight" in keys
            self._agreement.carry(written, self.weight, self.subnet, loaded=True)
        if keys >= {"subnet", *_INDICES}:
            self.settle_()

    def to_linear(self) -> nn.Module:
        """A plain nn.Linear around the same weight and bias."""
        linear = nn.Linear.__new__(nn.Linear)
        nn.Module.__init__(linear)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight, linear.bias = self.weight, self.bias
        linear.training = self.training
        return linear

    def extra_repr(self) -> str:
        share = self.subnet.numel() / self.weight.numel()
        return f"{super().extra_repr()}, subnet={tuple(self.subnet.shape)}, trained={share:.2%}"


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

    def to_linear(self) -> nn.Module:
        """A plain Conv1D around the same weight and bias."""
        from transformers.pytorch_utils import Conv1D  # there, for the model is of it

        conv = Conv1D.__new__(Conv1D)
        nn.Module.__init__(conv)
        conv.nf, conv.nx = self.out_features, self.in_features
        conv.weight, conv.bias = self.weight, self.bias
        conv.training = self.training
        return conv


def losia_layers(model: nn.Module) -> Iterator[tuple[str, LoSiALinear]]:
    """The model's LoSiALinears with their names, in model order. Raises TypeError if ``model`` is
    no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected the model, an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, LoSiALinear):
            yield name, module


def _count_writes(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """By its count of writes a layer knows that its subnet was stepped: torch's fused optimizers
    are not counted, nor are kernels that write past torch, as bitsandbytes'. Of other parameters
    nothing is touched."""
    if getattr(getattr(optimizer, "timeline", None), "drives", False):
        return  # whose steps end with the weights written
    counted = type(optimizer).__module__.startswith("torch.optim")
    groups = [group for group in optimizer.param_groups if group.get("fused") or not counted]
    if groups and _ALIVE:
        subnets = {id(layer.subnet) for layer in _ALIVE}
        stepped = [
            p
            for group in groups
            for p in group["params"]
            if p.grad is not None and id(p) in subnets
        ]
        torch.autograd.graph.increment_version(stepped)


register_optimizer_step_post_hook(_count_writes)
