"""A quantized base is refused by name, before anything has changed, whichever library made it."""

import pytest
import torch
from torch import nn

from losia_kernels import apply_losia
from losia_kernels.layers.foreign import quantized_as
from tests.tiny import paper


def block_of(linear: nn.Module) -> nn.Module:
    """A model of one block: an ordinary linear and ``linear``."""
    block = nn.Module()
    block.q_proj, block.o_proj = nn.Linear(8, 8), linear
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    return model


def bitsandbytes(name: str) -> nn.Module:
    library = pytest.importorskip("bitsandbytes")
    return getattr(library.nn, name)(8, 8)


def transformers_fp8() -> nn.Module:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    return module.FP8Linear(8, 8, block_size=(8, 8))


def torchao() -> nn.Module:
    library = pytest.importorskip("torchao.quantization")
    linear = nn.Linear(32, 32)
    library.quantize_(linear, library.Int8WeightOnlyConfig())
    return linear


def lookalike(path: str, base: type = nn.Module, **attributes) -> nn.Module:
    """A module as the class ``path`` of a library that is not installed here would be."""
    home, _, name = path.rpartition(".")
    module = type(name, (base,), {"__module__": home})(*((8, 8) if base is nn.Linear else ()))
    for key, value in attributes.items():
        setattr(module, key, value)
    return module


PACKED = torch.zeros(1, 8, dtype=torch.int32)
QUANTIZED = {
    "bitsandbytes 4 bit": (lambda: bitsandbytes("Linear4bit"), "Linear4bit"),
    "bitsandbytes 8 bit": (lambda: bitsandbytes("Linear8bitLt"), "Linear8bitLt"),
    "transformers FP8": (transformers_fp8, "FP8Linear"),
    "torchao": (torchao, "Linear with a weight of torchao's"),
    "GPTQ": (
        lambda: lookalike("gptqmodel.nn_modules.qlinear.torch.TorchQuantLinear", qweight=PACKED),
        "TorchQuantLinear of gptqmodel",
    ),
    "AWQ": (
        lambda: lookalike("awq.modules.linear.gemm.WQLinear_GEMM", qweight=PACKED),
        "WQLinear_GEMM of awq",
    ),
    "HQQ": (lambda: lookalike("hqq.core.quantize.HQQLinear", W_q=PACKED), "HQQLinear of hqq"),
    "compressed-tensors": (
        lambda: lookalike("torch.nn.modules.linear.Linear", nn.Linear, quantization_scheme={}),
        "Linear of torch",
    ),
    "quanto": (
        lambda: lookalike("optimum.quanto.nn.qlinear.QLinear", nn.Linear),
        "QLinear of optimum",
    ),
    "packed by a stranger": (lambda: lookalike("mylab.Packed", qweight=PACKED), "Packed of mylab"),
}


@pytest.mark.parametrize(
    "targets", ["all-linear", ["q_proj", "o_proj"]], ids=["all-linear", "listed"]
)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_it_is_refused_by_name_with_what_to_do(kind, targets):
    make, told = QUANTIZED[kind]
    model = block_of(make())
    before = {name: type(module) for name, module in model.named_modules()}
    trained = [parameter.requires_grad for parameter in model.parameters()]
    with pytest.raises(
        ValueError, match=f"'layers.0.o_proj' is quantized: a .*{told}.*original model in bfloat16"
    ):
        apply_losia(model, paper(rank_factor=0.5, target_modules=targets))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert [parameter.requires_grad for parameter in model.parameters()] == trained


def test_left_out_it_may_stay():
    model = block_of(lookalike("awq.modules.linear.gemm.WQLinear_GEMM", qweight=PACKED))
    apply_losia(model, paper(rank_factor=0.5, exclude_modules=["o_proj"]))
    assert hasattr(model.layers[0].q_proj, "subnet") and not hasattr(
        model.layers[0].o_proj, "subnet"
    )


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(4, 4),
        nn.Linear(4, 4).bfloat16(),
        nn.Embedding(4, 4),
        nn.LayerNorm(4),
        nn.Conv1d(4, 4, 1),
        nn.Module(),
        nn.Linear(4, 4, device="meta"),
    ],
    ids=lambda module: type(module).__name__,
)
def test_ordinary_modules_are_not_quantized(module):
    assert quantized_as(module) is None


def test_a_forward_of_its_own_is_refused_by_name():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    model[0].forward = lambda x: 0 * x
    with pytest.raises(ValueError, match="'0' has a forward of its own .*exclude_modules"):
        apply_losia(model, paper(rank_factor=0.5))
