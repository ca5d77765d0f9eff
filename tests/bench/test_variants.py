"""Forms of one kernel side by side: all give the same result, and the counts are those of the shapes."""

import dataclasses
import re

import pytest
import torch

from bench.speed import compiled, counts, sectors, variants
from bench.speed.models import DEFAULT
from bench.speed.ops import gate
from losia_kernels.kernels.launch import choose_config

SHAPE, TOKENS = (64, 48), 40


@pytest.mark.parametrize("alignment", [1, 4])
@pytest.mark.parametrize("sizes, whole", [((16, 12), False), ((8, 24), True)])
def test_every_form_passes_the_gate(alignment, sizes, whole):
    case = variants.subnet_grad(SHAPE, sizes, TOKENS, torch.float32, alignment, whole)
    inputs = case.inputs(torch.Generator().manual_seed(0))
    assert {"ours", "eager"} < case.forms.keys() and len(case.forms) >= 6
    for form in case.forms:
        gate(case, form, case.forms[form], inputs)


@pytest.mark.parametrize("linear", DEFAULT.linears)
def test_what_is_timed_is_the_layer_s_own_subnet(linear):
    case = variants.case_of(dataclasses.replace(DEFAULT, tokens=2), linear, torch.float32)
    inputs = case.inputs(torch.Generator().manual_seed(0))
    assert tuple(case.truth(*inputs).shape) == DEFAULT.subnets[linear]


def test_without_a_gpu_there_is_nothing_to_time():
    assert list(variants.jobs(torch.device("cpu"), torch.float32)) == []
    timed = list(variants.jobs(torch.device("cuda"), torch.bfloat16))
    assert len({str(job.key) for job in timed}) == len(timed) == 22
    subnets = [(job.settings["subnet"], job.settings["linear"]) for job in timed]
    assert {("square", "down_proj"), ("wide", "o_proj"), ("wide", "q_proj")} < set(subnets)


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


def test_the_last_program_alone_is_slower_than_a_launch():
    """What keeps sums where they are: one multiprocessor reads a small share of what L2 gives."""
    for tokens, k_out, k_in, out in ((8192, 512, 512, 4096), (8192, 2048, 495, 4096)):
        size = tokens, k_out, k_in
        config = choose_config("subnet_grad", "sm_90", torch.bfloat16, *size, chosen_from=out)
        took = counts.sums_us(config, k_out, k_in)
        assert config.splits > 2 and took["dependent"] < took["launch"] < took["in_kernel"]
        assert took["launch"] < min(took["tree"], took["cooperative"])


def test_scattered_values_cost_their_sectors():
    """A sector that is not filled is read, and written whole."""
    single, together = (sectors.scattered(10, 4096, 512, alignment) for alignment in (1, 16))
    assert together == 2 * 10 * 512
    assert single == pytest.approx(2 * 32 * 10 * 256 * sectors.touched(1 / 8, 1))
    assert sectors.scattered(10, 4096, 4096) == 2 * 10 * 4096
    assert sectors.scattered(10, 4096, 4096, itemsize=4) == 4 * 10 * 4096


@pytest.mark.parametrize("alignment", [1, 4, 16, 32])
def test_touched_sectors_of_random_runs(alignment):
    """Against a draw: 2-byte entries, 32-byte sectors."""
    size, p = 2**16, 1 / 8
    runs = torch.randperm(size // alignment, generator=torch.Generator().manual_seed(0))[
        : int(p * size) // alignment
    ]
    found = (
        (runs[:, None] * alignment + torch.arange(alignment))
        .flatten()
        .div(16, rounding_mode="floor")
        .unique()
    )
    assert sectors.touched(p, alignment) == pytest.approx(len(found) / (size / 16), rel=0.02)


def test_an_epilogue_saves_the_gradients_two_passes():
    whole, epilogue = (counts.observing(1, 100, 100, flag) for flag in (False, True))
    assert whole.memory - epilogue.memory == 2 * 2 * 100 * 100
    assert whole.flops == epilogue.flops


def test_what_further_fusions_could_save_is_little():
    text = counts.table_fusions()
    assert float(re.search(r"into AdamW +\d+ us a step, ([\d.]+) %", text)[1]) < 0.1


def test_programs_that_fit_a_multiprocessor():
    assert compiled.programs_at_once("sm_90", registers=128, shared=60_000, warps=8) == 2
    assert compiled.programs_at_once("sm_90", registers=32, shared=100_000, warps=8) == 2
    assert compiled.programs_at_once("sm_90", registers=32, shared=0, warps=16) == 4
    assert compiled.programs_at_once("gfx942", registers=32, shared=0, warps=8) is None


def test_counts_say_that_they_are_counted():
    assert counts.report().startswith("Counted, not measured.")
