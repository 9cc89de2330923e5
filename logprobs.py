"""Log-probabilities of tokens: from logits, or straight from the hidden states before the head.

token_logprobs() is the definition. head_logprobs() gives the same numbers and gradients without ever holding all
logits: for a small model they are the largest tensor of a training step. The idea of computing head and loss piece by
piece: Wijmans et al. 2024 (arXiv:2411.09009), Hsu et al. 2024 (arXiv:2410.10989).

What this file does not do: weights of tokens, means, losses (the training scripts, metrics.py).
Letters: B batch, T tokens, V vocabulary, D hidden size, N target tokens, n of them at a time.
"""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def token_logprobs(logits: Tensor, ids: Tensor) -> Tensor:
    """log p of each token given those before it: logits [B,T,V], ids [B,T] -> [B,T-1], entry t is log p(ids[:,t+1]).

    In fp32 at least, also under autocast: a bf16 log-probability has two digits.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = logits[:, :-1].to(wide)  # the last position scores a token that is not there
    return -F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(ids[:, 1:].shape)


def _pieces(h: Tensor, weight: Tensor) -> list[slice]:
    """Slices of the rows of h whose logits take 8 MB on a CPU, or 2^28 numbers on a GPU. Not of few rows, whatever the
    vocabulary: each piece reads the head and adds to its gradient, which would become the longer part."""
    if h.device.type == "cpu":
        rows = max(2**11, 2**23 // len(weight)) // h.element_size()
    else:
        rows = max(2**9, 2**28 // len(weight))
    return [slice(i, i + rows) for i in range(0, len(h), rows)]


def _rounded(h: Tensor) -> Tensor:
    """h [n,D] with rows of zeros below, to a multiple of 64. On a CPU a product in bf16 is a program of its own for
    each shape, made in milliseconds where it is new, and batches differ in their number of targets. Logits of such rows
    are 0, and they add nothing to a gradient."""
    return F.pad(h, (0, 0, 0, -len(h) % 64)) if h.dtype == torch.bfloat16 and h.device.type == "cpu" else h


def _blocks(part: slice, logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """(rows of h, their logits [n,V], a view) of a piece, 2^18 numbers at a time: several passes go over them in fp32,
    and on a CPU they stay in a core's own cache meanwhile. A compiler puts the passes together by itself."""
    in_cache = logits.device.type == "cpu" and not torch.compiler.is_compiling()
    first = part.start
    for block in logits.split(max(1, 2**18 // logits.shape[1]) if in_cache else len(logits)):
        yield slice(first, first + len(block)), block
        first += len(block)


class _HeadLogprobs(torch.autograd.Function):
    """token_logprobs(h @ weight.T) a few rows at a time, so that the logits [N,V] never exist as a whole.

    For a small model with a large vocabulary the logits are by far the largest tensor, and writing and reading them
    costs more than computing them: the backward pass computes each piece again instead of keeping it.
    """

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """h [N,D], weight [V,D], targets [N] -> log p(targets) [N], in fp32 at least."""
        wide = torch.promote_types(h.dtype, torch.float32)
        out, norm = h.new_empty(len(h), dtype=wide), h.new_empty(len(h), dtype=wide)
        for part in _pieces(h, weight):
            x = h[part]
            for rows, logits in _blocks(part, (_rounded(x) @ weight.T)[: len(x)]):
                logits = logits.to(wide)
                norm[rows] = logits.logsumexp(-1)
                out[rows] = logits.gather(1, targets[rows, None]).squeeze(1) - norm[rows]
        ctx.save_for_backward(h, weight, targets, norm)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """d log p / d logits = onehot - softmax."""
        h, weight, targets, norm = ctx.saved_tensors
        learns = ctx.needs_input_grad[1]  # not beside adapters: a frozen head's gradient is a third of the work
        grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(weight, dtype=norm.dtype) if learns else None
        for part in _pieces(h, weight):
            x, n = _rounded(h[part]), len(h[part])
            d = x @ weight.T  # [n,V], the logits, then their gradient
            for rows, block in _blocks(part, d[:n]):
                p = block.to(norm.dtype).sub_(norm[rows, None]).exp_()  # softmax
                block.copy_(p.mul_(-grad[rows, None]).scatter_add_(1, targets[rows, None], grad[rows, None]))
            grad_h[part] = (d @ weight)[:n]
            if learns:
                grad_weight += d.T @ x
        return grad_h, grad_weight.to(weight.dtype) if learns else None, None


class _HeadLogprobSum(torch.autograd.Function):
    """The sum of _HeadLogprobs. A sum gives every target the same factor, so the gradients for factor 1 can be made
    while the logits of a piece are at hand; the backward pass multiplies, and computes no logits again."""

    @staticmethod
    def forward(ctx, h: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """h [N,D], weight [V,D], targets [N] -> sum of log p(targets), in fp32 at least."""
        wide = torch.promote_types(h.dtype, torch.float32)
        total = h.new_zeros((), dtype=wide)
        learns = ctx.needs_input_grad[1]  # as in _HeadLogprobs: not beside adapters
        if any(ctx.needs_input_grad):
            grad_h, grad_weight = torch.empty_like(h), torch.zeros_like(weight, dtype=wide) if learns else None
            ctx.save_for_backward(grad_h, grad_weight)
        for part in _pieces(h, weight):
            x, n = _rounded(h[part]), len(h[part])
            d = x @ weight.T  # [n,V], the logits, then their gradient
            for rows, block in _blocks(part, d[:n]):
                index, p = targets[rows, None], block.to(wide)
                p -= p.amax(-1, keepdim=True)  # softmax does not change, and exp cannot overflow
                total += p.gather(1, index).sum()
                sums = p.exp_().sum(-1, keepdim=True)  # [n,1]
                total -= sums.log().sum()
                if any(ctx.needs_input_grad):  # onehot - softmax, in place
                    block.copy_(p.div_(-sums).scatter_add_(1, index, torch.ones_like(index, dtype=wide)))
            if any(ctx.needs_input_grad):
                grad_h[part] = (d @ weight)[:n]
                if learns:
                    grad_weight += d.T @ x
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """grad: the factor, a scalar."""
        grad_h, grad_weight = ctx.saved_tensors
        return *(None if g is None else (g * grad).to(grad_h.dtype) for g in (grad_h, grad_weight)), None


def head_logprobs(h: Tensor, weight: Tensor, targets: Tensor, summed: bool = False) -> Tensor:
    """log p of target tokens under the head: h [N,D], weight [V,D], targets int64 [N] -> [N], or with `summed` their
    sum, whose gradient is cheaper still. In fp32 at least."""
    return (_HeadLogprobSum if summed else _HeadLogprobs).apply(h, weight, targets)
