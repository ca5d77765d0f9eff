"""What an adapter's model card says beside PEFT's own words: how it is loaded, for PEFT alone cannot."""

from pathlib import Path

from huggingface_hub import ModelCard

HEADING = "## How to Get Started with the Model"  # of PEFT's cards
HOW = """
This is a LoSiA adapter. PEFT loads it where `losia_kernels` is installed, once this is imported:

```python
import losia_kernels.integrations.peft  # makes LoSiA known to PEFT
from peft import PeftModel
from transformers import {auto_class}

model = {auto_class}.from_pretrained({base!r})
model = PeftModel.from_pretrained(model, {adapter!r})  # the folder of this adapter, or its name on the hub
```
"""


def say_how_to_load(folder: str | Path, base: str | None, task_type: str | None) -> None:
    """Add it to the card that PEFT has written into the adapter's ``folder``, or, of an adapter
    with a name of its own, beside that folder; where there is none, nothing is written."""
    folder = Path(folder)
    readme = next(
        (f for f in (folder / "README.md", folder.parent / "README.md") if f.exists()), None
    )
    card = ModelCard.load(readme) if readme else None
    if card is None or card.data.library_name != "peft" or "losia_kernels" in card.text:
        return
    auto_class = "AutoModelForCausalLM" if task_type == "CAUSAL_LM" else "AutoModel"
    how = HOW.format(auto_class=auto_class, base=base or "BASE_MODEL", adapter=folder.name)
    before, heading, after = card.text.partition(HEADING)
    card.text = f"{before.rstrip()}\n\n{HEADING}\n{how}{after if heading else ''}"
    card.data.tags = sorted({*(card.data.tags or []), "losia"})
    card.save(readme)
