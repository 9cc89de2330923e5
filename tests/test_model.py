"""The model equals itself on every path (packed, padded, masked, recomputed), and its layers equal their definitions.

    python -m pytest tests/test_model.py
"""
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import BF16_SPEEDUP

from configuration import ModelConfig
from kernels import rotate
from logprobs import token_logprobs
from lora import LoRALinear
from model import MLP, MoE, RMSNorm, Rotary, ScalarHead, Transformer, project

SHAPE = dict(vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
             head_dim=16, intermediate_size=80, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
             pad_token_id=3)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40)
KINDS = {
    "dense": {}, "untied": dict(tie_word_embeddings=False), "geglu": dict(hidden_act="gelu"),
    "yarn": dict(rope_scaling=YARN), "yarn_given_factor": dict(rope_scaling=YARN | {"attention_factor": 1.3,
                                                                                   "truncate": False}),
    "moe": EXPERTS, "moe_top1_dense_first": EXPERTS | dict(num_experts_per_tok=1, first_k_dense_replace=1),
    "shared": EXPERTS | dict(n_shared_experts=1),
    "shared_scaled": EXPERTS | dict(n_shared_experts=2, routed_scaling_factor=2.5, first_k_dense_replace=1,
                                    rope_scaling=YARN),
}  # fmt: skip


@torch.no_grad()
def randomize(module, scale=0.08):
    """Random weights everywhere: at its own initialisation a model's blocks are the identity, which tests nothing."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.normal_(0.0 if parameter.ndim > 1 else 1.0, scale, generator=generator)
    for name, buffer in module.named_buffers():
        if "correction_bias" in name:
            buffer.uniform_(-0.1, 0.1, generator=generator)
    return module


def make_model(kind="dense", dtype=torch.float32, **fields):
    return randomize(Transformer(ModelConfig(**(SHAPE | KINDS[kind] | fields)))).to(dtype).eval()


def random_ids(*shape, seed=0):
    return torch.randint(4, 97, shape, generator=torch.Generator().manual_seed(seed))


def answers(model, prompts, max_new_tokens, **options):
    out = [[] for _ in prompts]
    for row, token in model.generate(prompts, max_new_tokens, **options):
        out[row].append(token)
    return out


# -- Equal to itself on every path -------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["dense", "moe", "shared"])
def test_changing_a_future_token_leaves_past_logits(kind):
    model, ids = make_model(kind), random_ids(2, 16)
    changed = ids.clone()
    changed[:, 9:] = random_ids(2, 7, seed=1)
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], atol=1e-6, rtol=0)
    assert (before[:, 9:] - after[:, 9:]).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_padding_does_not_change_logits(kind):
    model, ids = make_model(kind, torch.float64), random_ids(1, 9)
    padded = F.pad(ids, (0, 6), value=3)
    torch.testing.assert_close(model(padded)[:, :9], model(ids), atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_packed_documents_equal_separate_rows(kind):
    model, lengths = make_model(kind, torch.float64), [5, 1, 8]
    parts = [random_ids(1, n, seed=n) for n in lengths]
    documents = torch.tensor([[0] * 5 + [1] + [2] * 8 + [-1] * 3])  # -1: padding
    packed = F.pad(torch.cat(parts, 1), (0, 3), value=3)
    logits = model(packed, documents=documents)[:, :14]
    torch.testing.assert_close(logits, torch.cat([model(p) for p in parts], 1), atol=1e-9, rtol=0)
    restarted = torch.cat([torch.arange(n) for n in [*lengths, 3]])[None]  # RoPE sees differences only
    torch.testing.assert_close(model(packed, positions=restarted, documents=documents)[:, :14], logits, atol=1e-9,
                               rtol=0)


def test_gradient_checkpointing_and_compile_leave_gradients_as_they_are():
    ids, results = random_ids(2, 12), {}
    for name in ("plain", "checkpointed", "compiled"):
        model = make_model(dtype=torch.float64).train()
        model.gradient_checkpointing = name == "checkpointed"
        # backend "eager" checks what is ours, that the forward is one graph, without waiting for a C++ compiler
        forward = torch.compile(model, backend="eager", fullgraph=True) if name == "compiled" else model
        (-token_logprobs(forward(ids), ids).mean()).backward()
        results[name] = [p.grad for p in model.parameters()]
    for name in ("checkpointed", "compiled"):
        for one, other in zip(results[name], results["plain"], strict=True):
            torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_logits_to_keep_and_hidden_states_are_views_of_one_forward():
    model, ids = make_model(), random_ids(2, 9)
    logits = model(ids)
    torch.testing.assert_close(model(ids, logits_to_keep=2), logits[:, -2:], atol=1e-6, rtol=0)
    torch.testing.assert_close(model.lm_head(model.hidden_states(ids)), logits)


@pytest.mark.parametrize("kind", ["dense", "moe", "shared"])
def test_a_mask_replaces_the_causal_rule_and_only_wanted_states_are_returned(kind):
    model, ids = make_model(kind, torch.float64), random_ids(2, 9)
    states = model.hidden_states(ids)
    wanted, mask = torch.tensor([3, 12]), torch.ones(9, 9, dtype=torch.bool).tril()[None, None]
    found = model.hidden_states(ids, torch.arange(9)[None], mask=mask, wanted=wanted)
    torch.testing.assert_close(found, torch.stack((states[0, 3], states[1, 3]))[None], atol=1e-12, rtol=0)
    mask = mask & (torch.arange(9) != 4)  # nobody looks at place 4: as if it were not there, but for the positions
    mask[..., 4, 4] = True
    rest = torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])
    found = model.hidden_states(ids, torch.arange(9)[None], mask=mask)[:, rest]
    torch.testing.assert_close(found, model.hidden_states(ids[:, rest], rest[None]), atol=1e-12, rtol=0)


def test_dropout_acts_in_training_only():
    model, ids = make_model(dropout=0.5), random_ids(1, 8)
    assert torch.equal(model(ids), model(ids))
    greedy = answers(model, [[5, 6]], 8, temperature=0)
    model.train()
    assert not torch.equal(model(ids), model(ids))
    assert answers(model, [[5, 6]], 8, temperature=0) == greedy and model.training


def test_plain_mlp_trains_saves_and_is_refused_by_other_readers(tmp_path):
    model, ids = make_model(mlp_type="plain"), random_ids(2, 9)
    assert not any("gate_proj" in name for name, _ in model.named_parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(Transformer.from_pretrained(tmp_path)(ids), model(ids))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "minillm_plain"


def test_fresh_model_predicts_nothing_yet():
    torch.manual_seed(0)
    model = Transformer(ModelConfig.preset("tiny"))
    ids = torch.randint(0, 6400, (4, 64))
    h = model.model.embed_tokens(ids)
    torch.testing.assert_close(model.hidden_states(ids), model.model.norm(h))  # every block is the identity
    assert abs(-token_logprobs(model(ids), ids).mean().item() - math.log(6400)) < 0.1


def test_flops_count_visited_weights_only():
    dense, moe = (Transformer(ModelConfig(**(SHAPE | KINDS[kind]))) for kind in ("dense", "moe"))
    attention = 48 * 96 + 2 * 48 * 32 + 96 * 48  # q, k and v, o
    head, scores = 97 * 48, 12 * 3 * 96 * 10
    assert dense.flops_per_token(10) == 6 * (head + 3 * (attention + 3 * 48 * 80)) + scores
    assert moe.flops_per_token(10) == 6 * (head + 3 * (attention + 48 * 4 + 2 * 3 * 48 * 40)) + scores


# -- Norm and rotation -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(5, 8), (2, 3, 8), (2, 3, 2, 8)], ids=str)
def test_norm_and_its_gradients_equal_torchs(shape):
    norm, draw = RMSNorm(8, 1e-3).double(), torch.Generator().manual_seed(0)
    norm.weight.data = torch.rand(8, generator=draw, dtype=torch.float64)
    x = torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(shape, generator=draw, dtype=torch.float64)
    found, expected = norm(x), F.rms_norm(x, (8,), norm.weight, 1e-3)
    torch.testing.assert_close(found, expected, atol=1e-14, rtol=0)
    wanted = (x, norm.weight)
    torch.testing.assert_close(torch.autograd.grad(found, wanted, grad), torch.autograd.grad(expected, wanted, grad),
                               atol=1e-13, rtol=0)
    norm.weight.requires_grad_(False)
    norm(x).backward(grad)
    assert norm.weight.grad is None and x.grad.any()


def test_rotation_multiplies_pairs_by_complex_numbers():
    rotary = Rotary(ModelConfig(**SHAPE))
    x, size = torch.randn(2, 7, 3, rotary.config.head_dim, dtype=torch.float64), rotary.config.head_dim
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4, 300]])
    found = rotate(x, *rotary(positions, torch.float64))
    angle = positions[:, :, None, None] / rotary.config.rope_theta ** (torch.arange(0, size, 2).double() / size)
    pairs = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)
    # frequencies are fp32: at position 300 that is 1e-5 of an angle
    torch.testing.assert_close(found, torch.cat((pairs.real, pairs.imag), -1), atol=1e-4, rtol=0)


def test_bf16_model_keeps_exact_angles_at_far_positions():
    exact, rounded = make_model().model.rotary, make_model(dtype=torch.bfloat16).model.rotary
    positions = torch.tensor([[0, 1000, 100_000]])
    for one, other in zip(exact(positions, torch.float32), rounded(positions, torch.float32), strict=True):
        assert torch.equal(one, other)


def test_yarn_goes_far_beyond_the_trained_length():
    """Trained on 32 positions, stretched 4 times: logits stay finite, and as spread as within the trained length."""
    model, ids = make_model("yarn", max_position_embeddings=256), random_ids(1, 256)
    with torch.no_grad():
        spread = model(ids)[0].std(-1)  # [T]
    assert spread.isfinite().all() and 0.5 < spread[32:].mean() / spread[:32].mean() < 2
    assert len(answers(model, [ids[0, :200].tolist()], 50, temperature=0)[0]) == 50


# -- Experts -----------------------------------------------------------------------------------------------------------
def test_one_expert_equals_the_dense_mlp():
    config = ModelConfig(**(SHAPE | dict(num_experts=1, num_experts_per_tok=1, norm_topk_prob=True)))
    moe, x = randomize(MoE(config)), torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(1))
    mlp = MLP(config)
    mlp.load_state_dict(moe.experts[0].state_dict())
    torch.testing.assert_close(moe(x)[0], mlp(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["moe", "shared"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unused_expert_has_a_zero_gradient_not_none(kind, dtype):
    if dtype == torch.bfloat16 and not BF16_SPEEDUP:
        pytest.skip("bf16 products crash on this machine")
    model = make_model(kind, num_experts_per_tok=1).train()  # 2 tokens visit at most 2 of 4 experts
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits, balance = model(random_ids(1, 2), return_balance=True)
    (logits.float().logsumexp(-1).sum() + balance.sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if ".experts." in name}
    assert all(g is not None for g in gradients.values())
    assert any(not g.any() for g in gradients.values()) and any(g.any() for g in gradients.values())


def test_router_learns_from_the_loss_with_one_and_with_two_experts_a_token():
    for count in (1, 2):
        model = make_model("moe", num_experts_per_tok=count)
        assert model.config.norm_topk_prob == (count > 1)
        (-token_logprobs(model(random_ids(2, 9)), random_ids(2, 9)).mean()).backward()
        assert all(layer.mlp.gate.weight.grad.abs().max() > 1e-8 for layer in model.model.layers)


@pytest.mark.skipif(not BF16_SPEEDUP, reason="bf16 products crash on this CPU")
def test_projections_in_one_product_are_those_of_their_layers():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 32).bfloat16().requires_grad_()
    layers = [torch.nn.Linear(32, size, bias=False) for size in (24, 8, 8)]
    grads = [torch.randn(3, 5, layer.out_features).bfloat16() for layer in layers]
    wanted = [x, *(layer.weight for layer in layers)]
    with torch.autocast("cpu", torch.bfloat16):
        joined, alone = project(x, *layers), [layer(x) for layer in layers]
        with torch.no_grad():
            past = project(x, *layers)
        adapted = project(x, LoRALinear(layers[0], 2, 4), *layers[1:])
    exact = [x.double() @ layer.weight.double().T for layer in layers]
    for found in (joined, alone, past, adapted):  # an adapter begins with zeros
        for y, witness in zip(found, exact, strict=True):
            torch.testing.assert_close(y.double(), witness, rtol=0.02, atol=0.02)
    assert "Split" in type(joined[0].grad_fn).__name__ and "Split" not in type(adapted[1].grad_fn).__name__
    witnesses = torch.autograd.grad(exact, wanted, [grad.double() for grad in grads])
    for grad, witness in zip(torch.autograd.grad(joined, wanted, grads), witnesses, strict=True):
        torch.testing.assert_close(grad.double(), witness.double(), rtol=0.03, atol=0.1)


def test_balance_loss_equals_transformers_formula(transformers):
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    model, ids = make_model("moe", num_hidden_layers=1), random_ids(2, 20)
    hooked = []
    model.model.layers[0].mlp.gate.register_forward_hook(lambda _, inputs, out: hooked.append(inputs[0]))
    _, balance = model(ids, return_balance=True)
    for row in range(2):  # theirs pools a batch, ours is per row
        logits = hooked[0].view(2, 20, -1)[row] @ model.model.layers[0].mlp.gate.weight.t()
        expected = load_balancing_loss_func((logits,), num_experts=4, top_k=2)
        assert abs(balance[row] - expected) < 1e-5


def test_balance_is_per_row_and_ignores_padding():
    model, ids = make_model("moe", torch.float64), random_ids(2, 8)
    padded = F.pad(ids, (0, 4), value=3)
    mask = torch.arange(12).expand(2, 12) < 8
    _, alone = model(ids[:1], return_balance=True)
    _, both = model(padded, token_mask=mask, return_balance=True)
    _, empty = model(ids, token_mask=torch.zeros(2, 8, dtype=torch.bool), return_balance=True)
    torch.testing.assert_close(both[:1], alone, atol=1e-12, rtol=0)
    assert both.shape == (2,) and 2 <= both.min() and both.max() <= 8 and not empty.any()
    assert not make_model()(ids, return_balance=True)[1].any()


def test_router_bias_moves_towards_idle_experts():
    model, ids = make_model("shared").train(), random_ids(4, 16)
    assert model.update_router_bias(0.1) is None  # nothing counted yet
    mask = torch.arange(16).expand(4, 16) < 10
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):  # two micro-batches
        _, balance = model(ids, token_mask=mask, return_balance=True)
    assert not balance.any()
    with torch.no_grad():
        model(ids)  # an evaluation does not count
    counts = model.update_router_bias(0.1, reduce=lambda x: x.mul_(2))
    assert counts.shape == (3, 4) and counts.sum() == 2 * 2 * 3 * 4 * 10 * 2  # ranks, micro-batches, L, rows, real, k
    for layer in range(3):
        name = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        moved = model.state_dict()[name] - before[name]
        torch.testing.assert_close(moved, 0.1 * torch.sign(counts[layer].mean() - counts[layer]))
    assert model.update_router_bias(0.1) is None and make_model("moe").update_router_bias(0.1) is None


def test_bias_balancing_evens_out_the_load():
    model, ids = make_model("shared").train(), random_ids(8, 32)
    spread = []
    for _ in range(60):
        model(ids)
        counts = model.update_router_bias(0.02)
        spread.append((counts.max() / counts.mean()).item())
    assert spread[-1] < 1.2 < spread[0]


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_lower_blocks_train_as_a_smaller_model_and_the_others_join_as_the_identity(kind):
    ids = random_ids(4, 16)
    grown = Transformer(ModelConfig(**(SHAPE | KINDS[kind] | {"num_hidden_layers": 4}))).double()
    small = Transformer(ModelConfig(**(SHAPE | KINDS[kind] | {"num_hidden_layers": 2}))).double()
    small.load_state_dict({key: value for key, value in grown.state_dict().items() if key in small.state_dict()})
    grown.model.depth = 2
    for model in (grown, small):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(3):
            logits, balance = model(ids, return_balance=True)
            (-token_logprobs(logits, ids).mean() + balance.mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update_router_bias(0.1)
    assert torch.equal(grown(ids), small(ids)) and not torch.equal(logits, small(ids))
    grown.model.depth = None
    assert torch.equal(grown(ids), small(ids))
    token_logprobs(grown(ids), ids).sum().backward()
    assert all(block.self_attn.o_proj.weight.grad.any() for block in grown.model.layers), "and now they learn"


# -- Score head --------------------------------------------------------------------------------------------------------
def test_score_is_the_value_at_the_last_real_token():
    head, ids = randomize(ScalarHead(ModelConfig(**SHAPE))).eval(), random_ids(3, 10)
    lengths = torch.tensor([10, 4, 7])
    values, scores = head.values(ids), head(ids, lengths)
    assert values.shape == (3, 10) and scores.tolist() == [values[0, 9], values[1, 3], values[2, 6]]
    changed = ids.clone()
    changed[1, 4:] = 3
    torch.testing.assert_close(head(changed, lengths), scores)


def test_scores_under_autocast_are_not_rounded_to_its_dtype():
    head, ids = randomize(ScalarHead(ModelConfig(**SHAPE))).eval(), random_ids(3, 10)
    with torch.autocast("cpu", torch.bfloat16):
        values = head.values(ids)
    assert values.dtype == torch.float32 and not torch.equal(values, values.bfloat16().float())
    torch.testing.assert_close(values, head.values(ids), rtol=0, atol=0.05 * head.values(ids).abs().max().item())


@pytest.mark.parametrize("kind", ["dense", "untied"])
def test_score_head_starts_from_a_language_model(tmp_path, kind):
    model, ids = make_model(kind), random_ids(2, 6)
    model.save_pretrained(tmp_path)
    head = ScalarHead.from_pretrained(tmp_path)
    torch.testing.assert_close(head.model(ids)[0], model.hidden_states(ids))
    assert 0 < head.score.weight.std() < 0.1


def test_score_head_refuses_what_no_class_can_store(tmp_path):
    with pytest.raises(ValueError, match="n_shared_experts=1 .*; .*n_shared_experts 0"):
        ScalarHead(ModelConfig(**(SHAPE | KINDS["shared"])))
    for fields in (dict(pad_token_id=None), dict(mlp_type="plain")):
        with pytest.raises(ValueError, match=list(fields)[0]):
            ScalarHead(ModelConfig(**(SHAPE | fields))).save_pretrained(tmp_path)
