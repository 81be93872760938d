"""Input that cannot be used: exit status 2, a last line that names what is wrong, and no file is changed."""

import io
import json
import re
import shlex
import shutil
import socket
import sys

import pytest
import torch

import rollout
import train
from helpers import SMALL, TASK, TINY, Malice, contents, task_file
from model import GPT, GPTConfig, save_gpt2

# Checkpoints that are damaged in one place each; some more follow in the fixture.
DAMAGED = "torn empty prose list malice wide huge deep vocabulary kind hot odd none".split()
UNUSABLE_STATES = ["short", "moments"]  # good for sampling, but not for resuming
CONFIGS = "torn list none unknown malice nested".split()
TASKS = {"lacks": "prompts = ['a']", "types": TASK + "prompts = 3", "deaf": TASK + "reward = 3",
         "leaks": TASK + "heldout = prompts", "empty": TASK + "prompts = []", "silent": TASK + "corpus = []",
         "brief": TASK + "corpus = 'one line'",
         "wide": TASK + "heldout = ['the ' * 30]", "blank": TASK + "heldout = ['']"}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A directory with a good run, copies of it that are damaged in one place each, and other input."""
    zoo = tmp_path_factory.mktemp("zoo")
    options = ["--task", str(task_file(zoo)), "--out", str(zoo), "--name", "good", "--iterations", "1"]
    assert train.main([*TINY, *SMALL, *options]) is None
    good, malice = zoo / "good", Malice(zoo / "executed")
    cached, = (zoo / "pretrained").iterdir()

    def damaged(name, file, content):
        """A copy of the run in which the file holds other bytes or another object, or is absent (None)."""
        run = shutil.copytree(good, zoo / name)
        (run / file).unlink()
        if isinstance(content, bytes):
            (run / file).write_bytes(content)
        elif content is not None:
            torch.save(content, run / file)

    whole = (good / "checkpoint.pt").read_bytes()
    state = torch.load(good / "checkpoint.pt", weights_only=True)
    model, tokenizer, adam = state["model"], state["tokenizer"], state["critic_optimizer"]
    misshapen = {i: {**moments, "exp_avg": torch.zeros(3)} for i, moments in adam["state"].items()}
    for name, content in {
            "torn": whole[:len(whole) // 2], "empty": b"", "prose": b"it was the best of times",
            "list": [1, 2], "malice": {**state, "policy": malice}, "none": None,
            "wide": {**state, "model": {**model, "n_embd": 32}},
            "huge": {**state, "model": {**model, "n_embd": 2 ** 40}},
            "deep": {**state, "model": {**model, "n_layer": 10 ** 9}},
            "vocabulary": {**state, "tokenizer": {**tokenizer, "tokens": tokenizer["tokens"][9:]}},
            "kind": {**state, "tokenizer": {**tokenizer, "name": "latin"}},
            "hot": {**state, "config": {"temperature": "hot"}}, "odd": {**state, "config": ["temperature"]},
            "short": {key: value for key, value in state.items() if key != "optimizer"},
            "moments": {**state, "critic_optimizer": {**adam, "state": misshapen}}}.items():
        damaged(f"checkpoint-{name}", "checkpoint.pt", content)

    config = json.loads((good / "config.json").read_text())

    def edited(**values):
        return json.dumps({**config, **values}).encode()

    for name, content in {
            "torn": b"{", "list": b"[]", "none": None, "malice": malice, "nested": b"[" * 200_000,
            "unknown": edited(no_such_option=1), "type": edited(lr="fast"), "nan": edited(lr=float("nan")),
            "fraction": edited(batch_size=16.5), "choice": edited(dtype="float64"),
            "range": edited(gamma=7.0)}.items():
        damaged(f"config-{name}", "config.json", content)

    for name, content in {"none": None, "torn": b"{", "noise": b"\xff\xfe\x00", "void": b"{}"}.items():
        damaged(f"result-{name}", "result.json", content)
    for name, content in {"none": None, "empty": b"", "words": b"iteration,reward\n1,one\n",
                          "torn": b"iteration,reward,kl\n1,2\n"}.items():
        damaged(f"metrics-{name}", "metrics.csv", content)

    save_gpt2(GPT(GPTConfig(300, 16, 1, 2, 8)), zoo / "gpt2-small", 299)
    for name in ("torn", "malice", "absent"):
        shutil.copytree(zoo / "gpt2-small", zoo / f"gpt2-{name}")
    (zoo / "gpt2-torn" / "config.json").write_text("{")
    for path in [*(zoo / "gpt2-malice").glob("model*"), *(zoo / "gpt2-absent").glob("*model*")]:
        path.unlink()
    torch.save({"transformer.wte.weight": malice}, zoo / "gpt2-malice" / "pytorch_model.bin")

    for name, content in {"torn": cached.read_bytes()[:1000], "malice": malice}.items():
        path = zoo / f"cache-{name}" / "pretrained" / cached.name
        path.parent.mkdir(parents=True)
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)

    for name, source in TASKS.items():
        task_file(zoo, source, f"{name}.py")
    for name in ("folder.md", "thesis"):
        (zoo / name).mkdir()
    for name in ("file", "thesis/chapter1.txt"):
        (zoo / name).write_text("years of work")
    return zoo


# Commands and, where it is not a command's first word, what the last line of stderr must hold. Those of a new
# run follow the options of a tiny one on mine.py.
CASES = """
    --unknown 1 ; stray ; --iter 3 => --iter ; --iterations many ; --overwrite yes => yes ; --seed -1
    --gamma 1.1 ; --lr nan ; --dtype float16 ; --algo dqn => dqn ; --task chess => chess
    --batch-size 18 => --group-size ; --advantage rloo --group-size 1 => --group-size ; --name a/b
    --name good => --resume good ; --max-new-tokens 64 => context ; --out file/below => file
    --task lacks.py => does not define heldout, reward
    --init nowhere => nowhere ; --init gpt2-torn => gpt2-torn ; --init good --n-layer 2 => --n-layer
    --resume nowhere => nowhere ; --resume good --task mine.py => --iterations ; --resume good => --task
    --resume checkpoint-torn --task mine.py --iterations 3 => checkpoint-torn
    --resume checkpoint-malice --task mine.py --iterations 3 => checkpoint-malice
    --resume config-torn => config-torn
    --eval good --task mine.py --lr 1 => --lr
    --plot metrics-words => metrics-words ; --plot result-none => result-none
    rollout good --prompt the -n 0 => -n ; rollout nowhere => nowhere
    rollout checkpoint-malice => checkpoint.pt
"""
MORE = """
    --task ; --task '' => no task ; --algo trpo, => --algo ; --algo trpo,dqn => dqn ; --advantage magic
    --name .. ; --name pretrained ; --out /proc/nowhere => /proc/nowhere ; --seed 1.5 ; --seeds 0
    --seeds many ; --pretrain-seed -1 ; --device cuda:77 => cuda:77 ; --device toaster => toaster
    --device meta => meta ; --threads -1 ; --threads 9999 ; --tensorboard 1 => 1 ; --tokenizer words
    --tokenizer gpt2 => GPT-2 ; --vocab-size 256 ; --block-size 1 ; --block-size 12 => context
    --n-layer 0 ; --n-head 0 ; --n-head 3 ; --n-embd 0 ; --n-embd 17 ; --pretrain-steps -1
    --pretrain-batch 0 ; --pretrain-lr nan ; --pretrain-lr -1 ; --iterations -1 ; --iterations 1.5
    --batch-size 0 ; --batch-size 1 --group-size 1 => --minibatches ; --group-size 0 ; --group-size 5
    --max-new-tokens 0 ; --temperature 0 ; --temperature inf ; --kl-coef -1 ; --gamma -0.1 ; --gamma nan
    --lam 2 ; --lam nan ; --whiten 2 ; --whiten yes ; --lr -1 ; --lr inf ; --lr x ; --max-grad-norm -1
    --epochs 0 ; --minibatches 0 ; --minibatches 17 ; --clip -1 ; --clip 1e39 ; --target-kl -1
    --delta -1 ; --cg-iters 0 ; --damping -1 ; --fisher-fraction 0 ; --fisher-fraction 1.5 ; --critic-lr x
    --critic-lr -1 ; --critic-epochs 0 ; --eval-episodes 1 ; --save-every 0 ; --lr
    --seed 99999999999999999999 ; --iterations 99999999999999999999 ; --batch-size 99999999999999999999
    --algo ppo,trpo --lr -1 => --lr ; --seeds 2 --batch-size 18 => --group-size
    --advantage grpo --group-size 1 ; --seeds 2 --name folder --n-head 3 => --n-head
    --out cache-torn => .pt ; --out cache-malice => .pt
    --init gpt2 => GPT-2 ; --init gpt2-small => 300 tokens ; --init gpt2-malice => gpt2-malice
    --init gpt2-absent => neither ; --init good --tokenizer bpe => --tokenizer
    --init good --block-size 9 => --block-size ; --init thesis => thesis ; --init file => file
    --resume ; --resume thesis => thesis ; --resume file => file ; --resume good --lr 0.1 => --lr
    --resume good --task mine.py --iterations 0 => --iterations
    --resume good --seeds 2 --task mine.py => --resume ; --resume good --overwrite => --overwrite
    --resume good --task mine.py --save-every 0 => --save-every
    --resume config-type --task mine.py --iterations 3 => --lr
    --resume config-nan --task mine.py --iterations 3 => --lr
    --resume config-fraction --task mine.py --iterations 3 => --batch-size
    --resume config-choice --task mine.py --iterations 3 => --dtype
    --eval config-range --task mine.py => --gamma ; --eval ; --eval nowhere => nowhere
    --eval good => --task ; --eval good --task mine.py --seed 3 => --seed
    --eval good --task mine.py --eval-episodes 1 => --eval-episodes ; --eval good --task chess => chess
    --eval good --task mine.py --temperature 0 => --temperature
    --eval good --task mine.py --max-new-tokens 99 => context
    --plot ; --plot nowhere => nowhere ; --plot good nowhere => nowhere ; --plot good --lr 1 => --lr
    --plot good --name a/b => --name ; --plot good --name folder => folder.md
    --plot good --seed 1 => --seed ; --plot result-torn => result-torn
    --plot result-noise => result-noise ; --plot metrics-none => metrics-none
    --plot metrics-empty => metrics-empty ; --plot metrics-torn => metrics-torn
    --plot config-none => config-none ; --plot good thesis => thesis ; --plot result-void => result-void
    --plot good --seeds 2 => --seeds ; --resume good --eval good => --eval
    --algo trpo,ppo --iterations 0 => --iterations
    --seeds 2 --iterations 0 ; --resume good --task hello --iterations 3 => hello
    --name file --overwrite => --name
    rollout => run ; rollout good --what => --what ; rollout good --prompt '' => empty
    rollout good stray => stray ; rollout good --prompt zqzqzqzqzqzqzqzqzqzqzqzqzqzqzqzq => context
    rollout good --prompt the -n x => -n ; rollout good --prompt the -n 99999999999 => -n
    rollout good --prompt the --temperature -1 => --temperature
    rollout good --prompt the --temperature 0 => --temperature
    rollout good --temperature nan => --temperature ; rollout good --greedy --temperature 1 => --greedy
    rollout good --max-new-tokens 0 => --max-new-tokens
    rollout good --prompt the --max-new-tokens 99 => context ; rollout good --seed -1 => --seed
    rollout good --top-k -1 => --top-k ; rollout good --top-k many => --top-k
    rollout good --top-p 0 => --top-p ; rollout good --top-p 1.5 => --top-p
    rollout good --top-p nan => --top-p ; rollout good --logprobs 1 => 1
    rollout good --export file => file ; rollout good --export => --export ; rollout thesis => thesis
    rollout good < \udcff\udcfe => utf-8 ; rollout gpt2-small --prompt the => checkpoint.pt
    rollout file => file
"""
REASONS = {"lacks": "does not define", "types": "prompts must be", "deaf": "must be functions",
           "leaks": "heldout", "empty": "at least one text", "silent": "two texts", "brief": "two texts",
           "wide": "context", "blank": "empty"}


def cases(text):
    """[(command, what the last line must hold)]."""
    found = []
    for line in text.strip().splitlines():
        for case in line.strip().split(" ; "):
            command, _, says = case.partition(" => ")
            found.append((command, says or command.split()[0]))
    return found


SLOW = cases(MORE) + [(f"--task {name}.py", reason) for name, reason in REASONS.items()]
for state in DAMAGED + UNUSABLE_STATES:
    SLOW.append((f"--resume checkpoint-{state} --task mine.py --iterations 3", f"checkpoint-{state}"))
for state in DAMAGED:
    SLOW.append((f"--eval checkpoint-{state} --task mine.py", f"checkpoint-{state}"))
    SLOW.append((f"--init checkpoint-{state}", f"checkpoint-{state}"))
    SLOW.append((f"rollout checkpoint-{state} --prompt the", f"checkpoint-{state}"))
for state in CONFIGS:
    SLOW.append((f"--resume config-{state} --iterations 3", f"config-{state}"))
ALL = [pytest.param(*case, id=case[0]) for case in cases(CASES)]
ALL += [pytest.param(*case, id=case[0], marks=pytest.mark.slow) for case in SLOW]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tokens"))


@pytest.mark.parametrize("command, says", ALL)
def test_bad_input(zoo, offline, capsys, monkeypatch, command, says):
    monkeypatch.chdir(zoo)
    command, _, given = command.partition(" < ")
    stdin = io.TextIOWrapper(io.BytesIO(given.encode(errors="surrogateescape")), encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", stdin)
    words = shlex.split(command)
    if words[0] == "rollout":
        program, main, words = "rollout.py", rollout.main, words[1:]
    else:
        program, main = "train.py", train.main
        if not {"--resume", "--eval"} & {*words}:
            words = ["--out", ".", *words]
            if "--plot" not in words:
                words = ["--task", "mine.py", *words]
            if not {"--plot", "--init"} & {*words}:
                words = [*TINY, *SMALL, *words]
    monkeypatch.setattr(sys, "argv", [program])

    files, paths = contents(zoo), {*zoo.rglob("*")}
    try:
        status = main(words)
    except SystemExit as e:  # argparse's
        status = e.code
    err = capsys.readouterr().err
    assert status == 2
    assert re.fullmatch(rf"error: .*\n|usage: python {program} .*\n{program}: error: .*\n", err)
    assert says in err.splitlines()[-1]
    assert contents(zoo) == files
    assert {*zoo.rglob("*")} == paths


@pytest.mark.parametrize("main, prefix", [(train.main, ""), (rollout.main, "rollout")])
def test_every_option_occurs_in_the_table(capsys, main, prefix):
    with pytest.raises(SystemExit):
        main(["--help"])
    options = re.findall(r"^  (--?[a-z][\w-]*)", capsys.readouterr().out, re.M)
    table = {word for command, _ in cases(CASES) + SLOW for word in command.split()
             if command.startswith("rollout") == bool(prefix)}
    assert len(options) > 9
    assert {*options} - {"-h"} <= table
