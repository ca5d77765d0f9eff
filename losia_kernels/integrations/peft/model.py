"""LoSiAModel: the tuner that PEFT makes from a LoSiAPeftConfig."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
)
from torch import nn

from ...layers.foreign import check_not_quantized
from ...layers.module import Membership
from ...layers.shapes import find_factors
from ...layers.subnet import subnet_size
from ...layers.targets import (
    check_shared_weights,
    group_by_block,
    kind_of,
    matches,
    output_name_of,
)
from ...parallel.placement import check_whole
from .adapter import LoSiAAdapter
from .config import LoSiAPeftConfig
from .layer import LoSiATunerLinear


class LoSiAModel(BaseTuner):
    """The base model with LoSiA adapters, made by ``peft.get_peft_model(model,
    LoSiAPeftConfig(...))``.

    The layers of the active adapter are LoSiALinears, so that ``LoSiAAdamW(peft_model)``,
    ``attach``, ``calibrate`` and the Trainer's factory and callback train it as they train a model
    from ``apply_losia``.

    Raises ValueError, before anything has changed, if a target is no plain linear, shares its
    weight with another, or is too small for the rank factor.
    """

    prefix = "losia_"
    tuner_layer_cls = LoSiATunerLinear
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        peft_config = self.peft_config[adapter_name]
        self._output_name = _output_layer(model, peft_config)
        # of targets named so PEFT would save the whole weight
        if isinstance(peft_config.target_modules, set):
            peft_config.target_modules.discard(self._output_name)
        self._generator = torch.Generator().manual_seed(peft_config.seed)
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        self._check_targets(model, peft_config)
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._group(model, adapter_name, peft_config)

    def _check_target_module_exists(self, peft_config: LoSiAPeftConfig, key: str) -> Any:
        if key == self._output_name and peft_config.output_dim_factor > 0:
            return True
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _check_targets(self, model: nn.Module, config: LoSiAPeftConfig) -> None:
        targets, inside = [], "\n"
        for name, module in model.named_modules():
            if name.startswith(inside):
                continue
            if isinstance(module, BaseTunerLayer):
                inside = name + "."
            if self._check_target_module_exists(config, name):
                self._check_target(name, module)
                targets.append((name, module))
        check_shared_weights(model, [name for name, _ in targets], [])
        for name, module in targets:
            linear = module.get_base_layer() if isinstance(module, LoSiATunerLinear) else module
            for factor, features in zip(
                self._factors(model, name, linear, config), _features_of(linear), strict=True
            ):
                subnet_size(factor, features, name, config.alignment)

    def _check_target(self, name: str, module: nn.Module) -> None:
        if isinstance(module, LoSiATunerLinear):
            return
        check_not_quantized(name, module)
        if kind_of(module) is None:
            raise ValueError(
                f"LoSiA: target_modules matches {name!r}, a {type(module).__name__}, but only a plain "
                f"nn.Linear or Conv1D can hold a subnet; exclude it with exclude_modules"
            )
        check_whole(
            module.weight,
            name,
            "through PEFT it is trained whole: use apply_losia, then fully_shard",
        )

    def _create_and_replace(
        self,
        peft_config: LoSiAPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self._check_target(current_key, target)
        layer = target if isinstance(target, LoSiATunerLinear) else LoSiATunerLinear(target)
        factors = self._factors(self.model, current_key, layer.base_layer, peft_config)
        layer.take_out_()  # else the new one would begin with the values of the one that is in
        adapter = LoSiAAdapter(
            layer.base_layer, factors, self._generator, current_key, peft_config.alignment
        )
        if not peft_config.init_weights:
            with torch.no_grad():
                adapter.subnet.add_(torch.randn_like(adapter.subnet))
        if adapter_name == "ref" and layer.losia_adapter:
            warnings.warn(
                "LoSiA: an adapter named 'ref' beside another: TRL's trainers copy a PeftModel's adapter "
                "into one of that name, parameter by parameter, which gives a wrong reference. Give them the "
                "plain model and peft_config=",
                stacklevel=2,
            )
        layer.add_adapter(adapter_name, adapter)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _factors(
        self, model: nn.Module, name: str, linear: nn.Module, config: LoSiAPeftConfig
    ) -> tuple[float, float]:
        if name == self._output_name:
            return config.output_dim_factor, 1.0
        return find_factors(model, name, _features_of(linear), config.losia_config())

    def _group(self, model: nn.Module, adapter_name: str, peft_config: LoSiAPeftConfig) -> None:
        """Note each layer's place in the timeline, as apply_losia does: the output layer, then
        block by block."""
        config = peft_config.losia_config()
        adapters = {
            name: layer.losia_adapter[adapter_name]
            for name, layer in model.named_modules()
            if isinstance(layer, LoSiATunerLinear) and adapter_name in layer.losia_adapter
        }
        output = adapters.pop(self._output_name, None)
        first = 0
        if output is not None:
            first = int(peft_config.output_dim_factor < 1)
            output.membership = Membership(0 if first else None, self._output_name, config, True)
        blocks = group_by_block(model, list(adapters), config.target_modules != "all-linear")
        for number, (block, names) in enumerate(blocks.items(), start=first):
            for name in names:
                adapters[name].membership = Membership(number, block, config)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for adapter in self._adapters(adapter_name):
            adapter.set_master_(autocast_adapter_dtype)
            if adapter.place is not None:
                master = "float32" if autocast_adapter_dtype else "none"
                config = replace(adapter.place.config, master=master)
                adapter.membership = replace(adapter.place, config=config)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _adapters(self, name: str) -> Iterator[LoSiAAdapter]:
        for layer in self.model.modules():
            if isinstance(layer, LoSiATunerLinear) and name in layer.losia_adapter:
                yield layer.losia_adapter[name]

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make the adapter (several, if no layer has two of them) the active one: its values are in
        the weights."""
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        for layer in self.model.modules():
            if isinstance(layer, LoSiATunerLinear):
                layer.only_one(names)  # before any layer changes
        super().set_adapter(adapter_name, inference_mode=inference_mode)

    def _tuner_layers(self) -> Iterator[tuple[str, LoSiATunerLinear]]:
        for name, layer in self.named_modules():
            if isinstance(layer, LoSiATunerLinear):
                yield name, layer

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """As PEFT's; what cannot be merged is refused before any layer has changed."""
        self._check_mergeable(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_mergeable(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_mergeable(self, adapter_names: list[str] | None, safe: bool) -> None:
        for _, layer in self._tuner_layers():
            layer.check_mergeable(adapter_names, safe)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for path, layer in self._tuner_layers():
            for name, adapter in layer.losia_adapter.items():
                adapter.check_loadable(state_dict, f"{prefix}{path}.losia_adapter.{name}.")
        super()._load_from_state_dict(state_dict, prefix, *args)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "LoSiA: one batch cannot mix adapters (adapter_names=), which share one weight; call the "
                "model once for each adapter, after set_adapter"
            )
        yield


def _features_of(linear: nn.Module) -> tuple[int, int]:
    inputs, outputs = _get_in_out_features(linear)
    return outputs, inputs


def _output_layer(model: nn.Module, config: LoSiAPeftConfig) -> str | None:
    """The name of the output layer if it is to have a subnet, else None."""
    name = output_name_of(model)
    head = None if name is None else model.get_submodule(name)
    if config.output_dim_factor == 0:
        if (
            name is not None
            and isinstance(config.target_modules, set)
            and matches(name, list(config.target_modules))
        ):
            raise ValueError(
                f"LoSiA: target_modules names {name!r}, the output layer, but it is trained by "
                f"output_dim_factor, the share of its outputs, which is 0"
            )
        return None
    if not isinstance(head, (nn.Linear, LoSiATunerLinear)):
        raise ValueError(
            f"LoSiA: output_dim_factor={config.output_dim_factor} needs an nn.Linear output layer, found "
            f"{type(head).__name__}; leave it at 0"
        )
    return name
