"""Whatever a loop does, LoSiA is the optimizer on a plain model whose gradients are cut to the
subnets: both run side by side."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.checkpoint import checkpoint

from losia_kernels import LoSiAAdamW, LoSiAConfig, apply_losia, attach, losia_layers
from tests.tiny import make_batches, tiny_lm

RATE = 1e-2


class Pair:
    """``mine``, driven by LoSiA, and ``plain``, by ``control``: torch's optimizer, which is told the
    rates of the timeline, and to begin anew where a subnet has moved."""

    def __init__(self, moves: str, kind=None, lr: float = RATE, dropout: float = 0.0, **options):
        config = LoSiAConfig(0.5, shape="square", period=2, moves=moves, lr_of="full")
        self.plain, self.mine = tiny_lm(dropout=dropout), tiny_lm(dropout=dropout)
        apply_losia(self.mine, config)
        self.layers = dict(losia_layers(self.mine))
        self.weights = {name: self.plain.get_submodule(name).weight for name in self.layers}
        self.plain.requires_grad_(False)
        for weight in self.weights.values():
            weight.requires_grad_(True)
        if kind is None:
            self.optimizer = LoSiAAdamW(self.mine, lr=lr, **options)
            kind, options = torch.optim.AdamW, {"weight_decay": 0.0}
        else:
            self.optimizer = kind(
                [p for p in self.mine.parameters() if p.requires_grad], lr, **options
            )
            attach(self.optimizer, self.mine)
        groups = [{"params": [weight], "layer": name} for name, weight in self.weights.items()]
        self.control = kind(groups, lr, **options)
        self.timeline = self.optimizer.timeline
        self.places: dict[str, tuple[Tensor, Tensor]] = {}

    def both(self):
        return self.plain, self.mine

    def trained(self, name: str):
        return self.weights[name], self.layers[name].subnet

    def cut_gradients(self) -> None:
        for name, layer in self.layers.items():
            grad = self.weights[name].grad
            if grad is not None:
                inside = torch.zeros_like(grad)
                inside[layer.out_idx[:, None], layer.in_idx] = 1
                grad.copy_(torch.where(inside.bool(), grad, 0))

    def follow(self) -> None:
        for group in self.control.param_groups:
            name = group.get("layer")
            if name is None:
                continue
            layer = self.layers[name]
            number = layer.membership.group
            attached = not isinstance(self.optimizer, LoSiAAdamW)
            options = next(
                each
                for position, each in enumerate(self.optimizer.param_groups)
                if (each["layer_group"] if attached else position) == number
            )
            group |= {key: options[key] for key in ("betas", "momentum") if key in options}
            factor = self.timeline.lr_factor(number) * self.timeline.scale_of(layer)
            group["lr"] = float(options["lr"]) * factor
            now = layer.out_idx.clone(), layer.in_idx.clone()
            if not all(map(torch.equal, now, self.places.get(name, now))):
                self.control.state.pop(self.weights[name], None)
            self.places[name] = now

    def step(self) -> None:
        self.follow()
        self.control.step()
        self.optimizer.step()
        for each in (self.control, self.optimizer):
            each.zero_grad()

    def check(self) -> None:
        moved = [name for name, place in self.places.items() if self.layers[name].moves]
        assert moved, "no subnet has moved"
        for name, weight in self.weights.items():
            torch.testing.assert_close(self.layers[name].weight, weight, rtol=1e-4, atol=2e-6)


def loss_of(model, batch) -> Tensor:
    return model(**batch).loss


def head_of(model, x: Tensor, batch) -> Tensor:
    logits = model.lm_head(model.model.norm(x))
    return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())


def run(pair: Pair, loss=loss_of, before=None, after_backward=None, after=None, steps=9) -> None:
    for number, batch in enumerate(make_batches(steps)):
        if before is not None:
            before(number)
        for model in pair.both():
            torch.manual_seed(number)
            result = loss(model, batch)
            if result is not None:  # else it has run the backward
                result.backward()
        pair.cut_gradients()
        if after_backward is not None:
            after_backward(number)
        pair.step()
        if after is not None:
            after(number)
    pair.check()


MOVES = pytest.mark.parametrize("moves", ["random", "importance"])


@MOVES
@pytest.mark.parametrize("inside", [False, True])
def test_a_plain_loop(moves, inside):
    run(Pair(moves, in_backward=inside))


@MOVES
@pytest.mark.parametrize("clip", [nn.utils.clip_grad_norm_, nn.utils.clip_grad_value_])
def test_clipped_by_foreach(moves, clip):
    pair = Pair(moves)
    limit = 0.05 if clip is nn.utils.clip_grad_norm_ else 1e-2
    run(
        pair,
        after_backward=lambda _: [clip(m.parameters(), limit, foreach=True) for m in pair.both()],
    )


def two_forwards(model, batch):
    other = {"input_ids": batch["input_ids"].flip(1), "labels": batch["labels"]}
    return loss_of(model, batch) + 0.5 * loss_of(model, other)


def two_backwards(model, batch):
    output = model(**batch)
    (0.3 * output.loss).backward(retain_graph=True)
    (output.loss + 0.1 * output.logits.square().mean()).backward()


def with_a_graph_of_the_backward(model, batch):
    loss_of(model, batch).backward(create_graph=True)


def odd_shapes(model, batch):
    """Expanded inputs, sequences of one token, no sequence at all."""
    ids, labels = batch["input_ids"], batch["labels"]
    expanded = model(input_ids=ids[:, :1].expand(3, 5), labels=labels).loss
    one = model(input_ids=ids[:1, :1], labels=labels[:1, :1]).loss
    return expanded + one + model(input_ids=ids[:0]).logits.sum()


def checkpointed(model, batch, reentrant):
    x = model.model.embed_tokens(batch["input_ids"]).requires_grad_()
    for block in model.model.layers:
        x = checkpoint(block, x, use_reentrant=reentrant)
    return head_of(model, x, batch)


@MOVES
@pytest.mark.parametrize(
    "loss",
    [
        two_forwards,
        two_backwards,
        with_a_graph_of_the_backward,
        odd_shapes,
        lambda model, batch: checkpointed(model, batch, True),
        lambda model, batch: checkpointed(model, batch, False),
    ],
)
def test_a_loss(moves, loss):
    run(Pair(moves, dropout=0.3), loss)


@MOVES
def test_a_block_that_some_batches_do_not_use(moves):
    used = {"now": True}

    def loss(model, batch):
        x = model.model.embed_tokens(batch["input_ids"])
        for block in model.model.layers[0 if used["now"] else 1 :]:
            x = block(x)
        return head_of(model, x, batch)

    run(Pair(moves), loss, before=lambda number: used.update(now=number % 4 != 2))


@MOVES
@pytest.mark.filterwarnings("ignore:LoSiA. .* frozen since")
def test_subnets_that_are_frozen_for_a_while(moves):
    pair = Pair(moves)

    def freeze(number):
        for parameter in pair.trained("model.layers.0.up_proj"):
            parameter.requires_grad_(number not in (2, 3, 4))

    run(pair, before=freeze)


@MOVES
def test_a_grad_scaler_whose_steps_overflow_beside_a_move(moves):
    pair = Pair(moves)
    scalers = [torch.amp.GradScaler("cpu", init_scale=4.0) for _ in range(2)]
    for number, batch in enumerate(make_batches(12)):
        pair.timeline.loss_divisor = 1 / scalers[0].get_scale()
        overflows = number in (1, 3, 4, 5)
        for scaler, model in zip(scalers, pair.both(), strict=True):
            scaler.scale(loss_of(model, batch) * (math.inf if overflows else 1)).backward()
        pair.cut_gradients()
        pair.follow()
        for scaler, each in zip(scalers, (pair.control, pair.optimizer), strict=True):
            scaler.step(each)
            scaler.update()
            each.zero_grad()
    assert pair.timeline.step == 8 and scalers[0].get_scale() == scalers[1].get_scale()
    pair.check()


@MOVES
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.AdamW, {"weight_decay": 0.0, "fused": True}),
        (torch.optim.AdamW, {"weight_decay": 0.0, "amsgrad": True, "foreach": True}),
        (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
        (torch.optim.RAdam, {}),
    ],
)
def test_another_optimizer_attached(moves, kind, options):
    run(Pair(moves, kind, **options))


@MOVES
@pytest.mark.parametrize("kind", [None, torch.optim.SGD])
def test_schedules_that_cycle_betas_and_momentum(moves, kind):
    pair = Pair(moves, kind, **({} if kind is None else {"momentum": 0.9}))
    schedule = OneCycleLR(pair.optimizer, RATE, total_steps=12)
    run(pair, after=lambda _: schedule.step())


@MOVES
def test_a_rate_that_falls_on_a_plateau(moves):
    pair = Pair(moves)
    schedule = ReduceLROnPlateau(pair.optimizer, patience=1, factor=0.5)
    run(pair, after=lambda _: schedule.step(1.0))


@MOVES
def test_hooks(moves):
    """On the way in, out, in place, and on the way back."""
    pair = Pair(moves)
    for model in pair.both():
        for block in model.model.layers:
            block.up_proj.register_full_backward_hook(lambda _, dx, dy: (1.5 * dx[0],))
            block.down_proj.register_forward_pre_hook(lambda _, args: (1.1 * args[0],))
            block.down_proj.register_forward_hook(lambda _, args, y: y.mul_(0.9))

    def loss(model, batch):  # the hooks want inputs with a gradient
        x = model.model.embed_tokens(batch["input_ids"]).requires_grad_()
        for block in model.model.layers:
            x = block(x)
        return head_of(model, x, batch)

    run(pair, loss)


@MOVES
def test_a_group_that_is_added_in_the_middle(moves):
    pair = Pair(moves)

    def unfreeze(number):
        if number == 3:
            for model, optimizer in zip(pair.both(), (pair.control, pair.optimizer), strict=True):
                norm = list(model.model.norm.requires_grad_(True).parameters())
                optimizer.add_param_group({"params": norm, "lr": RATE, "weight_decay": 0.0})

    run(pair, before=unfreeze)
    torch.testing.assert_close(pair.mine.model.norm.weight, pair.plain.model.norm.weight)
