"""How natural is PPO's update? And does clipping keep a policy near the old one?

`python tests/studies/natural.py RUN`. RUN: a run under gae, such as one of five iterations, made by
`python train.py --iterations 5 --name early`.

Each update starts from the run's policy and the same batch. g is the batch's policy gradient, F the Fisher
matrix over all of its episodes. For each update Δ of the weights:

gain / √KL    E[(ρ - 1) A] × the mean length, which is how much J rises to first order, over the square root
              of the mean KL(π_old‖π). Both are taken over 2,048 other episodes, with A from leave-one-out.
cosines       of Δ with g and with x = (F + λI)⁻¹ g; and in the metric of F, ΔᵀF x / √(ΔᵀFΔ xᵀF x), which
              counts a direction by how much it changes the policy.

REINFORCE's gradient steps have a KL of about 0.001, because their ratio does not depend on the length. Adam's
averages begin as after 20 batches of this policy (PPO: 2, with 32 minibatches) at a learning rate of zero.
Writes natural.png and trust_region.png into --out if matplotlib is installed.
"""

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from advantage import masked_mean
from algos import (
    action_log_probs,
    conjugate_gradient,
    fisher_vector_product,
    flatten,
    kl_divergence,
    log_probs,
    map_micro_batches,
    mean_kl,
    ppo,
    reinforce,
    trainable,
    trpo,
    unflatten,
)
from compare import COLOURS, cell, interval
from variance import load_run
from words import save_small

CG_ITERS = (1, 3, 10, 30)
PPO_STEPS = (1, 2, 4, 8, 16)
DAMPINGS = (0.1, 0.01)


def collect(world, critic, seed, **options):
    task, policy, reference, tokenizer, config = world
    config = replace(config, **options)
    generators = train.random_generators(seed, 10 ** 6, "cpu")
    return train.collect(task, policy, reference, critic, tokenizer, config, generators)[0]


def moved(policy, change):
    """A copy of the policy with this change (n,) of its weights."""
    policy = copy.deepcopy(policy)
    params = trainable(policy)
    with torch.no_grad():
        for p, piece in zip(params, unflatten(change, params)):
            p += piece
    return policy


def weights(policy):
    return flatten(trainable(policy)).detach().clone()


def warm_adam(policy, algorithm, batches, config):
    """Adam for this policy, with the averages that the algorithm has after these batches; nothing moves."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.0, fused=True)
    for batch in batches:
        algorithm(policy, batch, optimizer, config, torch.Generator().manual_seed(0))
    optimizer.param_groups[0]["lr"] = config.lr
    return optimizer


def updates(world, batch, g, fisher, warm):
    """{name: Δ (n,)}. warm: batches for Adam's averages."""
    policy, config = world[1], world[-1]
    generator = torch.Generator().manual_seed(1)
    start = weights(policy)
    found = {"REINFORCE, gradient": (0.002 / (g @ fisher(g))).sqrt() * g}

    still = copy.deepcopy(policy)
    optimizer = warm_adam(still, reinforce, warm, replace(config, lr=3e-3))
    reinforce(still, batch, optimizer, config)
    found["REINFORCE, Adam"] = weights(still) - start

    still = copy.deepcopy(policy)
    optimizer = warm_adam(still, ppo, warm[:2], replace(config, lr=1e-3, target_kl=1000))
    path = []
    optimizer.register_step_post_hook(lambda *_: path.append(weights(still) - start))
    ppo(still, batch, optimizer, replace(config, target_kl=1000), generator)
    for steps in PPO_STEPS:
        found[f"PPO, {steps} minibatch steps"] = path[steps - 1]

    for iters in CG_ITERS:
        still = copy.deepcopy(policy)
        trpo(still, batch, None, replace(config, cg_iters=iters), generator)
        found[f"TRPO, {iters} iterations of CG"] = weights(still) - start
    return found


def effect(policy, changed, batch, config):
    """(E[(ρ - 1) A] × mean length, mean KL) on a Batch under rloo."""
    def gain(part):
        logp = log_probs(changed, part.obs, config.temperature)
        return ((action_log_probs(logp, part.actions) - part.logprobs).exp() - 1) * part.advantages

    mean = masked_mean(map_micro_batches(gain, batch, config), batch.mask).item()
    return mean * batch.mask.sum(1).float().mean().item(), mean_kl(policy, changed, batch, config)


def measure(world, critic, seed, other):
    """{update: {column: number}} for one batch. other: a large Batch under rloo."""
    policy, config = world[1], world[-1]
    batch = collect(world, critic, seed)
    reinforce(policy, batch, torch.optim.SGD(policy.parameters(), 0.0), replace(config, max_grad_norm=1e9))
    g = -flatten([p.grad for p in trainable(policy)])
    fisher = fisher_vector_product(policy, batch, config)
    natural = {}
    for damping in DAMPINGS:
        x, r = conjugate_gradient(lambda v: fisher(v) + damping * v, g, iters=150)
        print(f"batch {seed}, damping {damping}: |r| / |g| = {(r.norm() / g.norm()).item():.3f}", flush=True)
        natural[damping] = x, fisher(x)
    warm = [collect(world, critic, 1000 + seed * 20 + i) for i in range(20)]

    rows = {}
    for name, change in updates(world, batch, g, fisher, warm).items():
        gain, kl = effect(policy, moved(policy, change), other, config)
        row = {"gain": gain, "KL": kl, "gain / √KL": gain / kl ** 0.5, "cosine with g": cosine(change, g)}
        F_change = fisher(change)
        for damping, (x, F_x) in natural.items():
            row[f"with x, λ = {damping}"] = cosine(change, x)
            row[f"in F, λ = {damping}"] = ((change @ F_x) / ((change @ F_change) * (x @ F_x)).sqrt()).item()
        rows[name] = row
    return rows


def cosine(a, b):
    return torch.cosine_similarity(a, b, dim=0).item()


# A ratio is not a trust region.

@torch.no_grad()
def compare_steps(world, critic, seed):
    """PPO's update and TRPO's step of equal mean KL: π_old of each action, its ratio, and its state's KL.

    Returns {algorithm: (p, ratio, kl)}, (n,) each, of the batch that the update has used.
    """
    policy, config = world[1], world[-1]
    batch = collect(world, critic, seed)
    generator = torch.Generator().manual_seed(1)
    start = weights(policy)
    changed = {}
    with torch.enable_grad():
        after = copy.deepcopy(policy)
        warm = [collect(world, critic, 1000 + seed * 20 + i) for i in range(2)]
        optimizer = warm_adam(after, ppo, warm, replace(config, lr=1e-3, target_kl=1000))
        ppo(after, batch, optimizer, config, generator)
        changed["PPO"] = after
        target = mean_kl(policy, after, batch, config)
        after = copy.deepcopy(policy)
        trpo(after, batch, None, config, generator)
    step = weights(after) - start
    low, high = 0.0, 100.0
    for _ in range(30):  # bisection for the length of TRPO's step
        middle = (low + high) / 2
        too_far = mean_kl(policy, moved(policy, middle * step), batch, config) > target
        low, high = (low, middle) if too_far else (middle, high)
    changed["TRPO"] = moved(policy, low * step)

    found = {}
    for name, after in changed.items():
        def columns(part):
            old = log_probs(policy, part.obs, config.temperature)  # (b, T, A)
            new = log_probs(after, part.obs, config.temperature)
            p_old = action_log_probs(old, part.actions).exp()  # (b, T)
            ratio = action_log_probs(new, part.actions).exp() / p_old
            return torch.stack([p_old, ratio, kl_divergence(old, new)], -1)
        found[name] = map_micro_batches(columns, batch, config)[batch.mask].unbind(-1)
    return found


BINS = (0, 0.01, 0.1, 0.5, 1.0001)


def print_steps(found, clip):
    for name, (p, ratio, kl) in found.items():
        outside = (ratio - 1).abs() > clip
        top = (kl.sort().values[-(len(kl) // 100):].sum() / kl.sum()).item()
        print(f"{name}: mean KL {kl.mean():.4f}, largest of a state {kl.max():.3f}, share of the 1% of "
              f"states with the largest: {top:.2f}; ratios from {ratio.min():.2f} to {ratio.max():.2f}, "
              f"{outside.float().mean():.3f} of them outside the clip range")
        for low, high in zip(BINS, BINS[1:]):
            chosen = (p >= low) & (p < high)
            print(f"  π_old from {low:g} to {min(high, 1):g}: {chosen.float().mean():.3f} of the actions, "
                  f"outside {outside[chosen].float().mean():.3f}, mean KL of their states "
                  f"{kl[chosen].mean():.4f}")


# Pictures.

def plot_natural(rows, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    names = [*rows][::-1]
    for ax, column, title in zip(axes, ("gain / √KL", "with x, λ = 0.01", "in F, λ = 0.01"),
                                 ("gain of the score / √KL", "cosine with F⁻¹g",
                                  "cosine, in the metric of F")):
        means, halves = zip(*(interval([row[column] for row in rows[name]]) for name in names))
        colours = [COLOURS[1 + ("PPO" in name) + 2 * ("TRPO" in name)] for name in names]
        ax.barh(names, means, xerr=halves, color=colours)
        ax.set_title(title, fontsize=11)
    figure.suptitle("Reviews after 5 iterations: one update from the same policy, mean and 95% interval over "
                    f"{len(rows[names[0]])} batches", fontsize=11)
    save_small(figure, path, dpi=80)


def plot_steps(found, clip, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    for ax, (name, (p, ratio, kl)) in zip(figure.subplots(1, 2, sharex=True, sharey=True), found.items()):
        dots = ax.scatter(p, ratio, c=kl.clamp(min=1e-4), s=5, cmap="cividis", norm="log", vmin=1e-4, vmax=1)
        ax.axhspan(1 - clip, 1 + clip, color="#CCCCCC", alpha=0.5, zorder=0)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(f"{name}: mean KL {kl.mean():.3f}, largest of a state {kl.max():.2f} nats", fontsize=11)
        ax.set_xlabel("probability of the action before the update", fontsize=11)
    figure.axes[0].set_ylabel("ratio π / π_old", fontsize=11)
    figure.colorbar(dots, ax=figure.axes, label="KL of the state, nats")
    figure.suptitle("Reviews: every action of a batch after one update; grey: PPO's clip range", fontsize=11)
    save_small(figure, path, dpi=80)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--task", help="the run's task, if it is a file: its code will be executed")
    parser.add_argument("--batches", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args()
    world, critic = load_run(args.run, args.task, parser)
    world = (*world[:-1], replace(world[-1], max_grad_norm=1.0))
    steps = [compare_steps(world, critic, seed) for seed in range(args.batches)]
    for found in steps:
        print_steps(found, world[-1].clip)
    other = collect(world, None, 12345, batch_size=2048, advantage="rloo", whiten=0)
    batches = [measure(world, critic, seed, other) for seed in range(args.batches)]
    rows = {name: [batch[name] for batch in batches] for name in batches[0]}
    columns = [*batches[0][[*rows][0]]]
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, found_rows in rows.items():
        cells = [cell((*interval([row[column] for row in found_rows]), 1, 1)) for column in columns]
        print(f"| {name} | {' | '.join(cells)} |")
    try:
        plot_steps(steps[0], world[-1].clip, args.out / "trust_region.png")
        plot_natural(rows, args.out / "natural.png")
    except ImportError:
        print("no pictures, which need matplotlib: pip install matplotlib")


if __name__ == "__main__":
    main()
