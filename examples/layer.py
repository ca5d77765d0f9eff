"""The layer alone, the whole method on layers placed by hand, and every op by itself.

    python examples/layer.py

Needs torch alone and runs in seconds on a CPU. docs/layer.md goes through it.
"""

import io

import torch
import torch.nn.functional as F
from torch import nn

from losia_kernels import (
    LoSiAAdamW,
    LoSiAConfig,
    LoSiALinear,
    attach,
    calibrate,
    export_state_dict,
    losia_layers,
    losia_linear_cross_entropy,
    ops,
    remove_losia,
    select_subnet,
)

torch.manual_seed(0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = LoSiALinear(64, 128)
        self.fc2 = LoSiALinear(128, 64, rank_factor=(1 / 8, 1 / 4))  # of outputs, of inputs

    def forward(self, x):
        return x + self.fc2(F.relu(self.fc1(x)))


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(64, 4)  # an ordinary layer: trained in full

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def loss_of(model, batch):
    x, labels = batch
    return F.cross_entropy(model(x), labels)


x = torch.randn(256, 64)
batch = x, x[:, :4].argmax(1)


def show(what, model):
    print(f"{what}: loss {loss_of(model, batch).item():.3f}")


# The layer alone ----------------------------------------------------------------------------------

model = Classifier()
show("before training", model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(20):
    loss_of(model, batch).backward()
    optimizer.step()
    for _, layer in losia_layers(model):
        layer.write_back_()  # what was stepped into the weight, with which the model computes
    optimizer.zero_grad()
show("the layer with torch's AdamW", model)

layer = model.blocks[0].fc1
layer.set_subnet_(torch.arange(16), torch.arange(0, 64, 8))  # as many neurons as before: 16 x 8
del optimizer.state[layer.subnet]  # its moments were of the old place

# The whole method ---------------------------------------------------------------------------------

config = LoSiAConfig.paper(period=5)  # when they move, and by what; sizes are the layers' own


def train(model, optimizer, steps):
    for _ in range(steps):
        loss_of(model, batch).backward()
        optimizer.step()  # AdamW, into the weights; every 5 steps another block moves
        optimizer.zero_grad()


model = Classifier()
calibrate(model, [batch], loss_fn=loss_of)  # optional: the first subnets where the data says
optimizer = LoSiAAdamW(model, lr=1e-2, config=config, total_steps=30)
timeline = optimizer.timeline
print("groups, in turn:", ", ".join(timeline.group_names))
timeline.listeners.append(lambda layer, place: print(f"{timeline.step}: {layer.name} moves"))
train(model, optimizer, 17)

file = io.BytesIO()  # a path, in a run of yours
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
train(model, optimizer, 13)
show("LoSiAAdamW", model)

resumed = Classifier()
optimizer = LoSiAAdamW(resumed, lr=1e-2, config=config)
file.seek(0)
state = torch.load(file)
resumed.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
train(resumed, optimizer, 13)
same = zip(model.state_dict().values(), resumed.state_dict().values(), strict=True)
assert all(torch.equal(one, other) for one, other in same)  # to the bit

plain = export_state_dict(model)  # the keys of the model with nn.Linear in it
remove_losia(model)  # and that model itself
assert list(plain) == list(model.state_dict())
assert type(model.blocks[0].fc1) is nn.Linear

model = Classifier()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
attach(optimizer, model, total_steps=30, config=config)  # then a scheduler, if you want one
train(model, optimizer, 30)
show("SGD, attached", model)

# The ops ------------------------------------------------------------------------------------------

x, dy = torch.randn(32, 24), torch.randn(32, 16)  # of 32 tokens: input, gradient of the output
weight, dense_grad = torch.randn(16, 24), dy.T @ x  # [out, in]
out_idx, in_idx = torch.tensor([1, 4, 5, 11]), torch.tensor([0, 2, 9, 10, 17, 23])

x_sub = ops.gather_features(x, in_idx)  # [32, 6]: what the forward keeps
grad = ops.subnet_grad(dy, x_sub, out_idx)  # [4, 6]: Eq. 9
torch.testing.assert_close(grad, dense_grad[out_idx][:, in_idx])

subnet = weight[out_idx][:, in_idx]  # the master copy of the block
first, second = torch.zeros_like(subnet), torch.zeros_like(subnet)  # Adam's moments
adamw = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0}
layer = (weight, subnet, grad, first, second, out_idx, in_idx)
ops.subnet_adamw_(*layer, lr=1e-3, step=1, **adamw)  # writes the first two and the moments
assert torch.equal(weight[out_idx][:, in_idx], subnet)
layers = [[tensor] for tensor in layer]  # of many layers at once: a list of each
forms = {"seeds": [], "exp_avg_scales": [], "exp_avg_sq_scales": [], "remainders": []}
ops.subnets_adamw_(*layers, lr=[1e-3], step=[2], **adamw, **forms)  # no seeds: no 16 or 8 bits

importance, uncertainty = torch.zeros(16, 24), torch.zeros(16, 24)
ops.importance_update_(importance, uncertainty, weight, dense_grad, beta1=0.85, beta2=0.85)
by_out, by_in = ops.importance_marginals(weight, dense_grad)  # [16], [24]: sums of Eq. 3 alone
by_out, by_in = ops.score_marginals(importance, uncertainty)  # [16], [24]: sums of Eq. 6
place = select_subnet(importance * uncertainty, k_out=4, k_in=6)  # Algorithm 1
print("the block to train:", place.out_idx.tolist(), "x", place.in_idx.tolist())

hidden, labels = torch.randn(32, 24), torch.randint(0, 16, (32,))
logits = hidden @ weight.T  # [32, 16]
block = logits[:, 8:].clone()
losses, lse = ops.cross_entropy_grad_(logits, labels)  # the logits are their gradient now
ops.cross_entropy_block_grad_(block, labels, lse, first_out=8, vocabulary=16)
torch.testing.assert_close(block, logits[:, 8:])  # the same for a part of the vocabulary
loss = losia_linear_cross_entropy(hidden, weight, labels)  # the two together, without [32, 16]
torch.testing.assert_close(loss, losses.mean())
