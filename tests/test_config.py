"""LoSiAConfig refuses what it cannot mean, when it is made, naming the field and the value."""

import dataclasses
import json
import re

import pytest

from losia_kernels import LoSiAConfig

NAN, INF = float("nan"), float("inf")

BAD = {
    "rank_factor": [0, -0.1, 1.5, NAN, INF, True, "0.1", None],
    "output_dim_factor": [-0.1, 1.5, NAN, True, "1", None],
    "period": [0, -1, 1.5, True, "3", None],
    "warmup_steps": [-1, 0.5, False, None],
    "shape": ["round", None, 1],
    "moves": ["randomly", None, True],
    "lr_of": ["weights", None, 1],
    "update_type": ["asynchronous", "", None, 1],
    "importance": ["sensitive", None],
    "init_subnet": ["calibrate", None],
    "importance_beta1": [1, 1.0, -0.1, NAN, False, "0.85"],
    "importance_beta2": [1, 1.0, -0.1, NAN, None],
    "output_init": ["frequent", None],
    "rewarm": [1, 0, None, "yes"],
    "reset_step": [1, None],
    "master": [True, "bfloat16", None],
    "fused_loss": [1, None],
    "target_modules": ["", [], None, 3, [1], "(q_proj"],
    "exclude_modules": ["", [], 3, [None], "*"],
    "modules_to_save": ["embed_tokens", 3, [1]],
    "rank_pattern": [
        None,
        0.5,
        {"q_proj": 0},
        {"q_proj": 1.5},
        {"q_proj": NAN},
        {"(q": 0.5},
        {1: 0.5},
    ],
    "alignment": [0, 3, -2, 1.5, True, None],
    "seed": [-1, 0.5, True, None],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in BAD.items() for value in values]
)
def test_a_bad_value_is_an_error_that_names_the_field_and_the_value(field, value):
    with pytest.raises(ValueError, match=rf"LoSiAConfig\.{field}") as error:
        LoSiAConfig(**{field: value})
    offender = next(iter(value.values()), value) if isinstance(value, dict) else value
    assert repr(offender) in str(error.value) or repr(value) in str(error.value)


def test_every_field_has_a_bad_value_here():
    assert BAD.keys() == {field.name for field in dataclasses.fields(LoSiAConfig)}


@pytest.mark.parametrize(
    "values",
    [
        {"rank_factor": 1},
        {"rank_factor": 1e-6},
        {"output_dim_factor": 0},
        {"output_dim_factor": 1},
        {"period": 1},
        {"importance_beta1": 0, "importance_beta2": 0.999},
        {"modules_to_save": []},
        {"rank_pattern": {"mlp.*": 1}},
        {"period": "auto"},
        {"target_modules": r".*\.(q|v)_proj", "exclude_modules": ("lm_head",)},
    ],
)
def test_the_edges_of_the_ranges_are_good(values):
    config = LoSiAConfig(**values)
    assert {name: getattr(config, name) for name in values} == values


def test_the_defaults_are_the_studys():
    config = LoSiAConfig()
    assert (config.rank_factor, config.shape, config.init_subnet, config.moves) == (
        3 / 20,
        "wide",
        "random",
        "random",
    )
    assert config.output_dim_factor == 0 and config.scales_lr


def test_the_papers_method_is_a_preset():
    config = LoSiAConfig.paper()
    assert (config.shape, config.init_subnet, config.moves) == ("square", "random", "importance")
    assert not config.scales_lr
    assert LoSiAConfig.paper(period=50, rank_factor=1 / 4) == dataclasses.replace(
        config, period=50, rank_factor=1 / 4
    )
    assert (config.rank_factor, config.output_dim_factor, config.period, config.warmup_steps) == (
        1 / 8,
        1 / 8,
        100,
        0,
    )
    assert (config.update_type, config.importance, config.rewarm, config.reset_step) == (
        "async",
        "sensitivity",
        True,
        True,
    )
    assert (config.importance_beta1, config.importance_beta2) == (0.85, 0.85)
    assert (config.target_modules, config.master, config.seed) == (
        "all-linear",
        "float32",
        0,
    )


def test_a_config_survives_json():
    config = LoSiAConfig(
        rank_factor=1 / 3,
        output_dim_factor=0.25,
        period=7,
        update_type="sync",
        importance="marginal",
        rewarm=False,
        target_modules=["up_proj"],
        modules_to_save=["norm"],
        rank_pattern={"down_proj": 0.5},
        seed=3,
    )
    assert LoSiAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_to_dict_is_a_copy():
    config = LoSiAConfig(rank_pattern={"down_proj": 0.5})
    config.to_dict()["rank_pattern"]["up_proj"] = 1
    assert config.rank_pattern == {"down_proj": 0.5}


def test_unknown_fields_are_named_beside_the_known_ones():
    with pytest.raises(TypeError, match="no field alpha, rank; its fields are rank_factor, .*seed"):
        LoSiAConfig.from_dict({"rank": 8, "alpha": 16, "period": 5})
    with pytest.raises(TypeError, match="rank"):
        LoSiAConfig(rank=8)


def test_from_dict_checks_values_too():
    with pytest.raises(
        ValueError,
        match=re.escape("LoSiAConfig.period must be a whole number of steps, at least 1"),
    ):
        LoSiAConfig.from_dict({"period": 0})


def test_a_config_cannot_be_changed_behind_a_run():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LoSiAConfig().period = 5


def test_pairs_survive_json():
    config = LoSiAConfig(rank_pattern={"q_proj": (1 / 8, 1.0)})
    assert LoSiAConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
