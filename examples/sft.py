"""Fine-tune on chats with TRL's SFTTrainer. The two places where a LoRA script differs are marked.

    python examples/sft.py MODEL OUTPUT [STEPS]

MODEL is a local folder or a name on the hub, with a chat template; needs the extra ``trl``.
"""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from losia_kernels import LoSiAConfig, apply_losia, remove_losia
from losia_kernels.integrations.transformers import LoSiACallback

model_name, output, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]) if sys.argv[3:] else 60
tokenizer = AutoTokenizer.from_pretrained(model_name)
model = AutoModelForCausalLM.from_pretrained(model_name)

# LoRA: nothing here, and peft_config=LoraConfig(r=64, target_modules="all-linear") below
model = apply_losia(model, LoSiAConfig(period="auto"))

chats = Dataset.from_list(
    [
        {
            "prompt": [{"role": "user", "content": f"What is 9 times {number}?"}],
            "completion": [{"role": "assistant", "content": f"{9 * number}."}],
        }
        for number in range(200)
    ]
)
arguments = SFTConfig(
    output,
    max_steps=steps,
    per_device_train_batch_size=8,
    learning_rate=5e-5,  # full fine-tuning's
    lr_scheduler_type="cosine",
    warmup_steps=steps // 10,
    logging_steps=5,
    max_length=256,
    report_to="none",
    bf16=torch.cuda.is_available(),
    use_cpu=not torch.cuda.is_available(),
)
trainer = SFTTrainer(
    model,
    arguments,
    train_dataset=chats,
    processing_class=tokenizer,
)
# LoRA: nothing here
trainer.add_callback(LoSiACallback(trainer))
trainer.train()

# LoRA: model = trainer.model.merge_and_unload()
model = remove_losia(trainer.model)
model.save_pretrained(f"{output}/model")
tokenizer.save_pretrained(f"{output}/model")
