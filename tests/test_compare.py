"""Several runs side by side: which are trained, which are skipped, and each number of the tables."""

import csv
import json
import math
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import compare
import train
from helpers import ROOT, SMALL, TINY, contents, rows, start_script, task_file
from model import BadInput

ALGOS, RUNS = ("reinforce", "trpo"), ["mine-reinforce-4", "mine-reinforce-5", "mine-trpo-4", "mine-trpo-5"]


def command(out, *options):
    """A comparison of two algorithms and two seeds."""
    comparison = ["--algo", "reinforce,trpo", "--seeds", "2", "--seed", "4", *map(str, options)]
    return [*TINY, *SMALL, "--task", str(out / "mine.py"), "--out", str(out), *comparison]


def start_quickly(run, script):
    """compare.start_process by `start_script`."""
    def poll():
        process.returncode = process.exitcode
        return process.exitcode

    run.path.parent.mkdir(parents=True, exist_ok=True)
    _, script, *arguments = run.command(script)
    process = start_script(script, arguments, f"{run.path}.log")
    process.poll = poll
    return process


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The directory of a finished comparison."""
    out = tmp_path_factory.mktemp("runs")
    task_file(out)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "start_process", start_quickly)
        assert compare.main(command(out)) is None
    return out


@pytest.fixture
def started(monkeypatch):
    """The [(name, state before)] of the runs that are started."""
    started = []
    monkeypatch.setattr(compare, "start_process", lambda run, script: (
        started.append((run.path.name, run.state)), start_quickly(run, script))[1])
    return started


def tables(text):
    """The Markdown tables in a text, as [{label: {title: cell}}]."""
    found, lines = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("| "):
            lines.append([cell.strip() for cell in line[1:-1].split("|")])
        elif lines:
            titles, _, *table = lines
            found.append({row[0]: dict(zip(titles[1:], row[1:])) for row in table})
            lines = []
    return found


def read(run):
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def make_run(path, rewards, after, algo="trpo", columns=None, **options):
    """A finished run with these rewards by iteration, more columns of metrics.csv, and all numbers equal."""
    names = ("reward", "metric", "greedy", "kl", "entropy", "length")
    path.mkdir()
    config = {**vars(train.Config()), "algo": algo, "seed": int(path.name.rpartition("-")[2]),
              "name": path.name, **options}
    result = {"metric": "quality", "after": dict.fromkeys(names, after), "seconds": 2.0}
    (path / "config.json").write_text(json.dumps(config))
    (path / "result.json").write_text(json.dumps(result))
    columns = {"reward": rewards, "kl": [i / 100 for i in range(1, len(rewards) + 1)],
               "length": [4] * len(rewards), "episodes": [10 * i for i in range(1, len(rewards) + 1)],
               **(columns or {})}
    lines = [columns, *zip(*columns.values())]
    (path / "metrics.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    return str(path)


# Which runs are trained.

def test_a_comparison_trains_each_algorithm_with_each_seed(compared):
    assert {path.parent.name for path in compared.glob("*/result.json")} == {*RUNS}
    assert len([*(compared / "pretrained").iterdir()]) == 1  # the first run made them for all
    table, paired = tables((compared / "compare.md").read_text())
    assert [*table] == ["REINFORCE", "TRPO"] and [*paired] == ["TRPO − REINFORCE"]
    for algo in ALGOS:
        results = [read(compared / f"mine-{algo}-{seed}") for seed in (4, 5)]
        assert results[0]["before"] == results[1]["before"]  # the same pretrained weights
        mean = sum(result["after"]["reward"] for result in results) / 2
        assert float(table[algo.upper()]["reward"].split(" ± ")[0]) == pytest.approx(mean, rel=6e-3)


def test_a_run_of_a_comparison_equals_the_same_run_alone(compared, tmp_path):
    alone = [*TINY, *SMALL, "--task", compared / "mine.py", "--out", tmp_path, "--algo", "trpo", "--seed", 5]
    assert train.main([*map(str, alone)]) is None
    assert rows(tmp_path / "mine-trpo-5") == rows(compared / "mine-trpo-5")
    assert read(tmp_path / "mine-trpo-5")["after"] == read(compared / "mine-trpo-5")["after"]


def test_finished_runs_are_skipped_and_interrupted_ones_resumed(compared, started):
    before = contents(compared)
    assert compare.main(command(compared)) is None
    assert started == []
    after = contents(compared)
    assert all(after[path] == before[path] for path in before if path.suffix not in (".png", ".pdf"))

    (compared / RUNS[0] / "result.json").unlink()
    shutil.rmtree(compared / RUNS[3])
    assert compare.main(command(compared)) is None
    assert started == [(RUNS[0], "interrupted"), (RUNS[3], None)]
    for run in (RUNS[0], RUNS[3]):
        assert (compared / run / "metrics.csv").read_bytes().count(b"\n") == 3
        assert read(compared / run)["after"] == json.loads(before[compared / run / "result.json"])["after"]


def test_runs_of_an_earlier_task_file_or_script_are_refused(compared, started, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "digest", lambda path: "other")
    assert compare.main(command(compared)) == 2
    says = f"error: {compared / RUNS[0]} was made with another version of {compared / 'mine.py'}: "
    assert capsys.readouterr().err.startswith(says) and started == []
    monkeypatch.undo()
    run = make_run(tmp_path / "mine-trpo-0", [0, 1], 0.5)
    result = read(Path(run)) | {"command": ["own.py"], "script_sha256": "other"}
    (tmp_path / "mine-trpo-0" / "result.json").write_text(json.dumps(result))
    (tmp_path / "mine-trpo-0" / "checkpoint.pt").touch()
    config = train.Config(**json.loads((tmp_path / "mine-trpo-0" / "config.json").read_text()))
    config.out = str(tmp_path)
    with pytest.raises(BadInput, match="made with another version of .*own.py: give another --out"):
        compare.state_of(config, ROOT / "tests" / "examples" / "own.py")


def test_a_killed_run_is_left_out_and_the_signal_is_named(tmp_path, monkeypatch, capsys):
    task_file(tmp_path)
    killed = Mock(poll=lambda: -9, returncode=-9)
    monkeypatch.setattr(compare, "start_process", lambda run, script: killed)
    assert compare.main(command(tmp_path, "--algo", "trpo", "--seeds", 1)) == 1
    assert f"error: {tmp_path / 'mine-trpo-4'} is left out: signal 9 ended it\n" in capsys.readouterr().err


def test_runs_with_other_options_are_refused_before_anything_is_trained(compared, started, capsys):
    before = contents(compared)
    for option, value in [("--delta", "0.02"), ("--iterations", "3"), ("--eval-episodes", "8")]:
        assert compare.main([*command(compared, "--seeds", 3), option, value]) == 2
        says = f"error: {compared / RUNS[0]} exists with another {option}: "
        assert capsys.readouterr().err.startswith(says)
    assert started == [] and contents(compared) == before


def test_a_script_is_run_an_option_is_swept_and_a_run_that_diverges_is_left_out(tmp_path, monkeypatch, capfd):
    for name in ("Config", "CRITIC_FREE"):  # the script replaces them
        monkeypatch.setattr(train, name, getattr(train, name))
    monkeypatch.setitem(train.ALGOS, "awr", None)  # and adds to these, which is undone at the end
    monkeypatch.setitem(train.ADVANTAGES, "mean", None)
    task_file(tmp_path)
    script = ROOT / "tests" / "examples" / "own.py"
    options = ["--script", script, "--algo", "awr", "--advantage", "mean", "--seeds", 1, "--lr", "1e-4,1e9"]
    assert compare.main(command(tmp_path, *options, "--name", "rates")) == 3
    printed = capfd.readouterr()
    assert f"error: {tmp_path / 'mine-awr-mean-lr1000000000.0-4'} is left out: error: the " in printed.err
    assert printed.err.splitlines()[-1] == "error: 1 of 2 runs failed and are not in the table"
    assert [*tables((tmp_path / "rates.md").read_text())[0]] == ["awr"]
    config = json.loads((tmp_path / "mine-awr-mean-lr0.0001-4" / "config.json").read_text())
    assert (config["advantage"], config["lr"], config["max_weight"]) == ("mean", 1e-4, 20)

    assert compare.main(command(tmp_path, *options[2:-1], "1e-4,1e-3", "--name", "rates")) == 2
    assert "mine-awr-mean-lr0.0001-4 was made with own.py: give another" in capfd.readouterr().err


@pytest.mark.parametrize("argv, says", [
    ("nowhere", "nowhere is not a finished run"), ("--algo dqn", "dqn"), ("--seeds 0", "--seeds"),
    ("--script nowhere.py", "nowhere.py"), ("--no-such 1", "--no-such"), ("runs/a --lr 1", "--lr"),
    ("--jobs 0", "--jobs"), ("--name a/b", "--name"),
    ("--task reviews,revues", "unknown task revues"), ("--lr 1,1", "occur twice"), ("--batch-size 7,8", "7")])
def test_bad_input_is_one_line(argv, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        status = compare.main(argv.split())
    except SystemExit as e:
        status = e.code
    assert status == 2 and says in capsys.readouterr().err.splitlines()[-1]
    assert not contents(tmp_path)


# Groups and labels.

def test_runs_are_grouped_by_their_options_and_not_by_name(tmp_path):
    runs = [compare.read_run(make_run(tmp_path / name, [0, 1], 1, kl_coef=kl_coef, threads=threads))
            for name, kl_coef, threads in [("a-0", 0.1, 1), ("a-1", 0.0, 1), ("b-1", 0.1, 2)]]
    groups = compare.group_by_options(runs)
    assert [[run.path.name for run in group] for group in groups] == [["a-0", "b-1"], ["a-1"]]
    assert compare.labels(groups) == ["TRPO, kl_coef 0.1", "TRPO, kl_coef 0"]
    twice = compare.read_run(make_run(tmp_path / "c-0", [0, 1], 1, kl_coef=0.1))
    with pytest.raises(BadInput, match="a-0 and .*c-0 have the same options and seed"):
        compare.group_by_options([*runs, twice])


@pytest.mark.parametrize("options, expected", [
    ([dict(algo="trpo"), dict(algo="reinforce", lr=3e-3)], ["TRPO", "REINFORCE"]),  # its default rate
    ([dict(algo="trpo"), dict(algo="ppo", lr=1e-2)], ["TRPO, lr 0.001", "PPO, lr 0.01"]),
    ([dict(algo="ppo"), dict(algo="ppo", advantage="rloo", whiten=0)],
     ["PPO + GAE", "PPO + RLOO"]),
    ([dict(delta=0.1), dict(delta=0.2, damping=1)], ["TRPO, delta 0.1, damping 0.1",
                                                     "TRPO, delta 0.2, damping 1"]),
    ([dict(), dict(entropy_coef=0.01)], ["TRPO", "TRPO, entropy_coef 0.01"])])  # an option of a script
def test_rows_are_labelled_by_what_differs(tmp_path, options, expected):
    sizes = dict(vocab_size=620, max_new_tokens=44)  # of the task
    runs = [compare.read_run(make_run(tmp_path / f"{i}-0", [0, 1], 1, **{**sizes, **one}))
            for i, one in enumerate(options)]
    assert compare.labels(compare.group_by_options(runs)) == expected


def test_each_task_has_a_table_of_its_own(tmp_path):
    runs = [make_run(tmp_path / "a-0", [0, 1], 0.5), make_run(tmp_path / "b-0", [5, 9], 7, task="addition")]
    (tmp_path / "a-0.log").write_text("")
    runs.append(str(tmp_path / "a-0.log"))  # as in runs/a-*
    assert compare.main([*runs, "--out", str(tmp_path)]) is None
    text = (tmp_path / "compare.md").read_text()
    assert "## reviews" in text and "## addition" in text
    assert [table["TRPO"]["reward"] for table in tables(text)] == ["0.5", "7"]


# The numbers.

def test_half_an_interval_is_a_quantile_of_students_t_times_the_standard_error():
    half = 2.262 * (10 / 9) ** 0.5 / 10 ** 0.5
    assert compare.interval([-1.0, 1.0] * 5) == pytest.approx((0, half), abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_intervals_hold_the_truth_in_95_of_100_experiments(n):
    draws = torch.randn(4000, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 3 + 1
    covered = sum(abs(mean - 1) <= half for mean, half in map(compare.interval, draws.tolist()))
    error = math.sqrt(0.95 * 0.05 / len(draws))
    assert covered / len(draws) == pytest.approx(0.95, abs=3.5 * error)


@pytest.mark.parametrize("goal, rewards, iterations", [
    (0.39, [0, 0.2, 0.4, 0.6, 0.8, 1], 5),  # the mean of the first five is 0.4
    (0.41, [0, 0.2, 0.4, 0.6, 0.8, 1], 6),  # that of the last five is 0.6
    (0.61, [0, 0.2, 0.4, 0.6, 0.8, 1], None),
    (0.49, [0, 1], 2),  # fewer than five: their mean
])
def test_the_goal_is_reached_by_the_mean_of_the_last_five_iterations(goal, rewards, iterations, tmp_path):
    run = compare.read_run(make_run(tmp_path / "a-0", rewards, 1))
    expected = math.nan if iterations is None else 10 * iterations  # episodes
    assert compare.numbers(run, goal)["episodes to 90%"] == pytest.approx(expected, nan_ok=True)


def test_every_number_of_the_tables_is_the_one_worked_out_by_hand(tmp_path):
    always = lambda value: [value] * 15
    trpo = dict(kl_update=always(0.004), cg_relative_residual=always(0.5))
    rejecting = dict(accepted=[1] * 12 + [0] * 3, halvings=[2] * 12 + [0] * 3)
    ppo = [dict(kl_update=always(kl), clip_fraction=always(clip)) for kl, clip in ((0.01, 0), (0.03, 0.2))]
    runs = [
        make_run(tmp_path / "p-0", [0] * 5 + [1] * 10, 0.5, "ppo", ppo[0]),
        make_run(tmp_path / "p-1", [0] * 7 + [1] * 8, 0.7, "ppo", ppo[1]),
        make_run(tmp_path / "t-0", [0] * 11 + [1] * 4, 0.9, "trpo", {**trpo, **rejecting}),
        make_run(tmp_path / "t-1", always(1), 0.9, "trpo",
                 {**trpo, "accepted": always(1), "halvings": always(2)}),
        make_run(tmp_path / "low-7", [0] * 5 + [0.5] * 10, 0.5, "reinforce", dict(kl_update=always(1e-5)))]
    assert compare.main([*runs, "--out", str(tmp_path)]) is None
    table, paired = tables((tmp_path / "compare.md").read_text())
    # The mean curves start at 0, 0.5 and 0; the best mean of five in a row is 1. So the goal is 11/12, which
    # only five ones in a row reach. Two values a and b have the interval ± 12.706 |a - b| / 2.
    names = ["reward", "quality", "quality, greedy", "KL", "entropy", "length"]
    same = lambda cell: dict.fromkeys(names, cell)
    rest = {"episodes": "150 ± 0", "seconds": "2 ± 0"}
    assert table == {
        "PPO": {"runs": "2", **same("0.6 ± 1.3"), "episodes to 90%": "110 ± 127", **rest,
                "KL of an update": "0.02 ± 0.13", "rejected": "", "halvings": "", "CG residual": "",
                "clip fraction": "0.1 ± 1.3"},
        "TRPO": {"runs": "2", **same("0.9 ± 0"), "episodes to 90%": "50 (1 of 2)", **rest,
                 "KL of an update": "0.004 ± 0", "rejected": "0.1 ± 1.3", "halvings": "2 ± 0",
                 "CG residual": "0.5 ± 0", "clip fraction": ""},
        "REINFORCE": {"runs": "1", **same("0.5"), "episodes to 90%": "", "episodes": "150", "seconds": "2",
                      "KL of an update": "1e-05", "rejected": "", "halvings": "", "CG residual": "",
                      "clip fraction": ""}}
    # Pairs: 0.9 - 0.5 and 0.9 - 0.7; REINFORCE has no seed in common with PPO.
    first, = paired.values()
    assert first["pairs"] == "2" and first["reward"] == "0.3 ± 1.3"
    assert first["episodes to 90%"] == "-70 (1 of 2)"  # 50 against 120
    assert first["KL of an update"] == "-0.016 ± 0.13"
    with open(tmp_path / "compare.csv", encoding="utf-8") as file:
        lines = [line for line in csv.DictReader(file) if line["column"] == "reward"]
    expected = [(0.6, 2), (0.9, 2), (0.5, 1), (0.3, 2)]
    assert [(float(line["mean"]), int(line["n"])) for line in lines] == expected
    assert float(lines[0]["half_width"]) == pytest.approx(12.706 * 0.2 / 2, rel=1e-5)


def test_curves_are_drawn_against_episodes_and_kl(tmp_path, monkeypatch):
    """Over the iterations that all runs of a row have. True rewards: dashed, and against √KL of a text."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    drawn, original = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: (
        drawn.append([line.get_xydata().tolist() for axes in self.axes for line in axes.get_lines()]),
        original(self, *args, **kwargs)))
    runs = [make_run(tmp_path / "a-0", [0, 1, 8], 1), make_run(tmp_path / "a-1", [2, 5], 1)]
    assert compare.main([*runs, "--out", str(tmp_path)]) is None
    assert (tmp_path / "compare.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (tmp_path / "compare.pdf").read_bytes().startswith(b"%PDF")
    assert drawn[0] == [[[10, 1], [20, 3]], [[0.01, 1], [0.02, 3]]]
    drawn.clear()
    run = make_run(tmp_path / "b-0", [0, 1], 1, columns=dict(true_reward=[0.5, -1], length=[4, 8]))
    assert compare.main([run, "--out", str(tmp_path)]) is None
    assert drawn[0] == [[[10, 0], [20, 1]], [[10, 0.5], [20, -1]],
                        [[0.2, 0], [0.4, 1]], [[0.2, 0.5], [0.4, -1]]]


def test_without_matplotlib_there_are_tables_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = make_run(tmp_path / "a-0", [0, 1], 1)
    assert compare.main([run, "--out", str(tmp_path / "plots")]) is None
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"compare.md", "compare.csv"}
    assert "pip install matplotlib" in capsys.readouterr().out
