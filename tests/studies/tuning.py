"""Tune each algorithm's step size, and the critic's training, in the same way. Prints a table for each study.

`python tests/studies/tuning.py reviews`. All runs of a study have the same number of episodes. Their corpus
is that of --pretrain-seed 2, which no reported number uses. A run has two scores, both of the objective that
RL maximizes, reward - β·KL of a text: the mean over all iterations, and over the last fifth. The step
size with the best mean of the two scores becomes the default; so does the cheapest training of the critic
that is not clearly worse than the best.

A finished run is a row of results/tuning.csv, and is not trained again while that row is there.
"""

import argparse
import csv
import math
import sys
from dataclasses import replace
from pathlib import Path
from statistics import fmean

sys.path.insert(0, str(Path(__file__).parent))

import compare

RESULTS = Path(__file__).parent / "results" / "tuning.csv"
SEEDS = 3
NAMES = ("study", "algorithm", "setting", "seed", "commit")  # the columns that are no numbers

# Options of train.py; all combinations of the values are trained. A step size begins with three values, half
# a decade apart, and is continued where the best is at an edge.
STUDIES = {
    "critic": [dict(task="reviews", algo="reinforce", lr="0.003", critic_epochs="2,4,8", critic_lr="0.001"),
               dict(task="reviews", algo="reinforce", lr="0.003", critic_epochs="2,4", critic_lr="0.003"),
               dict(task="reviews", algo="ppo", lr="0.001", critic_epochs="2,4", critic_lr="0.001,0.003")],
    "reviews": [dict(task="reviews", algo="reinforce", lr="0.001,0.003,0.01"),
                dict(task="reviews", algo="ppo", lr="0.0003,0.001,0.003"),
                dict(task="reviews", algo="trpo", delta="0.003,0.01,0.03")],
    "addition": [dict(task="addition", algo="reinforce", iterations="75",
                      lr="0.00003,0.0001,0.0003,0.001,0.003"),
                 dict(task="addition", algo="ppo", iterations="75", lr="0.00003,0.0001,0.0003"),
                 dict(task="addition", algo="trpo", iterations="75", delta="0.003,0.01,0.03")],
    # The rate of 0.003 is in "addition".
    "critic-addition": [dict(task="addition", algo="reinforce", iterations="75", lr="0.001",
                             critic_lr="0.001"),
                        dict(task="addition", algo="ppo", iterations="75", lr="0.0001", critic_lr="0.001")],
    # The defaults, which come from reviews, and their two neighbours.
    "hello": [dict(task="hello", algo="reinforce", lr="0.001,0.003,0.01"),
              dict(task="hello", algo="ppo", lr="0.0003,0.001,0.003"),
              dict(task="hello", algo="trpo", delta="0.003,0.01,0.03")],
    "preferences": [dict(task="preferences", algo="reinforce", lr="0.001,0.003,0.01"),
                    dict(task="preferences", algo="ppo", lr="0.0003,0.001,0.003"),
                    dict(task="preferences", algo="trpo", delta="0.003,0.01,0.03")],
}


def plan(study, out):
    """{(algorithm, setting, seed): Planned} of a study."""
    planned = {}
    for options in STUDIES[study]:
        shown = [name for name in options if name not in ("task", "algo", "iterations")]
        for run in compare.plan({**options, "pretrain_seed": "2", "out": str(out / study)}, SEEDS):
            setting = ", ".join(f"{name} {getattr(run.config, name):g}" for name in shown)
            algo, seed = run.config.algo, run.config.seed
            run.config = replace(run.config, name=f"{algo} {setting} {seed}".replace(" ", "-"))
            run.state = compare.state_of(run.config)
            planned[algo, setting, seed] = run
    return planned


def scores(run):
    """The numbers of a finished run, a compare.Run."""
    objective = run.columns["objective"]
    after = run.result["after"]
    last = math.ceil(len(objective) / 5)
    mean, end = fmean(objective), fmean(objective[-last:])
    return {"both": (mean + end) / 2, "all iterations": mean, "last fifth": end, "reward": after["reward"],
            "metric": after["metric"], "KL": after["kl"], "length": after["length"],
            "explained variance": fmean(run.columns["explained_variance"][-last:])}


def read_rows():
    """[{column: text}] of the CSV, oldest first."""
    if not RESULTS.exists():
        return []
    with open(RESULTS, encoding="utf-8") as file:
        return list(csv.DictReader(file))


def add_row(row):
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with open(RESULTS, "a", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*row], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


def run_study(study, out, jobs):
    """Train the runs of a study that have no row yet, and add their rows."""
    planned = plan(study, out)
    done = {(row["algorithm"], row["setting"], int(row["seed"])) for row in read_rows()
            if row["study"] == study}
    keys = {run.path: key for key, run in planned.items()}

    def finished(run):
        algo, setting, seed = keys[run.path]
        trained = compare.read_run(run.path)
        numbers = {name: f"{value:.5g}" for name, value in scores(trained).items()}
        add_row({"study": study, "algorithm": algo, "setting": setting, "seed": seed, **numbers,
                 "commit": trained.result["commit"]})

    missing = [run for key, run in planned.items() if key not in done]
    for run in missing:
        if run.state == "finished":
            finished(run)
    return compare.train_all(missing, compare.ROOT / "train.py", jobs, finished)


def print_table(study):
    """Means over seeds ± half of the 95% interval."""
    settings = {}
    for row in read_rows():
        if row["study"] == study:
            label = f"{compare.READABLE.get(row['algorithm'], row['algorithm'])}, {row['setting']}"
            numbers = {name: float(row[name]) for name in row if name not in NAMES}
            settings.setdefault(label, []).append(numbers)
    if settings:
        print(f"\n## {study}\n\n{compare.markdown(compare.lines_of(settings, 'seeds'))}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=", ".join(STUDIES))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side (default 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/tuning"), help="directory of the runs")
    args = parser.parse_args()
    for study in args.studies:
        if study not in STUDIES:
            parser.error(f"unknown study {study}: choose from {', '.join(STUDIES)}")
    failed = {}
    for study in args.studies or STUDIES:
        failed |= run_study(study, args.out, args.jobs)
        print_table(study)
    return max(failed.values(), default=0)


if __name__ == "__main__":
    sys.exit(main())
