"""The policy gradient theorem, by enumeration: every episode that a tiny GPT can produce, with its probability.

The truth is the gradient, by autograd, of J(θ) = Σ p(τ) R(τ). What REINFORCE's loss gives for each single episode, weighted by
the episode's probability, must add up to it. `python tests/test_policy_gradient.py` prints what γ and λ cost and gain.
"""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from advantage import ADVANTAGES, token_rewards, whiten
from algos import Batch, chosen, flatten, ppo, reinforce, trpo
from model import GPT, Critic, GPTConfig

EOS, V, T = 2, 3, 4  # tokens 0 and 1, and the end; at most 4 of them after the prompt
PROMPT = [0]


def rand(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shaken(model, seed):
    for i, p in enumerate(model.parameters()):
        p.data = p.data.double() + 0.4 * rand(*p.shape, seed=100 * seed + i)
    return model


SHAPE = GPTConfig(vocab_size=V, block_size=T + 1, n_layer=1, n_head=2, n_embd=4)


def make_policy(seed=0):
    return shaken(GPT(SHAPE, torch.Generator().manual_seed(seed)), seed)


def make_critic(seed):
    return shaken(Critic(SHAPE, make_policy(seed).float()), seed)


def completions(prefix=()):
    if len(prefix) == T or prefix and prefix[-1] == EOS:
        return [prefix]
    return [c for a in range(V) for c in completions((*prefix, a))]


class World:
    """All N episodes as the rows of one batch, with rewards of every action drawn at random for what it follows."""

    def __init__(self, policy):
        all_of_them = completions()
        self.tokens = torch.tensor([[*PROMPT, *c, *[EOS] * (T - len(c))] for c in all_of_them])
        self.mask = torch.tensor([[t < len(c) for t in range(T)] for c in all_of_them])
        self.lengths = self.mask.sum(1)
        table = {prefix: rand(1, seed=sum((a + 1) * 5 ** i for i, a in enumerate(prefix))).item()
                 for c in all_of_them for prefix in [c[:t + 1] for t in range(len(c))]}
        self.rewards = torch.tensor([[table[c[:t + 1]] if t < len(c) else 0.0 for t in range(T)] for c in all_of_them],
                                    dtype=torch.float64)
        self.policy = policy

    def probabilities(self, policy):
        """p(τ) (N,) and the log-probabilities of the actions (N, T), differentiable."""
        logp = chosen(policy(self.tokens[:, :-1]).log_softmax(-1), self.tokens[:, 1:]) * self.mask
        return logp.sum(1).exp(), logp

    def exact(self, objective):
        """The gradient of an objective (p (N,), logp (N, T)) -> (), by autograd."""
        return flatten(torch.autograd.grad(objective(*self.probabilities(self.policy)), list(self.policy.parameters())))

    def values(self, gamma=1.0):
        """V(s_t) (N, T): the discounted reward to come, averaged over all episodes that share what was read so far."""
        p, _ = self.probabilities(self.policy)
        values, discount = torch.zeros_like(self.rewards), gamma ** torch.arange(T, dtype=torch.float64)
        for n in range(len(p)):
            for t in range(self.lengths[n]):
                same = (self.tokens[:, :t + 1] == self.tokens[n, :t + 1]).all(1) & self.mask[:, t]
                values[n, t] = (p[same] * (self.rewards[same, t:] @ discount[:T - t])).sum() / p[same].sum()
        return values.detach()

    def gradient(self, rows, advantages, update=reinforce):
        """What the algorithm's loss gives for these episodes: the sum over their actions, where the loss has the mean."""
        policy = copy.deepcopy(self.policy)
        _, logp = self.probabilities(policy)
        batch = Batch(self.tokens[rows, :-1], self.tokens[rows, 1:], self.mask[rows], logp.detach()[rows], advantages, advantages)
        config = SimpleNamespace(temperature=1.0, max_grad_norm=1e9, clip=0.2, epochs=1, minibatches=1, target_kl=1,
                                 delta=0.01, cg_iters=1, damping=1e9, fisher_fraction=1.0, backtracks=0)
        before = flatten(policy.parameters()).detach()
        stats = update(policy, batch, torch.optim.SGD(policy.parameters(), 1.0), config)
        move = flatten(policy.parameters()).detach() - before
        if update is trpo:  # whose step, damped so much that F is nothing, has the direction of its gradient
            move *= stats["grad_norm"] / move.norm()
        return move * self.lengths[rows].sum()

    def every_gradient(self, advantages, update=reinforce):
        """For each episode (N of them) the gradient that it gives alone: (N, n)."""
        return torch.stack([self.gradient([n], advantages[[n]], update) for n in range(len(self.tokens))])


def config(gamma=1.0, lam=1.0, group_size=1):
    return SimpleNamespace(gamma=gamma, lam=lam, group_size=group_size)


@pytest.fixture(scope="module")
def world():
    return World(make_policy())


@pytest.fixture(scope="module")
def truth(world):
    return world.exact(lambda p, logp: (p * world.rewards.sum(1)).sum())


def expected(world, gradients):
    p, _ = world.probabilities(world.policy)
    return p.detach() @ gradients


def close(got, truth):
    torch.testing.assert_close(got, truth, rtol=1e-6, atol=1e-6 * truth.norm().item())


def test_the_enumeration_is_whole(world):
    p, _ = world.probabilities(world.policy)
    assert len(p) == 31 and p.sum().item() == pytest.approx(1)
    tree = {tuple(row[:n].tolist()) for row, n in zip(world.tokens[:, 1:], world.lengths.tolist())}
    assert len(tree) == 31 and all(c[-1] == EOS or len(c) == T for c in tree)


@pytest.mark.parametrize("update", [reinforce, ppo, trpo])
@pytest.mark.parametrize("kind", ["returns", "returns less a baseline of the state", "gae"])
def test_the_policy_gradient_is_unbiased(world, truth, kind, update):
    nothing, baseline = torch.zeros_like(world.rewards), make_critic(5)(world.tokens[:, :-1]).detach()
    if kind == "returns":
        advantages, _ = ADVANTAGES["returns"](world.rewards, nothing, world.mask, config())
    elif kind == "gae":
        advantages, _ = ADVANTAGES["gae"](world.rewards, baseline, world.mask, config())
    else:
        advantages = ADVANTAGES["returns"](world.rewards, nothing, world.mask, config())[0] - baseline
    assert baseline.std() > 0.3  # a poor critic, but a critic
    close(expected(world, world.every_gradient(advantages, update)), truth)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_with_the_true_values_is_unbiased_for_any_lambda(world, truth, lam):
    advantages, _ = ADVANTAGES["gae"](world.rewards, world.values(), world.mask, config(lam=lam))
    close(expected(world, world.every_gradient(advantages)), truth)


@pytest.mark.parametrize("kind, unbiased", [("rloo", True), ("grpo", False)])
def test_groups_of_two(world, truth, kind, unbiased):
    """Leave-one-out is unbiased over all pairs of episodes; the group's standard deviation makes another gradient of it."""
    p = world.probabilities(world.policy)[0].detach()
    N, nothing = len(p), torch.zeros_like(world.rewards)
    ones = world.every_gradient(world.mask.double())  # (N, n), the score of each whole episode, for each advantage to multiply
    total = 0
    for i in range(N):
        for j in range(N):
            pair = [i, j]
            adv, _ = ADVANTAGES[kind](world.rewards[pair], nothing[pair], world.mask[pair], config(group_size=2))
            if (i, j) in ((3, 17), (30, 0)):  # that the sum of the two is what the pair as one batch gives
                close(world.gradient(pair, adv), adv[0, 0] * ones[i] + adv[1, 0] * ones[j])
            total = total + p[i] * p[j] * (adv[0, 0] * ones[i] + adv[1, 0] * ones[j]) / 2
    if unbiased:
        close(total, truth)
    else:
        assert (total - truth).norm() > 0.1 * truth.norm()
        assert torch.cosine_similarity(total, truth, dim=0) < 0.999  # not even the direction is kept


def test_the_kl_penalty_has_the_gradient_of_the_kl(world):
    """J(θ) = Σ p(τ) (score(τ) - β log p(τ)/p_ref(τ)): the penalty depends on θ, yet may be treated as a reward."""
    beta, scores = 0.3, rand(len(world.tokens), seed=9)
    with torch.no_grad():
        _, ref_logp = world.probabilities(make_policy(seed=1))
    _, logp = world.probabilities(world.policy)
    rewards = token_rewards(scores, world.mask, logp.detach(), ref_logp, beta)
    advantages, _ = ADVANTAGES["returns"](rewards, rewards, world.mask, config())
    truth = world.exact(lambda p, logp: (p * (scores - beta * (logp - ref_logp).sum(1))).sum())
    close(expected(world, world.every_gradient(advantages)), truth)
    without = world.exact(lambda p, logp: (p * scores).sum())
    assert (truth - without).norm() > 0.1 * truth.norm()  # and the penalty mattered


def bias_and_variance(world, truth, values, gamma, lam):
    """Of one episode's gradient: |E g - ∇J| / |∇J|, J without discount, and E|g - E g|² / |∇J|²."""
    advantages, _ = ADVANTAGES["gae"](world.rewards, values, world.mask, config(gamma, lam))
    gradients = world.every_gradient(advantages)
    mean = expected(world, gradients)
    variance = expected(world, ((gradients - mean) ** 2).sum(1))
    return (mean - truth).norm().item() / truth.norm().item(), variance.item() / truth.norm().item() ** 2


def fair_critic(world, gamma):
    """The true values with an error of a third of their spread, and of mean 0: what a critic in training is like."""
    true, noise = world.values(gamma), make_critic(7)(world.tokens[:, :-1]).detach()
    return true + whiten(noise, world.mask) * true[world.mask].std() / 3


def test_gamma_and_lambda_trade_bias_for_variance(world, truth):
    table = {(g, l): bias_and_variance(world, truth, fair_critic(world, g), g, l) for g in (1.0, 0.8) for l in (1.0, 0.5, 0.0)}
    assert table[1, 1][0] < 1e-6
    assert all(bias > 0.01 for key, (bias, _) in table.items() if key != (1, 1))
    for gamma in (1.0, 0.8):  # the smaller lambda, the more bias; what it saves in variance depends on the critic's errors too
        (b1, v1), (b2, v2), (b3, v3) = (table[gamma, lam] for lam in (1.0, 0.5, 0.0))
        assert b1 < b2 < b3 and v2 < v1 and v3 < v1
    assert all(table[0.8, lam][0] > table[1, lam][0] for lam in (1.0, 0.5, 0.0)) and table[0.8, 1][1] < table[1, 1][1]


if __name__ == "__main__":
    print("policy  gamma  lambda   bias  variance, relative to that with the critic at gamma = lambda = 1")
    for seed in range(3):
        world = World(make_policy(seed))
        truth = world.exact(lambda p, logp: (p * world.rewards.sum(1)).sum())
        _, unit = bias_and_variance(world, truth, fair_critic(world, 1), 1, 1)
        rows = [("no critic", torch.zeros_like(world.rewards), 1, 1)]
        rows += [("", fair_critic(world, gamma), gamma, lam) for gamma in (1, 0.95, 0.8) for lam in (1, 0.95, 0.5, 0)]
        for name, critic, gamma, lam in rows:
            bias, variance = bias_and_variance(world, truth, critic, gamma, lam)
            print(f"{seed:6d}  {gamma:5.2f}  {lam:6.2f}  {bias:5.3f}  {variance / unit:8.2f}   {name}")
