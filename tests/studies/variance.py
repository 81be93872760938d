"""How noisy is the gradient under each advantage estimator? `python tests/studies/variance.py RUN`.

RUN: a run with a critic (--advantage gae).

The run's policy stands still, and every estimator gets the same batches of 64 episodes. Noise is the trace
of the covariance of the batches' gradients over the squared length of their mean; a batch of N times as many
episodes has an N-th of it. Cosine is that of the mean gradient with the mean under the trained critic with
λ = 1, which no critic can bias (γ = 1); it says little where the noise is large. R² is the explained variance
of Monte-Carlo returns, 1 - Var[G - V] / Var[G], a mean over batches: of the run's own critic, and of one that
was trained on --critic-episodes more episodes of the policy.
"""

import argparse
import copy
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from advantage import ADVANTAGES, mean_and_variance, whiten
from algos import fit_critic, flatten, map_micro_batches, reinforce, trainable, unflatten
from model import BadInput

CRITIC_FREE = {
    "returns, no baseline": dict(advantage="returns"),
    "returns, whitened: the batch's mean": dict(advantage="returns", whiten=1),
    "leave-one-out, groups of 4": dict(advantage="rloo"),
    "group-normalized, groups of 4": dict(advantage="grpo")}
WITH_CRITIC = {f"λ = {lam:g}": dict(advantage="gae", lam=lam) for lam in (1, 0.95, 0.5, 0)}


class Moments:
    """The sum of gradients and of their squared lengths, for each half of the batches."""

    def __init__(self, n):
        self.sums = torch.zeros(2, n, dtype=torch.float64)
        self.squares = [0.0, 0.0]
        self.counts = [0, 0]

    def add(self, g):
        half = sum(self.counts) % 2
        self.sums[half] += g
        self.squares[half] += (g.double() @ g.double()).item()
        self.counts[half] += 1

    def noise(self, halves=(0, 1)):
        """tr Cov(g) / |E g|² of these halves; nan if the noise hides the mean.

        The square of the sample mean exceeds |E g|² by tr Cov(g) / N on average, which is subtracted.
        """
        n = sum(self.counts[half] for half in halves)
        square = self.sums[list(halves)].sum(0).square().sum().item() / n ** 2  # of the mean
        variance = (sum(self.squares[half] for half in halves) - n * square) / (n - 1)
        signal = square - variance / n
        return variance / signal if signal > 0 else math.nan

    def mean(self):
        return self.sums.sum(0) / sum(self.counts)


def load_run(run, task, parser):
    """(task, policy, reference, tokenizer, config), critic of a run. Exits with status 2 if it has no critic.

    task: its task file, which is executed; None for a built-in task.
    """
    config, _ = train.parse(["--explain", run] + (["--task", task] if task else []))
    try:
        task, policy, reference, critic, tokenizer = train.load_run(config)
    except BadInput as e:
        parser.error(str(e))
    if critic is None:
        parser.error(f"{run} has no critic: give a run under gae")
    return (task, policy, reference, tokenizer, config), critic


def collect(world, critic, seed, iteration=10 ** 6, **options):
    """A Batch of the world's policy with its values by this critic. options: of the config, to be changed."""
    task, policy, reference, tokenizer, config = world
    config = replace(config, **options)
    generators = train.random_generators(seed, iteration, "cpu")
    return train.collect(task, policy, reference, critic, tokenizer, config, generators)[0]


def policy_gradient(policy, batch, config):
    """The policy gradient (n,) of a Batch by REINFORCE, not clipped. Nothing moves."""
    still = torch.optim.SGD(policy.parameters(), lr=0.0)
    reinforce(policy, batch, still, replace(config, max_grad_norm=1e9))
    return -flatten([p.grad for p in trainable(policy)])


@torch.no_grad()
def moved(policy, change):
    """A copy of the policy with this change (n,) of its weights."""
    policy = copy.deepcopy(policy)
    params = trainable(policy)
    for p, piece in zip(params, unflatten(change, params)):
        p += piece
    return policy


def train_critic(world, critic, episodes):
    """A copy of the critic after training on more episodes of the policy."""
    critic = copy.deepcopy(critic)
    config = replace(world[-1], batch_size=256, critic_epochs=4)
    optimizer = torch.optim.Adam(critic.parameters(), config.critic_lr)
    for i in range(episodes // config.batch_size):
        batch = collect((*world[:-1], config), critic, 10 ** 6 + i, iteration=0)
        fit_critic(critic, batch, optimizer, config, torch.Generator().manual_seed(i))
    return critic


def measure(world, critics, batches):
    """{estimator: Moments} and {critic: R²}. critics: {name: Critic}."""
    _, policy, _, _, config = world
    n = sum(p.numel() for p in policy.parameters())
    found = {}
    explained = {name: [] for name in critics}

    def add(name, batch, choice):
        chosen = replace(config, **choice)
        estimator = ADVANTAGES[chosen.advantage]
        advantages, _ = estimator(batch.rewards, batch.scores, batch.values, batch.mask, chosen)
        batch.advantages = whiten(advantages, batch.mask) if chosen.whiten else advantages
        found.setdefault(name, Moments(n)).add(policy_gradient(policy, batch, chosen))

    for seed in range(batches):
        batch = collect(world, None, seed, iteration=0)
        for name, choice in CRITIC_FREE.items():
            add(name, batch, choice)
        for name, critic in critics.items():
            batch.values = map_micro_batches(lambda part: critic(part.obs), batch, config)
            _, variance = mean_and_variance(batch.returns, batch.mask)
            _, unexplained = mean_and_variance(batch.returns - batch.values, batch.mask)
            explained[name].append(1 - (unexplained / variance).item())
            for estimator, choice in WITH_CRITIC.items():
                add(f"{name}, {estimator}", batch, choice)
    return found, {name: fmean(values) for name, values in explained.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--task", help="the run's task, if it is a file: its code will be executed")
    parser.add_argument("--batches", type=int, default=200)
    parser.add_argument("--critic-episodes", type=int, default=8192)
    args = parser.parse_args()
    world, critic = load_run(args.run, args.task, parser)
    config = replace(world[-1], whiten=0, batch_size=64, group_size=4, max_grad_norm=1e9)
    world = (*world[:-1], config)
    trained = train_critic(world, critic, args.critic_episodes)
    found, explained = measure(world, {"the run's critic": critic, "trained critic": trained}, args.batches)

    print(f"{args.run}: {args.batches} batches of {config.batch_size} episodes")
    for name, value in explained.items():
        print(f"R² of {name}: {value:.2f}")
    print(f"{'':36}   noise  from either half of the batches   cosine")
    unbiased = found["trained critic, λ = 1"].mean()
    for name, moments in found.items():
        cosine = torch.cosine_similarity(moments.mean(), unbiased, dim=0)
        halves = f"{moments.noise([0]):17.2f} {moments.noise([1]):17.2f}"
        print(f"{name:36} {moments.noise():7.2f} {halves} {cosine:8.2f}", flush=True)


if __name__ == "__main__":
    main()
