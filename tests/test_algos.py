import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from algos import (
    Batch,
    action_log_probs,
    check_finite,
    conjugate_gradient,
    entropy,
    fisher_vector_product,
    fit_critic,
    flatten,
    kl_divergence,
    line_search,
    log_probs,
    mean_gradient,
    mean_kl,
    micro_batches,
    minibatches,
    ppo,
    reinforce,
    trpo,
)
from model import GPT, Critic, GPTConfig

V, B, T = 4, 6, 5
CONFIG = dict(temperature=1.0, max_grad_norm=1e9, clip=0.2, epochs=1, minibatches=1, target_kl=1e9,
              delta=0.01, cg_iters=10, damping=0.1, fisher_fraction=1.0, critic_epochs=1, micro_batch=1024,
              kl_coef=0.1)
UPDATES = [reinforce, ppo, trpo]


def config(**changes):
    return SimpleNamespace(**CONFIG | changes)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def eye(n):
    return torch.eye(n, dtype=torch.float64)


@pytest.fixture
def policy():
    """A GPT small enough for its Fisher matrix to be written down; its weights are far from their start."""
    policy = GPT(GPTConfig(vocab_size=V, block_size=T, n_layer=1, n_head=2, n_embd=4), generator()).double()
    for i, p in enumerate(policy.parameters()):
        p.data += 0.3 * rand(*p.shape, seed=i)
    return policy


class Divided(torch.nn.Module):
    """The policy whose logits are those of another, divided by a temperature."""

    def __init__(self, inner, temperature):
        super().__init__()
        self.inner, self.temperature = inner, temperature

    def forward(self, obs):
        return self.inner(obs) / self.temperature


class Table(torch.nn.Module):
    """A policy whose observations are indices of states; its weights are the states' logits."""

    def __init__(self, logits):
        super().__init__()
        self.logits = torch.nn.Parameter(logits)

    def forward(self, obs):
        return self.logits[obs]


class Linear(torch.nn.Module):
    """A critic whose values are linear in what it sees, (B, T, n)."""

    def __init__(self, n):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(n, dtype=torch.float64))

    def forward(self, obs):
        return obs @ self.w


class Recorder(torch.nn.Module):
    """A model that records the observations it is given."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.seen = inner, []

    def forward(self, obs):
        self.seen.append(obs)
        return self.inner(obs)


def make_batch(policy, temperature=1.0, seed=1):
    tokens = torch.randint(V, (B, T + 1), generator=generator(seed))
    obs, actions = tokens[:, :-1], tokens[:, 1:]
    start = torch.tensor([0, 1, 2, 0, 0, 3])[:, None]
    end = torch.tensor([5, 5, 4, 2, 1, 4])[:, None]
    mask = (torch.arange(T) >= start) & (torch.arange(T) < end)
    advantages, targets, returns = rand(3, B, T, seed=seed + 1)
    with torch.no_grad():
        logprobs = action_log_probs(log_probs(policy, obs, temperature), actions)
    return Batch(obs, actions, mask, logprobs, advantages, targets, torch.zeros_like(returns), returns,
                 ref_logprobs=2 * logprobs)


def action_states(batch):
    return batch.mask.nonzero().tolist()


def weights(model):
    return flatten(model.parameters()).detach().clone()


def run(update, model, batch, optimizer=None, **changes):
    return update(model, batch, optimizer, config(**changes), generator())


def sgd(model, lr=1.0):
    return torch.optim.SGD(model.parameters(), lr)


def move(update, policy, batch, **changes):
    """What the update adds to the weights under plain gradient steps of rate 1, and its diagnostics."""
    policy = copy.deepcopy(policy)
    before = weights(policy)
    for p in policy.parameters():
        p.grad = torch.ones_like(p)  # of an earlier update
    stats = run(update, policy, batch, sgd(policy), **changes)
    return weights(policy) - before, stats


# The truths that updates are compared with: sums over states and actions, one at a time.

def score_functions(policy, batch):
    """For each action state: the probabilities (A,) and the scores ∇ log π(a|s) (A, n) of all actions."""
    logp = log_probs(policy, batch.obs, 1.0)
    params = list(policy.parameters())
    for b, t in action_states(batch):
        scores = [flatten(torch.autograd.grad(logp[b, t, a], params, retain_graph=True)) for a in range(V)]
        yield logp[b, t].detach().exp(), torch.stack(scores)


def explicit_fisher(policy, batch):
    """E over states and actions of ∇log π ∇log πᵀ."""
    terms = [(p[:, None] * s).T @ s for p, s in score_functions(policy, batch)]
    return sum(terms) / len(terms)


def explicit_gradient(policy, batch):
    """The policy gradient E[∇log π A]."""
    terms = [scores[batch.actions[b, t]] * batch.advantages[b, t]
             for (b, t), (_, scores) in zip(action_states(batch), score_functions(policy, batch))]
    return sum(terms) / len(terms)


def probabilities(policy, batch):
    return log_probs(policy, batch.obs, 1.0).detach().exp()


def explicit_kl(old, new, batch):
    """The mean of KL(old‖new) over the action states."""
    p, q = probabilities(old, batch), probabilities(new, batch)
    kls = [sum(p[b, t, a] * (p[b, t, a] / q[b, t, a]).log() for a in range(V)).item()
           for b, t in action_states(batch)]
    return sum(kls) / len(kls)


def explicit_surrogate(old, new, batch):
    """The mean of ρ A over the actions."""
    p, q = probabilities(old, batch), probabilities(new, batch)
    actions = [(b, t, batch.actions[b, t]) for b, t in action_states(batch)]
    terms = [(q[b, t, a] / p[b, t, a] * batch.advantages[b, t]).item() for b, t, a in actions]
    return sum(terms) / len(terms)


# Distributions.

def test_entropy_and_kl_are_those_of_torch():
    logp, logq = rand(2, 3, 2, 7).log_softmax(-1)
    p, q = torch.distributions.Categorical(logits=logp), torch.distributions.Categorical(logits=logq)
    torch.testing.assert_close(entropy(logp), p.entropy())
    torch.testing.assert_close(kl_divergence(logp, logq), torch.distributions.kl_divergence(p, q))
    assert (kl_divergence(logp, logp) == 0).all()


@pytest.mark.parametrize("distance", [0, 1e-7, 1e-6, 1e-4, 1, 100])
def test_the_exact_kl_is_never_negative(distance):
    logits, change = torch.randn(2, 64, 32, 257, generator=generator())
    kl = kl_divergence(logits.log_softmax(-1), (logits + distance * change).log_softmax(-1))
    assert (kl >= 0).all() and kl.max() < 1000


# Every update.

@pytest.mark.parametrize("update", [reinforce, ppo])
def test_first_step_is_the_policy_gradient(policy, update):
    batch = make_batch(policy)
    step, stats = move(update, policy, batch)
    expected = explicit_gradient(policy, batch)
    torch.testing.assert_close(step, expected)
    assert stats["grad_norm"] == pytest.approx(expected.norm().item())


@pytest.mark.parametrize("update", UPDATES)
def test_temperature_is_part_of_the_policy(policy, update):
    batch = make_batch(policy, 1.7)
    ours, stats = move(update, policy, batch, temperature=1.7)
    expected, expected_stats = move(update, Divided(policy, 1.7), batch)
    torch.testing.assert_close(ours, expected)
    assert stats == pytest.approx(expected_stats)


@pytest.mark.parametrize("update", UPDATES)
def test_updates_use_the_actions_alone(policy, update):
    batch, dirty = make_batch(policy), make_batch(policy)
    dirty.advantages[~batch.mask] = 1e3
    dirty.logprobs[~batch.mask] = -3.0
    dirty.actions = batch.actions.masked_fill(~batch.mask, 0)
    (step, stats), (dirty_step, dirty_stats) = move(update, policy, batch), move(update, policy, dirty)
    torch.testing.assert_close(step, dirty_step)
    assert stats == pytest.approx(dirty_stats)


def test_the_kl_that_trpo_reports_is_that_of_the_update(policy):
    batch, new = make_batch(policy), copy.deepcopy(policy)
    stats = run(trpo, new, batch)
    assert stats["kl_update"] == pytest.approx(explicit_kl(policy, new, batch))
    assert stats["kl_update"] > 0


def test_a_long_gradient_is_clipped_and_its_norm_reported(policy):
    step, stats = move(reinforce, policy, make_batch(policy), max_grad_norm=1e-3)
    assert step.norm().item() == pytest.approx(1e-3, rel=1e-3)
    assert stats["grad_norm"] > 0.01


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_check_finite_names_the_quantity_that_is_not(value):
    check_finite({"first": 0.0, "second": -1e300})
    with pytest.raises(FloatingPointError, match=f"the second one is {value}"):
        check_finite({"first": 0.0, "second one": value})


def test_an_infinite_gradient_of_a_finite_loss_moves_no_weight():
    model = Linear(1)
    batch = Batch(*(torch.ones(1, 1) for _ in range(2)), torch.ones(1, 1, dtype=torch.bool))
    with pytest.raises(FloatingPointError, match="the norm of the gradient is inf"):
        mean_gradient(model, lambda part: {"loss": model.w.sqrt().expand(1, 1)}, batch, config(), 1.0)
    assert model.w.item() == 0


@pytest.mark.parametrize("shape", [(), (2,), (1, 2), (2, 1), (2, 2, 1)])
def test_a_loss_of_another_shape_than_the_actions_is_refused(shape):
    """Some would be broadcast over the actions, and train in silence."""
    model, mask = Linear(1), torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"loss must have the shape of the actions, \(2, 2\)"):
        mean_gradient(model, lambda part: {"loss": model.w[0].expand(shape)}, Batch(*[mask] * 3), config(), 1)


@pytest.mark.parametrize("update", [*UPDATES, fit_critic])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308])
def test_a_loss_that_is_not_finite_moves_no_weight(policy, update, value):
    model = Critic(policy.config, policy).double() if update is fit_critic else policy
    batch, before = make_batch(policy), weights(model)
    batch.advantages[0, batch.mask[0]] = value
    batch.targets[0, batch.mask[0]] = value
    message = "the (loss|surrogate|norm of the gradient) is (nan|inf|-inf)"
    with pytest.raises(FloatingPointError, match=message):
        run(update, model, batch, sgd(model))
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("update", UPDATES)
def test_forbidden_actions_of_logit_minus_infinity_count_as_probability_zero(policy, update):
    """The updates, entropy and KL are those of a policy without that action."""
    class Masked(torch.nn.Module):
        def __init__(self, low):
            super().__init__()
            self.policy, self.low = copy.deepcopy(policy), low

        def forward(self, obs):
            return self.policy(obs).index_fill(-1, torch.tensor([0]), self.low)

    batch, moved, found = make_batch(policy), [], []
    batch.actions = batch.actions.clamp(min=1).masked_fill(~batch.mask, 0)  # a prompt may have such a token
    for low in (-math.inf, -1e4):  # exp(-1e4) is zero, too
        masked, old = Masked(low), Masked(low)
        batch.logprobs = action_log_probs(log_probs(old, batch.obs, 1.0), batch.actions).detach()
        batch.logprobs = batch.logprobs.masked_fill(~batch.mask, 0)  # as `run_episodes` does
        found.append(run(update, masked, batch, sgd(masked)))
        moved.append(weights(masked))
        found[-1]["kl"] = mean_kl(old, masked, batch, config())
        found[-1]["entropy"] = entropy(log_probs(masked, batch.obs, 1.0)).sum().item()
    assert found[0] == pytest.approx(found[1]) and found[0]["kl"] > 0
    torch.testing.assert_close(*moved)


# Parts.

def test_micro_batches_hold_every_action_once_in_parts_of_like_length(policy):
    batch = make_batch(policy)
    for size in (1, 7, 10, 10 ** 6):
        parts = list(micro_batches(batch, size))
        assert sorted(torch.cat([index for index, _ in parts]).tolist()) == list(range(B))
        assert all(len(part.mask) == 1 or part.mask.numel() <= size for _, part in parts)
        assert sum(part.mask.sum() for _, part in parts) == batch.mask.sum()
        for index, part in parts:
            assert part.mask[:, -1].any()  # no column after the longest row's end
            assert torch.equal(part.targets, batch.targets[index, :part.mask.shape[1]])
        lengths = [part.mask.shape[1] for _, part in parts]
        assert lengths == sorted(lengths, reverse=True)
    assert [len(part.mask) for _, part in micro_batches(batch, 1)] == [1] * B
    batch.mask[2] = False  # an episode without an action
    assert sum(len(part.mask) for _, part in micro_batches(batch, 7)) == B


@pytest.mark.parametrize("size", [1, 7, 12])
@pytest.mark.parametrize("update", [*UPDATES, fit_critic])
def test_parts_and_the_whole_give_the_same_update(policy, update, size):
    model = Critic(policy.config, policy).double() if update is fit_critic else policy
    batch = make_batch(policy)
    (whole, stats), (parts, part_stats) = (
        move(update, model, batch, micro_batch=n, epochs=2, minibatches=2, critic_epochs=2)
        for n in (10 ** 6, size))
    assert whole.norm() > 1e-3
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-9)
    assert part_stats == pytest.approx(stats, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("size", [1, 7, 12])
def test_parts_and_the_whole_give_the_same_fisher_product_and_kl(policy, size):
    batch, new = make_batch(policy), copy.deepcopy(policy)
    v = rand(len(weights(policy)))
    torch.nn.utils.vector_to_parameters(weights(policy) + 0.1 * v, new.parameters())
    product, whole = (fisher_vector_product(policy, batch, config(micro_batch=n))(v) for n in (size, 10 ** 6))
    torch.testing.assert_close(product, whole, rtol=1e-6, atol=1e-9)
    kl = mean_kl(policy, new, batch, config(micro_batch=size))
    assert kl == pytest.approx(explicit_kl(policy, new, batch))


# PPO.

# Ratio ρ, advantage A and, by hand with ε = 0.2: the objective min(ρA, clip(ρ)A) and its derivative by log π,
# which is ρA or nothing.
CLIP_TABLE = [(0.5, 1, 0.5, 0.5), (0.9, 1, 0.9, 0.9), (1.1, 1, 1.1, 1.1), (1.5, 1, 1.2, 0), (3.0, 2, 2.4, 0),
              (0.5, -1, -0.8, 0), (0.9, -1, -0.9, -0.9), (1.1, -1, -1.1, -1.1), (1.5, -1, -1.5, -1.5),
              (3.0, -2, -6.0, -6.0)]


@pytest.mark.parametrize("ratio, advantage, objective, slope", CLIP_TABLE)
def test_clipped_ratios_have_no_gradient(ratio, advantage, objective, slope):
    policy = Table(torch.tensor([[0.3, -0.4, 0.1]], dtype=torch.float64))
    p = policy.logits.detach().softmax(-1)[0]
    state, action = torch.tensor([[0]]), torch.tensor([[1]])
    column = lambda x: torch.as_tensor(x, dtype=torch.float64).view(1, 1)
    batch = Batch(state, action, column(1).bool(), column((p[1] / ratio).log()), column(advantage), column(0),
                  column(0))
    step, stats = move(ppo, policy, batch)
    assert stats["loss"] == pytest.approx(-objective)
    assert stats["clip_fraction"] == float(not 0.8 <= ratio <= 1.2)
    torch.testing.assert_close(step, slope * (eye(3)[1] - p))  # ∂ log π(a) / ∂ logits = 1_a - p
    if slope == 0:
        assert (step == 0).all()


def test_minibatches_hold_every_row_once_an_epoch_in_new_orders():
    batch = Batch(*(torch.arange(10)[:, None] for _ in range(7)), scores=torch.arange(10))
    parts = list(minibatches(batch, 3, 4, generator()))
    assert len(parts) == 12
    assert {len(mb.obs) for mb in parts} == {2, 3}
    for mb in parts:
        assert all(torch.equal(mb.obs.flatten(), x.flatten()) for x in vars(mb).values() if x is not None)
    epochs = [torch.cat([mb.scores for mb in parts[i:i + 4]]).tolist() for i in (0, 4, 8)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in [*epochs, range(10)]}) == 4
    same_seed = [mb.scores.tolist() for mb in minibatches(batch, 3, 4, generator())]
    assert same_seed == [mb.scores.tolist() for mb in parts]


def test_ppos_first_step_on_a_minibatch_is_reinforce_on_it(policy):
    batch = make_batch(policy)
    first = next(minibatches(batch, 1, 3, generator()))
    step, stats = move(ppo, policy, batch, minibatches=3, target_kl=1e-12)
    assert stats["steps"] == 1
    torch.testing.assert_close(step, move(reinforce, policy, first)[0])


def test_a_policy_that_stands_still_has_no_kl_on_any_minibatch(policy):
    """Each row is compared with its own old log-probabilities; those of other rows would differ."""
    batch = make_batch(policy)
    stats = run(ppo, policy, batch, sgd(policy, 0.0), epochs=3, minibatches=3, target_kl=1e-9)
    assert stats["steps"] == 9
    parts = list(minibatches(batch, 3, 3, generator()))
    losses = [-explicit_surrogate(policy, policy, mb) for mb in parts]
    assert stats["loss"] == pytest.approx(sum(losses) / 9)


def test_ppo_ends_once_the_kl_exceeds_its_target(policy):
    batch = make_batch(policy)
    first = copy.deepcopy(policy)
    run(ppo, first, batch, sgd(first))  # one step on all episodes
    logprobs = action_log_probs(log_probs(first, batch.obs, 1.0), batch.actions)
    log_ratio = (logprobs - batch.logprobs)[batch.mask]
    kl = (log_ratio.exp() - 1 - log_ratio).mean().item()
    assert kl > 0.01
    assert move(ppo, policy, batch, epochs=2, target_kl=kl * (1 + 1e-6))[1]["steps"] == 2
    for target in (kl * (1 - 1e-6), -1.0):
        recorder = Recorder(copy.deepcopy(policy))
        stats = run(ppo, recorder, batch, sgd(recorder), epochs=5, target_kl=target)
        assert stats["steps"] == 1
        torch.testing.assert_close(list(recorder.parameters()), list(first.parameters()))
        assert len(recorder.seen) == 2  # the step, and the KL that ends the update


@pytest.mark.parametrize("before, after, kl, steps", [(0.5, 0.99, 1.614, 1), (0.01, 0.5, 0.637, 3)])
def test_ppo_ends_by_the_kl_from_the_old_policy_to_the_new_one(before, after, kl, steps):
    """Of two actions: KL(old‖new) is above the target of 1 and KL(new‖old) below it, and the reverse.

    Each action occurs as often as it is likely, so the estimate is exact.
    """
    log_odds = lambda p: math.log(p / (1 - p))
    policy = Table(torch.tensor([[log_odds(before), 0.0]], dtype=torch.float64))
    actions = torch.ones(100, 1, dtype=torch.long)
    actions[:round(100 * before)] = 0
    logprobs = torch.where(actions == 0, math.log(before), math.log(1 - before)).double()
    advantages = (actions == 0) / before  # their mean gradient is the first action's
    zero = torch.zeros_like(actions)
    batch = Batch(zero, actions, torch.ones_like(actions, dtype=torch.bool), logprobs, advantages.double())
    rate = (log_odds(after) - log_odds(before)) / (2 * (1 - before))  # the step by ∇log π(a) = 1_a - p
    stats = run(ppo, policy, batch, sgd(policy, rate), epochs=3, target_kl=1.0)
    assert policy.logits.softmax(-1)[0, 0].item() == pytest.approx(after)
    moved = before * math.log(before / after) + (1 - before) * math.log((1 - before) / (1 - after))
    assert (stats["steps"], moved) == (steps, pytest.approx(kl, abs=1e-3))


def test_ppo_ends_where_the_policy_is_no_longer_a_number():
    policy = Table(rand(V, V))
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        run(ppo, policy, make_batch(policy), sgd(policy, math.inf), epochs=5)


# The critic.

def test_critic_fit_is_least_squares_on_the_actions(policy):
    batch = make_batch(policy)
    batch.obs = rand(B, T, 3, seed=7)
    X, y, G = batch.obs[batch.mask], batch.targets[batch.mask], batch.returns[batch.mask]
    critic = Linear(3)
    step, _ = move(fit_critic, critic, batch)
    variance = G.var(unbiased=False)
    torch.testing.assert_close(step, 2 * X.T @ y / len(y) / variance)  # minus the loss's gradient at w = 0
    run(fit_critic, critic, batch, sgd(critic, 0.1), critic_epochs=300)
    torch.testing.assert_close(critic.w.detach(), torch.linalg.lstsq(X, y[:, None]).solution[:, 0])


def test_the_critic_is_judged_by_monte_carlo_returns_before_it_is_trained(policy):
    batch = make_batch(policy)
    critic = Linear(3)
    batch.obs = rand(B, T, 3, seed=7)
    G = batch.returns[batch.mask]
    for values, loss, explained in [
            (torch.zeros_like(G), (G ** 2).mean() / G.var(unbiased=False), 0), (G, 0, 1), (G - 3, None, 1),
            (G / 2, None, 0.75), (-G, None, -3), (G.mean().expand_as(G), 1, 0)]:
        batch.values[batch.mask] = values
        stats = run(fit_critic, critic, batch, sgd(critic, 0.1))
        assert stats["explained_variance"] == pytest.approx(explained, abs=1e-9)
        if loss is not None:
            assert stats["critic_loss"] == pytest.approx(float(loss))


def test_critic_fit_passes_over_the_minibatches(policy):
    batch = make_batch(policy)
    critic = Recorder(Critic(policy.config, policy).double())
    run(fit_critic, critic, batch, sgd(critic, 0.0), epochs=7, critic_epochs=3, minibatches=2)
    parts = list(minibatches(batch, 3, 2, generator()))
    assert len(critic.seen) == len(parts) == 6
    for obs, mb in zip(critic.seen, parts):
        longest = obs.shape[1]
        assert sorted(obs.tolist()) == sorted(mb.obs[:, :longest].tolist()) and not mb.mask[:, longest:].any()


# Conjugate gradient.

def test_conjugate_gradient_solves_the_equation():
    n = 12
    M, b = rand(n, n), rand(n, seed=1)
    A = M @ M.T + 0.1 * eye(n)
    x, _ = conjugate_gradient(lambda v: A @ v, b, iters=50, tol=1e-24)
    torch.testing.assert_close(x, torch.linalg.solve(A, b), rtol=1e-7, atol=1e-7)
    x, r = conjugate_gradient(lambda v: A @ v, b, iters=4)
    torch.testing.assert_close(r, b - A @ x)
    assert r.norm() > 0.01


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_conjugate_gradient_needs_one_product_for_each_distinct_eigenvalue(scale):
    eigenvalues, products = torch.tensor([1.0, 1, 5, 5, 9], dtype=torch.float64), []
    b = scale * torch.ones(5, dtype=torch.float64)
    x, _ = conjugate_gradient(lambda v: products.append(v) or eigenvalues * v, b)
    torch.testing.assert_close(x, b / eigenvalues, rtol=1e-7, atol=0)
    assert len(products) == 3


def test_conjugate_gradient_stops_without_positive_curvature():
    def never(v):
        raise AssertionError("b = 0 needs no product")

    x, r = conjugate_gradient(never, torch.zeros(3))
    assert (x == 0).all() and (r == 0).all()
    for matvec in (lambda v: -v, lambda v: 0 * v, lambda v: v * math.nan):
        x, r = conjugate_gradient(matvec, torch.ones(3))
        assert (x == 0).all() and (r == 1).all()
    A = torch.tensor([1.0, -1.0])  # the curvature is positive along b, negative along the second direction
    x, r = conjugate_gradient(lambda v: A * v, torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(x, 5 / 3 * torch.tensor([2.0, 1.0]))  # bᵀb / bᵀA b = 5 / 3
    torch.testing.assert_close(r, torch.tensor([2.0, 1.0]) - A * x)


# The Fisher matrix.

@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_fisher_vector_product_is_that_of_the_explicit_matrix(policy, temperature):
    batch = make_batch(policy)
    product = fisher_vector_product(policy, batch, config(temperature=temperature))
    F = torch.stack([product(e) for e in eye(len(weights(policy)))])
    expected = explicit_fisher(Divided(policy, temperature), batch)
    torch.testing.assert_close(F, expected)
    assert expected.abs().max() > 0.01
    assert torch.linalg.eigvalsh(F).min() > -1e-12


def test_with_log_probabilities_as_outputs_the_product_is_that_of_the_empirical_fisher_matrix(policy):
    batch = make_batch(policy)

    def outputs(part):
        logp = action_log_probs(log_probs(policy, part.obs, 1.0), part.actions).unsqueeze(-1)  # (b, T, 1)
        return logp, logp

    logp = action_log_probs(log_probs(policy, batch.obs, 1.0), batch.actions)[batch.mask]  # (n,)
    gradients = [flatten(torch.autograd.grad(x, list(policy.parameters()), retain_graph=True)) for x in logp]
    expected = sum(torch.outer(g, g) for g in gradients) / len(gradients)
    product = fisher_vector_product(policy, batch, config(micro_batch=9), outputs)
    torch.testing.assert_close(torch.stack([product(e) for e in eye(len(expected))]), expected)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_fisher_vector_product_is_the_hessian_of_the_kl(policy, temperature):
    """The KL from the old policy, differentiated twice at the old policy, where its gradient is zero."""
    batch, params = make_batch(policy), list(policy.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        logits = policy(batch.obs) / temperature
    old, new = (torch.distributions.Categorical(logits=x) for x in (logits.detach(), logits))
    kl = torch.distributions.kl_divergence(old, new)[batch.mask].mean()
    gradient = flatten(torch.autograd.grad(kl, params, create_graph=True))
    assert kl.item() == 0 and gradient.abs().max() < 1e-12
    product = fisher_vector_product(policy, batch, config(temperature=temperature))
    for seed in range(3):
        v = rand(len(gradient), seed=seed)
        hessian = flatten(torch.autograd.grad(gradient, params, v, retain_graph=True))
        torch.testing.assert_close(product(v), hessian)
        assert hessian.norm() > 0.1


def test_the_kl_of_a_small_step_is_half_its_fisher_norm(policy):
    batch, n = make_batch(policy), len(weights(policy))
    s = torch.nn.functional.normalize(rand(n), dim=0)
    sFs = (s @ fisher_vector_product(policy, batch, config())(s)).item()
    errors = []
    for scale in (0.02, 0.01, 0.005):
        new = copy.deepcopy(policy)
        torch.nn.utils.vector_to_parameters(weights(policy) + scale * s, new.parameters())
        errors.append(abs(explicit_kl(policy, new, batch) - 0.5 * scale ** 2 * sFs))
    assert errors[0] / errors[1] == pytest.approx(8, rel=0.1)  # of third order
    assert errors[1] / errors[2] == pytest.approx(8, rel=0.1)


def test_a_weight_without_influence_has_no_fisher_information_and_stays(policy):
    batch, n = make_batch(policy), len(weights(policy))
    alone = fisher_vector_product(policy, batch, config())(torch.ones(n, dtype=torch.float64))
    policy.unused = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    is_unused = flatten([torch.full_like(p, p is policy.unused) for p in policy.parameters()]).bool()
    together = fisher_vector_product(policy, batch, config())(torch.ones(n + 3, dtype=torch.float64))
    assert (together[is_unused] == 0).all()
    torch.testing.assert_close(together[~is_unused], alone)
    assert run(trpo, policy, batch)["accepted"] == 1
    assert (policy.unused == 1).all()


# TRPO.

def quadratic(offset=0.0, scale=1.0):
    """A weight w, a step of 8, and evaluate() with gain w + offset and KL w²; tries counts its calls."""
    w, tries = torch.zeros(2), []

    def evaluate():
        tries.append(w.tolist())
        return scale * w[0] + offset, w[0] ** 2

    return w, torch.tensor([8.0, 0.0]), evaluate, tries


@pytest.mark.parametrize("delta, backtracks", [(5.0, 5), (4.0, 5), (5.0, 2)])
def test_line_search_keeps_the_first_step_that_gains_within_the_trust_region(delta, backtracks):
    w, step, evaluate, tries = quadratic()
    assert line_search(evaluate, [w], step, delta, backtracks) == (2, 2.0, 4.0)
    assert w.tolist() == [2, 0]
    assert tries == [[8, 0], [4, 0], [2, 0]]


@pytest.mark.parametrize("change", [dict(offset=-3.0), dict(scale=0.0), dict(scale=math.nan)])
def test_line_search_without_a_gain_restores_the_weights(change):
    w, step, evaluate, tries = quadratic(**change)
    w += 0.1
    before = w.clone()
    assert line_search(evaluate, [w], step, delta=5.0) is None
    assert torch.equal(w, before)
    assert len(tries) == 11


def damped_fisher(policy, batch, damping):
    F = explicit_fisher(policy, batch)
    return F + damping * eye(len(F))


@pytest.mark.parametrize("delta, halved", [(1e-4, False), (0.3, True)])
def test_trpo_steps_along_the_natural_gradient_to_the_edge_of_the_trust_region(policy, delta, halved):
    batch, new, damping = make_batch(policy), copy.deepcopy(policy), 1e-2
    stats = run(trpo, new, batch, delta=delta, damping=damping, cg_iters=200)
    F, g = damped_fisher(policy, batch, damping), explicit_gradient(policy, batch)
    x = torch.linalg.solve(F, g)
    full = (2 * delta / (x @ F @ x)).sqrt() * x
    step = weights(new) - weights(policy)
    assert (stats["halvings"] > 0) == halved
    assert (step - full * 0.5 ** stats["halvings"]).norm() < 1e-3 * step.norm()
    assert stats["grad_norm"] == pytest.approx(g.norm().item())
    assert stats["loss"] == pytest.approx(-explicit_surrogate(policy, policy, batch))


def test_an_unfinished_solution_is_scaled_to_the_edge_of_the_trust_region_too(policy):
    """Two iterations give the best x in the span of g and F g, in the norm of F."""
    batch, new, delta, damping = make_batch(policy), copy.deepcopy(policy), 1e-4, 1e-2
    stats = run(trpo, new, batch, delta=delta, damping=damping, cg_iters=2)
    F, g = damped_fisher(policy, batch, damping), explicit_gradient(policy, batch)
    step = (weights(new) - weights(policy)) * 2 ** stats["halvings"]
    assert (0.5 * step @ F @ step).item() == pytest.approx(delta)
    span = torch.stack([g, F @ g], 1)
    x = span @ torch.linalg.solve(span.T @ F @ span, span.T @ g)
    torch.testing.assert_close(step / step.norm(), x / x.norm(), rtol=1e-5, atol=1e-8)
    residual = ((g - F @ x).norm() / g.norm()).item()
    assert stats["cg_relative_residual"] == pytest.approx(residual, rel=1e-4)
    assert residual > 0.01


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("delta, fraction", [(0.003, 1.0), (0.3, 1.0), (0.03, 0.4)])
def test_an_accepted_trpo_step_gains_within_the_trust_region(policy, seed, delta, fraction):
    """Over all episodes, also where Fisher products have seen but some of them."""
    batch, new = make_batch(policy, seed=seed), copy.deepcopy(policy)
    stats = run(trpo, new, batch, delta=delta, fisher_fraction=fraction)
    kl = explicit_kl(policy, new, batch)
    gain = explicit_surrogate(policy, new, batch) - explicit_surrogate(policy, policy, batch)
    assert stats["accepted"] == 1
    assert 0 < kl <= delta * (1 + 1e-9)
    assert gain > 0
    assert stats["kl_update"] == pytest.approx(kl)
    assert stats["surrogate_gain"] == pytest.approx(gain)
    assert stats["step_norm"] == pytest.approx((weights(new) - weights(policy)).norm().item())


def test_a_rejected_trpo_step_leaves_every_bit(policy, monkeypatch):
    policy = policy.float()
    batch, before = make_batch(policy), weights(policy)
    batch.advantages = batch.advantages.float()
    too_far = lambda old, new: torch.ones(old.shape[:2])
    monkeypatch.setattr("algos.kl_divergence", too_far)
    stats = run(trpo, policy, batch)
    assert torch.equal(weights(policy), before)
    assert stats["grad_norm"] > 0 and stats["cg_relative_residual"] > 0
    names = ("accepted", "halvings", "kl_update", "surrogate_gain", "step_norm")
    assert all(stats[name] == 0 for name in names)


@pytest.mark.parametrize("extremes", [
    dict(damping=0.0), dict(damping=0.0, cg_iters=50), dict(damping=0.0, fisher_fraction=1e-6, cg_iters=50),
    dict(delta=0.0), dict(damping=0.0, delta=0.0), dict(delta=10.0, damping=0.0)])
def test_trpo_stays_finite_and_within_the_trust_region_at_extremes(policy, extremes):
    policy = policy.float()
    for seed in range(5):
        batch, new = make_batch(policy, seed=seed), copy.deepcopy(policy)
        batch.advantages = batch.advantages.float()
        stats = run(trpo, new, batch, **extremes)
        assert all(map(math.isfinite, stats.values())) and weights(new).isfinite().all()
        assert stats["kl_update"] <= config(**extremes).delta
        assert mean_kl(policy, new, batch, config()) == pytest.approx(stats["kl_update"], abs=1e-6)


def test_trpo_without_a_gradient_does_not_move(policy):
    batch, before = make_batch(policy), weights(policy)
    batch.advantages = torch.zeros_like(batch.advantages)
    stats = run(trpo, policy, batch)
    assert stats["accepted"] == stats["cg_relative_residual"] == 0
    assert torch.equal(weights(policy), before)


def test_fisher_products_see_a_random_part_of_the_episodes(policy):
    batch, parts = make_batch(policy), set()
    for seed in range(5):
        recorder = Recorder(copy.deepcopy(policy))
        trpo(recorder, batch, None, config(fisher_fraction=0.4), generator(seed))
        everything, part, *rest = [sorted(obs.tolist()) for obs in recorder.seen]
        assert len(part) == 3  # 0.4 of 6 episodes, rounded up
        assert all(obs == sorted(batch.obs.tolist()) for obs in [everything, *rest])
        parts.add(str(part))
    assert len(parts) > 1


def test_frozen_weights_stay(policy):
    frozen, batch = policy.transformer.wpe.weight.requires_grad_(False), make_batch(policy)
    before = frozen.clone()
    assert run(trpo, policy, batch)["accepted"] == 1
    assert torch.equal(frozen, before)


# What sets the natural gradient apart.

class Coordinates(torch.nn.Module):
    """A table of logits in coordinates w: the last action's are 0, the others M w."""

    def __init__(self, M, logits):
        super().__init__()
        self.M, self.shape = M, logits.shape  # logits: (S, A-1)
        self.w = torch.nn.Parameter(torch.linalg.solve(M, logits.reshape(-1)))

    def forward(self, obs):
        logits = (self.M @ self.w).view(self.shape)
        return torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)[obs]


def test_the_natural_gradient_does_not_depend_on_the_coordinates_and_the_plain_one_does():
    n, logits = V * (V - 1), rand(V, V - 1, seed=3)
    mix = rand(n, n, seed=4) + 2 * eye(n)
    batch = make_batch(Coordinates(eye(n), logits))

    def change(update, M, **changes):
        """What the update adds to the logits."""
        policy = Coordinates(M, logits)
        run(update, policy, batch, sgd(policy, 0.01), **changes)
        return policy.M @ policy.w.detach() - logits.reshape(-1)

    plain, plain_mixed = (change(reinforce, M) for M in (eye(n), mix))
    exact = dict(damping=0.0, cg_iters=100, delta=1e-3)
    natural, natural_mixed = (change(trpo, M, **exact) for M in (eye(n), mix))
    assert (natural_mixed - natural).norm() < 1e-4 * natural.norm()
    assert torch.cosine_similarity(plain, plain_mixed, dim=0) < 0.9
