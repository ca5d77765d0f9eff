"""Ways to split a model that LoSiA does not train in: refused by name, with what to use instead."""

import pytest

from tests.parallel import sharding

REFUSED = {
    "FSDP1": ("FSDP1", "fully_shard"),
    "ZeRO-3": ("lm.lm_head.weight", "DeepSpeed", "FSDP2"),
    "tensor parallel columns": ("layers.0.up_proj.weight", "tensor-parallel", "FSDP2"),
    "tensor parallel rows": ("layers.0.down_proj.weight", "tensor-parallel", "FSDP2"),
    "tensor parallel first": ("sharded already", "FSDP2"),
    "shards first": ("apply_losia first, then fully_shard",),
    "shards last": ("make the optimizer after fully_shard",),
    "replicas of shards": ("one mesh dimension",),
    "in_backward": ("in_backward=True", "torch.distributed"),
    "split": ("master='split'", "fully_shard"),
}


@pytest.mark.parametrize("engine", REFUSED)
def test_refused_by_name(two, engine):
    for message in two.run(sharding.refused, engine):
        assert all(words in message for words in REFUSED[engine]), message


def test_what_is_not_refused(two):
    assert two.run(sharding.refused, "none of these") == ["trained"] * 2
