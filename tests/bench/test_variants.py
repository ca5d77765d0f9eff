"""Forms of one kernel side by side: all give the same result, and the counts are those of the shapes."""

import pytest
import torch

from bench.speed import counts, variants
from bench.speed.ops import gate
from losia_kernels.kernels.launch import choose_config

SHAPE, TOKENS = (64, 48), 40


@pytest.mark.parametrize("alignment", [1, 4])
def test_every_form_passes_the_gate(alignment):
    case = variants.subnet_grad(SHAPE, 1 / 4, TOKENS, torch.float32, alignment)
    inputs = case.inputs(torch.Generator().manual_seed(0))
    assert {"ours", "eager"} < case.forms.keys() and len(case.forms) >= 6
    for form in case.forms:
        gate(case, form, case.forms[form], inputs)


def test_without_a_gpu_there_is_nothing_to_time():
    assert list(variants.jobs(torch.device("cpu"), torch.float32)) == []
    timed = list(variants.jobs(torch.device("cuda"), torch.bfloat16))
    assert len({str(job.key) for job in timed}) == len(timed) == 12


def test_what_the_forms_move():
    def of(variant: str, alignment: int = 1) -> counts.Counts:
        config = choose_config(
            "subnet_grad", "sm_90", torch.bfloat16, 8192, 1376, 512, alignment, variant=variant
        )
        return counts.subnet_grad(config, 8192, 11008, 1376, 512, alignment)

    assert of("fused_wide").to_cores < of("fused").to_cores  # dy once, and not for every 128 inputs
    assert of("gathered").memory > of("fused_wide").memory
    assert (of("fused").launches, of("gathered").launches) == (1, 2)
    assert of("fused", alignment=16).memory < of("fused").memory / 2.5
    assert of("fused").flops == of("gathered").flops == 2 * 8192 * 1376 * 512
