"""The tests of this folder need the extra ``hf``; without it they are skipped."""

import pytest
import torch

for library in ("transformers", "accelerate", "matplotlib", "psutil"):
    pytest.importorskip(library)


@pytest.fixture(scope="module", autouse=True)
def without_a_gpu():
    """They are held to runs on the CPU in float32, also where the Trainer would find a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture
def tokenizer():
    from tests.integrations.tiny_llama import make_tokenizer

    return make_tokenizer()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    from tests.integrations.tiny_llama import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("tiny-llama")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
