"""A run from end to end: what decides it, what it writes, and every number that it reports."""

import copy
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import traceback
from collections import deque
from dataclasses import asdict, replace
from itertools import combinations, islice
from statistics import fmean, stdev
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import reward
import train
from advantage import ADVANTAGES
from algos import action_log_probs, fit_critic, mean_gradient
from helpers import ROOT, SMALL, TASK, TINY, contents, rows, task_file
from model import GPT, BadInput, Critic, GPTConfig, Tokenizer, load_checkpoint, save_checkpoint
from rollout import completion_texts, sample

FILES = {"config.json", "metrics.csv", "checkpoint.pt", "result.json", "eval.csv", "samples-0.jsonl",
         "samples-2.jsonl"}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A directory of runs and a task file. The first run leaves pretrained weights for the others."""
    out = tmp_path_factory.mktemp("runs")
    task_file(out)
    return out


def command(out, *options):
    """The options of a very short run on out/mine.py."""
    return [*TINY, *SMALL, "--task", str(out / "mine.py"), "--out", str(out), *map(str, options)]


def go(out, *options):
    return train.main(command(out, *options))


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def same_weights(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def stop(*args):
    raise BadInput("far enough")


# A run.

def test_columns_of_numpys_numbers_can_be_loaded_again(out, monkeypatch):
    monkeypatch.setitem(train.ALGOS, "numpy", lambda *args: {"loss": np.float64(0.5), "more": np.float32(2)})
    assert go(out, "--algo", "numpy", "--name", "numpy") is None
    assert load_checkpoint(out / "numpy")[3]["history"][-1]["more"] == 2
    resumed = ["--resume", str(out / "numpy"), "--task", str(out / "mine.py"), "--iterations", "3"]
    assert train.main(resumed) is None


@pytest.mark.parametrize("where", ["def reward(p, c): exit()", "exit(0)"])
def test_a_custom_file_that_exits_is_an_error(tmp_path, capsys, where):
    task_file(tmp_path, TASK + where)
    assert go(tmp_path) == 2 and "a custom file has ended the program" in capsys.readouterr().err


def test_a_run_whose_prompts_have_changed_is_not_resumed(tmp_path, capsys):
    task_file(tmp_path)
    assert go(tmp_path, "--name", "run") is None
    task_file(tmp_path, TASK.replace("the dog", "the mat"))
    resumed = ["--resume", str(tmp_path / "run"), "--task", str(tmp_path / "mine.py"), "--iterations", "3"]
    assert train.main(resumed) == 2 and "has other prompts than when" in capsys.readouterr().err


def test_what_prompts_carry_is_compared_as_far_as_it_is_the_same_at_each_start():
    def hash_of(**attributes):
        return train.prompts_hash(reward.Task([], [reward.Text("the", **attributes)], ["a"], None, None))

    class Thing:
        pass

    assert hash_of(answer={"a", "b"}) == hash_of(answer={"c"})
    assert hash_of(answer=Thing()) == hash_of(answer=Thing())
    assert len({hash_of(answer="a"), hash_of(answer="b"), hash_of(), hash_of(answer=["a"])}) == 4


def test_a_folder_with_somebody_elses_config_keeps_it(tmp_path, capsys):
    task_file(tmp_path)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"model_type": "gpt2"}')
    (tmp_path / "gpt2" / "film.part").write_text("x")
    before = contents(tmp_path / "gpt2")
    assert go(tmp_path, "--name", "gpt2") == 2 and "exists: give another" in capsys.readouterr().err
    assert contents(tmp_path / "gpt2") == before


@pytest.mark.parametrize("batch", ["all scores equal", "one differs"])
def test_a_batch_of_equal_scores_moves_nothing(world, batch):
    """Whatever the critic says; the policy differs from its reference."""
    task, policy, reference, critic, tokenizer, config = world
    config.whiten = config.gamma = 1
    scores = iter([0.0] + [1.0] * 31 if batch == "one differs" else [1.0] * 32)
    judged = replace(task, reward=lambda prompt, text: next(scores))
    generators = {name: torch.Generator().manual_seed(7) for name in ("prompts", "sample")}
    collected, stats = train.collect(judged, policy, reference, critic, tokenizer, config, generators)
    assert (collected.advantages == 0).all() == (batch == "all scores equal")
    assert (stats["uniform_groups"] == 1) == (batch == "all scores equal")


def test_an_algorithm_that_changes_its_options_starts_each_iteration_from_those_given(out, monkeypatch):
    seen = []

    def halving(policy, batch, optimizer, config, generator=None):
        seen.append(config.delta)
        config.delta /= 2
        return train.trpo(policy, batch, optimizer, config, generator)

    monkeypatch.setitem(train.ALGOS, "halving", halving)
    options = ["--algo", "halving", "--name", "halving", "--delta", 0.02]
    assert go(out, *options, "--iterations", 3) is None
    assert seen == [0.02] * 3 and read(out / "halving" / "config.json")["delta"] == 0.02
    assert load_checkpoint(out / "halving")[3]["config"]["delta"] == 0.02


def test_a_reward_for_each_action_is_placed_there_and_its_sum_is_the_score(world):
    task, policy, reference, critic, tokenizer, config = world
    config.kl_coef = 0
    def rewards_of(prompt, text):
        assert len(text.tokens) == text.length and (text.tokens[-1] == "<|endoftext|>") == text.ended
        return 5.0 if text.ended else [len(token) + i for i, token in enumerate(text.tokens)]

    generators = {name: torch.Generator().manual_seed(7) for name in ("prompts", "sample")}
    batch, _ = train.collect(replace(task, reward=rewards_of), policy, reference, critic, tokenizer, config,
                             generators)
    ends = (batch.mask & (batch.actions == tokenizer.eos_token)).any(1)
    assert 0 < ends.sum() < len(ends)
    for b, mask in enumerate(batch.mask):
        actions = batch.actions[b, mask].tolist()
        expected = [len(tokenizer.encoding.decode([action])) + i for i, action in enumerate(actions)]
        if ends[b]:
            expected = [0.0] * (len(actions) - 1) + [5.0]
        assert batch.rewards[b, mask].tolist() == expected and batch.scores[b] == sum(expected)
        assert (batch.rewards[b, ~mask] == 0).all()


# What a custom script gives to main.

def test_a_schedule_sets_the_options_of_an_iteration_also_after_resume(out, monkeypatch):
    seen = []

    def watching(policy, batch, optimizer, config, generator=None):
        seen.append((config.kl_coef, config.lr, optimizer.param_groups[0]["lr"]))
        return train.reinforce(policy, batch, optimizer, config, generator)

    def schedule(iteration):
        return {"kl_coef": 0.5 / iteration, "lr": np.float64(0.01 * iteration)} if iteration > 1 else {}

    monkeypatch.setitem(train.ALGOS, "watching", watching)
    argv = command(out, "--algo", "watching", "--lr", 0.2, "--kl-coef", 0.3, "--name", "schedule")
    assert train.main(argv, schedule=schedule) is None
    resumed = ["--resume", str(out / "schedule"), "--task", str(out / "mine.py"), "--iterations", "4"]
    assert train.main(resumed, schedule=schedule) is None
    assert seen == [(0.3, 0.2, 0.2)] + [(0.5 / i, 0.01 * i, 0.01 * i) for i in (2, 3, 4)]
    assert read(out / "schedule" / "config.json")["lr"] == 0.2


@pytest.mark.parametrize("value, says", [
    ({"batch_size": 8}, "the schedule returned {'batch_size': 8} for iteration 2: it must return a dict"),
    (0.1, "the schedule returned 0.1 for iteration 2: it must return a dict"),
    ({"lr": -1.0}, "the schedule of iteration 2: --lr must be from 0 to 1e+09, not -1.0"),
    ({"lr": "a"}, "the schedule of iteration 2: --lr cannot be 'a'"),
    ({"lr": [0.1, 0.2]}, "the schedule of iteration 2: ")])
def test_a_bad_schedule_is_one_line(out, capsys, value, says):
    argv = command(out, "--name", "unscheduled")
    assert train.main([*argv, "--overwrite"], schedule=lambda iteration: value if iteration == 2 else {}) == 2
    assert capsys.readouterr().err.startswith(f"error: {says}")


def test_a_logger_gets_the_rows_of_both_tables(out):
    seen = []
    argv = command(out, "--iterations", 3, "--eval-every", 2, "--name", "logged")
    log = lambda run, table, row: seen.append((table, row["iteration"], row.pop("reward"))) or run == out
    assert train.main(argv, log=log) is None
    evaluations = load_checkpoint(out / "logged")[3]["evaluations"]
    assert [pair[:2] for pair in seen] == [("eval", 0), ("metrics", 1), ("metrics", 2), ("eval", 2),
                                           ("metrics", 3), ("eval", 3)]
    assert [reward for table, _, reward in seen if table == "eval"] == [
        evaluations[i]["reward"] for i in (0, 2, 3)]


def test_a_custom_collect_takes_the_place_of_the_other(out):
    def collect(*args):
        batch, stats = train.collect(*args)
        return batch, stats | {"mine": 7, "episodes": 20}

    assert train.main(command(out, "--name", "collected"), collect=collect) is None
    assert [(row["mine"], row["episodes"]) for row in rows(out / "collected")] == [("7", "20"), ("7", "40")]


@pytest.mark.parametrize("functions", [{}, {"schedule": lambda iteration: {}}])
def test_a_run_with_a_custom_collect_is_not_resumed_without_it(out, capsys, functions):
    def collect(*args):
        return train.collect(*args)

    argv = command(out, "--name", "with-collect", "--overwrite")
    assert train.main(argv, collect=collect) is None
    resumed = ["--resume", str(out / "with-collect"), "--task", str(out / "mine.py"), "--iterations", "3"]
    assert train.main(resumed, **functions) == 2
    assert "was trained with another `collect` or `schedule`: give --resume to" in capsys.readouterr().err
    assert train.main(resumed, collect=collect) is None


@pytest.mark.parametrize("key, value", [("x", np.float64(1)), ("x", np.ones(2)), (3, 1.0),
                                        ("x", [{"y": deque()}])])
def test_a_state_that_could_not_be_loaded_again_is_refused(out, capsys, monkeypatch, key, value):
    def keeping(policy, batch, optimizer, config, generator=None):
        optimizer.state[key] = value

    monkeypatch.setitem(train.ALGOS, "keeping", keeping)
    assert go(out, "--algo", "keeping", "--name", "keeping", "--overwrite") == 2
    assert f"optimizer.state[{key!r}] cannot be saved" in capsys.readouterr().err
    assert load_checkpoint(out / "keeping")[3]["history"] == []


def test_eval_every_keeps_the_checkpoint_of_each_evaluation(out, capsys):
    """The weights of checkpoint-N.pt are those of a run that ends after N iterations."""
    assert go(out, "--iterations", 3, "--eval-every", 2, "--name", "evaluated") is None
    assert "the highest held-out reward is" in capsys.readouterr().out
    assert go(out, "--iterations", 2, "--name", "short") is None
    assert "the highest held-out reward" not in capsys.readouterr().out
    files = {path.name for path in (out / "evaluated").glob("checkpoint*")}
    assert files == {"checkpoint.pt", "checkpoint-2.pt", "checkpoint-3.pt"}
    kept, short = (load_checkpoint(out / path)[0] for path in ("evaluated/checkpoint-2.pt", "short"))
    assert same_weights(kept, short)
    assert go(out, "--iterations", 1, "--name", "evaluated", "--overwrite") is None
    assert {path.name for path in (out / "evaluated").glob("checkpoint*")} == {"checkpoint.pt"}


def test_the_best_evaluation_is_that_of_the_true_reward_where_there_is_one(capsys):
    rows = {i: {"iteration": i, "reward": reward, "reward_ci": 0, "true_reward": true, "true_reward_ci": 0.1}
            for i, (reward, true) in enumerate([(0, 0), (1, 0.8), (2, 0.6)])}
    train.print_best(rows)
    printed = capsys.readouterr().out
    assert "the highest held-out true reward is 0.800 ± 0.100, after 1 iterations" in printed
    assert "warning: it has fallen" in printed


@pytest.mark.parametrize("rewards, ci, best, fallen", [
    ([0.1, 0.5, 0.45], 0.06, "0.500 ± 0.060, after 1 iterations", False),
    ([0.1, 0.5, 0.43], 0.06, "0.500 ± 0.060, after 1 iterations", True),
    ([0.1, 0.5, 0.6], 0.06, "0.600 ± 0.060, after 2 iterations", False),
    ([0.1, 0.5, 0.1], math.nan, "0.500, after 1 iterations", False)])
def test_a_clear_fall_from_the_best_evaluation_is_a_warning(capsys, rewards, ci, best, fallen):
    train.print_best({i: {"iteration": i, "reward": reward, "reward_ci": ci}
                      for i, reward in enumerate(rewards)})
    printed = capsys.readouterr().out
    assert f"the highest held-out reward is {best}" in printed
    assert ("warning: it has fallen since then by more than" in printed) == fallen


def test_pass_at_k_is_the_share_of_choices_with_a_success():
    rewards = [0.0, 1.0, 0.0, 0.0, 1.0]
    for k in (1, 2, 4, 5):
        choices = [max(chosen) for chosen in combinations(rewards, k)]
        assert train.pass_at_k(rewards, k) == pytest.approx(fmean(choices))


def test_an_evaluation_has_pass_at_k_for_rewards_of_0_and_1_and_enough_completions(world, capsys):
    task, policy, reference, _, tokenizer, config = world
    binary = replace(task, reward=lambda prompt, text: float(len(text.tokens) > 3))
    for n, names in [(12, []), (16, ["pass_4"]), (70, ["pass_4", "pass_16"])]:
        config.eval_episodes = n
        results, samples = train.evaluate(binary, policy, reference, tokenizer, config)
        assert [name for name in results if re.fullmatch(r"pass_\d+", name)] == names
        for name in names:
            k = int(name[5:])
            by_prompt = [[s["reward"] for s in samples if s["prompt"] == prompt] for prompt in task.heldout]
            solved = [train.pass_at_k(some, k) for some in by_prompt]
            assert results[name] == pytest.approx(fmean(solved))
            assert results[f"{name}_ci"] == train.half_width(solved)
    results, _ = train.evaluate(task, policy, reference, tokenizer, config)
    assert "pass_4" not in results
    train.print_results(task, {"before": results | {"pass_4": 0.5}, "after": results})
    assert "pass@4" not in capsys.readouterr().out


@pytest.mark.parametrize("advantage", ["gae", "rloo"])
def test_explain_prints_numbers_that_belong_together(out, capsys, advantage):
    assert go(out, "--advantage", advantage, "--name", f"explain-{advantage}") is None
    before = contents(out / f"explain-{advantage}")
    capsys.readouterr()
    argv = ["--explain", str(out / f"explain-{advantage}"), "--task", str(out / "mine.py")]
    assert train.main(argv) is None
    printed = capsys.readouterr().out
    assert contents(out / f"explain-{advantage}") == before
    found = re.findall(r"^(the [^\n]*)\nscore (\S+)\n +log π .*action\n((?: .*\n)+)", printed, re.M)
    assert len(found) == 4
    for _, score, table in found:
        rows = [line.split(None, 7) for line in table.splitlines()]
        logp, ref, rewards, returns, values, advantages, whitened = np.array(
            [row[:7] for row in rows], dtype=float).T
        np.testing.assert_allclose(rewards[:-1], 0.1 * (ref - logp)[:-1], atol=2e-3)
        assert rewards.sum() == pytest.approx(float(score) + 0.1 * (ref - logp).sum(), abs=0.02)
        np.testing.assert_allclose(returns, np.cumsum(rewards[::-1])[::-1], atol=0.02)
        if advantage == "rloo":
            assert (values == 0).all() and (advantages == advantages[0]).all()
        else:
            errors = rewards + np.append(values[1:], 0) - values
            np.testing.assert_allclose(advantages[:-1], (errors[:-1] + 0.95 * advantages[1:]), atol=0.01)
    assert train.main([*argv, "--seed", "1"]) is None
    assert capsys.readouterr().out != printed


def test_a_default_may_belong_to_a_task_and_an_algorithm():
    lr = {algo: train.parse(["--task", "addition", "--algo", algo])[0].lr for algo in ("reinforce", "ppo")}
    assert lr == {"reinforce": 1e-3, "ppo": 1e-4}


@pytest.mark.parametrize("estimator, algo", [("gae", "reinforce"), ("gae", "ppo"), ("gae", "trpo"),
                                             ("grpo", "reinforce"), ("rloo", "trpo"), ("returns", "ppo")])
@pytest.mark.parametrize("score", [0, 0.3])
def test_a_constant_reward_leaves_the_policy_as_it_was(out, estimator, algo, score):
    """Its advantages are nothing but rounding, and so is the KL penalty of a policy that has not moved."""
    task_file(out, TASK.replace("len(completion) / 10", str(score)), "constant.py")
    options = ["--algo", algo, "--advantage", estimator, "--task", out / "constant.py", "--overwrite"]
    assert go(out, *options, "--name", "constant", "--iterations", 4) is None
    policy, reference, _, _ = load_checkpoint(out / "constant")
    assert same_weights(policy, reference)


@pytest.mark.parametrize("algo", train.ALGOS)
def test_a_run_writes_its_config_metrics_checkpoint_and_result(out, algo, capsys):
    assert go(out, "--algo", algo, "--name", algo) is None
    printed = capsys.readouterr().out
    assert len(re.findall(r"^ +\d/2  reward .* kl .* entropy .* s, \d+ s left", printed, re.M)) == 2

    run = out / algo
    config, result = read(run / "config.json"), read(run / "result.json")
    assert (config["algo"], config["n_embd"], config["task"]) == (algo, 16, str(out / "mine.py"))
    assert {*result} == {"metric", "before", "after", "seconds", "pretraining", "processes", "threads",
                         "device", "torch", "python", "command", "commit", "task_sha256", "script_sha256"}
    assert result["task_sha256"] == hashlib.sha256((out / "mine.py").read_bytes()).hexdigest()
    assert "NaN" not in (run / "result.json").read_text()  # strict JSON
    assert (result["metric"], result["processes"], result["threads"]) == ("reward", 1, 1)
    assert 0 < result["pretraining"]["bits_per_byte"] < 8
    assert 0 <= result["before"]["kl"] < 1e-6 < result["after"]["kl"]  # the policy starts as its reference

    table = rows(run)
    assert [row["iteration"] for row in table] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in table for value in row.values())
    assert 0 <= float(table[0]["kl"]) < 1e-6 < float(table[1]["kl"])

    policy, reference, _, more = load_checkpoint(run)
    pretrained, _, _, _ = load_checkpoint(next((out / "pretrained").iterdir()))
    assert same_weights(reference, pretrained)
    assert not same_weights(policy, pretrained)
    assert more["config"] == config
    assert [row["iteration"] for row in more["history"]] == [1, 2]
    assert more["critic"]["value_head.weight"].abs().max() > 0  # it was zero before it was fitted


@pytest.mark.parametrize("algo", train.ALGOS)
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_every_algorithm_runs_with_every_advantage(out, algo, advantage):
    assert go(out, "--algo", algo, "--advantage", advantage, "--iterations", 1, "--overwrite") is None
    run = out / f"mine-{algo}-{advantage}-0".replace("-gae", "")
    row, = rows(run)
    assert all(math.isfinite(float(value)) for value in row.values())
    assert ("explained_variance" in row) == ("critic_loss" in row) == (advantage == "gae")
    policy, reference, _, _ = load_checkpoint(run)
    assert not same_weights(policy, reference)


def test_an_algorithm_of_ones_own_runs(out, monkeypatch):
    def halve(policy, batch, optimizer, config, generator):
        for p in policy.parameters():
            p.data /= 2
        return {"halved": len(batch.mask)}

    monkeypatch.setitem(train.ALGOS, "halve", halve)
    assert go(out, "--algo", "halve", "--iterations", 1) is None
    assert rows(out / "mine-halve-0")[0]["halved"] == "16"
    policy, reference, _, _ = load_checkpoint(out / "mine-halve-0")
    assert all(torch.equal(2 * p, q) for p, q in zip(policy.parameters(), reference.parameters()))


def test_another_process_without_a_network_writes_the_same_bytes_and_nothing_elsewhere(tmp_path):
    """In a home of its own, on a terminal without Unicode."""
    home = tmp_path / "home"
    umlauts = TASK.replace("the cat sat", "das Kätzchen saß").replace('"the cat"', '"das"')
    for folder in (tmp_path, home):
        folder.mkdir(exist_ok=True)
        task_file(folder, umlauts)
    script = """if True:
        import json, runpy, socket, sys
        socket.socket.connect = socket.getaddrinfo = None
        root, commands = sys.argv[1], json.loads(sys.argv[2])
        sys.path.insert(0, root)
        for module, *sys.argv in commands:
            try:
                runpy.run_path(f"{root}/{module}.py", run_name="__main__")
            except SystemExit as e:
                assert not e.code, sys.argv
    """
    task = ["--task", "mine.py"]
    commands = [["train", "train.py", *TINY, *SMALL, *task, "--algo", algo, "--seed", "3", "--name", algo]
                for algo in train.ALGOS]
    commands += [["train", "train.py", "--resume", "runs/trpo", *task, "--iterations", "3"],
                 ["train", "train.py", "--eval", "runs/trpo", *task],
                 ["rollout", "rollout.py", "runs/trpo", "--prompt", "das"]]
    folders = dict.fromkeys(["HOME", "TMPDIR", "XDG_CACHE_HOME"], str(home))
    environment = {**os.environ, **folders, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", script, ROOT, json.dumps(commands)], cwd=home,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    kept, = (home / "runs" / "pretrained").iterdir()
    written = {home / "runs" / algo / file for algo in train.ALGOS for file in FILES}
    written.add(home / "runs" / "trpo" / "samples-3.jsonl")
    assert {*contents(home)} == {home / "mine.py", kept, *written}
    for algo in train.ALGOS:
        there = rows(home / "runs" / algo)[:2]  # one of the runs was resumed
        for seed in (3, 4):
            assert go(tmp_path, "--algo", algo, "--seed", seed) is None
            assert (rows(tmp_path / f"mine-{algo}-{seed}") == there) == (seed == 3)


def test_random_numbers_are_others_for_each_purpose_seed_and_iteration():
    generators = [generator for seed in (0, 1) for iteration in (1, 2)
                  for generator in train.random_generators(seed, iteration, "cpu").values()]
    draws = {torch.rand(1, generator=generator).item() for generator in generators}
    assert len(draws) == len(generators) == 2 * 2 * 3


@pytest.mark.parametrize("task", train.TASKS)
def test_every_built_in_task_runs(tmp_path, task, capsys):
    options = [*TINY, "--pretrain-steps", "5", "--vocab-size", "270", "--eval-episodes", "4",
               "--comparisons", "400", "--reward-steps", "12"]
    context = ["--block-size", "80"] if task != "addition" else []
    prompts = ["--max-new-tokens", "8"]
    assert train.main([*options, *context, *prompts, "--task", task, "--out", str(tmp_path)]) is None
    assert read(tmp_path / f"{task}-trpo-0" / "result.json")["pretraining"]["bits_per_byte"] < 8
    assert "a vocabulary of 270 tokens (--vocab-size 270)" in capsys.readouterr().out


@pytest.mark.parametrize("algo", train.ALGOS)
def test_training_raises_the_reward(out, algo):
    task_file(out, """
animals = ["cat", "dog", "cow"]
corpus = [f"{a} {b} {c}." for a in ("the", "a") for b in animals for c in ("sat", "ran", "hid")] * 9
prompts, heldout = ["the"], ["a"]

def reward(prompt, completion):
    return completion.startswith(" dog")
""", "dogs.py")
    options = "--pretrain-steps 150 --iterations 20 --batch-size 64 --eval-episodes 200 --lr 3e-3"
    assert go(out, "--task", out / "dogs.py", *options.split(), "--algo", algo) is None
    rewards = [float(row["reward"]) for row in rows(out / f"dogs-{algo}-0")]
    assert fmean(rewards[-5:]) > rewards[0] + 0.2  # standard errors are at most 0.03 and 0.06


@pytest.mark.parametrize("algo", train.ALGOS)
def test_the_unit_of_the_reward_changes_nothing(out, algo):
    """Reward and β times 100: the same metrics, those in the unit of the reward times 100."""
    task_file(out, TASK.replace("/ 10", "* 10"), "hundredfold.py")
    tables = []
    for file, beta in (("mine.py", 0.1), ("hundredfold.py", 10)):
        # Adam makes steps of rounding errors: a small rate for the critic keeps them small.
        options = ["--algo", algo, "--iterations", 3, "--kl-coef", beta, "--name", f"unit-{algo}-{beta}",
                   "--critic-lr", 1e-3]
        assert go(out, *options, "--task", out / file) is None
        tables.append(rows(out / f"unit-{algo}-{beta}"))
    for one, other in zip(*tables):
        for name in ("reward", "reward_std", "objective", "advantage_std"):
            assert float(other.pop(name)) == pytest.approx(100 * float(one.pop(name)), rel=1e-3)
        one.pop("cg_relative_residual", None)  # what ten products leave is rounding here
        for name, value in one.items():
            assert float(other[name]) == pytest.approx(float(value), rel=1e-3, abs=1e-4), name


def test_evaluations_while_training_leave_their_figures_and_completions(out, capsys):
    assert go(out, "--name", "seen", "--iterations", 5, "--eval-every", 2, "--save-every", 3) is None
    result, run = read(out / "seen" / "result.json"), out / "seen"
    assert re.findall("after [0-9]+$", capsys.readouterr().out, re.M)  == ["after 2", "after 4"]

    def evaluations():
        """{iteration: results}, {iteration: completions}, of eval.csv and samples-ITERATION.jsonl."""
        header, *lines = [line.split(",") for line in (run / "eval.csv").read_text().splitlines()]
        table = {int(line[0]): dict(zip(header[1:], map(float, line[1:]))) for line in lines}
        samples = {int(path.stem.removeprefix("samples-")): [*map(json.loads, path.read_text().splitlines())]
                   for path in run.glob("samples-*.jsonl")}
        return table, samples

    results, samples = evaluations()
    assert [*results] == sorted(samples) == [0, 2, 4, 5]
    for i, name in (0, "before"), (5, "after"):
        expected = {key: math.nan if value is None else value for key, value in result[name].items()}
        assert results[i] == pytest.approx(expected, rel=1e-4, nan_ok=True)
    for i in results:
        assert len(samples[i]) == 16 and {*samples[i][0]} == {"prompt", "completion", "reward", "metric"}
        assert results[i]["reward"] == pytest.approx(fmean(s["reward"] for s in samples[i]), rel=1e-4)
        assert all(s["reward"] == len(s["completion"]) / 10 for s in samples[i])


@pytest.mark.parametrize("rows, warning", [
    ([{"ended": 0.9}, {"ended": 0.5}], None), ([{"ended": 0.9}, {"ended": 0.4}], "fewer than half as many"),
    ([{"ended": 1, "explained_variance": -1}] * 8, None),
    ([{"ended": 1, "explained_variance": -1}] * 20, "worse than a constant"),
    ([{"ended": 1, "explained_variance": x} for x in [-9] * 10 + [-0.5] * 5 + [1] * 10], None),
    ([{"ended": 1, "uniform_groups": 0.5}], None),
    ([{"ended": 1, "uniform_groups": 0.6}], "all scores are equal"),
    ([{"ended": 1, "uniform_groups": 0.3, "grad_norm": 0}], "the gradient is zero"),
    ([{"ended": 1, "uniform_groups": 0.9, "explained_variance": 0.1}], None),
    ([{"ended": 1, "uniform_groups": 1, "explained_variance": 0.1}], "all scores are equal")])
def test_warnings_are_printed_once(rows, warning, capsys):
    common, warned = dict(reward=0.0, kl=0.0, entropy=1.0, seconds=1.0), set()
    rows = [{**common, **row} for row in rows]
    for n in range(1, len(rows) + 1):
        assert "warning" not in capsys.readouterr().out
        train.print_iteration(rows[:n], 20, warned)
    for row in rows[-1:] * 2:
        rows.append(row)
        train.print_iteration(rows, 20, warned)
    printed = re.findall("^warning: (.*)$", capsys.readouterr().out, re.M)
    assert [warning in line for line in printed] == [True] * (warning is not None)


def test_an_evaluation_before_rl_is_one_after_no_iterations(out):
    assert go(out, "--name", "none", "--iterations", 0, "--eval-episodes", 200) is None
    result = json.loads((out / "none" / "result.json").read_text())
    assert result["before"] == result["after"] and result["after"]["kl"] == 0


def test_an_estimator_of_ones_own_has_a_critic(out, monkeypatch):
    monkeypatch.setitem(train.ADVANTAGES, "mine", lambda rewards, *rest: (rewards, rewards))
    assert go(out, "--advantage", "mine", "--name", "mine", "--iterations", 1) is None
    assert "explained_variance" in rows(out / "mine")[0]


def test_advantages_that_are_not_finite_are_named(out, monkeypatch, capsys):
    monkeypatch.setitem(train.ADVANTAGES, "mine", lambda rewards, *rest: (rewards / 0, rewards))
    assert go(out, "--advantage", "mine", "--name", "nan", "--iterations", 1) == 3
    assert "the mean of the advantages is " in capsys.readouterr().err


def test_an_algorithm_cannot_replace_a_column(out, monkeypatch):
    monkeypatch.setitem(train.ALGOS, "mine", lambda *args: {"mine": 9.0})
    assert go(out, "--algo", "mine", "--name", "columns", "--iterations", 1) is None
    assert rows(out / "columns")[0]["mine"] == "9"
    for column in ("kl", "iteration", "critic_loss", "seconds"):
        monkeypatch.setitem(train.ALGOS, "mine", lambda *args: {column: 9.0})
        with pytest.raises(TypeError, match=column):
            go(out, "--algo", "mine", "--name", column, "--iterations", 1)


def test_an_existing_run_is_replaced_only_on_request(out, capsys):
    assert go(out, "--name", "kept", "--iterations", 1) is None
    (out / "kept" / "notes.txt").write_text("mine")
    before = contents(out)
    assert go(out, "--name", "kept") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert go(out, "--name", "kept", "--overwrite", "--max-new-tokens", 23) == 2  # too long for some prompts
    assert contents(out) == before
    assert go(out, "--name", "kept", "--overwrite") is None
    assert len(rows(out / "kept")) == 2
    assert (out / "kept" / "notes.txt").read_text() == "mine"  # only files of a run are removed


# What decides a run: defaults, seeds, pretraining, initial weights.

@pytest.mark.parametrize("options, expected", [
    ("", dict(task="reviews", algo="trpo", iterations=40, vocab_size=620, max_new_tokens=44, whiten=1)),
    ("--algo reinforce", dict(iterations=40, lr=3e-3, name="reviews-reinforce-0")),
    ("--algo reinforce --iterations 7 --seed 4", dict(iterations=7, name="reviews-reinforce-4")),
    ("--algo ppo --advantage rloo", dict(lr=1e-3, whiten=0, name="reviews-ppo-rloo-0")),
    ("--advantage grpo --whiten 1 --name mine", dict(whiten=1, name="mine")),
    ("--task addition --algo ppo", dict(lr=1e-4, group_size=1, damping=1.0)),  # the task's lr wins
    ("--task addition --algo reinforce", dict(iterations=150, block_size=16)),
    ("--task hello --max-new-tokens 9", dict(max_new_tokens=9, block_size=48)),
])
def test_defaults_depend_on_the_task_and_the_algorithm(options, expected):
    config, _ = train.parse(options.split())
    assert {name: getattr(config, name) for name in expected} == expected


def test_pretrained_weights_are_kept_for_exactly_what_decides_them(tmp_path, monkeypatch, gpt2_vocabulary):
    monkeypatch.setattr(train, "maximize_likelihood", lambda *args: None)
    monkeypatch.setattr(train, "evaluate", stop)
    task_file(tmp_path)

    def kept(*options):
        assert go(tmp_path, *options) == 2
        return len(list((tmp_path / "pretrained").iterdir()))

    decisive = dict(pretrain_seed=1, vocab_size=260, block_size=25, n_layer=2, n_head=1, n_embd=32,
                    pretrain_steps=9, pretrain_batch=9, pretrain_lr=0.1, tokenizer="gpt2")
    others = dict(algo="ppo", advantage="returns", name="other", seed=1, device="cpu", threads=1,
                  iterations=1, batch_size=32, group_size=8, max_new_tokens=10, temperature=0.5, kl_coef=1,
                  gamma=0.9, lam=0.9, whiten=0, lr=1, max_grad_norm=2, epochs=1, minibatches=1, clip=0.1,
                  target_kl=1, delta=1, cg_iters=1, damping=1, fisher_fraction=1, critic_lr=1,
                  critic_epochs=1, eval_episodes=2, eval_every=1, save_every=1, micro_batch=99,
                  comparisons=99, reward_steps=1, reward_lr=1)
    elsewhere = {"task", "init", "out", "overwrite"}  # below, or without a value
    assert {*decisive, *others, *elsewhere} == {*asdict(train.Config())}
    files = kept()
    for name, value in others.items():
        assert kept("--" + name.replace("_", "-"), value) == files, name
    for name, value in decisive.items():
        files += 1
        assert kept("--" + name.replace("_", "-"), value) == files, name
    task_file(tmp_path, TASK.replace("len(completion)", "-len(completion)"))
    assert kept() == files  # another reward
    task_file(tmp_path, TASK.replace("the log", "the frog"))
    assert kept() == files + 1  # another corpus


def test_a_run_starts_from_another_runs_weights(out):
    assert go(out, "--name", "source", "--iterations", 1) is None
    source, _, _, _ = load_checkpoint(out / "source")
    cached = contents(out / "pretrained")

    def start(name, init, *options):
        run = ["--task", out / "mine.py", "--out", out, "--name", name, "--init", out / init, *options]
        sizes = "--iterations 0 --max-new-tokens 12 --eval-episodes 16 --threads 1".split()
        assert train.main([*sizes, *map(str, run)]) is None
        policy, _, _, _ = load_checkpoint(out / name)
        return policy, len(contents(out / "pretrained")) - len(cached)

    policy, kept = start("continued", "source")
    assert same_weights(policy, source) and kept == 0
    assert read(out / "continued" / "config.json")["n_embd"] == 16
    further, kept = start("further", "source/checkpoint.pt", "--pretrain-steps", 3)
    assert not same_weights(further, source) and kept == 1
    again, kept = start("again", "source", "--pretrain-steps", 3)
    assert same_weights(again, further) and kept == 1  # found among the pretrained weights
    _, kept = start("other", "further", "--pretrain-steps", 3)
    assert kept == 2  # other initial weights


def test_large_weights_have_defaults_of_their_own(tmp_path):
    """Ten million weights or more. Options that are given win, also over these."""
    tokenizer = Tokenizer.learn([], 257)
    save_checkpoint(tmp_path / "large.pt", GPT(GPTConfig(257, 64, 1, 2, 1024)), tokenizer)
    save_checkpoint(tmp_path / "small.pt", GPT(GPTConfig(257, 64, 1, 2, 16)), tokenizer)
    large, _ = train.parse(["--init", str(tmp_path / "large.pt"), "--algo", "ppo", "--critic-lr", "0.5"])
    assert (large.batch_size, large.lr, large.critic_lr, large.pretrain_steps) == (64, 1e-5, 0.5, 0)
    addition, _ = train.parse(f"--task addition --init {tmp_path / 'large.pt'} --pretrain-steps 9".split())
    assert (addition.lr, addition.max_new_tokens, addition.pretrain_steps) == (1e-5, 4, 9)
    assert (large.n_embd, large.n_layer, large.vocab_size, large.tokenizer) == (1024, 1, 257, "bpe")
    small, _ = train.parse(["--init", str(tmp_path / "small.pt"), "--algo", "ppo"])
    assert (small.batch_size, small.lr, small.n_embd, small.pretrain_steps) == (256, 1e-3, 16, 0)


def test_the_loop_measures_the_kl_of_an_update_on_the_first_64_episodes(tmp_path, monkeypatch):
    """By hand: KL(π_old‖π) = Σ π_old log(π_old / π), its mean over the actions of those episodes."""
    measured = []

    def step(policy, batch, optimizer, config, generator):
        old = copy.deepcopy(policy)
        train.reinforce(policy, batch, optimizer, config, generator)
        with torch.no_grad():
            p, q = ((model(batch.obs[:64]) / config.temperature).softmax(-1) for model in (old, policy))
        kl = (p * (p / q).log()).sum(-1)
        measured.append(kl[batch.mask[:64]].mean().item())
        return {}

    monkeypatch.setitem(train.ALGOS, "step", step)
    task_file(tmp_path)
    assert go(tmp_path, "--algo", "step", "--batch-size", 128, "--temperature", 0.8) is None
    logged = [float(row["kl_update"]) for row in rows(tmp_path / "mine-step-0")]
    assert logged == pytest.approx(measured, rel=1e-3) and min(logged) > 0


# Pretraining.

def test_a_long_text_continues_in_the_next_row():
    texts = [[1, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4], [5], [1, 2, 3, 4, 5]]
    assert train.to_rows(texts, 3).tolist() == [[1, 2, 3, -100], [1, 2, 3, 4], [4, 5, 6, 7], [7, 8, 9, -100],
                                                [1, 2, 3, 4], [1, 2, 3, 4], [4, 5, -100, -100]]
    assert train.to_rows([[5]], 3).numel() == 0


@torch.no_grad()
def test_nll_and_bits_per_byte_are_sums_over_predicted_tokens():
    tokenizer = Tokenizer.learn(["the plot was the plot "] * 9, 263)
    policy = GPT(GPTConfig(tokenizer.vocab_size, 8, 1, 2, 16), torch.Generator().manual_seed(1))
    texts = [tokenizer.encode(text) + [tokenizer.eos_token] for text in ("the plot", "was 中", "a")]
    nats = []
    size = len(texts)  # an end of text counts as a byte
    for text in texts:
        logp = policy(torch.tensor([text]))[0].log_softmax(-1)
        nats += [-logp[t, token].item() for t, token in enumerate(text[1:])]
        size += sum(len(tokenizer.encoding.decode_single_token_bytes(token)) for token in text[1:-1])
    table = train.to_rows(texts, 8)
    batch = train.as_batch(table, "cpu")
    assert train.nll(policy, batch)[batch.mask].tolist() == pytest.approx(nats, rel=1e-5)
    bits = sum(nats) / math.log(2)
    for size_of_a_part in (1, 5, 100):
        config = SimpleNamespace(micro_batch=size_of_a_part)
        assert train.bits_per_byte(policy, table, tokenizer, config) == pytest.approx(bits / size, rel=1e-5)


def test_maximum_likelihood_reaches_the_entropy_of_the_texts():
    """Of four equally likely texts: log 4 nats."""
    texts = torch.tensor([[0, 1, 2, 3], [0, 1, 3, 2], [0, 2, 1, 3], [0, 3, 2, 1]] * 16)
    policy = GPT(GPTConfig(4, 8, 1, 2, 16), torch.Generator().manual_seed(0))
    config = SimpleNamespace(pretrain_steps=200, pretrain_batch=16, pretrain_lr=1e-2,
                             micro_batch=1024)
    train.maximize_likelihood(policy, texts, config, torch.Generator().manual_seed(0))
    after = train.nll(policy, train.as_batch(texts, "cpu")).sum().item() / len(texts)
    assert math.log(4) <= after < 1.05 * math.log(4)


def test_every_token_weighs_the_same_in_pretraining_however_long_its_text(monkeypatch):
    """Of texts of 3 and of 9 tokens, in batches of one length each. Were the loss of each token 1, that of a
    batch would be its number of tokens, relative to the mean over its pool of eight batches."""
    losses, rows = [], torch.full((64, 10), -100)
    for i, row in enumerate(rows):
        row[:4 if i % 2 else 10] = i % 2

    class Scalar(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.tensor(1.0))

    def gradient(policy, loss, batch, config, max_grad_norm):
        means = mean_gradient(policy, loss, batch, config, max_grad_norm)
        losses.append(means["loss"])
        return means

    monkeypatch.setattr(train, "mean_gradient", gradient)
    monkeypatch.setattr(train, "nll", lambda policy, texts: 1 + 0 * policy.w.expand(texts.mask.shape))
    config = SimpleNamespace(pretrain_steps=80, pretrain_batch=8, pretrain_lr=1e-2,
                             micro_batch=1024)
    train.maximize_likelihood(Scalar(), rows, config, torch.Generator().manual_seed(0))
    losses = torch.tensor(losses).view(10, 8)
    torch.testing.assert_close(losses.mean(1), torch.ones(10))
    torch.testing.assert_close(losses.amax(1) / losses.amin(1), torch.full((10,), 9 / 3))


def test_the_loss_that_pretraining_prints_is_that_of_a_token(capsys):
    rows = torch.tensor([[0, 1, 1, 1, 1], [0, 2, -100, -100, -100]] * 50)
    policy = GPT(GPTConfig(3, 8, 1, 1, 8), torch.Generator().manual_seed(0))
    config = SimpleNamespace(pretrain_steps=100, pretrain_batch=8, pretrain_lr=0.0,
                             micro_batch=1024)
    train.maximize_likelihood(policy, rows, config, torch.Generator().manual_seed(0))
    printed = float(re.search(r"loss (\S+) nats per token", capsys.readouterr().out)[1])
    texts = train.as_batch(rows, "cpu")
    assert printed == pytest.approx(train.nll(policy, texts)[texts.mask].mean().item(), abs=2e-3)


@pytest.mark.parametrize("different, held_out", [(250, {3}), (100, {2, 3})])  # or 2 to 3 copies of each
def test_one_percent_of_the_texts_is_held_out_with_all_copies(tmp_path, monkeypatch, different, held_out):
    learned, held = [], []
    monkeypatch.setattr(train, "maximize_likelihood", lambda policy, rows, *_: learned.extend(rows.tolist()))
    monkeypatch.setattr(train, "bits_per_byte", lambda policy, rows, *_: held.extend(rows.tolist()) or 1)
    monkeypatch.setattr(train, "evaluate", stop)
    task_file(tmp_path, TASK + f"corpus = [f'the cat {{i % {different}:03d}}' for i in range(250)]")
    assert go(tmp_path, "--vocab-size", 257) == 2
    texts = lambda rows: {tuple(row) for row in rows}
    assert len(held) in held_out and len(learned) + len(held) == 250
    assert len(texts(held)) == math.ceil(different / 100) and len(texts(learned + held)) == different
    assert not texts(learned) & texts(held)


# Episodes and evaluation, each number computed again from full forward passes.

def explain(model, obs):
    """log π(·|s) at temperature 0.7."""
    return (model(obs) / 0.7).log_softmax(-1).detach()


@pytest.fixture
def world():
    """Random networks over bytes, of which some completions end, a task and a config."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = (GPT(GPTConfig(257, 16, 1, 2, 16), generator) for _ in range(2))
    critic = Critic(policy.config, policy)
    for p in [*policy.parameters(), *reference.parameters(), *critic.parameters()]:
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    for model in (policy, reference):
        end = model.transformer.wte.weight.data[256]
        end *= 4
        model.transformer.ln_f.bias.data += 2 * end / (end @ end)  # a higher logit for the end of text
    task = reward.Task([], ["a", "bcd", "ef"], ["a", "g", "hij", "kl"],
                       lambda prompt, completion: len(completion.encode()) + len(prompt) / 4,
                       lambda prompt, completion: len(completion))
    config = SimpleNamespace(batch_size=32, group_size=2, max_new_tokens=6, temperature=0.7, kl_coef=0.3,
                             gamma=0.9, lam=0.8, whiten=0, advantage="gae", eval_episodes=50,
                             critic_epochs=1, minibatches=1, max_grad_norm=1.0, micro_batch=40)
    return task, policy, reference, critic, Tokenizer.learn([], 257), config


def test_actions_are_sampled_from_the_policy_that_is_trained(world):
    """The mean of log π(a|s) is minus the entropy if a ~ π, but not at another temperature or with top-p."""
    task, policy, reference, _, tokenizer, config = world
    config.batch_size, config.micro_batch = 8192, 10 ** 6
    generators = {name: torch.Generator().manual_seed(7) for name in ("prompts", "sample")}
    batch, _, _ = train.scored_episodes(task, policy, reference, tokenizer, config, generators)
    surprise = (batch.logprobs + batch.entropy)[batch.mask]  # of 28,000 actions
    assert abs(surprise.mean()) < 4 * surprise.std() / len(surprise) ** 0.5 < 0.05


@pytest.mark.parametrize("advantage, whiten", [("gae", 0), ("gae", 1), ("rloo", 0)])
def test_collect_aligns_every_number_with_its_action(world, advantage, whiten):
    task, policy, reference, critic, tokenizer, config = world
    config.advantage, config.whiten = advantage, whiten
    critic, seen = critic if advantage == "gae" else None, []
    judged = replace(task, reward=lambda prompt, text: seen.append(text) or task.reward(prompt, text))
    generators = {name: torch.Generator().manual_seed(7) for name in ("prompts", "sample")}
    batch, stats = train.collect(judged, policy, reference, critic, tokenizer, config, generators)

    logp, ref = explain(policy, batch.obs), explain(reference, batch.obs)
    values = critic(batch.obs).detach() if critic else torch.zeros(batch.mask.shape)
    assert torch.equal(batch.obs[:, 1:], batch.actions[:, :-1])  # an action is the next observation
    scores, kls, entropies, ends, advantages, targets, returns, prompts = [], [], [], [], [], [], [], []
    for b, mask in enumerate(batch.mask):
        steps = mask.nonzero().squeeze(1).tolist()
        actions = batch.actions[b, mask].tolist()
        completion = tokenizer.decode(actions)
        prompts.append(tokenizer.decode(batch.obs[b, :steps[0] + 1].tolist()))
        ends.append(actions[-1] == tokenizer.eos_token)
        scores.append(task.reward(prompts[-1], completion))
        assert steps == list(range(steps[0], steps[-1] + 1))
        assert ends[-1] or len(steps) == 6
        assert (seen[b], seen[b].length, seen[b].ended) == (completion, len(steps), ends[-1])
        assert seen[b].mean_ref_logprob == pytest.approx(ref[b, steps, actions].mean().item(), abs=1e-4)
        p, q = logp[b, steps], ref[b, steps]  # (n, V)
        taken = (range(len(steps)), actions)
        torch.testing.assert_close(batch.logprobs[b, mask], p[taken], rtol=0, atol=1e-4)
        kls += (p.exp() * (p - q)).sum(-1).tolist()
        entropies += (-p.exp() * p).sum(-1).tolist()

        rewards = (-0.3 * (p[taken] - q[taken])).tolist()
        rewards[-1] += scores[-1]
        n, v = len(steps), [*values[b, mask].tolist(), 0.0]
        returns.append([sum(0.9 ** (k - i) * rewards[k] for k in range(i, n)) for i in range(n)])
        if advantage == "gae":
            delta = [rewards[i] + 0.9 * v[i + 1] - v[i] for i in range(n)]
            advantages.append([sum(0.72 ** k * delta[i + k] for k in range(n - i)) for i in range(n)])
            targets.append([a + x for a, x in zip(advantages[-1], v)])
        else:
            advantages.append([sum(rewards)] * n)
            targets.append(advantages[-1])
    if advantage == "rloo":  # rows 2i and 2i+1 share a prompt: each is the other's baseline
        assert prompts[::2] == prompts[1::2]
        totals = [row[0] for row in advantages]
        advantages = [[totals[b] - totals[b ^ 1]] * len(row) for b, row in enumerate(advantages)]
    expected, targets = torch.tensor(sum(advantages, [])), torch.tensor(sum(targets, []))
    advantage_std = expected.std(unbiased=False).item()
    if whiten:
        expected = (expected - expected.mean()) / expected.std(unbiased=False)
    torch.testing.assert_close(batch.advantages[batch.mask], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch.targets[batch.mask], targets, rtol=1e-3, atol=1e-3)
    returns = torch.tensor(sum(returns, []))
    torch.testing.assert_close(batch.returns[batch.mask], returns, rtol=1e-3, atol=1e-3)

    assert 0 < sum(ends) < 32 and set(prompts) == {*task.prompts}  # each case occurred
    means = {"reward": fmean(scores), "kl": fmean(kls), "entropy": fmean(entropies), "ended": fmean(ends),
             "length": len(kls) / 32, "reward_std": torch.tensor(scores).std(unbiased=False).item(),
             "advantage_std": advantage_std, "objective": fmean(scores) - 0.3 * sum(kls) / 32}
    means["uniform_groups"] = fmean(scores[b] == scores[b + 1] for b in range(0, 32, 2))
    assert means["uniform_groups"] < 1
    if advantage != "rloo":
        still = torch.optim.SGD(critic.parameters(), 0.0)
        errors = returns - values[batch.mask]
        stats |= {"explained_variance": fit_critic(critic, batch, still, config)["explained_variance"]}
        means["explained_variance"] = 1 - errors.var().item() / returns.var().item()
    assert stats == pytest.approx(means, rel=1e-3)
    assert batch.scores.tolist() == scores
    until_end = batch.mask.flip(1).cumsum(1).flip(1) > 0  # prompts included
    torch.testing.assert_close(batch.values[until_end], values[until_end])
    ref_logprobs = action_log_probs(ref, batch.actions)
    torch.testing.assert_close(batch.ref_logprobs, ref_logprobs.masked_fill(~batch.mask, 0), rtol=0,
                               atol=1e-4)


def test_evaluate_reports_means_over_held_out_prompts(world):
    task, policy, reference, _, tokenizer, config = world
    asked = []
    task = replace(task, metric=lambda prompt, text: asked.append((prompt, text)) or len(text))
    results, samples = train.evaluate(task, policy, reference, tokenizer, config)
    greedy, pairs = asked[50:], [(sample["prompt"], sample["completion"]) for sample in samples]
    assert pairs == asked[:50]
    assert [sample["reward"] for sample in samples] == [task.reward(*pair) for pair in pairs]
    assert [sample["metric"] for sample in samples] == [len(completion) for _, completion in pairs]
    assert [prompt for prompt, _ in pairs] == (task.heldout * 13)[:50]
    assert [prompt for prompt, _ in greedy] == task.heldout
    for prompt, completion in greedy:
        tokens = tokenizer.encode(prompt)
        while len(tokens) < len(prompt) + 6 and tokens[-1] != 256:
            tokens.append(policy(torch.tensor([tokens]))[0, -1].argmax().item())
        assert completion == tokenizer.decode(tokens[len(prompt):])

    kls, entropies, lengths, generator = [], [], [], torch.Generator().manual_seed(12345)
    for part in (pairs[:32], pairs[32:]):  # in batches of batch_size
        r = sample(policy, [tokenizer.encode(prompt) for prompt, _ in part], 6, 256, 0.7, generator)
        assert completion_texts(r, tokenizer) == [completion for _, completion in part]
        logp, ref = (explain(model, r.obs)[r.mask] for model in (policy, reference))
        lengths += r.mask.sum(1).tolist()
        kls += (logp.exp() * (logp - ref)).sum(-1).tolist()
        entropies += (-logp.exp() * logp).sum(-1).tolist()
    texts = [completion for _, completion in pairs]
    rewards = torch.tensor([task.reward(*pair) for pair in pairs], dtype=torch.float64)

    def interval(values):  # of four prompts, because completions of one prompt are alike
        return 3.182 * stdev(fmean(values[i::4]) for i in range(4)) / 4 ** 0.5

    steps = iter(kls)
    kl_less_mean = [sum(islice(steps, n)) - fmean(kls) * n for n in lengths]
    assert 0 < results["ended"] < 1
    expected = {
        "reward": rewards.mean().item(), "reward_ci": interval(rewards.tolist()),
        "metric": fmean(map(len, texts)), "metric_ci": interval([*map(len, texts)]),
        "kl_ci": interval(kl_less_mean) / fmean(lengths),
        "objective": rewards.mean().item() - config.kl_coef * sum(kls) / 50,
        "greedy": fmean(len(text) for _, text in greedy),
        "kl": fmean(kls), "entropy": fmean(entropies), "length": fmean(lengths),
        "ended": fmean(text.ended for text in texts),
        "distinct_1": reward.distinct_n(texts, 1), "distinct_2": reward.distinct_n(texts, 2)}
    assert results == pytest.approx(expected, rel=1e-3, nan_ok=True)
    again, same = train.evaluate(task, policy, reference, tokenizer, config)
    assert (again, same) == (pytest.approx(results, rel=0, abs=0, nan_ok=True), samples)


def test_an_interval_is_printed_beside_its_figure(world, capsys):
    task, policy, reference, _, tokenizer, config = world
    results, _ = train.evaluate(task, policy, reference, tokenizer, config)
    train.print_results(task, {"after": results})
    printed = capsys.readouterr().out
    for label, name in [("reward", "reward"), ("KL to the reference, nats", "kl")]:
        assert re.search(rf"^{label} +{results[name]:.3f} ± {results[name + '_ci']:.3f}$", printed, re.M)


def test_the_interval_does_not_shrink_where_completions_of_a_prompt_are_the_same(world):
    """4 prompts whose rewards depend on nothing but the prompt: 10,000 completions say no more than 4."""
    task, policy, reference, _, tokenizer, config = world
    task = replace(task, reward=lambda prompt, text: "aghk".index(prompt[0]))
    for config.eval_episodes in (4, 400):
        results, _ = train.evaluate(task, policy, reference, tokenizer, config)
        assert results["reward_ci"] == pytest.approx(3.182 * math.sqrt(5 / 3) / 2)
    results, _ = train.evaluate(replace(task, heldout=["a"]), policy, reference, tokenizer, config)
    assert math.isnan(results["reward_ci"])


def test_eval_repeats_the_figures_of_a_run_and_changes_nothing(out, capsys):
    assert go(out, "--name", "judged") is None
    results = read(out / "judged" / "result.json")["after"]
    after = [math.nan if value is None else value
             for name, value in results.items() if not name.endswith("_ci") and name != "metric"]
    assert results["metric"] == results["reward"]  # the task has no metric, and no second row
    before = contents(out)
    number = r"(nan|-?\d+\.\d+)(?: ± (\S+))?"
    printed = re.findall(rf"^(\S.*?) +{number} +{number}$", capsys.readouterr().out, re.M)
    table = [(label, value) for label, _, _, value, _ in printed]
    intervals = {label: float(ci) for label, *_, ci in printed if ci}
    assert results["kl_ci"] is None and not intervals  # one held-out prompt
    assert [float(value) for _, value in table] == pytest.approx(after, abs=6e-4, nan_ok=True)

    def evaluated(*options):
        """The [(label, number)] that --eval prints."""
        assert train.main(["--eval", str(out / "judged"), "--task", str(out / "mine.py"), *options]) is None
        found = re.findall(rf"^(\S.*?) +{number}$", capsys.readouterr().out, re.M)
        return [(label, value) for label, value, _ in found]

    assert evaluated() == table
    label = "entropy, nats"
    assert float(dict(evaluated("--temperature", "0.01"))[label]) < float(dict(table)[label])
    assert contents(out) == before


# Custom tasks.

def test_a_task_file_brings_its_corpus_reward_and_metric(tmp_path, monkeypatch, capsys):
    more = "def reward(p, c): return -5\ndef politeness(p, c): return 7\nmetric = politeness"
    task_file(tmp_path, TASK + more)
    monkeypatch.chdir(tmp_path)
    assert train.main([*TINY, "--block-size", "24", "--max-new-tokens", "12", "--task", "mine.py"]) is None
    run = tmp_path / "runs" / "mine-trpo-0"
    table = capsys.readouterr().out.partition("on held-out prompts")[2]
    for label, value in [("reward", "-5.000"), ("politeness", "7.000"), ("politeness, greedy", "7.000")]:
        assert re.search(rf"^{label} +{value} +{value}$", table, re.M)
    assert read(run / "result.json")["metric"] == "politeness"
    assert read(run / "config.json")["task"] == str(tmp_path / "mine.py")  # to be found from any directory


def test_a_file_is_not_executed_because_a_run_names_it(tmp_path, capsys):
    file = task_file(tmp_path)
    assert go(tmp_path, "--name", "run") is None
    file.write_text("raise SystemExit(7)")
    for action in ("--eval", "--resume"):
        with pytest.raises(SystemExit) as e:
            train.main([action, str(tmp_path / "run")])
        assert e.value.code == 2
        assert f"--task {file}" in capsys.readouterr().err


@pytest.mark.parametrize("fault", ["[][completion]", "return 1e999"])
def test_a_run_survives_a_reward_that_fails_or_is_not_finite(tmp_path, capsys, fault):
    """In the third iteration: two iterations make 32 calls. An evaluation of 16 completions, which asks for
    reward and metric, and of a greedy one makes 33."""
    source = TASK.replace("def reward", "calls = []\n\ndef honest") + f"""
def reward(prompt, completion):
    calls.append(prompt)
    if len(calls) == 33 + 32 + 3:
        {fault}
    return honest(prompt, completion)
"""
    file, run = task_file(tmp_path, source), tmp_path / "broken"
    command = ("--iterations", 4, "--save-every", 2, "--name")
    if fault == "return 1e999":
        assert go(tmp_path, *command, "broken") == 3
        says = "error: reward returned inf for the prompt 'the (cat|dog)' and .*\n"
        assert re.fullmatch(says, capsys.readouterr().err)
    else:
        with pytest.raises(TypeError) as e:
            go(tmp_path, *command, "broken")
        text = "".join(traceback.format_exception(e.value))
        text += capsys.readouterr().err  # where Python 3.10, which has no notes, prints it
        assert f'File "{file}"' in text and "list indices" in text
        assert re.search("^it came with the prompt 'the (cat|dog)' and the completion '", text, re.M)

    assert len(load_checkpoint(run)[3]["history"]) == 2
    assert not (run / "result.json").exists()
    task_file(tmp_path, source.replace(fault, "pass"))
    assert train.main(["--resume", str(run), "--task", str(file)]) is None
    assert go(tmp_path, *command, "whole") is None
    assert rows(run) == rows(tmp_path / "whole")


@pytest.mark.parametrize("options, value, status, says", [
    (("--pretrain-steps", 1), "float('nan')", 3, "reward returned .*it must return a finite number .*"),
    (("--pretrain-steps", 1), "None", 2, "reward returned .*it must return a number, .*@batched"),
    (("--pretrain-steps", 1), "'good'", 2, "reward returned .*it must return a number, .*@batched"),
    (("--pretrain-lr", 1e9), "1", 3, "the .* is (nan|inf): .*"),
])
def test_what_fails_before_rl_leaves_no_run(tmp_path, capsys, options, value, status, says):
    task_file(tmp_path, TASK.replace("len(completion) / 10", value))
    assert go(tmp_path, *options) == status
    assert re.fullmatch(f"error: {says}\n", capsys.readouterr().err)
    kept = {"pretrained"} if "--pretrain-steps" in options else set()
    assert {path.name for path in tmp_path.iterdir()} == {"mine.py"} | kept


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_a_run_that_diverges_keeps_its_last_checkpoint(out, capsys, algo):
    assert go(out, "--name", f"wild-{algo}", "--algo", algo, "--lr", 1e9) == 3
    err = capsys.readouterr().err
    assert re.fullmatch("error: the .* is (nan|inf|-inf): lower --lr, .*\n", err)
    policy, reference, _, more = load_checkpoint(out / f"wild-{algo}")
    assert more["history"] == [] and same_weights(policy, reference)
