import pytest
import torch

from cartpole import ALGOS, LIMIT, SOLVED, learn, play, step

QUICKEST = ("reinforce", 1)  # to be solved
LEARNERS = [pytest.param(algo, seed, marks=() if (algo, seed) == QUICKEST else pytest.mark.slow)
            for algo in ALGOS for seed in range(5)]


def test_the_dynamics_are_those_of_gymnasium():
    gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium")
    env, generator, falls = gymnasium.make("CartPole-v1").unwrapped, torch.Generator().manual_seed(0), 0
    for start in range(40):
        env.reset(seed=start)
        state = torch.rand(1, 4, generator=generator, dtype=torch.float64) * 0.1 - 0.05
        env.state = state[0].numpy().copy()
        push_right = (0.5, 0.95, 0.05, 0.48)[start % 4]  # at random it falls, mostly to one side it leaves
        for _ in range(LIMIT):
            action = torch.rand(1, generator=generator) < push_right
            state, fallen = step(state, action.long())
            _, reward, terminated, _, _ = env.step(int(action))
            expected = torch.tensor(env.state, dtype=torch.float64)
            torch.testing.assert_close(state[0], expected, rtol=0, atol=1e-9)
            assert reward == 1.0
            assert terminated == bool(fallen)
            if terminated:
                falls += 1
                break
    assert falls == 40


def always_left(obs):
    return torch.tensor([1.0, -1.0]).expand(*obs.shape[:-1], 2)


def balance(obs):
    """Push to the side to which the pole leans and turns."""
    lean = obs @ torch.tensor([0.1, 0.3, 3.0, 1.0])
    return torch.stack([-lean, lean], -1)


def test_an_episode_ends_where_the_pole_falls():
    obs, actions, mask, cut = play(always_left, 20, torch.Generator().manual_seed(0), greedy=True)
    assert obs.shape == (20, mask.shape[1] + 1, 4)
    assert actions.shape == mask.shape
    assert not cut.any() and not actions.any()
    for b in range(20):
        T = int(mask[b].sum())
        assert mask[b, :T].all() and 7 < T < 12
        state = obs[b, 0:1].double()
        for t in range(T):
            state, fallen = step(state, actions[b, t:t + 1])
            torch.testing.assert_close(state[0].float(), obs[b, t + 1], rtol=0, atol=1e-5)
            assert fallen == (t == T - 1)


def test_the_time_limit_cuts_an_episode_that_would_go_on():
    _, _, mask, cut = play(balance, 20, torch.Generator().manual_seed(0), greedy=True)
    assert mask.shape == (20, LIMIT)
    assert mask.all() and cut.all()


@pytest.mark.parametrize("algo, seed", LEARNERS)
def test_every_algorithm_balances_the_pole(algo, seed):
    length, steps, _ = learn(algo, seed)
    assert length >= SOLVED
    assert steps < 200_000
