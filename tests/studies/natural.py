"""How natural is PPO's update? `python tests/studies/natural.py RUN`.

RUN: a run under gae, such as one of five iterations, made by `python train.py --iterations 5 --name early`.

All updates start from the run's policy, and each uses one batch of 256 episodes. They are judged on 1,024
other episodes, which give the policy gradient g, with leave-one-out, and the Fisher matrix F. The natural
gradient is x = (F + 0.01 I)⁻¹ g. Columns, for the change Δ of the weights by an update:

KL       of the update, mean KL(π_old‖π) in nats per token
gain     of J, to first order: E[(ρ - 1) A] × mean length, after Δ was scaled to a KL of 0.005
cosine   of Δ and x as vectors of weights
in F     their cosine in the metric of F, ΔᵀF x / √(ΔᵀFΔ xᵀF x), which weighs each direction by how much it
         changes the policy

Adam's second moments begin as after 20 batches of this policy, its first moments at zero, so an update knows
the gradients of its own batch only. Writes natural.png into --out if matplotlib is installed.
"""

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from advantage import masked_mean
from algos import (
    action_log_probs,
    conjugate_gradient,
    fisher_vector_product,
    flatten,
    log_probs,
    map_micro_batches,
    mean_kl,
    ppo,
    reinforce,
    trainable,
    trpo,
)
from compare import COLOURS, interval, markdown, save_small
from variance import collect, load_run, moved, policy_gradient

CG_ITERS = (1, 3, 10, 30)
PPO_STEPS = (1, 2, 4, 8, 16)
DAMPING = 0.01
TARGET = 0.005  # the KL to which each update is scaled


def weights(policy):
    return flatten(trainable(policy)).detach().clone()


def scale_to_kl(policy, change, kl, batch, config):
    """The change (n,), scaled so that the mean KL(π_old‖π) on a Batch is about this one."""
    for _ in range(6):  # because the KL grows about as the square
        change = change * (kl / mean_kl(policy, moved(policy, change), batch, config)) ** 0.5
    return change


def adam_for(policy, algorithm, batches, config, lr):
    """Adam whose second moments are those of the algorithm on these batches. It moves nothing meanwhile."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.0, fused=True)
    for batch in batches:
        algorithm(policy, batch, optimizer, config, torch.Generator().manual_seed(0))
    for state in optimizer.state.values():
        state["exp_avg"].zero_()
    optimizer.param_groups[0]["lr"] = lr
    return optimizer


def updates(world, critic, seed):
    """{name: Δ (n,)} of updates that use the same batch."""
    policy = world[1]
    config = replace(world[-1], epochs=4, minibatches=4, target_kl=1000)  # 16 steps of PPO, to the last
    batch = collect(world, critic, seed)
    others = [collect(world, critic, 1000 + 20 * seed + i) for i in range(20)]
    start = weights(policy)
    found = {}

    after = copy.deepcopy(policy)
    reinforce(after, batch, torch.optim.SGD(after.parameters(), 1.0), config)
    found["REINFORCE, gradient"] = weights(after) - start

    after = copy.deepcopy(policy)
    reinforce(after, batch, adam_for(after, reinforce, others, config, lr=3e-3), config)
    found["REINFORCE, Adam"] = weights(after) - start

    after = copy.deepcopy(policy)
    optimizer = adam_for(after, ppo, others[:2], config, lr=1e-3)
    path = []
    optimizer.register_step_post_hook(lambda *_: path.append(weights(after) - start))
    ppo(after, batch, optimizer, config, torch.Generator().manual_seed(1))
    for steps in PPO_STEPS:
        found[f"PPO, minibatch steps: {steps}"] = path[steps - 1]

    for iters in CG_ITERS:
        after = copy.deepcopy(policy)
        trpo(after, batch, None, replace(config, cg_iters=iters), torch.Generator().manual_seed(1))
        found[f"TRPO, iterations of CG: {iters}"] = weights(after) - start
    return found


def gain(policy, after, batch, config):
    """E[(ρ - 1) A] × mean length, on a Batch under leave-one-out."""
    def surrogate(part):
        logp = log_probs(after, part.obs, config.temperature)
        return ((action_log_probs(logp, part.actions) - part.logprobs).exp() - 1) * part.advantages

    mean = masked_mean(map_micro_batches(surrogate, batch, config), batch.mask).item()
    return mean * batch.mask.sum(1).float().mean().item()


def measure(world, critic, batches):
    """{update: [{column: number} for each batch]}."""
    policy, config = world[1], world[-1]
    judge = collect(world, None, 12345, batch_size=1024, advantage="rloo", whiten=0)
    g = policy_gradient(policy, judge, config)
    fisher = fisher_vector_product(policy, judge, config)
    x, r = conjugate_gradient(lambda v: fisher(v) + DAMPING * v, g, iters=200, tol=1e-6)
    print(f"(F + {DAMPING} I) x = g: |r| / |g| = {(r.norm() / g.norm()).item():.4f}", flush=True)
    F_x = fisher(x)

    rows = {}
    for seed in range(batches):
        for name, change in updates(world, critic, seed).items():
            kl = mean_kl(policy, moved(policy, change), judge, config)
            scaled = scale_to_kl(policy, change, TARGET, judge, config)
            in_F = (change @ F_x) / ((change @ fisher(change)) * (x @ F_x)).sqrt()
            rows.setdefault(name, []).append({
                "KL": kl, "gain": gain(policy, moved(policy, scaled), judge, config),
                "cosine": torch.cosine_similarity(change, x, dim=0).item(), "in F": in_F.item()})
        print(f"batch {seed + 1} of {batches}", flush=True)
    natural = scale_to_kl(policy, x, TARGET, judge, config)
    print(f"gain of x itself: {gain(policy, moved(policy, natural), judge, config):.4f}")
    return rows


def plot(rows, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    names = [*rows][::-1]
    colours = [COLOURS[1 + ("PPO" in name) + 2 * ("TRPO" in name)] for name in names]
    for ax, column, title in zip(figure.subplots(1, 3, sharey=True), ("gain", "cosine", "in F"),
                                 (f"gain of J at a KL of {TARGET}", "cosine with F⁻¹g",
                                  "cosine, in the metric of F")):
        means, halves = zip(*(interval([row[column] for row in rows[name]]) for name in names))
        ax.barh(names, means, xerr=halves, color=colours)
        ax.set_title(title, fontsize=11)
    figure.suptitle("Reviews after 5 iterations: one update from the same policy, mean and 95% interval over "
                    f"{len(rows[names[0]])} batches", fontsize=11)
    save_small(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--task", help="the run's task, if it is a file: its code will be executed")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    world, critic = load_run(args.run, args.task, parser)
    rows = measure(world, critic, args.batches)
    table = []
    for name, found in rows.items():
        means = {column: (*interval([row[column] for row in found]), 1, 1) for column in found[0]}
        table.append({"": name} | means)
    print(markdown(table))
    try:
        plot(rows, args.out / "natural.png")
    except ImportError:
        print("no picture, which needs matplotlib: pip install matplotlib")


if __name__ == "__main__":
    main()
