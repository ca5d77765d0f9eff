"""The numbers in the pictures of gradients and of singular vectors."""

import math

import torch

from losia_kernels.finetune import spectra
from losia_kernels.layers.module import losia_layers
from tests.integrations.tiny_llama import make_model
from tests.tiny import paper


def test_gradient_sums_are_those_of_the_dense_gradients():
    torch.manual_seed(0)
    batches = [
        {"input_ids": (ids := torch.randint(0, 256, (2, 8))), "labels": ids} for _ in range(2)
    ]
    model = make_model()
    sums = spectra.gradient_sums(model, batches, paper(rank_factor=0.5))
    assert not list(losia_layers(model))
    plain, expected = make_model().train(), {name: (0, 0) for name in sums}
    for batch in batches:
        plain.zero_grad()
        plain(**batch).loss.backward()
        for name, (out_sums, in_sums) in expected.items():
            size = plain.get_parameter(f"{name}.weight").grad.abs()
            expected[name] = out_sums + size.sum(1) / 2, in_sums + size.sum(0) / 2
    assert len(sums) == 14
    for name in sums:
        for ours, theirs in zip(sums[name], expected[name], strict=True):
            torch.testing.assert_close(ours, theirs)


def test_similarity_of_singular_vectors(tmp_path):
    base, trained = make_model(), make_model()
    layer = trained.model.layers[0].mlp.up_proj
    u, s, v = torch.linalg.svd(layer.weight.detach(), full_matrices=False)
    turned = u.clone()
    turned[:, 1], turned[:, 2] = (
        (u[:, 1] + u[:, 2]) / math.sqrt(2),
        (u[:, 2] - u[:, 1]) / math.sqrt(2),
    )
    layer.weight.data = turned @ s.diag() @ v
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    found = spectra.singular_vector_similarity(base, trained, names, count=5)
    expected = torch.tensor([1, 0.5**0.5, 0.5**0.5, 1, 1])
    torch.testing.assert_close(found[names[0]], expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(found[names[1]], torch.ones(5), atol=1e-5, rtol=0)
