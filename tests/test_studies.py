"""The scripts for studies: compare.py, variance.py and bench.py."""

import itertools
import math

import bench
import compare
import pytest
import torch
from helpers import TINY
from test_compare import cells, make_run
from variance import noise

import train
from reward import Task, Text, accuracy

# compare.py

def test_every_figure_of_the_table_is_the_one_worked_out_by_hand(tmp_path):
    always = lambda value: [value] * 15
    trpo = dict(kl_update=always(0.004), cg_relative_residual=always(0.5))
    rejecting = dict(accepted=[1] * 12 + [0] * 3, halvings=[2] * 12 + [0] * 3)
    runs = [
        make_run(tmp_path / "p-0", [0] * 5 + [1] * 10, 0.5, kl_update=always(0.01), clip_fraction=always(0)),
        make_run(tmp_path / "p-1", [0] * 7 + [1] * 8, 0.7, kl_update=always(0.03), clip_fraction=always(0.2)),
        make_run(tmp_path / "t-0", [0] * 11 + [1] * 4, 0.9, **trpo, **rejecting),
        make_run(tmp_path / "t-1", always(1), 0.9, **trpo, accepted=always(1), halvings=always(2)),
        make_run(tmp_path / "low-7", [0] * 5 + [0.5] * 10, 0.5, kl_update=always(1e-5))]
    # The mean curves start at 0, 0.5 and 0; the best mean of five in a row is 1. So the goal is 11/12, which
    # only five ones in a row reach. Two values a and b have the interval ± 12.706 |a - b| / 2.
    assert cells(compare.table(runs)) == {
        "p + gae": {"runs": "2", "iterations": "15 ± 0", "final reward": "0.6 ± 1.3", "to 90%": "11 ± 13",
                    "KL of an update": "0.02 ± 0.13", "rejected": "", "halvings": "", "CG residual": "",
                    "clip fraction": "0.1 ± 1.3",
                    "reward over the iterations": "▁" * 5 + "▅" * 2 + "█" * 8 + " 0.000 to 1.000"},
        "t + gae": {"runs": "2", "iterations": "15 ± 0", "final reward": "0.9 ± 0", "to 90%": "5 (1 of 2)",
                    "KL of an update": "0.004 ± 0", "rejected": "0.1 ± 1.3", "halvings": "2 ± 0",
                    "CG residual": "0.5 ± 0", "clip fraction": "",
                    "reward over the iterations": "▅" * 11 + "█" * 4 + " 0.500 to 1.000"},
        "low + gae": {"runs": "1", "iterations": "15", "final reward": "0.5", "to 90%": "",
                    "KL of an update": "1e-05", "rejected": "", "halvings": "", "CG residual": "",
                    "clip fraction": "",
                    "reward over the iterations": "▁" * 5 + "▅" * 10 + " 0.000 to 0.500"}}


@pytest.mark.parametrize("goal, rewards, iterations", [
    (0.39, [0, 0.2, 0.4, 0.6, 0.8, 1], 5),  # the mean of the first five is 0.4
    (0.41, [0, 0.2, 0.4, 0.6, 0.8, 1], 6),  # that of the last five is 0.6
    (0.61, [0, 0.2, 0.4, 0.6, 0.8, 1], None),
    (0.49, [0, 1], 2),  # fewer than five: their mean
])
def test_the_goal_is_reached_by_the_mean_of_the_last_five_iterations(goal, rewards, iterations):
    assert compare.iterations_to(goal, rewards) == iterations


def test_a_block_of_a_long_curve_is_the_mean_of_a_few_iterations():
    assert compare.sparklines([[0, 1] * 40, [0] * 40 + [1] * 40]) == ["▅" * 40, "▁" * 20 + "█" * 20]


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    one = make_run(tmp_path / "a-0", [0, 1], 1, kl_update=[0, 0])
    other = make_run(tmp_path / "b-0", [0, 1], 1, task="addition", kl_update=[0, 0])
    for runs, reason in [([one, other], "several tasks, addition, reviews"),
                         ([one, tmp_path / "none"], "none is not a finished run")]:
        monkeypatch.setattr("sys.argv", ["compare.py", *map(str, runs)])
        with pytest.raises(SystemExit) as exit:
            compare.main()
        assert exit.value.code == 2
        assert reason in capsys.readouterr().err.splitlines()[-1]


# variance.py

MEAN = torch.tensor([4.5, 6.0])  # of length 7.5
FACTOR = torch.tensor([[2.0, 0.0], [1.5, 2.0]])  # of the covariance [[4, 3], [3, 6.25]], whose trace is 10.25


def gradients(*shape):
    """Vectors of that mean and covariance, (*shape, 2)."""
    normal = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(0))
    return MEAN + normal @ FACTOR.T


def test_noise_is_the_trace_of_the_covariance_over_the_square_of_the_mean_also_in_small_samples():
    assert noise(gradients(50_000)) == pytest.approx(10.25 / 7.5 ** 2, rel=0.03)  # a standard error is 0.6%
    samples = gradients(4000, 5)
    squares = [g.var(0).sum().item() / noise(g) for g in samples]
    # A standard error is 0.31. The square of the sample's mean would exceed 7.5² by 10.25/5 = 2.05.
    assert sum(squares) / len(squares) == pytest.approx(7.5 ** 2, abs=1.0)


def test_noise_without_any_signal_is_not_a_number():
    assert math.isnan(noise(torch.tensor([[1.0], [-1.0]])))


# bench.py

def test_a_ratio_is_the_median_of_the_ratios_of_the_turns():
    assert bench.ratio([2, 30, 4], [1, 10, 1]) == 3


@pytest.fixture
def tiny(monkeypatch):
    """Sizes that take no time, and everything in this process, whose high water seldom rises."""
    monkeypatch.setattr(bench, "SIZES", [(8, 4, 1, 2, 8, 11)])
    monkeypatch.setattr(bench, "GROWTH", {"episodes": [("trpo", n, 8, 1, 2, 8, 257) for n in (8, 16)]})
    monkeypatch.setattr(bench, "MEMORY", {"each": [(algo, 8, 8, 1, 2, 8, 300) for algo in train.ALGOS]})
    monkeypatch.setattr(bench, "high_water", itertools.count(1.0).__next__)
    corpus = ["1+1=2", "2+1=3"] * 20
    problem = Text("1+1=", answer="2")
    addition = Task(corpus, [problem], [problem], accuracy, accuracy)
    monkeypatch.setattr(bench, "TASKS", {"addition": lambda seed: addition})
    monkeypatch.setattr(bench, "alone", lambda function, *args: function(*args))
    monkeypatch.setattr(bench, "gpt2_of_transformers", lambda policy: None)


def test_both_fisher_vector_products_agree_in_the_benchmark(tiny):
    (row,), = bench.fisher().values()
    assert row["relative difference"] < 1e-5
    assert row["ours"] > 0 and row["textbook"] > 0


def test_the_parts_of_an_iteration_add_up(tiny):
    options = "--pretrain-steps 1 --n-embd 8 --n-head 2 --n-layer 1 --batch-size 8".split()
    rows, = bench.iteration(1, options).values()
    ms = {row["part"]: row["ms"] for row in rows}
    whole = ms.pop("whole iteration")
    assert all(part > 0 for part in ms.values())
    assert whole == pytest.approx(sum(ms.values()) - ms["forward"])


@pytest.mark.parametrize("part", ["updates", "sampling", "growth", "memory"])
def test_the_other_parts_of_the_benchmark_measure_something(tiny, part):
    for rows in bench.PARTS[part]().values():
        assert rows and all(value >= 0 for row in rows for value in row.values() if isinstance(value, float))


@pytest.mark.slow
def test_the_phases_of_a_run_add_up():
    phases, operators = bench.seconds(TINY).values()
    shares = [float(row["share"].rstrip("%")) for row in phases]
    assert sum(shares) == pytest.approx(100, abs=1) and min(shares) >= 0
    assert 50 < sum(float(row["share"].rstrip("%")) for row in operators) <= 101
