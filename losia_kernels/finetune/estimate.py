"""How much memory a fine-tuning run needs, by arithmetic on the model's config: the paper's Table
13 as a function.

Nothing is loaded and nothing is run. Bytes are those of live tensors at the peak of a step of the
Hugging Face model (SDPA attention without a mask, no KV cache), without the allocator's and the
CUDA context's share. T is the number of tokens in a micro-batch, batch * context.
"""

from dataclasses import dataclass

from ..config import MASTERS
from ..kernels.codes import CODE_BLOCK
from ..layers.cross_entropy import CHUNK_BYTES
from ..layers.shapes import WIDE, WRITERS, wide_factors
from ..layers.subnet import subnet_size
from ..training.adam_state import MOMENTS
from ..training.importance import OBSERVERS

SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads vocab_size".split()
OPTIONAL_SIZES = ("num_key_value_heads", "head_dim", "max_position_embeddings")
MODEL_TYPES = ("llama", "mistral", "qwen2", "gemma")
GIB = 2**30
FLOAT32 = 4


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
    positions: int | None = None  # the longest context that it was made for

    @classmethod
    def from_config(cls, config: dict) -> "ModelShape":
        """From the contents of a Hugging Face ``config.json``. Raises ValueError for another kind
        of model."""
        if not isinstance(config, dict):
            raise ValueError(f"the config is {config!r:.40}, expected an object")
        for name in SIZES:
            size = config.get(name, 1)
            if type(size) is not int or size < 1:
                raise ValueError(f"the config's {name} is {size!r:.40}, expected a whole number")
        for name in OPTIONAL_SIZES:
            size = config.get(name)
            if size is not None and (type(size) is not int or size < 1):
                raise ValueError(f"the config's {name} is {size!r:.40}, expected a whole number")
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            known = ", ".join(MODEL_TYPES)
            raise ValueError(f"the memory model knows {known}, not model_type {kind!r}")
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
                positions=config.get("max_position_embeddings"),
            )
        except KeyError as missing:
            raise ValueError(f"the config has no {missing.args[0]!r}") from None

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
    def largest_weight(self) -> int:
        """Values of the largest of a block's linear weights."""
        return max(out * inner for out, inner in self.linears.values())

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
    """What is run, with every weight frozen: what each kind of training below adds to.

    Sizes in bytes unless they say ``values``. ``liger``: RMSNorm, rotary embedding and gated MLP are
    Liger-Kernel's.
    """

    batch: int = 4
    context: int = 2048
    checkpointing: bool = False
    weight_bytes: int = 2
    fused_loss: bool = False  # the loss without logits, which ``apply_losia`` sets up
    liger: bool = False

    def __post_init__(self) -> None:
        for name in ("batch", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def tokens(self) -> int:
        return self.batch * self.context

    @property
    def trains_head(self) -> bool:
        """Whether the input of the output layer is kept."""
        return False

    def state(self, shape: ModelShape) -> dict[str, int]:
        """What lives through the run: ``values`` trained, and bytes that are ``trained`` and no
        weights of the model (master copies, adapters), of the optimizer, gradients, importance."""
        return dict.fromkeys(("values", "trained", "optimizer", "gradients", "importance"), 0)

    def head_gradient(self, shape: ModelShape) -> int:
        """A dense gradient of the output layer, there from the start of the backward."""
        return 0

    def late_gradients(self, shape: ModelShape) -> int:
        """Of ``state``'s gradients what is not there yet while the last block is differentiated."""
        return 0

    def saved_by_norm(self, shape: ModelShape) -> int:
        width = self.weight_bytes if self.liger else FLOAT32
        return self.tokens * (width * shape.hidden + FLOAT32)  # the input and 1/rms

    def saved_by_linears(self, shape: ModelShape, observing: bool) -> int:
        """Of one block, beyond what attention, norms and activations keep."""
        return 0

    def whole_inputs(self, shape: ModelShape) -> int:
        """Inputs of a block's linears. q, k, v share theirs, gate and up theirs; o_proj's is the
        attention's output, saved already."""
        return self.weight_bytes * self.tokens * (2 * shape.hidden + shape.intermediate)

    def saved_by_block(self, shape: ModelShape, observing: bool) -> int:
        """What the backward of one block needs."""
        attention, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        # q, k, v, out and log-sum-exp; gate, its activation (which Liger computes again), up
        values = 2 * attention + 2 * kv + (2 if self.liger else 3) * shape.intermediate
        saved = self.tokens * (self.weight_bytes * values + FLOAT32 * shape.heads)
        return saved + 2 * self.saved_by_norm(shape) + self.saved_by_linears(shape, observing)

    def block_workspace(self, shape: ModelShape, observing: bool) -> int:
        """While a block's MLP is differentiated: gradients of activations."""
        wide = self.weight_bytes * self.tokens * shape.intermediate
        # Liger writes two of them over what it has saved
        flowing = (
            1 if self.liger else 3
        ) * wide + 2 * self.weight_bytes * self.tokens * shape.hidden
        # down_proj's saved input is free by then
        return flowing - (wide if self.saved_by_linears(shape, observing) >= wide else 0)

    @property
    def observes(self) -> bool:
        """Whether some block keeps its inputs whole and forms dense gradients."""
        return True

    def pending(self, shape: ModelShape) -> int:
        """Dense gradients of the group that observes, from its backward to the step."""
        return 0

    def update_workspace(self, shape: ModelShape) -> int:
        """Fused AdamW and ours need nothing."""
        return 0


@dataclass(frozen=True)
class LoSiA(Setting):
    """What is run with LoSiA; the fields are LoSiAConfig's and LoSiAAdamW's."""

    rank_factor: float = 1 / 8
    output_dim_factor: float = 0.0
    master: str = "float32"
    moments: str = "float32"
    in_backward: bool = False
    importance: str = "sensitivity"
    shape: str = "square"
    moves: str = "importance"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.moments not in MOMENTS:
            known = ", ".join(MOMENTS)
            raise ValueError(f"moments must be one of {known}, got {self.moments!r}")
        if self.master not in MASTERS:
            raise ValueError(f"master must be one of {', '.join(MASTERS)}, got {self.master!r}")
        if self.master == "split" and self.weight_bytes != 2:
            raise ValueError('master="split" completes 16-bit weights')

    @property
    def trains_head(self) -> bool:
        return self.output_dim_factor > 0

    @property
    def observes(self) -> bool:
        return self.moves == "importance"

    def sizes(self, shape: ModelShape) -> dict[str, tuple[int, int]]:
        """``(k_out, k_in)`` of a block's subnets."""
        p, sizes = self.rank_factor, {}
        for name, (out, n) in shape.linears.items():
            wide = self.shape == "wide" and p < WIDE
            p_out, p_in = wide_factors(p, name in WRITERS) if wide else (p, p)
            sizes[name] = subnet_size(p_out, out, name), subnet_size(p_in, n, name)
        return sizes

    def head_rows(self, shape: ModelShape) -> int:
        """Outputs of the output layer that are trained, over all its inputs."""
        return int(self.output_dim_factor * shape.vocabulary)

    def values(self, shape: ModelShape) -> int:
        """Trained: ``int(p * out) * int(p * in)`` a linear, ``int(p_o * vocabulary) * hidden`` on top."""
        block = sum(k_out * k_in for k_out, k_in in self.sizes(shape).values())
        return shape.layers * block + self.head_rows(shape) * shape.hidden

    def state(self, shape: ModelShape) -> dict[str, int]:
        values, sizes = self.values(shape), self.sizes(shape).values()
        master = FLOAT32 if self.master == "float32" else self.weight_bytes
        indices = 8 * shape.layers * sum(k_out + k_in for k_out, k_in in sizes)
        rest = 2 if self.master == "split" else 0
        optimizer = (2 * MOMENTS[self.moments].itemsize + rest) * values
        if self.moments == "int8":  # rows of a subnet times the blocks of a row
            blocks = shape.layers * sum(k_out * -(-k_in // CODE_BLOCK) for k_out, k_in in sizes)
            blocks += self.head_rows(shape) * -(-shape.hidden // CODE_BLOCK)
            optimizer += 2 * FLOAT32 * blocks
        kept = values
        if self.in_backward:  # of the group that observes, and of one layer more
            one = [k_out * k_in for k_out, k_in in sizes]
            kept = max(sum(one), self.head_rows(shape) * shape.hidden) + max(one)
        # one group at a time: a block, or the output layer
        head = shape.vocabulary * shape.hidden if 0 < self.output_dim_factor < 1 else 0
        return {
            "values": values,
            "trained": master * values + indices,
            "optimizer": optimizer,
            "gradients": master * kept,
            "importance": self.observes
            * OBSERVERS[self.importance].bytes_per_weight
            * max(shape.block_weights, head),
        }

    def saved_by_linears(self, shape: ModelShape, observing: bool) -> int:
        if observing:
            return self.whole_inputs(shape)
        k = {name: k_in for name, (_, k_in) in self.sizes(shape).items()}
        shared = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
        # kept whole, once, where that is less
        kept = sum(min(sum(k[name] for name in names), shape.hidden) for names in shared)
        return self.weight_bytes * self.tokens * (kept + k["o_proj"] + k["down_proj"])

    def block_workspace(self, shape: ModelShape, observing: bool) -> int:
        """And the MLP's dense weight gradients where it observes; attention's come later."""
        dense = 3 * self.weight_bytes * shape.intermediate * shape.hidden if observing else 0
        return super().block_workspace(shape, observing) + dense

    def pending(self, shape: ModelShape) -> int:
        """Of one micro-batch a step; of more see docs/memory.md."""
        return self.observes * self.weight_bytes * shape.block_weights


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
        lasting = self.weights + self.trained + self.optimizer + self.importance
        return lasting + self.gradients + self.activations + self.workspace


def estimate(shape: ModelShape, setting: Setting) -> Memory:
    """Peak memory of one step of ``setting`` on a model of ``shape``."""
    state, b = setting.state(shape), setting.weight_bytes
    block, observing = (setting.saved_by_block(shape, each) for each in (False, setting.observes))
    inputs = b * setting.tokens * shape.hidden  # one hidden state
    final_norm = setting.saved_by_norm(shape) + (inputs if setting.trains_head else 0)
    logits = setting.tokens * shape.vocabulary
    # without logits: the gradient of the hidden state, twice while it is scaled, and a chunk of
    # logits; with them: log-probabilities, their gradient and the logits' gradient, float32
    fused = 2 * inputs + b * min(logits, CHUNK_BYTES // FLOAT32)
    losses = fused if setting.fused_loss else 3 * FLOAT32 * logits
    # the last norm's backward: five tensors at once; Liger's works in place
    norm = inputs if setting.liger else 5 * FLOAT32 * setting.tokens * shape.hidden

    # Any block may be the one that observes: it is counted in the phase where it costs most.
    kept = shape.layers * inputs if setting.checkpointing else (shape.layers - 1) * block
    last = 0 if setting.checkpointing else observing
    again = block if setting.checkpointing else last
    head = setting.head_gradient(shape)
    gradients_late = state["gradients"] - setting.late_gradients(shape)
    phases = [  # saved activations, gradients so far, what lives only then
        (kept + last + final_norm, 0, losses),
        (kept + last + final_norm, head, norm),
        (kept + again, head, setting.block_workspace(shape, False)),
        (inputs + observing, gradients_late, setting.block_workspace(shape, setting.observes)),
        (0, state["gradients"], setting.pending(shape) + setting.update_workspace(shape)),
    ]
    activations, gradients, workspace = max(phases, key=sum)
    values, lasting = state.pop("values"), state | {"gradients": gradients}
    weights = b * shape.parameters
    return Memory(values, weights, **lasting, activations=activations, workspace=workspace)
