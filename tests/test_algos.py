import copy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from algos import (Batch, chosen, conjugate_gradient, entropy, fisher_vector_product, fit_critic, kl_divergence, line_search,
                   log_probs, minibatches, ppo, reinforce, trpo)
from model import GPT, Critic, GPTConfig

V, B, T = 4, 6, 5
CONFIG = dict(temperature=1.0, max_grad_norm=1e9, clip=0.2, epochs=1, minibatches=1, target_kl=1e9, delta=0.01,
              cg_iters=10, damping=0.1, fisher_fraction=1.0, backtracks=10, critic_epochs=1)


def config(**changes):
    return SimpleNamespace(**{**CONFIG, **changes})


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def policy():
    """A GPT small enough for its Fisher matrix to be written down, far enough from its start to be curved."""
    policy = GPT(GPTConfig(vocab_size=V, block_size=T, n_layer=1, n_head=2, n_embd=4), generator()).double()
    for i, p in enumerate(policy.parameters()):
        p.data += 0.3 * torch.randn(p.shape, generator=generator(i), dtype=p.dtype)
    return policy


def make_batch(policy, temperature=1.0, seed=1):
    tokens = torch.randint(V, (B, T + 1), generator=generator(seed))
    obs, actions = tokens[:, :-1], tokens[:, 1:]
    start, end = torch.tensor([0, 1, 2, 0, 0, 3])[:, None], torch.tensor([5, 5, 4, 2, 1, 4])[:, None]
    mask = (torch.arange(T) >= start) & (torch.arange(T) < end)
    advantages, returns = torch.randn(2, B, T, generator=generator(seed + 1), dtype=torch.float64)
    with torch.no_grad():
        logprobs = chosen(log_probs(policy, obs, temperature), actions)
    return Batch(obs, actions, mask, logprobs, advantages, returns)


def weights(model):
    return torch.cat([p.detach().reshape(-1).clone() for p in model.parameters()])


def score_functions(policy, batch, temperature=1.0):
    """For each action state (n of them): the probabilities (A,) and the scores ∇ log π(a|s) (A, params), one at a time."""
    logp = log_probs(policy, batch.obs, temperature)
    for b, t in batch.mask.nonzero().tolist():
        rows = [torch.cat([g.reshape(-1) for g in torch.autograd.grad(logp[b, t, a], list(policy.parameters()), retain_graph=True)])
                for a in range(V)]
        yield logp[b, t].detach().exp(), torch.stack(rows)


def explicit_fisher(policy, batch, temperature=1.0):
    """E over states and actions of ∇log π ∇log πᵀ."""
    terms = [(p[:, None] * s).T @ s for p, s in score_functions(policy, batch, temperature)]
    return sum(terms) / len(terms)


def explicit_gradient(policy, batch):
    """The policy gradient, action by action."""
    total = 0
    for (b, t), (_, s) in zip(batch.mask.nonzero().tolist(), score_functions(policy, batch)):
        total = total + s[batch.actions[b, t]] * batch.advantages[b, t]
    return total / batch.mask.sum()


def mean_kl(old, new, batch):
    """Mean KL(old‖new) over the action states, by loops. old, new: policies."""
    p, q = (log_probs(m, batch.obs, 1.0).detach().exp() for m in (old, new))
    kls = [sum(p[b, t, a] * (p[b, t, a] / q[b, t, a]).log() for a in range(V)).item() for b, t in batch.mask.nonzero().tolist()]
    return sum(kls) / len(kls)


def surrogate(old, new, batch):
    p, q = (log_probs(m, batch.obs, 1.0).detach().exp() for m in (old, new))
    terms = [(q[b, t, batch.actions[b, t]] / p[b, t, batch.actions[b, t]] * batch.advantages[b, t]).item()
             for b, t in batch.mask.nonzero().tolist()]
    return sum(terms) / len(terms)


def sgd_move(update, policy, batch, **changes):
    """What the update adds to the weights under plain gradient descent at rate 1: minus the gradient of its loss."""
    policy = copy.deepcopy(policy)
    before = weights(policy)
    stats = update(policy, batch, torch.optim.SGD(policy.parameters(), 1.0), config(**changes), generator())
    return weights(policy) - before, stats


# Distributions.

def test_entropy_and_kl_against_torch():
    logp, logq = torch.randn(2, 3, 2, 7, generator=generator()).log_softmax(-1)
    p, q = torch.distributions.Categorical(logits=logp), torch.distributions.Categorical(logits=logq)
    torch.testing.assert_close(entropy(logp), p.entropy())
    torch.testing.assert_close(kl_divergence(logp, logq), torch.distributions.kl_divergence(p, q))
    assert (kl_divergence(logp, logp) == 0).all()


@pytest.mark.parametrize("distance", [0, 1e-7, 1e-6, 1e-4, 1, 100])
def test_the_exact_kl_is_never_negative(distance):
    logits, move = torch.randn(2, 64, 32, 257, generator=generator())
    kl = kl_divergence(logits.log_softmax(-1), (logits + distance * move).log_softmax(-1))
    assert (kl >= 0).all() and kl.max() < 1000


# First order.

@pytest.mark.parametrize("update", [reinforce, ppo])
def test_first_step_is_the_policy_gradient(policy, update):
    batch = make_batch(policy)
    move, stats = sgd_move(update, policy, batch)
    expected = explicit_gradient(policy, batch)
    torch.testing.assert_close(move, expected)
    assert stats["grad_norm"] == pytest.approx(expected.norm().item())


def test_ppos_first_minibatch_is_reinforce_on_it(policy):
    batch = make_batch(policy)
    rows = torch.randperm(B, generator=generator()).chunk(3)[0]
    stop_after_one = dict(minibatches=3, target_kl=1e-12)
    move, stats = sgd_move(ppo, policy, batch, **stop_after_one)
    assert stats["steps"] == 1
    torch.testing.assert_close(move, sgd_move(reinforce, policy, batch.rows(rows))[0])


def test_gradient_is_clipped_to_its_longest(policy):
    move, stats = sgd_move(reinforce, policy, make_batch(policy), max_grad_norm=1e-3)
    assert move.norm().item() == pytest.approx(1e-3, rel=1e-3) and stats["grad_norm"] > 1e-3


def test_minibatches_cover_every_row_once_an_epoch_in_new_orders():
    batch = Batch(*(torch.arange(10)[:, None] for _ in range(6)))
    parts = list(minibatches(batch, 3, 4, generator()))
    assert len(parts) == 12 and {len(index) for index, _ in parts} == {2, 3}
    assert all(torch.equal(mb.obs[:, 0], index) and torch.equal(mb.mask[:, 0], index) for index, mb in parts)
    epochs = [torch.cat([index for index, _ in parts[i:i + 4]]).tolist() for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 3


class Watched(torch.nn.Module):
    """A model that keeps what it was asked."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, obs):
        self.seen.append(obs)
        return self.inner(obs)


class Table(torch.nn.Module):
    """A policy of one state per row, whose logits are its weights."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, obs):
        return self.logits[obs]


# Ratio ρ, advantage A, and by hand with ε = 0.2: the objective min(ρA, clip(ρ)A) and its derivative by log π(a), ρA or none.
CLIPPED = [(0.5, 1, 0.5, 0.5), (0.9, 1, 0.9, 0.9), (1.1, 1, 1.1, 1.1), (1.5, 1, 1.2, 0), (3.0, 2, 2.4, 0),
           (0.5, -1, -0.8, 0), (0.9, -1, -0.9, -0.9), (1.1, -1, -1.1, -1.1), (1.5, -1, -1.5, -1.5), (3.0, -2, -6.0, -6.0)]


@pytest.mark.parametrize("ratio, adv, objective, slope", CLIPPED)
def test_ppo_clips_what_it_should(ratio, adv, objective, slope):
    policy = Table(torch.tensor([[0.3, -0.4, 0.1]], dtype=torch.float64))
    p = policy.logits.detach().softmax(-1)[0]
    one = torch.ones(1, 1, dtype=torch.float64)
    batch = Batch(torch.zeros(1, 1, dtype=torch.long), torch.tensor([[1]]), one.bool(), (p[1] / ratio).log() * one, adv * one, one)
    move, stats = sgd_move(ppo, policy, batch)
    assert stats["loss"] == pytest.approx(-objective)
    expected = slope * (torch.eye(3, dtype=torch.float64)[1] - p)  # ∂ log π(a) / ∂ logits
    torch.testing.assert_close(move, expected)
    assert slope or (move == 0).all()  # not nearly: clipped is clipped
    assert stats["clip_fraction"] == float(not 0.8 <= ratio <= 1.2)


def test_ppo_stops_at_the_target_kl(policy):
    batch = make_batch(policy)
    _, free = sgd_move(ppo, policy, batch, epochs=50, minibatches=2, clip=1e9)
    _, held = sgd_move(ppo, policy, batch, epochs=50, minibatches=2, clip=1e9, target_kl=0.01)
    assert free["steps"] == 100 and 1 <= held["steps"] < 100 and held["kl_update"] < free["kl_update"]
    watched = Watched(policy)
    stats = ppo(watched, batch, torch.optim.SGD(policy.parameters(), 1.0), config(epochs=50, clip=1e9, target_kl=0.01), generator())
    assert len(watched.seen) == 1 + stats["steps"] + 1 + 1  # old policy; steps; the look that ended it; how far it came


def test_ppo_compares_each_row_with_its_own_old_policy(policy):
    """A policy that does not move has no KL, on no minibatch; other rows' distributions would have."""
    still = torch.optim.SGD(policy.parameters(), 0.0)
    assert ppo(policy, make_batch(policy), still, config(epochs=3, minibatches=3, target_kl=1e-9), generator())["steps"] == 9


def test_ppo_always_takes_a_step(policy):
    assert sgd_move(ppo, policy, make_batch(policy), epochs=5, target_kl=-1.0)[1]["steps"] == 1


@pytest.mark.parametrize("update", [reinforce, ppo, trpo, fit_critic])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e308])
def test_what_is_not_finite_moves_no_weight(policy, update, value):
    model, batch = Critic(policy.config, policy.float()).double() if update is fit_critic else policy, make_batch(policy.double())
    batch.advantages[0, batch.mask[0]] = batch.returns[0, batch.mask[0]] = value
    before = weights(model)
    with pytest.raises(FloatingPointError, match="the (loss|surrogate|norm of the gradient) is (nan|inf|-inf)"):
        update(model, batch, torch.optim.SGD(model.parameters(), 1.0), config(), generator())
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("update", [reinforce, ppo, trpo])
def test_updates_see_the_actions_alone(policy, update):
    batch, dirty = make_batch(policy), make_batch(policy)
    dirty.advantages[~batch.mask], dirty.logprobs[~batch.mask] = 1e3, -3.0
    dirty.actions = batch.actions.masked_fill(~batch.mask, 0)
    (move, stats), (dirty_move, dirty_stats) = sgd_move(update, policy, batch), sgd_move(update, policy, dirty)
    torch.testing.assert_close(move, dirty_move)
    assert stats == pytest.approx(dirty_stats)


@pytest.mark.parametrize("update", [reinforce, ppo, trpo])
def test_reported_kl_is_the_kl_of_the_move(policy, update):
    batch, new = make_batch(policy), copy.deepcopy(policy)
    stats = update(new, batch, torch.optim.SGD(new.parameters(), 0.1), config(epochs=3, minibatches=2), generator())
    assert stats["kl_update"] == pytest.approx(mean_kl(policy, new, batch)) and stats["kl_update"] > 0


@pytest.mark.parametrize("update", [reinforce, ppo, trpo])
def test_temperature_is_part_of_the_policy(policy, update):
    """Training at temperature τ is training, at 1, the policy whose logits are divided by τ."""
    tau = 1.7

    class Divided(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, obs):
            return self.inner(obs) / tau

    batch = make_batch(policy, tau)
    torch.testing.assert_close(sgd_move(update, policy, batch, temperature=tau)[0], sgd_move(update, Divided(policy), batch)[0])


def test_reinforce_watches_the_kl_of_its_first_64_episodes(policy):
    batch, new = make_batch(policy), copy.deepcopy(policy)
    many = batch.rows(torch.arange(70) % B)
    stats = reinforce(new, many, torch.optim.SGD(new.parameters(), 0.1), config())
    assert stats["kl_update"] == pytest.approx(mean_kl(policy, new, many.rows(slice(64))))


# The critic.

def test_critic_fit_is_least_squares_on_the_actions(policy):
    batch = make_batch(policy)
    critic = Critic(policy.config).double()
    before, values = weights(critic), critic(batch.obs).detach()
    fit_critic(critic, batch, torch.optim.SGD(critic.parameters(), 0.5), config(), generator())
    # Values start at zero, so does their dependence on the trunk: the bias moves by minus half of d/db mean (b - G)² = G's mean.
    move = weights(critic) - before
    assert (values == 0).all()
    assert move[-1].item() == pytest.approx(batch.returns[batch.mask].mean().item())

    watched = Watched(critic)
    fit_critic(watched, batch, torch.optim.SGD(critic.parameters(), 0.0), config(epochs=7, critic_epochs=3, minibatches=2), generator())
    assert len(watched.seen) == 6
    optimizer = torch.optim.Adam(critic.parameters(), 0.01)
    losses = [fit_critic(critic, batch, optimizer, config(), generator())["critic_loss"] for _ in range(300)]
    assert losses[-1] < 0.1 * losses[0]


# Second order.

def test_conjugate_gradient_solves():
    n = 12
    M = torch.randn(n, n, generator=generator(), dtype=torch.float64)
    A, b = M @ M.T + 0.1 * torch.eye(n, dtype=torch.float64), torch.randn(n, generator=generator(1), dtype=torch.float64)
    x, r = conjugate_gradient(lambda v: A @ v, b, iters=50, tol=1e-24)
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-7)
    x, r = conjugate_gradient(lambda v: A @ v, b, iters=4)
    torch.testing.assert_close(r, b - A @ x)
    assert (x @ (b - r)).item() == pytest.approx((x @ A @ x).item())


def test_conjugate_gradient_needs_one_product_per_distinct_eigenvalue():
    A, products = torch.diag(torch.tensor([1.0, 1, 5, 5, 9], dtype=torch.float64)), []
    x, _ = conjugate_gradient(lambda v: products.append(1) or A @ v, torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close(A @ x, torch.ones(5, dtype=torch.float64))
    assert len(products) == 3


def test_conjugate_gradient_guards():
    def never(v):
        raise AssertionError("no product is needed for b = 0")
    x, r = conjugate_gradient(never, torch.zeros(3))
    assert (x == 0).all() and (r == 0).all()
    x, r = conjugate_gradient(lambda v: -v, torch.ones(3))  # negative curvature
    assert (x == 0).all() and (r == 1).all()
    x, r = conjugate_gradient(lambda v: torch.tensor([1.0, -1.0]) * v, torch.tensor([2.0, 1.0]))  # curvature turns: first step only
    assert x.isfinite().all() and r.isfinite().all()
    x, r = conjugate_gradient(lambda v: v * float("nan"), torch.ones(3))
    assert (x == 0).all()


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_fisher_vector_product_is_the_fisher_matrix(policy, temperature):
    batch = make_batch(policy, temperature)
    product, n = fisher_vector_product(policy, batch, temperature), len(weights(policy))
    F = torch.stack([product(e) for e in torch.eye(n, dtype=torch.float64)])
    expected = explicit_fisher(policy, batch, temperature)
    torch.testing.assert_close(F, expected)
    assert expected.abs().max() > 0.01
    assert torch.linalg.eigvalsh(F).min() > -1e-12


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_fisher_vector_product_is_the_hessian_of_the_kl(policy, temperature):
    """The textbook form: differentiate KL(π_old‖π_θ) twice at θ_old."""
    batch, params = make_batch(policy, temperature), list(policy.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        logits = policy(batch.obs) / temperature
    old = torch.distributions.Categorical(logits=logits.detach())
    kl = torch.distributions.kl_divergence(old, torch.distributions.Categorical(logits=logits))[batch.mask].mean()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(kl, params, create_graph=True)])
    assert kl.item() == 0 and gradient.abs().max() < 1e-12  # the KL is zero here, and so is its gradient; its Hessian is not
    product = fisher_vector_product(policy, batch, temperature)
    for seed in range(3):
        v = torch.randn(len(gradient), generator=generator(seed), dtype=torch.float64)
        hessian = torch.cat([h.reshape(-1) for h in torch.autograd.grad(gradient, params, v, retain_graph=True)])
        torch.testing.assert_close(product(v), hessian)
        assert hessian.norm() > 0.1


def test_kl_of_a_small_step_is_half_its_fisher_norm(policy):
    batch = make_batch(policy)
    product, n = fisher_vector_product(policy, batch), len(weights(policy))
    s = torch.nn.functional.normalize(torch.randn(n, generator=generator(), dtype=torch.float64), dim=0)
    errors = []
    for scale in (0.02, 0.01, 0.005):
        moved = copy.deepcopy(policy)
        torch.nn.utils.vector_to_parameters(weights(policy) + scale * s, moved.parameters())
        errors.append(abs(mean_kl(policy, moved, batch) - 0.5 * scale ** 2 * (s @ product(s)).item()))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1) and errors[1] / errors[2] == pytest.approx(8, rel=0.1)


def test_line_search_takes_the_first_that_gains_within_the_region():
    w = torch.zeros(2)
    step = torch.tensor([8.0, 0.0])
    found = line_search(lambda: (w[0], w[0] ** 2), [w], step, delta=5.0, backtracks=5)
    assert found == (2, 2.0, 4.0) and w.tolist() == [2, 0]
    w.zero_()
    assert line_search(lambda: (w[0], w[0] ** 2), [w], step, delta=5.0, backtracks=2) == (2, 2.0, 4.0)  # the last try counts
    w.zero_()
    assert line_search(lambda: (w[0] - 3, w[0] ** 2), [w], step, delta=5.0, backtracks=5) is None
    assert w.tolist() == [0, 0]
    assert line_search(lambda: (w[0], w[0] ** 2), [w], step, delta=5.0, backtracks=1) is None  # out of tries
    assert line_search(lambda: (w[0] * float("nan"), w[0] * 0), [w], step, delta=5.0, backtracks=5) is None


def test_trpo_steps_along_the_natural_gradient_to_the_edge(policy):
    batch, new, delta, damping = make_batch(policy), copy.deepcopy(policy), 1e-4, 1e-2
    stats = trpo(new, batch, None, config(delta=delta, damping=damping, cg_iters=200), generator())
    F = explicit_fisher(policy, batch)
    F += damping * torch.eye(len(F), dtype=torch.float64)
    g = explicit_gradient(policy, batch)
    x = torch.linalg.solve(F, g)
    step = (2 * delta / (x @ F @ x)).sqrt() * x
    error = weights(new) - weights(policy) - step * 0.5 ** stats["halvings"]
    assert error.norm() < 1e-3 * step.norm()
    assert stats["step_norm"] == pytest.approx((weights(new) - weights(policy)).norm().item())
    assert stats["grad_norm"] == pytest.approx(g.norm().item())
    assert stats["loss"] == pytest.approx(-surrogate(policy, policy, batch))


def test_trpo_scales_even_an_unfinished_direction_to_the_edge(policy):
    batch, new, delta, damping = make_batch(policy), copy.deepcopy(policy), 1e-4, 1e-2
    stats = trpo(new, batch, None, config(delta=delta, damping=damping, cg_iters=2), generator())
    step = (weights(new) - weights(policy)) * 2 ** stats["halvings"]
    F = explicit_fisher(policy, batch)
    F += damping * torch.eye(len(F), dtype=torch.float64)
    assert (0.5 * step @ F @ step).item() == pytest.approx(delta)
    g = explicit_gradient(policy, batch)
    span = torch.stack([g, F @ g], 1)  # two iterations minimise the error over this Krylov space, in the norm of F
    x = span @ torch.linalg.solve(span.T @ F @ span, span.T @ g)
    torch.testing.assert_close(step / step.norm(), x / x.norm(), rtol=1e-5, atol=1e-8)
    assert stats["cg_residual"] == pytest.approx(((g - F @ x).norm() / g.norm()).item(), rel=1e-4) and stats["cg_residual"] > 0.01


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("delta, fraction", [(0.003, 1.0), (0.3, 1.0), (0.03, 0.4)])
def test_an_accepted_trpo_step_keeps_its_promises(policy, seed, delta, fraction):
    """Over all episodes, also where Fisher products have seen but some of them."""
    batch, new = make_batch(policy, seed=seed), copy.deepcopy(policy)
    stats = trpo(new, batch, None, config(delta=delta, fisher_fraction=fraction), generator())
    assert stats["accepted"] == 1
    assert 0 < mean_kl(policy, new, batch) <= delta * (1 + 1e-9)
    assert stats["kl_update"] == pytest.approx(mean_kl(policy, new, batch))
    gain = surrogate(policy, new, batch) - surrogate(policy, policy, batch)
    assert gain > 0 and stats["gain"] == pytest.approx(gain)


class Rewritten(torch.nn.Module):
    """A table of logits for S states, the last action's held at 0, in other coordinates w: its S (A-1) free logits are M w."""

    def __init__(self, M, logits):
        super().__init__()
        self.M, self.w = M, torch.nn.Parameter(torch.linalg.solve(M, logits.reshape(-1)))
        self.shape = logits.shape

    def forward(self, obs):
        logits = (self.M @ self.w).view(self.shape)
        return torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)[obs]


def test_the_natural_gradient_does_not_depend_on_the_coordinates_and_the_plain_one_does():
    S, A = V, V
    logits = torch.randn(S, A - 1, generator=generator(3), dtype=torch.float64)
    mix = torch.randn(S * (A - 1), S * (A - 1), generator=generator(4), dtype=torch.float64) + 2 * torch.eye(S * (A - 1))
    batch = make_batch(Rewritten(torch.eye(S * (A - 1), dtype=torch.float64), logits))

    def move(update, M, **changes):
        """By how much the update moves the free logits."""
        policy = Rewritten(M, logits)
        batch.logprobs = chosen(log_probs(policy, batch.obs, 1.0), batch.actions).detach()
        update(policy, batch, torch.optim.SGD(policy.parameters(), 0.01), config(**changes), generator())
        return (policy.M @ policy.w.detach()).view_as(logits) - logits

    plain, plain_mixed = (move(reinforce, M) for M in (torch.eye(len(mix), dtype=torch.float64), mix))
    natural, natural_mixed = (move(trpo, M, damping=0.0, cg_iters=100, delta=1e-3) for M in (torch.eye(len(mix), dtype=torch.float64), mix))
    cosine = lambda a, b: torch.nn.functional.cosine_similarity(a.reshape(-1), b.reshape(-1), dim=0)
    assert (natural_mixed - natural).norm() < 1e-4 * natural.norm()  # direction and length, as far as CG goes
    assert cosine(plain, plain_mixed) < 0.9


def test_a_rejected_trpo_step_leaves_every_bit(policy, monkeypatch):
    policy = policy.float()
    batch = make_batch(policy)
    batch.advantages, before = batch.advantages.float(), weights(policy)
    monkeypatch.setattr("algos.kl_divergence", lambda p, q: torch.full(p.shape[:2], 1.0))  # every step seems to leave the region
    stats = trpo(policy, batch, None, config(), generator())
    assert stats["accepted"] == 0 and stats["halvings"] == 11 and stats["kl_update"] == stats["gain"] == stats["step_norm"] == 0
    assert torch.equal(weights(policy), before)


def test_trpo_without_a_gradient_does_not_move(policy):
    batch, before = make_batch(policy), weights(policy)
    batch.advantages = torch.zeros_like(batch.advantages)
    stats = trpo(policy, batch, None, config(), generator())
    assert stats["accepted"] == 0 and torch.equal(weights(policy), before)


def test_trpo_fisher_fraction_takes_a_random_part(policy):
    batch, parts = make_batch(policy), set()
    for seed in range(5):
        watched = Watched(copy.deepcopy(policy))
        trpo(watched, batch, None, config(fisher_fraction=0.4), generator(seed))
        sizes = [len(obs) for obs in watched.seen]
        assert sizes[0] == B and sizes[-1] == B and 3 in sizes and set(sizes) == {3, B}  # 0.4 of 6 episodes, rounded up
        parts.add(str(next(obs for obs in watched.seen if len(obs) == 3).tolist()))
    assert len(parts) > 1


def test_a_weight_without_influence_has_no_part_in_fisher_and_stays(policy):
    batch, n = make_batch(policy), len(weights(policy))
    alone = fisher_vector_product(policy, batch)(torch.ones(n, dtype=torch.float64))
    policy.unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    product = fisher_vector_product(policy, batch)(torch.ones(n + 3, dtype=torch.float64))
    position = [name for name, _ in policy.named_parameters()].index("unused")
    before = sum(p.numel() for p in list(policy.parameters())[:position])
    assert (product[before:before + 3] == 0).all()
    torch.testing.assert_close(torch.cat([product[:before], product[before + 3:]]), alone)
    assert trpo(policy, batch, None, config(), generator())["accepted"] == 1 and (policy.unused == 1).all()


def test_frozen_weights_stay(policy):
    policy.transformer.wpe.weight.requires_grad_(False)
    frozen, batch = policy.transformer.wpe.weight.clone(), make_batch(policy)
    assert trpo(policy, batch, None, config(), generator())["accepted"] == 1
    assert torch.equal(policy.transformer.wpe.weight, frozen)
