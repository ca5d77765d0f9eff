"""Fine-tune with transformers' Trainer. The two places where a LoRA script differs are marked.

    python examples/trainer.py MODEL OUTPUT [STEPS]

MODEL is a local folder or a name on the hub; ``make demo`` leaves one in
.cache/SmolLM2-135M-Instruct.
"""

import sys

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
)

from losia_kernels import LoSiAConfig, apply_losia, remove_losia
from losia_kernels.integrations.transformers import LoSiACallback

model_name, output, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if sys.argv[3:] else 60
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name)

# LoRA: model = get_peft_model(model, LoraConfig(r=64, target_modules="all-linear"))
model = apply_losia(model, LoSiAConfig(period="auto"))


def encode(text):
    encoded = tokenizer(text + tokenizer.eos_token)
    return {**encoded, "labels": encoded["input_ids"]}


texts = [f"{number} times 9 is {9 * number}." for number in range(200)]
arguments = TrainingArguments(
    output,
    max_steps=steps,
    per_device_train_batch_size=8,
    learning_rate=5e-5,  # full fine-tuning's
    lr_scheduler_type="cosine",
    warmup_steps=steps // 10,
    logging_steps=5,
    save_steps=25,
    report_to="none",
)
trainer = Trainer(
    model,
    arguments,
    train_dataset=[encode(text) for text in texts],
    # masks padding by place: the end is learned though it pads too
    data_collator=DataCollatorForSeq2Seq(tokenizer),
)
# LoRA: nothing here
trainer.add_callback(LoSiACallback(trainer))
trainer.train()  # resume_from_checkpoint=True goes on from the last checkpoint, to the same bits

# LoRA: model = model.merge_and_unload()
model = remove_losia(model)  # before trainer.push_to_hub() it is what is pushed
model.save_pretrained(f"{output}/model")  # an ordinary folder
tokenizer.save_pretrained(f"{output}/model")
