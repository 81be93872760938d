"""REINFORCE, PPO and TRPO, and the training of the critic.

A policy is any module that maps obs (B, T, …) to logits (B, T, A); a critic maps obs to values (B, T).
Nothing here knows that the actions are tokens. A loss function takes a micro-batch and returns one loss per
action, (b, T); `mean_gradient` differentiates the mean over all actions of the batch.

Three sizes of batches: a *batch* is all episodes of an iteration; a *minibatch* is the share of them that one
optimizer step uses (ppo, critic); a *micro-batch* is what is in memory at once, except for the Fisher
products of TRPO, which keep all their graphs. The gradients of micro-batches are added up, so their size
changes no result.

This file leaves out value clipping, an entropy bonus, learning-rate decay and an adaptive KL coefficient,
because in an earlier version none of them clearly improved reward or grammar.
"""

import copy
import math
from dataclasses import dataclass
from statistics import fmean

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from advantage import all_sum, masked_mean, mean_and_variance, processes, without_rounding


@dataclass
class Batch:
    """B episodes of up to T actions. Column t holds an observation, the action taken, and what followed."""

    obs: torch.Tensor  # (B, T, …) what the policy saw
    actions: torch.Tensor  # (B, T) int64
    mask: torch.Tensor  # (B, T) bool, True where the policy acted
    logprobs: torch.Tensor = None  # (B, T) log π_old(a_t|s_t)
    advantages: torch.Tensor = None  # (B, T)
    targets: torch.Tensor = None  # (B, T) what the critic learns
    values: torch.Tensor = None  # (B, T) V(s_t) before the critic is trained; 0 without a critic
    returns: torch.Tensor = None  # (B, T) Monte-Carlo returns G_t, by which the critic is judged
    # The losses of this file do not use the fields below. They are logged, and a custom loss may use them.
    ref_logprobs: torch.Tensor = None  # (B, T) log π_ref(a_t|s_t)
    scores: torch.Tensor = None  # (B,) what the reward function returned
    kl: torch.Tensor = None  # (B, T) the exact KL(π_old‖π_ref) in s_t, nats
    entropy: torch.Tensor = None  # (B, T) the entropy of π_old(·|s_t), nats
    rewards: torch.Tensor = None  # (B, T) r_t: score and KL penalty; returns are their discounted sums

    def rows(self, index, columns=None):
        """The Batch of the episodes that index selects, row numbers or a slice.

        They are cut to their first `columns` columns if a number is given.
        """
        cut = lambda x: x[index] if x.dim() == 1 else x[index, :columns]
        return Batch(*(None if x is None else cut(x) for x in vars(self).values()))


# Micro-batches.

def micro_batches(batch, size):
    """Yield (index, Batch) for micro-batches of episodes of similar length, cut to the longest of them.

    index: the rows of the batch.  size: maximum number of cells of obs; a single episode may exceed it.
    Little is computed on padding. Sums over actions stay the same up to rounding, because the model is
    causal: no column depends on later ones.
    """
    columns = torch.arange(1, batch.mask.shape[1] + 1, device=batch.mask.device)
    lengths, order = (batch.mask * columns).amax(1).clamp(min=1).sort(descending=True)  # (B,) each
    lengths = lengths.tolist()
    cells = math.prod(batch.obs.shape[2:])  # of one observation: 1 for a token
    start = 0
    while start < len(lengths):
        stop = start + max(1, size // (lengths[start] * cells))
        yield order[start:stop], batch.rows(order[start:stop], lengths[start])
        start = stop


@torch.no_grad()
def map_micro_batches(function, batch, config):
    """function(batch), computed one micro-batch at a time: (B, T, …).

    function: micro-batch -> (b, t, …). After the last action of an episode the result is meaningless, because
    it depends on the size of micro-batches: use it with the mask.
    """
    whole = None
    for index, part in micro_batches(batch, config.micro_batch):
        x = function(part)  # (b, t, …) with t ≤ T
        if whole is None:
            whole = x.new_zeros(*batch.mask.shape, *x.shape[2:])
        whole[index, :x.shape[1]] = x
    return whole


def mean_over_micro_batches(function, batch, config):
    """The mean of function(batch) over the actions of the batch, of all processes, as a number."""
    return masked_mean(map_micro_batches(function, batch, config), batch.mask).item()


def mean_gradient(model, loss, batch, config, max_grad_norm):
    """Set the weights' grad to the gradient of the mean loss over the actions of the batch, of all processes.

    loss: micro-batch -> the loss of each action (b, T), or {"loss": (b, T), name: (b, T), …} to average more
    columns; only "loss" is differentiated.
    Returns {name: mean} and "grad_norm", the norm before it is clipped to max_grad_norm.
    Raises FloatingPointError if the loss or its gradient is not finite, ValueError if a column is not (b, T).
    """
    params = trainable(model)
    for p in params:
        p.grad = torch.zeros_like(p)
    n_actions = all_sum(batch.mask.sum())
    means = {}
    for _, part in micro_batches(batch, config.micro_batch):
        for name, x in per_action_columns(loss(part), part.mask).items():
            share = x.masked_fill(~part.mask, 0).sum() / n_actions
            if name == "loss":
                share.backward()  # adds to grad
            means[name] = means.get(name, 0) + share.detach()
    sum_gradients_over_processes(params)
    grad_norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm).item()
    means = {name: all_sum(mean).item() for name, mean in means.items()}
    check_finite({"loss": means["loss"], "norm of the gradient": grad_norm})
    return means | {"grad_norm": grad_norm}


def per_action_columns(returned, mask):
    """{name: (b, T)} from what a loss function returned. Raises ValueError for another shape."""
    columns = returned if isinstance(returned, dict) else {"loss": returned}
    for name, x in columns.items():
        if x.shape != mask.shape:
            raise ValueError(f"{name} must have the shape of the actions, {tuple(mask.shape)}, "
                             f"not {tuple(x.shape)}")
    return columns


def sum_gradients_over_processes(params):
    """Replace each grad by its sum over all processes: one sum for all, because each costs a round trip."""
    if processes()[1] > 1:
        total = all_sum(flatten([p.grad for p in params]))
        for p, grad in zip(params, unflatten(total, params)):
            p.grad.copy_(grad)


def minibatches(batch, epochs, count, generator):
    """In each epoch, yield `count` Batches of shuffled episodes, which together are the batch.

    With several processes, each shuffles its own rows, and a minibatch is the union of one from each process.
    """
    for _ in range(epochs):
        order = torch.randperm(len(batch.mask), generator=generator).to(batch.mask.device)
        yield from map(batch.rows, order.tensor_split(count))


def check_finite(quantities):
    """Raises FloatingPointError that names the first number in {name: number} which is not finite."""
    for name, value in quantities.items():
        if not math.isfinite(value):
            raise FloatingPointError(f"the {name} is {value}: lower --lr, --critic-lr or "
                                     "--delta, or fix your custom loss, estimator or reward")


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def flatten(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector, like):
    return [piece.view_as(t) for piece, t in zip(vector.split([t.numel() for t in like]), like)]


# Distributions.

def log_probs(policy, obs, temperature):
    """log π(·|s) (B, T, A) at the sampling temperature, because that is the policy that acts."""
    return (policy(obs) / temperature).log_softmax(-1)


def action_log_probs(logp, actions):
    """log π(a|s) (B, T) of the actions taken (B, T), from log π(·|s) (B, T, A)."""
    return logp.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def finite(logp):
    """logp with the lowest finite number in place of -inf, which a policy gives to a forbidden action."""
    return logp.clamp(min=torch.finfo(logp.dtype).min)


def entropy(logp):
    """H(π(·|s)) (B, T) in nats, from log π(·|s) (B, T, A), where 0·log 0 is 0."""
    return -(logp.exp() * finite(logp)).sum(-1)


def kl_divergence(logp, logq):
    """KL(p‖q) (B, T) in nats, exact over all A actions. logp, logq: (B, T, A).

    It is never negative: a clamp removes negative rounding errors. There it also removes the gradient, so
    this is for logging and for the trust region, not for a loss.
    """
    return (logp.exp() * (finite(logp) - finite(logq))).sum(-1).clamp(min=0)


def mean_kl(old, policy, batch, config):
    """How far an update moved the policy: the exact mean KL(π_old‖π) over the actions of the batch, nats."""
    def kl(part):
        old_logp = log_probs(old, part.obs, config.temperature)  # (b, T, A)
        logp = log_probs(policy, part.obs, config.temperature)
        return kl_divergence(old_logp, logp)

    return mean_over_micro_batches(kl, batch, config)


# First order. The three algorithms have one signature; they return columns of metrics.csv.

def reinforce(policy, batch, optimizer, config, generator=None):
    """One optimizer step along the clipped policy gradient E[∇log π(a_t|s_t) A_t], a mean over actions.

    Returns diagnostics. Williams 1992; with A_t in place of the return: Sutton et al. 2000.
    """
    def loss(part):
        logp = log_probs(policy, part.obs, config.temperature)  # (b, T, A)
        return -action_log_probs(logp, part.actions) * part.advantages

    stats = mean_gradient(policy, loss, batch, config, config.max_grad_norm)
    optimizer.step()
    return stats


def ppo(policy, batch, optimizer, config, generator=None):
    """Several epochs of minibatch steps up E[min(ρ A, clip(ρ, 1-ε, 1+ε) A)], with ρ = π(a|s) / π_old(a|s).

    A > 0 asks for a larger ρ, A < 0 for a smaller one. Once ρ has left the range in that direction, the
    gradient of an action is zero. If ρ has left in the other direction, the gradient still pulls it back:

                 ρ < 1-ε    inside    ρ > 1+ε
        A > 0     A ∇ρ       A ∇ρ        0
        A < 0      0         A ∇ρ      A ∇ρ

    The update ends early when the mean KL(π_old‖π) on a minibatch, estimated from its actions, exceeds
    target_kl.
    Returns diagnostics, means over the steps taken.
    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7. The KL's estimator is
    ρ - 1 - log ρ. It is never negative, because log ρ ≤ ρ - 1, and unbiased for actions that the update has
    not used, because the mean of ρ under π_old is 1: Schulman 2020, "Approximating KL Divergence".
    """
    def loss(part):
        logp = log_probs(policy, part.obs, config.temperature)  # (b, T, A)
        log_ratio = action_log_probs(logp, part.actions) - part.logprobs  # (b, T)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        return {"loss": -torch.min(ratio * part.advantages, clipped * part.advantages),
                "clip_fraction": ratio != clipped, "kl": ratio - 1 - log_ratio}

    steps = []
    for minibatch in minibatches(batch, config.epochs, config.minibatches, generator):
        stats = mean_gradient(policy, loss, minibatch, config, config.max_grad_norm)
        if steps and stats["kl"] > config.target_kl:  # the first step is always taken
            break
        optimizer.step()
        steps.append(stats)
    means = {name: fmean(stats[name] for stats in steps) for name in ("loss", "grad_norm", "clip_fraction")}
    return means | {"steps": len(steps)}  # without "kl", which is the name of a column of the batch


def fit_critic(critic, batch, optimizer, config, generator=None):
    """Train the critic by least squares on batch.targets. Returns diagnostics of the values before training.

    With gae the targets are λ-returns: returns, with the critic's values in place of a part of them. The
    diagnostics compare the values with the Monte-Carlo returns G, which contain no value. The loss is divided
    by Var[G], so the gradient, and the effect of clipping its norm, do not depend on the scale of the reward.
    """
    _, variance = mean_and_variance(batch.returns, batch.mask)
    variance = torch.where(variance > 0, variance, 1.0)  # zero if all returns are equal
    error = batch.returns - batch.values
    _, unexplained = mean_and_variance(error, batch.mask)
    diagnostics = {"critic_loss": (masked_mean(error ** 2, batch.mask) / variance).item(),
                   "explained_variance": 1 - (unexplained / variance).item()}

    def loss(part):
        values = critic(part.obs)
        return without_rounding(values - part.targets, values, part.targets) ** 2 / variance

    for minibatch in minibatches(batch, config.critic_epochs, config.minibatches, generator):
        mean_gradient(critic, loss, minibatch, config, config.max_grad_norm)
        optimizer.step()
    return diagnostics


# Second order.

def conjugate_gradient(matvec, b, iters=10, tol=1e-10):
    """Solve A x = b for a symmetric positive definite A of which only the products v -> A v are known.

    It minimizes ½xᵀAx - bᵀx along one direction after another. The directions are conjugate (pᵀA p' = 0), so
    a later step does not undo an earlier one; the source has the proof.
    matvec: (n,) -> (n,).  b: (n,).  iters: maximum number of products.  tol: stop when |r|² ≤ tol |b|².
    Returns x (n,) and the residual r = b - A x (n,), so xᵀA x = xᵀ(b - r) costs no further product.
    Returns the current x if pᵀA p is not positive, through rounding or because A is not positive definite.
    Hestenes & Stiefel 1952; in TRPO: Schulman et al. 2015, appendix C.
    """
    x = torch.zeros_like(b)
    r = b.clone()  # the residual b - A x
    p = b.clone()  # the direction of the next step
    rr = r @ r
    for _ in range(iters):
        if rr <= tol * (b @ b):  # at once if b = 0
            break
        Ap = matvec(p)
        curvature = p @ Ap
        if not curvature > 0:  # also if it is NaN
            break
        alpha = rr / curvature  # the best length of a step along p
        x = x + alpha * p
        r = r - alpha * Ap
        rr, rr_old = r @ r, rr
        p = r + rr / rr_old * p  # the one coefficient that makes it conjugate to all before: pᵀA p' = 0
    return x, r


def fisher_vector_product(policy, batch, config, outputs=None):
    """The function v -> F v, (n,) -> (n,), for the policy's Fisher matrix F over the states of the batch.

    The KL of a small step s of the weights is ½ sᵀF s: F is the Hessian of the mean KL(π_old‖π) at π = π_old.
    The derivative of the KL with respect to the logits is p - p_old, with p their softmax. It is zero at
    π_old, and its own derivative is that of the softmax, diag p - p pᵀ. So by the chain rule, with D the
    derivative of the logits with respect to the weights, the Hessian in one state is

        Dᵀ (diag p - p pᵀ) D + Σ_k (∂KL/∂logit_k) ∇²logit_k = Dᵀ (diag p - p pᵀ) D

    F = E[Dᵀ (diag p - p pᵀ) D] is positive semi-definite, and it needs no second derivative with respect to
    the weights.

    A product takes two backward passes, after one that all products share.
    1. D v. Autograd gives Dᵀu, not D v, but one turns into the other: let f(u) = Dᵀu for u (B, T, A). Then
       f(u)·v = u·(D v) is linear in u, so its derivative with respect to u is D v at any u. Here u is 0, and
       f(u) is computed once for all products.
    2. Dᵀ (diag p - p pᵀ) D v: D v is sent back through the softmax, whose derivative is diag p - p pᵀ,
       and the network.

    outputs: micro-batch -> (z, y), (b, T, K) each. The product is then with E[(∂y/∂θ)ᵀ ∂z/∂θ]. By default
    z are the logits and y their softmax, which gives F. With log π(a|s) as both, (b, T, 1), it is an estimate
    of F from the actions taken, which TRPO's paper calls empirical.

    Schulman et al. 2015, appendix C.1; Schraudolph 2002, "Fast Curvature Matrix-Vector Products"; Martens
    2020, "New Insights and Perspectives on the Natural Gradient Method", section 9; D v by two backward
    passes: Townsend 2017, "A new trick for calculating Jacobian vector products".
    """
    def logits_and_probs(part):
        logits = policy(part.obs) / config.temperature  # (b, T, A)
        return logits, logits.softmax(-1)

    params = trainable(policy)
    n_actions = all_sum(batch.mask.sum())
    graphs = []
    for _, part in micro_batches(batch, config.micro_batch):
        with sdpa_kernel(SDPBackend.MATH):  # fused attention's backward pass cannot be differentiated
            z, y = (outputs or logits_and_probs)(part)
        weight = part.mask.unsqueeze(-1).to(z.dtype) / n_actions  # (b, T, 1), which makes sums means
        u = torch.zeros_like(z, requires_grad=True)
        # zero, because u is; only its graph is used, which is linear in u
        f_u = torch.autograd.grad(z, params, u, create_graph=True, materialize_grads=True)
        graphs.append((y, weight, u, flatten(f_u)))

    def product(v):
        Fv = torch.zeros_like(v)
        for y, weight, u, f_u in graphs:
            Dv, = torch.autograd.grad(f_u, u, v, retain_graph=True)  # (b, T, A) = ∂(f(u)·v)/∂u
            Fv += flatten(torch.autograd.grad(y, params, weight * Dv, retain_graph=True,
                                              materialize_grads=True))
        return all_sum(Fv)

    return product


@torch.no_grad()
def line_search(evaluate, params, step, delta, backtracks=10):
    """Try θ + step, θ + step/2, θ + step/4, …; keep the first that improves and stays in the trust region.

    evaluate: () -> (improvement, kl) at the current weights.  params: the weights, moved in place.
    step: (n,).  delta: maximum kl.  backtracks: maximum number of halvings.
    Returns (halvings, improvement, kl); or None if all failed, with the weights restored bit for bit.
    Schulman et al. 2015, appendix C.
    """
    start = [p.clone() for p in params]
    for halvings in range(backtracks + 1):
        for p, p0, s in zip(params, start, unflatten(step * 0.5 ** halvings, params)):
            p.copy_(p0 + s)
        improvement, kl = evaluate()
        if improvement > 0 and kl <= delta:
            return halvings, improvement, kl
    for p, p0 in zip(params, start):
        p.copy_(p0)
    return None


def trpo(policy, batch, optimizer, config, generator=None):
    """About the largest step up the surrogate E[ρ A], ρ = π(a|s) / π_old(a|s), with mean KL(π_old‖π) ≤ δ.

    Let g be the gradient of the surrogate. To second order the KL of a step s is ½ sᵀF s. The step that
    maximizes gᵀs at a KL of δ is s = sqrt(2δ / xᵀF x) x with F x = g, along the natural gradient. The line
    search then checks the exact KL and the surrogate. F is taken over a random fisher_fraction of the
    episodes. Damping is added to its diagonal, also in xᵀF x, because directions in which F is nearly zero
    would get huge steps. There is no learning rate; the optimizer is not used.
    Returns diagnostics; accepted is 0 if no step was taken and the weights are as before.
    Schulman et al. 2015, "Trust Region Policy Optimization", section 6 and appendix C.
    """
    params = trainable(policy)

    def surrogate(part):
        # The old log-probabilities of the actions are those of sampling. The KL below needs those of all
        # actions, so it takes a copy of the old policy.
        logp = log_probs(policy, part.obs, config.temperature)  # (b, T, A)
        ratio = (action_log_probs(logp, part.actions) - part.logprobs).exp()  # 1 before the step
        return ratio * part.advantages

    old = copy.deepcopy(policy)
    stats = mean_gradient(policy, lambda part: -surrogate(part), batch, config, max_grad_norm=math.inf)
    g = -flatten([p.grad for p in params])
    surrogate_before = -stats["loss"]

    order = torch.randperm(len(batch.mask), generator=generator).to(batch.mask.device)
    subset = batch.rows(order[:math.ceil(config.fisher_fraction * len(order))])
    fisher = fisher_vector_product(policy, subset, config)
    x, r = conjugate_gradient(lambda v: fisher(v) + config.damping * v, g, config.cg_iters)
    xFx = x @ (g - r)  # xᵀ (F + damping I) x, because (F + damping I) x = g - r

    def evaluate():
        improvement = mean_over_micro_batches(surrogate, batch, config) - surrogate_before
        return improvement, mean_kl(old, policy, batch, config)

    residual = 0.0
    found = None
    if 0 < xFx < math.inf:  # False if the gradient is zero or a product is not finite
        step = (2 * config.delta / xFx).sqrt() * x
        residual = (r.norm() / g.norm()).item()
        found = line_search(evaluate, params, step, config.delta)
    halvings, improvement, kl = found or (0, 0.0, 0.0)
    length = step.norm().item() * 0.5 ** halvings if found else 0.0
    return stats | {"kl_update": kl, "accepted": int(found is not None), "halvings": halvings,
                    "surrogate_gain": improvement, "step_norm": length, "cg_relative_residual": residual}
