"""CartPole-v1 with the algorithms that train the language models: `cartpole.py --algo trpo`.

Episodes are the rows of a batch, as completions are: obs (B, T, 4), and a mask that is True until the pole
has fallen. Dynamics: Barto, Sutton & Anderson 1983, with the constants of gymnasium's CartPole-v1.
"""

import argparse
import copy
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from advantage import gae, whiten
from algos import Batch, action_log_probs, fit_critic, log_probs, mean_kl
from train import ALGOS

LIMIT = 500  # the time limit of an episode, steps
SOLVED = 475  # the mean length of 100 greedy episodes that counts as solved

CONFIG = dict(episodes=16, iterations=200, gamma=0.99, lam=0.95, temperature=1.0, max_grad_norm=0.5,
              critic_lr=3e-3, critic_epochs=10, minibatches=8, delta=0.01, cg_iters=10, damping=0.1,
              fisher_fraction=1.0, lr=1e-3, clip=0.2, epochs=10, target_kl=0.03, micro_batch=10_000)
OVERRIDES = {"reinforce": dict(lr=1e-2), "trpo": {}, "ppo": {}}


def step(state, action):
    """One step of 0.02 s. state: (B, 4) x, x', θ, θ'.  action: (B,) 0 pushes left, 1 right.

    Returns the next state and fallen (B,) bool.
    """
    x, speed, angle, spin = state.unbind(-1)
    gravity, cart, pole, half_length, tau = 9.8, 1.0, 0.1, 0.5, 0.02
    sin, cos, total = angle.sin(), angle.cos(), cart + pole
    push = ((2 * action - 1) * 10.0 + pole * half_length * spin ** 2 * sin) / total
    spin_change = (gravity * sin - cos * push) / (half_length * (4 / 3 - pole * cos ** 2 / total))
    speed_change = push - pole * half_length * spin_change * cos / total
    state = torch.stack([x + tau * speed, speed + tau * speed_change,
                         angle + tau * spin, spin + tau * spin_change], -1)
    return state, (state[:, 0].abs() > 2.4) | (state[:, 2].abs() > math.radians(12))


@torch.no_grad()
def play(policy, episodes, generator, greedy=False):
    """Episodes from random starts.

    Returns obs (B, T+1, 4), actions and mask (B, T), and cut (B,), True where the time limit ended it.
    """
    state = torch.rand(episodes, 4, generator=generator, dtype=torch.float64) * 0.1 - 0.05
    alive = torch.ones(episodes, dtype=torch.bool)
    obs, actions, mask = [state.float()], [], []
    while alive.any() and len(actions) < LIMIT:
        logits = policy(obs[-1])
        if greedy:
            action = logits.argmax(-1)
        else:
            action = logits.softmax(-1).multinomial(1, generator=generator).squeeze(-1)
        state, fallen = step(state, action)
        obs.append(state.float())
        actions.append(action)
        mask.append(alive)
        alive = alive & ~fallen
    return torch.stack(obs, 1), torch.stack(actions, 1), torch.stack(mask, 1), alive


def mlp(outputs, generator):
    net = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))
    for layer, gain in zip(net[::2], (2 ** 0.5, 2 ** 0.5, 0.01)):
        nn.init.orthogonal_(layer.weight, gain, generator=generator)
        nn.init.zeros_(layer.bias)
    return net


class Critic(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.net = mlp(1, generator)

    def forward(self, obs):
        return self.net(obs).squeeze(-1)


def mean_episode_length(policy, seed):
    """The mean length of 100 greedy episodes, in steps."""
    _, _, mask, _ = play(policy, 100, torch.Generator().manual_seed(seed), greedy=True)
    return mask.sum(1).float().mean().item()


def collect(policy, critic, config, generator):
    """A Batch of sampled episodes."""
    obs, actions, mask, cut = play(policy, config.episodes, generator)
    with torch.no_grad():
        values = critic(obs)  # (B, T+1)
        logp = action_log_probs(log_probs(policy, obs[:, :-1], config.temperature), actions)
    bootstrap = values[:, -1] * cut  # a fallen pole earns nothing more; a cut episode would have gone on
    rewards, values = mask.float(), values[:, :-1]
    advantages, targets = gae(rewards, values, mask, config.gamma, config.lam, bootstrap)
    _, returns = gae(rewards, values, mask, config.gamma, 1, bootstrap)  # λ = 1: Monte-Carlo
    return Batch(obs[:, :-1], actions, mask, logp, whiten(advantages, mask), targets, values, returns)


def learn(algo, seed, show=lambda line: None):
    """Train until 100 greedy episodes are long enough, and another 100 confirm it.

    Returns the mean length of the latter, the steps of the sampled episodes and the seconds.
    """
    config = SimpleNamespace(**CONFIG | OVERRIDES[algo])
    generator = torch.Generator().manual_seed(seed)
    policy, critic = mlp(2, generator), Critic(generator)
    optimizer = torch.optim.Adam(policy.parameters(), config.lr)
    critic_optimizer = torch.optim.Adam(critic.parameters(), config.critic_lr)
    steps, start = 0, time.perf_counter()
    for iteration in range(1, config.iterations + 1):
        batch = collect(policy, critic, config, generator)
        old = copy.deepcopy(policy)
        ALGOS[algo](policy, batch, optimizer, config, generator)
        kl = mean_kl(old, policy, batch, config)
        fit_critic(critic, batch, critic_optimizer, config, generator)
        steps += int(batch.mask.sum())
        sampled = batch.mask.sum(1).float().mean()
        greedy = mean_episode_length(policy, 10 ** 6 + seed)
        show(f"{iteration:3d}  {steps:7,d} steps  mean episode length: sampled {sampled:5.1f}, "
             f"greedy {greedy:5.1f}  kl {kl:.4f}  {time.perf_counter() - start:.0f} s")
        if greedy >= SOLVED:
            greedy = mean_episode_length(policy, 2 * 10 ** 6 + seed)
            if greedy >= SOLVED:
                break
    return greedy, steps, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--algo", choices=ALGOS, default="trpo")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    greedy, steps, seconds = learn(args.algo, args.seed, lambda line: print(line, flush=True))
    print(f"{args.algo}: mean length of 100 greedy episodes {greedy:.1f}, after {steps:,} steps and "
          f"{seconds:.0f} s of training")


if __name__ == "__main__":
    main()
