"""Proves the optimizers: AdamW and Muon against torch's own, the Newton-Schulz iteration against the SVD, which weights
go to which algorithm, and that a saved state goes on as if nothing had happened.

    python -m pytest tests/test_optim.py
"""
import copy
import types

import pytest
import torch

import common
import optim
from model import ModelConfig, ScalarHead, Transformer

SHAPES = [(6, 10), (10, 6), (6, 10), (8, 8)]  # wide, tall, a twin (batched with the first), square


def matrices(seed=0):
    """Float64 parameters of SHAPES; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]


def give_gradients(parameters, step, size=1.0):
    """Random gradients that are a function of the step, so that two optimizers see the same ones."""
    generator = torch.Generator().manual_seed(1000 + step)
    for p in parameters:
        p.grad = size * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def largest_difference(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def test_adamw_part_equals_torch_adamw():
    ours, theirs = matrices(), matrices()
    settings = dict(betas=(0.9, 0.95), eps=1e-8)
    mine = optim.Muon([dict(params=ours, lr=0.01, weight_decay=0.1, algorithm="adamw")], **settings)
    reference = torch.optim.AdamW(theirs, lr=0.01, weight_decay=0.1, foreach=False, **settings)
    for step in range(20):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        mine.step()
        reference.step()
    assert largest_difference(ours, theirs) < 1e-12


def test_adamw_by_name_is_torch_adamw_without_decay_on_gains():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    optimizer = optim.build(model, "adamw", 0.01, weight_decay=0.1)
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(p) for p in model.parameters() if p.ndim >= 2}


def slow_muon(weights, momenta, gradients, lr, decay, mu):
    """Muon written again, one matrix and one operation at a time, from the formulas in its docstring."""
    for i, g in enumerate(gradients):
        momenta[i] = mu * momenta[i] + (1 - mu) * g
        x = mu * momenta[i] + (1 - mu) * g
        x = x / x.norm()
        for _ in range(5):
            # singular values s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5, the rest of the decomposition stays
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        rows, columns = g.shape
        weights[i] = weights[i] * (1 - lr * decay) - lr * max(1, rows / columns) ** 0.5 * x


def test_muon_equals_a_slow_reference():
    ours = matrices()
    weights = [p.detach().clone() for p in ours]
    momenta = [torch.zeros_like(w) for w in weights]
    optimizer = optim.Muon([dict(params=ours, lr=0.02, weight_decay=0.1, algorithm="muon")], momentum=0.9)
    for step in range(20):
        give_gradients(ours, step)
        slow_muon(weights, momenta, [p.grad for p in ours], lr=0.02, decay=0.1, mu=0.9)
        optimizer.step()
    assert largest_difference(ours, weights) < 1e-6  # the 1e-7 in our norm guards against a zero gradient


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon of its own (2.9 and later have)")
def test_muon_equals_torch_muon(monkeypatch):
    # torch's Newton-Schulz is in bf16 whatever the weights are; for a comparison beyond rounding it is lifted to fp64
    import torch.optim._muon as theirs_module
    monkeypatch.setattr(theirs_module, "torch", types.SimpleNamespace(**{**vars(torch), "bfloat16": torch.float64}))
    ours, theirs = matrices(), matrices()
    mine = optim.Muon([dict(params=ours, lr=0.02, weight_decay=0.1, algorithm="muon")], momentum=0.95)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original")
    for step in range(20):
        give_gradients(ours, step, size=1e3)
        give_gradients(theirs, step, size=1e3)
        mine.step()
        reference.step()
    assert largest_difference(ours, theirs) < 1e-8


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_orthogonalize_keeps_singular_vectors_and_evens_singular_values(shape):
    torch.manual_seed(0)
    g = torch.randn(3, *shape, dtype=torch.float64)
    x = optim.orthogonalize(g)
    for before, after in zip(g, x, strict=True):
        u, values, vt = torch.linalg.svd(before, full_matrices=False)
        inner = u.T @ after @ vt.T  # diagonal when the singular vectors are the same
        diagonal = inner.diagonal()
        assert (inner - diagonal.diag()).abs().max() < 1e-9
        # a square Gaussian matrix has nearly singular directions, which five iterations do not lift all the way
        lifted = diagonal[values > 0.02 * values.norm()]
        assert lifted.min() > 0.6 and lifted.max() < 1.3


def test_orthogonalize_in_bf16_agrees_with_float64():
    if not common.bf16_speedup():
        pytest.skip("bf16 products crash on this CPU")
    torch.manual_seed(0)
    g = torch.randn(16, 64)
    exact, rounded = optim.orthogonalize(g.double()), optim.orthogonalize(g, dtype=torch.bfloat16)
    assert rounded.dtype == torch.float32
    assert (exact - rounded).norm() / exact.norm() < 0.1  # 8 bits of mantissa, five iterations; 0.03 was measured


def test_orthogonalize_of_zero_is_zero():
    assert not optim.orthogonalize(torch.zeros(4, 4)).any()


def tiny(**changes):
    """A two-layer model of every kind of weight, as (name -> parameter)."""
    return ModelConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                       intermediate_size=32, max_position_embeddings=32, pad_token_id=0, bos_token_id=1,
                       eos_token_id=2, **changes)


MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)


@pytest.mark.parametrize("build", [
    lambda: Transformer(tiny()), lambda: Transformer(tiny(tie_word_embeddings=False)),
    lambda: Transformer(tiny(**MOE)), lambda: Transformer(tiny(**MOE, n_shared_experts=1)), lambda: ScalarHead(tiny()),
], ids=["dense", "untied", "moe", "shared", "reward"])
def test_only_weights_inside_blocks_go_to_muon(build):
    model = build()
    optimizer = optim.build(model, "muon", 1e-3, 2e-2, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == names.keys(), "every parameter is in one group"
    muon = {names[key] for key, group in found.items() if group["algorithm"] == "muon"}
    words = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "score")
    assert not [name for name in muon if any(word in name for word in words)]
    # and nothing that should be there is missing: each block has 4 attention matrices and at least 3 of an MLP
    assert {name.split(".")[-2] for name in muon} >= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj",
                                                      "down_proj"}
    assert all(group["initial_lr"] == (2e-2 if group["algorithm"] == "muon" else 1e-3) for group in found.values())
    assert all(not group["weight_decay"] for key, group in found.items() if "norm" in names[key])


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_saved_state_continues_bit_exactly(name, tmp_path):
    torch.manual_seed(0)
    model = Transformer(tiny(**MOE))

    def train(module, optimizer, steps):
        for step in steps:
            optim.set_lr(optimizer, 1 - step / 10)
            give_gradients(module.parameters(), step)
            optimizer.step()

    optimizer = optim.build(model, name, 1e-2, 2e-2, weight_decay=0.1)
    train(model, optimizer, range(3))
    other = copy.deepcopy(model)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    fresh = optim.build(other, name, 1e-2, 2e-2, weight_decay=0.1)
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    train(model, optimizer, range(3, 6))
    train(other, fresh, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_parameters_without_gradient_stay():
    ours = matrices()
    before = ours[0].detach().clone()
    optimizer = optim.Muon([dict(params=ours, lr=0.1, weight_decay=0.5, algorithm="muon")])
    give_gradients(ours[1:], 0)
    optimizer.step()
    assert torch.equal(ours[0], before)


def test_set_lr_scales_each_group_from_its_own_peak():
    model = Transformer(tiny())
    optimizer = optim.build(model, "muon", 1e-3, 2e-2)
    assert optim.set_lr(optimizer, 0.5) == 5e-4
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-4, 5e-4]


def test_unknown_optimizer_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="'sgd' is unknown.*muon, adamw"):
        optim.build(torch.nn.Linear(2, 2), "sgd", 1e-3)
