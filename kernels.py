"""RMSNorm, rotation and attention with gradients by hand, where on a CPU that is faster than what torch goes through.

    rms_norm()     torch puts its norm together of small operations, and autograd goes back through all of them
    norm_rotate()  nearly twenty passes over all queries and keys; here over pieces of them that stay in a core's cache
    attention()    torch's backward pass in bf16 takes longer than the one in fp32, although products of matrices are
                   several times faster in bf16: they are too small there

The numbers are those of torch's own functions, up to rounding; on other devices, and when compiled, these run.
What this file does not do: parameters, projections, angles, attention to a cache (model.py).

Letters: B batch, T tokens, D hidden size, H heads, K kv heads, C head_dim, N rows of a matrix, S keys that are seen.
"""
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


# -- Pieces that stay in the cache -------------------------------------------------------------------------------------
def _pieces(x: Tensor, dim: int, dtype: torch.dtype, count: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """(slice of dimension dim, `count` tensors of that piece's shape to write into), piece after piece of x. The memory
    is always the same, so that it stays in a core's cache: fresh memory for each took as long as no pieces at all."""
    length = x.shape[dim]
    row = x.numel() // max(1, length)
    step = max(1, min(length, 2**17 // max(1, row)))
    scratch = [x.new_empty(step * row, dtype=dtype) for _ in range(count)]
    for start in range(0, length, step):
        n = min(step, length - start)
        shape = (*x.shape[:dim], n, *x.shape[dim + 1 :])
        yield slice(start, start + n), [s[: n * row].view(shape) for s in scratch]


# -- RMSNorm -----------------------------------------------------------------------------------------------------------
def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension: x [...,D], weight [D] -> [...,D] in dtype (None: as
    x)."""
    dtype = dtype or x.dtype
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.rms_norm(x, weight.shape, weight, eps).to(dtype)
    if torch.is_grad_enabled():
        return _Norm.apply(x, weight, eps, dtype)
    # past autograd the same numbers, to the last bit: a policy's first step is measured against such a forward. In few
    # calls: a token alone is over sooner than its pieces would be cut
    return (x * _factor(x, eps)).mul_(weight).to(dtype)


def _factor(x: Tensor, eps: float) -> Tensor:
    """r = 1 / sqrt(mean(x^2) + eps): x [...,D] -> [...,1]."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()


class _Norm(torch.autograd.Function):
    """With r = 1 / sqrt(mean(x^2) + eps), y = r x w and its gradient dy:
        dw = sum over the rows of r dy x          dx = r dy w - r^3 x mean(dy w x)
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        """x [...,D], weight [D] -> [...,D]."""
        rows = x.reshape(-1, len(weight))  # [N,D]
        y, r = torch.empty_like(rows, dtype=dtype), torch.empty_like(rows[:, :1])  # r [N,1]
        for part, (scaled,) in _pieces(rows, 0, x.dtype, 1):
            piece = rows[part]
            r[part] = factor = _factor(piece, eps)
            y[part] = torch.mul(piece, factor, out=scaled).mul_(weight)
        ctx.save_for_backward(x, weight, r)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """grad [...,D]."""
        x, weight, r = ctx.saved_tensors
        x, grads = x.reshape(-1, len(weight)), grad.reshape(-1, len(weight))  # [N,D]
        grad_x, grad_weight, cubes = torch.empty_like(x), torch.zeros_like(weight), r**3 / len(weight)
        for part, (dy, products) in _pieces(x, 0, x.dtype, 2):
            piece, factor = x[part], r[part]
            torch.mul(dy.copy_(grads[part]), piece, out=products)
            # both sums as products of matrices, so that they read `products` once and write nothing of its size
            if ctx.needs_input_grad[1]:
                grad_weight += factor.view(-1) @ products
            mean = (products @ weight)[:, None].mul_(cubes[part])
            torch.addcmul(dy.mul_(weight).mul_(factor), piece, mean, value=-1, out=grad_x[part])
        return grad_x.view(grad.shape), grad_weight, None, None


# -- RMSNorm and rotation ----------------------------------------------------------------------------------------------
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (a, b) = (x[i], x[i + C/2]) of x [B,T,H,C] by its angle: (a cos - b sin, b cos + a sin). Pairs are
    halves apart, as in Qwen3 and Llama files, not neighbours as in the paper. cos, sin [1 or B,T,1,C] as
    model.Rotary makes them: sin is negative in the first half."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)  # rolled, (b, a) stands where (a, b) did


def norm_rotate(x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """rotate(rms_norm(x, weight, eps), cos, sin), computed in the dtype of weight and returned in that of x [B,T,H,C],
    which may be narrower; weight [C]."""
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return rotate(rms_norm(x.to(weight.dtype), weight, eps), cos, sin).to(x.dtype)
    if torch.is_grad_enabled():
        return _NormRotate.apply(x, weight, eps, cos, sin)
    wide = x.to(weight.dtype)  # the same numbers, as in rms_norm()
    return rotate(wide, *_gained(weight, cos, sin)).mul_(_factor(wide, eps)).to(x.dtype)


def _gained(weight: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Tables that turn and multiply by the weight in one: cos and sin as rotate() takes them. (The factor r of a norm
    does not change by a rotation.)"""
    return weight * cos, weight.roll(len(weight) // 2) * sin


def _of_each_head(x: Tensor, *tables: Tensor) -> list[Tensor]:
    """Tables [1 or B,T,1,C] as [1 or B,T,H,C], for x [B,T,H,C]: a product with these goes over memory in one line."""
    return [table.expand(-1, -1, x.shape[2], -1).contiguous() for table in tables]


def _swap(x: Tensor, out: Tensor) -> Tensor:
    """x.roll(C/2, -1), written to out."""
    a, b = x.chunk(2, -1)
    return torch.cat((b, a), -1, out=out)


class _NormRotate(torch.autograd.Function):
    """The gradient dy turned back is that of the normalised numbers; from there on as in _Norm."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
        """x [B,T,H,C], weight [C] -> [B,T,H,C]."""
        y, r = torch.empty_like(x), torch.empty_like(x[..., :1], dtype=weight.dtype)  # r [B,T,H,1]
        gained_cos, gained_sin = _of_each_head(x, *_gained(weight, cos, sin))
        for part, (wide, turned, swapped) in _pieces(x, 1, weight.dtype, 3):
            wide.copy_(x[:, part])
            r[:, part] = factor = _factor(wide, eps)
            torch.mul(wide, gained_cos[:, part], out=turned).addcmul_(_swap(wide, swapped), gained_sin[:, part])
            y[:, part] = turned.mul_(factor)
        ctx.save_for_backward(x, weight, r, cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """grad [B,T,H,C]."""
        x, weight, r, cos, sin = ctx.saved_tensors
        c = x.shape[-1]
        grad_x, grad_weight, cubes = torch.empty_like(x), torch.zeros_like(weight), r**3 / c
        # back: the cosines stay, and each sine belongs to the other of its pair
        cos, sin = _of_each_head(x, cos, sin.roll(c // 2, -1))
        for part, (wide, dy, turned, products) in _pieces(x, 1, weight.dtype, 4):
            factor = r[:, part]  # [B,t,H,1]
            wide.copy_(x[:, part])
            dy.copy_(grad[:, part])
            torch.mul(dy, cos[:, part], out=turned).addcmul_(_swap(dy, products), sin[:, part])
            torch.mul(turned, wide, out=products)
            if ctx.needs_input_grad[1]:
                grad_weight += factor.reshape(-1) @ products.view(-1, c)
            mean = (products.view(-1, c) @ weight).view(factor.shape).mul_(cubes[:, part])
            grad_x[:, part] = turned.mul_(weight).mul_(factor).addcmul_(wide, mean, value=-1)
        return grad_x, grad_weight, None, None, None


# -- Attention ---------------------------------------------------------------------------------------------------------
def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """softmax(q k' / sqrt(C) + mask) v of every head: q [B,H,T,C], k and v [B,K,T,C] -> [B,H,T,C].

    H/K query heads share a kv head. mask: [B,1,T,T] or [1,1,T,T], 0 or -inf, added to the scores. causal: no token
    looks ahead; a mask that is given as well already says so.
    """
    narrow = q.dtype == k.dtype == v.dtype == torch.bfloat16
    if narrow and causal and q.device.type == "cpu" and torch.is_grad_enabled():
        return _CausalAttention.apply(q, k, v, mask)
    return torchs_attention(q, k, v, mask, causal)


def torchs_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = True) -> Tensor:
    """attention() with torch's own gradient."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=True)


class _CausalAttention(torch.autograd.Function):
    """torch's forward pass, and attention_gradient() backward."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """As attention()."""
        ctx.save_for_backward(q, k, v, mask)
        return torchs_attention(q, k, v, mask)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """grad [B,H,T,C]."""
        return *attention_gradient(*ctx.saved_tensors, grad), None


# An operation of its own, so that torch.compile calls it as it is: what it makes of the loop takes twice as long
@torch.library.custom_op("minillm::attention_gradient", mutates_args=(),
                         schema="(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor grad) -> (Tensor, Tensor, Tensor)")
def attention_gradient(q, k, v, mask, grad):
    """Gradients of q, k and v [as attention()], given that of the result, grad [B,H,T,C].

    The probabilities P = softmax(S), S = q k' / sqrt(C) + mask, are made again, for a block of queries at a time. With
    dy for grad:   dv = P' dy   dP = dy v'   dS = P (dP - rowsum(P dP))   dq = dS k / sqrt(C)   dk = dS' q / sqrt(C)
    The queries of a kv head's H/K heads stand below each other in one matrix, so keys are never repeated. Products
    multiply by 1 / sqrt(C) themselves (alpha).
    """
    b, h, t, c = q.shape
    groups, scale, nothing = k.shape[1], c**-0.5, q.new_zeros(())
    if mask is not None:
        mask = mask.to(q.dtype).expand(b, 1, t, t)
    dq, dk, dv = _like_projections(q, k, v, mask, grad)
    block = 128  # queries; what lies behind a block's last token is left out of its products
    ahead = torch.full((block, block), float("-inf"), dtype=q.dtype).triu_(1)
    rows = max(1, 2**21 // (h * block * t))  # so many that the scores of a block fit a cache
    for part in (slice(i, i + rows) for i in range(0, b, rows)):
        keys, values = k[part].reshape(-1, t, c), v[part].reshape(-1, t, c)  # [n,T,C], n = rows * K
        dkeys, dvalues = torch.empty_like(keys), torch.empty_like(values)
        for start in reversed(range(0, t, block)):  # the last queries see all keys, so all gradients begin with theirs
            end = min(start + block, t)
            add = int(end < t)
            shape, flat = (-1, h, end - start, c), (len(keys), -1, c)
            queries = q[part, :, start:end].reshape(flat)  # [n,N,C], N = H/K * block
            dy = grad[part, :, start:end].reshape(flat)
            scores = torch.baddbmm(nothing, queries, keys[:, :end].mT, beta=0, alpha=scale)  # [n,N,S]
            heads = scores.view(-1, h, end - start, end)
            if mask is None:
                heads[..., start:] += ahead[: end - start, : end - start]
            else:
                heads += mask[part, :, start:end, :end]
            p = scores.softmax(-1)
            ds = torch._softmax_backward_data(dy @ values[:, :end].mT, p, -1, p.dtype)
            dq[part, :, start:end] = torch.baddbmm(nothing, ds, keys[:, :end], beta=0, alpha=scale).view(shape)
            dkeys[:, :end].baddbmm_(ds.mT, queries, beta=add, alpha=scale)
            dvalues[:, :end].baddbmm_(p.mT, dy, beta=add)
        dk[part], dv[part] = dkeys.view(-1, groups, t, c), dvalues.view(-1, groups, t, c)
    return dq, dk, dv


@attention_gradient.register_fake
def _like_projections(q, k, v, mask, grad):
    """Tensors like q, k and v, [B,T,...] in memory, as the projections before them write."""
    return tuple(torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in (q, k, v))
