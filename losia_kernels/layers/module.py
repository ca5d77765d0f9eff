"""SubnetModule: what a trained matrix is, whatever its forward: a weight, its subnet, where that is,
and how the two are kept in agreement."""

import weakref
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LoSiAConfig
from ..ops.rounding import accumulate_dtype
from ..parallel.placement import holds_values
from .agreement import Agreement, InAgreement
from .indices import NAMES as INDICES
from .indices import Indices
from .subnet import Subnet, subnet_size
from .writers import SubnetParameter, watch

_SYNCS = ContextVar("syncs", default=True)  # whether a state dict first makes weights current
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class Membership:
    """A layer's place in the timeline.

    Args:
        group: its number; None: trained densely, without a slot.
        group_name: what the group is called.
        config: what the layer was made with.
        is_output: whether it is the vocabulary projection.
        by_hand: whether the layer was placed by hand, and an optimizer gave it the place.
    """

    group: int | None
    group_name: str
    config: LoSiAConfig
    is_output: bool = False
    by_hand: bool = False


class SubnetModule(InAgreement):
    """A module that trains ``matrix[out_idx][:, in_idx]`` and nothing else of its weight.

    A kind of layer mixes this in before its own class, calls ``add_subnet_`` once its weight is
    there, and writes a forward that gives ``subnet`` its gradient, and ``probe`` the dense one.

    Attributes:
        weight: frozen, always current: write-back after each update keeps it so.
        matrix: the weight as ``[out, in]``.
        out_idx, in_idx: int64 buffers ``[k_out]``, ``[k_in]``, sorted and unique, which the model's
            own ``buffers()`` leave out.
        subnet: Parameter ``[k_out, k_in]``, float32: the master copy of the block, and what an
            optimizer sees.
        membership: the place in the timeline, None of a layer that no timeline drives.
        name: what errors call the layer.
    """

    weight: Any
    bias: Any
    out_features: int
    in_features: int
    out_idx: Tensor
    in_idx: Tensor
    subnet: nn.Parameter
    membership: Membership | None
    name: str
    adoptable = True  # a timeline may give a layer without membership one

    @property
    def in_alignment(self) -> int:
        """Length of the runs of neighbours, each from a multiple of it, that ``in_idx`` is made
        of: all of a row, where all inputs are used."""
        whole = self.subnet.shape[1] == self.in_features
        return self.in_features if whole else self.alignment

    def add_subnet_(
        self,
        rank_factor: float | tuple[float, float],
        master: bool,
        generator: torch.Generator | None,
        name: str,
        alignment: int = 1,
    ) -> None:
        """Freeze the weight and draw the first subnet.

        Args:
            rank_factor: p of both sides, or ``(p_out, p_in)``.
            master: keep the subnet in float32; else in the weight's dtype.
            generator: draws it; None is torch's default.
            name: what errors call the layer.
            alignment: train runs of that many neighbours.

        Raises:
            ValueError: a factor is outside (0, 1] or selects no neuron.
        """
        factors = rank_factor if isinstance(rank_factor, tuple) else (rank_factor, rank_factor)
        features = self.out_features, self.in_features
        k_out, k_in = (
            subnet_size(factor, size, name, alignment)
            for factor, size in zip(factors, features, strict=True)
        )
        self.name, self.alignment, self.master, self.membership = name, alignment, master, None
        self.made_for = features
        self.found_trained = {
            key: parameter.requires_grad
            for key in ("weight", "bias")
            if (parameter := getattr(self, key)) is not None
        }
        for key in self.found_trained:
            getattr(self, key).requires_grad_(False)
        first = Subnet.random(
            features, (k_out, k_in), generator or torch.default_generator, alignment
        )
        self._drawn = _digest(first)
        device = self.weight.device
        self._buffers = Indices(self._buffers)
        self.register_buffer("out_idx", first.out_idx.to(device))
        self.register_buffer("in_idx", first.in_idx.to(device))
        self._place = first if device.type == "meta" else None  # while the indices cannot hold it
        block = self.current_subnet.gather(self.matrix.detach())
        self.subnet = SubnetParameter(block.to(self._subnet_dtype))
        self.moves = 0  # how often the subnet was put somewhere, by whomever
        self.calibrated = False
        self.fingerprint: int | None = None  # of the weight it was made with, if that can be read
        self._count_subnet_()
        self._agreement = Agreement(self.weight, self.subnet, self._buffers)
        self._probe: Tensor | None = None
        self.used_in = -1  # torch's number of the backward in which the last forward ran, -1: none
        self.observe_callback: Callable[..., None] | None = None
        watch(self)

    @property
    def matrix(self) -> Tensor:
        """The weight as ``[out, in]``, as subnets, gradients and importance see it, however the
        model stores it."""
        return self.held("weight")

    @property
    def was_placed(self) -> bool:
        """Whether the subnet was put where it is, is all of the weight, or nowhere yet. Who exchanges
        tensors moves it unseen: then places are compared, and the GPU waited for."""
        if self.moves or self.subnet.shape == self.matrix.shape:
            return True
        here = _digest(self.current_subnet)
        return here is None or here != self._drawn

    @property
    def _subnet_dtype(self) -> torch.dtype:
        return accumulate_dtype(self.weight.dtype) if self.master else self.weight.dtype

    def to_plain(self) -> nn.Module:
        """The module it was made of, around the same weight and bias."""
        raise NotImplementedError

    # the subnet moves -----------------------------------------------------------------------------

    def set_subnet_(self, out_idx: Tensor, in_idx: Tensor) -> None:
        """Move the subnet: write the old one back, then train ``weight[out_idx][:, in_idx]``.

        Its gradient, which belongs to the old weights, is dropped. So do an optimizer's moments:
        whoever calls this resets them. Only between a backward and the next forward.

        Args:
            out_idx: int64 ``[k_out]``, sorted, unique, as many as now.
            in_idx: int64 ``[k_in]``, likewise.

        Raises:
            ValueError: they are not; nothing has changed then.
        """
        subnet = Subnet(out_idx, in_idx)
        subnet.check((self.out_features, self.in_features), self.name, self.alignment)
        if subnet.shape != tuple(self.subnet.shape):
            raise ValueError(
                f"{self.name}: the subnet is {tuple(self.subnet.shape)}, the indices give "
                f"{subnet.shape}"
            )
        self.move_subnet_(subnet)
        self.subnet.grad = None

    @torch.no_grad()
    def move_subnet_(self, subnet: Subnet) -> None:
        """``set_subnet_`` for a subnet known to be valid: no checks, no waiting for the GPU."""
        self.sync_(finish=True)
        self.write_back_()
        left = Subnet(self.out_idx.clone(), self.in_idx.clone())
        self.out_idx.copy_(subnet.out_idx)
        self.in_idx.copy_(subnet.in_idx)
        self.moves += 1
        self.read_subnet_()
        self._note_left_(left)

    def note_calibrated_(self) -> None:
        """``calibrate`` has placed the subnet, before anything was trained."""
        self.calibrated, self._agreement.left = True, None

    # the dense gradient is observed ---------------------------------------------------------------

    def observe_(self, on_gradient: Callable[..., None] | None) -> None:
        """Call ``on_gradient`` with the dense gradient ``[out, in]`` of every backward.

        It is summed over the uses of the layer in the graph. A backward may bring several that add
        up: one of each segment that is checkpointed reentrantly, and a ``WeightGradient`` of
        ``losia_linear_cross_entropy`` beside the tensor of a loss that reads the logits.

        Args:
            on_gradient: None ends it.
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
        owner = weakref.ref(self)  # Python's collector does not see what a tensor's hook holds

        def hand_over(leaf: Tensor) -> None:
            grad, leaf.grad = leaf.grad, None
            layer = owner()
            if layer is not None and layer.observe_callback is not None:  # else: an old graph
                layer.observe_callback(None if grad is None else grad.detach())

        probe.register_post_accumulate_grad_hook(hand_over)
        return probe

    # copies, casts and checkpoints ----------------------------------------------------------------

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SubnetModule":
        written = self._agreement.written(self.weight, self.subnet)
        matrix, master, where = self.matrix.detach(), self.subnet.detach(), self.current_subnet
        super()._apply(fn, recurse)
        self._move_indices_(fn(torch.empty_like(self.out_idx)).device)
        if self.subnet.dtype != master.dtype:  # model.bfloat16() must not round the master
            self.subnet.data = master.to(self.subnet.device)
        self.subnet.data = self.subnet.data.to(self._subnet_dtype)
        self._agreement.carry(written, self.weight, self.subnet)
        cast = self.weight.dtype != matrix.dtype and holds_values(matrix)
        if cast and self._agree(matrix, master, where):
            self.write_back_()  # a wider weight can hold what the narrower one could not
        if self._probe is not None:
            self._probe = self._make_probe()  # of the new device and dtype
        return self

    def _move_indices_(self, device: torch.device) -> None:
        """A place is kept while the layer is on "meta", which has none."""
        here = self._place if self._place and self.out_idx.is_meta else self.current_subnet
        self._place = here if device.type == "meta" else None
        self._buffers |= {"out_idx": here.out_idx.to(device), "in_idx": here.in_idx.to(device)}

    def named_buffers(self, prefix: str = "", recurse: bool = True, *args: Any, **kwargs: Any):
        """Of the layer alone also the indices, for those who ask module by module:
        torch.distributed.checkpoint, fully_shard, accelerate."""
        yield from super().named_buffers(prefix, recurse, *args, **kwargs)
        if not recurse:
            for name in INDICES:
                yield f"{prefix}.{name}".removeprefix("."), getattr(self, name)

    def __getstate__(self) -> dict[str, Any]:
        written = self._agreement.written(self.weight, self.subnet)
        # observes for nobody
        own = {
            "_probe": None,
            "observe_callback": None,
            "_agreement": (written, self._agreement.stepped_by),
        }
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        written, stepped_by = state["_agreement"]
        self._count_subnet_()
        self._agreement = Agreement(self.weight, self.subnet, self._buffers)
        self._agreement.carry(written, self.weight, self.subnet)
        self._agreement.stepped_by = stepped_by
        watch(self)

    def _count_subnet_(self) -> None:
        """Pickling and loading by assignment leave a plain parameter, copying one without owner."""
        subnet = self.subnet
        if not isinstance(subnet, SubnetParameter):
            self.subnet = SubnetParameter(subnet.detach(), subnet.requires_grad)
            self.subnet.grad = subnet.grad
        self.subnet.owner = weakref.ref(self)  # type: ignore[attr-defined]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if _SYNCS.get():
            self.sync_(finish=True)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in INDICES:  # copies: also those who average state dicts shall not reach them
            idx = getattr(self, name)
            destination[prefix + name] = idx if keep_vars else idx.clone()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict,
        strict: bool,
        missing_keys: list[str],
        *args: Any,
    ) -> None:
        """Checks indices before they are used. Where the loaded values do not agree the weight
        counts: in a checkpoint of the plain model (no subnet), in averaged ones (whose subnets lay
        elsewhere). A subnet without its weight is written back. Files may hold parts, in any order:
        what is not known yet waits for the layer's use.
        """
        keys = {key for key in ("weight", "subnet", *INDICES) if prefix + key in state_dict}
        indices = {name: state_dict.pop(prefix + name) for name in INDICES if name in keys}
        if indices:
            self._check_indices(prefix.removesuffix(".") or self.name, indices)
        stepped, edited = self._agreement.written(self.weight, self.subnet) or (False, False)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, *args
        )
        missing_keys += [prefix + name for name in INDICES if strict and name not in indices]
        for name, value in indices.items():
            idx = getattr(self, name)
            if idx.is_meta:
                self._buffers[name] = value.clone()
            else:
                idx.copy_(value)
        if local_metadata.get("assign_to_params_buffers"):
            self._count_subnet_()
        self.fingerprint = None
        self.moves += keys.issuperset(INDICES)
        if keys == {"weight"} and not self._agree(self.matrix, self.subnet, self.current_subnet):
            self.read_subnet_()  # though its subnet may come yet
        if keys:
            written = stepped or "subnet" in keys, edited or "weight" in keys
            self._agreement.carry(written, self.weight, self.subnet)
            self._agreement.stepped_by = None
        if keys >= {"subnet", *INDICES}:
            self.sync_()

    def _check_indices(self, name: str, indices: dict[str, Tensor]) -> None:
        loaded = Subnet(*(indices.get(key, getattr(self, key)) for key in INDICES))
        if holds_values(loaded.out_idx, loaded.in_idx):
            loaded.check((self.out_features, self.in_features), name, self.alignment)
        if loaded.shape != tuple(self.subnet.shape):
            raise ValueError(
                f"{name}: the checkpoint's subnet is {loaded.shape}, ours {tuple(self.subnet.shape)}"
            )

    def extra_repr(self) -> str:
        share = self.subnet.numel() / self.weight.numel()
        return f"{super().extra_repr()}, subnet={tuple(self.subnet.shape)}, trained={share:.2%}"


def _digest(subnet: Subnet) -> int | None:
    """A number that hardly any other subnet has."""
    if not holds_values(subnet.out_idx, subnet.in_idx):
        return None
    return zlib.crc32(torch.cat([subnet.out_idx, subnet.in_idx]).cpu().numpy().tobytes())


def carry_hooks_(source: nn.Module, target: nn.Module) -> None:
    """Let ``target`` run the forward and backward hooks of ``source``, which it replaces: they are
    one set, so that a handle still removes its hook."""
    for name in _HOOKS:
        target.__dict__[name] = source.__dict__[name]


def losia_layers(model: nn.Module) -> Iterator[tuple[str, SubnetModule]]:
    """The model's layers with a subnet and their names, in model order.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected the model, an nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        if isinstance(module, SubnetModule):
            yield name, module


@contextmanager
def as_they_are() -> Iterator[None]:
    """State dicts made inside change nothing in the model."""
    token = _SYNCS.set(False)
    try:
        yield
    finally:
        _SYNCS.reset(token)
