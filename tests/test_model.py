"""The model equals itself on every path (cached, ragged, packed, padded), and names bad input.

    python -m pytest tests/test_model.py
"""
import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import BF16_SPEEDUP
from safetensors.torch import load_file, save_file

import model as model_file
from model import (
    MLP,
    KVCache,
    ModelConfig,
    MoE,
    RMSNorm,
    Rotary,
    ScalarHead,
    SkipInit,
    Transformer,
    fill_holes,
    rotate,
    sample,
    token_logprobs,
)

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


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="the oracle, transformers, is not installed")


# -- Shapes and configuration ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, count", [("nano", 1_672_832), ("tiny", 6_361_088), ("small", 25_830_912),
                                         ("base", 104_034_048), ("moe", 145_031_040)])
def test_preset_sizes_are_pinned(name, count):
    with torch.device("meta"), SkipInit():
        assert Transformer(ModelConfig.preset(name)).num_parameters() == count


def test_preset_at_another_width_gets_that_widths_mlp():
    config = ModelConfig.preset("tiny", hidden_size=128, dropout=None)
    assert (config.intermediate_size, config.head_dim, config.dropout) == (384, 32, 0.0)


def test_flops_count_visited_weights_only():
    dense, moe = (Transformer(ModelConfig(**(SHAPE | KINDS[kind]))) for kind in ("dense", "moe"))
    attention = 48 * 96 + 2 * 48 * 32 + 96 * 48  # q, k and v, o
    head, scores = 97 * 48, 12 * 3 * 96 * 10
    assert dense.flops_per_token(10) == 6 * (head + 3 * (attention + 3 * 48 * 80)) + scores
    assert moe.flops_per_token(10) == 6 * (head + 3 * (attention + 48 * 4 + 2 * 3 * 48 * 40)) + scores


@pytest.mark.parametrize("fields", [
    dict(hidden_size=50, head_dim=None), dict(num_key_value_heads=4), dict(vocab_size=0), dict(hidden_size="48"),
    dict(num_hidden_layers=10**9), dict(head_dim=15), dict(hidden_act="relu"), dict(rms_norm_eps=math.nan),
    dict(num_experts=2, num_experts_per_tok=3), dict(n_shared_experts=1), dict(pad_token_id=97), dict(dropout=1.5),
    dict(rope_scaling={"rope_type": "linear", "factor": 2.0}), dict(tie_word_embeddings="yes"),
    dict(num_experts=1, num_experts_per_tok=1, n_shared_experts=1), dict(eos_token_id=[1, -1]), dict(mlp_type="moe"),
    dict(rope_scaling={"rope_type": "yarn", "factor": "4"}), dict(mlp_type="plain", **EXPERTS),
])  # fmt: skip
def test_bad_configuration_names_field_rule_and_fix(fields):
    with pytest.raises(ValueError, match=rf"(?s){list(fields)[0]}.*; .*; ") as error:
        ModelConfig(**(SHAPE | fields))
    assert error.value.args[0].count(";") >= 2


def test_unknown_preset_and_field_are_refused():
    for name, fields in (("huge", {}), ("tiny", {"hiden_size": 8})):
        with pytest.raises(ValueError, match="hiden_size|huge"):
            ModelConfig.preset(name, **fields)


# -- The folder (opened by transformers: test_ecosystem.py) ------------------------------------------------------------
def test_config_written_by_transformers_4_is_understood(tmp_path):
    model, ids = make_model("yarn", rope_theta=5e5), random_ids(1, 60)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rope_parameters", "dtype"):  # what 4.x does not write
        del config[key]
    config["rope_scaling"]["type"] = config["rope_scaling"].pop("rope_type")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(Transformer.from_pretrained(tmp_path)(ids), model(ids))


@pytest.mark.parametrize("change", [{"rope_theta": 5e5}, {"rope_scaling": YARN}])
def test_spellings_that_contradict_each_other_are_refused(change):
    raw = ModelConfig(**SHAPE).to_dict()
    assert ModelConfig.from_dict(raw) == ModelConfig(**SHAPE)
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*; rope_parameters beside it says .*; change both"):
        ModelConfig.from_dict(raw | change)


def test_config_holds_both_spellings():
    dense, moe, shared = (ModelConfig(**(SHAPE | KINDS[kind])).to_dict() for kind in ("yarn", "moe", "shared"))
    assert dense["rope_theta"] == dense["rope_parameters"]["rope_theta"] and "num_experts" not in dense
    assert dense["rope_scaling"]["factor"] == dense["rope_parameters"]["factor"] == 4.0
    assert moe["num_experts"] == moe["num_local_experts"] == 4 and moe["norm_topk_prob"] is True
    assert moe["decoder_sparse_step"] == 1 and moe["mlp_only_layers"] == []
    assert shared["n_routed_experts"] == 4 and shared["n_group"] == shared["topk_group"] == 1
    assert shared["first_k_dense_replace"] == 0 and "head_dim" in shared


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


def test_exported_float_type_is_written_to_the_config(tmp_path):
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (1, 2, 3)


# -- Equal to itself on every path -------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["dense", "yarn", "moe", "shared"])
@pytest.mark.parametrize("chunks", [[24], [1] * 24, [5, 1, 1, 10, 7]], ids=["one", "single", "mixed"])
def test_cached_logits_equal_full_forward(kind, chunks):
    model, ids = make_model(kind, torch.float64), random_ids(3, 24)
    cache, parts, start = model.new_cache(3, 24), [], 0
    for count in chunks:
        parts.append(model(ids[:, start : start + count], cache=cache))
        start += count
    torch.testing.assert_close(torch.cat(parts, 1), model(ids), atol=1e-9, rtol=0)


def test_cached_rows_of_different_lengths_equal_full_forward():
    model, ids = make_model(dtype=torch.float64), random_ids(3, 20)
    cache, lengths = model.new_cache(3, 20), [9, 4, 12]
    model(ids[:, :12], cache=cache)  # behind a row's length stands what will be overwritten
    cache.set_lengths(lengths)
    nexts = torch.stack([ids[row, n : n + 3] for row, n in enumerate(lengths)])
    logits = torch.cat([model(nexts[:, :2], cache=cache), model(nexts[:, 2:], cache=cache)], 1)
    for row, n in enumerate(lengths):
        full = model(ids[row : row + 1, : n + 3])[0, n:]
        torch.testing.assert_close(logits[row], full, atol=1e-9, rtol=0)


def test_cache_rows_can_be_kept_repeated_and_truncated():
    model, ids = make_model(dtype=torch.float64), random_ids(4, 10)
    token, full = random_ids(4, 1, seed=9), None
    for rows in ([0, 1, 3], [2, 0], [3, 3, 0, 1], [1, 0, 3, 2], [0, 3, 2]):
        cache = model.new_cache(4, 12)
        model(ids, cache=cache)
        cache.keep(rows)
        logits = model(token[: len(rows)], cache=cache)[:, 0]
        full = model(torch.cat([ids[rows], token[: len(rows)]], 1))[:, -1]
        torch.testing.assert_close(logits, full, atol=1e-9, rtol=0)
    cache = model.new_cache(1, 12)
    model(ids[:1], cache=cache)
    cache.truncate(6)
    cache.expand(4)
    logits = model(token, cache=cache)[:, 0]
    full = model(torch.cat([ids[:1, :6].expand(4, 6), token], 1))[:, -1]
    torch.testing.assert_close(logits, full, atol=1e-9, rtol=0)


def test_cache_overflow_is_an_error_not_a_wrong_answer():
    model, cache = make_model(), KVCache(ModelConfig(**SHAPE), batch=1, slots=4)
    model(random_ids(1, 3), cache=cache)
    with pytest.raises(ValueError, match="overflow: 3 [+] 2 tokens in 4 slots"):
        model(random_ids(1, 2), cache=cache)


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


def test_bf16_model_keeps_exact_angles_at_far_positions():
    exact, rounded = make_model().model.rotary, make_model(dtype=torch.bfloat16).model.rotary
    positions = torch.tensor([[0, 1000, 100_000]])
    for one, other in zip(exact(positions, torch.float32), rounded(positions, torch.float32), strict=True):
        assert torch.equal(one, other)


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


# -- Sampling and generation -------------------------------------------------------------------------------------------
def reference_distribution(logits, temperature, top_k, top_p):
    """The probabilities that sample() draws from, by its definition and slowly: one row, plain Python."""
    p = (logits.double() / temperature).softmax(-1)
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if 0 < top_k < len(p):
        order = order[:top_k]
    total, kept, mass = sum(p[i] for i in order), [], 0.0
    for i in order:
        kept.append(i)
        mass += p[i] / total
        if mass >= top_p:
            break
    out = torch.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.parametrize("temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 0, 0.8), (1.5, 7, 1.0), (1.0, 20, 0.6),
                                                       (1.0, 1000, 0.95), (1.0, 0, 0.01), (2.0, 1, 0.5)])
@pytest.mark.parametrize("size, spread", [(50, 2.0), (400, 0.5)], ids=["peaked", "flat"])  # flat: full-sort path
def test_samples_follow_the_reference_distribution(temperature, top_k, top_p, size, spread):
    logits = torch.randn(size, generator=torch.Generator().manual_seed(3)) * spread
    uniform = (torch.arange(20_000) + 0.5) / 20_000  # a grid: frequencies are exact to 1 / 20000, no luck involved
    ids = sample(logits.expand(20_000, size), temperature, top_k, top_p, uniform)
    frequency = torch.bincount(ids, minlength=size) / 20_000
    expected = reference_distribution(logits, temperature, top_k, top_p)
    assert (frequency - expected).abs().max() < 2e-4
    assert not frequency[expected == 0].any()


def test_sampling_edge_cases():
    logits = torch.tensor([[0.0, 3.0, 1.0, -math.inf], [2.0, 0.0, 1.0, -math.inf]])
    top = [1, 0]
    for options in ((0.0, 0, 1.0), (1.0, 1, 1.0), (1.0, 0, 0.0), (1e-4, 0, 1.0), (1e-38, 0, 1.0),
                    (1e-29, 0, 1.0)):
        for u in (0.0, 0.5, 1 - 2**-24):
            assert sample(logits, *options, torch.full((2,), u)).tolist() == top
    for top_k in (0, 4, 99):  # off
        last = sample(logits, 1.0, top_k, 1.0, torch.full((2,), 1 - 2**-24))
        assert last.tolist() == [2, 2], "an impossible id is never drawn, not even by rounding"
    first_is_impossible = torch.tensor([[-math.inf, 0.0]])
    assert sample(first_is_impossible, 1.0, 0, 1.0, torch.zeros(1)).tolist() == [1]


@pytest.mark.parametrize("temperature, top_k, top_p, min_p", [(1.0, 0, 1.0, 0.1), (0.7, 0, 0.8, 0.02),
                                                              (1.5, 7, 1.0, 0.3), (1.0, 20, 0.6, 0.5),
                                                              (1.0, 0, 1.0, 1.0)])
def test_min_p_keeps_what_transformers_keeps(transformers, temperature, top_k, top_p, min_p):
    logits = torch.randn(300, generator=torch.Generator().manual_seed(3)) * 2
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    ids = sample(logits.expand(20_000, -1), temperature, top_k, top_p, uniform, min_p)
    warpers = [transformers.TemperatureLogitsWarper(temperature), transformers.TopKLogitsWarper(top_k or 300),
               transformers.TopPLogitsWarper(top_p), transformers.MinPLogitsWarper(min_p)]
    scores = transformers.LogitsProcessorList(warpers)(None, logits[None])  # [1,V]
    frequency, expected = torch.bincount(ids, minlength=300) / 20_000, scores[0].softmax(-1)
    assert (frequency - expected).abs().max() < 2e-4 and not frequency[expected == 0].any()
    assert (expected > 0).sum() < 300


def test_top_p_beyond_the_first_ids_equals_a_full_sort():
    """64 and 512 of 3000 flat logits do not hold the mass: the search goes on."""
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[0.1], [1], [3], [9]])
    uniform, found = torch.rand(200, 4, generator=torch.Generator().manual_seed(1)), []
    p, order = logits.softmax(-1).sort(dim=-1, descending=True)
    for u in uniform:
        found.append(sample(logits, 1.0, 0, 0.9, u))
    for row in range(4):
        sums = p[row].double().cumsum(0)
        last = int((sums < 0.9).sum())
        index = torch.searchsorted(sums, uniform[:, row].double() * sums[last], right=True)
        same = torch.stack(found)[:, row] == order[row][index]
        assert same.float().mean() > 0.98  # a rounded sum may fall on the other side of a border


def test_random_streams_of_a_row_begin_alike_whatever_their_length():
    long, short = model_file.row_uniforms(3, [5, 8], 100), model_file.row_uniforms(3, [8], 7)
    assert torch.equal(long[1:, :7], short) and 0 <= long.min() and long.max() < 1


@pytest.mark.parametrize("kind", ["dense", "moe", "shared"])
@pytest.mark.parametrize("options", [dict(temperature=0.0), dict(temperature=0.8, top_k=10, top_p=0.9),
                                     dict(top_p=0.7, repetition_penalty=1.3, stop_ids=range(4, 30))],
                         ids=["greedy", "sampled", "stopping"])
def test_a_row_in_a_ragged_batch_equals_the_row_alone(kind, options):
    model = make_model(kind)
    prompts = [random_ids(n, seed=n).tolist() for n in (3, 17, 2, 30, 17, 3)]  # two prompts occur twice
    together = answers(model, prompts, 16, seed=4, **options)
    alone = [answers(model, [p], 16, seed=4, row_seeds=[row], **options)[0] for row, p in enumerate(prompts)]
    assert together == alone
    if "stop_ids" in options:
        assert len({len(a) for a in together}) > 1 and all(not set(a[:-1]) & set(range(4, 30)) for a in together)
    else:
        assert {len(a) for a in together} == {16}


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("max_batch", [1, 2, 3, 8, 16, 30])
def test_prompts_that_join_later_get_the_answers_they_get_alone(monkeypatch, kind, max_batch):
    model, prompts = make_model(kind), [random_ids(2 + n % 7, seed=n % 17).tolist() for n in range(24)]
    options = dict(stop_ids=range(4, 20), seed=1, repetition_penalty=1.2, min_new_tokens=2)
    alone = [answers(model, [p], 12, row_seeds=[row], **options)[0] for row, p in enumerate(prompts)]
    rows, forward = [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda ids, cache: rows.append(tuple(ids.shape)) or forward(
        ids, cache=cache))
    assert answers(model, prompts, 12, max_batch=max_batch, **options) == alone
    assert max(b for b, _ in rows) <= max_batch
    made = sum(map(len, alone))
    steps = [b for b, t in rows if t == 1]
    assert sum(steps) == made - len(prompts), "a row that has ended costs nothing"
    if max_batch == 8:  # prompts are read some at a time, and the batch stays full while any wait
        assert len(rows) - len(steps) <= 24 and sum(steps) / len(steps) > 5


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_no_stop_id_among_the_first_tokens(transformers, tmp_path, kind):
    model, stops = make_model(kind), [*range(4, 60)]
    short = answers(model, [[5, 9, 30], [8]], 14, temperature=0, stop_ids=stops)
    assert min(map(len, short)) < 6
    longer = answers(model, [[5, 9, 30], [8]], 14, temperature=0, stop_ids=stops, min_new_tokens=6)
    assert all(len(row) > 6 and not set(row[:6]) & set(stops) for row in longer)
    if kind == "dense":
        model.save_pretrained(tmp_path)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
        expected = theirs.generate(torch.tensor([[5, 9, 30]]), max_new_tokens=14, min_new_tokens=6, do_sample=False,
                                   temperature=None, top_p=None, eos_token_id=stops, pad_token_id=3,
                                   attention_mask=torch.ones(1, 3, dtype=torch.int64))
        assert longer[0] == expected[0, 3:].tolist()
    # ids that the model does not have are no reason to fail
    assert answers(model, [[8]], 3, temperature=0, stop_ids=[-1, 500], min_new_tokens=2)[0] == short[1][:1] + answers(
        model, [[8]], 3, temperature=0)[0][1:]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_turns_of_a_chat_read_only_what_is_new(monkeypatch, kind):
    model, prefix, text = make_model(kind, torch.float64), model_file.Prefix(), []
    read, forward = [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda ids, cache: read.append(ids.shape[1]) or forward(
        ids, cache=cache))
    for turn, question in enumerate(([5, 9, 30], [11, 12], [40] * 6)):
        text += question
        read.clear()
        found = answers(model, [text], 8, seed=turn, prefix=prefix)[0]
        # the last token of an answer was never fed back, so it is read with the next question
        assert read[0] == len(question) + (turn > 0) and set(read[1:]) == {1}
        assert found == answers(model, [text], 8, seed=turn)[0]
        assert prefix.ids == text + found[:-1]
        text += found
    read.clear()
    other = [*text[:7], 90, 91]  # an earlier turn was changed: what is before it stays
    stream = model.generate([other], 8, temperature=0, prefix=prefix)
    first = [next(stream)[1] for _ in range(3)]
    stream.close()  # a user stops the answer
    assert read[0] == 2 and first == answers(model, [other], 3, temperature=0)[0]
    assert answers(model, [other], 8, temperature=0, prefix=prefix) == answers(model, [other], 8, temperature=0)
    assert prefix.ids[: len(other)] == other
    with pytest.raises(ValueError, match="prefix with 2 prompts; .*; "):
        model.generate([[5], [6]], 3, prefix=prefix)


def test_yarn_goes_far_beyond_the_trained_length():
    """Trained on 32 positions, stretched 4 times: logits stay finite, and as spread as within the trained length."""
    model, ids = make_model("yarn", max_position_embeddings=256), random_ids(1, 256)
    with torch.no_grad():
        spread = model(ids)[0].std(-1)  # [T]
    assert spread.isfinite().all() and 0.5 < spread[32:].mean() / spread[:32].mean() < 2
    assert len(answers(model, [ids[0, :200].tolist()], 50, temperature=0)[0]) == 50


def test_many_rows_leaving_at_once_mix_nothing_up():
    model, prompts = make_model(), [random_ids(2 + n % 5, seed=n).tolist() for n in range(24)]
    options = dict(stop_ids=range(4, 50), seed=1)  # about every second token ends its row
    together = answers(model, prompts, 12, **options)
    assert together == [answers(model, [p], 12, row_seeds=[row], **options)[0] for row, p in enumerate(prompts)]
    order = fill_holes([1, 4, 6, 7, 9], 5)
    assert sorted(order) == [1, 4, 6, 7, 9] and order[1] == 1 and order[4] == 4, "kept rows stay, the tail fills holes"


def test_greedy_generation_equals_recomputing_the_whole_text():
    model, prompt = make_model(), [5, 9, 30]
    row, expected = list(prompt), []
    for _ in range(12):
        expected.append(model(torch.tensor([row]))[0, -1].argmax().item())
        row.append(expected[-1])
    assert answers(model, [prompt], 12, temperature=0) == [expected]


@pytest.mark.skipif(not BF16_SPEEDUP, reason="bf16 products crash on this machine")
@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_generation_under_autocast_uses_the_numbers_of_the_autocast_forward(kind):
    model, ids = make_model(kind), random_ids(2, 12)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        twin, _ = model.decoder()
        assert torch.equal(twin(ids), model(ids))
        assert twin.lm_head.weight.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.float32
        assert twin.model.embed_tokens.weight is model.model.embed_tokens.weight
        full = answers(model, ids.tolist(), 5, temperature=0)
    assert {len(a) for a in full} == {5}


def test_repetition_penalty_equals_transformers(transformers, tmp_path):
    model = make_model()
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for prompt in ([5, 9, 30], [8, 8, 8, 40]):
        expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=14, do_sample=False, temperature=None,
                                   top_p=None, repetition_penalty=1.7, eos_token_id=None, pad_token_id=3,
                                   attention_mask=torch.ones(1, len(prompt), dtype=torch.int64))
        ours = answers(model, [prompt], 14, temperature=0, repetition_penalty=1.7)
        assert ours == [expected[0, len(prompt):].tolist()]


def test_seeds_reproduce_and_rows_differ():
    model, prompts = make_model(), [[5, 6]] * 4
    first = answers(model, prompts, 12, seed=1)
    assert first == answers(model, prompts, 12, seed=1) != answers(model, prompts, 12, seed=2)
    assert len(set(map(tuple, first))) == 4, "equal prompts in one batch draw different answers"
    # the same sample in another place of another batch, as when two ranks share the work
    assert answers(model, prompts[:2], 12, seed=1, row_seeds=[2, 3]) == first[2:]


def test_generation_leaves_the_global_random_state_alone():
    torch.manual_seed(7)
    state = torch.get_rng_state()
    answers(make_model(), [[5, 6]], 4)
    model = make_model()
    torch.set_rng_state(state)
    answers(model, [[5, 6]], 4)
    assert torch.equal(torch.get_rng_state(), state)


def test_generation_streams_and_may_be_left_early():
    stream = make_model().generate([[5], [6]], 50, temperature=0)
    assert [next(stream)[0] for _ in range(4)] == [0, 1, 0, 1]  # row by row within a step
    stream.close()


def test_generation_edge_cases():
    model = make_model()
    assert answers(model, [[5, 6]], 0) == [[]] and list(model.generate([], 5)) == []
    assert answers(model, [[]], 5) == answers(model, [[1]], 5)  # an empty prompt begins with bos
    assert len(answers(model, [[5] * 120], 50)[0]) == 8  # prompt and answer fill the 128 positions
    stopped = answers(model, [[5]], 50, temperature=0)[0][2]
    assert answers(model, [[5]], 50, temperature=0, stop_ids={stopped})[0][-1] == stopped


@pytest.mark.parametrize("prompt, options, message", [
    ([5] * 128, {}, "128 tokens"), ([97], {}, "outside 0..96"), ([-1], {}, "outside"), ([5], {"top_p": 1.2}, "top_p"),
    ([5], {"temperature": -1}, "temperature"), ([5], {"top_k": -1}, "top_k"), ([5], {"row_seeds": [1, 2]}, "row_seeds"),
    ([5], {"repetition_penalty": 0}, "repetition_penalty"), ([5], {"temperature": math.nan}, "temperature"),
    ([5], {"min_p": 1.5}, "min_p"), ([5], {"min_new_tokens": -1}, "min_new_tokens"),
    ([5], {"max_batch": 0.5}, "max_batch"),
])  # fmt: skip
def test_bad_generation_arguments_are_named_at_the_call(prompt, options, message):
    with pytest.raises(ValueError, match=message):
        make_model().generate([prompt], 5, **options)


def test_empty_prompt_without_bos_is_refused():
    with pytest.raises(ValueError, match="no bos_token_id"):
        make_model(bos_token_id=None).generate([[]], 5)


def test_token_logprobs_equal_log_softmax_gathered():
    logits, ids = torch.randn(2, 7, 97, dtype=torch.float64), random_ids(2, 7)
    expected = logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(token_logprobs(logits, ids), expected, atol=1e-12, rtol=0)
    assert token_logprobs(logits.bfloat16(), ids).dtype == torch.float32
    assert token_logprobs(logits[:, :1], ids[:, :1]).shape == (2, 0)


@pytest.mark.parametrize("kind", ["dense", "untied"])
@pytest.mark.parametrize("pieces", [1, 5, 1000], ids=lambda rows: f"{rows} rows at a time")
def test_head_on_targets_only_equals_all_logits(monkeypatch, kind, pieces):
    """Values and gradients, of single log-probabilities with a factor each and of their sum."""
    monkeypatch.setattr(model_file, "_pieces", lambda h, weight: [slice(i, i + pieces)
                                                                  for i in range(0, len(h), pieces)])
    model = make_model(kind, torch.float64)
    ids, mask = random_ids(3, 11), torch.rand(3, 11, generator=torch.Generator().manual_seed(1)) < 0.4
    factors = torch.rand(3, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def gradients(value):
        return torch.autograd.grad(value, list(model.parameters()), allow_unused=True)

    expected = token_logprobs(model(ids), ids) * mask[:, 1:]
    found = model(ids, target_mask=mask)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradients((found * factors).sum()), gradients((expected * factors).sum()), atol=1e-12,
                               rtol=0)
    total = model(ids, target_mask=mask, sum_targets=True)
    torch.testing.assert_close(total, found.sum(), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradients(-0.3 * total), gradients(-0.3 * (token_logprobs(model(ids), ids)
                                                                         * mask[:, 1:]).sum()), atol=1e-12, rtol=0)
    with torch.no_grad():
        assert model(ids, target_mask=mask, sum_targets=True) == total


@pytest.mark.parametrize("summed", [False, True])
def test_frozen_head_gets_no_gradient_and_changes_none(summed):
    """Beside adapters, whose base is frozen."""
    model, ids, mask = make_model("untied", torch.float64), random_ids(2, 9), torch.ones(2, 9)
    found = []
    for learns in (True, False):
        model.zero_grad()
        model.lm_head.requires_grad_(learns)
        model(ids, target_mask=mask, sum_targets=summed).sum().backward()
        assert (model.lm_head.weight.grad is not None) == learns
        found.append(model.model.embed_tokens.weight.grad.clone())
    assert torch.equal(*found) and found[0].any()


def test_sum_of_no_target_is_zero_with_gradients_of_zero():
    model = make_model()
    model(random_ids(2, 5), target_mask=torch.zeros(2, 5), sum_targets=True).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# -- Score head --------------------------------------------------------------------------------------------------------
def test_score_is_the_value_at_the_last_real_token():
    head, ids = randomize(ScalarHead(ModelConfig(**SHAPE))).eval(), random_ids(3, 10)
    lengths = torch.tensor([10, 4, 7])
    values, scores = head.values(ids), head(ids, lengths)
    assert values.shape == (3, 10) and scores.tolist() == [values[0, 9], values[1, 3], values[2, 6]]
    changed = ids.clone()
    changed[1, 4:] = 3
    torch.testing.assert_close(head(changed, lengths), scores)


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


# -- Strict loading ----------------------------------------------------------------------------------------------------
def rename(**changes):
    def apply(tensors):
        return {changes.get("prefix", "") + k.removeprefix(changes.get("strip", "")): v for k, v in tensors.items()}
    return apply


@pytest.mark.parametrize("change, message", [
    (lambda t: t | {"score.weight": torch.zeros(1, 48)}, "reward model"),
    (rename(prefix="_orig_mod."), "torch.compile or DDP"), (rename(strip="model."), "lack 'model.'"),
    (lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.zeros(96)}, "biases"),
    (lambda t: t | {"model.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2, 2)}, "about experts"),
    (lambda t: {k: v for k, v in t.items() if "layers.2" not in k}, "num_hidden_layers"),
    (lambda t: t | {"model.norm.weight": torch.zeros(50)}, r"model.norm.weight .* \[50\]; .* \[48\]"),
    (lambda t: t | {"model.norm.weight": torch.zeros(48, dtype=torch.int8)}, "has type I8"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_named_with_the_likely_reason(tmp_path, change, message):
    make_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(change(tensors), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        Transformer.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_untied_config_with_tied_weights_says_so(tmp_path):
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="missing 1: lm_head.weight; .*tie_word_embeddings"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [
    "", "{", "[1, 2]", "[" * 100_000, '{"model_type": "llama"}', '{"model_type": ["qwen3"]}', '{"model_type": "qwen3"}',
    dict(hidden_size="big"), dict(num_hidden_layers=10**12), dict(rope_parameters=5), dict(layer_types=7),
    dict(attention_bias=True), dict(use_sliding_window=True), dict(quantization_config={"bits": 4}),
    dict(rope_parameters={"rope_type": "llama3", "factor": 8}), dict(vocab_size=[97]), dict(hidden_act=["silu"]),
    dict(layer_types=["sliding_attention"]), dict(rms_norm_eps=float("nan")), dict(mlp_only_layers=3),
    dict(eos_token_id="two"), dict(num_hidden_layers=-1), dict(hidden_size=96, intermediate_size=2**20),
])  # fmt: skip
def test_broken_config_is_a_clear_error(tmp_path, content):
    make_model().save_pretrained(tmp_path)
    if isinstance(content, dict):
        content = json.dumps(json.loads((tmp_path / "config.json").read_text()) | content)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=";"):
        Transformer.from_pretrained(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "huge_header", "noise"])
def test_damaged_weights_are_a_clear_error(tmp_path, damage):
    make_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes({"truncated": data[:-100], "empty": b"", "huge_header": b"\xff" * 8 + data[8:],
                      "noise": bytes(range(256)) * 10}[damage])
    with pytest.raises(ValueError, match="model.safetensors is not a readable"):
        Transformer.from_pretrained(tmp_path)


def test_missing_files_and_shards_outside_the_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist; "):
        Transformer.from_pretrained(tmp_path)
    make_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors does not exist; "):
        Transformer.from_pretrained(tmp_path)
    for names in ({"lm_head.weight": "../elsewhere.safetensors"}, {}, [1]):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
        with pytest.raises(ValueError, match="weight_map"):
            Transformer.from_pretrained(tmp_path)


def test_loading_leaves_the_global_random_state_alone(tmp_path):
    make_model().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    Transformer.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_model_with_other_weights_is_saved_as_one_of_its_own(model_folder, tmp_path, kind):
    model = Transformer.from_pretrained(model_folder(kind))
    weights = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    other = model.with_weights(weights)
    other.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path).state_dict()
    assert again.keys() == weights.keys() and all(torch.equal(again[name], weights[name]) for name in weights)
