"""Train several runs and compare them, or compare runs that are there. Writes a table and curves.

Any option of train.py may be a list with commas: all combinations are trained, each by the ordinary command
in a process of its own. Finished runs are skipped, interrupted ones are resumed, and a run of the same name
with other options is refused. Runs that differ in the seed only are averaged.
"""

import argparse
import csv
import io
import itertools
import json
import math
import os
import runpy
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import fmean

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import train
from model import BadInput, write_atomically
from reward import load_task

EXAMPLES = """\
examples
  python tests/studies/compare.py --algo reinforce,trpo,ppo --seeds 5
  python tests/studies/compare.py --algo trpo --kl-coef 0,0.03,0.1 --seeds 3 --name beta
  python tests/studies/compare.py --script tests/examples/own.py --algo awr,trpo --advantage mean,gae
  python tests/studies/compare.py runs/reviews-trpo-* runs/reviews-ppo-*

output, in runs/ (or --out)
  NAME.md          tables: means over seeds with their 95% intervals, and paired differences to the first row
  NAME.csv         the same numbers
  NAME.png, .pdf   reward against episodes and against KL, if matplotlib is installed
  RUN.log          what a run printed

All other options are those of train.py or of the script, see python train.py --help.
"""

# Options that do not change what a run computes, or only say where and how it is computed.
INCIDENTAL = ("name", "out", "overwrite", "device", "threads", "micro_batch", "eval_every", "save_every")
WINDOW = 5  # iterations whose mean reward is compared with the goal


# Runs that are there.

@dataclass
class Run:
    path: Path
    config: dict  # config.json
    result: dict  # result.json
    columns: dict  # {column of metrics.csv: [a number per iteration]}

    def options(self):
        """The options that decide its results, without the seed."""
        return {name: value for name, value in self.config.items() if name not in (*INCIDENTAL, "seed")}

    def episodes(self):
        """The number of episodes after each iteration."""
        return self.columns["episodes"]


def read_run(path):
    """The finished Run in a directory. Raises BadInput."""
    path = Path(path).resolve()
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        result = json.loads((path / "result.json").read_text(encoding="utf-8"))
        with open(path / "metrics.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns = {name: [float(row[name]) for row in rows] for name in rows[0]}
        float(dict(result)["after"]["reward"] + dict(config)["seed"])  # an error for JSON of another kind
    except OSError as e:
        raise BadInput(f"{path} is not a finished run, because it has no {Path(e.filename).name}: give "
                       "directories such as runs/NAME")
    except (ValueError, TypeError, LookupError, AttributeError):
        raise BadInput(f"the files of {path} are damaged: give the directory of another run")
    if not ({"metric", "after", "seconds"} <= {*result}
            and {"reward", "kl", "length", "episodes"} <= {*columns}
            and {"task", "algo", "advantage", "seed"} <= {*config}):
        raise BadInput(f"{path} is a run of another program: give a run of train.py")
    return Run(path, config, result, columns)


def group_by_options(runs):
    """[[runs that differ in the seed only]]. Raises BadInput if two have the same options and seed."""
    groups = {}
    for run in runs:
        group = groups.setdefault(json.dumps(run.options(), sort_keys=True), {})
        seed = run.config["seed"]
        if seed in group:
            raise BadInput(f"{group[seed].path} and {run.path} have the same options and seed: leave one out")
        group[seed] = run
    return [[*group.values()] for group in groups.values()]


def labels(groups):
    """A label for each group: its algorithm, then the options that tell the groups apart.

    An option that only follows from algorithm and estimator, because it is their default, is not named.
    """
    def label_with(names):
        found = []
        for options in all_options:
            parts = [READABLE.get(options["algo"], options["algo"])]
            if "advantage" in names:
                parts[0] += f" + {READABLE.get(options['advantage'], options['advantage'])}"
            for name in names:
                if name != "advantage" and name in options:  # a script may have options that others lack
                    value = options[name]
                    parts.append(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")
            found.append(", ".join(parts))
        return found

    all_options = [group[0].options() for group in groups]
    names = dict.fromkeys(name for options in all_options for name in options)
    differing = [name for name in names if name not in ("algo", "task")
                 and len({json.dumps(options.get(name)) for options in all_options}) > 1]
    chosen = [name for name in differing if name == "advantage" or not follows(name, all_options)]
    found = label_with(chosen)
    return found if len({*found}) == len(found) else label_with(differing)


READABLE = {"reinforce": "REINFORCE", "trpo": "TRPO", "ppo": "PPO",
            "gae": "GAE", "rloo": "RLOO", "grpo": "GRPO"}


def follows(name, all_options):
    """Whether an option has its default in all groups: that of their advantage, algorithm and task."""
    known = {f.name: f.default for f in fields(train.Config)}
    for options in all_options:
        defaults = known | train.defaults_of(options["advantage"], options["algo"], options["task"])
        if name in options and options[name] != defaults.get(name):
            return False
    return True


# The numbers of a run, and their means.

def interval(values):
    """The mean of independent values and half the width of its 95% interval, nan for a single value."""
    return fmean(values), train.half_width(values)


def text_distance(columns):
    """√KL(π‖π_ref) of a whole text at each iteration, in √nats. columns: of a Run."""
    return [math.sqrt(kl * length) for kl, length in zip(columns["kl"], columns["length"])]


def smooth(rewards):
    """{number of iterations: mean of the last five rewards, or of all if there are fewer}."""
    n = min(WINDOW, len(rewards))
    return {end: fmean(rewards[end - n:end]) for end in range(n, len(rewards) + 1)}


def mean_curve(group, column="reward"):
    """The mean of a column over the runs of a group, as long as its shortest run."""
    return [fmean(values) for values in zip(*(run.columns[column] for run in group))]


def common_goal(groups):
    """90% of the way from the first reward to the best, which is common to all groups; nan if none improves.

    The first reward is the mean of the groups' first ones, before any update. The best is the highest mean of
    five iterations of any group's mean curve. Measured by its own best, a group that learns little would seem
    to learn fast.
    """
    curves = [mean_curve(group) for group in groups]
    first = fmean(curve[0] for curve in curves)
    best = max(max(smooth(curve).values()) for curve in curves)
    return first + 0.9 * (best - first) if best > first else math.nan


def numbers(run, goal):
    """{title: number}: results on held-out prompts, then means over the iterations; nan if a run has none."""
    def mean(values):
        return fmean(values) if values else math.nan

    after = {name: math.nan if value is None else value for name, value in run.result["after"].items()}
    metric = run.result["metric"]
    columns = run.columns
    reached = [end for end, reward in smooth(columns["reward"]).items() if reward >= goal]
    accepted = columns.get("accepted", [])
    halvings = [h for h, taken in zip(columns.get("halvings", []), accepted) if taken]
    return {"reward": after["reward"], "true reward": after.get("true_reward", math.nan),
            "pass@4": after.get("pass_4", math.nan), "pass@16": after.get("pass_16", math.nan),
            metric: after.get("metric", math.nan), f"{metric}, greedy": after.get("greedy", math.nan),
            "KL": after.get("kl", math.nan), "entropy": after.get("entropy", math.nan),
            "length": after.get("length", math.nan),
            "episodes to 90%": run.episodes()[reached[0] - 1] if reached else math.nan,
            "episodes": run.episodes()[-1], "seconds": run.result["seconds"],
            "KL of an update": mean(columns.get("kl_update")), "rejected": 1 - mean(accepted),
            "halvings": mean(halvings), "CG residual": mean(columns.get("cg_relative_residual")),
            "clip fraction": mean(columns.get("clip_fraction"))}


def table(groups):
    """A line for each group of one task: {"": label, "runs": number, title: (mean, half width, n, runs)}.

    n: the number of runs that have this number. None if no run of the group has it; a title that no group has
    is left out.
    """
    goal = common_goal(groups)
    return lines_of({label: [numbers(run, goal) for run in group]
                     for label, group in zip(labels(groups), groups)}, "runs")


def differences(groups):
    """Like `table`, of the differences to the first group. A pair is two runs with the same seed."""
    goal = common_goal(groups)
    names = labels(groups)
    first = {run.config["seed"]: numbers(run, goal) for run in groups[0]}
    rows = {}
    for label, group in zip(names[1:], groups[1:]):
        rows[f"{label} − {names[0]}"] = [
            {title: value - first[run.config["seed"]].get(title, math.nan)
             for title, value in numbers(run, goal).items() if title not in ("episodes", "seconds")}
            for run in group if run.config["seed"] in first]
    return lines_of({label: pairs for label, pairs in rows.items() if pairs}, "pairs")


def lines_of(rows, count):
    """The lines of a table from {label: [{title: number}]}."""
    lines = []
    for label, found in rows.items():
        line = {"": label, count: len(found)}
        for title in found[0]:
            known = [one[title] for one in found if not math.isnan(one[title])]
            line[title] = (*interval(known), len(known), len(found)) if known else None
        lines.append(line)
    titles = dict.fromkeys(title for line in lines for title in line)
    kept = [title for title in titles if any(line.get(title) is not None for line in lines)]
    return [{title: line.get(title) for title in kept} for line in lines]


def cell(value):
    """A cell of Markdown: mean ± half width (known of all)."""
    if value is None:
        return ""
    if not isinstance(value, tuple):
        return str(value)
    mean, half, n, runs = value
    text = f"{mean:,.0f}" if abs(mean) >= 100 else f"{mean:.3g}"
    if not math.isnan(half):
        text += f" ± {half:,.0f}" if half >= 10 else f" ± {half:.2g}"
    return text if n == runs else f"{text} ({n} of {runs})"


def markdown(rows):
    """A Markdown table."""
    lines = [[*rows[0]], ["---"] * len(rows[0])] + [[cell(value) for value in row.values()] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def csv_lines(task, rows):
    """Lines of NAME.csv: one per number."""
    for row in rows:
        for title, value in row.items():
            if isinstance(value, tuple):
                yield [task, row[""], title, *(f"{x:.6g}" for x in value)]


# What needs an explanation below a table, for the titles that it has.
EXPLANATIONS = {
    "reward": "Reward to length: completions of held-out prompts after RL.",
    "KL": "KL and entropy: nats per token.",
    "episodes to 90%": "Episodes to 90%: until the mean reward of five iterations is 90% of the way from the "
                       "first to the best of all rows.",
    "KL of an update": "KL of an update and all columns after it: means over the iterations."}


def caption(rows):
    """The sentences below a table."""
    sentences = ["Mean ± half of the 95% interval (Student's t) over seeds of RL from the same pretrained "
                 "weights."]
    sentences += [sentence for title, sentence in EXPLANATIONS.items() if title in rows[0]]
    if any(isinstance(value, tuple) and value[2] < value[3] for row in rows for value in row.values()):
        sentences.append("(1 of 2): only one of two runs has that number.")
    return " ".join(sentences) + "\n"


def compare(runs, path):
    """Print and write the comparison of Runs as PATH.md, PATH.csv, PATH.png and PATH.pdf. Raises BadInput."""
    tasks = {}
    for run in runs:
        tasks.setdefault(run.config["task"], []).append(run)
    text = []
    file = io.StringIO()
    sheet = csv.writer(file, lineterminator="\n")
    sheet.writerow(["task", "row", "column", "mean", "half_width", "n", "runs"])
    for task, of_task in tasks.items():
        name = Path(task).stem
        groups = group_by_options(of_task)
        rows = table(groups)
        text += [f"## {name}\n", markdown(rows), caption(rows)]
        sheet.writerows(csv_lines(name, rows))
        paired = differences(groups)
        if paired:
            text += [markdown(paired), "Paired differences: runs with the same seed have the same held-out "
                     "prompts and random numbers.\n"]
            sheet.writerows(csv_lines(name, paired))
        picture = f"{path}-{name}" if len(tasks) > 1 else str(path)
        drawn = plot(groups, picture, name)
        if drawn:
            text.append(f"![{name}]({Path(picture).name}.png)\n")
    whole = "\n".join(text)
    write_atomically(Path(f"{path}.md"), lambda out: out.write(whole.encode()))
    write_atomically(Path(f"{path}.csv"), lambda out: out.write(file.getvalue().encode()))
    print(f"\n{whole}")
    pictures = "and pictures" if drawn else "no pictures, which need matplotlib: pip install matplotlib"
    print(f"{path}.md, {path}.csv, {pictures}")


# From Okabe & Ito: the colour-blind can tell them apart, and the first three differ in print without colour.
COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def plot(groups, path, task):
    """Draw reward against episodes and against KL as PATH.png and PATH.pdf. Returns False without matplotlib.

    True rewards, if all runs have them, are drawn too, dashed, and the KL is then √KL of a whole text. The
    means set the range of the axes, because the interval of two seeds would dwarf them.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    learned = all("true_reward" in run.columns for group in groups for run in group)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    learning, frontier = figure.subplots(1, 2, sharey=True)
    bands = []
    for label, group, colour in zip(labels(groups), groups, itertools.cycle(COLOURS)):
        episodes = min((run.episodes() for run in group), key=len)
        reward, half = zip(*(interval(values) for values in zip(*(run.columns["reward"] for run in group))))
        if learned:
            distance = [fmean(values) for values in zip(*(text_distance(run.columns) for run in group))]
        else:
            distance = mean_curve(group, "kl")
        learning.plot(episodes, reward, color=colour, label=label)
        bands.append((episodes, [m - h for m, h in zip(reward, half)],
                      [m + h for m, h in zip(reward, half)], colour))
        frontier.plot(distance, reward, ".-", color=colour, label=label)
        if learned:
            true = mean_curve(group, "true_reward")
            learning.plot(episodes, true, "--", color=colour, label=f"{label}, true reward")
            frontier.plot(distance, true, "--", color=colour)
    limits = learning.get_ylim()
    for episodes, low, high, colour in bands:
        learning.fill_between(episodes, low, high, color=colour, alpha=0.2)
    learning.set_ylim(limits)
    seeds = sorted({len(group) for group in groups})
    title = f"{task}: mean of {' to '.join(map(str, seeds[:1] + seeds[1:][-1:]))} runs per curve"
    if seeds[-1] > 1:
        title += ", shaded: its 95% interval"
    figure.suptitle(title, fontsize=11)
    learning.set_xlabel("episodes", fontsize=11)
    learning.set_ylabel("mean reward of an iteration", fontsize=11)
    kl = "√KL(π‖π_ref) of a whole text, √nats" if learned else "KL(π‖π_ref), nats per token"
    frontier.set_xlabel(kl, fontsize=11)
    frontier.locator_params(axis="x", nbins=6)  # more would overlap
    figure.legend(*learning.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=11)
    for kind in ("png", "pdf"):
        write_atomically(Path(f"{path}.{kind}"),
                         lambda file, kind=kind: figure.savefig(file, format=kind, dpi=100))
    return True


def save_small(figure, path):
    """Write a matplotlib figure as PNG with a palette of 128 colours, which takes a third of the bytes."""
    from PIL import Image  # which matplotlib needs, too
    file = io.BytesIO()
    figure.savefig(file, dpi=80)
    Image.open(file).convert("RGB").quantize(128).save(path, optimize=True)


# Runs that are to be trained.

@dataclass
class Planned:
    argv: list  # the options of the training command
    config: train.Config
    state: str  # "finished", "interrupted", or None if there is no such run

    @property
    def path(self):
        return Path(self.config.out) / self.config.name

    def command(self, script):
        """The command that trains or resumes it."""
        if self.state == "interrupted":
            options = ["--resume", str(self.path), "--threads", str(self.config.threads)]
            if self.config.task not in train.TASKS:
                options += ["--task", self.config.task]
        else:
            options = [*self.argv, "--name", self.config.name, "--threads", str(self.config.threads)]
        return [sys.executable, str(script), *options]

    def pretraining(self):
        """What decides its pretrained weights."""
        names = ("task", "out", "init", "threads", *train.INHERITED)
        return tuple(value for name, value in asdict(self.config).items()
                     if name in names or name.startswith("pretrain_"))


def state_of(config, script=ROOT / "train.py"):
    """"finished" or "interrupted" for the run that has this Config's name, None if there is none.

    Raises BadInput if it has other options, or was finished by another script, or by an earlier version of a
    custom script or task file. No checkpoint is loaded.
    """
    run = Path(config.out) / config.name
    if config.overwrite or not (run / "checkpoint.pt").exists():
        return None
    try:
        saved = json.loads((run / "config.json").read_text(encoding="utf-8"))
        before = asdict(train.Config()) | saved
        finished = (run / "result.json").exists()
        result = json.loads((run / "result.json").read_text(encoding="utf-8")) if finished else {}
        made_by = Path(result.get("command", [script])[0]).name
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        raise BadInput(f"{run} is not a run of this program: give another --out")
    for name, value in asdict(config).items():
        if name not in INCIDENTAL and before[name] != value:
            raise BadInput(f"{run} exists with another {train.flag(name)}: give another --out, or "
                           "--overwrite")
    if finished and made_by != script.name:  # whose schedule, for example, is no option
        raise BadInput(f"{run} was made with {made_by}: give another --out, or --overwrite")
    for file, key in [(script, "script_sha256"), (config.task, "task_sha256")]:
        if result.get(key) not in (None, train.digest(file)) and Path(file).name != "train.py":
            raise BadInput(f"{run} was made with another version of {file}: give another --out, or "
                           "--overwrite")
    return "finished" if finished else "interrupted"


def plan(options, seeds, script=ROOT / "train.py"):
    """A Planned run for each combination of the options and each seed. Raises BadInput, or exits as train.py.

    options: {name: its values, separated by commas; True for a flag}.  script: that which trains them.
    """
    choices = {name: [value] if value is True else value.split(",") for name, value in options.items()}
    in_name = ("task", "algo", "advantage", "seed")
    swept = [name for name in choices if len(choices[name]) > 1 and name not in in_name]
    planned = []
    for chosen in itertools.product(*choices.values()):
        argv = arguments(dict(zip(choices, chosen)))
        first, _ = train.parse(argv)  # once, because it loads the weights of --init
        extra = "".join(f"-{name}{getattr(first, name)}" for name in swept)
        name = first.name.removesuffix(f"-{first.seed}") + extra
        for seed in range(first.seed, first.seed + seeds):
            config = replace(first, seed=seed, name=f"{name}-{seed}", threads=first.threads or 1)
            planned.append(Planned([*argv, "--seed", str(seed)], config, state_of(config, script)))
    for task, pretrain_seed in {(run.config.task, run.config.pretrain_seed) for run in planned}:
        load_task(task, pretrain_seed)  # a fault in the last task is found before the first is trained
    if len({run.path for run in planned}) < len(planned):
        raise BadInput("two of these runs would have the same name: leave out values that occur twice")
    return planned


def arguments(options):
    """{name: value} as a command line."""
    words = []
    for name, value in options.items():
        words += [train.flag(name)] if value is True else [train.flag(name), value]
    return words


def train_all(planned, script, jobs, finished=lambda run: None):
    """Train what is not finished, `jobs` runs at once. Returns {path: exit status} of the runs that failed.

    finished: called with each Planned run when it has been trained. The first run of each pretraining goes
    ahead by itself until its weights are there for the others.
    """
    waiting = [run for run in planned if run.state != "finished"]
    running = {}  # {process: (run, its start)}
    failed = {}
    shown = None
    try:
        while waiting or running:
            busy = {run.pretraining() for run, start in running.values() if not has_weights(run, start)}
            ready = [run for run in waiting if run.pretraining() not in busy]
            if ready and len(running) < jobs:
                waiting.remove(ready[0])
                running[start_process(ready[0], script)] = (ready[0], time.time())
            for process in [process for process in running if process.poll() is not None]:
                run, _ = running.pop(process)
                if process.returncode == 0:
                    finished(run)
                    continue
                status = process.returncode
                failed[run.path] = max(status, 1)
                reason = last_line(run) if status > 0 else f"signal {-status} ended it"
                print(f"\nerror: {run.path} is left out: {reason}", file=sys.stderr)
            n_finished = len(planned) - len(waiting) - len(running)
            shown = show_progress(f"{n_finished} of {len(planned)} runs finished", running.values(), shown)
            time.sleep(0.2)
    finally:
        for process in running:
            process.kill()
    return failed


def show_progress(line, running, shown):
    """Keep one line up to date on a terminal; elsewhere print it whenever it has changed. Returns it."""
    if sys.stdout.isatty():
        doing = ", ".join(f"{run.path.name}: {last_line(run)[:24].strip()}" for run, _ in running)
        print(f"\r{f'{line}. {doing}':110.110}", end="", flush=True)
    elif line != shown:
        print(line, flush=True)
    return line


def has_weights(run, start):
    """Whether a run that was started then is past its pretraining."""
    checkpoint = run.path / "checkpoint.pt"
    return checkpoint.exists() and (run.state == "interrupted" or checkpoint.stat().st_mtime >= start)


def start_process(run, script):
    run.path.parent.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(run.config.threads)}
    with open(f"{run.path}.log", "w", encoding="utf-8") as log:
        return subprocess.Popen(run.command(script), stdout=log, stderr=subprocess.STDOUT, env=environment)


def last_line(run):
    lines = Path(f"{run.path}.log").read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "it printed nothing")


def parse(argv):
    """(args of this program, {name: value} of the options for the training script). Runs the --script."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, allow_abbrev=False,
                                     usage=argparse.SUPPRESS,  # a wrong option gets one line
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN",
                        help="compare these finished runs, and train nothing")
    parser.add_argument("--script", type=Path, default=ROOT / "train.py",
                        help="a script that adds algorithms or estimators to train.py (default train.py)")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of each combination (default 1)")
    parser.add_argument("--jobs", type=int, default=2,
                        help="runs side by side (default 2), of one thread each unless --threads is given")
    parser.add_argument("--name", default="compare", help="name of the output files (default compare)")
    script = parser.parse_known_args(argv)[0].script.resolve()
    if not os.path.isfile(script):
        parser.error(f"there is no script {script}")
    if script != ROOT / "train.py":
        sys.path.insert(0, str(script.parent))  # as python does for a script
        runpy.run_path(str(script), run_name="compare")  # it adds to train.ALGOS and others
    trained = [f for f in fields(train.Config) if f.name != "name"]  # --name is this program's
    for f in trained:
        action = "store_true" if f.type is bool else "store"
        parser.add_argument(train.flag(f.name), action=action, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    options = {f.name: getattr(args, f.name) for f in trained if getattr(args, f.name) is not None}
    for name in ("seeds", "jobs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if Path(args.name).name != args.name:
        parser.error(f"--name {args.name} must not contain a slash: use --out to choose the directory")
    if args.runs and {*options} - {"out"}:
        parser.error(f"with RUN nothing is trained: leave out {train.flag([*options][0])}")
    return args, options


def main(argv=None):
    """Do what the command line says. Returns the exit status."""
    args, options = parse(sys.argv[1:] if argv is None else argv)
    failed = {}
    try:
        paths = [run for run in args.runs if not Path(run).is_file()]  # runs/a-* also gives the file a-0.log
        if not args.runs:
            planned = plan(options, args.seeds, args.script)
            failed = train_all(planned, args.script, args.jobs)
            paths = [run.path for run in planned if run.path not in failed]
        if paths:
            compare([read_run(path) for path in paths], Path(options.get("out", "runs")) / args.name)
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: to go on, give the same command again, without --overwrite", file=sys.stderr)
        return 130
    if failed:
        print(f"error: {len(failed)} of {len(planned)} runs failed and are not in the table", file=sys.stderr)
        return max(failed.values())


if __name__ == "__main__":
    sys.exit(main())
