import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from advantage import (
    ADVANTAGES,
    discounted_returns,
    gae,
    group_normalize,
    leave_one_out,
    masked_mean,
    mean_and_variance,
    token_rewards,
    whiten,
    without_rounding,
)
from helpers import on_last_action

MASK = torch.tensor([[1, 1, 1, 1, 1, 1],  # only actions
                     [0, 0, 1, 1, 1, 1],  # after a prompt
                     [1, 1, 1, 0, 0, 0],  # before padding
                     [0, 1, 1, 1, 0, 0],  # between the two
                     [0, 0, 0, 1, 0, 0],  # a single action
                     [0, 1, 1, 0, 1, 1]]).bool()  # two turns


def numbers(seed):
    return torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(rewards, values, gamma, lam, bootstrap=0.0):
    """The double sum A_t = Σ_k (γλ)^k δ_{t+k} for the actions of one episode (lists)."""
    n = len(rewards)
    v = [*values, bootstrap]
    delta = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(n)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


# Returns and GAE.

@pytest.mark.parametrize("gamma, lam", [(1, 1), (0.9, 1), (1, 0), (0.9, 0.5), (0.97, 0.95), (0, 0.3)])
@pytest.mark.parametrize("bootstrap", [None, numbers(2)[:, 0]], ids=["ended", "cut"])
def test_gae_is_the_double_sum_of_its_definition(gamma, lam, bootstrap):
    rewards, values = numbers(0), numbers(1)
    advantages, returns = gae(rewards, values, MASK, gamma, lam, bootstrap)
    for b, m in enumerate(MASK):
        v = values[b, m].tolist()
        last_value = 0.0 if bootstrap is None else bootstrap[b].item()
        expected = by_definition(rewards[b, m].tolist(), v, gamma, lam, last_value)
        assert advantages[b, m].tolist() == pytest.approx(expected)
        assert returns[b, m].tolist() == pytest.approx([a + value for a, value in zip(expected, v)])
    assert (advantages[~MASK] == 0).all()
    assert (returns[~MASK] == 0).all()


def test_gae_gives_the_worked_example():
    """γ = 0.9, λ = 0.5: δ = (1 + 0.9·4 - 2, 3 + 0 - 4) = (2.6, -1), so A = (2.6 - 0.45, -1)."""
    rewards, values = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]])
    advantages, returns = gae(rewards, values, torch.ones(1, 2).bool(), 0.9, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[2.15, -1.0]]))
    torch.testing.assert_close(returns, torch.tensor([[4.15, 3.0]]))


def test_gae_at_lambda_one_is_the_return_less_the_value():
    rewards, values = numbers(0), numbers(1)
    advantages, _ = gae(rewards, values, MASK, 0.9, 1.0)
    torch.testing.assert_close(advantages, discounted_returns(rewards, MASK, 0.9) - values * MASK)


def test_a_bootstrap_stands_for_the_rest_of_an_episode():
    rewards, values, mask = numbers(0)[:1], numbers(1)[:1], MASK[:1]
    whole, _ = gae(rewards, values, mask, 0.9, 0.0)
    cut, _ = gae(rewards[:, :4], values[:, :4], mask[:, :4], 0.9, 0.0, bootstrap=values[:, 4])
    torch.testing.assert_close(cut, whole[:, :4])


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_a_return_is_the_discounted_sum_of_the_rewards_to_come(gamma):
    rewards = numbers(0)
    returns = discounted_returns(rewards, MASK, gamma)
    for b, m in enumerate(MASK):
        r = rewards[b, m].tolist()
        expected = [sum(gamma ** k * x for k, x in enumerate(r[t:])) for t in range(len(r))]
        assert returns[b, m].tolist() == pytest.approx(expected)
    assert (returns[~MASK] == 0).all()


def test_gae_is_that_of_stable_baselines3():
    """Their buffer holds one stream of steps, in which episodes end; each episode is a row of ours."""
    buffers = pytest.importorskip("stable_baselines3.common.buffers", reason="needs stable-baselines3")
    spaces = pytest.importorskip("gymnasium").spaces
    gamma, lam, T, rng = 0.97, 0.9, 40, np.random.default_rng(0)
    episodes = [(9, "end"), (1, "end"), (12, "time limit"), (7, "time limit"), (6, "end"), (5, "buffer full")]
    B, longest = len(episodes), 12
    stream_rewards, stream_values, last_values = rng.normal(size=T), rng.normal(size=T), rng.normal(size=B)

    states, actions = spaces.Box(-1, 1, (1,)), spaces.Discrete(2)
    theirs = buffers.RolloutBuffer(T, states, actions, gamma=gamma, gae_lambda=lam)
    rewards, values = torch.zeros(2, B, longest, dtype=torch.float64)
    mask, bootstrap = torch.zeros(B, longest).bool(), torch.zeros(B, dtype=torch.float64)
    steps = iter(zip(stream_rewards, stream_values))
    nothing = np.zeros((1, 1))
    for b, (length, reason) in enumerate(episodes):
        if reason != "end":
            bootstrap[b] = last_values[b]
        for t in range(length):
            reward, value = next(steps)
            mask[b, t], rewards[b, t], values[b, t] = True, reward, value
            if reason == "time limit" and t == length - 1:  # what their collect_rollouts does there
                reward += gamma * last_values[b]
            first = np.array([t == 0])
            theirs.add(nothing, nothing, np.array([reward]), first, torch.tensor([value]), torch.zeros(1))
    theirs.compute_returns_and_advantage(torch.tensor([last_values[-1]]), np.array([False]))

    advantages, returns = gae(rewards, values, mask, gamma, lam, bootstrap)
    for ours, other in [(advantages, theirs.advantages), (returns, theirs.returns)]:
        other = torch.from_numpy(other[:, 0]).double()
        torch.testing.assert_close(ours[mask], other, rtol=1e-5, atol=1e-5)


# Rewards.

def test_the_score_of_an_action_stays_there():
    scores, zeros = numbers(0), torch.zeros(6, 6)
    rewards = token_rewards(scores, MASK, zeros, zeros, 0.1)
    assert torch.equal(rewards, scores * MASK)


def test_an_action_pays_where_the_policy_is_likelier_than_the_reference():
    logp, ref_logp = numbers(0), numbers(1)
    rewards = token_rewards(torch.zeros(6, 6), MASK, logp, ref_logp, 0.3)
    torch.testing.assert_close(rewards[MASK], 0.3 * (ref_logp - logp)[MASK])
    assert (rewards[~MASK] == 0).all()


# Means over the actions, and over groups.

def test_masked_mean_is_the_mean_over_the_actions():
    x = numbers(0)
    values = [x[b, t].item() for b, t in MASK.nonzero().tolist()]
    assert masked_mean(x, MASK).item() == pytest.approx(sum(values) / len(values))


def test_whiten_uses_the_actions_alone():
    x = numbers(0)
    expected = (x[MASK] - x[MASK].mean()) / x[MASK].std(unbiased=False)
    whitened = whiten(x, MASK)
    torch.testing.assert_close(whitened[MASK], expected)
    assert (whitened[~MASK] == 0).all()


def test_equal_advantages_are_whitened_to_zero():
    assert (whiten(torch.full((2, 3), 7.0), torch.ones(2, 3).bool()) == 0).all()


@pytest.mark.parametrize("value", [0.3, 0.95, 1000.1, -7e-6, 1e12])
def test_equal_numbers_are_zero_whatever_their_rounding(value):
    for n in (2, 3, 8):
        scores = torch.full((n,), value)
        assert group_normalize(scores, n).tolist() == leave_one_out(scores, n).tolist() == [0] * n
    for shape in ((3, 4), (64, 14)):
        x, mask = torch.full(shape, value), torch.ones(shape).bool()
        assert (whiten(x, mask) == 0).all() and mean_and_variance(x, mask)[1] == 0
        zeros = torch.zeros(shape)
        rewards = token_rewards(on_last_action(x[:, 0], mask), mask, zeros, zeros, 0.1)
        values = x * (1 + 2 * torch.finfo(x.dtype).eps * torch.rand(shape))  # right up to rounding
        assert (gae(rewards, values, mask, 1.0, 0.95)[0] == 0).all()


@pytest.mark.parametrize("scale", [1e-15, 1e-4, 1.0, 1e14])
def test_the_scale_of_scores_and_advantages_changes_nothing(scale):
    x, mask = numbers(0).float(), MASK
    torch.testing.assert_close(whiten(x * scale, mask), whiten(x, mask))
    scores = x[:, 0]
    torch.testing.assert_close(group_normalize(scores * scale, 3), group_normalize(scores, 3))
    torch.testing.assert_close(leave_one_out(scores * scale, 3) / scale, leave_one_out(scores, 3))


def test_a_difference_beyond_rounding_counts():
    scores = torch.tensor([1000.0, 1000.0, 1000.1])
    assert group_normalize(scores, 3).tolist() == pytest.approx([-3 ** -0.5] * 2 + [2 / 3 ** 0.5], rel=3e-3)
    assert without_rounding(torch.tensor(math.inf), torch.tensor(math.inf)) == math.inf  # never hidden
    assert without_rounding(torch.tensor(math.nan), torch.tensor(1.0)).isnan()


def test_one_failure_among_eight():
    scores = torch.tensor([0] + [0.95] * 7)
    assert leave_one_out(scores, 8)[0].item() == pytest.approx(-0.95)
    assert group_normalize(scores, 8)[0].item() == pytest.approx(-7 / 8 ** 0.5, rel=1e-5)  # -2.475


def test_leave_one_out_subtracts_the_mean_of_the_others():
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    assert leave_one_out(scores, 3).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0])


def test_group_normalize_divides_by_the_groups_standard_deviation():
    normalized = group_normalize(torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0]), 3)
    deviation = 7 ** 0.5  # of 1, 2, 6, whose mean is 3: variance (4 + 1 + 9) / 2
    assert normalized[:3].tolist() == pytest.approx([x / deviation for x in (-2, -1, 3)])
    assert normalized[3:].tolist() == [0, 0, 0]


# The estimators that the command line names.

CONFIG = SimpleNamespace(gamma=0.9, lam=0.6, group_size=3)


def test_each_estimator_is_the_function_of_its_name():
    rewards, values = numbers(0), numbers(1)
    returns = discounted_returns(rewards, MASK, 0.9)
    totals = torch.stack([rewards[b, m].sum() for b, m in enumerate(MASK)])
    scores = numbers(2)[:, 0]
    relative = group_normalize(scores, 3) + leave_one_out(totals - scores, 3)  # KL penalty: in its own unit
    spread = lambda per_episode: per_episode[:, None].expand(6, 6) * MASK
    expected = {"gae": gae(rewards, values, MASK, 0.9, 0.6), "returns": (returns, returns),
                "rloo": (spread(leave_one_out(totals, 3)), spread(totals)),
                "grpo": (spread(relative), spread(totals))}
    assert expected.keys() == ADVANTAGES.keys()
    for name, estimate in ADVANTAGES.items():
        for ours, truth in zip(estimate(rewards, scores, values, MASK, CONFIG), expected[name]):
            torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("estimator", ["rloo", "grpo"])
def test_a_group_of_equal_scores_learns_the_kl_penalty_in_proportion_to_its_coefficient(estimator):
    def advantages(beta):
        scores = torch.full((6,), 0.7, dtype=torch.float64)
        rewards = token_rewards(on_last_action(scores, MASK), MASK, numbers(0), numbers(1), beta)
        return ADVANTAGES[estimator](rewards, scores, None, MASK, CONFIG)[0]

    unit = advantages(1.0)
    assert unit.abs().max() > 0.1
    for beta in (0.0, 1e-6, 0.01, 0.1):
        torch.testing.assert_close(advantages(beta), beta * unit, rtol=1e-6, atol=1e-9)


def test_inputs_outside_the_mask_are_ignored():
    scores = torch.ones(6, dtype=torch.float64)

    def outputs(rewards, values):
        yield from (f(rewards, scores, values, MASK, CONFIG) for f in ADVANTAGES.values())
        yield whiten(rewards, MASK), masked_mean(rewards, MASK)
        ones = on_last_action(torch.ones(6, dtype=torch.float64), MASK)
        yield token_rewards(ones, MASK, rewards, values, 0.1),

    nan = torch.tensor(float("nan"), dtype=torch.float64)
    clean = outputs(numbers(0), numbers(1))
    dirty = outputs(numbers(0).where(MASK, nan), numbers(1).where(MASK, nan))
    for a, b in zip(clean, dirty):
        assert all(map(torch.equal, a, b))
