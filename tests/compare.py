"""Figures of finished runs that studies need beside train.py's own table: `python tests/compare.py RUN…`.

It prints a Markdown table. Runs of one task whose names differ in the seed at the end form a group; a cell is
its mean ± half of the 95% interval. "(3 of 5)": only 3 of 5 runs have the figure.

final reward: of sampled completions of held-out prompts, after RL.
to 90%: the iterations until the mean reward of the last five is 90% of the way from the first reward to the
    best, both of the groups' mean curves (each iteration's reward, averaged over a group's runs): the mean of
    their first values, which precede any update, and their highest mean of five in a row. The goal is the
    same for all groups: measured by its own best, a group that learns little would seem to learn fast.
KL of an update: the mean of kl_update, nats.  CG residual: the mean of |r| / |g|.
rejected: the share of iterations in which TRPO took no step.  halvings: the mean over the others.
clip fraction: the mean share of ratios that leave PPO's clip range.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parent.parent))

from model import BadInput
from train import interval, read_run

WINDOW = 5  # iterations that are averaged before a curve is compared with the goal


def smooth(values):
    """The mean of each WINDOW values in a row, or of all values where there are fewer."""
    n = min(WINDOW, len(values))
    return [fmean(values[i:i + n]) for i in range(len(values) - n + 1)]


def reward_to_reach(curves):
    """90% of the way from the first reward to the best, see above."""
    first = fmean(curve[0] for curve in curves)
    best = max(max(smooth(curve)) for curve in curves)
    return first + 0.9 * (best - first)


def iterations_to(goal, rewards):
    """The iterations done when the mean of the last WINDOW first reaches the goal, None if it never does."""
    ends = range(min(WINDOW, len(rewards)), len(rewards) + 1)
    return next((end for end, mean in zip(ends, smooth(rewards)) if mean >= goal), None)


def figures(result, metrics, goal):
    """{title: a run's figure}, None where it has none."""
    mean = lambda column: fmean(metrics[column]) if column in metrics else None
    accepted = metrics.get("accepted", [])
    halvings = [h for h, a in zip(metrics.get("halvings", []), accepted) if a]
    return {"iterations": len(metrics["reward"]), "final reward": result["after"]["reward"],
            "to 90%": iterations_to(goal, metrics["reward"]), "KL of an update": mean("kl_update"),
            "rejected": 1 - fmean(accepted) if accepted else None,
            "halvings": fmean(halvings) if halvings else None,
            "CG residual": mean("cg_relative_residual"), "clip fraction": mean("clip_fraction")}


def cell(values):
    """Mean ± half of the 95% interval of the values that are not None."""
    known = [value for value in values if value is not None]
    mean, half = interval(known) if known else (0, 0)
    some = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return (f"{mean:.3g}" + f" ± {half:.2g}" * (len(known) > 1) + some) * bool(known)


def sparklines(curves, width=40):
    """Each curve as a row of blocks, all on one scale. A block is the mean of a few iterations."""
    step = math.ceil(max(map(len, curves)) / width)
    low, high = min(map(min, curves)), max(map(max, curves))
    block = lambda mean: "▁▂▃▄▅▆▇█"[min(7, int(8 * (mean - low) / max(high - low, 1e-12)))]
    return ["".join(block(fmean(curve[i:i + step])) for i in range(0, len(curve), step)) for curve in curves]


def table(runs):
    """The Markdown table of finished runs. Raises BadInput."""
    groups, tasks = {}, set()
    for run in runs:
        label, result, metrics = read_run(run)
        groups.setdefault(label, []).append((result, metrics))
        tasks.add(json.loads((Path(run) / "config.json").read_text(encoding="utf-8"))["task"])
    if len(tasks) > 1:
        raise BadInput(f"these runs are of several tasks, {', '.join(sorted(tasks))}: compare those of one")
    curves = [[fmean(rewards) for rewards in zip(*(metrics["reward"] for _, metrics in group))]
              for group in groups.values()]  # a mean curve is as long as the group's shortest run
    goal, lines = reward_to_reach(curves), []
    for (label, group), curve, blocks in zip(groups.items(), curves, sparklines(curves)):
        rows = [figures(result, metrics, goal) for result, metrics in group]
        cells = {title: cell([row[title] for row in rows]) for title in rows[0]}
        cells["reward over the iterations"] = f"{blocks} {curve[0]:.3f} to {curve[-1]:.3f}"
        lines.append([label, str(len(group)), *cells.values()])
    titles = ["", "runs", *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in [titles, ["---"] * len(titles), *lines])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    try:
        print(table(parser.parse_args().runs))
    except (BadInput, OSError, LookupError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
