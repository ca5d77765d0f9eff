"""The memory model of other methods beside LoSiA's: what each adds to frozen weights."""

from dataclasses import dataclass

from losia_kernels.finetune.estimate import FLOAT32, LoSiA, ModelShape, Setting

from ..methods.losia import LEAN_CONFIG, LEAN_OPTIMIZER


def _state(values: int, trained: int, optimizer: int, gradients: int) -> dict[str, int]:
    found = {"values": values, "trained": trained, "optimizer": optimizer}
    return {**found, "gradients": gradients, "importance": 0}


@dataclass(frozen=True)
class Dense(LoSiA):
    """LoSiA by dense gradients: every linear keeps its whole input and makes a weight gradient."""

    def saved_by_linears(self, shape: ModelShape, observing: bool) -> int:
        return self.whole_inputs(shape)

    def block_workspace(self, shape: ModelShape, observing: bool) -> int:
        return super().block_workspace(shape, observing=True)


@dataclass(frozen=True)
class LoRA(Setting):
    rank: int = 64
    adapter_bytes: int = 2  # 4: float32 adapters under autocast, the default for a 16-bit model

    def values(self, shape: ModelShape) -> int:
        return shape.layers * sum(self.rank * sum(size) for size in shape.linears.values())

    def state(self, shape: ModelShape) -> dict[str, int]:
        size = self.adapter_bytes * self.values(shape)
        return _state(self.values(shape), size, 2 * size, size)

    def saved_by_linears(self, shape: ModelShape, observing: bool) -> int:
        per_token = self.weight_bytes * self.tokens
        saved = self.whole_inputs(shape)
        if self.adapter_bytes > self.weight_bytes:  # PEFT casts each adapter's input by itself
            saved = per_token * sum(inner for _, inner in shape.linears.values())
        return saved + per_token * self.rank * len(shape.linears)

    def block_workspace(self, shape: ModelShape, observing: bool) -> int:
        """And the gradient of the cast input; the adapter's share of down_proj's, where nothing else is as large."""
        wide = self.tokens * shape.intermediate
        gradient = FLOAT32 * wide if self.adapter_bytes > self.weight_bytes else 0
        share = self.weight_bytes * wide if self.liger else 0
        return super().block_workspace(shape, observing) + gradient + share


@dataclass(frozen=True)
class DoRA(LoRA):
    def values(self, shape: ModelShape) -> int:
        return super().values(shape) + shape.layers * _outputs(shape)

    def saved_by_linears(self, shape: ModelShape, observing: bool) -> int:
        """And the base's and the adapter's result, both of which the scale multiplies."""
        results = 2 * self.weight_bytes * self.tokens * _outputs(shape)
        return super().saved_by_linears(shape, observing) + results

    def block_workspace(self, shape: ModelShape, observing: bool) -> int:
        """PEFT makes the adapter's weight by sending an identity matrix through it."""
        identity = max(inner * (inner + 2 * out) for out, inner in shape.linears.values())
        return max(super().block_workspace(shape, observing), self.weight_bytes * identity)


def _outputs(shape: ModelShape) -> int:
    return sum(out for out, _ in shape.linears.values())


@dataclass(frozen=True)
class GaLore(Setting):
    rank: int = 512

    def state(self, shape: ModelShape) -> dict[str, int]:
        """Moments of the projected gradient, r x the longer side; the projection has the shorter one."""
        values, sizes = shape.layers * shape.block_weights, shape.linears.values()
        moments = shape.layers * sum(2 * min(self.rank, *size) * max(size) for size in sizes)
        projections = shape.layers * sum(min(self.rank, *size) * min(size) for size in sizes)
        b = self.weight_bytes
        return _state(values, b * projections, b * moments, b * values)

    def late_gradients(self, shape: ModelShape) -> int:
        return self.weight_bytes * shape.block_weights

    def saved_by_linears(self, shape: ModelShape, observing: bool) -> int:
        return self.whole_inputs(shape)

    def update_workspace(self, shape: ModelShape) -> int:
        """A weight's update, projected back to full size and then scaled."""
        return 2 * self.weight_bytes * shape.largest_weight


@dataclass(frozen=True)
class Full(Setting):
    @property
    def trains_head(self) -> bool:
        return True

    def state(self, shape: ModelShape) -> dict[str, int]:
        b, values = self.weight_bytes, shape.parameters
        return _state(values, 0, 2 * b * values, b * values)

    def head_gradient(self, shape: ModelShape) -> int:
        return self.weight_bytes * shape.vocabulary * shape.hidden

    def late_gradients(self, shape: ModelShape) -> int:
        return self.weight_bytes * shape.block_weights + self.head_gradient(shape)

    def saved_by_norm(self, shape: ModelShape) -> int:
        """And its output; Gemma multiplies by its weight in float32."""
        width = FLOAT32 if shape.upcasts_norm_weight else self.weight_bytes
        return super().saved_by_norm(shape) + width * self.tokens * shape.hidden

    def saved_by_linears(self, shape: ModelShape, observing: bool) -> int:
        return self.whole_inputs(shape)


SETTINGS: dict[str, Setting] = {  # by the name of a method
    "frozen": Setting(),
    "full": Full(),
    "lora": LoRA(),
    "lora-fp32": LoRA(adapter_bytes=4),
    "pissa": LoRA(),
    "dora": DoRA(),
    "galore": GaLore(),
    "losia-pro": LoSiA(),
    "losia-pro-fused": LoSiA(fused_loss=True),
    "losia-pro-lean": LoSiA(fused_loss=True, **LEAN_CONFIG, **LEAN_OPTIMIZER),
    "losia-dense": Dense(),
    "frozen-liger": Setting(liger=True, fused_loss=True),
    "lora-liger": LoRA(liger=True, fused_loss=True),
    "losia-liger": LoSiA(liger=True, fused_loss=True),
}
