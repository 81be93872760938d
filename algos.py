"""REINFORCE, PPO and TRPO, and the fit of the critic.

A policy is anything that maps obs (B, T, …) to logits (B, T, A); a critic maps obs to values (B, T). Nothing
here knows that the actions are tokens. A loss is a number for each action of a part of the batch;
`mean_gradient` differentiates its mean over the actions of the whole batch.
"""

import copy
import math
from dataclasses import dataclass
from statistics import fmean

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from advantage import all_sum, masked_mean, mean_and_variance, processes


@dataclass
class Batch:
    """B episodes of up to T actions. Column t: what was seen, what was done, and how good that was."""

    obs: torch.Tensor  # (B, T, …)
    actions: torch.Tensor  # (B, T) int64
    mask: torch.Tensor  # (B, T) bool, True where the policy acted
    logprobs: torch.Tensor = None  # (B, T) log π_old(a_t|s_t)
    advantages: torch.Tensor = None  # (B, T)
    returns: torch.Tensor = None  # (B, T) the critic's targets
    values: torch.Tensor = None  # (B, T) V(s_t) before the critic is fitted to them; 0 without a critic
    ref_logprobs: torch.Tensor = None  # (B, T) log π_ref(a_t|s_t), for a loss of your own (tests/examples)
    scores: torch.Tensor = None  # (B,) what the reward function returned, for a loss of your own

    def rows(self, index, columns=None):
        """The Batch of these episodes, of their first columns alone where a number of columns is given."""
        cut = lambda x: x[index] if x.dim() == 1 else x[index, :columns]
        return Batch(*(None if x is None else cut(x) for x in vars(self).values()))


# Working through a batch in parts.

def micro_batches(batch, size):
    """(index, Batch) of parts: episodes of like length, without the columns after the longest one's end.

    Each part has at most `size` cells (rows times columns), or a single row. So memory grows with a part, not
    with the batch, and little is computed where mask is False. Sums over actions are the same but for
    rounding, since no column depends on later ones.
    """
    columns = torch.arange(1, batch.mask.shape[1] + 1, device=batch.mask.device)
    lengths, order = (batch.mask * columns).amax(1).clamp(min=1).sort(descending=True)
    lengths, start = lengths.tolist(), 0
    while start < len(lengths):
        stop = start + max(1, size // lengths[start])
        yield order[start:stop], batch.rows(order[start:stop], lengths[start])
        start = stop


@torch.no_grad()
def in_parts(function, batch, config):
    """{name: (B, T)} of the whole batch, undefined after an episode's end.

    function: a part of the batch -> {name: (b, T)}.
    """
    whole = {}
    for index, part in micro_batches(batch, config.micro_batch):
        for name, x in function(part).items():
            whole.setdefault(name, x.new_zeros(batch.mask.shape))[index, :x.shape[1]] = x
    return whole


def means_in_parts(function, batch, config):
    """{name: mean over the actions of the batch, all processes'}. function: as of `in_parts`."""
    return {name: masked_mean(x, batch.mask).item() for name, x in in_parts(function, batch, config).items()}


def mean_gradient(model, loss, batch, config, max_grad_norm):
    """Set the weights' grad to the gradient of the mean loss over the actions of the batch (all processes').

    loss: a part of the batch -> {"loss": (b, T), …}, of which the loss alone is differentiated.
    Returns the means as numbers, and grad_norm, which the gradient had before it was clipped to
    max_grad_norm. Raises FloatingPointError where the loss or its gradient is not finite, ValueError where
    what loss returns has another shape.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.grad = torch.zeros_like(p)
    n_actions, stats = all_sum(batch.mask.sum()), {}
    for _, part in micro_batches(batch, config.micro_batch):
        per_action = loss(part)
        for name, x in per_action.items():
            if x.shape != part.mask.shape:
                raise ValueError(f"{name} must have the shape of the actions, {tuple(part.mask.shape)}, "
                                 f"not {tuple(x.shape)}")
        shares = {name: x.masked_fill(~part.mask, 0).sum() / n_actions for name, x in per_action.items()}
        shares["loss"].backward()  # adds to grad
        stats = {name: stats.get(name, 0) + share.detach() for name, share in shares.items()}
    if processes()[1] > 1:  # one sum for all, since each costs a round trip
        total = all_sum(flatten([p.grad for p in params]))
        for p, grad in zip(params, unflatten(total, params)):
            p.grad.copy_(grad)
    norm = torch.nn.utils.clip_grad_norm_(params, max_grad_norm).item()
    stats = dict(zip(stats, all_sum(torch.stack(list(stats.values()))).tolist()))  # one sum, one copy
    check_finite(loss=stats["loss"], norm_of_the_gradient=norm)
    return stats | {"grad_norm": norm}


def minibatches(batch, epochs, count, generator):
    """In each epoch the rows, shuffled and split into `count` Batches.

    Of several processes each shuffles its own rows: one minibatch of each makes a minibatch of all.
    """
    for _ in range(epochs):
        order = torch.randperm(len(batch.mask), generator=generator).to(batch.mask.device)
        yield from map(batch.rows, order.tensor_split(count))


def check_finite(**quantities):
    """Raises FloatingPointError that names the first quantity which is not finite."""
    for name, value in quantities.items():
        if not math.isfinite(value):
            name = name.replace("_", " ")
            raise FloatingPointError(f"the {name} is {value}: take smaller steps (a learning rate, --delta), "
                                     "or mend a function of your own")


def flatten(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector, like):
    return [part.view_as(t) for part, t in zip(vector.split([t.numel() for t in like]), like)]


# Distributions.

def log_probs(policy, obs, temperature):
    """log π(·|s) (B, T, A) of the policy that acts: at the temperature it is sampled with."""
    return (policy(obs) / temperature).log_softmax(-1)


def chosen(logp, actions):
    """log π(a|s) (B, T) of the actions taken, from log π(·|s) (B, T, A)."""
    return logp.gather(-1, actions.unsqueeze(-1)).squeeze(-1)


def entropy(logp):
    """H(π(·|s)) (B, T) in nats, from log π(·|s) (B, T, A)."""
    return -(logp.exp() * logp).sum(-1)


def kl_divergence(logp, logq):
    """KL(p‖q) (B, T) in nats, exact over all A actions, so never negative. logp, logq: (B, T, A).

    To be logged and bounded, not differentiated: the clamp against rounding cuts the gradient.
    """
    return (logp.exp() * (logp - logq)).sum(-1).clamp(min=0)


def mean_kl(old, policy, batch, config):
    """How far an update moved the policy: the exact mean KL(π_old‖π) over the actions of the batch."""
    def kl(part):
        old_logp, logp = (log_probs(p, part.obs, config.temperature) for p in (old, policy))  # (b, T, A)
        return {"kl": kl_divergence(old_logp, logp)}
    return means_in_parts(kl, batch, config)["kl"]


# First order.

def reinforce(policy, batch, optimizer, config, generator=None):
    """One step up the policy gradient E[∇log π(a_t|s_t) A_t], the mean over the actions of the batch.

    Returns diagnostics; their kl_update is the mean over the first 64 episodes alone.
    Williams 1992; with A_t in place of the return: Sutton et al. 2000.
    """
    old = copy.deepcopy(policy)  # to measure by how much the policy moves

    def loss(part):
        logp = log_probs(policy, part.obs, config.temperature)  # (b, T, A)
        return {"loss": -chosen(logp, part.actions) * part.advantages}

    stats = mean_gradient(policy, loss, batch, config, config.max_grad_norm)
    optimizer.step()
    first = batch.rows(slice(64))  # the KL of all episodes would take a quarter of the update's time
    return stats | {"kl_update": mean_kl(old, policy, first, config)}


def ppo(policy, batch, optimizer, config, generator=None):
    """Several epochs of minibatch steps up E[min(ρ A, clip(ρ, 1-ε, 1+ε) A)], with ρ = π(a|s) / π_old(a|s).

    The minimum removes the reason to move ρ further out of the clip range in the direction that A asks for,
    and keeps the reason to come back. Ends early once the mean KL(π_old‖π) on a minibatch, estimated from its
    actions, exceeds target_kl. Returns diagnostics.
    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7; the estimator ρ - 1 - log ρ,
    unbiased and never negative: Schulman 2020, "Approximating KL Divergence".
    """
    old, steps = copy.deepcopy(policy), []  # old: to measure by how much the policy moves

    def loss(part):
        logp = log_probs(policy, part.obs, config.temperature)  # (b, T, A)
        log_ratio = chosen(logp, part.actions) - part.logprobs  # (b, T)
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        return {"loss": -torch.min(ratio * part.advantages, clipped * part.advantages),
                "clip_fraction": ratio != clipped, "kl": ratio - 1 - log_ratio}

    for minibatch in minibatches(batch, config.epochs, config.minibatches, generator):
        stats = mean_gradient(policy, loss, minibatch, config, config.max_grad_norm)
        if steps and stats["kl"] > config.target_kl:  # the first step is always taken
            break
        optimizer.step()
        steps.append(stats)
    means = {name: fmean(stats[name] for stats in steps) for name in ("loss", "grad_norm", "clip_fraction")}
    return means | {"steps": len(steps), "kl_update": mean_kl(old, policy, batch, config)}


def fit_critic(critic, batch, optimizer, config, generator=None):
    """Fit the values to the returns by least squares: critic_epochs of minibatch steps. Returns diagnostics.

    The loss is divided by the returns' variance, so that its gradient does not depend on the reward's unit.
    """
    _, variance = mean_and_variance(batch.returns, batch.mask)
    variance = variance.clamp(min=1e-8)
    unexplained, losses = masked_mean((batch.returns - batch.values) ** 2, batch.mask) / variance, []

    def loss(part):
        return {"loss": (critic(part.obs) - part.returns) ** 2 / variance}

    for minibatch in minibatches(batch, config.critic_epochs, config.minibatches, generator):
        losses.append(mean_gradient(critic, loss, minibatch, config, config.max_grad_norm)["loss"])
        optimizer.step()
    return {"critic_loss": fmean(losses), "explained_variance": 1 - unexplained.item()}


# Second order.

def conjugate_gradient(matvec, b, iters=10, tol=1e-10):
    """Solve A x = b for a symmetric positive definite A of which only the products v -> A v are known.

    matvec: (n,) -> (n,).  b: (n,).  iters: most products.  tol: stops once |r|² ≤ tol |b|².
    Returns x (n,) and the residual r = b - A x (n,), so that xᵀA x = xᵀ(b - r) needs no further product.
    Stops with what it has where the curvature pᵀA p is not positive: rounding, or A is not as promised.
    Hestenes & Stiefel 1952; for TRPO: Schulman et al. 2015, appendix C.
    """
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()  # p: the direction of the next step
    rr, enough = r @ r, tol * (b @ b)
    for _ in range(iters):
        if rr <= enough:  # at once where b = 0
            break
        Ap = matvec(p)
        curvature = p @ Ap
        if not curvature > 0:
            break
        alpha = rr / curvature  # the best length of a step along p
        x, r = x + alpha * p, r - alpha * Ap
        rr, rr_old = r @ r, rr
        p = r + rr / rr_old * p  # conjugate to all before: pᵀA p' = 0, so that no step undoes another
    return x, r


def fisher_vector_product(policy, batch, config):
    """The function v -> F v, (n,) -> (n,), for the Fisher matrix F of the policy over the batch's states.

    The KL from π_old is zero here and so is its gradient; its Hessian is not. It is
    F = E[Jᵀ (diag p - p pᵀ) J], with J = ∂logits/∂weights in a state and p their softmax: positive
    semi-definite, and without a second derivative by the weights. Once for all products, a backward pass
    makes Jᵀu, which is linear in a dummy u. Then a product takes two backward passes:
    1. J v, the gradient of (Jᵀu)·v by u;  2. Jᵀ (diag p - p pᵀ) J v: J v sent back through the softmax.
    Schraudolph 2002, "Fast Curvature Matrix-Vector Products"; Martens 2020, "New Insights and Perspectives on
    the Natural Gradient Method", section 9; J v by two backward passes: Townsend 2017, "A new trick for
    calculating Jacobian vector products".
    """
    params = [p for p in policy.parameters() if p.requires_grad]
    n_actions, graphs = all_sum(batch.mask.sum()), []
    for _, part in micro_batches(batch, config.micro_batch):
        with sdpa_kernel(SDPBackend.MATH):  # fused attention's backward pass cannot be differentiated by u
            logits = policy(part.obs) / config.temperature  # (b, T, A)
        probs = logits.softmax(-1)  # its derivative by the logits is diag p - p pᵀ
        weight = (part.mask / n_actions).unsqueeze(-1).to(logits.dtype)  # (b, T, 1), of a mean
        u = torch.zeros_like(logits, requires_grad=True)  # any value will do: Jᵀu is linear in it
        Jtu = torch.autograd.grad(logits, params, u, create_graph=True, materialize_grads=True)
        graphs.append((probs, weight, u, flatten(Jtu)))

    def product(v):
        Fv = torch.zeros_like(v)
        for probs, weight, u, Jtu in graphs:
            Jv, = torch.autograd.grad(Jtu, u, v, retain_graph=True)  # (b, T, A), the gradient of (Jᵀu)·v by u
            Fv += flatten(torch.autograd.grad(probs, params, weight * Jv, retain_graph=True,
                                              materialize_grads=True))  # Jᵀ (diag p - p pᵀ) weight J v
        return all_sum(Fv)

    return product


@torch.no_grad()
def line_search(evaluate, params, step, delta, backtracks=10):
    """Try θ + step, θ + step/2, θ + step/4, …; keep the first that improves and stays in the trust region.

    evaluate: () -> (gain, kl) at the current weights.  params: the weights, moved in place.  step: (n,).
    delta: most kl.  backtracks: how often to halve.  Returns (halvings, gain, kl); or None when all failed,
    with the weights restored to the bit.  Schulman et al. 2015, appendix C.
    """
    start = [p.clone() for p in params]
    for halvings in range(backtracks + 1):
        for p, p0, s in zip(params, start, unflatten(step * 0.5 ** halvings, params)):
            p.copy_(p0 + s)
        gain, kl = evaluate()
        if gain > 0 and kl <= delta:
            return halvings, gain, kl
    for p, p0 in zip(params, start):
        p.copy_(p0)
    return None


def trpo(policy, batch, optimizer, config, generator=None):
    """The largest step up the surrogate E[ρ A], ρ = π(a|s) / π_old(a|s), with mean KL(π_old‖π) ≤ δ.

    With g the surrogate's gradient and the KL ½ sᵀF s to second order, that step is s = sqrt(2δ / xᵀF x) x
    with F x = g: the natural gradient, as long as the KL allows. The line search then checks the exact KL and
    surrogate. F is taken over a random fisher_fraction of the episodes, and damping is added to its diagonal,
    so that the KL of the full step tends to be less than δ. There is no learning rate; the optimizer is not
    used. Returns diagnostics; accepted is 0 where no step was taken and the weights are as before.
    Schulman et al. 2015, "Trust Region Policy Optimization", section 6 and appendix C.
    """
    params = [p for p in policy.parameters() if p.requires_grad]
    old = copy.deepcopy(policy)

    def loss(part):
        logp = log_probs(policy, part.obs, config.temperature)  # (b, T, A)
        ratio = (chosen(logp, part.actions) - part.logprobs).exp()  # 1 before the step, but for rounding
        return {"loss": -ratio * part.advantages}

    stats = mean_gradient(policy, loss, batch, config, max_grad_norm=math.inf)
    g = -flatten([p.grad for p in params])

    order = torch.randperm(len(batch.mask), generator=generator).to(batch.mask.device)
    subset = batch.rows(order[:math.ceil(config.fisher_fraction * len(order))])
    fisher = fisher_vector_product(policy, subset, config)
    x, r = conjugate_gradient(lambda v: fisher(v) + config.damping * v, g, config.cg_iters)
    xFx = x @ (g - r)  # since (F + damping I) x = g - r

    def evaluate():
        gain = stats["loss"] - means_in_parts(loss, batch, config)["loss"]
        return gain, mean_kl(old, policy, batch, config)

    stats |= {"kl_update": 0.0, "accepted": 0, "halvings": 0, "gain": 0.0, "step_norm": 0.0,
              "cg_residual": 0.0}
    if not 0 < xFx < math.inf:  # the gradient is zero, or a product is not finite
        return stats
    step = (2 * config.delta / xFx).sqrt() * x
    found = line_search(evaluate, params, step, config.delta)
    stats["cg_residual"] = (r.norm() / g.norm()).item()
    if found:
        halvings, gain, kl = found
        stats |= {"kl_update": kl, "accepted": 1, "halvings": halvings, "gain": gain,
                  "step_norm": step.norm().item() * 0.5 ** halvings}
    return stats
