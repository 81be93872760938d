"""The studies in tests/studies, except compare.py, cartpole.py and overoptimization.py."""

import itertools
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import bench
import compare
import mistakes
import train
import tuning
from algos import Batch, mean_kl
from damping import mean_eigenvalue
from helpers import ROOT, TINY
from mistakes import Census
from model import GPT, GPTConfig
from natural import scale_to_kl, weights
from reward import Task, Text, accuracy
from variance import Moments, moved
from words import COLUMNS, START, lay_out

# variance.py

MEAN = torch.tensor([4.5, 6.0])  # of length 7.5
FACTOR = torch.tensor([[2.0, 0.0], [1.5, 2.0]])  # of the covariance [[4, 3], [3, 6.25]], whose trace is 10.25


def gradients(*shape):
    """Vectors of that mean and covariance, (*shape, 2)."""
    normal = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(0))
    return MEAN + normal @ FACTOR.T


def noise(g):
    """Of rows that are added one by one."""
    moments = Moments(g.shape[1])
    for row in g:
        moments.add(row)
    assert moments.counts == [(len(g) + 1) // 2, len(g) // 2]
    torch.testing.assert_close(moments.mean().float(), g.mean(0))
    return moments.noise()


def test_noise_is_the_trace_of_the_covariance_over_the_square_of_the_mean_also_in_small_samples():
    assert noise(gradients(50_000)) == pytest.approx(10.25 / 7.5 ** 2, rel=0.03)  # a standard error is 0.6%
    samples = gradients(4000, 5)
    squares = [g.var(0).sum().item() / noise(g) for g in samples]
    # A standard error is 0.31. The square of the sample's mean would exceed 7.5² by 10.25/5 = 2.05.
    assert sum(squares) / len(squares) == pytest.approx(7.5 ** 2, abs=1.0)


def test_noise_without_any_signal_is_not_a_number():
    assert math.isnan(noise(torch.tensor([[1.0], [-1.0]])))


def test_a_half_of_the_batches_has_a_noise_of_its_own():
    moments = Moments(2)
    g = gradients(60)
    for row in g:
        moments.add(row)
    first, second = Moments(2), Moments(2)
    for row, other in zip(g[::2], g[1::2]):
        first.add(row)
        second.add(other)
    assert moments.noise([0]) == pytest.approx(first.noise())
    assert moments.noise([1]) == pytest.approx(second.noise())


# damping.py and tuning.py

def test_the_mean_eigenvalue_is_the_trace_by_the_dimension():
    A = FACTOR @ FACTOR.T
    found = mean_eigenvalue(lambda v: A @ v, 2, probes=4000)
    assert found == pytest.approx(10.25 / 2, rel=0.05)  # a standard error is 1%


def test_a_run_of_a_study_that_has_a_row_is_not_trained_again(tmp_path, monkeypatch, capsys):
    trained = []

    def train_all(planned, script, jobs, finished):
        trained.append([run.config.name for run in planned])
        for run in planned:
            finished(run)
        return {}

    def read_run(path):
        delta = 0.3 if "-0.3-" in path.name else 0.1
        return SimpleNamespace(columns={"objective": [0] * 4 + [delta], "explained_variance": [0.5] * 5},
                               result={"after": dict(reward=1, metric=2, kl=3, length=4), "commit": "abc"})

    monkeypatch.setattr(tuning, "RESULTS", tmp_path / "results" / "tuning.csv")
    monkeypatch.setattr(compare, "train_all", train_all)
    monkeypatch.setattr(compare, "read_run", read_run)
    for values in ("0.1,0.3", "0.1,0.3,1"):
        monkeypatch.setattr(tuning, "STUDIES", {"one": [dict(task="hello", algo="trpo", delta=values)]})
        assert tuning.run_study("one", tmp_path, 1) == {}
    assert trained[0] == [f"trpo-delta-{delta}-{seed}" for delta in (0.1, 0.3) for seed in range(3)]
    assert trained[1] == [f"trpo-delta-1-{seed}" for seed in range(3)]
    tuning.print_table("one")
    row = next(line for line in capsys.readouterr().out.splitlines() if "delta 0.3" in line)
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[1:6] == ["TRPO, delta 0.3", "3", "0.18 ± 0", "0.06 ± 0", "0.3 ± 0"]


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
    problems = [Text("1+1=", answer="2"), Text("2+1=", answer="3")]
    addition = Task(corpus, problems, problems, accuracy, accuracy)
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
def test_an_iteration_is_compared_with_one_of_trl(tiny):
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    options = "--pretrain-steps 1 --n-embd 8 --n-head 2 --n-layer 1 --batch-size 8".split()
    (row,), = bench.trl(1, options).values()
    assert row["TRL/ours"] == pytest.approx(row["TRL, ms"] / row["ours, ms"])


@pytest.mark.slow
def test_the_phases_of_a_run_add_up():
    phases, operators = bench.seconds(TINY).values()
    shares = [float(row["share"].rstrip("%")) for row in phases]
    assert sum(shares) == pytest.approx(100, abs=1) and min(shares) >= 0
    assert 50 < sum(float(row["share"].rstrip("%")) for row in operators) <= 101


# mistakes.py

@pytest.mark.parametrize("options", [mistakes.RETURNS, mistakes.CRITIC, mistakes.ONLY_PENALTY])
def test_without_a_mistake_a_census_has_the_gradient_of_the_objective(options):
    census = Census(0, options, pairs=20_000)
    truth = census.truth()
    assert (census.gradient() - truth).norm() < 0.02 * truth.norm()


@pytest.mark.parametrize("name", mistakes.MISTAKES)
def test_a_mistake_is_made_within_its_block_only(name):
    options = mistakes.MISTAKES[name].options
    census = Census(0, options, mistakes.MISTAKES[name].acts, pairs=200)
    right = census.gradient()
    with mistakes.made(name):
        wrong = census.gradient()
    assert torch.equal(census.gradient(), right)
    sampled = name in ("cold_sampling", "top_p")  # whose change is not in the functions of a census
    assert torch.equal(wrong, right) == sampled


@pytest.mark.slow
@pytest.mark.parametrize("name", mistakes.MISTAKES)
def test_a_test_fails_with_each_mistake(name):
    code = ("import sys; sys.path[:0] = ['.', 'tests', 'tests/studies']; import mistakes, pytest; "
            f"mistakes.make({name!r}); sys.exit(pytest.main(sys.argv[1:]))")
    test = f"tests/{mistakes.MISTAKES[name].test}"
    result = subprocess.run([sys.executable, "-c", code, "-x", "-q", "-p", "no:cacheprovider", test],
                            cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and "AssertionError" in result.stdout, result.stdout[-2000:]


# kl_estimators.py, natural.py, trust_region.py and words.py

@pytest.mark.slow
def test_the_studies_of_a_run_print_their_tables_and_draw_pictures(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib: pip install matplotlib")
    assert train.main([*TINY, "--out", str(tmp_path), "--name", "run"]) is None
    run = str(tmp_path / "run")
    for name, options, row in [("kl_estimators", ["--seeds", "1"], "| exact KL in the loss | "),
                               ("natural", ["--batches", "2"], "| TRPO, iterations of CG: 10 | "),
                               ("trust_region", ["--batches", "1"], "| largest KL | "),
                               ("words", [], "iterations  score    KL  length")]:
        out = tmp_path / (f"{name}.png" if name == "words" else "")
        result = subprocess.run([sys.executable, ROOT / "tests" / "studies" / f"{name}.py", run, *options,
                                 "--out", out], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-2000:]
        assert row in result.stdout
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_a_change_is_scaled_to_a_kl():
    policy = GPT(GPTConfig(11, 8, 1, 2, 8), torch.Generator().manual_seed(0))
    tokens = torch.randint(11, (64, 7), generator=torch.Generator().manual_seed(1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], torch.ones(64, 6, dtype=torch.bool))
    config = SimpleNamespace(temperature=1.0, micro_batch=10 ** 4)
    change = torch.randn(len(weights(policy)), generator=torch.Generator().manual_seed(2))
    scaled = scale_to_kl(policy, change, 0.02, batch, config)
    assert torch.cosine_similarity(scaled, change, dim=0).item() == pytest.approx(1, abs=1e-5)
    assert mean_kl(policy, moved(policy, scaled), batch, config) == pytest.approx(0.02, rel=0.05)


def test_lines_of_words_break_between_tokens():
    completion = Text("", tokens=[" word"] * 20 + ["<|endoftext|>"])
    lines = lay_out("the prompt", completion, [0.5] * 21)
    assert [sum(len(text) for text, _ in line) <= COLUMNS - START for line in lines] == [True, True]
    assert "".join(text for line in lines for text, _ in line) == "the prompt" + " word" * 20 + " □"
