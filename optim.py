"""Optimizers short enough to read: Muon for the 2D weights inside the blocks, AdamW for everything else, as one torch
Optimizer.

Muon replaces each momentum matrix by the nearest semi-orthogonal one, so that every direction of a weight learns at
the same speed. It only makes sense for matrices that map activations to activations: embeddings, heads, norms,
routers and scalar heads stay with AdamW.

Sources: K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (Newton-Schulz
coefficients); Liu et al. 2025, "Muon is scalable for LLM training" (arXiv:2502.16982); Loshchilov & Hutter 2019,
AdamW (arXiv:1711.05101).
"""

import torch

# quintic iteration x <- a x + b (x x^T) x + c (x x^T)^2 x; chosen by Jordan for the steepest slope at 0, which ends
# near +-0.3 of 1
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(g, steps=5, dtype=None):
    """Approximate U V^T of the singular value decomposition of each matrix by Newton-Schulz iterations.

    Args:
        g: [..., rows, columns].
        steps: iterations; five bring every singular value into about 0.7 to 1.2.
        dtype: dtype of the products; None = g's own. bfloat16 is enough (the iteration forgives rounding) where it is
            fast.
    Returns: tensor like g.
    """
    a, b, c = NEWTON_SCHULZ
    x = g.to(dtype or g.dtype)
    flipped = x.size(-2) > x.size(-1)
    x = x.mT if flipped else x  # the Gram matrix is then the smaller of the two
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values at most 1, as the iteration needs
    for _ in range(steps):
        gram = x @ x.mT  # [..., rows, rows]
        x = a * x + (b * gram + c * gram @ gram) @ x
    x = x.mT if flipped else x
    return x.to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer, chosen per group by group["algorithm"].

    Group keys: params, lr, algorithm "muon" (momentum, weight_decay) or "adamw" (betas, eps, weight_decay).
    """

    def __init__(self, groups, momentum=0.95, betas=(0.9, 0.95), eps=1e-8, ns_dtype=None):
        self.ns_dtype = ns_dtype
        super().__init__(groups, dict(lr=1e-3, weight_decay=0.0, algorithm="muon", momentum=momentum, betas=betas,
                                      eps=eps))

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient. `closure` is for the interface only and must be None."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["algorithm"] == "muon" else self._adamw)(params, group)

    def _muon(self, params, group):
        """v <- mu v + (1 - mu) g;  W <- W - lr * sqrt(max(1, rows/cols)) * orth(mu v + (1 - mu) g)   (Nesterov)."""
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        for shape, same in by_shape.items():
            updates = []
            for p in same:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"]
                momentum.lerp_(p.grad, 1 - group["momentum"])
                updates.append(torch.lerp(p.grad, momentum, group["momentum"]))
            # same shapes in one batched product: fewer, larger matrix products
            batch = orthogonalize(torch.stack(updates), dtype=self.ns_dtype)  # [n, rows, columns]
            scale = max(1.0, shape[0] / shape[1]) ** 0.5  # keeps the change of outputs alike for tall matrices
            for p, update in zip(same, batch, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * scale)

    def _adamw(self, params, group):
        """m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  W <- W - lr * (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)."""
        beta1, beta2 = group["betas"]
        for p in params:
            state = self.state[p]
            if not state:
                state.update(step=torch.zeros(()), m=torch.zeros_like(p), v=torch.zeros_like(p))
            state["step"] += 1
            t = state["step"].item()
            state["m"].lerp_(p.grad, 1 - beta1)
            state["v"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
            p.mul_(1 - group["lr"] * group["weight_decay"])
            denominator = (state["v"] / (1 - beta2**t)).sqrt_().add_(group["eps"])
            p.addcdiv_(state["m"], denominator, value=-group["lr"] / (1 - beta1**t))


def is_hidden_matrix(name, p):
    """True for weights Muon should move: 2D, inside a block, neither router nor head (a router's rows are scores, not
    a map)."""
    return p.ndim == 2 and ".layers." in f".{name}" and not name.endswith("mlp.gate.weight")


def build(model, name, learning_rate, muon_learning_rate=None, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8,
          dtype=None):
    """Optimizer over a module's trainable parameters; each group carries "initial_lr", the peak that a schedule scales.

    Args:
        model: module (unwrapped; names decide the groups).
        name: "muon" or "adamw".
        learning_rate: peak of the AdamW groups; muon_learning_rate: peak of the Muon group.
        weight_decay: on 2D weights only; norms and gains are not decayed.
        dtype: the run's autocast dtype; Muon's inner products run in it when it is bfloat16, else in the weights' own.
    Raises: ValueError for an unknown name.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if name == "muon":
        hidden = [p for n, p in named if is_hidden_matrix(n, p)]
        rest = [(n, p) for n, p in named if not is_hidden_matrix(n, p)]
        groups = [dict(params=hidden, lr=muon_learning_rate or learning_rate, algorithm="muon",
                       weight_decay=weight_decay)]
    elif name == "adamw":
        rest, groups = named, []
    else:
        raise ValueError(f"optimizer {name!r} is unknown; it is one of muon, adamw; choose one of them")
    groups.append(dict(params=[p for _, p in rest if p.ndim >= 2], lr=learning_rate, algorithm="adamw",
                       weight_decay=weight_decay))
    groups.append(dict(params=[p for _, p in rest if p.ndim < 2], lr=learning_rate, algorithm="adamw",
                       weight_decay=0.0))
    groups = [g | {"initial_lr": g["lr"]} for g in groups if g["params"]]
    if name == "adamw":
        plain = [{k: v for k, v in g.items() if k != "algorithm"} for g in groups]
        return torch.optim.AdamW(plain, betas=betas, eps=eps, fused=named[0][1].device.type in ("cuda", "cpu"))
    return Muon(groups, betas=betas, eps=eps, ns_dtype=dtype if dtype == torch.bfloat16 else None)


def set_lr(optimizer, scale):
    """Set every group's rate to scale times its peak; returns the AdamW part's rate for the log."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * scale
    return optimizer.param_groups[-1]["lr"]
