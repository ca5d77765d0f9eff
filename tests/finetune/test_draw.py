"""Pictures that can be read: every axis and scale named, nothing cut off, equal shares alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex

from losia_kernels.finetune import draw
from losia_kernels.integrations.history import Place, SubnetHistory
from tests.tiny import paper

FEATURES = {"self_attn.q_proj": (24, 16), "mlp.up_proj": (400, 16)}


def history(blocks, period=2, cycles=2, kinds=FEATURES, head=True, seed=0):
    """Of a run of that many decoder blocks, each with a layer of every kind, and an output layer."""
    generator = np.random.default_rng(seed)
    groups = ["lm_head"] * head + [f"model.layers.{block}" for block in range(blocks)]
    config = paper(rank_factor=1 / 4, output_dim_factor=1 / 8, period=period).to_dict()
    places = []
    for turn in range(-1, cycles * len(groups)):
        moving = groups if turn < 0 else [groups[turn % len(groups)]]
        for group in moving:
            layers = {"": (300, 16)} if group == "lm_head" else kinds
            for kind, (outs, ins) in layers.items():
                out_idx = np.sort(generator.choice(outs, outs // 4, replace=False))
                in_idx = np.sort(
                    generator.choice(ins, ins if not kind else ins // 4, replace=False)
                )
                name, seen = f"{group}.{kind}".rstrip("."), None if turn < 0 else 0.01
                step = max(0, (turn + 1) * period)
                places.append(Place(step, name, group, (outs, ins), out_idx, in_idx, seen, seen))
    return SubnetHistory(groups, config, places)


def similarity(blocks, kinds=FEATURES):
    return {
        f"model.layers.{block}.{kind}": torch.linspace(0, 1, 16)
        for kind in kinds
        for block in range(blocks)
    }


def sums(blocks, kinds=FEATURES):
    return {
        f"model.layers.{block}.{kind}": (torch.rand(outs) + 0.1, torch.rand(ins) * 20)
        for kind, (outs, ins) in kinds.items()
        for block in range(blocks)
    } | {"lm_head": (torch.zeros(300), torch.rand(16))}


def pictures(blocks):
    one = {"mlp.up_proj": FEATURES["mlp.up_proj"]}
    places, last = history(blocks), 2 * 2 * (blocks + 1)
    return {
        "timeline": draw.draw_timeline(places, last),
        "timeline without scores": draw.draw_timeline(
            replace(places, places=[replace(place, captured=None) for place in places.places]), last
        ),
        "subnets": draw.draw_subnets(places, last),
        "frequency": draw.draw_frequency(places, last),
        "gradients": draw.draw_gradients(sums(blocks)),
        "singular_vectors": draw.draw_singular_vectors(similarity(blocks)),
        "one kind": draw.draw_singular_vectors(similarity(blocks, one)),
    }


@pytest.mark.parametrize("blocks", [1, 2, 30])
def test_every_picture_can_be_read(blocks):
    for name, figure in pictures(blocks).items():
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        bars = [axes for axes in figure.axes if hasattr(axes, "_colorbar")]
        panels = [axes for axes in figure.axes if axes not in bars]
        assert panels and (bars or name == "frequency"), name
        for axes in panels:
            assert axes.get_xlabel() and axes.get_ylabel(), (name, "an axis without a name")
            assert figure.get_suptitle() or axes.get_title(), (name, "no title")
            labels = [label.get_text() for label in axes.get_yticklabels()]
            assert name == "frequency" or not any("." in text for text in labels), (name, labels)
            shown = [each.get_window_extent() for each in axes.get_xticklabels() if each.get_text()]
            for left, right in zip(shown, shown[1:], strict=False):
                assert left.x1 < right.x0, (name, "ticks over each other")
            heights = sorted(each.get_window_extent().y0 for each in axes.get_yticklabels())
            assert all(b - a > 12 for a, b in zip(heights, heights[1:], strict=False)), name
        for axes in bars:
            assert axes.get_xlabel() or axes.get_ylabel(), (name, "a scale without a name")
        drawn = {axes: axes.get_tightbbox() for axes in figure.axes}  # with its labels and ticks
        drawn |= {legend: legend.get_window_extent() for legend in figure.legends}
        if figure.get_suptitle():
            drawn["title"] = figure._suptitle.get_window_extent()
        for what, box in drawn.items():
            cut = box.x0 < -1 or box.y0 < -1
            cut |= box.x1 > figure.bbox.x1 + 1 or box.y1 > figure.bbox.y1 + 1
            assert not cut, (name, what, box, figure.bbox)


def test_equal_shares_look_equal():
    """In every panel, whatever else is drawn: 1 % is 1 %."""
    for blocks in (1, 3):
        places = history(blocks)
        figure = draw.draw_timeline(places, 12)
        dots = [
            each
            for axes in figure.axes
            for each in axes.collections
            if each.get_array() is not None
        ]
        for each in dots:
            assert each.get_clim() == (0, 1)
        for figure in (
            draw.draw_subnets(places, 12),
            draw.draw_singular_vectors(similarity(blocks)),
        ):
            scales = {image.get_clim() for axes in figure.axes for image in axes.images}
            assert scales == {(0, 1)}
            (bar,) = [axes._colorbar for axes in figure.axes if hasattr(axes, "_colorbar")]
            assert bar.extend == "neither"  # a share has no beyond


def test_a_kind_of_layer_has_one_colour():
    """The output layer, whose inputs are all trained, has no curve on the right."""
    figure = draw.draw_frequency(history(2), 12)
    (legend,) = figure.legends
    named = {line.get_label(): to_hex(line.get_color()) for line in legend.legend_handles}
    left, right = (
        [to_hex(curve.get_edgecolor()) for curve in axes.patches] for axes in figure.axes
    )
    assert left == [named["lm_head"], named["q_proj"], named["up_proj"]]
    assert right == left[1:] and len(set(left)) == 3


def test_a_neuron_is_as_wide_as_its_share():
    """Of 4 neurons one is trained all the time: the curve falls at a quarter, not at a third."""
    idx = np.array([2])
    place = Place(0, "model.layers.0.q_proj", "model.layers.0", (4, 4), idx, idx)
    config = paper(rank_factor=1 / 4).to_dict()
    figure = draw.draw_frequency(SubnetHistory(["model.layers.0"], config, [place]), 5)
    for axes in figure.axes:
        values, edges, _ = axes.patches[0].get_data()
        assert values.tolist() == [1, 0, 0, 0] and edges.tolist() == [0, 0.25, 0.5, 0.75, 1]


def test_layers_have_the_numbers_of_their_blocks():
    """Of a model whose blocks are not all alike, or whose layers are not of one size."""
    places = history(4, head=False)
    only = [
        place for place in places.places if "q_proj" in place.layer and ".2." not in place.layer
    ]
    figure = draw.draw_subnets(replace(places, places=only), 12)
    ticks = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert ticks == ["0", "1", "3"]
    wide = [
        replace(place, features=(8 * place.features[0], 16)) if ".3." in place.layer else place
        for place in only
    ]
    figure = draw.draw_subnets(replace(places, places=wide), 12)
    named = [axes.get_xlabel() for axes in figure.axes]
    assert (
        "output neuron of q_proj (24 x 16)" in named
        and "output neuron of q_proj (192 x 16)" in named
    )


def test_a_long_run_takes_no_more_memory_than_a_picture():
    figure = draw.draw_timeline(history(2, period=10**8), 10**9)
    images = [image for axes in figure.axes for image in axes.images]
    assert images and all(image.get_array().size <= 3 * draw.COLUMNS for image in images)


def test_what_never_moves_stands_at_each_sides_own_share():
    """Of a wide subnet the two sides have other shares than the rank factor."""
    place = Place(0, "model.layers.0.q_proj", "model.layers.0", (4, 4), np.array([2]), np.arange(2))
    config = paper(rank_factor=0.35).to_dict()
    figure = draw.draw_frequency(SubnetHistory(["model.layers.0"], config, [place]), 5)
    shares = [[float(line.get_xdata()[1]) for line in axes.lines] for axes in figure.axes]
    assert shares == [[0.25], [0.5]]
