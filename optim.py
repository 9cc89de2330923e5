"""Optimizers short enough to read: Muon for the 2D weights inside the blocks with AdamW for everything else, Lion,
Sophia-G and Schedule-Free AdamW, each a torch Optimizer.

What an update divides the gradient by is the whole difference between them:
    AdamW           the root of its mean square, weight by weight
    Muon            the singular values of the momentum matrix: every direction of a weight learns at the same speed
    Lion            its own size: only the sign is left
    Sophia          the curvature of the loss, weight by weight, and no step is longer than Lion's
    Schedule-Free   as AdamW; an average of the weights takes the place of a falling rate
Muon only makes sense for matrices that map activations to activations: embeddings, heads, norms, routers and scalar
heads stay with AdamW.

Sources: K. Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks" (Newton-Schulz
coefficients); Liu et al. 2025, "Muon is scalable for LLM training" (arXiv:2502.16982); Amsel et al. 2025, "The Polar
Express" (arXiv:2505.16932); Loshchilov & Hutter 2019, AdamW (arXiv:1711.05101); Chen et al. 2023, Lion
(arXiv:2302.06675); Liu et al. 2023, Sophia (arXiv:2305.14342); Defazio et al. 2024, "The road less scheduled"
(arXiv:2405.15682).

Letters: W weight, g gradient, B rows, T tokens, V vocabulary.
"""

import torch

# (a, b, c) of each iteration x <- a x + b (x x^T) x + c (x x^T)^2 x: singular values s -> a s + b s^3 + c s^5.
# Jordan's is the same five times, chosen for the steepest slope at 0, and ends near +-0.3 of 1
JORDAN = ((3.4445, -4.7750, 2.0315),) * 5
# each in turn has the smallest largest distance to 1 over the interval in which the one before leaves the singular
# values, the first over [0.02, 1] (Amsel et al. 2025, section 3); values from 0.01 on end within 0.28 of 1
FAST = ((7.711, -22.1138, 16.2488), (3.7872, -3.0659, 0.6533), (2.6684, -1.9829, 0.4533))


def orthogonalize(g, fast=False, dtype=None):
    """Approximate U V^T of the singular value decomposition of each matrix by Newton-Schulz iterations.

    Args:
        g: [..., rows, columns].
        fast: three iterations, each with coefficients of its own, instead of Jordan's five: small singular values are
            raised less (docs/experiments.md says what that saves and costs).
        dtype: dtype of the products; None = g's own. bfloat16 is enough (the iteration forgives rounding) where it is
            fast.
    Returns: tensor like g.
    """
    x = g.to(dtype or g.dtype)
    flipped = x.size(-2) > x.size(-1)
    x = x.mT if flipped else x  # the Gram matrix is then the smaller of the two
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # singular values at most 1, as the iteration needs
    x = x.reshape(-1, *x.shape[-2:])  # [n, rows, columns]
    for i, (a, b, c) in enumerate(FAST if fast else JORDAN):
        gram = x @ x.mT  # [n, rows, rows]
        if fast and i == 0:
            # the root of its norm bounds the largest singular value more closely, so fewer iterations are spent on
            # growing; 1.05, because the first polynomial is steep beyond 1, where rounding in bf16 may lead
            size = 1.05 * gram.norm(dim=(-2, -1), keepdim=True) + 1e-7
            x, gram = x / size**0.5, gram / size
        # x <- a x + (b gram + c gram^2) x; sums inside the products spare five passes over the memory, a quarter of
        # the time on a CPU
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if flipped else x
    return x.reshape(g.shape).to(g.dtype)


class Muon(torch.optim.Optimizer):
    """Muon and AdamW in one optimizer, chosen per group by group["algorithm"].

    Group keys: params, lr, algorithm "muon" (momentum, weight_decay) or "adamw" (betas, eps, weight_decay).
    momentum_warmup: steps in which Muon's momentum rises from 0.85, where it is lower, to `momentum`: at first old
    gradients say little about weights that have moved far (as Jordan's speed runs do; docs/experiments.md).
    fast: as in orthogonalize(); without it this is torch.optim.Muon, but for the warm-up of the momentum.
    """

    def __init__(self, groups, momentum=0.95, betas=(0.9, 0.95), eps=1e-8, ns_dtype=None, momentum_warmup=300,
                 fast=False):
        self.ns_dtype, self.fast = ns_dtype, fast
        super().__init__(groups, dict(lr=1e-3, weight_decay=0.0, algorithm="muon", momentum=momentum, betas=betas,
                                      eps=eps, momentum_warmup=momentum_warmup, step=0))

    @torch.no_grad()
    def step(self, closure=None):
        """Update all parameters that have a gradient. `closure` is for the interface only and must be None."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["algorithm"] == "muon" else self._adamw)(params, group)

    def _muon(self, params, group):
        """v <- mu v + (1 - mu) g;  W <- W - lr * sqrt(max(1, rows/cols)) * orth(mu v + (1 - mu) g)   (Nesterov)."""
        left = max(0, group["momentum_warmup"] - group["step"]) / max(1, group["momentum_warmup"])  # of the warm-up
        group["step"] += 1
        mu = group["momentum"] - left * max(0.0, group["momentum"] - 0.85)
        by_shape = {}
        for p in params:
            by_shape.setdefault(p.shape, []).append(p)
        for shape, same in by_shape.items():
            updates = []
            for p in same:
                if p not in self.state:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - mu)
                updates.append(torch.lerp(p.grad, momentum, mu))
            # same shapes in one batched product: fewer, larger matrix products
            batch = orthogonalize(torch.stack(updates), self.fast, self.ns_dtype)  # [n, rows, columns]
            scale = max(1.0, shape[0] / shape[1]) ** 0.5  # keeps the change of outputs alike for tall matrices
            for p, update in zip(same, batch, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)

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


class Lion(torch.optim.Optimizer):
    """Sign of an interpolated momentum (Chen et al. 2023, Algorithm 2): every weight moves by exactly the rate, so the
    rate is several times smaller than AdamW's, and weight decay, which is multiplied by it, as many times larger.

    Group keys: params, lr, betas, weight_decay. State: momentum, like the weight.
    """

    def __init__(self, groups, betas=(0.9, 0.99)):
        super().__init__(groups, dict(lr=1e-4, weight_decay=0.0, betas=betas))

    @torch.no_grad()
    def step(self, closure=None):
        """W <- W - lr * (sign(b1 m + (1-b1) g) + decay * W);  m <- b2 m + (1-b2) g."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                # the step listens more to the present gradient (b1) than the memory does (b2 is larger)
                p.add_(torch.lerp(p.grad, state["momentum"], beta1).sign_(), alpha=-group["lr"])
                state["momentum"].lerp_(p.grad, 1 - beta2)


class Sophia(torch.optim.Optimizer):
    """Sophia-G (Liu et al. 2023, Algorithm 3): momentum divided by the curvature, each step clipped to the rate. Where
    the curvature is small the step is Lion's; where it is large the step is shorter.

    Group keys: params, lr, betas, gamma (share of the curvature that divides), eps, weight_decay. State: momentum and
    hessian (estimate of the diagonal), each like the weight. The training loop gives the estimate every few steps:
        loss on labels from sample_labels(), backward(), update_hessian(), zero_grad()
    """

    def __init__(self, groups, betas=(0.96, 0.99), gamma=0.05, eps=1e-12):
        super().__init__(groups, dict(lr=1e-3, weight_decay=0.0, betas=betas, gamma=gamma, eps=eps))

    @torch.no_grad()
    def update_hessian(self, targets, grad_scale=1.0):
        """h <- b2 h + (1-b2) N g^2: the Gauss-Newton-Bartlett estimate (Algorithm 2).

        Args: targets: N, the labels in the mean loss whose gradient is in .grad; grad_scale: the scaler's factor on it.
        """
        params = [(p, group["betas"][1]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for p, _ in params:
            if not self.state[p]:
                self.state[p].update(momentum=torch.zeros_like(p), hessian=torch.zeros_like(p))
        # an overflow in fp16 is an estimate lost, but infinity in an average would stop the weight for good
        if all(p.grad.isfinite().all() for p, _ in params):
            for p, beta2 in params:
                g = p.grad / grad_scale
                self.state[p]["hessian"].mul_(beta2).addcmul_(g, g, value=(1 - beta2) * targets)

    @torch.no_grad()
    def step(self, closure=None):
        """m <- b1 m + (1-b1) g;  W <- W - lr * (clip(m / max(gamma h, eps), 1) + decay * W).

        Raises RuntimeError before the first estimate: without one every step would be Lion's.
        """
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    raise RuntimeError("Sophia.step() before update_hessian(); it divides by an estimate of the "
                                       "curvature; give one at the first step")
                momentum, hessian = self.state[p]["momentum"], self.state[p]["hessian"]
                momentum.lerp_(p.grad, 1 - group["betas"][0])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = momentum / (group["gamma"] * hessian).clamp_(min=group["eps"])
                p.add_(update.clamp_(-1, 1), alpha=-group["lr"])


@torch.no_grad()
def sample_labels(logits, ids, uniform):
    """Labels drawn from the model's own predictions, for Sophia. Their squared gradients measure the curvature, those
    of the data's labels do not: what the former are in expectation is the Gauss-Newton matrix (section 2.3).

    Args:
        logits: [B,T,V], any floating dtype.
        ids: int64 [B,T].
        uniform: [B,T-1] random numbers in [0,1).
    Returns: int64 [B,T]: ids with token t + 1 replaced by a draw from softmax(logits[:, t]); the first token stays.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    cumulative = logits[:, :-1].to(wide).softmax(-1).cumsum(-1)  # [B,T-1,V]
    points = uniform.to(logits.device, wide)[..., None] * cumulative[..., -1:]  # [B,T-1,1]; the last is 1 but rounded
    drawn = torch.searchsorted(cumulative, points, right=True).squeeze(-1)  # right: probability 0 is never drawn
    return torch.cat([ids[:, :1], drawn.clamp_(max=logits.shape[-1] - 1)], dim=1)


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-Free AdamW (Defazio et al. 2024, Algorithm 1) of three points: z moves, x is the mean of the z so far,
    gradients are taken at y = (1-b1) z + b1 x, between the two.

    The weights in the model are x, the point to evaluate and to save, except from to_gradient_point() to the end of the
    step() or zero_grad() that follows. A step at x and a state_dict() at y raise RuntimeError.
    Group keys: params, lr, betas, eps, weight_decay. State: z and v, each like the weight; y follows from x and z.
    """

    def __init__(self, groups, betas=(0.9, 0.95), eps=1e-8):
        self.at_y = False
        super().__init__(groups, dict(lr=1e-3, weight_decay=0.0, betas=betas, eps=eps, step=0, lr_squares=0.0))

    def to_gradient_point(self):
        """x -> y, before the forward passes of a step."""
        self._move(to_y=True)

    @torch.no_grad()
    def step(self, closure=None):
        """z <- z - lr (g / (sqrt(v / (1-b2^t)) + eps) + decay * y);  x <- (1-c) x + c z,  c = lr^2 / sum of lr^2."""
        if not self.at_y:
            raise RuntimeError("ScheduleFree.step() at x; gradients belong to y; call to_gradient_point() before them")
        for group in self.param_groups:
            group["step"] += 1
            group["lr_squares"] += group["lr"] ** 2  # the short steps of the warm-up count less in the mean
            for p in [p for p in group["params"] if p.grad is not None]:
                state, beta2 = self.state[p], group["betas"][1]
                if not state:
                    state.update(z=p.clone(), v=torch.zeros_like(p))
                state["v"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                denominator = (state["v"] / (1 - beta2 ** group["step"])).sqrt_().add_(group["eps"])
                p.grad.div_(denominator).add_(p, alpha=group["weight_decay"])  # .grad now holds the update, taken at y
        self._move(to_y=False)
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                z = self.state[p]["z"].sub_(p.grad, alpha=group["lr"])
                p.lerp_(z, group["lr"] ** 2 / group["lr_squares"])

    def zero_grad(self, set_to_none=True):
        """As torch's; and the end of a step that was skipped: y -> x."""
        self._move(to_y=False)
        super().zero_grad(set_to_none)

    def state_dict(self):
        """As torch's. Raises RuntimeError at y: the weights saved beside it would be the wrong ones."""
        if self.at_y:
            raise RuntimeError("ScheduleFree.state_dict() at y; x is the point to save; end the step first, with "
                               "step() or zero_grad()")
        return super().state_dict()

    @torch.no_grad()
    def _move(self, to_y):
        """All weights from x to y = x + (1-b1) (z - x), or back, unless they are there."""
        for group in self.param_groups if to_y != self.at_y else ():
            weight = 1 - group["betas"][0] if to_y else 1 - 1 / group["betas"][0]
            for p in [p for p in group["params"] if p in self.state]:  # one without a first gradient has x = y = z
                p.lerp_(self.state[p]["z"], weight)
        self.at_y = to_y


def is_hidden_matrix(name, p):
    """True for weights Muon should move: 2D, inside a block, neither router nor head (a router's rows are scores, not
    a map)."""
    return p.ndim == 2 and ".layers." in f".{name}" and not name.endswith("mlp.gate.weight")


def build(model, name, learning_rate, muon_learning_rate=None, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-8,
          dtype=None, zero=False, embedding_decay=None):
    """Optimizer over a module's trainable parameters; each group carries "initial_lr", the peak that a schedule scales.

    Args:
        model: module (unwrapped; names decide the groups).
        name: "muon", "adamw", "lion", "sophia" or "schedulefree".
        learning_rate: peak of all groups but Muon's; muon_learning_rate: peak of the Muon group.
        betas, eps: of AdamW and Schedule-Free; Lion and Sophia have their papers' own.
        weight_decay: on 2D weights only; norms and gains are not decayed.
        dtype: the run's autocast dtype; Muon's inner products run in it when it is bfloat16, else in the weights' own.
        zero: AdamW only: each rank of the process group keeps and steps its share of the parameters (sharding.py).
        embedding_decay: beside Muon, weight decay of embedding and head; None: weight_decay.
    Raises: ValueError for an unknown name.
    """
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if name == "muon":
        hidden = [p for n, p in named if is_hidden_matrix(n, p)]
        rest = [(n, p) for n, p in named if not is_hidden_matrix(n, p)]
        groups = [dict(params=hidden, lr=muon_learning_rate or learning_rate, algorithm="muon",
                       weight_decay=weight_decay)]
    elif name in ("adamw", "lion", "sophia", "schedulefree"):
        rest, groups = named, []
    else:
        raise ValueError(f"optimizer {name!r} is unknown; it is one of muon, adamw, lion, sophia, schedulefree; choose "
                         "one of them")
    matrices = [(n, p) for n, p in rest if p.ndim >= 2]
    if name == "muon" and embedding_decay is not None:  # beside Muon: embedding and head, and in blocks the routers
        outside = [p for n, p in matrices if ".layers." not in f".{n}"]
        groups.append(dict(params=outside, lr=learning_rate, algorithm="adamw", weight_decay=embedding_decay))
        matrices = [(n, p) for n, p in matrices if ".layers." in f".{n}"]
    groups.append(dict(params=[p for _, p in matrices], lr=learning_rate, algorithm="adamw",
                       weight_decay=weight_decay))
    groups.append(dict(params=[p for _, p in rest if p.ndim < 2], lr=learning_rate, algorithm="adamw",
                       weight_decay=0.0))
    groups = [g | {"initial_lr": g["lr"]} for g in groups if g["params"]]
    if name == "muon":
        return Muon(groups, betas=betas, eps=eps, ns_dtype=dtype if dtype == torch.bfloat16 else None)
    groups = [{k: v for k, v in g.items() if k != "algorithm"} for g in groups]
    if name == "adamw":  # torch's own is one fused pass over the memory; Muon._adamw is the same formula to read
        options = dict(betas=betas, eps=eps, fused=named[0][1].device.type in ("cuda", "cpu"))
        if zero:
            from torch.distributed.optim import ZeroRedundancyOptimizer  # not every build of torch has it

            return ZeroRedundancyOptimizer(groups, torch.optim.AdamW, **options)
        return torch.optim.AdamW(groups, **options)
    if name == "schedulefree":
        return ScheduleFree(groups, betas=betas, eps=eps)
    return {"lion": Lion, "sophia": Sophia}[name](groups)


def set_lr(optimizer, scale):
    """Set every group's rate to scale times its peak; returns the last group's (AdamW's beside Muon) for the log."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * scale
    return optimizer.param_groups[-1]["lr"]


def load_state(optimizer, state):
    """load_state_dict() that keeps the peaks of this start's flags: a resume may change its rates."""
    peaks = [group["initial_lr"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["initial_lr"] = peak


def to_gradient_point(optimizer):
    """Move the weights to where the gradients of this step belong: Schedule-Free's y; for all others they are there."""
    if isinstance(optimizer, ScheduleFree):
        optimizer.to_gradient_point()
