"""REINFORCE, PPO and TRPO, and the critic's fit.

A policy is anything that maps obs (B, T, …) to logits (B, T, A); a critic maps obs to values (B, T). Nothing
here knows that the actions are tokens. Every loss is a mean over the actions of the batch.

`config` needs, for policies: temperature; for gradient steps: max_grad_norm; ppo: clip, epochs, minibatches,
target_kl; trpo: delta, cg_iters, damping, fisher_fraction; fit_critic: critic_epochs, minibatches.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from advantage import all_sum, masked_mean, mean_and_variance, processes


@dataclass
class Batch:
    """B episodes of up to T actions. Column t: what was seen, what was done, and how good that was."""

    obs: torch.Tensor  # (B, T, …)
    actions: torch.Tensor  # (B, T) int64
    mask: torch.Tensor  # (B, T) bool, True where the policy acted
    logprobs: torch.Tensor  # (B, T) log π_old(a_t|s_t)
    advantages: torch.Tensor  # (B, T)
    returns: torch.Tensor  # (B, T) the critic's targets
    values: torch.Tensor  # (B, T) V(s_t) before the critic is fitted to them; 0 without a critic
    ref_logprobs: torch.Tensor = None  # (B, T) log π_ref(a_t|s_t), and
    scores: torch.Tensor = None  # (B,) each episode's reward: for a loss of your own, as in tests/examples

    def rows(self, index):
        return Batch(*(None if x is None else x[index] for x in vars(self).values()))


# Shared pieces.

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


@torch.no_grad()
def mean_kl(policy, batch, old, temperature):
    """How far an update moved the policy: mean KL(π_old‖π) over the batch. old: (B, T, A) log π_old(·|s)."""
    new = log_probs(policy, batch.obs, temperature)  # (B, T, A)
    return masked_mean(kl_divergence(old, new), batch.mask).item()


def minibatches(batch, epochs, parts, generator):
    """(index, Batch) of `parts` parts of the rows, each row once per epoch and in random order.

    Of several processes each shuffles its own rows: one part of each makes a minibatch of all.
    """
    for _ in range(epochs):
        order = torch.randperm(len(batch.mask), generator=generator).to(batch.mask.device)
        for index in order.tensor_split(parts):
            yield index, batch.rows(index)


def check_finite(**quantities):
    """Raises FloatingPointError that names the first quantity which is not finite."""
    for name, value in quantities.items():
        if not math.isfinite(value):
            name = name.replace("_", " ")
            raise FloatingPointError(f"the {name} is {value}: take smaller steps (a learning rate, --delta)")


def flatten(tensors):
    return torch.cat([t.reshape(-1) for t in tensors])


def unflatten(vector, like):
    return [part.view_as(t) for part, t in zip(vector.split([t.numel() for t in like]), like)]


def gradient_step(model, loss, optimizer, max_grad_norm):
    """One step down the loss. Returns the norm of the gradient before it was clipped to max_grad_norm.

    loss: its gradient is this process's share, to be summed over all processes.
    Raises FloatingPointError, before any weight has moved, where the loss or its gradient is not finite.
    """
    optimizer.zero_grad()
    loss.backward()
    if processes()[1] > 1:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        for grad, total in zip(grads, unflatten(all_sum(flatten(grads)), grads)):
            grad.copy_(total)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    check_finite(loss=loss.item(), norm_of_the_gradient=norm)
    optimizer.step()
    return norm


# First order.

def reinforce(policy, batch, optimizer, config, generator=None):
    """One step up the policy gradient E[∇log π(a_t|s_t) A_t], the mean over the actions of the batch.

    Returns diagnostics, kl_update of the first 64 episodes alone.
    Williams 1992; with A_t in place of the return: Sutton et al. 2000.
    """
    logp = log_probs(policy, batch.obs, config.temperature)  # (B, T, A)
    loss = -masked_mean(chosen(logp, batch.actions) * batch.advantages, batch.mask)
    norm = gradient_step(policy, loss, optimizer, config.max_grad_norm)
    first = slice(64)  # the KL of all episodes would take a fifth of the update's time
    kl = mean_kl(policy, batch.rows(first), logp.detach()[first], config.temperature)
    return {"loss": loss.item(), "grad_norm": norm, "kl_update": kl}


def ppo(policy, batch, optimizer, config, generator=None):
    """Several epochs of minibatch steps up E[min(ρ A, clip(ρ, 1-ε, 1+ε) A)], with ρ = π(a|s) / π_old(a|s).

    The minimum removes the reason to move ρ further out of the clip range in the direction that A asks for,
    and keeps the reason to come back. Ends early once the exact mean KL(π_old‖π) on a minibatch exceeds
    target_kl. Returns diagnostics.
    Schulman et al. 2017, "Proximal Policy Optimization Algorithms", equation 7.
    """
    with torch.no_grad():
        old = log_probs(policy, batch.obs, config.temperature)  # (B, T, A), of all actions: for the exact KL
    steps = []
    for rows, mb in minibatches(batch, config.epochs, config.minibatches, generator):
        logp = log_probs(policy, mb.obs, config.temperature)  # (b, T, A)
        kl = masked_mean(kl_divergence(old[rows], logp.detach()), mb.mask)
        if steps and not kl <= config.target_kl:  # after at least one step; NaN ends it too
            break
        ratio = (chosen(logp, mb.actions) - mb.logprobs).exp()  # (b, T)
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        loss = -masked_mean(torch.min(ratio * mb.advantages, clipped * mb.advantages), mb.mask)
        norm = gradient_step(policy, loss, optimizer, config.max_grad_norm)
        steps.append((loss.item(), norm, masked_mean(ratio != clipped, mb.mask).item()))
    loss, norm, clip_fraction = torch.tensor(steps).mean(0).tolist()
    return {"loss": loss, "grad_norm": norm, "clip_fraction": clip_fraction, "steps": len(steps),
            "kl_update": mean_kl(policy, batch, old, config.temperature)}


def fit_critic(critic, batch, optimizer, config, generator=None):
    """Fit the values to the returns by least squares: critic_epochs of minibatch steps. Returns diagnostics.

    The loss is divided by the returns' variance, so that its gradient does not depend on the reward's unit.
    """
    _, variance = mean_and_variance(batch.returns, batch.mask)
    variance = variance.clamp(min=1e-8)
    unexplained, losses = masked_mean((batch.returns - batch.values) ** 2, batch.mask) / variance, []
    for _, mb in minibatches(batch, config.critic_epochs, config.minibatches, generator):
        loss = masked_mean((critic(mb.obs) - mb.returns) ** 2, mb.mask) / variance
        gradient_step(critic, loss, optimizer, config.max_grad_norm)
        losses.append(loss.item())
    return {"critic_loss": sum(losses) / len(losses), "explained_variance": 1 - unexplained.item()}


# Second order.

def conjugate_gradient(matvec, b, iters=10, tol=1e-10):
    """Solve A x = b for a symmetric positive definite A of which only the products v -> A v are known.

    matvec: (n,) -> (n,).  b: (n,).  iters: most products.  tol: stops once |r|² ≤ tol |b|².
    Returns x (n,) and the residual r = b - A x (n,), so that xᵀA x = xᵀ(b - r) needs no further product.
    Stops with what it has where the curvature pᵀA p is not positive: rounding, or A is not as promised.
    Hestenes & Stiefel 1952; for TRPO: Schulman et al. 2015, appendix C.
    """
    x, r, p = torch.zeros_like(b), b.clone(), b.clone()
    rr, enough = r @ r, tol * (b @ b)
    for _ in range(iters):
        if rr <= enough:  # at once where b = 0
            break
        Ap = matvec(p)
        curvature = p @ Ap
        if not curvature > 0:
            break
        alpha = rr / curvature
        x, r = x + alpha * p, r - alpha * Ap
        rr, rr_old = r @ r, rr
        p = r + rr / rr_old * p
    return x, r


def fisher_vector_product(policy, batch, temperature=1.0):
    """The function v -> F v, (n,) -> (n,), for the Fisher matrix F of the policy over the batch's states.

    The KL from π_old is zero here and so is its gradient; its Hessian is not: it is
    F = E[Jᵀ (diag p - p pᵀ) J], where J is the derivative of a state's logits by the weights and p their
    softmax. Jᵀu is a backward pass. It is linear in u, so that the gradient of (Jᵀu)·v by u, a second
    backward pass, is J v. Both graphs are made once and kept for all products. The network is never
    differentiated twice by its weights, and F is positive semi-definite by construction.
    Schraudolph 2002, "Fast Curvature Matrix-Vector Products"; Martens 2020, "New Insights and Perspectives on
    the Natural Gradient Method", section 9; J v by two backward passes: Townsend 2017, "A new trick for
    calculating Jacobian vector products".
    """
    params = [p for p in policy.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
        logits = policy(batch.obs) / temperature  # (B, T, A)
    probs = logits.softmax(-1)  # its derivative by the logits is diag p - p pᵀ
    weight = (batch.mask.to(logits.dtype) / all_sum(batch.mask.sum())).unsqueeze(-1)  # (B, T, 1), of a mean
    u = torch.zeros_like(logits, requires_grad=True)  # any value will do: Jᵀu is linear in it
    Jtu = flatten(torch.autograd.grad(logits, params, u, create_graph=True, materialize_grads=True))  # (n,)

    def product(v):
        Jv, = torch.autograd.grad(Jtu, u, v, retain_graph=True)  # (B, T, A), the gradient of (Jᵀu)·v by u
        Fv = torch.autograd.grad(probs, params, weight * Jv, retain_graph=True, materialize_grads=True)
        return all_sum(flatten(Fv))  # (n,) Jᵀ (diag p - p pᵀ) weight J v, summed over the states

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
            return halvings, gain.item(), kl.item()
    for p, p0 in zip(params, start):
        p.copy_(p0)
    return None


def full_precision(update):
    """The update with torch.autocast off: a curvature needs more bits than bfloat16 has."""
    @functools.wraps(update)
    def without_autocast(policy, batch, *args, **kwargs):
        with torch.autocast(batch.mask.device.type, enabled=False):
            return update(policy, batch, *args, **kwargs)
    return without_autocast


@full_precision
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

    def surrogate(logp):
        ratio = (chosen(logp, batch.actions) - batch.logprobs).exp()  # 1 before the step, but for rounding
        return masked_mean(ratio * batch.advantages, batch.mask)

    logp = log_probs(policy, batch.obs, config.temperature)  # (B, T, A)
    before = surrogate(logp)
    g = all_sum(flatten(torch.autograd.grad(before, params, materialize_grads=True)))
    old, before = logp.detach(), before.detach()
    check_finite(surrogate=before.item(), norm_of_the_gradient=g.norm().item())

    order = torch.randperm(len(batch.mask), generator=generator).to(batch.mask.device)
    subset = batch.rows(order[:math.ceil(config.fisher_fraction * len(order))])
    fisher = fisher_vector_product(policy, subset, config.temperature)
    x, r = conjugate_gradient(lambda v: fisher(v) + config.damping * v, g, config.cg_iters)
    xFx = x @ (g - r)  # since (F + damping I) x = g - r

    def evaluate():
        new = log_probs(policy, batch.obs, config.temperature)
        return surrogate(new) - before, masked_mean(kl_divergence(old, new), batch.mask)

    stats = {"loss": -before.item(), "grad_norm": g.norm().item(), "kl_update": 0.0, "accepted": 0,
             "halvings": 0, "gain": 0.0, "step_norm": 0.0, "cg_residual": 0.0}
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
