"""Input that cannot be used: exit status 2, a last line that names what is wrong, and no file is changed."""

import copy
import io
import json
import math
import re
import shlex
import shutil
import sys

import pytest
import torch

import rollout
import train
from helpers import SMALL, TASK, TINY, Malice, contents, task_file

# Task files, and what the error says of each.
TASKS = {
    "lacks": ("prompts = ['a']", "does not define heldout, reward"),
    "brief": (TASK + "corpus = 'one line'", "two different texts"),
    "wide": (TASK + "heldout = ['the' + ' the' * 30]", "context"),
    # refused before pretraining on this corpus, which would leave a file
    "spaced": (TASK + "corpus = ['the cat sat.', 'the dog ran.'] * 30; heldout = ['the ']", "within a token"),
    "blank": (TASK + "heldout = ['']", "empty"),
    "onesided": (TASK + "preferences = [('the cat', 'sat')]", "(prompt, better, worse)"),
    "tie": (TASK + "preferences = [('the cat', 'sat', 'sat')]", "the same text twice"),
    "few": (TASK + "preferences = [('the cat', 'sat', 'ran')] * 9", "three different prompts"),
    "long": (TASK + "preferences = [('the' + ' the' * 30, 'a', 'b'), "
             "('the cat', 'a', 'b'), ('the dog', 'a', 'b')]",
             "context"),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A directory with a good run, copies of it that are damaged in one place each, and other input.

    What else can be wrong with a checkpoint or a task file: see test_rollout and test_reward.
    """
    zoo = tmp_path_factory.mktemp("zoo")
    options = ["--task", str(task_file(zoo)), "--out", str(zoo), "--name", "good", "--iterations", "1"]
    assert train.main([*TINY, *SMALL, *options]) is None
    good, malice = zoo / "good", Malice(zoo / "executed")
    cached, = (zoo / "pretrained").iterdir()

    def write(path, content):
        """Write bytes, or any other object as torch does."""
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)

    whole = (good / "checkpoint.pt").read_bytes()
    state = torch.load(good / "checkpoint.pt", weights_only=True)
    misshapen = copy.deepcopy(state["critic_optimizer"])
    misshapen["state"][0]["exp_avg"] = torch.zeros(3)
    config = json.loads((good / "config.json").read_text())

    def edited(**values):
        return json.dumps({**config, **values}).encode()

    damages = {
        "checkpoint.pt": {
            "torn": whole[:len(whole) // 2],
            "malice": {**state, "policy": malice}, "spy": {**state, "reward_model": malice},
            "misfit": {**state, "reward_model": {"mean": torch.zeros(())}}, "critic": {**state, "critic": {}},
            "optimizer": {**state, "critic_optimizer": misshapen},
            "temperature": {**state, "config": {**state["config"], "temperature": math.nan}},
            "short": {key: value for key, value in state.items() if key != "optimizer"}},
        "config.json": {
            "torn": b"{", "list": b"[]", "nested": b"[" * 200_000,
            "unknown": edited(no_such_option=1), "type": edited(lr="fast"), "nan": edited(lr=float("nan")),
            "choice": edited(tokenizer="words"), "range": edited(gamma=7.0),
            "long": edited(max_new_tokens=23),
            "estimator": edited(advantage="mine"), "script": edited(algo="awr")}}
    for file, contents_by_name in damages.items():
        for name, content in contents_by_name.items():
            run = shutil.copytree(good, zoo / f"{file.split('.')[0]}-{name}")
            write(run / file, content)

    write(zoo / "cache-torn" / "pretrained" / cached.name, cached.read_bytes()[:1000])
    write(zoo / "cache-malice" / "pretrained" / cached.name, malice)

    for name, (source, _) in TASKS.items():
        task_file(zoo, source, f"{name}.py")
    write(zoo / "file", b"years of work")
    write(zoo / "thesis" / "chapter1.txt", b"years of work")
    return zoo


# Commands and, where it is not a command's first word, what the last line of stderr must hold. Those of a new
# run follow the options of a tiny one on mine.py.
COMMANDS = """
    --unknown 1 ; stray ; --iter 3 => --iter ; --overwrite yes => yes ; --seed -1 ; --lr nan
    --algo dqn => dqn ; --task chess => chess ; --iterations many
    --batch-size 18 => --group-size ; --advantage rloo --group-size 1 => --group-size ; --name a/b
    --name good => --resume good ; --max-new-tokens 64 => context ; --out file/below => file
    --task lacks.py => does not define heldout, reward ; --task spaced.py => within a token
    --explain good --task wide.py => context ; --explain checkpoint-critic --task mine.py => checkpoint-critic
    --eval checkpoint-critic --task mine.py => checkpoint-critic
    --resume config-long --task mine.py --iterations 3 => context
    --init nowhere => nowhere ; --init good --n-layer 2 => --n-layer
    --resume nowhere => nowhere ; --resume good --task mine.py => --iterations ; --resume good => --task
    --resume checkpoint-torn --task mine.py --iterations 3 => checkpoint-torn
    --resume checkpoint-malice --task mine.py --iterations 3 => checkpoint-malice
    --resume config-torn => config-torn
    --eval good --task mine.py --lr 1 => --lr
    --algo ppo,trpo => compare.py
    --init gpt2 => gpt2.py import gpt2
    rollout good --prompt the -n 0 => -n ; rollout nowhere => nowhere
    rollout checkpoint-temperature --prompt the => --temperature ; rollout good --prompt caf\udce9 => UTF-8
    --resume config-script => custom script ; --eval config-script => custom script
    --resume config-unknown => custom script ; --resume config-estimator => custom script
    --resume checkpoint-optimizer --task mine.py --iterations 3 => checkpoint-optimizer
    --resume checkpoint-spy --task mine.py --iterations 3 => checkpoint-spy
    rollout checkpoint-malice => checkpoint.pt ; rollout checkpoint-spy => checkpoint.pt
"""
MORE_COMMANDS = """
    --task ; --task '' => unknown task ; --algo trpo, => --algo
    --out /proc/nowhere => /proc/nowhere ; --name file --overwrite => file
    --device cuda:77 => cuda:77 ; --device toaster => toaster ; --device meta => meta
    --block-size 12 => context ; --advantage grpo --group-size 1 => --group-size
    --batch-size 1 --group-size 1 => --minibatches
    --out cache-torn => .pt ; --out cache-malice => .pt
    --init thesis => thesis ; --init file => file ; --init checkpoint-malice => checkpoint-malice
    --resume ; --resume thesis => thesis ; --resume file => file ; --resume good --lr 0.1 => --lr
    --resume good --task hello --iterations 3 => hello ; --resume good --overwrite => --overwrite
    --resume good --task mine.py --iterations 0 => --iterations ; --resume good --eval good => --eval
    --resume good --task mine.py --save-every 0 => --save-every
    --resume checkpoint-short --task mine.py --iterations 3 => checkpoint-short
    --resume config-list => config-list ; --resume config-nested => config-nested
    --resume config-unknown => config-unknown
    --resume config-type --task mine.py --iterations 3 => --lr
    --resume config-choice --task mine.py --iterations 3 => --tokenizer
    --resume config-nan --task mine.py --iterations 3 => --lr
    --eval ; --eval nowhere => nowhere ; --eval config-range --task mine.py => --gamma
    --explain good => --task ; --explain good --task mine.py --lr 1 => --lr ; --explain nowhere => nowhere
    --eval good => --task ; --eval good --task chess => chess ; --eval good --task mine.py --seed 3 => --seed
    --eval good --task mine.py --temperature 0 => --temperature
    --eval good --task mine.py --max-new-tokens 99 => context
    --eval checkpoint-malice --task mine.py => checkpoint-malice
    --eval checkpoint-misfit --task mine.py => checkpoint-misfit ; --eval good --task tie.py => twice
    --init checkpoint-spy => checkpoint-spy ; --eval good --task preferences => no reward model
    rollout => run ; rollout good --what => --what ; rollout good --prompt '' => empty
    rollout good stray => stray ; rollout good --prompt zqzqzqzqzqzqzqzqzqzqzqzqzqzqzqzq => context
    rollout good --greedy --temperature 1 => --greedy ; rollout good --logprobs 1 => 1
    rollout good --prompt the --max-new-tokens 99 => context ; rollout good < \udcff\udcfe => utf-8
    rollout thesis => thesis ; rollout file => file
"""
# Options with values that are refused, those of train.py and those of rollout.py.
VALUES = """
    --seed 1.5 99999999999999999999 ; --pretrain-seed -1 ; --threads -1 9999
    --name .. pretrained ; --advantage magic ; --tokenizer words ; --vocab-size 256 ; --block-size 1
    --n-layer 0 ; --n-head 0 3 ; --n-embd 0 17 ; --pretrain-steps -1 ; --pretrain-batch 0
    --pretrain-lr nan -1 ; --iterations -1 1.5 ; --batch-size 0 99999999999999999999 ; --group-size 0 5
    --max-new-tokens 0 ; --temperature 0 inf ; --kl-coef -1 ; --gamma -0.1 1.1 nan ; --lam 2 nan
    --whiten 2 yes ; --lr -1 inf x ; --max-grad-norm -1 ; --epochs 0 ; --minibatches 0 17 ;
    --micro-batch 0 -1 x ; --clip -1 1e39
    --target-kl -1 ; --delta -1 ; --cg-iters 0 ; --damping -1 ; --fisher-fraction 0 1.5 ; --critic-lr x -1
    --critic-epochs 0 ; --comparisons 19 x ; --reward-lr x -1
    --reward-steps 0 ; --eval-episodes 1 ; --eval-every -1 ; --save-every 0
"""
SAMPLING_VALUES = """
    -n x 99999999999 ; --temperature -1 0 nan ; --max-new-tokens 0 ; --seed -1 ; --top-k -1 ; --top-p 0 1.5
"""


def split(text):
    return [part.strip() for line in text.strip().splitlines() for part in line.split(" ; ")]


def cases(text):
    """[(command, what the last line must hold)]."""
    found = [case.partition(" => ") for case in split(text)]
    return [(command, says or command.split()[0]) for command, _, says in found]


def refused(text, before=""):
    """The cases of a table of options and their values."""
    options = [line.split() for line in split(text)]
    return [(f"{before}{option} {value}", option) for option, *values in options for value in values]


FAST = cases(COMMANDS)
SLOW = [*cases(MORE_COMMANDS), *refused(VALUES), *refused(SAMPLING_VALUES, "rollout good --prompt the "),
        *((f"--task {name}.py", reason) for name, (_, reason) in TASKS.items())]
SLOW += [(f"{option} {'x' * 300}", "xxx") for option in
         ("--task", "--init", "--resume", "--eval", "--out", "--name", "rollout")]
ALL = [pytest.param(*case, id=case[0]) for case in FAST]
ALL += [pytest.param(*case, id=case[0], marks=pytest.mark.slow) for case in SLOW]


def complete(words):
    """The options of a command, those of a tiny run included where it begins one."""
    if {"--resume", "--eval", "--explain"} & {*words}:
        return words
    words = ["--out", ".", *words]
    words = ["--task", "mine.py", *words]
    return words if "--init" in words else [*TINY, *SMALL, *words]


@pytest.mark.parametrize("command, says", ALL)
def test_bad_input(zoo, capsys, monkeypatch, command, says):
    monkeypatch.chdir(zoo)
    command, _, given = command.partition(" < ")
    stdin = io.TextIOWrapper(io.BytesIO(given.encode(errors="surrogateescape")), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    program, main, words = "train.py", train.main, shlex.split(command)
    if words[0] == "rollout":
        program, main = "rollout.py", rollout.main
    words = words[1:] if main is rollout.main else complete(words)
    monkeypatch.setattr(sys, "argv", [program])

    files, paths = contents(zoo), {*zoo.rglob("*")}
    try:
        status = main(words)
    except SystemExit as e:  # argparse's
        status = e.code
    err = capsys.readouterr().err
    assert status == 2
    assert re.fullmatch(rf"({program}: )?error: .*\n", err)
    assert says in err.splitlines()[-1]
    assert contents(zoo) == files
    assert {*zoo.rglob("*")} == paths


@pytest.mark.parametrize("main, prefix", [(train.main, ""), (rollout.main, "rollout")])
def test_every_option_of_the_help_occurs_in_the_table(capsys, main, prefix):
    with pytest.raises(SystemExit):
        main(["--help"])
    options = re.findall(r"^  (--?[a-z][\w-]*)", capsys.readouterr().out, re.M)
    table = {word for command, _ in FAST + SLOW for word in command.split()
             if command.startswith("rollout") == bool(prefix)}
    assert len(options) > 9
    assert {*options} - {"-h"} <= table
