"""Fine-tune in a loop of one's own. The two places where a LoRA script differs are marked.

    python examples/pytorch.py MODEL OUTPUT [STEPS]

MODEL is a local folder or a name on the hub.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from losia_kernels import LoSiAAdamW, LoSiAConfig, apply_losia, remove_losia

model_name, output, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if sys.argv[3:] else 60
device = "cuda" if torch.cuda.is_available() else "cpu"
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name).to(device).train()

# LoRA: model = get_peft_model(model, LoraConfig(r=64, target_modules="all-linear"))
model = apply_losia(model, LoSiAConfig(period="auto"))


def batch(step: int) -> dict[str, torch.Tensor]:
    numbers = [(8 * step + i) % 200 for i in range(8)]
    rows = [
        tokenizer(f"{number} times 9 is {9 * number}.{tokenizer.eos_token}")["input_ids"]
        for number in numbers
    ]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
    learned = torch.tensor(
        [[position < len(row) for position in range(longest)] for row in rows], device=device
    )
    return {
        "input_ids": ids,
        "attention_mask": learned.long(),
        "labels": ids.masked_fill(~learned, -100),
    }


# LoRA: optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
optimizer = LoSiAAdamW(model, lr=5e-5, total_steps=steps)  # full fine-tuning's rate
moved: set[str] = set()
optimizer.timeline.listeners.append(lambda layer, place: moved.add(layer.membership.group_name))
scheduler = get_cosine_schedule_with_warmup(optimizer, steps // 10, steps)
for step in range(steps):
    loss = model(**batch(step)).loss
    loss.backward()
    optimizer.step()  # the update, written into the weights; subnets move when it is their turn
    optimizer.zero_grad()
    scheduler.step()
    if step % 5 == 0:
        print(f"step {step}  loss {loss.item():.3f}  moved {', '.join(sorted(moved))}", flush=True)
        moved.clear()

# LoRA: model = model.merge_and_unload()
model = remove_losia(model)
model.save_pretrained(f"{output}/model")
tokenizer.save_pretrained(f"{output}/model")
