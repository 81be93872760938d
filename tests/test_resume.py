"""A run that was stopped, killed or out of disk space continues bit for bit as if nothing had happened."""

import functools
import importlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time

import pytest

import train
from helpers import SMALL, TINY, forks, rows, task_file
from model import load_checkpoint

# Of twelve iterations; a checkpoint follows every third, an evaluation every fourth.
OPTIONS = [*TINY, *SMALL, "--pretrain-steps", "10", "--iterations", "12", "--save-every", "3",
           "--eval-every", "4"]


def command(out, *options):
    """The options of a run on out/mine.py."""
    return [*OPTIONS, "--task", str(out / "mine.py"), "--out", str(out), *map(str, options)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A directory of runs with the pretrained weights for all of them."""
    out = tmp_path_factory.mktemp("runs")
    task_file(out)
    assert train.main(command(out, "--iterations", 0, "--name", "pretrained-only")) is None
    return out


def resume(run, *options):
    return ["--resume", str(run), "--task", str(run.parent / "mine.py"), *map(str, options)]


def outcome(run):
    """All that a run leaves but times: metrics, evaluations, weights, and the state of both optimizers."""
    policy, reference, _, more = load_checkpoint(run)
    result = json.loads((run / "result.json").read_text())
    states = [policy.state_dict(), reference.state_dict(), more["critic"]]
    states += [state for name in ("optimizer", "critic_optimizer") for state in more[name]["state"].values()]
    tensors = [tensor.tolist() for state in states for tensor in state.values()]
    lines = (run / "eval.csv").read_text().splitlines()[1:]
    evaluations = [line for line in lines if int(line.split(",")[0]) in (0, 4, 8, 12)]
    evaluations += [(run / f"samples-{iteration}.jsonl").read_text() for iteration in (0, 4, 8, 12)]
    return rows(run), tensors, evaluations, result["after"]["reward"], len(more["history"])


@pytest.fixture(scope="module")
def uninterrupted(out):
    """The outcome of a whole run of an algorithm."""
    @functools.cache
    def get(algo):
        assert train.main(command(out, "--algo", algo, "--name", f"{algo}-whole")) is None
        return outcome(out / f"{algo}-whole")
    return get


def main_with_signal(argv, number, function, count, stderr):
    """train.main in a process that sends itself a signal at the count-th call of a function."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a background job would ignore
    module, _, name = function.rpartition(".")
    module, calls = importlib.import_module(module), itertools.count(1)
    original = getattr(module, name)

    def with_signal(*args, **kwargs):
        if next(calls) == count:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    setattr(module, name, with_signal)
    with open(stderr, "w", encoding="utf-8") as sys.stderr:
        sys.exit(train.main(argv))


@pytest.fixture
def interrupt(tmp_path):
    """Runs train.main with a signal at the count-th call of a function. Returns its exit code and stderr."""
    def run(argv, *where):
        process = forks().Process(target=main_with_signal, args=(argv, *where, tmp_path.with_suffix(".txt")))
        process.start()
        process.join()
        return process.exitcode, tmp_path.with_suffix(".txt").read_text(encoding="utf-8")
    return run


@pytest.mark.parametrize("algo, number, function, count", [
    ("reinforce", signal.SIGTERM, "train.scored_episodes", 9),
    ("ppo", signal.SIGKILL, "train.fit_critic", 8),
    ("trpo", signal.SIGKILL, "torch.save", 6),  # while it writes the checkpoint of iteration 9
])
def test_a_killed_run_resumes_to_the_bit(out, interrupt, uninterrupted, algo, number, function, count):
    run = out / f"{algo}-killed"
    argv = command(out, "--algo", algo, "--name", run.name)
    assert interrupt(argv, number, function, count) == (-number, "")
    assert len(load_checkpoint(run)[3]["history"]) == 6
    assert 6 < len(rows(run)) <= 6 + 3  # it repeats at most the interval between checkpoints
    assert train.main(resume(run)) is None
    assert outcome(run) == uninterrupted(algo)


def test_more_iterations_equal_one_longer_run_that_is_finished_only_at_its_end(out, interrupt, uninterrupted):
    run = out / "longer"
    assert train.main(command(out, "--algo", "ppo", "--name", run.name, "--iterations", 5)) is None
    assert (run / "result.json").exists()
    interrupt(resume(run, "--iterations", 12, "--save-every", 2), signal.SIGKILL, "train.scored_episodes", 4)
    assert not (run / "result.json").exists()
    assert train.main(resume(run)) is None  # to the twelve iterations that were asked for
    assert outcome(run) == uninterrupted("ppo")


@pytest.mark.slow
def test_a_run_whose_sizes_leave_remainders_resumes(out, interrupt):
    """60 episodes in groups of 3, 7 minibatches of 9 or 8, evaluations and checkpoints out of step."""
    options = "--algo ppo --batch-size 60 --group-size 3 --minibatches 7 --micro-batch 100".split()
    assert train.main(command(out, *options, "--name", "remainders-whole")) is None
    interrupt(command(out, *options, "--name", "remainders"), signal.SIGKILL, "train.scored_episodes", 8)
    assert train.main(resume(out / "remainders")) is None
    assert outcome(out / "remainders") == outcome(out / "remainders-whole")


def test_ctrl_c_names_the_ways_to_continue(out, interrupt, uninterrupted):
    run = out / "interrupted"
    argv = command(out, "--algo", "ppo", "--name", run.name)
    status, err = interrupt(argv, signal.SIGINT, "train.scored_episodes", 8)
    assert status == 130 and f"to go on, {' '.join(resume(run))}\n" in err and err.count("\n") == 2
    assert train.main(resume(run)) is None
    assert outcome(run) == uninterrupted("ppo")


def test_after_ctrl_c_before_a_run_is_replaced_the_same_command_continues(out, interrupt):
    """Its old checkpoint is there, but --resume would continue the old run."""
    argv = command(out, "--iterations", 1, "--name", "replaced")
    assert train.main(argv) is None
    for function, advice in [("train.evaluate", "give the same command again\n"),
                             ("train.scored_episodes", "--resume")]:
        status, err = interrupt([*argv, "--overwrite", "--seed", "1"], signal.SIGINT, function, 1)
        assert status == 130 and f"to go on, {advice}" in err


def test_iterations_after_the_last_checkpoint_that_are_not_repeated_leave_the_table(out, interrupt):
    run = out / "fewer"
    argv = command(out, "--iterations", 5, "--name", run.name)
    interrupt(argv, signal.SIGKILL, "train.scored_episodes", 5)
    assert len(rows(run)) == 4
    assert train.main(resume(run, "--iterations", 3)) is None
    assert len(rows(run)) == 3


def test_after_ctrl_c_in_pretraining_the_same_command_continues(tmp_path, interrupt):
    task_file(tmp_path)
    argv = command(tmp_path, "--iterations", 1)
    status, err = interrupt(argv, signal.SIGINT, "train.maximize_likelihood", 1)
    assert status == 130 and "give the same command again" in err
    assert train.main(argv) is None


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(out, interrupt, uninterrupted):
    run = out / "early"
    argv = command(out, "--algo", "ppo", "--name", run.name)
    interrupt(argv, signal.SIGKILL, "torch.save", 1)
    assert {path.name for path in run.iterdir() if path.suffix != ".part"} == {".lock"}
    with pytest.raises(SystemExit, match="2"):
        train.main(resume(run))
    assert train.main(argv) is None
    assert outcome(run) == uninterrupted("ppo")


def test_a_run_that_was_killed_in_pretraining_starts_again(tmp_path, interrupt):
    task_file(tmp_path)
    argv = command(tmp_path, "--iterations", 1, "--name", "run")
    interrupt(argv, signal.SIGKILL, "train.maximize_likelihood", 1)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    assert train.main(argv) is None
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_run_that_another_process_trains_is_left_alone(out, capsys):
    """Also with --overwrite, by --resume, and before it has a checkpoint."""
    argv = command(out, "--name", "twice")
    barrier = forks().Barrier(2)
    process = forks().Process(target=wait_in_pretraining, args=(argv, barrier))
    process.start()
    barrier.wait()
    for again in (argv, [*argv, "--overwrite"]):
        assert train.main(again) == 2
        says = f"error: {out / 'twice'} is being trained by another process: "
        assert capsys.readouterr().err.startswith(says)
    assert [path.name for path in (out / "twice").iterdir()] == [".lock"]
    barrier.wait()
    process.join()
    assert process.exitcode == 0 and (out / "twice" / "result.json").exists()
    assert train.main([*argv, "--overwrite", "--iterations", "0"]) is None


def wait_in_pretraining(argv, barrier):
    def wait(*args):
        barrier.wait()
        barrier.wait()
        return original(*args)

    original, train.load_or_pretrain = train.load_or_pretrain, wait
    assert train.main(argv) is None


GAUSS = """
import random
import numpy as np
import torch
corpus = [f"the cat {random.random():.2f} {np.random.rand():.2f} {torch.rand(()):.2f}" for _ in range(40)]
prompts, heldout = ["the cat", "the dog"], ["the"]

def reward(prompt, completion):
    return len(completion) / 10 + random.gauss(0, 1) + np.random.randn() + torch.randn(()).item()
"""


def test_global_random_numbers_of_a_task_are_repeated(tmp_path):
    """By another run, and by --resume."""
    task_file(tmp_path, GAUSS)
    argv = command(tmp_path, "--save-every", 2)
    assert train.main([*argv, "--name", "whole", "--iterations", "4"]) is None
    random.random()  # what this process has drawn before must not matter
    assert train.main([*argv, "--name", "cut", "--iterations", "2"]) is None
    assert train.main(resume(tmp_path / "cut", "--iterations", 4)) is None
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    assert len({row["reward"] for row in rows(tmp_path / "whole")}) == 4
    assert len([*(tmp_path / "pretrained").iterdir()]) == 1  # one corpus


@pytest.mark.parametrize("kills", [2, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_survives_kills_at_random_moments(tmp_path, kills):
    rng, task = random.Random(0), ["--task", str(task_file(tmp_path))]
    argv = command(tmp_path, "--algo", "reinforce", "--iterations", 40, "--save-every", 4, "--name", "run")
    whole, run = tmp_path / "whole" / "run", tmp_path / "cut" / "run"

    def start(*argv):
        process = forks().Process(target=train.main, args=([*map(str, argv)],))
        process.start()
        return process

    began = time.monotonic()
    start(*argv, "--out", whole.parent).join()
    seconds = time.monotonic() - began
    done = 0
    while kills or not (run / "result.json").exists():
        if (run / "result.json").exists():  # begin another run, with its pretraining
            shutil.rmtree(run.parent)
            done = 0
        if (run / "checkpoint.pt").exists():
            process = start("--resume", run, *task)
        else:
            process = start(*argv, "--out", run.parent, "--overwrite")
        process.join(rng.uniform(0, seconds / 3) if kills else None)
        if process.is_alive():
            process.kill()
            process.join()
            kills -= 1
        else:
            assert process.exitcode == 0
            assert outcome(run) == outcome(whole)
        if (run / "checkpoint.pt").exists():
            saved = len(load_checkpoint(run)[3]["history"])
            assert done <= saved  # no checkpoint is lost
            done = saved


def test_a_full_disk_ends_a_run_that_resumes(out, uninterrupted, capsys):
    """A limit on the size of files stands for it."""
    run = out / "full"
    assert train.main(command(out, "--algo", "ppo", "--name", run.name, "--iterations", 3)) is None
    before = (run / "checkpoint.pt").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    new = command(out, "--pretrain-steps", 11, "--name", "new")
    for argv, size in [(resume(run, "--iterations", 12), len(before) - 1), (new, len(before) // 8)]:
        capsys.readouterr()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            assert train.main(argv) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert re.fullmatch("error: cannot write .* free some space.*\n", capsys.readouterr().err)
        assert not list(out.rglob(f"*.{os.getpid()}.part"))
    assert (run / "checkpoint.pt").read_bytes() == before
    assert not (out / "new").exists()
    assert train.main(resume(run, "--iterations", 12)) is None
    assert outcome(run) == uninterrupted("ppo")
