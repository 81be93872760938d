"""Whatever is wrong with what the user gives: one line that says so, exit status 2, and no file is changed. And nothing is let in."""

import io
import json
import shlex
import shutil
import socket
import sys
from dataclasses import fields

import pytest
import torch

import rollout
import train
from model import GPT, GPTConfig
from test_comparison import make
from test_rollout import Malice
from test_train import TINY, contents


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """A directory with a good run, and beside it copies that are damaged in one place each; and what else can stand there."""
    zoo = tmp_path_factory.mktemp("zoo")
    assert train.main([*TINY, "--out", str(zoo), "--name", "good", "--iterations", "1"]) is None
    good, cached = zoo / "good", next((zoo / "pretrained").iterdir())
    state, config = torch.load(good / "checkpoint.pt"), json.loads((good / "config.json").read_text())
    malice = Malice(zoo / "executed")

    def damaged(name, file, content):
        """A copy in which the file is other bytes or another object, or lacking (None)."""
        run = shutil.copytree(good, zoo / name)
        (run / file).unlink()
        if isinstance(content, bytes):
            (run / file).write_bytes(content)
        elif content is not None:
            torch.save(content, run / file)

    whole = (good / "checkpoint.pt").read_bytes()
    tokenizer, moments = state["tokenizer"], state["critic_optimizer"]
    for name, content in {
            "torn": whole[:len(whole) // 2], "empty": b"", "prose": b"it was the best of times", "list": [1, 2], "malice": {**state, "policy": malice},
            "wide": {**state, "model": {**state["model"], "n_embd": 32}}, "huge": {**state, "model": {**state["model"], "n_embd": 2 ** 40}},
            "dumb": {**state, "tokenizer": {**tokenizer, "tokens": tokenizer["tokens"][9:]}}, "mute": {**state, "tokenizer": {**tokenizer, "name": "latin"}},
            "deep": {**state, "model": {**state["model"], "n_layer": 10 ** 9}}, "nan": {**state, "policy": {k: t / 0 for k, t in state["policy"].items()}}, "past": {**state, "iteration": -1},
            "fast": {**state, "critic_optimizer": {**moments, "state": {i: {**s, "exp_avg": torch.zeros(3)} for i, s in moments["state"].items()}}}, "idle": {**state, "pretraining": {}},
            "old": {**state, "config": {"no_such_option": 1}}, "hot": {**state, "config": {**config, "temperature": "hot"}}, "odd": {**state, "config": ["temperature"]},
            "bare": {k: v for k, v in state.items() if k != "config"}, "short": {k: v for k, v in state.items() if k != "optimizer"}, "none": None}.items():
        damaged(f"checkpoint-{name}", "checkpoint.pt", content)
    for name, content in {"torn": b"{", "list": b"[]", "none": None, "unknown": json.dumps({**config, "no_such_option": 1}).encode(),
                          "type": json.dumps({**config, "lr": "fast"}).encode(), "nan": json.dumps({**config, "lr": float("nan")}).encode(), "malice": malice,
                          "whole": json.dumps({**config, "batch_size": 16.0}).encode(), "choice": json.dumps({**config, "dtype": "float64"}).encode(), "deep": b"[" * 200_000}.items():
        damaged(f"config-{name}", "config.json", content)
    for name, content in {"none": None, "short": b"", "torn": (good / "metrics.csv").read_bytes().rstrip(b"\n"), "noise": b"\xff\xfe\x00"}.items():
        damaged(f"metrics-{name}", "metrics.csv", content)
    (zoo / "thesis.csv").write_text("years of work\n" * 9)
    damaged("metrics-link", "metrics.csv", None)
    (zoo / "metrics-link" / "metrics.csv").symlink_to(zoo / "thesis.csv")
    # Weights to start from, and pretraining that was cut short.
    GPT(GPTConfig(300, 16, 1, 2, 8)).to_gpt2(zoo / "gpt2-small", 299)
    shutil.copytree(zoo / "gpt2-small", zoo / "gpt2-torn")
    (zoo / "gpt2-torn" / "config.json").write_text("{")
    (zoo / "gpt2-malice").mkdir()
    shutil.copy(zoo / "gpt2-small" / "config.json", zoo / "gpt2-malice")
    torch.save({"transformer.wte.weight": malice}, zoo / "gpt2-malice" / "pytorch_model.bin")
    for name, suffix, content in [("cache-torn", ".pt", cached.read_bytes()[:1000]), ("cache-malice", ".pt", malice), ("part-torn", ".part", b"x"), ("part-malice", ".part", malice)]:
        path = (zoo / name / "pretrained" / cached.name).with_suffix(suffix)
        path.parent.mkdir(parents=True)
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        run = shutil.copytree(good, zoo / name / "young")
        (run / "checkpoint.pt").unlink()
    # Runs to compare.
    for name in ("one", "cut", "mad", "void", "nan", "other", "rowless", "listed", "steep", "named"):
        make(zoo / name, 0, [] if name == "rowless" else [1.0, 2.0], after=1.0, **({"task": "hello"} if name == "other" else {}))
    (zoo / "cut" / "result.json").unlink()
    (zoo / "mad" / "metrics.csv").write_text("iteration,reward\n1,one\n")
    (zoo / "void" / "result.json").write_text("{}")
    (zoo / "nan" / "metrics.csv").write_text("reward,kl,kl_update,seconds\nnan,0,0,1\n")
    (zoo / "listed" / "config.json").write_text("[]")
    (zoo / "steep" / "metrics.csv").write_text("iteration,reward,kl,kl_update,seconds\n1,1e308,0,0,1\n2,1e308,0,0,1\n")
    (zoo / "named" / "result.json").write_text((zoo / "named" / "result.json").read_text().replace('"grammatical"', "5"))
    shutil.copytree(good, zoo / "mixed")
    (zoo / "cut.md").mkdir()
    (zoo / "taken-trpo-0").mkdir()
    for name in ("notes.md", "photo.png", "file", "thesis/chapter1.txt", "mixed/chapter2.txt"):
        (zoo / name).parent.mkdir(exist_ok=True)
        (zoo / name).write_text("years of work")
    # Tasks.
    task = "corpus = ['the cat sat', 'the dog sat'] * 30\nprompts, heldout = ['the cat'], ['the dog']\ndef reward(p, c): return len(c)\n"
    for name, source in {"syntax": "def", "raises": task + "[][1]", "bytes": "\udcff", "lacks": "prompts = ['a']", "types": task + "prompts = 3", "deaf": task + "reward = 3",
                         "leaks": task + "heldout = prompts", "quits": task + "raise SystemExit"}.items():
        (zoo / f"{name}.py").write_bytes(source.encode(errors="surrogateescape"))
    return zoo


CASES = [
    # Options of train.py.
    ("--task chess", "chess"), ("--task", "--task"), ("--algo dqn", "dqn"), ("--algo trpo,", "--algo"), ("--algo trpo,dqn", "dqn"), ("--advantage magic", "magic"), ("--advantage rloo --group-size 1", "--group-size"),
    ("--name a/b", "--name"), ("--name ..", "--name"), ("--name pretrained", "--name"), ("--name " + "x" * 300, "--name"), ("--out /proc/nowhere", "--out"), ("--out file", "file"),
    ("--name thesis --overwrite", "thesis"), ("--name mixed --overwrite", "chapter2.txt"), ("--name 'a\nb/c'", "--name"), ("--name file --overwrite", "file"), ("--name good", "--resume"), ("--overwrite yes", "yes"), ("--seed -1", "--seed"), 
    ("--device cuda:77", "cuda:77"), ("--device toaster", "toaster"), ("--device meta", "meta"), ("--threads -1", "--threads"), ("--dtype float16", "float16"),
    ("--tensorboard 1", "1"), ("--pretrain-seed -1", "--pretrain-seed"), ("--tokenizer words", "words"), ("--vocab-size 256", "--vocab-size"), ("--block-size 8", "context"), ("--block-size 1", "--block-size"),
    ("--block-size 1000000000 --n-embd 1000000000", "memory"), ("--n-layer 0", "--n-layer"), ("--n-head 3", "--n-head"), ("--n-head 0", "--n-head"), ("--n-embd 0", "--n-embd"), ("--pretrain-steps -1", "--pretrain-steps"),
    ("--pretrain-batch 0", "--pretrain-batch"), ("--pretrain-lr nan", "--pretrain-lr"), ("--iterations -1", "--iterations"), ("--iterations many", "--iterations"), ("--iterations 1.5", "--iterations"),
    ("--batch-size 0", "--batch-size"), ("--batch-size 18", "--group-size"), ("--group-size 0", "--group-size"), ("--max-new-tokens 64", "context"), ("--max-new-tokens 0", "--max-new-tokens"),
    ("--temperature 0", "--temperature"), ("--kl-coef -1", "--kl-coef"), ("--gamma 1.1", "--gamma is 1.1"), ("--gamma -0.1", "--gamma"), ("--lam 2", "--lam"), ("--lam nan", "--lam"), ("--whiten 2", "--whiten"),
    ("--lr -1", "--lr"), ("--lr inf", "--lr"), ("--max-grad-norm -1", "--max-grad-norm"), ("--epochs 0", "--epochs"), ("--minibatches 17", "--minibatches"), ("--clip -1", "--clip"), ("--clip 1e39", "--clip"), ("--target-kl -1", "--target-kl"),
    ("--delta -1", "--delta"), ("--cg-iters 0", "--cg-iters"), ("--damping -1", "--damping"), ("--fisher-fraction 0", "--fisher-fraction"), ("--fisher-fraction 1.5", "--fisher-fraction"),
    ("--backtracks -1", "--backtracks"), ("--critic-lr x", "--critic-lr"), ("--critic-epochs 0", "--critic-epochs"), ("--eval-episodes 1", "--eval-episodes"), ("--save-every 0", "--save-every"),
    ("--unknown 1", "--unknown"), ("--iter 3", "--iter"), ("stray", "stray"), ("--seeds 0", "--seeds"), ("--seeds many", "--seeds"), ("--seeds 2 --iterations 0", "--iterations"),
    ("--seeds 2 --name taken", "taken-trpo-0"), ("--algo ppo,trpo --lr -1", "--lr"),
    *((f"--{f.name.replace('_', '-')} {10 ** 400}", "a number from") for f in fields(train.Config) if f.type is int),
    # Task files.
    *((f"--task {name}.py", f"{name}.py") for name in ("syntax", "raises", "bytes", "lacks", "types", "deaf", "leaks", "quits")),
    # Weights to start from.
    ("--init ''", "--init"), ("--init nowhere", "nowhere"), ("--init good --overwrite --name good", "--init starts from"), ("--init good --n-layer 2", "--n-layer"), ("--init gpt2", "gpt2"), ("--init gpt2-small", "300 tokens"),
    ("--init gpt2-torn", "config.json"), ("--init gpt2-malice", "pytorch_model.bin"), *((f"--init checkpoint-{name}", "checkpoint.pt") for name in ("torn", "malice", "none")), ("--tokenizer gpt2", "vocabulary"),
    ("--out cache-torn", ".pt"), ("--out cache-malice", ".pt"),
    # Runs to go on with.
    ("--resume", "--resume"), ("--resume nowhere", "nowhere"), ("--resume thesis", "thesis"), ("--resume good", "--iterations"), ("--resume good --iterations 0", "--iterations"), ("--resume good --lr 0.1", "--lr"),
    ("--resume good --task hello", "reviews"), ("--resume part-malice/young", ".part"), ("--resume part-torn/young", ".part"), ("--resume cache-malice/young", ".pt"),
    *((f"--resume checkpoint-{name} --iterations 3", "checkpoint-") for name in ("torn", "empty", "prose", "list", "malice", "wide", "huge", "dumb", "mute", "deep", "nan", "past", "fast", "idle", "short")),
    *((f"--resume config-{name} --iterations 3", f"config-{name}") for name in ("torn", "list", "none", "unknown", "malice", "deep")), ("--resume config-nan --iterations 3", "--lr"),
    ("--resume config-type --iterations 3", "--lr"), ("--resume config-whole --iterations 3", "--batch-size"), ("--resume config-choice --iterations 3", "--dtype"),
    *((f"--resume metrics-{name} --iterations 3", "metrics.csv") for name in ("none", "short", "torn", "link", "noise")),
    # Runs to look at.
    ("--eval", "--eval"), ("--eval nowhere", "no checkpoint"), ("--eval ''", "no checkpoint"), ("--eval good --eval-episodes 1", "--eval-episodes"), ("--eval good --lr 1", "--lr has no meaning"),
    ("--eval good --temperature 0", "--temperature"), ("--eval good --task chess", "chess"), ("--eval good --max-new-tokens 99", "context"),
    *((f"--eval checkpoint-{name}", f"checkpoint-{name}") for name in ("torn", "malice", "old", "hot", "odd", "nan", "bare", "none")),
    # Runs to compare.
    ("--plot", "--plot"), ("--plot nowhere", "nowhere"), *((f"--plot {name}", name) for name in ("cut", "rowless", "mad", "void", "listed", "nan", "config-malice")), ("--plot one other", "different tasks"),
    ("--plot one one", "same seed"), ("--plot one --lr 1", "--lr"), ("--plot one --seeds 2", "--seeds"), ("--plot one --name a/b", "--name"), ("--plot one --name cut", "cut.md"), ("--plot one --name notes", "notes.md"), ("--plot one --name photo", "photo.png"), ("--plot config-deep", "config-deep"), ("--plot steep", "steep"), ("--plot named", "named"),
    # rollout.py.
    *((f"rollout good --prompt the {options}", "") for options in ("-n 0", "-n 99999999999999", "-n x", "--temperature -1", "--temperature 0", "--temperature nan", "--greedy --temperature 1", "--what", "--max-new-tokens 99",
                                                                     "--max-new-tokens 0", "--seed -1", "--top-k -1", "--top-k many", "--top-p 0", "--top-p 1.5", "--top-p nan", "--export=", "--export file", "--logprobs 1")),
    ("rollout good --prompt ''", "empty"), ("rollout good --prompt " + 80 * "zq", "context"), ("rollout", "run"), ("rollout nowhere --prompt the", "nowhere"), ("rollout good < \udcff\udcfe\n", "UTF-8"),
    *((f"rollout checkpoint-{name} --prompt the", "checkpoint.pt") for name in ("torn", "empty", "prose", "list", "malice", "wide", "huge", "dumb", "mute", "deep", "nan", "hot", "odd", "none")),
]


@pytest.fixture
def alone(zoo, monkeypatch):
    """In the zoo, and without a network."""
    def offline(*args, **kwargs):
        raise ConnectionError("no network")
    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "/proc/nowhere")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(zoo / "nothing"))
    monkeypatch.chdir(zoo)


@pytest.mark.parametrize("command, says", CASES, ids=lambda text: text[:60])
def test_bad_input(zoo, alone, capsys, monkeypatch, command, says):
    command, _, given = command.partition(" < ")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode(errors="surrogateescape"))))
    words = shlex.split(command)
    if not {"rollout", "--out", "--eval", "--resume"} & {*words}:
        words += ["--out", "."]
    before, folders = contents(zoo), sorted(map(str, zoo.rglob("*")))
    if words[0] == "rollout":
        status = rollout.main(words[1:])
    else:
        status = train.main(words if {"--resume", "--eval", "--plot", "--init"} & {*words} else [*TINY, *words])
    err = capsys.readouterr().err
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert contents(zoo) == before and sorted(map(str, zoo.rglob("*"))) == folders


def test_the_table_has_every_option():
    text = " ".join(command for command, _ in CASES)
    flags = ["--eval", "--plot", "--resume", "--seeds", *(f"--{name.replace('_', '-')}" for name in train.Config.__dataclass_fields__)]
    assert [flag for flag in flags if f"{flag} " not in text] == []
