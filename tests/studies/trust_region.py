"""A ratio is not a trust region: how far does an update move single states? `trust_region.py RUN`.

RUN: a run under gae, such as one of five iterations, made by `python train.py --iterations 5 --name early`.

PPO's update is compared with two others of the same batch, scaled to the same mean KL(π_old‖π): PPO without
clipping, and TRPO's step. For each action of the batch: its probability under π_old, its ratio, and the exact
KL of its state. Adam's second moments are those of 32 minibatches of the same policy. Writes trust_region.png
into --out, for the first batch, if matplotlib is installed.
"""

import argparse
import copy
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from algos import action_log_probs, kl_divergence, log_probs, map_micro_batches, mean_kl, ppo, trpo
from compare import save_small
from natural import adam_for, scale_to_kl, weights
from variance import collect, load_run, moved

BINS = (0, 0.01, 0.1, 0.5, 1.0001)  # of π_old(a|s)


def updated(world, critic, batch, seed):
    """{name: policy after an update}, of equal mean KL from the policy on the batch."""
    policy, config = world[1], world[-1]
    others = [collect(world, critic, 1000 + 20 * seed + i) for i in range(2)]
    start = weights(policy)
    changes = {}
    for name, clip in (("PPO", config.clip), ("PPO without clipping", 1e9)):
        after = copy.deepcopy(policy)
        optimizer = adam_for(after, ppo, others, config, lr=1e-3)
        ppo(after, batch, optimizer, replace(config, clip=clip), torch.Generator().manual_seed(1))
        changes[name] = weights(after) - start
    after = copy.deepcopy(policy)
    trpo(after, batch, None, config, torch.Generator().manual_seed(1))
    changes["TRPO"] = weights(after) - start
    kl = mean_kl(policy, moved(policy, changes["PPO"]), batch, config)
    return {name: moved(policy, scale_to_kl(policy, change, kl, batch, config))
            for name, change in changes.items()}


def actions(policy, after, batch, config):
    """π_old of each action of the batch, its ratio, and the KL of its state, (n,) each."""
    def columns(part):
        old = log_probs(policy, part.obs, config.temperature)  # (b, T, A)
        new = log_probs(after, part.obs, config.temperature)
        p_old = action_log_probs(old, part.actions).exp()  # (b, T)
        ratio = action_log_probs(new, part.actions).exp() / p_old
        return torch.stack([p_old, ratio, kl_divergence(old, new)], -1)

    return map_micro_batches(columns, batch, config)[batch.mask].unbind(-1)


def columns_of(p, ratio, kl, clip):
    """{column: number} of an update."""
    outside = ((ratio - 1).abs() > clip).float()
    worst = kl.sort().values[-(len(kl) // 100):]
    row = {"mean KL": kl.mean(), "largest KL": kl.max(), "share of the worst 1%": worst.sum() / kl.sum(),
           "outside": outside.mean()}
    for low, high in zip(BINS, BINS[1:]):
        chosen = (p >= low) & (p < high)
        row |= {f"outside, π_old from {low}": outside[chosen].mean(),
                f"KL, π_old from {low}": kl[chosen].mean()}
    return {name: value.item() for name, value in row.items()}


def plot(found, clip, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    for ax, (name, (p, ratio, kl)) in zip(figure.subplots(1, 3, sharex=True, sharey=True), found.items()):
        dots = ax.scatter(p, ratio, c=kl.clamp(min=1e-4), s=5, cmap="cividis", norm="log", vmin=1e-4, vmax=1)
        ax.axhspan(1 - clip, 1 + clip, color="#CCCCCC", alpha=0.5, zorder=0)
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_title(f"{name}:\nmean KL {kl.mean():.3f}, largest {kl.max():.2f} nats", fontsize=11)
    figure.supxlabel("probability of the action before the update", fontsize=11)
    figure.supylabel("ratio π / π_old", fontsize=11)
    figure.colorbar(dots, ax=figure.axes, label="KL of the state, nats")
    figure.suptitle("Reviews: every action of a batch after one update; grey: the clip range", fontsize=11)
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
    policy, config = world[1], world[-1]
    rows = {}
    for seed in range(args.batches):
        batch = collect(world, critic, seed)
        found = {name: actions(policy, after, batch, config)
                 for name, after in updated(world, critic, batch, seed).items()}
        for name, columns in found.items():
            rows.setdefault(name, []).append(columns_of(*columns, config.clip))
        if seed == 0:
            try:
                plot(found, config.clip, args.out / "trust_region.png")
            except ImportError:
                print("no picture, which needs matplotlib: pip install matplotlib")
    print(f"| | {' | '.join(rows)} |\n|{'---|' * (len(rows) + 1)}")
    for column in rows["PPO"][0]:
        cells = []
        for found in rows.values():
            values = [row[column] for row in found]
            cells.append(f"{fmean(values):.3f} ({' '.join(f'{value:.3g}' for value in values)})")
        print(f"| {column} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
