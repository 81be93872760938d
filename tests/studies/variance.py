"""How noisy is the gradient under each advantage estimator? `python tests/studies/variance.py RUN`.

RUN: a run with a critic (--advantage gae).

The run's policy and critic stand still, and every estimator gets the same batches of episodes. Noise is the
trace of the covariance of the batches' gradients over the square of their mean; a batch of N times as many
episodes has an N-th of it. Cosine is that of the mean gradient with the mean under gae with λ = 1, which no
critic can bias.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from algos import flatten, reinforce
from model import BadInput, Critic, load_checkpoint
from reward import TASKS, load_task

ESTIMATORS = {f"gae, λ = {lam:g}": dict(advantage="gae", lam=lam) for lam in (1, 0.95, 0.5, 0)} | {
    "returns": dict(advantage="returns"),
    "returns, whitened": dict(advantage="returns", whiten=1),
    "leave-one-out": dict(advantage="rloo"),
    "group-normalized": dict(advantage="grpo")}


def gradients(task, policy, reference, critic, tokenizer, config, batches):
    """A gradient from each batch, (batches, n). The episodes are the same whatever the estimator."""
    optimizer, found = torch.optim.SGD(policy.parameters(), lr=0.0), []
    for seed in range(batches):
        generators = {name: torch.Generator().manual_seed(seed) for name in ("prompts", "sample")}
        batch, _ = train.collect(task, policy, reference, critic, tokenizer, config, generators)
        reinforce(policy, batch, optimizer, config)
        found.append(flatten([p.grad for p in policy.parameters()]))
    return torch.stack(found)


def noise(g):
    """tr Cov(g) / |E g|² for independent rows g (N, n); nan where the noise hides the mean.

    The square of the sample mean exceeds |E g|² by tr Cov(g) / N on average, which is subtracted.
    """
    variance = g.var(0).sum()
    signal = g.mean(0).square().sum() - variance / len(g)
    return (variance / signal).item() if signal > 0 else math.nan


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--task", help="the run's task, if it is a file: its code will be executed")
    parser.add_argument("--batches", type=int, default=100)
    args = parser.parse_args()
    try:
        policy, reference, tokenizer, more = load_checkpoint(args.run)
    except BadInput as e:
        parser.error(str(e))
    if "critic" not in more:
        parser.error(f"{args.run} has no critic: give a run under gae")
    config = replace(train.Config(**more["config"]), whiten=0, batch_size=64, group_size=4, max_grad_norm=1e9)
    if config.task not in TASKS and args.task is None:
        parser.error(f"{args.run} uses a task file: add --task {config.task} to execute it")
    critic = Critic(policy.config, policy)
    critic.load_state_dict(more["critic"])
    task = load_task(args.task or config.task, config.pretrain_seed)

    print(f"{args.run}: {args.batches} batches of {config.batch_size} episodes")
    print(f"{'':18}    noise  from either half of the batches    cosine")
    unbiased = None
    for name, choice in ESTIMATORS.items():
        chosen = replace(config, **choice)
        g = gradients(task, policy, reference, critic, tokenizer, chosen, args.batches)
        unbiased = g.mean(0) if unbiased is None else unbiased
        cosine = torch.cosine_similarity(g.mean(0), unbiased, dim=0)
        halves = f"{noise(g[::2]):17.2f} {noise(g[1::2]):17.2f}"
        print(f"{name:18} {noise(g):8.2f} {halves} {cosine:9.2f}", flush=True)


if __name__ == "__main__":
    main()
