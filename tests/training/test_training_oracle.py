"""The package follows the dense-gradient oracle of csrc_ref step by step: a small Llama, three
cycles, all variants.

In float64 both must choose the same subnets and reach the same weights at every step.
"""

import copy
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from csrc_ref.training import Config, Matrix, Training
from losia_kernels import (
    LoSiAAdamW,
    LoSiALinear,
    apply_losia,
    attach,
    export_state_dict,
)
from losia_kernels.layers.module import losia_layers
from tests.tiny import paper
from tests.tolerance import assert_within, max_error

transformers = pytest.importorskip("transformers")

BLOCKS, VOCABULARY, TOKENS = 3, 29, 6
PERIOD, CYCLES = 2, 3
ADAMW = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}


@dataclass(frozen=True)
class Case:
    """One variant: fields of LoSiAConfig that differ from the defaults, and how the run is made."""

    losia: dict = field(default_factory=dict)
    output: float = 0.0  # output_dim_factor: 0 frozen, 1 dense
    tied: bool = False
    accumulation: int = 1
    warmup: int = 0  # steps of the learning-rate schedule's warm-up
    attached: bool = False  # torch's AdamW with attach() instead of LoSiAAdamW

    @property
    def steps(self) -> int:
        return CYCLES * PERIOD * (BLOCKS + (0 < self.output < 1))

    def schedule(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0

    def batches(self) -> list[list[Tensor]]:
        """Micro-batches of token ids, for each step."""
        generator = torch.Generator().manual_seed(1)
        shape = self.steps, self.accumulation, 2, TOKENS
        return [list(step) for step in torch.randint(VOCABULARY, shape, generator=generator)]


CASES = {
    "paper": Case(),
    "sync": Case({"update_type": "sync"}),
    "gradient": Case({"importance": "gradient"}),
    "marginal": Case({"importance": "marginal", "importance_beta1": 0.6}),
    "no_rewarm": Case({"rewarm": False}),
    "no_reset": Case({"reset_step": False}),
    "betas": Case({"importance_beta1": 0.6, "importance_beta2": 0.3}),
    "warmup": Case(warmup=5),
    "aligned": Case({"alignment": 2}),
    "aligned_head": Case({"alignment": 2}, output=0.25, tied=True, accumulation=2),
    "aligned_gradient": Case({"alignment": 2, "importance": "gradient"}),
    "aligned_marginal": Case({"alignment": 2, "importance": "marginal"}, attached=True),
    "accumulation": Case(accumulation=2),
    "head_subnet": Case(output=0.25),
    "head_subnet_tied": Case(output=0.25, tied=True),
    "head_dense": Case(output=1.0),
    "head_dense_tied": Case(output=1.0, tied=True),
    "gradient_accumulated_head": Case(
        {"importance": "gradient"}, output=0.25, tied=True, accumulation=2
    ),
    "marginal_accumulated_head": Case(
        {"importance": "marginal"}, output=0.25, accumulation=2, warmup=3
    ),
    "sync_head": Case({"update_type": "sync"}, output=0.25, tied=True, accumulation=2, warmup=9),
    "sync_gradient": Case(
        {"update_type": "sync", "importance": "gradient", "reset_step": False}, output=1.0
    ),
    "sync_marginal": Case(
        {"update_type": "sync", "importance": "marginal", "rewarm": False}, tied=True
    ),
    "attached": Case(attached=True, accumulation=2, warmup=3),
    "attached_no_reset": Case({"reset_step": False}, output=0.25, attached=True),
    "attached_dense": Case(output=1.0, tied=True, attached=True),
}


def build(tied: bool, dtype: torch.dtype) -> nn.Module:
    """A Llama with biases, computing in ``dtype`` throughout: transformers' norm would round
    float64 to float32."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.normal_(module.bias, std=0.1)
        if name.endswith("norm"):
            parent, _, child = name.rpartition(".")
            setattr(
                model.get_submodule(parent),
                child,
                nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
            )
    return model.to(dtype)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    logits = model(input_ids=tokens[:, :-1]).logits  # [batch, t, vocabulary]
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Package:
    """A run of the package, and an oracle of the same start and the same first subnets."""

    def __init__(self, case: Case, dtype: torch.dtype):
        self.case, self.plain = case, build(case.tied, dtype)
        self.model = apply_losia(
            copy.deepcopy(self.plain),
            paper(0.25, case.output, PERIOD, case.warmup, **case.losia),
        )
        if case.attached:
            trained = [
                parameter for parameter in self.model.parameters() if parameter.requires_grad
            ]
            self.optimizer = torch.optim.AdamW(trained, **ADAMW)
            timeline = attach(self.optimizer, self.model)
        else:
            self.optimizer = LoSiAAdamW(self.model, **ADAMW)
            timeline = self.optimizer.timeline
        timeline.loss_divisor = case.accumulation
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, case.schedule)

    @property
    def layers(self) -> dict[str, LoSiALinear]:
        return dict(losia_layers(self.model))

    def oracle(self, dtype: torch.dtype) -> Training:
        model = copy.deepcopy(self.plain).to(dtype)
        head, blocks, dense, initial = {}, [{} for _ in range(BLOCKS)], {}, {}
        for name, layer in self.layers.items():
            initial[name] = (
                layer.out_idx.clone(),
                None if name == "lm_head" else layer.in_idx.clone(),
            )
            if name == "lm_head":
                (dense if self.case.output == 1 else head)[name] = model.get_submodule(name)
            else:
                blocks[int(name.split(".")[2])][name] = model.get_submodule(name)
        config = Config(
            PERIOD,
            warmup_steps=self.case.warmup,
            betas=ADAMW["betas"],
            weight_decay=ADAMW["weight_decay"],
            **self.case.losia,
        )
        return Training(model, [head, *blocks] if head else blocks, initial, config, loss_of, dense)

    def step(self, micro_batches: list[Tensor]) -> list[float]:
        losses = []
        for tokens in micro_batches:
            loss = loss_of(self.model, tokens)
            (loss / self.case.accumulation).backward()
            losses.append(loss.item())
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return losses


def same_subnet(layer: LoSiALinear, matrix: Matrix) -> bool:
    return torch.equal(layer.out_idx, matrix.out_idx) and torch.equal(layer.in_idx, matrix.in_idx)


@pytest.mark.parametrize("name", CASES)
def test_same_subnets_and_weights_at_every_step(name):
    case = CASES[name]
    package = Package(case, torch.float64)
    oracle = package.oracle(torch.float64)
    for s, micro_batches in enumerate(case.batches()):
        losses = package.step(micro_batches)
        expected = oracle.step(micro_batches, ADAMW["lr"] * case.schedule(s))
        assert losses == pytest.approx(expected.losses, abs=1e-11), f"step {s}"
        weights = export_state_dict(package.model)
        for key, weight in oracle.model.state_dict().items():
            assert max_error(weights[key], weight) < 1e-11, f"step {s}: {key}"
        for name, layer in package.layers.items():
            if name in oracle.moved:
                assert same_subnet(layer, oracle.moved[name]), f"step {s}: {name}"
    for name in oracle.moved:
        assert len({str(step.subnets[name]) for step in oracle.history}) > 1, (
            f"{name} has never moved"
        )


@pytest.mark.parametrize("name", ["paper", "sync_head", "head_dense_tied", "attached"])
def test_float32_errs_no_more_than_a_float32_oracle(name):
    """The tolerance rule on a whole run: truth is the oracle in float64, the baseline the oracle in
    float32."""
    case = CASES[name]
    package = Package(case, torch.float32)
    baseline, truth = package.oracle(torch.float32), package.oracle(torch.float64)
    for s, micro_batches in enumerate(case.batches()):
        package.step(micro_batches)
        for oracle in (baseline, truth):
            oracle.step(micro_batches, ADAMW["lr"] * case.schedule(s))
        for name, layer in package.layers.items():
            if name in truth.moved:
                assert same_subnet(layer, truth.moved[name]), f"step {s}: {name}"
    weights, baseline_weights = export_state_dict(package.model), baseline.model.state_dict()
    for key, weight in truth.model.state_dict().items():
        assert_within(weights[key], baseline_weights[key], weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_have_the_masters_of_the_oracle(dtype):
    """Masters agree as float32 does. Two that are nearly equal may still round to different
    weights, and scores made from 16-bit gradients may choose differently; so that neither grows,
    the oracle goes on from the package's."""
    # without accumulation: dividing the loss by 2 loses digits in float16
    case = CASES["head_subnet_tied"]
    package = Package(case, dtype)
    oracle = package.oracle(dtype)
    digit = torch.finfo(dtype).eps
    for s, micro_batches in enumerate(case.batches()):
        assert package.step(micro_batches) == oracle.step(micro_batches, ADAMW["lr"]).losses
        weights = export_state_dict(package.model)
        torch.testing.assert_close(
            weights, oracle.model.state_dict(), rtol=digit, atol=1e-6, msg=f"step {s}"
        )
        oracle.model.load_state_dict(weights)
        for name, layer in package.layers.items():
            matrix = oracle.moved[name]
            if matrix.step == 0:
                matrix.place(layer.out_idx.clone(), layer.in_idx.clone())
            assert same_subnet(layer, matrix), f"step {s}: {name}"
            assert max_error(layer.subnet, matrix.master.double()) < 1e-6, f"step {s}: {name}"
