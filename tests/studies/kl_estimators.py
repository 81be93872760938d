"""What does each estimator of the KL do as a penalty? `python tests/studies/kl_estimators.py RUN`.

RUN: a run on reviews without a penalty, made by `python train.py --kl-coef 0 --name hacked`.

Its policy is trained on the penalty only, to come back to the reference: 60 Adam steps, each on 48
completions, 12 prompts with 4 of each. As a term of the loss an estimator is differentiated. k1 in the reward
is not: the score of a text is minus the sum of its k1, and the mean score of the other 3 is its baseline.
Writes kl_estimators.csv and, if matplotlib is installed, a picture into --out. Tang & Munos 2025.
"""

import argparse
import copy
import csv
import random
import sys
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from advantage import leave_one_out, masked_mean
from algos import action_log_probs, entropy, kl_divergence
from compare import COLOURS, cell, interval, save_small
from model import BadInput, load_checkpoint
from reward import reviews
from rollout import sample

STEPS = 60

# How the penalty enters, and how texts are sampled. x is log π - log π_ref of an action.
SETTINGS = {
    "k1 in the reward": ("reward", {}),
    "k1 in the loss": (lambda x: x, {}),
    "k2 in the loss": (lambda x: x ** 2 / 2, {}),
    "k3 in the loss": (lambda x: (-x).exp() - 1 + x, {}),
    "k3 with a wrong sign in the loss": (lambda x: x.exp() - 1 - x, {}),
    "exact KL in the loss": ("exact", {}),
    "k1 in the loss, T = 0.8 and top-p 0.9": (lambda x: x, dict(temperature=0.8, top_p=0.9)),
}


def train_on_penalty(setting, policy, reference, task, tokenizer, seed):
    """Yield (KL, entropy, length) of the policy's texts before each step, and after the last."""
    penalty, sampling = SETTINGS[setting]
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    policy = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)
    for _ in range(STEPS + 1):
        prompts = [tokenizer.encode(prompt) for prompt in rng.choices(task.prompts, k=12) for _ in range(4)]
        batch = sample(policy, prompts, 44, tokenizer.eos_token, generator=generator, **sampling)
        logp = policy(batch.obs).log_softmax(-1)  # (B, T, A)
        with torch.no_grad():
            ref_logp = reference(batch.obs).log_softmax(-1)
        x = action_log_probs(logp - ref_logp, batch.actions).masked_fill(~batch.mask, 0)  # (B, T)
        yield (masked_mean(kl_divergence(logp, ref_logp), batch.mask).item(),
               masked_mean(entropy(logp), batch.mask).item(), batch.mask.sum(1).float().mean().item())

        if penalty == "exact":
            loss = (logp.exp() * (logp - ref_logp)).sum(-1)
        elif penalty == "reward":
            advantages = leave_one_out(-x.detach().sum(1), group_size=4)  # (B,)
            loss = -action_log_probs(logp, batch.actions) * advantages[:, None]
        else:
            loss = penalty(x)
        optimizer.zero_grad()
        (loss.masked_fill(~batch.mask, 0).sum() / batch.mask.sum()).backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()


def measure(policy, reference, tokenizer, seeds):
    """{setting: [[(KL, entropy, length) before each step] for each seed]}."""
    task = reviews(seed=0)
    curves = {}
    for setting in SETTINGS:
        curves[setting] = []
        for seed in range(seeds):
            curves[setting].append([*train_on_penalty(setting, policy, reference, task, tokenizer, seed)])
        print(table_row(setting, curves[setting]), flush=True)
    return curves


def table_row(setting, runs):
    """Means of the last five steps: KL per token and of a text, entropy, length."""
    rows = []
    for run in runs:
        kl, nats, length = (fmean(values) for values in zip(*run[-5:]))
        rows.append((kl, kl * length, nats, length))
    return f"| {setting} | {' | '.join(cell((*interval(values), 1, 1)) for values in zip(*rows))} |"


def plot(curves, path):
    from matplotlib.figure import Figure
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (setting, runs), colour in zip(curves.items(), COLOURS):
        style = dict(color=colour, linestyle="--" if "top-p" in setting else "-", linewidth=1)
        for i, run in enumerate(runs):
            left.plot([kl * length for kl, _, length in run], **style, label="" if i else setting)
            right.plot([nats for _, nats, _ in run], **style)
    left.set_yscale("log")
    left.set_title("exact KL(π‖π_ref) of a text, nats", fontsize=11)
    right.set_title("entropy of π, nats per token", fontsize=11)
    for axes in (left, right):
        axes.set_xlabel("steps on the penalty only", fontsize=11)
    figure.suptitle("Reviews: which penalties bring a policy back to its reference? Three seeds", fontsize=11)
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=10)
    save_small(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        policy, reference, tokenizer, _ = load_checkpoint(args.run)
    except BadInput as e:
        parser.error(str(e))
    print("| penalty | KL per token | KL of a text | entropy | length |\n|---|---|---|---|---|")
    curves = measure(policy, reference, tokenizer, args.seeds)
    with open(args.out / "kl_estimators.csv", "w", newline="") as file:
        sheet = csv.writer(file, lineterminator="\n")
        sheet.writerow(["penalty", "seed", "step", "kl", "entropy", "length"])
        for setting, runs in curves.items():
            for seed, curve in enumerate(runs):
                for step, numbers in enumerate(curve):
                    sheet.writerow([setting, seed, step, *(f"{x:.4g}" for x in numbers)])
    try:
        plot(curves, args.out / "kl_estimators.png")
    except ImportError:
        print("no picture, which needs matplotlib: pip install matplotlib")


if __name__ == "__main__":
    main()
