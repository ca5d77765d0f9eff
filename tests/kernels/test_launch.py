import subprocess
import sys

import pytest
import torch

from losia_kernels.kernels.launch import (
    choose_config,
    launch_config,
    override_arch,
    override_config,
)
from losia_kernels.kernels.subnet_grad import VARIANTS, choose_variant

KERNELS = (
    "gather_features",
    "subnet_grad",
    "subnets_adamw_",
    "importance_update_",
    "importance_marginals",
    "score_marginals",
)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("arch", ["cpu", "sm_80", "sm_90", "sm_100", "gfx942"])
def test_blocks_are_powers_of_two(kernel, arch):
    for dtype in (torch.float32, torch.bfloat16):
        for size in (1, 17, 512, 32000):
            config = choose_config(kernel, arch, dtype, tokens=size, n_out=size, n_in=size)
            for block in (config.block_t, config.block_out, config.block_in, config.num_warps):
                assert block >= 1 and block & (block - 1) == 0


def test_unknown_kernel_and_field():
    with pytest.raises(ValueError, match="no launch configuration for kernel 'nothing'"):
        choose_config("nothing", "sm_90", torch.float32, 1, 1, 1)
    with pytest.raises(TypeError, match="block_k"), override_config("subnet_grad", block_k=16):
        pass


def test_override_nests_and_ends():
    like, sizes = torch.zeros(1), {"tokens": 10_000, "n_out": 512, "n_in": 512}
    chosen = launch_config("subnet_grad", like, **sizes)
    with override_config("subnet_grad", splits=3):
        with override_config("subnet_grad", block_t=128):
            inner = launch_config("subnet_grad", like, **sizes)
            assert (inner.splits, inner.block_t, inner.block_in) == (3, 128, chosen.block_in)
        outer = launch_config("subnet_grad", like, **sizes)
        assert (outer.splits, outer.block_t) == (3, chosen.block_t)
        assert launch_config("gather_features", like).splits == 1
    assert launch_config("subnet_grad", like, **sizes) == chosen


def test_arch_can_be_pretended():
    sizes = {"tokens": 1, "n_out": 512, "n_in": 512}
    with override_arch("gfx942"):
        pretended = launch_config("subnets_adamw_", torch.zeros(1), **sizes)
    assert pretended == choose_config("subnets_adamw_", "gfx942", torch.float32, **sizes)
    assert launch_config("subnets_adamw_", torch.zeros(1), **sizes) == choose_config(
        "subnets_adamw_", "cpu", torch.float32, **sizes
    )


SHAPES = [(0, 5, 5), (1, 1, 1), (255, 64, 64), (700, 3, 5), (8192, 512, 512), (8192, 4000, 4096)]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("tokens, k_out, k_in", SHAPES)
def test_splits_keep_enough_tokens(tokens, k_out, k_in, variant):
    for arch in ("sm_80", "sm_90", "gfx942", "cpu"):
        config = choose_config(
            "subnet_grad", arch, torch.bfloat16, tokens, k_out, k_in, variant=variant
        )
        assert config.variant == variant
        assert config.splits == 1 or tokens // config.splits >= 256


def test_the_form_of_the_subnets_gradient():
    """What the table says for LLaMA-2 7B at p = 1/8, and that an override wins with the tiles of
    its own form."""
    bf16 = torch.bfloat16
    assert choose_variant("sm_90", bf16, 512, alignment=1) == "fused_wide"
    assert choose_variant("sm_90", bf16, 1376, alignment=1) == "gathered"
    assert choose_variant("sm_90", bf16, 512, alignment=16) == "fused"
    assert choose_variant("sm_90", torch.float32, 512, alignment=1) == "fused"
    sizes = {"tokens": 8192, "n_out": 1376, "n_in": 512, "chosen_from": 11008}
    like = torch.zeros(1, dtype=bf16)
    with override_arch("sm_90"):
        assert launch_config("subnet_grad", like, **sizes).block_in == 512
        with override_config("subnet_grad", variant="gathered"):
            assert launch_config("subnet_grad", like, **sizes).block_in == 256
        with (
            override_config("subnet_grad", variant="fast"),
            pytest.raises(ValueError, match="not 'fast'"),
        ):
            launch_config("subnet_grad", like, **sizes)


def test_a_gather_of_single_entries_shares_no_layout_with_the_vector_loads():
    """Triton gives tiles of one shape one layout, eight entries a thread: a gather's threads would
    share no line."""
    for variant in ("fused", "fused_wide"):
        for k_in in (16, 64, 128, 512, 1376):
            config = choose_config(
                "subnet_grad", "sm_90", torch.bfloat16, 8192, 512, k_in, variant=variant
            )
            assert config.prefetch and config.block_out != config.block_in


def test_imports_no_triton():
    program = "import losia_kernels.kernels.launch, sys; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
