"""LoSiATunerLinear: what PEFT puts in the place of a linear; its adapters take turns in the
linear's own weight."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import Tensor, nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from .adapter import LoSiAAdapter


class LoSiATunerLinear(nn.Module, BaseTunerLayer):
    """A linear with adapters, of which at most one is in its weight: the merged one, else the
    active one if enabled.

    ``base_layer.weight`` is always what the forward uses: the base itself, bit for bit, where
    adapters are disabled.
    """

    adapter_layer_names = ("losia_adapter",)

    def __init__(self, base_layer: nn.Module):
        super().__init__()
        self.base_layer = base_layer
        self.losia_adapter = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._disabled: tuple[str, _unsafe_preserve_version_counter, int] | None = None
        self.in_features, self.out_features = _get_in_out_features(base_layer)
        self.register_load_state_dict_post_hook(_sync)

    def add_adapter(self, name: str, adapter: LoSiAAdapter) -> None:
        """Add ``adapter``, made on ``base_layer``; it enters the weight if ``name`` is active."""
        self.losia_adapter[name] = adapter
        self.set_adapter(self.active_adapters)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x [..., in]`` -> ``[..., out]``."""
        name = self._in_weight()
        if name is None or self.merged:
            return self.base_layer(x, *args, **kwargs)
        adapter = self.losia_adapter[name]
        adapter.finish_step_()
        return adapter(x)

    # which adapter is in the weight ---------------------------------------------------------------

    def take_out_(self) -> None:
        """The base's weight, until the next use of the layer puts the active adapter back."""
        self._take_out(self._in_weight())

    def _in_weight(self) -> str | None:
        return next(
            (name for name, adapter in self.losia_adapter.items() if adapter.in_weight), None
        )

    def _wanted(self) -> str | None:
        if self.merged:
            return self.merged_adapters[0]
        return None if self.disable_adapters else self.only_one(self.active_adapters)

    def only_one(self, names: list[str]) -> str | None:
        """Which of ``names`` this layer has. Raises ValueError if it has several: they share one
        weight."""
        here = [name for name in names if name in self.losia_adapter]
        if len(here) > 1:
            where = self.losia_adapter[here[0]].name
            raise ValueError(
                f"{where}: LoSiA adapters hold values of one weight and do not add up: "
                f"{' and '.join(here)} cannot be active or merged at once; choose one"
            )
        return here[0] if here else None

    def _sync(self) -> None:
        """Put the adapter into the weight that belongs there."""
        wanted, present = self._wanted(), self._in_weight()
        if wanted != present:
            self._take_out(present)
            if wanted is not None:
                self.losia_adapter[wanted].enter_()

    def _take_out(self, name: str | None) -> None:
        if name is not None:
            self.losia_adapter[name].leave_()

    def enable_adapters(self, enabled: bool) -> None:
        """Enabled again, the weight is what it was, and autograd is told so: a backward through a
        graph from before still works, while one through a graph of the other state fails, as it
        should."""
        weight, before = self.base_layer.weight, self._in_weight()
        version = _unsafe_preserve_version_counter(weight)
        super().enable_adapters(enabled)
        self._sync_unmerged()
        after = self._in_weight()
        if before is not None and after is None:
            self._disabled = before, version, weight._version
        elif before is None and after is not None and self._disabled is not None:
            name, version_enabled, version_disabled = self._disabled
            if name == after and version.prev_versions == (version_disabled,):
                version_enabled.__exit__()
                self.losia_adapter[name].note_agreement_()
            self._disabled = None

    def _sync_unmerged(self) -> None:
        if self.disable_adapters and self.merged:
            self.unmerge()
        self._sync()

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self.only_one(names)
        super().set_adapter(names, inference_mode=inference_mode)
        self._sync()

    def delete_adapter(self, adapter_name: str) -> None:
        if adapter_name == self._in_weight():
            self._take_out(adapter_name)
        super().delete_adapter(adapter_name)
        self._sync()

    # merging --------------------------------------------------------------------------------------

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """The active adapter (or the one named) stays in the weight as if it were the base, until
        ``unmerge``.

        Raises ValueError for two adapters, and with ``safe_merge`` for values that are not finite;
        nothing has changed.
        """
        name = self.check_mergeable(adapter_names, safe_merge)
        if name is not None:
            self.losia_adapter[name].finish_step_()
            self.merged_adapters.append(name)
            self._sync()

    def check_mergeable(self, adapter_names: list[str] | None, safe: bool) -> str | None:
        """Which adapter ``merge`` would merge, None if that is done or this layer has none.

        Raises ValueError for two, and if ``safe`` for values that are not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        name = self.only_one([*self.merged_adapters, *names])
        if name is None or name in self.merged_adapters:
            return None
        if safe and not bool(torch.isfinite(self.losia_adapter[name].trained_values()).all()):
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {name} seems to be broken"
            )
        return name

    def unmerge(self) -> None:
        self.merged_adapters.clear()
        self._sync()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The plain linear, with the adapter's values if ``merge``, else the base's."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        if not self.merged:
            self._take_out(self._in_weight())
        return self.base_layer

    # state ----------------------------------------------------------------------------------------

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        """Adapters load while they are out of the weight. Of a state dict that has both, the base
        is left as it is: what it holds is a weight with the adapter in it."""
        base = prefix + "base_layer.weight"
        adapters = any(key.startswith(prefix + "losia_adapter.") for key in state_dict)
        if adapters or base in state_dict:
            self._take_out(self._in_weight())
        if adapters and base in state_dict:
            # the parameter itself: it may be tied, and loading may assign
            state_dict[base] = self.base_layer.weight
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        adapter = self.losia_adapter[adapter_name] if adapter_name in self.losia_adapter else None
        if adapter is not None and not adapter.subnet.is_meta:
            # no dtype: a float32 master stays one
            adapter.to(device or self.base_layer.weight.device)


def _sync(layer: LoSiATunerLinear, incompatible_keys: Any) -> None:
    layer._sync()
