import pytest
import torch

import cartpole
from cartpole import LIMIT, SOLVED, learn, play, step


def test_dynamics_are_gymnasiums():
    gymnasium = pytest.importorskip("gymnasium", reason="gymnasium is not installed: pip install gymnasium")
    env, generator, falls = gymnasium.make("CartPole-v1").unwrapped, torch.Generator().manual_seed(0), 0
    env.reset(seed=0)
    for start in range(40):
        state = torch.rand(1, 4, generator=generator, dtype=torch.float64) * 0.1 - 0.05
        env.reset()
        env.state = state[0].numpy().copy()
        for t in range(LIMIT):  # pushed at random, or nearly always to one side: it falls, or leaves
            action = torch.rand(1, generator=generator) < (0.5, 0.95, 0.05, 0.48)[start % 4]
            state, fallen = step(state, action.long())
            _, reward, terminated, _, _ = env.step(int(action))
            torch.testing.assert_close(state[0], torch.tensor(env.state, dtype=torch.float64), rtol=0, atol=1e-9)
            assert reward == 1.0 and terminated == bool(fallen)
            if terminated:
                falls += 1
                break
    assert falls == 40


class Constant(torch.nn.Module):
    """Always left, or always towards the side to which the pole leans and turns."""

    def __init__(self, balance):
        super().__init__()
        self.balance = balance

    def forward(self, obs):
        lean = obs @ torch.tensor([0.1, 0.3, 3.0, 1.0]) if self.balance else -torch.ones(obs.shape[:-1])
        return torch.stack([-lean, lean], -1)


def test_episodes_end_where_the_pole_falls():
    obs, actions, mask, cut = play(Constant(balance=False), 20, torch.Generator().manual_seed(0), greedy=True)
    assert obs.shape == (20, mask.shape[1] + 1, 4) and actions.shape == mask.shape and not cut.any() and not actions.any()
    for b in range(20):
        T = int(mask[b].sum())
        assert mask[b, :T].all() and 7 < T < 12
        state = obs[b, 0:1].double()
        for t in range(T):
            state, fallen = step(state, actions[b, t:t + 1])
            torch.testing.assert_close(state[0].float(), obs[b, t + 1], rtol=0, atol=1e-5)
            assert fallen == (t == T - 1)


def test_the_time_limit_cuts_what_would_go_on():
    _, _, mask, cut = play(Constant(balance=True), 20, torch.Generator().manual_seed(0), greedy=True)
    assert mask.shape == (20, LIMIT) and mask.all() and cut.all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("algo", cartpole.ALGOS)
def test_every_algorithm_balances_the_pole(algo, seed):
    greedy, steps, _ = learn(algo, seed)
    assert greedy >= SOLVED and steps < 200_000
