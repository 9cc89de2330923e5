"""Proves what only fine-tuning has: noise on the embeddings.

    python -m pytest tests/test_train_sft.py

Elsewhere: packing and masks (test_dataset.py), adapters (test_lora.py), resume and several processes (test_resume.py,
test_ddp.py).
"""
import pytest
import torch
from safetensors.torch import load_file

import logs
from train_sft import add_noise


def test_noise_is_uniform_as_wide_as_the_paper_says_and_only_in_training():
    embedding = torch.nn.Embedding(50, 64)
    ids = torch.arange(40).view(2, 20)  # T = 20, D = 64
    plain = embedding(ids)
    add_noise(embedding, alpha=5.0)
    torch.manual_seed(0)
    noise = torch.cat([embedding(ids) - plain for _ in range(20)])
    size = 5.0 / (20 * 64) ** 0.5
    assert noise.abs().max() <= size * (1 + 1e-4)
    assert noise.std().item() == pytest.approx(size / 3**0.5, rel=0.02) and abs(noise.mean().item()) < 0.02 * size
    embedding.eval()
    assert torch.equal(embedding(ids), plain)


def test_gradient_of_the_embedding_is_that_of_the_clean_one():
    embedding = torch.nn.Embedding(5, 4)
    add_noise(embedding, alpha=1.0)
    embedding(torch.tensor([[1, 3]])).sum().backward()
    assert torch.equal(embedding.weight.grad, torch.tensor([[0.0], [1], [0], [1], [0]]).expand(5, 4))


def test_noise_changes_training_and_not_the_evaluation(stage, tmp_path):
    for folder, alpha in (("plain", "0"), ("noisy", "5"), ("again", "5")):
        module, argv = stage("train_sft", "--neftune_alpha", alpha, "--save_weight", folder)
        module.main(module.parse_args(argv))
    plain, noisy, again = (load_file(tmp_path / "out" / name / "model.safetensors") for name in
                           ("plain", "noisy", "again"))
    assert all(torch.equal(again[key], value) for key, value in noisy.items()), "same seed, same noise"
    assert any((plain[key] - value).abs().max() > 1e-4 for key, value in noisy.items())
    first = [logs.read_metrics(tmp_path / "out" / "logs" / name)[0] for name in ("plain", "noisy")]
    assert first[0]["step"] == 0 and first[0] == first[1]
