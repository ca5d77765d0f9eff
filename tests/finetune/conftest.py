"""As in ``tests/integrations``: these tests need the extra ``hf`` and stay on the CPU."""

from tests.integrations.conftest import model_folder, tokenizer, without_a_gpu  # noqa: F401
