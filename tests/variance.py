"""How noisy is the gradient under each estimator? `python tests/variance.py RUN`, RUN being one under gae, which has a critic.

The run's policy and critic stand still; every estimator judges the same batches of episodes, and its gradients, one from each batch,
are compared: the trace of their covariance over the square of their mean. A batch of N times as many episodes has an N-th of it. The
cosine is that of the mean with the mean under gae with λ = 1, which no critic can bias: how far the estimator has turned.
"""

import argparse
import math
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from algos import flatten, reinforce
from model import Critic
from reward import TASKS, load_task
from rollout import load_checkpoint

ESTIMATORS = {**{f"gae, λ = {lam:g}": dict(advantage="gae", lam=lam) for lam in (1, 0.95, 0.5, 0)}, "returns": dict(advantage="returns"),
              "leave-one-out": dict(advantage="rloo"), "group-normalized": dict(advantage="grpo")}


def gradients(task, policy, reference, critic, tokenizer, config, batches):
    """A gradient from each batch, (batches, n): of the same episodes whatever the advantage."""
    optimizer, found = torch.optim.SGD(policy.parameters(), lr=0.0), []
    for seed in range(batches):
        generators = {name: torch.Generator().manual_seed(seed) for name in ("prompts", "sample")}
        batch, _ = train.collect(task, policy, reference, critic, tokenizer, config, generators)
        reinforce(policy, batch, optimizer, config)
        found.append(flatten([p.grad for p in policy.parameters()]))
    return torch.stack(found)


def noise(g):
    """tr Cov(g) / |E g|², for rows g drawn independently. The mean's square is freed of its own noise; nan where nothing is left."""
    variance, signal = g.var(0).sum(), g.mean(0).square().sum()
    signal = signal - variance / len(g)
    return (variance / signal).item() if signal > 0 else math.nan


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--task", help="the run's task, if it is a file: its code will be executed")
    parser.add_argument("--batches", type=int, default=100)
    args = parser.parse_args()
    policy, reference, tokenizer, more = load_checkpoint(args.run)
    config = replace(train.Config(**more["config"]), whiten=0, batch_size=64, group_size=4, max_grad_norm=1e9)
    if more["critic"] is None or config.task not in TASKS and args.task is None:
        sys.exit("error: give a run under gae, and its --task if that is a file")
    critic = Critic(policy.config, policy)
    critic.load_state_dict(more["critic"])
    task = load_task(args.task or config.task, config.pretrain_seed)
    print(f"{args.run}: {args.batches} batches of {config.batch_size} episodes\n{'':18}    noise  from either half of the batches    cosine")
    unbiased = None
    for name, choice in ESTIMATORS.items():
        g = gradients(task, policy, reference, critic, tokenizer, replace(config, **choice), args.batches)
        unbiased = g.mean(0) if unbiased is None else unbiased
        cosine = torch.cosine_similarity(g.mean(0), unbiased, dim=0)
        print(f"{name:18} {noise(g):8.2f} {noise(g[::2]):17.2f} {noise(g[1::2]):17.2f} {cosine:9.2f}", flush=True)


if __name__ == "__main__":
    main()
