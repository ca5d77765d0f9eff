"""Forms of one kernel side by side: all give the same result, and the counts are those of the shapes."""

import re

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
    assert len({str(job.key) for job in timed}) == len(timed) == 14


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


@pytest.mark.parametrize("alignment", [1, 4, 16, 32])
def test_touched_sectors_of_random_runs(alignment):
    """Against a draw: 2-byte entries, 32-byte sectors."""
    size, p = 2**16, 1 / 8
    runs = torch.randperm(size // alignment, generator=torch.Generator().manual_seed(0))[
        : int(p * size) // alignment
    ]
    sectors = (
        (runs[:, None] * alignment + torch.arange(alignment))
        .flatten()
        .div(16, rounding_mode="floor")
        .unique()
    )
    assert counts.touched(p, alignment) == pytest.approx(len(sectors) / (size / 16), rel=0.02)


def test_an_epilogue_saves_the_gradients_two_passes():
    whole, epilogue = (counts.observing(1, 100, 100, flag) for flag in (False, True))
    assert whole.memory - epilogue.memory == 2 * 2 * 100 * 100
    assert whole.flops == epilogue.flops


def test_what_further_fusions_could_save_is_little():
    text = counts.table_fusions()
    assert float(re.search(r"into AdamW +\d+ us a step, ([\d.]+) %", text)[1]) < 0.1


def test_programs_that_fit_a_multiprocessor():
    assert variants.programs_at_once("sm_90", registers=128, shared=60_000, warps=8) == 2
    assert variants.programs_at_once("sm_90", registers=32, shared=100_000, warps=8) == 2
    assert variants.programs_at_once("sm_90", registers=32, shared=0, warps=16) == 4
    assert variants.programs_at_once("gfx942", registers=32, shared=0, warps=8) is None
