"""Several runs side by side: which are trained, which are skipped, and each figure of the table."""

import json
import math
import shutil
import sys

import pytest
import torch
from helpers import SMALL, TINY, contents, rows, task_file

import train

ALGOS, RUNS = ("reinforce", "trpo"), ["mine-reinforce-4", "mine-trpo-4", "mine-reinforce-5", "mine-trpo-5"]


def command(out, *options):
    """A comparison of two algorithms and two seeds."""
    comparison = ["--algo", "reinforce,trpo", "--seeds", "2", "--seed", "4", *map(str, options)]
    return [*TINY, *SMALL, "--task", str(out / "mine.py"), "--out", str(out), *comparison]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The directory of a finished comparison."""
    out = tmp_path_factory.mktemp("runs")
    task_file(out)
    assert train.main(command(out)) is None
    return out


@pytest.fixture
def trained(monkeypatch):
    """The [(name, resumed)] of the runs that are trained."""
    trained, original = [], train.train

    def spy(config, resume=False):
        trained.append((config.name, resume))
        original(config, resume)

    monkeypatch.setattr(train, "train", spy)
    return trained


def cells(text):
    """A Markdown table as {label: {title: cell}}."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    titles, _, *table = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    return {row[0]: dict(zip(titles[1:], row[1:])) for row in table}


def read(run):
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


def make_run(path, rewards, after, seconds=2.0, task="reviews", **columns):
    """A finished run with these rewards by iteration, more columns of metrics.csv, and all figures equal."""
    names = ("reward", "metric", "greedy", "kl", "entropy", "length", "distinct_2")
    path.mkdir()
    config = {"task": task, "seed": int(path.name.rpartition("-")[2]),
              "advantage": "rloo" if "rloo" in path.name else "gae"}
    result = {"metric": "quality", "after": dict.fromkeys(names, after), "seconds": seconds}
    (path / "config.json").write_text(json.dumps(config))
    (path / "result.json").write_text(json.dumps(result))
    columns = {"reward": rewards, "kl": [i / 100 for i in range(1, len(rewards) + 1)], **columns}
    lines = [columns, *zip(*columns.values())]
    (path / "metrics.csv").write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    return str(path)


# What is trained.

def test_a_comparison_trains_each_algorithm_with_each_seed(compared):
    assert {path.name for path in compared.iterdir() if path.is_dir()} == {"pretrained", *RUNS}
    table = cells((compared / "mine-reinforce+trpo.md").read_text())
    assert [*table] == ["mine-reinforce + gae", "mine-trpo + gae"]
    for algo in ALGOS:
        results = [read(compared / f"mine-{algo}-{seed}") for seed in (4, 5)]
        assert results[0]["before"] == results[1]["before"]  # the same pretrained weights
        mean = sum(result["after"]["reward"] for result in results) / 2
        assert float(table[f"mine-{algo} + gae"]["reward"].split(" ± ")[0]) == pytest.approx(mean, abs=5.1e-4)


def test_a_run_of_a_comparison_equals_the_same_run_alone(compared, tmp_path):
    alone = command(compared, "--algo", "trpo", "--seeds", 1, "--seed", 5, "--out", tmp_path)
    assert train.main(alone) is None
    assert rows(tmp_path / "mine-trpo-5") == rows(compared / "mine-trpo-5")
    assert read(tmp_path / "mine-trpo-5")["after"] == read(compared / "mine-trpo-5")["after"]


def test_finished_runs_are_skipped_and_interrupted_ones_resumed(compared, trained):
    before = contents(compared)
    assert train.main(command(compared)) is None
    assert trained == []
    after = contents(compared)
    assert all(after[path] == before[path] for path in before if path.suffix != ".png")

    (compared / RUNS[0] / "result.json").unlink()
    shutil.rmtree(compared / RUNS[3])
    assert train.main(command(compared)) is None
    assert trained == [(RUNS[0], True), (RUNS[3], False)]
    for run in (RUNS[0], RUNS[3]):
        assert (compared / run / "metrics.csv").read_bytes().count(b"\n") == 3
        assert read(compared / run)["after"] == json.loads(before[compared / run / "result.json"])["after"]


def test_runs_with_other_options_are_refused_or_replaced(tmp_path, capsys):
    """Those of a comparison with a name."""
    task_file(tmp_path)
    named = command(tmp_path, "--name", "short", "--seeds", 1)
    assert train.main(named) is None
    assert [*cells((tmp_path / "short.md").read_text())] == ["short-reinforce + gae", "short-trpo + gae"]
    runs = [tmp_path / "short-reinforce-4", tmp_path / "short-trpo-4"]
    before = contents(tmp_path)
    capsys.readouterr()
    for option, value in [("--delta", "0.02"), ("--iterations", "3"), ("--eval-episodes", "8")]:
        assert train.main([*named, option, value]) == 2
        assert capsys.readouterr().err.startswith(f"error: {runs[0]} exists with another {option}: ")
        assert contents(tmp_path) == before
    assert train.main([*named, "--iterations", "3", "--overwrite"]) is None
    assert [len(rows(run)) for run in runs] == [3, 3]


def test_a_run_that_diverges_is_left_out(tmp_path, trained, capsys):
    task_file(tmp_path)
    argv = command(tmp_path, "--algo", "ppo,trpo", "--seeds", 1, "--lr", 1e9)  # trpo has no learning rate
    for _ in range(2):
        assert train.main(argv) == 3
        printed = capsys.readouterr()
        first, last = printed.err.splitlines()
        assert first.startswith(f"error: {tmp_path / 'mine-ppo-4'} is left out: the ")
        assert last == "error: 1 of 2 runs diverged and are not in the table"
        assert [*cells(printed.out)] == ["mine-trpo + gae"]
    assert trained == [("mine-ppo-4", False), ("mine-trpo-4", False), ("mine-ppo-4", True)]


# The figures.

def test_half_an_interval_is_a_quantile_of_students_t_times_the_standard_error():
    half = 2.262 * (10 / 9) ** 0.5 / 10 ** 0.5
    assert train.interval([-1.0, 1.0] * 5) == pytest.approx((0, half), abs=1e-9)


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_intervals_hold_the_truth_in_95_of_100_experiments(n):
    draws = torch.randn(4000, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) * 3 + 1
    covered = sum(abs(mean - 1) <= half for mean, half in map(train.interval, draws.tolist()))
    error = math.sqrt(0.95 * 0.05 / len(draws))
    assert covered / len(draws) == pytest.approx(0.95, abs=3.5 * error)


def test_the_table_has_means_and_intervals_over_seeds(tmp_path, capsys):
    runs = [make_run(tmp_path / "a-0", [0, 1], after=0.5),
            make_run(tmp_path / "b-rloo-0", [1, 2], after=4, seconds=7),
            make_run(tmp_path / "a-1", [0, 2], after=0.7, seconds=4)]
    assert train.main(["--plot", *runs, "--out", str(tmp_path), "--name", "both"]) is None
    table = cells(capsys.readouterr().out)
    assert table == cells((tmp_path / "both.md").read_text())
    a = "0.600 ± 1.271"  # 12.706 · 0.1414 / √2
    names = ("reward", "quality", "quality, greedy", "KL", "entropy", "length", "distinct pairs")
    both = dict(iterations="2")
    assert table == {"a + gae": {"runs": "2", **both, **dict.fromkeys(names, a), "seconds": "3.000 ± 12.706"},
                     "b + rloo": {"runs": "1", **both, **dict.fromkeys(names, "4.000"), "seconds": "7.000"}}


def test_curves_are_drawn_with_matplotlib(tmp_path, monkeypatch):
    """Over the iterations that all runs of a label have."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    drawn, original = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: (
        drawn.append([line.get_xydata().tolist() for axes in self.axes for line in axes.get_lines()]),
        original(self, *args, **kwargs)))
    runs = [make_run(tmp_path / "a-0", [0, 1, 8], 1), make_run(tmp_path / "a-1", [2, 5], 1)]
    assert train.main(["--plot", *runs, "--out", str(tmp_path)]) is None
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert drawn == [[[[1, 1], [2, 3]], [[0.01, 1], [0.02, 3]]]]


def test_true_rewards_are_in_the_table_and_drawn_against_the_root_of_the_kl(tmp_path, monkeypatch, capsys):
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    drawn = {}
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *args, **kwargs: drawn.update(
        {(i, line.get_label()): line.get_xydata().tolist()
         for i, axes in enumerate(self.axes) for line in axes.get_lines()}))
    run = make_run(tmp_path / "a-0", [0, 1], 1, true_reward=[0.5, -1], length=[4, 8])
    result = read(tmp_path / "a-0")
    result["after"]["true_reward"] = -0.75
    (tmp_path / "a-0" / "result.json").write_text(json.dumps(result))
    assert train.main(["--plot", str(run), "--out", str(tmp_path)]) is None
    assert cells(capsys.readouterr().out)["a + gae"]["true reward"] == "-0.750"
    assert drawn == {(0, "a + gae"): [[1, 0], [2, 1]], (0, "a + gae, true"): [[1, 0.5], [2, -1]],
                     (1, "a + gae"): [[0.2, 0], [0.4, 1]], (1, "a + gae, true"): [[0.2, 0.5], [0.4, -1]]}


def test_without_matplotlib_there_is_a_table_only(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run = make_run(tmp_path / "a-0", [0, 1], 1)
    assert train.main(["--plot", run, "--out", str(tmp_path / "plots")]) is None
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["plot.md"]
    assert "with matplotlib installed" in capsys.readouterr().out
