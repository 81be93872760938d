"""Several runs side by side: what is trained, what is skipped, and every figure of the table."""

import csv
import fcntl
import json
import os
import re
import shutil
import sys

import pytest

import train
from test_train import TINY, contents

RUNS = ["reviews-reinforce-4", "reviews-trpo-4", "reviews-reinforce-5", "reviews-trpo-5"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A comparison of two algorithms and two seeds."""
    out = tmp_path_factory.mktemp("runs")
    assert compare(out) is None
    return out


def compare(out, *options):
    return train.main([*TINY, "--out", str(out), "--algo", "reinforce,trpo", "--seeds", "2", "--seed", "4", *map(str, options)])


def cells(text):
    """A Markdown table as {row's label: {title: cell}}."""
    title, _, *rows = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(title[1:], row[1:])) for row in rows}


def test_a_comparison_is_its_runs(out):
    assert {p.name for p in out.iterdir()} >= {"pretrained", "reviews-reinforce+trpo.md", *RUNS} and len(list((out / "pretrained").iterdir())) == 1
    table = cells((out / "reviews-reinforce+trpo.md").read_text())
    assert list(table) == ["reinforce", "trpo"]
    for algo, row in table.items():
        results = [json.loads((out / f"reviews-{algo}-{seed}" / "result.json").read_text()) for seed in (4, 5)]
        assert results[0]["reward_before"] == results[1]["reward_before"] and row["runs"] == "2"  # from the same weights
        mean = sum(result["reward_after"] for result in results) / 2
        assert float(row["reward"].split(" ± ")[0]) == pytest.approx(mean, rel=6e-3)
    alone = train.main([*TINY, "--out", str(out), "--algo", "trpo", "--seed", "5", "--name", "alone"])
    untimed = lambda name: [line.rpartition(",")[0] for line in (out / name / "metrics.csv").read_text().splitlines()]
    assert alone is None and untimed("alone") == untimed("reviews-trpo-5")


def test_what_is_finished_is_not_trained_again(out, capsys):
    before = {path: data for path, data in contents(out).items() if path.suffix != ".png"}
    trained = []
    original, train.train = train.train, lambda config, resume: trained.append(config.name) or original(config, resume)
    try:
        assert compare(out) is None and trained == []
        assert {path: data for path, data in contents(out).items() if path.suffix != ".png"} == before
        (out / RUNS[2] / "result.json").unlink()  # it was interrupted
        (out / RUNS[2] / "checkpoint.pt").unlink()
        shutil.move(out / RUNS[1], out / "elsewhere")
        assert compare(out) is None and trained == RUNS[1:3]
    finally:
        train.train = original
    for run in RUNS[1:3]:
        again, was = (out / run / "metrics.csv").read_text(), before[out / run / "metrics.csv"].decode()
        assert [line.rpartition(",")[0] for line in again.splitlines()] == [line.rpartition(",")[0] for line in was.splitlines()]


def test_another_run_of_that_name_is_not_taken_for_it(out, capsys):
    before = contents(out)
    for options, says in [(["--delta", 0.02], "--delta"), (["--iterations", 3], "--iterations"), (["--eval-episodes", 8], "--eval-episodes")]:
        capsys.readouterr()
        assert compare(out, *options) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {out / 'reviews-'}") and err.count("\n") == 1 and says in err
    assert contents(out) == before
    assert compare(out, "--delta", 0.02, "--name", "wide", "--iterations", 1) is None
    assert json.loads((out / "wide-trpo-5" / "config.json").read_text())["delta"] == 0.02 and (out / "wide-reinforce+trpo.md").exists()


def make(path, seed, rewards, algo="ppo", after=None, **config):
    """A finished run with these rewards, of which all that matters is known."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"task": "reviews", "algo": algo, "advantage": "gae", "seed": seed, "name": path.name, **config}))
    (path / "result.json").write_text(json.dumps({"reward_before": 0.0, "reward_after": after or rewards[-1], "metric": "grammatical", "metric_after": 0.5,
                                                  "greedy_after": 1.0, "kl": 0.25}))
    with open(path / "metrics.csv", "w") as file:
        table = csv.writer(file)
        table.writerow(["iteration", "reward", "kl", "kl_update", {"ppo": "clip_fraction", "trpo": "accepted", "reinforce": "loss"}[algo], "seconds"])
        for i, reward in enumerate(rewards):
            table.writerow([i + 1, reward, 0.01 * i, 0.02, i % 2, 2.0])
    return path


def test_every_figure_by_hand(tmp_path, capsys):
    make(tmp_path / "a", 0, [0.0] * 5 + [1.0] * 10, after=0.5)  # the last five pass 0.9 at the tenth iteration
    make(tmp_path / "b", 1, [0.0] * 7 + [1.0] * 8, after=0.7)  # at the twelfth
    make(tmp_path / "c", 0, [0.0] * 11 + [1.0] * 4, "trpo")  # never: 0.8 at the end
    make(tmp_path / "d", 1, [1.0] * 15, "trpo")
    make(tmp_path / "e", 2, [0.0] * 15, "reinforce")
    assert train.main(["--plot", *(str(tmp_path / name) for name in "abcde"), "--out", str(tmp_path), "--name", "five"]) is None
    printed = capsys.readouterr().out
    table = cells(printed)
    assert table == cells((tmp_path / "five.md").read_text()) and list(table) == ["ppo", "trpo", "reinforce"]
    # ± t sd / √2 = 12.706 · |difference| / 2
    assert table["ppo"] == {"runs": "2", "iterations": "15", "reward": "0.6 ± 1.3", "grammatical": "0.5", "grammatical, greedy": "1", "KL": "0.25",
                            "to 90%": "11 ± 13", "s to 90%": "22 ± 25", "KL of an update": "0.02", "rejected": "", "clip fraction": "0.467"}
    assert table["trpo"]["to 90%"] == "5 (1 of 2)" and table["trpo"]["rejected"] == "8" and table["trpo"]["clip fraction"] == ""
    assert table["reinforce"]["to 90%"] == table["reinforce"]["rejected"] == "" and table["reinforce"]["reward"] == "0"
    assert "five in a row is 0.900," in printed
    lines = dict(re.findall(r"^(\w+) +([▁-█]+) ", printed, re.M))
    assert lines["reinforce"] == "▁" * 15 and lines["ppo"] == "▁" * 5 + "▄" * 2 + "█" * 8


@pytest.mark.parametrize("df, published", [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042), (120, 1.980)])
def test_students_t(df, published):
    assert train.t_quantile(df) == pytest.approx(published, abs=6e-4)


def test_intervals_cover():
    """95 of a hundred experiments with five seeds have the truth within their interval."""
    import torch
    draws = torch.randn(2000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1
    covered = [abs(mean - 1) <= half for mean, half in map(train.interval, draws.tolist())]
    assert 0.935 < sum(covered) / len(covered) < 0.965


def test_the_noise_of_a_gradient():
    """Rows with mean (3, 4) and variance 2 in each of 50 coordinates: 100 / 25."""
    import torch
    from variance import noise
    mean = torch.zeros(50, dtype=torch.float64)
    mean[:2] = torch.tensor([3.0, 4.0])
    g = mean + 2 ** 0.5 * torch.randn(4000, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert noise(g) == pytest.approx(4, rel=0.03) and noise(g[:40]) == pytest.approx(4, rel=0.3)


def test_groups_are_named_by_what_tells_them_apart():
    runs = [({"algo": algo, "lr": lr, "iterations": n, "advantage": advantage, "seed": seed}, {}, {}) for seed in (0, 1) for algo, lr, n, advantage in
            [("ppo", 1e-4, 40, "gae"), ("ppo", 1e-3, 40, "gae"), ("trpo", 1e-3, 40, "gae"), ("reinforce", 1e-3, 80, "gae"), ("reinforce", 1e-3, 80, "rloo")]]
    groups = train.grouped(runs)
    assert list(groups) == ["ppo gae lr=0.0001", "ppo gae lr=0.001", "trpo gae lr=0.001", "reinforce gae lr=0.001", "reinforce rloo lr=0.001"]
    assert all([config["seed"] for config, _, _ in group] == [0, 1] for group in groups.values())
    assert list(train.grouped(runs[2:4])) == ["trpo", "reinforce"]  # their own iterations go without saying


def test_long_runs_and_short_ones_on_one_scale():
    group = lambda n: [({}, {}, {"reward": list(range(n))})]
    long, short = train.sparklines({"long": group(240), "short": group(80)}).splitlines()
    blocks = lambda line: line.split()[1]
    assert len(blocks(long)) == 60 and len(blocks(short)) == 20 and blocks(long)[:20] == blocks(short)
    assert blocks(long)[0] == "▁" and blocks(long)[-1] == "█" and "".join(sorted(blocks(long))) == blocks(long)


def test_a_picture(out, tmp_path):
    pytest.importorskip("matplotlib", reason="draws the picture")
    assert train.main(["--plot", *(str(out / name) for name in RUNS), "--out", str(tmp_path)]) is None
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_without_matplotlib(out, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train.main(["--plot", str(out / RUNS[0]), "--out", str(tmp_path)]) is None
    assert [p.name for p in tmp_path.iterdir()] == ["plot.md"] and "matplotlib" in capsys.readouterr().out


def test_event_files_hold_what_the_metrics_do(out):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="reads event files")
    assert train.main([*TINY, "--out", str(out), "--name", "watched", "--tensorboard"]) is None
    events = reader.EventAccumulator(str(out / "watched")).Reload()
    _, _, metrics = train.read_run(out / "watched")
    assert set(events.Tags()["scalars"]) == set(metrics)
    assert [event.value for event in events.Scalars("reward")] == pytest.approx(metrics["reward"], rel=1e-4)
    assert [event.step for event in events.Scalars("kl")] == [1, 2]


def test_without_tensorboard(out, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    before = contents(out)
    assert train.main([*TINY, "--out", str(out), "--name", "unwatched", "--tensorboard"]) == 2
    assert capsys.readouterr().err == "error: tensorboard is not installed: pip install tensorboard, or leave --tensorboard out\n" and contents(out) == before


def test_a_run_that_diverges_does_not_end_the_comparison(tmp_path, capsys):
    options = [*TINY, "--out", str(tmp_path), "--algo", "trpo,ppo,reinforce", "--lr", "1e30"]  # trpo does not read it
    for _ in range(2):  # the second time trpo is finished, and the others diverge again
        assert train.main(options) == 3
        printed = capsys.readouterr()
        first, second, last = printed.err.splitlines()
        assert "stopped at iteration 1" in first and "stopped at iteration 1" in second
        assert last == f"error: 2 of 3 runs diverged and are not in the table: {tmp_path / 'reviews-ppo-0'}, {tmp_path / 'reviews-reinforce-0'}"
        assert list(cells(printed.out)) == ["trpo"] and "run 3 of 3: " in printed.out


def test_a_run_that_another_process_is_at_work_on(out, capsys):
    run = out / RUNS[0]
    result = (run / "result.json").read_bytes()
    (run / "result.json").unlink()
    before = contents(out)
    with open(run / "metrics.csv") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert compare(out) == 2
        assert train.main([*TINY, "--out", str(out), "--name", run.name, "--overwrite"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2 and all("another process" in line for line in errors) and contents(out) == before
    (run / "result.json").write_bytes(result)


def test_a_task_that_has_changed_since(tmp_path, capsys):
    from test_train import FILE, SMALL, task_file
    file = task_file(tmp_path, FILE)
    options = [*TINY, "--task", str(file), *map(str, SMALL), "--out", str(tmp_path / "out"), "--seeds", "2"]
    assert train.main(options) is None and train.main(options) is None
    os.utime(file, (2e9, 2e9))
    assert train.main(options) == 2
    assert f"{file} is newer" in capsys.readouterr().err
