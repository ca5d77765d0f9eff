"""How much memory a fine-tuning run needs, by arithmetic on the model's config: the paper's Table
13 as a function.

Nothing is loaded and nothing is run. Bytes are those of live tensors at the peak of a step of the
Hugging Face model (SDPA attention without a mask, no KV cache), without the allocator's and the
CUDA context's share. T is the number of tokens in a micro-batch, batch * context.
"""

import json
import math
from dataclasses import dataclass
from dataclasses import replace as with_changes
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..layers.cross_entropy import CHUNK_BYTES
from ..layers.subnet import subnet_size

METHODS = ("losia", "losia-dense", "full", "lora", "dora", "galore", "frozen")
MODEL_TYPES = ("llama", "mistral", "qwen2", "gemma")
GIB = 2**30
FLOAT32 = 4
IMPORTANCE_BYTES = {
    "sensitivity": 8,
    "sensitivity_bfloat16": 4,
    "gradient": 4,
    "marginal": 0,
}  # a weight of the group
MOMENT_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1}
CODE_BLOCK = 256  # of int8 moments: inputs of a row that share one float32 scale


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a LLaMA-like decoder: RMSNorm, rotary attention, gated MLP, optional biases,
    optional tied head."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False
    upcasts_norm_weight: bool = False  # Gemma multiplies by its norm weight in float32

    @classmethod
    def from_config(cls, config: dict) -> "ModelShape":
        """From the contents of a Hugging Face ``config.json``. Raises ValueError for another kind
        of model."""
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(
                f"the memory model knows {', '.join(MODEL_TYPES)}, not model_type {kind!r}"
            )
        try:
            heads = config["num_attention_heads"]
            return cls(
                hidden=config["hidden_size"],
                intermediate=config["intermediate_size"],
                layers=config["num_hidden_layers"],
                heads=heads,
                kv_heads=config.get("num_key_value_heads") or heads,
                head_dim=config.get("head_dim") or config["hidden_size"] // heads,
                vocabulary=config["vocab_size"],
                tied=config.get("tie_word_embeddings", kind == "gemma"),
                qkv_bias=kind == "qwen2" or config.get("attention_bias", False),
                upcasts_norm_weight=kind == "gemma",
            )
        except KeyError as missing:
            raise ValueError(f"the config has no {missing.args[0]!r}") from None

    @classmethod
    def from_folder(cls, folder: str | Path) -> "ModelShape":
        """From ``FOLDER/config.json``. Raises ValueError if there is none or it is of another
        kind."""
        path = Path(folder) / "config.json"
        try:
            config = json.loads(path.read_text())
        except FileNotFoundError:
            raise ValueError(
                f"{path} does not exist; give the folder of a Hugging Face model"
            ) from None
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
        return cls.from_config(config)

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of a block's linears."""
        attention, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (attention, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, attention),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    @property
    def block_weights(self) -> int:
        """Values of a block's linear weights."""
        return sum(out * inner for out, inner in self.linears.values())

    @property
    def parameters(self) -> int:
        """All values of the model; a tied head counts once."""
        kv = self.kv_heads * self.head_dim
        bias = (self.heads * self.head_dim + 2 * kv) if self.qkv_bias else 0
        block = self.block_weights + bias + 2 * self.hidden
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * block + embeddings + self.hidden


@dataclass(frozen=True)
class Setting:
    """What is run. ``rank`` is for lora, dora and galore; the factors are for losia and
    losia-dense."""

    method: str = "losia"
    batch: int = 4
    context: int = 2048
    checkpointing: bool = False
    rank_factor: float = 1 / 8
    output_dim_factor: float = 0.0
    master_weights: bool = True
    moments: str = "float32"  # as LoSiAAdamW's
    remainder: bool = False
    in_backward: bool = False
    importance: str = "sensitivity"
    rank: int = 64
    adapter_bytes: int = (
        2  # 4: float32 adapters under autocast, PEFT's and Trainer's default for a bf16 model
    )
    weight_bytes: int = 2
    fused_loss: bool = False  # the loss without logits, which ``apply_losia`` sets up

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(
                f"unknown method {self.method!r}; the memory model knows {', '.join(METHODS)}"
            )
        if self.moments not in MOMENT_BYTES:
            raise ValueError(
                f"moments must be one of {', '.join(MOMENT_BYTES)}, got {self.moments!r}"
            )
        if self.remainder and (self.master_weights or self.weight_bytes != 2):
            raise ValueError(
                "a remainder completes 16-bit subnets: it needs master_weights=False and 16-bit weights"
            )
        for name in ("batch", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step. ``activations`` are saved for the backward; ``workspace`` lives
    only at the peak."""

    trained_values: int
    weights: int
    trained: int  # what is trained and is not a model weight: master copies, adapters, projections
    optimizer: int
    importance: int
    gradients: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        return (
            self.weights
            + self.trained
            + self.optimizer
            + self.importance
            + self.gradients
            + self.activations
            + self.workspace
        )


def subnet_values(shape: ModelShape, rank_factor: float, output_dim_factor: float = 0.0) -> int:
    """Values that LoSiA trains: ``int(p * out) * int(p * in)`` a linear, ``int(p_o * vocabulary) *
    hidden`` on top."""
    block = sum(
        subnet_size(rank_factor, out, name) * subnet_size(rank_factor, inner, name)
        for name, (out, inner) in shape.linears.items()
    )
    head = int(output_dim_factor * shape.vocabulary) * shape.hidden
    return shape.layers * block + head


def estimate(shape: ModelShape, setting: Setting) -> Memory:
    """Peak memory of one step of ``setting`` on a model of ``shape``."""
    state = _training_state(shape, setting)
    tokens = setting.batch * setting.context
    block, observing = (
        _saved_by_block(shape, setting, tokens, observing) for observing in (False, True)
    )
    b = setting.weight_bytes
    inputs = b * tokens * shape.hidden  # one hidden state
    final_norm = _saved_by_norm(shape, setting, tokens) + (inputs if _trains_head(setting) else 0)
    if (
        setting.fused_loss
    ):  # the gradient of the hidden state, twice while it is scaled, and a chunk of logits
        losses = 2 * inputs + b * min(tokens * shape.vocabulary, CHUNK_BYTES // FLOAT32)
    else:  # log-probabilities, their gradient and the logits' gradient, float32
        losses = 3 * FLOAT32 * tokens * shape.vocabulary

    # Any block may be the one that observes: it is counted in the phase where it costs most.
    kept = shape.layers * inputs if setting.checkpointing else (shape.layers - 1) * block
    last = 0 if setting.checkpointing else observing
    head = b * shape.vocabulary * shape.hidden if setting.method == "full" else 0
    late = (
        b * shape.block_weights + head if setting.method in ("full", "galore") else 0
    )  # not there yet, see below
    phases = [  # saved activations, gradients so far, what lives only then
        (kept + last + final_norm, 0, losses),
        (kept + last + final_norm, head, _norm_workspace(shape, tokens)),
        (
            kept + (block if setting.checkpointing else last),
            head,
            _block_workspace(shape, setting, tokens, False),
        ),
        (
            inputs + observing,
            state["gradients"] - late,
            _block_workspace(shape, setting, tokens, True),
        ),
        (0, state["gradients"], _update_workspace(shape, setting)),
    ]
    activations, gradients, workspace = max(phases, key=sum)
    return Memory(
        trained_values=state["values"],
        weights=b * shape.parameters,
        trained=state["trained"],
        optimizer=state["optimizer"],
        importance=state["importance"],
        gradients=gradients,
        activations=activations,
        workspace=workspace,
    )


# what fits ----------------------------------------------------------------------------------------


def largest(shape: ModelShape, setting: Setting, field: str, budget: int) -> int:
    """The largest ``field`` ("batch" or "context") whose estimate stays within ``budget`` bytes; 0
    if 1 does not."""

    def fits(size: int) -> bool:
        return estimate(shape, with_changes(setting, **{field: size})).total <= budget  # type: ignore[arg-type]

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def describe_fit(
    model: str,
    memory: float,
    context: int = 2048,
    output_dim_factor: float = 0.0,
    reserve: float = 1.0,
    moments: str = "float32",
    master: str = "float32",
    in_backward: bool = False,
) -> str:
    """What of LoSiA fits a GPU of ``memory`` GiB, as a table: for ``python -m losia_kernels
    estimate``.

    ``model`` is a folder with a ``config.json``; ``reserve`` GiB are left to the CUDA context and
    the allocator. ``moments`` and ``in_backward`` are LoSiAAdamW's; ``master`` is "float32",
    "remainder" or "none" (docs/memory.md). Raises ValueError for a config the memory model does not
    know or a memory smaller than the reserve.
    """
    if not 0 <= reserve < memory < math.inf:
        raise ValueError(
            f"--memory must be finite and more than the reserve of {reserve} GiB (--reserve, at least 0), "
            f"got {memory}"
        )
    if not 0 <= output_dim_factor <= 1:
        raise ValueError(f"--output-dim-factor must be in [0, 1], got {output_dim_factor}")
    shape, budget = ModelShape.from_folder(model), int((memory - reserve) * GIB)
    state: dict[str, Any] = {
        "moments": moments,
        "in_backward": in_backward,
        "master_weights": master == "float32",
        "remainder": master == "remainder",
    }
    lines = [
        f"{model}: {shape.parameters / 1e9:.2f}e9 values, {2 * shape.parameters / GIB:.2f} GiB in bfloat16",
        f"memory {memory:g} GiB, of which {reserve:g} GiB are left to CUDA and its allocator",
        "",
        f"{'p':>5} {'trained':>10} {'checkpointing':>13} {f'batch at {context}':>13} {'context at batch 1':>18} "
        f"{f'GiB at 1 x {context}':>16}",
    ]
    for p in (Fraction(1, 16), Fraction(1, 8), Fraction(1, 4), Fraction(1, 2)):
        for checkpointing in (False, True):
            setting = Setting(
                batch=1,
                context=context,
                checkpointing=checkpointing,
                rank_factor=float(p),
                output_dim_factor=output_dim_factor,
                fused_loss=True,
                **state,
            )
            one = estimate(shape, setting)
            batch, longest = (
                largest(shape, setting, field, budget) for field in ("batch", "context")
            )
            lines.append(
                f"{str(p):>5} {one.trained_values / 1e6:>9.1f}M {'yes' if checkpointing else 'no':>13} "
                f"{batch or 'none':>13} {longest or 'none':>18} {one.total / GIB:>16.2f}"
            )
    return "\n".join(lines)


# state that lives through the run -----------------------------------------------------------------


def _training_state(shape: ModelShape, setting: Setting) -> dict[str, int]:
    b, method, r = setting.weight_bytes, setting.method, setting.rank
    sizes = shape.linears.values()
    if method in ("losia", "losia-dense"):
        values = subnet_values(shape, setting.rank_factor, setting.output_dim_factor)
        master = FLOAT32 if setting.master_weights else b
        indices = (
            8
            * shape.layers
            * sum(
                int(setting.rank_factor * out) + int(setting.rank_factor * inner)
                for out, inner in sizes
            )
        )
        optimizer = (2 * MOMENT_BYTES[setting.moments] + (2 if setting.remainder else 0)) * values
        if setting.moments == "int8":
            optimizer += 2 * FLOAT32 * _scales(shape, setting)
        kept = _kept_in_backward(shape, setting) if setting.in_backward else values
        head = shape.vocabulary * shape.hidden if 0 < setting.output_dim_factor < 1 else 0
        observed = max(
            shape.block_weights, head
        )  # one group at a time: a block, or the output layer
        return {
            "values": values,
            "trained": master * values + indices,
            "optimizer": optimizer,
            "gradients": master * kept,
            "importance": IMPORTANCE_BYTES[setting.importance] * observed,
        }
    if method in ("lora", "dora"):
        values = shape.layers * sum(
            r * (out + inner) + (out if method == "dora" else 0) for out, inner in sizes
        )
        size = setting.adapter_bytes * values
        return {
            "values": values,
            "trained": size,
            "optimizer": 2 * size,
            "gradients": size,
            "importance": 0,
        }
    if method == "galore":
        # torch.optim keeps moments of the projected gradient, r x the longer side; the projection
        # has the shorter one
        values = shape.layers * shape.block_weights
        moments = shape.layers * sum(2 * min(r, *size) * max(size) for size in sizes)
        projections = shape.layers * sum(min(r, *size) * min(size) for size in sizes)
        return {
            "values": values,
            "trained": b * projections,
            "optimizer": b * moments,
            "gradients": b * values,
            "importance": 0,
        }
    if method == "full":
        values = shape.parameters
        return {
            "values": values,
            "trained": 0,
            "optimizer": 2 * b * values,
            "gradients": b * values,
            "importance": 0,
        }
    return dict.fromkeys(("values", "trained", "optimizer", "gradients", "importance"), 0)


def _scales(shape: ModelShape, setting: Setting) -> int:
    """Blocks of int8 moments: the rows of a subnet times the blocks of a row."""
    p = setting.rank_factor
    block = sum(
        subnet_size(p, out, n) * -(-subnet_size(p, inner, n) // CODE_BLOCK)
        for n, (out, inner) in shape.linears.items()
    )
    return shape.layers * block + int(setting.output_dim_factor * shape.vocabulary) * -(
        -shape.hidden // CODE_BLOCK
    )


def _kept_in_backward(shape: ModelShape, setting: Setting) -> int:
    """Gradients alive when updates run inside the backward: of the group that observes, and of one
    layer more."""
    sizes = [
        subnet_size(setting.rank_factor, out, n) * subnet_size(setting.rank_factor, inner, n)
        for n, (out, inner) in shape.linears.items()
    ]
    return max(sum(sizes), int(setting.output_dim_factor * shape.vocabulary) * shape.hidden) + max(
        sizes
    )


def _trains_head(setting: Setting) -> bool:
    losia = setting.method in ("losia", "losia-dense") and setting.output_dim_factor > 0
    return losia or setting.method == "full"


# activations --------------------------------------------------------------------------------------


def _saved_by_norm(shape: ModelShape, setting: Setting, tokens: int) -> int:
    saved = FLOAT32 * tokens * (shape.hidden + 1)  # the input in float32 and 1/rms
    if setting.method == "full":
        saved += (
            (FLOAT32 if shape.upcasts_norm_weight else setting.weight_bytes) * tokens * shape.hidden
        )
    return saved


def _saved_by_block(shape: ModelShape, setting: Setting, tokens: int, observing: bool) -> int:
    """What the backward of one block needs. ``observing`` matters for losia alone."""
    b = setting.weight_bytes
    attention, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    saved = 2 * _saved_by_norm(shape, setting, tokens)
    saved += (
        b * tokens * (2 * attention + 2 * kv) + FLOAT32 * tokens * shape.heads
    )  # q, k, v, out and log-sum-exp
    saved += b * tokens * 3 * shape.intermediate  # gate, its activation, up
    return saved + _saved_by_linears(shape, setting, tokens, observing)


def _saved_by_linears(shape: ModelShape, setting: Setting, tokens: int, observing: bool) -> int:
    b, method = setting.weight_bytes, setting.method
    if method == "frozen":
        return 0
    if method == "losia" and not observing:
        k = {
            n: subnet_size(setting.rank_factor, inner, n) for n, (_, inner) in shape.linears.items()
        }
        shared = [
            ("q_proj", "k_proj", "v_proj"),
            ("gate_proj", "up_proj"),
        ]  # kept whole, once, where that is less
        kept = sum(min(sum(k[name] for name in names), shape.hidden) for names in shared)
        return b * tokens * (kept + k["o_proj"] + k["down_proj"])
    inputs, outputs = (sum(size[side] for size in shape.linears.values()) for side in (1, 0))
    # q, k, v share their input, gate and up theirs; o_proj's is the attention's output, saved
    # already
    saved = b * tokens * (2 * shape.hidden + shape.intermediate)
    if method in ("lora", "dora"):
        if setting.adapter_bytes > b:
            saved = b * tokens * inputs  # PEFT casts each adapter's input by itself
        saved += b * tokens * setting.rank * len(shape.linears)
    if method == "dora":
        saved += (
            2 * b * tokens * outputs
        )  # the scale multiplies both the base's and the adapter's result
    return saved


def _norm_workspace(shape: ModelShape, tokens: int) -> int:
    """The backward of RMSNorm, in float32: five tensors of a hidden state's size at once."""
    return 5 * FLOAT32 * tokens * shape.hidden


def _block_workspace(shape: ModelShape, setting: Setting, tokens: int, observing: bool) -> int:
    """While a block's MLP is differentiated: gradients of activations, and one dense weight
    gradient if there is one."""
    b, method = setting.weight_bytes, setting.method
    flowing = b * tokens * (2 * shape.hidden + 3 * shape.intermediate)
    if _saved_by_linears(shape, setting, tokens, observing) >= b * tokens * shape.intermediate:
        flowing -= b * tokens * shape.intermediate  # down_proj's saved input is free by then
    if method in ("lora", "dora") and setting.adapter_bytes > b:
        flowing += FLOAT32 * tokens * shape.intermediate  # the gradient of the cast input
    if method == "losia-dense" or (method == "losia" and observing):
        flowing += b * _largest_weight(shape)
    if method == "dora":  # PEFT makes the adapter's weight by sending an identity matrix through it
        flowing = max(
            flowing, b * max(inner * (inner + 2 * out) for out, inner in shape.linears.values())
        )
    return flowing


def _update_workspace(shape: ModelShape, setting: Setting) -> int:
    """GaLore projects a weight's update back to full size, then scales it; fused AdamW and ours
    need nothing."""
    return 2 * setting.weight_bytes * _largest_weight(shape) if setting.method == "galore" else 0


def _largest_weight(shape: ModelShape) -> int:
    return max(out * inner for out, inner in shape.linears.values())
