from types import SimpleNamespace

import numpy as np
import pytest
import torch

from advantage import ADVANTAGES, discounted_returns, gae, group_normalize, leave_one_out, token_rewards, whiten

# Rows of every kind: full, with a prompt before, with filler after, with both, one action, two turns with a gap between.
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0],
                     [0, 1, 1, 0, 1, 1]]).bool()


def numbers(seed):
    return torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(rewards, values, gamma, lam, bootstrap=0.0):
    """The double sum: A_t = Σ_k (γλ)^k δ_{t+k}, for one episode as a list of its actions."""
    n = len(rewards)
    v = [*values, bootstrap]
    delta = [rewards[t] + gamma * v[t + 1] - v[t] for t in range(n)]
    return [sum((gamma * lam) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]


@pytest.mark.parametrize("gamma, lam", [(1, 1), (0.9, 1), (1, 0), (0.9, 0.5), (0.97, 0.95), (0, 0.3)])
@pytest.mark.parametrize("with_bootstrap", [False, True])
def test_gae_is_the_double_sum_of_its_definition(gamma, lam, with_bootstrap):
    rewards, values = numbers(0), numbers(1)
    bootstrap = numbers(2)[:, 0] if with_bootstrap else None
    advantages, returns = gae(rewards, values, MASK, gamma, lam, bootstrap)
    for b, m in enumerate(MASK):
        expected = by_definition(rewards[b, m].tolist(), values[b, m].tolist(), gamma, lam, bootstrap[b].item() if with_bootstrap else 0.0)
        assert advantages[b, m].tolist() == pytest.approx(expected)
        assert returns[b, m].tolist() == pytest.approx([a + v for a, v in zip(expected, values[b, m].tolist())])
    assert (advantages[~MASK] == 0).all() and (returns[~MASK] == 0).all()


def test_gae_worked_example():
    rewards, mask = torch.tensor([[1.0, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    assert gae(rewards, torch.zeros(1, 2), mask, 0.9, 0.5)[0].tolist() == [[1.0, 0.0]]
    # By hand with γ=0.9, λ=0.5: δ = (1 + 0.9·4 - 2, 3 + 0 - 4) = (2.6, -1), A = (2.6 - 0.45, -1).
    advantages, returns = gae(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 4.0]]), mask, 0.9, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[2.15, -1.0]]))
    torch.testing.assert_close(returns, torch.tensor([[4.15, 3.0]]))


def test_gae_limits():
    rewards, values, gamma = numbers(0), numbers(1), 0.9
    monte_carlo, _ = gae(rewards, values, MASK, gamma, 1.0)
    torch.testing.assert_close(monte_carlo, discounted_returns(rewards, MASK, gamma) - values * MASK)
    td, _ = gae(rewards, values, MASK, gamma, 0.0)
    b, t = 3, 1
    assert td[b, t].item() == pytest.approx((rewards[b, t] + gamma * values[b, t + 1] - values[b, t]).item())
    assert td[b, 3].item() == pytest.approx((rewards[b, 3] - values[b, 3]).item())  # after the last action nothing is owed


def test_a_bootstrap_is_worth_what_the_rest_of_the_episode_would_have_been():
    rewards, values, mask = numbers(0)[:1], numbers(1)[:1], MASK[:1]
    whole, _ = gae(rewards, values, mask, 0.9, 0.0)
    cut, _ = gae(rewards[:, :4], values[:, :4], mask[:, :4], 0.9, 0.0, bootstrap=values[:, 4])
    torch.testing.assert_close(cut, whole[:, :4])


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_returns_are_the_sum_of_what_comes(gamma):
    rewards = numbers(0)
    returns = discounted_returns(rewards, MASK, gamma)
    for b, m in enumerate(MASK):
        r = rewards[b, m].tolist()
        assert returns[b, m].tolist() == pytest.approx([sum(gamma ** k * x for k, x in enumerate(r[t:])) for t in range(len(r))])
    assert (returns[~MASK] == 0).all()


def test_nothing_off_the_mask_is_read():
    rewards, values, junk = numbers(0), numbers(1), 1e6 * ~MASK
    for clean, dirty in zip(gae(rewards, values, MASK, 0.9, 0.7), gae(rewards + junk, values - junk, MASK, 0.9, 0.7)):
        assert torch.equal(clean, dirty)
    assert torch.equal(discounted_returns(rewards, MASK, 0.9), discounted_returns(rewards + junk, MASK, 0.9))
    assert torch.equal(whiten(rewards + junk, MASK), whiten(rewards, MASK))
    nan = torch.full_like(rewards, float("nan")).where(~MASK, rewards)
    assert all(x.isfinite().all() for x in (*gae(nan, nan, MASK, 0.9, 0.7), discounted_returns(nan, MASK, 0.9), whiten(nan, MASK),
                                            token_rewards(values[:, 0], MASK, nan, nan, 0.1)))


def test_the_score_sits_on_the_last_action():
    scores = torch.arange(1.0, 7.0)
    rewards = token_rewards(scores, MASK, torch.zeros(6, 6), torch.zeros(6, 6), 0.1)
    last = [5, 5, 2, 3, 3, 5]
    for b, t in enumerate(last):
        assert rewards[b].tolist() == [scores[b].item() if s == t else 0.0 for s in range(6)]


def test_kl_penalty_is_charged_where_the_policy_is_likelier_than_the_reference():
    logp, ref = numbers(0), numbers(1)
    rewards = token_rewards(torch.zeros(6, dtype=torch.float64), MASK, logp, ref, 0.3)
    torch.testing.assert_close(rewards[MASK], 0.3 * (ref - logp)[MASK])
    assert (rewards[~MASK] == 0).all()


def test_whiten_uses_the_actions_alone():
    x = numbers(0)
    y = whiten(x, MASK)
    assert y[MASK].mean().item() == pytest.approx(0, abs=1e-12) and y[MASK].var(unbiased=False).item() == pytest.approx(1)
    expected = (x[MASK] - x[MASK].mean()) / x[MASK].std(unbiased=False)
    torch.testing.assert_close(y[MASK], expected)
    assert (y[~MASK] == 0).all()
    assert (whiten(torch.full((2, 3), 7.0), torch.ones(2, 3, dtype=torch.bool)) == 0).all()  # no spread, no advantage


def test_groups():
    scores = torch.tensor([1.0, 2.0, 6.0, 5.0, 5.0, 5.0])
    assert leave_one_out(scores, 3).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0])
    normal = group_normalize(scores, 3)
    assert normal[:3].tolist() == pytest.approx([x / (7 ** 0.5 + 1e-4) for x in (-2, -1, 3)])  # variance (4+1+9)/2
    assert normal[3:].tolist() == [0, 0, 0]


def test_what_the_command_line_names():
    rewards, values = numbers(0) + 1e6 * ~MASK, numbers(1)
    config = SimpleNamespace(gamma=0.9, lam=0.6, group_size=3)
    estimate = {name: f(rewards, values, MASK, config) for name, f in ADVANTAGES.items()}
    returns = discounted_returns(rewards, MASK, 0.9)
    for got, expected in [*zip(estimate["gae"], gae(rewards, values, MASK, 0.9, 0.6)), *zip(estimate["returns"], (returns, returns))]:
        assert torch.equal(got, expected)
    totals = torch.stack([rewards[b][m].sum() for b, m in enumerate(MASK)])
    for name, compare in [("rloo", leave_one_out), ("grpo", group_normalize)]:
        for b, m in enumerate(MASK):
            assert estimate[name][0][b].tolist() == pytest.approx([compare(totals, 3)[b].item() if x else 0.0 for x in m])
            assert estimate[name][1][b].tolist() == pytest.approx([totals[b].item() if x else 0.0 for x in m])


def test_gae_is_that_of_stable_baselines3():
    """One environment's stream of steps with ends and time limits in it, in their buffer; each episode a row of ours."""
    buffers = pytest.importorskip("stable_baselines3.common.buffers", reason="stable-baselines3 is not installed: pip install stable-baselines3")
    spaces, gamma, lam, T = pytest.importorskip("gymnasium").spaces, 0.97, 0.9, 40
    rng = np.random.default_rng(0)
    episodes = [(9, "ended"), (1, "ended"), (12, "time limit"), (7, "time limit"), (6, "ended"), (5, "cut")]  # T steps
    theirs = buffers.RolloutBuffer(T, spaces.Box(-1, 1, (1,)), spaces.Discrete(2), gamma=gamma, gae_lambda=lam)
    rewards, values, last_values = rng.normal(size=T), rng.normal(size=T), rng.normal(size=len(episodes))
    mask, ours = torch.zeros(len(episodes), 12, dtype=torch.bool), torch.zeros(2, len(episodes), 12, dtype=torch.float64)
    bootstrap, t = torch.zeros(len(episodes), dtype=torch.float64), 0
    for row, ((length, how), last_value) in enumerate(zip(episodes, last_values)):
        if how != "ended":
            bootstrap[row] = last_value
        for step in range(length):
            mask[row, step], ours[0, row, step], ours[1, row, step] = True, rewards[t], values[t]
            # Their collect_rollouts adds γ V(last state) to the reward of a step at the time limit.
            paid = rewards[t] + gamma * last_value * (how == "time limit" and step == length - 1)
            theirs.add(np.zeros((1, 1)), np.zeros((1, 1)), np.array([paid]), np.array([step == 0]), torch.tensor([values[t]]), torch.zeros(1))
            t += 1
    theirs.compute_returns_and_advantage(torch.tensor([last_values[-1]]), np.array([False]))
    advantages, returns = gae(*ours, mask, gamma, lam, bootstrap)
    for mine, other in [(advantages, theirs.advantages), (returns, theirs.returns)]:
        torch.testing.assert_close(mine[mask], torch.from_numpy(other[:, 0]).double(), rtol=1e-5, atol=1e-5)
