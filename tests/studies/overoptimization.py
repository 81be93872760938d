"""What happens when a learned reward is trusted too much: `python tests/studies/overoptimization.py`.

Trains the built-in task preferences in runs/overoptimization (--out), with --seeds 0 to 4: three algorithms
at five KL coefficients on 1,000 comparisons, and ppo without a KL penalty on 250 to 16,000. Finished runs are
kept, so that commands with seeds of their own can run side by side. Prints where the true reward turns, the
fit of the law of Gao et al. 2023, and best-of-n sampling from the pretrained policy by the same rewards.
Gao, Schulman & Hilton 2023, "Scaling Laws for Reward Model Overoptimization".
"""

import argparse
import functools
import math
import sys
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import compare
import train
from model import load_checkpoint
from reward import load_task, score, use_reward_model
from rollout import complete

ALGOS = ("reinforce", "trpo", "ppo")
COEFFICIENTS = (0, 0.01, 0.03, 0.1, 0.3)
COMPARISONS = (250, 1000, 4000, 16000)
N = (1, 4, 16, 64, 256)


def name(algo, kl_coef, comparisons, seed):
    return f"{algo}-beta{kl_coef}-{comparisons}-{seed}"


def options(algo, kl_coef, comparisons, seed, out):
    """The command line of a run."""
    return (f"--task preferences --algo {algo} --kl-coef {kl_coef} --comparisons {comparisons} "
            f"--seed {seed} --eval-episodes 300 --threads 1 --out {out} "
            f"--name {name(algo, kl_coef, comparisons, seed)}").split()


def settings(seed):
    """(algo, kl_coef, comparisons, seed) of each run."""
    sweep = [(algo, kl_coef, 1000, seed) for kl_coef in COEFFICIENTS for algo in ALGOS]
    return sweep + [("ppo", 0, n, seed) for n in COMPARISONS if n != 1000]


def train_missing(seeds, out):
    """Train the runs that are not finished. Those of a seed and number of comparisons share a model."""
    learn, models = train.learn_reward, {}

    def learn_once(task, policy, tokenizer, config, generators):
        key = config.seed, config.comparisons
        if key not in models:
            models[key] = learn(task, policy, tokenizer, config, generators)
        return models[key]

    with patch.object(train, "learn_reward", learn_once):
        for seed in seeds:
            for setting in settings(seed):
                if not (out / name(*setting) / "result.json").exists():
                    train.main([*options(*setting, out), "--overwrite"])


def path_of(run):
    """(d, learned, true) of each iteration: d = √KL(π‖π_ref) of a whole text, √nats; rewards are means."""
    columns = compare.read_run(run).columns
    return compare.text_distance(columns), columns["reward"], columns["true_reward"]


def smooth(values, width=3):
    """Means over three neighbours, fewer at the ends."""
    return [fmean(values[max(0, i - width // 2):i + width // 2 + 1]) for i in range(len(values))]


def turn(d, learned, true):
    """Where the true reward is highest, smoothed, and where it ends: a row of numbers."""
    best = max(range(len(true)), key=smooth(true).__getitem__)
    near = next((reward for x, reward in zip(d, smooth(true)) if x >= 1), math.nan)
    return {"true at √KL = 1": near, "best true": smooth(true)[best], "at √KL": d[best],
            "last true": fmean(true[-3:]), "last learned": fmean(learned[-3:]), "last √KL": fmean(d[-3:])}


def law(d, true, form):
    """Least squares of true - true[0] = d (α - β form(d)): (α, β, root mean square error)."""
    d = torch.tensor(d, dtype=torch.float64)
    gain = torch.tensor(true, dtype=torch.float64) - true[0]
    kept = d > 0.01  # log d is of no use at the start
    d, gain = d[kept], gain[kept]
    terms = torch.stack([d, -d * form(d)], 1)
    solution = torch.linalg.lstsq(terms, gain[:, None]).solution
    error = (terms @ solution - gain[:, None]).square().mean().sqrt().item()
    return (*solution[:, 0].tolist(), error)


def best_of(run, seed, counts=N, task="preferences"):
    """{n: mean (learned, true) reward of the best by the model of n completions of the pretrained policy}."""
    _, reference, tokenizer, more = load_checkpoint(run)
    config = train.Config(**more["config"])
    task = load_task(task, config.pretrain_seed)
    task = use_reward_model(task, more["reward_model"], tokenizer, config)
    generator, most = torch.Generator().manual_seed(seed), max(counts)
    prompts = [prompt for prompt in task.heldout for _ in range(most)]
    texts = complete(task, reference, reference, prompts, tokenizer, config, 1.0, generator)
    pairs = list(zip(*(score(function, prompts, texts) for function in (task.reward, task.true_reward))))
    groups = [pairs[i:i + most] for i in range(0, len(pairs), most)]
    best = {n: [max(group[i:i + n]) for group in groups for i in range(0, most, n)] for n in counts}
    return {n: tuple(map(fmean, zip(*chosen))) for n, chosen in best.items()}


def table(title, rows):
    """Print {label: [{title: number} of each seed]} as Markdown: mean ± half of the 95% interval."""
    print(f"\n{title}\n\n{compare.markdown(compare.lines_of(rows, 'seeds'))}")


def report(seeds, out):
    paths = functools.cache(lambda *setting: path_of(out / name(*setting)))
    turns = lambda *setting: [turn(*paths(*setting, seed)) for seed in seeds]
    table("1,000 comparisons", {f"{algo}, β = {kl_coef}": turns(algo, kl_coef, 1000)
                                for algo in ALGOS for kl_coef in COEFFICIENTS})
    table("ppo, β = 0", {f"{n:,} comparisons": turns("ppo", 0, n) for n in COMPARISONS})
    fits = {}
    for form, title in ((lambda d: d, "d (α - β d)"), (torch.log, "d (α - β log d)")):
        for algo, n in [*((algo, 1000) for algo in ALGOS), *(("ppo", n) for n in COMPARISONS if n != 1000)]:
            found = []
            for seed in seeds:
                d, _, true = paths(algo, 0, n, seed)
                found.append(dict(zip(("α", "β", "error"), law(d, true, form))))
            fits[f"{title}: {algo}, {n:,}"] = found
    table("The law, β = 0", fits)
    best = [best_of(out / name("ppo", 0, 1000, seed), seed) for seed in seeds]
    table("Best of n, 1,000 comparisons",
          {f"n = {n}": [{"√KL": math.sqrt(math.log(n) - (n - 1) / n), "learned": one[n][0], "true": one[n][1]}
                        for one in best] for n in N})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=Path("runs/overoptimization"))
    args = parser.parse_args()
    train_missing(args.seeds, args.out)
    report(args.seeds, args.out)


if __name__ == "__main__":
    main()
