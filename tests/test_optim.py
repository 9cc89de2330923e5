"""Proves the optimizers: AdamW and Muon against torch's own, Lion and Schedule-Free against the packages of that name,
Sophia against numpy and its estimate against the Hessian, the Newton-Schulz iteration against the SVD, which weights go
to which algorithm, which point is evaluated and saved, and that a saved state goes on as if nothing had happened.

    python -m pytest tests/test_optim.py
"""
import ast
import contextlib
import copy
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import common
import optim
import train_pretrain
from configuration import ModelConfig
from logprobs import token_logprobs
from model import ScalarHead, Transformer

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


@pytest.mark.parametrize("warmup", [0, 8])
def test_muon_equals_a_slow_reference(warmup):
    """With warm-up the momentum is 0.85 in the first step and rises evenly to 0.9."""
    ours = matrices()
    weights = [p.detach().clone() for p in ours]
    momenta = [torch.zeros_like(w) for w in weights]
    optimizer = optim.Muon([dict(params=ours, lr=0.02, weight_decay=0.1, algorithm="muon")], momentum=0.9,
                           momentum_warmup=warmup, fast=False)
    for step in range(20):
        give_gradients(ours, step)
        mu = 0.85 + 0.05 * step / warmup if step < warmup else 0.9
        slow_muon(weights, momenta, [p.grad for p in ours], lr=0.02, decay=0.1, mu=mu)
        optimizer.step()
    assert largest_difference(ours, weights) < 1e-6  # the 1e-7 in our norm guards against a zero gradient


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon of its own (2.9 and later have)")
def test_muon_equals_torch_muon(monkeypatch):
    # torch's Newton-Schulz is in bf16 whatever the weights are; for a comparison beyond rounding it is lifted to fp64
    import torch.optim._muon as theirs_module
    monkeypatch.setattr(theirs_module, "torch", types.SimpleNamespace(**{**vars(torch), "bfloat16": torch.float64}))
    ours, theirs = matrices(), matrices()
    mine = optim.Muon([dict(params=ours, lr=0.02, weight_decay=0.1, algorithm="muon")], momentum=0.95,
                      momentum_warmup=0, fast=False)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="original")
    for step in range(20):
        give_gradients(ours, step, size=1e3)
        give_gradients(theirs, step, size=1e3)
        mine.step()
        reference.step()
    assert largest_difference(ours, theirs) < 1e-8


def give_slopes(parameters, step):
    """Gradients that depend on where the weights are: a bowl around 1 with noise that is a function of the step."""
    give_gradients(parameters, step, size=0.3)
    for p in parameters:
        p.grad += p.detach() - 1


def rate(step):
    """A learning rate with a warm-up of five steps."""
    return 0.02 * min(1.0, (step + 1) / 5)


def test_lion_equals_lion_pytorch():
    package = pytest.importorskip("lion_pytorch")
    ours, theirs = matrices(), matrices()
    mine = optim.Lion([dict(params=ours, weight_decay=0.1)])
    reference = package.Lion(theirs, weight_decay=0.1, betas=(0.9, 0.99))
    for step in range(20):
        mine.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = rate(step)
        give_slopes(ours, step)
        give_slopes(theirs, step)
        mine.step()
        reference.step()
    assert largest_difference(ours, theirs) < 1e-12
    assert largest_difference(ours, matrices()) > 0.2


def test_schedule_free_equals_the_package_of_its_authors():
    package = pytest.importorskip("schedulefree")
    ours, theirs = matrices(), matrices()
    mine = optim.ScheduleFree([dict(params=ours, weight_decay=0.1)], betas=(0.9, 0.95))
    reference = package.AdamWScheduleFree(theirs, weight_decay=0.1, betas=(0.9, 0.95), foreach=False)
    for step in range(20):
        mine.param_groups[0]["lr"] = reference.param_groups[0]["lr"] = rate(step)
        optim.to_gradient_point(mine)
        reference.train()
        assert largest_difference(ours, theirs) < 1e-12, "y"
        give_slopes(ours, step)
        give_slopes(theirs, step)
        mine.step()
        reference.step()
        reference.eval()
        assert largest_difference(ours, theirs) < 1e-12, "x"
    assert largest_difference(ours, matrices()) > 0.05


def test_schedule_free_weights_are_the_mean_of_the_points_that_moved():
    ours = matrices()
    mine = optim.ScheduleFree([dict(params=ours, lr=0.02)])
    points = []
    for step in range(12):
        mine.to_gradient_point()
        give_slopes(ours, step)
        mine.step()
        points.append([mine.state[p]["z"].clone() for p in ours])
    means = [torch.stack(z).mean(0) for z in zip(*points, strict=True)]
    assert largest_difference(ours, means) < 1e-12
    assert largest_difference(points[-1], means) > 0.01, "and not the last of them"


def test_schedule_free_cannot_step_or_save_at_the_wrong_point():
    ours = matrices()
    mine = optim.ScheduleFree([dict(params=ours, lr=0.02, weight_decay=0.1)])
    for step in range(4):
        last = ours[-1].detach().clone()
        mine.to_gradient_point()
        give_slopes(ours, step)
        if step == 2:  # a weight without a gradient moves to y all the same, and must come back
            assert (ours[-1] - last).abs().max() > 1e-4
            ours[-1].grad = None
        mine.step()
        assert step != 2 or (ours[-1] - last).abs().max() < 1e-14
    with pytest.raises(RuntimeError, match="step.. at x; gradients belong to y; call to_gradient_point"):
        mine.step()
    before = [p.detach().clone() for p in ours]
    mine.state_dict()
    mine.to_gradient_point()
    assert largest_difference(ours, before) > 1e-4
    with pytest.raises(RuntimeError, match="state_dict.. at y; x is the point to save; end the step"):
        mine.state_dict()
    mine.to_gradient_point()  # asked twice, moved once
    mine.zero_grad()  # a step that was skipped
    assert largest_difference(ours, before) < 1e-14
    mine.zero_grad()
    assert largest_difference(ours, before) < 1e-14
    mine.state_dict()


def test_schedule_free_run_evaluates_and_saves_the_mean(stage, monkeypatch, tmp_path):
    """Through the training script. Two steps at one rate: x is half of the first z and half of the second."""
    flags = ["--optimizer", "schedulefree", "--warmup_steps", "0"]
    out, found = tmp_path / "out", {}

    def start(name, steps):
        module, argv = stage("train_pretrain", *flags, "--save_weight", name, "--max_steps", str(steps))
        args = module.parse_args(argv)
        final = module.main(args)
        state = torch.load(out / name / "resume" / "state.pt", weights_only=True)
        names = [n for n, _ in Transformer.from_pretrained(out / name).named_parameters()]
        order = [n for n in names if state["model"][n].ndim >= 2] + [n for n in names if state["model"][n].ndim < 2]
        found[name] = {n: state["optimizer"]["state"][i]["z"] for i, n in enumerate(order)}
        saved = load_file(out / name / "model.safetensors")
        assert all(torch.equal(saved[n], state["model"][n]) for n in names if n in saved)
        return final, state["model"], args

    _, first, _ = start("one", 1)
    final, second, args = start("two", 2)
    for name, z in found["two"].items():
        assert torch.allclose(second[name], (found["one"][name] + z) / 2, rtol=0, atol=1e-12), name
    assert max((second[name] - z).abs().max() for name, z in found["two"].items()) > 1e-4, "x and z differ"
    # what was evaluated is what was saved
    data = train_pretrain.PretrainData(args.val_path, train_pretrain.Tokenizer.from_pretrained(args.from_weight),
                                       args.max_seq_len, args.cache_dir, args.seed, part="all")
    runtime = types.SimpleNamespace(shard=list, sum=lambda *x: list(x), device="cpu",
                                    autocast=contextlib.nullcontext)
    model = Transformer.from_pretrained(out / "two", "cpu", torch.float64)
    assert train_pretrain.evaluate(model, data, args, runtime)[0] == pytest.approx(final["val_loss"], rel=1e-12)
    # a skipped second step leaves the first step's x
    skip = common.NonFinite.skip
    monkeypatch.setattr(common.NonFinite, "skip", lambda self, step, *rest: step == 1 or skip(self, step, *rest))
    _, skipped, _ = start("skipped", 2)
    assert all(torch.allclose(skipped[name], first[name], rtol=0, atol=1e-14) for name in first)


@pytest.mark.parametrize("name", ["train_reward", "train_dpo"])
@pytest.mark.parametrize("optimizer", ["lion", "schedulefree"])
def test_stages_of_pairs_train_with_it(stage, tmp_path, name, optimizer):
    module, argv = stage(name, "--optimizer", optimizer, "--learning_rate", "1e-3")
    args = module.parse_args(argv)
    module.main(args)
    before, after = (load_file(f"{folder}/model.safetensors") for folder in (args.from_weight, tmp_path / "out/run"))
    moved = [(after[key] - before[key]).abs().max().item() for key in before if key in after]
    assert min(moved) > 1e-4


def slow_sophia(weights, state, gradients, samples, lr, decay, targets):
    """Algorithm 3 of the paper in numpy, one matrix at a time. samples: gradients on drawn labels, or None."""
    for i, g in enumerate(gradients):
        m, h = state[i]
        if samples is not None:
            h = 0.99 * h + 0.01 * targets * samples[i] ** 2
        m = 0.96 * m + 0.04 * g
        state[i] = m, h
        step = np.clip(m / np.maximum(0.05 * h, 1e-12), -1, 1)
        weights[i] = weights[i] - lr * decay * weights[i] - lr * step


def test_sophia_equals_a_slow_reference():
    ours = matrices()
    weights = [p.detach().numpy().copy() for p in ours]
    state = [(np.zeros_like(w), np.zeros_like(w)) for w in weights]
    mine = optim.Sophia([dict(params=ours, lr=0.02, weight_decay=0.1)])
    clipped = []
    for step in range(20):
        samples = None
        if step % 3 == 0:
            give_gradients(ours, 50 + step)
            samples = [p.grad.numpy().copy() for p in ours]
            for p in ours:
                p.grad *= 8  # as a gradient scaler would
            mine.update_hessian(targets=400, grad_scale=8.0)
        give_slopes(ours, step)
        slow_sophia(weights, state, [p.grad.numpy() for p in ours], samples, lr=0.02, decay=0.1, targets=400)
        before = [p.detach().clone() for p in ours]
        mine.step()
        moved = torch.cat([((p - b + 0.002 * b).abs()).flatten() for p, b in zip(ours, before, strict=True)])
        clipped.append((moved > 0.02 - 1e-9).double().mean().item())
    assert largest_difference(ours, [torch.from_numpy(w) for w in weights]) < 1e-12
    assert 0.05 < clipped[-1] < 0.95, "both sides of the clip were tested"


def test_sophia_needs_an_estimate_and_survives_an_overflow():
    ours = matrices()
    mine = optim.Sophia([dict(params=ours, lr=0.02)])
    give_gradients(ours, 0)
    with pytest.raises(RuntimeError, match="before update_hessian.*; it divides by .*; give one"):
        mine.step()
    mine.update_hessian(targets=10)
    before = [mine.state[p]["hessian"].clone() for p in ours]
    ours[1].grad[0, 0] = torch.inf
    mine.update_hessian(targets=10)
    assert largest_difference([mine.state[p]["hessian"] for p in ours], before) == 0
    assert all(h.any() for h in before)


def test_drawn_labels_follow_the_models_prediction():
    torch.manual_seed(0)
    ids = torch.randint(5, (4000, 3))
    logits = torch.randn(3, 5, dtype=torch.float64)
    logits[0, 0] = -torch.inf
    drawn = optim.sample_labels(logits.expand(4000, 3, 5), ids, torch.rand(4000, 2))
    assert torch.equal(drawn[:, 0], ids[:, 0]) and drawn.dtype == torch.int64
    for t in range(2):
        shares = torch.bincount(drawn[:, t + 1], minlength=5) / 4000
        assert (shares - logits[t].softmax(-1)).abs().max() < 0.03  # 4 standard deviations of a share of a half
    assert not (drawn[:, 1] == 0).any()
    edges = torch.tensor([[0.0, 1.0]])  # the smallest number, and what rounding can make of the largest
    drawn = optim.sample_labels(logits[None].float(), ids[:1], edges)
    assert drawn[0, 1] == 1, "not token 0, whose probability is 0"
    assert drawn[0, 2] == 4


def test_estimate_is_the_diagonal_of_the_hessian():
    """For logits that are linear in the weights the Gauss-Newton matrix is the Hessian, which autograd knows."""
    torch.manual_seed(0)
    features = torch.randn(7, 3, dtype=torch.float64)  # six targets, and a last position that scores nothing
    weight = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.float64))
    ids = torch.randint(4, (1, 7))

    def loss(w, labels):
        return -token_logprobs((features @ w.T)[None], labels).mean()

    exact = torch.autograd.functional.hessian(lambda w: loss(w, ids), weight).reshape(12, 12).diagonal().view(4, 3)
    # beta2 = 1 - 1/n in the n-th estimate makes the running average a plain mean
    mine = optim.Sophia([dict(params=[weight])])
    for n in range(1, 3001):
        mine.param_groups[0]["betas"] = (0.96, 1 - 1 / n)
        labels = optim.sample_labels((features @ weight.T)[None].detach(), ids, torch.rand(1, 6))
        weight.grad = torch.autograd.grad(loss(weight, labels), weight)[0]
        mine.update_hessian(targets=6)
    assert torch.allclose(mine.state[weight]["hessian"], exact, rtol=0.15, atol=0.003)
    # labels of the data would not do: without a draw the estimate is another
    data = 6 * torch.autograd.grad(loss(weight, ids), weight)[0] ** 2
    assert not torch.allclose(data, exact, rtol=0.5, atol=0.003)


def test_each_optimizer_fits_on_a_screen():
    """At most 40 statements and heads of blocks, docstrings not counted."""
    for node in ast.parse(Path(optim.__file__).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            for part in [node, *node.body]:
                if isinstance(part, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(part):
                    del part.body[0]
            lines = [line for line in ast.unparse(node).split("\n") if line]
            assert 10 < len(lines) <= 40, f"{node.name}: {len(lines)}"


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_orthogonalize_keeps_singular_vectors_and_evens_singular_values(shape, fast):
    torch.manual_seed(0)
    g = torch.randn(3, *shape, dtype=torch.float64)
    x = optim.orthogonalize(g, fast)
    for before, after in zip(g, x, strict=True):
        u, values, vt = torch.linalg.svd(before, full_matrices=False)
        inner = u.T @ after @ vt.T  # diagonal when the singular vectors are the same
        diagonal = inner.diagonal()
        assert (inner - diagonal.diag()).abs().max() < 1e-9
        # a square Gaussian matrix has nearly singular directions, which few iterations do not lift all the way
        lifted = diagonal[values > 0.02 * values.norm()]
        assert lifted.min() > 0.6 and lifted.max() < 1.3


def test_each_fast_iteration_is_the_best_polynomial_for_what_the_one_before_leaves():
    """Chebyshev's theorem: of all a s + b s^3 + c s^5 the one closest to 1 in the worst case is the one whose error
    reaches its largest size at least four times, with alternating signs."""
    low, high = 0.02, 1.0
    smallest = 0.01  # the first interval leaves it out; the later ones follow it
    for a, b, c in optim.FAST:
        s = np.linspace(low, high, 100_001)
        error = a * s + b * s**3 + c * s**5 - 1
        largest = np.abs(error).max()
        signs = np.sign(error[np.abs(error) > 0.98 * largest])
        assert 1 + np.count_nonzero(np.diff(signs)) >= 4
        smallest = a * smallest + b * smallest**3 + c * smallest**5
        low, high = min(smallest, 1 - largest), 1 + largest
    assert max(1 - low, high - 1) < 0.275


@pytest.mark.parametrize("rank", [1, 2, 16])
def test_fast_orthogonalize_of_low_rank_in_bf16_does_not_run_away(rank):
    """At rank one the bound on the singular value is reached: rounding must not carry it beyond."""
    generator = torch.Generator().manual_seed(rank)
    g = torch.randn(16, rank, generator=generator) @ torch.randn(rank, 48, generator=generator)
    x = optim.orthogonalize(g.bfloat16() if common.bf16_speedup() else g.bfloat16().float(), fast=True)
    assert torch.linalg.matrix_norm(x.float(), 2) < 1.4


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
    optimizer = optim.build(model, "muon", 1e-3, 2e-2, weight_decay=0.1, embedding_decay=0.3)
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
    for key, group in found.items():
        name = names[key]
        gain, outside = "norm" in name or name.endswith("bias"), "embed_tokens" in name or "lm_head" in name
        assert group["weight_decay"] == (0.0 if gain else 0.3 if outside or "score" in name else 0.1), name


@pytest.mark.parametrize("name", ["muon", "adamw", "lion", "sophia", "schedulefree"])
def test_saved_state_continues_bit_exactly(name, tmp_path):
    torch.manual_seed(0)
    model = Transformer(tiny(**MOE))

    def train(module, optimizer, steps):
        for step in steps:
            optim.set_lr(optimizer, 1 - step / 10)
            optim.to_gradient_point(optimizer)
            give_slopes(list(module.parameters()), step)
            if name == "sophia" and step % 2 == 0:
                optimizer.update_hessian(targets=10)
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
