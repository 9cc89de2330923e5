"""Log-probabilities and their gradients equal those of all logits.

    python -m pytest tests/test_logprobs.py
"""
import pytest
import torch
from conftest import BF16_SPEEDUP
from test_model import make_model, random_ids

import logprobs
from logprobs import token_logprobs


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
    monkeypatch.setattr(logprobs, "_pieces", lambda h, weight: [slice(i, i + pieces)
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
def test_a_gradient_of_the_gradient_is_refused(summed):
    h, weight = torch.randn(3, 4, requires_grad=True), torch.randn(9, 4)
    value = logprobs.head_logprobs(h, weight, torch.arange(3), summed).sum()
    found, = torch.autograd.grad(value.pow(2), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found.pow(2).sum().backward()


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("count, size", [(700, 3000), (9, 2**18 + 5)], ids=["rows in blocks", "a block a row"])
def test_pieces_and_blocks_of_their_real_sizes_give_all_rows(count, size, summed):
    draw = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(shape, 4, dtype=torch.float64, generator=draw).requires_grad_() for shape in (count, size))
    targets = torch.randint(size, (count,), generator=draw)
    expected = (h @ weight.T).log_softmax(-1)[torch.arange(count), targets]
    found = logprobs.head_logprobs(h, weight, targets, summed)
    torch.testing.assert_close(found, expected.sum() if summed else expected, atol=1e-9, rtol=0)
    for a, b in zip(*(torch.autograd.grad(value.sum(), (h, weight)) for value in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=0)
    sizes = [[len(block) for _, block in logprobs._blocks(part, (h @ weight.T)[part])]
             for part in logprobs._pieces(h, weight)]
    assert len(sizes) > 1 and len(sizes[0]) > 1 or size > 2**18 and set(sum(sizes, [])) == {1}


@pytest.mark.skipif(not BF16_SPEEDUP, reason="bf16 products crash on this CPU")
@pytest.mark.parametrize("summed", [False, True])
def test_rows_that_fill_up_a_shape_change_nothing(monkeypatch, summed):
    draw = torch.Generator().manual_seed(0)
    h, weight = (torch.randn(shape, 32, generator=draw).bfloat16() for shape in (1100, 900))
    targets, found = torch.randint(900, (1100,), generator=draw), []
    assert len(logprobs._rounded(h)) == 1152 and not logprobs._rounded(h)[1100:].any()
    for rounded in (logprobs._rounded, lambda h: h):
        monkeypatch.setattr(logprobs, "_rounded", rounded)
        inputs = h.clone().requires_grad_(), weight.clone().requires_grad_()
        value = logprobs.head_logprobs(*inputs, targets, summed)
        found.append((value, *torch.autograd.grad(value.sum(), inputs)))
    for a, b in zip(*found, strict=True):  # another shape may add up in another order
        torch.testing.assert_close(a, b, atol=1e-2, rtol=2**-7)
    assert [g.shape for g in found[0][1:]] == [h.shape, weight.shape]


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
