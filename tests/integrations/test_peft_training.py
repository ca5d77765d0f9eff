"""Training through PEFT is LoSiA's own: the same steps as on a model from apply_losia, in a loop, a
Trainer, TRL."""

import pytest
import torch

from tests.integrations.paper_adapter import paper_adapter
from tests.integrations.tiny_llama import make_model, make_tokenizer
from tests.tiny import paper

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from losia_kernels import LoSiAAdamW, apply_losia, attach, calibrate
from losia_kernels.checkpoint.resumable import load_checkpoint, save_checkpoint
from losia_kernels.integrations.transformers import LoSiACallback

CHOICES = dict(rank_factor=1 / 4, period=2, rank_pattern={"v_proj": 0.5}, seed=3)
LR = 1e-2


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(0, 256, (2, 7), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids.clone()} for ids in tokens]


def train(model, optimizer, data):
    losses = []
    for batch in data:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def base_names(model):
    """The weights' names and values as the plain model has them."""
    return {
        name.replace(".base_layer", ""): value
        for name, value in model.named_parameters()
        if "losia_" not in name
    }


def assert_same(model, other):
    one, two = base_names(model), base_names(other)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_steps_are_those_of_apply_losia(dtype):
    base = make_model().to(dtype)
    ours = get_peft_model(make_model().to(dtype), paper_adapter(**CHOICES))
    theirs = apply_losia(base, paper(**CHOICES, fused_loss=False))
    one, two = LoSiAAdamW(ours, lr=LR), LoSiAAdamW(theirs, lr=LR)
    assert (
        one.timeline.group_names == two.timeline.group_names == ["model.layers.0", "model.layers.1"]
    )
    for model in (ours, theirs):
        calibrate(model, batches(2, seed=1), 2)
    data = batches(9)  # four relocalizations
    assert train(ours, one, data) == train(theirs, two, data)
    subnets = {name: value for name, value in theirs.named_parameters() if name.endswith(".subnet")}
    for name, value in subnets.items():
        assert torch.equal(
            value, ours.get_parameter(f"base_model.model.{name[:-7]}.losia_adapter.default.subnet")
        )
    for name in subnets:
        weight = f"{name[:-7]}.weight"
        assert torch.equal(
            base_names(ours)[f"base_model.model.{weight}"], theirs.get_parameter(weight)
        ), weight


def test_a_16_bit_subnet_is_rounded_stochastically():
    model = get_peft_model(
        make_model().bfloat16(), paper_adapter(**CHOICES), autocast_adapter_dtype=False
    )
    optimizer = LoSiAAdamW(model, lr=LR)
    assert optimizer.timeline.config.master == "none"
    other = apply_losia(make_model().bfloat16(), paper(**CHOICES, fused_loss=False, master="none"))
    assert train(model, optimizer, batches(5)) == train(other, LoSiAAdamW(other, lr=LR), batches(5))


def test_the_output_layer_and_modules_to_save_train():
    config = paper_adapter(**CHOICES, output_dim_factor=0.1, modules_to_save=["norm"])
    untied = dict(tie_word_embeddings=False)
    model = get_peft_model(make_model(**untied), config)
    optimizer = LoSiAAdamW(model, lr=LR)
    assert optimizer.timeline.group_names == ["lm_head", "model.layers.0", "model.layers.1"]
    head = model.base_model.model.lm_head
    assert head.losia_adapter["default"].subnet.shape == (int(0.1 * 261), 32)
    train(model, optimizer, batches(7))
    before = make_model(**untied)
    assert not torch.equal(head.base_layer.weight, before.lm_head.weight)
    norm = model.base_model.model.model.norm
    assert not torch.equal(norm.modules_to_save["default"].weight, before.model.norm.weight)
    assert torch.equal(norm.original_module.weight, before.model.norm.weight)


@pytest.mark.parametrize("several", [False, True])
def test_any_torch_optimizer_through_attach(several):
    """Also where other adapters are loaded, whose subnets no optimizer holds."""
    ours = get_peft_model(make_model(), paper_adapter(**CHOICES))
    if several:
        ours.add_adapter("other", paper_adapter(**CHOICES))
    theirs = apply_losia(make_model(), paper(**CHOICES, fused_loss=False))
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        attach(optimizer, model)
        losses.append(train(model, optimizer, batches(5)))
    assert losses[0] == losses[1]


def test_an_optimizer_that_knows_nothing_of_losia_trains_the_first_subnets():
    model = get_peft_model(make_model(), paper_adapter(**CHOICES))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = train(model, optimizer, batches(1) * 5)
    assert losses[-1] < losses[0]
    # the last step, too, which no forward has seen
    assert torch.equal(
        model.state_dict()["base_model.model.model.layers.0.mlp.up_proj.base_layer.weight"],
        _written(model),
    )


def _written(model):
    adapter = model.base_model.model.model.layers[0].mlp.up_proj.losia_adapter["default"]
    weight = make_model().model.layers[0].mlp.up_proj.weight.detach().clone()
    weight[adapter.out_idx[:, None], adapter.in_idx] = adapter.subnet.detach()
    return weight


def test_only_the_active_adapter_trains():
    model = get_peft_model(make_model(), paper_adapter(**CHOICES))
    model.add_adapter("other", paper_adapter(**{**CHOICES, "seed": 4}))
    model.set_adapter("other")
    model.set_requires_grad("default")  # trainable, but not in the weights
    optimizer = LoSiAAdamW(model, lr=LR)
    assert sum(len(layers) for layers in optimizer.timeline.groups) == 14
    train(model, optimizer, batches(5))
    alone = get_peft_model(make_model(), paper_adapter(**{**CHOICES, "seed": 4}))
    train(alone, LoSiAAdamW(alone, lr=LR), batches(5))
    assert_same(alone, model)
    model.set_adapter("default")
    assert_same(get_peft_model(make_model(), paper_adapter(**CHOICES)), model)


def test_a_frozen_adapter_is_refused_by_the_optimizer(tmp_path):
    get_peft_model(make_model(), paper_adapter(**CHOICES)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no layers to train"):
        LoSiAAdamW(PeftModel.from_pretrained(make_model(), tmp_path))
    LoSiAAdamW(PeftModel.from_pretrained(make_model(), tmp_path, is_trainable=True))


# the Trainers -------------------------------------------------------------------------------------


def arguments(folder, cls=TrainingArguments, **changes):
    values = dict(
        output_dir=str(folder),
        max_steps=7,
        per_device_train_batch_size=2,
        save_steps=3,
        logging_steps=1,
        report_to=[],
        learning_rate=LR,
        use_cpu=True,
        lr_scheduler_type="linear",
        max_grad_norm=1.0,
    )
    return cls(**{**values, **changes})


def make_trainer(folder, **changes):
    data = [{key: value[0] for key, value in batch.items()} for batch in batches(20)]
    model = get_peft_model(make_model(), paper_adapter(**CHOICES))
    trainer = Trainer(model, arguments(folder, **changes), train_dataset=data)
    trainer.add_callback(LoSiACallback(trainer))
    return trainer


def test_a_resumed_run_is_the_same_bit_for_bit(tmp_path):
    """Saved after step 3, within a slot and after a relocalization at step 2; more follow."""
    whole = make_trainer(tmp_path / "whole")
    whole.train()
    assert (
        len(
            whole.model.base_model.model.model.layers[0]
            .mlp.up_proj.losia_adapter["default"]
            .block_values
        )
        > 1
    )
    checkpoint = tmp_path / "whole" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (
        checkpoint / "model.safetensors"
    ).exists()
    resumed = make_trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    one, two = whole.model.state_dict(), resumed.model.state_dict()
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_a_trainer_trains_beside_an_idle_adapter(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.model.add_adapter("idle", paper_adapter(**CHOICES))
    trainer.train()
    assert trainer.optimizer.optimizer.timeline.step == 2
    trainer.model.set_adapter("idle")
    assert_same(get_peft_model(make_model(), paper_adapter(**CHOICES)), trainer.model)


def test_sft_trainer_takes_it_as_peft_config(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    trainer = trl.SFTTrainer(
        make_model(),
        arguments(tmp_path, trl.SFTConfig, max_length=32, max_steps=5),
        train_dataset=datasets.Dataset.from_dict(
            {"text": ["abc def ghi", "jkl mno", "pqr stu vw", "xyz"] * 3}
        ),
        processing_class=make_tokenizer(),
        peft_config=paper_adapter(**CHOICES),
    )
    trainer.add_callback(LoSiACallback(trainer))
    trainer.train()
    assert trainer.optimizer.optimizer.timeline.step == 5
    adapter = trainer.model.base_model.model.model.layers[0].mlp.up_proj.losia_adapter["default"]
    assert len(adapter.block_values) > 1  # it has moved
    trainer.save_model(tmp_path / "saved")
    assert_same(trainer.model, PeftModel.from_pretrained(make_model(), tmp_path / "saved"))


SAID = "stepped by an optimizer that does not know them"


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "AdamW8bit"])
def test_an_optimizer_that_moves_no_subnet_is_said(kind):
    """It reaches the weights, and the subnets stay where they were drawn."""
    library = torch.optim if kind != "AdamW8bit" else pytest.importorskip("bitsandbytes").optim
    model = get_peft_model(make_model(), paper_adapter(**CHOICES))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with pytest.warns(UserWarning, match=f"{SAID}.*LoSiAAdamW, attach"):
        train(model, getattr(library, kind)(trained, lr=LR), batches(2))


def test_an_optimizer_that_drives_the_subnets_is_not_warned_about(recwarn):
    for driven in ("LoSiAAdamW", "attached"):
        model = get_peft_model(make_model(), paper_adapter(**CHOICES))
        if driven == "attached":
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR)
            attach(optimizer, model)
        else:
            optimizer = LoSiAAdamW(model, lr=LR)
        train(model, optimizer, batches(5))
        model.disable_adapter_layers()
        model.enable_adapter_layers()
        model(**batches(1)[0])
    assert not [each for each in recwarn if SAID in str(each.message)]


def test_a_trainer_without_the_callback_says_so_too(tmp_path):
    data = [{key: value[0] for key, value in batch.items()} for batch in batches(20)]
    model = get_peft_model(make_model(), paper_adapter(**CHOICES))
    with pytest.warns(UserWarning, match=f"{SAID}.*add_callback.LoSiACallback.trainer"):
        Trainer(model, arguments(tmp_path), train_dataset=data).train()


def test_an_8_bit_optimizer_reaches_the_weights_without_attach():
    """Its kernels write past torch's count of writes, by which an adapter knows that it was
    stepped."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = get_peft_model(make_model(), paper_adapter(**CHOICES))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = train(
        model, bitsandbytes.optim.AdamW8bit(trained, lr=LR, min_8bit_size=1), batches(1) * 5
    )
    assert losses[-1] < losses[0] - 0.01


def test_a_checkpoint_in_parts_is_refused_before_it_is_written(tmp_path):
    """It could not be read: an adapter makes its blocks anew for each state dict, and has one more
    after each move."""
    model = get_peft_model(make_model(), paper_adapter(**CHOICES))
    optimizer = LoSiAAdamW(model, lr=LR)
    with pytest.raises(ValueError, match="block_out_idx is no parameter or buffer"):
        save_checkpoint(tmp_path / "a", model, optimizer)
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path / "b", plain := apply_losia(make_model(), paper()), LoSiAAdamW(plain))
    with pytest.raises(ValueError, match="block_out_idx is no parameter or buffer"):
        load_checkpoint(tmp_path / "b", model, optimizer)
