"""What does damping do to TRPO's step? `python tests/studies/damping.py RUN`.

RUN: a run under gae, such as runs/reviews-trpo-0. One batch of episodes is sampled from its policy. The step
is TRPO's before its line search: s = sqrt(2δ / xᵀ(F + λI)x) x with (F + λI) x = g and F over a fraction of
the episodes. The columns: ½ sᵀF s with F over all episodes, and the exact KL of that step, both in nats,
where δ is allowed; the damping's share of xᵀ(F + λI)x; the cosine of s with g; and λ over the mean eigenvalue
of F.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from algos import conjugate_gradient, fisher_vector_product, mean_kl
from variance import collect, load_run, moved, policy_gradient


def mean_eigenvalue(fisher, n, probes=10):
    """The trace of F over n, by Hutchinson's estimator: E[zᵀF z] = tr F for random signs z."""
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, (probes, n), generator=generator) * 2.0 - 1
    return sum((z @ fisher(z)).item() for z in signs) / probes / n


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--task", help="the run's task, if it is a file: its code will be executed")
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.1, 1.0])
    parser.add_argument("--dampings", type=float, nargs="+", default=[0.001, 0.01, 0.1, 1.0])
    args = parser.parse_args()
    world, critic = load_run(args.run, args.task, parser)
    policy, config = world[1], world[-1]
    batch = collect(world, critic, seed=0)
    g = policy_gradient(policy, batch, config)
    whole = fisher_vector_product(policy, batch, config)
    eigenvalue = mean_eigenvalue(whole, len(g))
    print(f"{args.run}: δ = {config.delta}, mean eigenvalue of F {eigenvalue:.2e}")
    print("fraction  damping  ½ sᵀF s  exact KL  damping's share  cosine with g  λ / mean eigenvalue")
    for fraction in args.fractions:
        order = torch.randperm(len(batch.mask), generator=torch.Generator().manual_seed(0))
        index = order[:math.ceil(fraction * len(batch.mask))]
        part = fisher_vector_product(policy, batch.rows(index), config)
        for damping in args.dampings:
            x, r = conjugate_gradient(lambda v: part(v) + damping * v, g, config.cg_iters)
            xFx = x @ (g - r)
            s = (2 * config.delta / xFx).sqrt() * x
            kl = mean_kl(policy, moved(policy, s), batch, config)
            cosine = torch.cosine_similarity(s, g, dim=0).item()
            print(f"{fraction:8} {damping:8} {(s @ whole(s) / 2).item():8.4f} "
                  f"{kl:9.4f} {(damping * x @ x / xFx).item():16.2f} {cosine:14.2f} "
                  f"{damping / eigenvalue:19.0f}", flush=True)


if __name__ == "__main__":
    main()
