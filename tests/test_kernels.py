"""Proves that gradients made by hand are those of torch's own functions.

    python -m pytest tests/test_kernels.py
"""
import pytest
import torch
import torch.nn.functional as F
from conftest import BF16_SPEEDUP

import kernels
from configuration import ModelConfig
from model import Transformer

needs_bf16 = pytest.mark.skipif(not BF16_SPEEDUP, reason="bf16 products crash on this CPU")


def draw(*shape, dtype=torch.float64):
    """Random numbers that want a gradient, [B,H,T,C] as the projections leave them: [B,T,H,C] in memory."""
    x = torch.randn(shape).to(dtype)
    return (x.transpose(1, 2).contiguous().transpose(1, 2) if len(shape) == 4 else x).requires_grad_()


def documents_mask(rows, tokens, dtype):
    """[B,1,T,T]: every row holds three documents of its own lengths."""
    numbers = torch.randint(0, 3, (rows, tokens)).sort(1).values
    same = (numbers[:, None, :, None] == numbers[:, None, None, :]) & torch.ones(tokens, tokens).bool().tril()
    return torch.zeros(same.shape, dtype=dtype).masked_fill_(~same, float("-inf"))


def reference(q, k, v, mask):
    """torch's attention."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)


@pytest.mark.parametrize("eps", [1e-6, 0.5])
def test_norm_and_its_gradients_are_torchs(eps):
    x, weight, grad = draw(3, 5, 16), draw(16), torch.randn(3, 5, 16, dtype=torch.float64)
    ours, theirs = kernels.rms_norm(x, weight, eps), F.rms_norm(x, (16,), weight, eps)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(theirs, (x, weight), grad),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(kernels.rms_norm(x, weight, eps), ours), "the same bits without a gradient"


# tokens at a time: all, 16 and then 2, 128, 1
@pytest.mark.parametrize("shape", [(2, 7, 3, 8), (32, 50, 4, 64), (1, 300, 16, 64), (1100, 3, 2, 64)], ids=str)
@pytest.mark.parametrize("positions", ["shared", "of each row"])
def test_normalised_and_rotated_is_torchs_norm_and_rotate(shape, positions):
    b, t, h, c = shape
    torch.manual_seed(0)
    slab = torch.randn(b, t, h + 1, c, dtype=torch.float64)  # x as one of several projections that lie side by side
    x, weight, grad = slab[:, :, 1:].requires_grad_(), draw(c), torch.randn(shape, dtype=torch.float64)
    angles = torch.randn(1 if positions == "shared" else b, t, 1, c // 2, dtype=torch.float64)
    cos, sin = torch.cat((angles.cos(),) * 2, -1), torch.cat((-angles.sin(), angles.sin()), -1)
    theirs = kernels.rotate(F.rms_norm(x, (c,), weight, 1e-2), cos, sin)
    ours = kernels.norm_rotate(x, weight, 1e-2, cos, sin)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(theirs, (x, weight), grad),
                    strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert torch.equal(kernels.norm_rotate(x, weight, 1e-2, cos, sin), ours), "the same bits without a gradient"


def test_bf16_numbers_are_normalised_and_rotated_in_fp32():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 9, 3, 16).bfloat16().requires_grad_(), draw(16, dtype=torch.float32)
    angles = torch.randn(1, 9, 1, 8).repeat(1, 1, 1, 2)
    cos, sin = angles.cos(), torch.cat((-angles[..., :8].sin(), angles[..., :8].sin()), -1)
    ours = kernels.norm_rotate(x, weight, 1e-6, cos, sin)
    exact = kernels.rotate(F.rms_norm(x.double(), (16,), weight.double(), 1e-6), cos.double(), sin.double())
    grad = torch.randn_like(ours)
    found = torch.autograd.grad(ours, (x, weight), grad)
    wanted = torch.autograd.grad(exact, (x, weight), grad.double())
    assert ours.dtype == found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
    # rounded once, at the end: half a unit of bf16's 8 bits, and what fp32 loses
    torch.testing.assert_close(ours.double(), exact, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(found[0].double(), wanted[0].double(), rtol=2**-7, atol=1e-5)
    torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("shape", [(2, 4, 2, 7, 8), (3, 4, 4, 128, 8), (2, 6, 2, 300, 4), (40, 4, 1, 150, 4)], ids=str)
def test_gradients_of_attention_are_torchs(shape, packed):
    """In float64, so the formula is exact or wrong. The last shapes go in several blocks and in two pieces of rows."""
    b, h, k, t, c = shape
    torch.manual_seed(0)
    q, keys, values = draw(b, h, t, c), draw(b, k, t, c), draw(b, k, t, c)
    mask = documents_mask(b, t, torch.float64) if packed else None
    grad = torch.randn(b, h, t, c, dtype=torch.float64)
    ours, theirs = kernels._CausalAttention.apply(q, keys, values, mask), reference(q, keys, values, mask)
    assert torch.equal(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, (q, keys, values), grad),
                    torch.autograd.grad(theirs, (q, keys, values), grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@needs_bf16
@pytest.mark.parametrize("packed", [False, True], ids=["causal", "documents"])
def test_gradients_of_attention_in_bf16_are_as_exact_as_torchs(packed):
    torch.manual_seed(0)
    narrow = [draw(2, 4, 200, 32, dtype=torch.bfloat16), *(draw(2, 2, 200, 32, dtype=torch.bfloat16) for _ in "kv")]
    wide = [x.detach().double().requires_grad_() for x in narrow]
    grad = torch.randn(2, 4, 200, 32).bfloat16()
    mask = documents_mask(2, 200, torch.float32) if packed else None
    ours = kernels.attention(*narrow, mask, causal=True)
    assert "CausalAttention" in type(ours.grad_fn).__name__
    found = torch.autograd.grad(ours, narrow, grad)
    theirs = torch.autograd.grad(reference(*narrow, mask if mask is None else mask.bfloat16()), narrow, grad)
    exact = torch.autograd.grad(reference(*wide, mask if mask is None else mask.double()), wide, grad.double())
    for ours, other, right in zip(found, theirs, exact, strict=True):
        errors = [((x.double() - right).norm() / right.norm()).item() for x in (ours, other)]
        assert errors[0] < max(0.01, 2 * errors[1])


@needs_bf16
def test_what_the_kernel_is_not_made_for_goes_through_torch():
    q, k, v = (draw(1, 2, 9, 8, dtype=torch.bfloat16) for _ in "qkv")
    ahead = torch.zeros(1, 1, 9, 9).bfloat16()  # every token sees every other one
    out = kernels.attention(q, k, v, ahead, causal=False)
    assert "CausalAttention" not in type(out.grad_fn).__name__
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    wide = kernels.attention(q.float(), k.float(), v.float())
    assert "CausalAttention" not in type(wide.grad_fn).__name__


@needs_bf16
@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "moe"])
def test_a_model_under_autocast_learns_what_it_learns_in_fp32(experts):
    """bf16 gradients of every parameter point where those of fp32 do, packed documents included."""
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, intermediate_size=64, num_experts=experts,
                         moe_intermediate_size=32)
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():  # output projections begin at zero: nothing would pass through them
            p.add_(torch.randn_like(p) * 0.1)
    ids = torch.randint(64, (2, 160))
    documents = torch.randint(0, 2, (2, 160)).sort(1).values
    def gradients(forward, narrow):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
            total = forward(ids, documents=documents, target_mask=torch.ones_like(ids), sum_targets=True)
        (total / ids.numel()).backward()
        return {name: p.grad.flatten() for name, p in model.named_parameters() if p.grad is not None}

    exact, narrow = gradients(model, False), gradients(model, True)
    for name in exact:
        likeness = F.cosine_similarity(exact[name], narrow[name], dim=0)
        assert likeness > (0.97 if experts else 0.995), f"{name}: {likeness}"
    if not experts:  # the same when torch.compile has taken the model apart; without its compiler, which takes seconds
        torch._dynamo.reset()
        compiled = gradients(torch.compile(model, backend="aot_eager"), True)
        for name in exact:
            likeness = F.cosine_similarity(exact[name], compiled[name], dim=0)
            assert likeness > 0.995, f"{name}, compiled: {likeness}"


def test_the_operation_is_what_it_tells_the_compiler():
    q, k, v, grad = draw(2, 4, 9, 8), draw(2, 2, 9, 8), draw(2, 2, 9, 8), torch.randn(2, 4, 9, 8).double()
    inputs = [x.detach() for x in (q, k, v)]
    for mask in (None, documents_mask(2, 9, torch.float64)):
        torch.library.opcheck(kernels.attention_gradient, (*inputs, mask, grad))
