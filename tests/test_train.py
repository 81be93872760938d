import csv
import json
import math
import os
import re
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import tiktoken
import torch

import reward
import train
from model import GPT, Critic, GPTConfig
from rollout import BadInput, Tokenizer, load_checkpoint, sample
from test_rollout import gpt2_vocabulary  # noqa: F401, a fixture

ROOT = Path(__file__).parent.parent
SHORT = "--pretrain-steps 60 --iterations 2 --batch-size 16 --minibatches 2 --eval-episodes 16 --threads 1".split()
TINY = [*"--n-layer 1 --n-embd 16 --n-head 2".split(), *SHORT]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A directory of runs; the first run that a test makes in it leaves pretrained weights for the others."""
    return tmp_path_factory.mktemp("runs")


def go(out, *options):
    return train.main([*TINY, "--out", str(out), *map(str, options)])


def contents(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def rows(run, timings=False):
    return [{k: v for k, v in row.items() if timings or k != "seconds"} for row in csv.DictReader(open(run / "metrics.csv"))]


@pytest.mark.parametrize("algo", train.ALGOS)
def test_a_short_run_of_each_algorithm(out, algo):
    command = [sys.executable, ROOT / "train.py", *TINY, "--algo", algo, "--name", algo, "--out", out]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^ +\d/2  reward .* kl .* entropy .* s, \d+ s left$", done.stdout, re.M)) == 2
    assert "before" in done.stdout and "after" in done.stdout

    run = out / algo
    assert {p.name for p in run.iterdir()} == {"config.json", "metrics.csv", "checkpoint.pt", "result.json"}
    result = json.loads((run / "result.json").read_text())
    assert {"task", "algo", "seed", "reward_before", "reward_after", "metric_before", "metric_after", "greedy_before",
            "greedy_after", "kl", "seconds_pretrain", "seconds_rl", "threads"} <= set(result)
    assert result["task"] == "reviews" and result["algo"] == algo and result["threads"] == 1 and result["kl"] > 0
    config = json.loads((run / "config.json").read_text())
    assert config["algo"] == algo and config["n_embd"] == 16 and config["vocab_size"] == 620
    table = rows(run)
    assert [row["iteration"] for row in table] == ["1", "2"]
    assert all(math.isfinite(float(value)) for row in table for value in row.values())
    assert 0 <= float(table[0]["kl"]) < 1e-6 < float(table[1]["kl"])  # at first the policy is its own reference

    trained, reference, tokenizer, more = load_checkpoint(run)
    start, _, _, _ = load_checkpoint(next((out / "pretrained").iterdir()))
    assert all(torch.equal(p, q) for p, q in zip(reference.parameters(), start.parameters()))
    assert not torch.equal(trained.transformer.wte.weight, start.transformer.wte.weight)
    assert more["config"] == config and more["iteration"] == 2
    assert more["critic"]["value_head.weight"].abs().max() > 0  # which was zero before its fit


def test_pretraining_is_kept_for_what_decides_it(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "imitate", lambda *args: None)
    monkeypatch.setattr(train, "evaluate", lambda *args: exec("raise BadInput('enough')", {"BadInput": BadInput}))
    others = dict(pretrain_seed=1, vocab_size=300, block_size=80, n_layer=2, n_head=1, n_embd=32, pretrain_steps=9, pretrain_batch=9, pretrain_lr=0.1)
    for count, (name, value) in enumerate([("seed", 1), *others.items(), ("algo", "ppo"), ("lr", 1)]):
        go(tmp_path, "--name", name, "--vocab-size", 260, "--max-new-tokens", 5, f"--{name.replace('_', '-')}", value)
        assert len(list((tmp_path / "pretrained").iterdir())) == min(count, len(others)) + 1, name


def test_pretraining_is_done_once(out, capsys):
    go(out, "--name", "first", "--iterations", 0)
    files = {p: p.stat().st_mtime_ns for p in (out / "pretrained").iterdir()}
    go(out, "--name", "second", "--iterations", 0, "--algo", "ppo", "--seed", 5)
    assert "pretrained weights from" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (out / "pretrained").iterdir()} == files
    results = [json.loads((out / name / "result.json").read_text()) for name in ("first", "second")]
    assert results[0]["reward_before"] == results[1]["reward_before"] and results[0]["entropy_before"] == results[1]["entropy_before"]
    assert results[0]["reward_after"] == results[0]["reward_before"] and 0 <= results[0]["kl"] < 1e-6


@pytest.mark.parametrize("algo", train.ALGOS)
def test_same_seed_same_bytes_in_another_process(out, algo):
    texts = {}
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        command = [sys.executable, ROOT / "train.py", *TINY, "--name", f"{algo}-{name}", "--out", out, "--algo", algo, "--seed", str(seed)]
        assert subprocess.run(command, capture_output=True).returncode == 0
        lines = (out / f"{algo}-{name}" / "metrics.csv").read_text().splitlines()
        assert lines[0].endswith(",seconds") and len(lines) == 3
        texts[name] = [line.rpartition(",")[0] for line in lines]  # all but the time
    assert texts["a"] == texts["b"] != texts["c"]


# Nothing comes in or gets out unasked; and bfloat16.

def test_nothing_is_written_elsewhere_and_nothing_fetched(tmp_path):
    """A run, a look at it and a sample of it, without a network, in a home of their own: all they leave is runs/NAME and the pretrained weights."""
    cut_off = "import socket, sys; socket.socket.connect = socket.getaddrinfo = None; sys.path.insert(0, sys.argv.pop(1))\n"
    environment = {**os.environ, **dict.fromkeys(["HOME", "TMPDIR", "XDG_CACHE_HOME"], str(tmp_path)), "PYTHONDONTWRITEBYTECODE": "1"}
    for module, command in [("train", [*TINY, "--name", "mine"]), ("train", ["--eval", "runs/mine"]), ("train", ["--resume", "runs/mine", "--iterations", "3"]),
                            ("rollout", ["runs/mine", "--prompt", "the"])]:
        done = subprocess.run([sys.executable, "-c", f"{cut_off}import {module}; sys.exit({module}.main())", ROOT, *command], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    kept, = (tmp_path / "runs" / "pretrained").iterdir()
    assert left == {f"runs/mine/{name}" for name in ("config.json", "metrics.csv", "checkpoint.pt", "result.json")} | {f"runs/pretrained/{kept.name}"}


def test_a_run_with_gpt2s_vocabulary_takes_no_network(tmp_path, gpt2_vocabulary, monkeypatch):  # noqa: F811
    file, run = str(task_file(tmp_path, FILE)), str(tmp_path / "mine")
    assert go(tmp_path, "--task", file, *SMALL, "--tokenizer", "gpt2", "--name", "mine", "--iterations", 1, "--pretrain-steps", 1) is None
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    assert train.main(["--resume", run, "--task", file, "--iterations", "2"]) is None and train.main(["--eval", run, "--task", file]) is None
    assert load_checkpoint(run)[2].name == json.loads((tmp_path / "mine" / "config.json").read_text())["tokenizer"] == "gpt2"


def test_bfloat16(out, monkeypatch):
    """It computes in bfloat16 what may be, keeps weights and logits in float32, and goes on bit for bit."""
    seen = {}

    def spy(name, honest):
        def watched(*args, **kwargs):
            layer, model = args[0].transformer.h[0].mlp.c_fc, args[0]
            hooks = [layer.register_forward_hook(lambda layer, x, y: seen.setdefault(name, set()).add(y.dtype)),
                     model.register_forward_hook(lambda model, x, y: seen.setdefault("out", set()).add(y.dtype))]
            try:
                return honest(*args, **kwargs)
            finally:
                [hook.remove() for hook in hooks]
        return watched
    for name in ("sample", "nll", "fit_critic"):
        monkeypatch.setattr(train, name, spy(name, getattr(train, name)))
    for algo, update in train.ALGOS.items():
        monkeypatch.setitem(train.ALGOS, algo, spy(algo, update))
    for algo in train.ALGOS:
        for name, iterations in {"half": 3, "cut": 2}.items():
            assert go(out, "--algo", algo, "--dtype", "bfloat16", "--pretrain-seed", 7, "--name", f"{name}-{algo}", "--iterations", iterations) is None
        assert train.main(["--resume", str(out / f"cut-{algo}"), "--iterations", "3"]) is None and rows(out / f"cut-{algo}") == rows(out / f"half-{algo}")
        state = torch.load(out / f"half-{algo}" / "checkpoint.pt")
        assert {t.dtype for t in [*state["policy"].values(), *state["critic"].values()]} == {torch.float32}
        assert 0 <= float(rows(out / f"half-{algo}")[0]["kl"]) < 1e-3  # between one pass token by token and one over all of them
    half, full = torch.bfloat16, torch.float32
    assert seen == {"nll": {half, full}, "sample": {half}, "fit_critic": {half}, "reinforce": {half}, "ppo": {half}, "trpo": {full}, "out": {full}}  # bits per byte: full
    assert go(out, "--pretrain-seed", 7, "--name", "full", "--iterations", 0) is None
    half, full = (json.loads((out / name / "result.json").read_text())["bits_per_byte"] for name in ("half-ppo", "full"))
    assert half != full and half == pytest.approx(full, rel=0.01)


# collect and evaluate, every number made again from full forward passes.

def explain(model, obs):
    """log π(·|s) at temperature 0.7."""
    return (model(obs) / 0.7).log_softmax(-1).detach()


@pytest.fixture
def world():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (GPT(GPTConfig(257, 16, 1, 2, 16), generator) for _ in range(2))
    critic = Critic(policy.config, policy)
    for p in [*policy.parameters(), *reference.parameters(), *critic.parameters()]:
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    for model in (policy, reference):
        end = model.transformer.wte.weight.data[256]
        end *= 4
        model.transformer.ln_f.bias.data += 2 * end / (end @ end)  # so that some completions end
    task = reward.Task([], ["a", "bcd", "ef"], ["a", "g", "hij", "kl"], lambda p, c: len(c.encode()) + len(p) / 4, lambda p, c: len(c))
    config = SimpleNamespace(batch_size=32, group_size=2, max_new_tokens=6, temperature=0.7, kl_coef=0.3, gamma=0.9, lam=0.8,
                             whiten=0, advantage="gae", eval_episodes=50, dtype="float32")
    return task, policy, reference, critic, Tokenizer.from_merges([]), config


def generators():
    return {name: torch.Generator().manual_seed(7) for name in ("prompts", "sample", "update")}


@pytest.mark.parametrize("advantage, whiten", [("gae", 0), ("gae", 1), ("rloo", 0)])
def test_collect_puts_every_number_in_its_place(world, advantage, whiten):
    task, policy, reference, critic, tokenizer, config = world
    config.advantage, config.whiten = advantage, whiten
    critic, seen, reward_of = critic if advantage == "gae" else None, [], task.reward
    task = replace(task, reward=lambda prompt, completion: seen.append(completion) or reward_of(prompt, completion))
    batch, stats = train.collect(task, policy, reference, critic, tokenizer, config, generators())
    logp, ref = explain(policy, batch.obs), explain(reference, batch.obs)
    values = critic(batch.obs).detach() if critic else torch.zeros(batch.mask.shape)
    scores, kls, entropies, ended, expected, targets, prompts = [], [], [], 0, [], [], []
    for b, mask in enumerate(batch.mask):
        steps = mask.nonzero().squeeze(1).tolist()
        prompts.append(tokenizer.decode(batch.obs[b, :steps[0] + 1].tolist()))
        actions = batch.actions[b, mask].tolist()
        ended += actions[-1] == 256
        scores.append(reward_of(prompts[-1], tokenizer.decode(actions)))
        # What the reward was given carries its figures.
        assert seen[b] == tokenizer.decode(actions) and seen[b].length == len(steps) and seen[b].ended == (actions[-1] == 256)
        assert seen[b].fluency == pytest.approx(ref[b, steps, actions].mean().item(), abs=1e-4)
        rewards = []
        for t, a in zip(steps, actions):
            rewards.append(-0.3 * (logp[b, t, a] - ref[b, t, a]).item())
            assert batch.logprobs[b, t].item() == pytest.approx(logp[b, t, a].item(), abs=1e-4)
            kls.append((logp[b, t].exp() * (logp[b, t] - ref[b, t])).sum().item())
            entropies.append(-(logp[b, t].exp() * logp[b, t]).sum().item())
        rewards[-1] += scores[-1]
        n, v = len(steps), [*values[b, mask].tolist(), 0.0]
        if advantage == "gae":
            delta = [rewards[i] + 0.9 * v[i + 1] - v[i] for i in range(n)]
            adv = [sum((0.9 * 0.8) ** k * delta[i + k] for k in range(n - i)) for i in range(n)]
            targets.append([a + x for a, x in zip(adv, v)])
        else:
            adv = [sum(rewards)] * n
            targets.append(adv)
        expected.append(adv)
    if advantage == "rloo":  # rows 2i and 2i+1 share a prompt, each is the other's baseline
        assert prompts[::2] == prompts[1::2]
        totals = [adv[0] for adv in expected]
        expected = [[totals[b] - totals[b ^ 1]] * len(adv) for b, adv in enumerate(expected)]
    flat = torch.tensor(sum(expected, []))
    if whiten:
        flat = (flat - flat.mean()) / flat.std(unbiased=False)
    returns, values = torch.tensor(sum(targets, [])), values[batch.mask]
    torch.testing.assert_close(batch.advantages[batch.mask], flat, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch.returns[batch.mask], returns, rtol=1e-3, atol=1e-3)
    assert 0 < ended < 32 and len(set(prompts)) == 3
    close = lambda x: pytest.approx(x, rel=1e-3)
    assert stats["reward"] == close(fmean(scores)) and stats["kl"] == close(fmean(kls)) and stats["entropy"] == close(fmean(entropies))
    assert stats["ended"] == close(ended / 32) and stats["length"] == close(len(kls) / 32)
    assert stats.get("explained_variance") == (close(1 - ((returns - values) ** 2).mean().item() / returns.var(unbiased=False).item()) if critic else None)


def test_evaluate_is_the_mean_over_held_out_prompts(world):
    task, policy, reference, _, tokenizer, config = world
    asked = []
    task = replace(task, metric=lambda prompt, completion: asked.append((prompt, completion)) or len(completion))
    figures, texts = train.evaluate(task, policy, reference, tokenizer, config)
    assert texts == asked[:50] and [prompt for prompt, _ in texts] == (task.heldout * 13)[:50]
    assert figures["reward"] == pytest.approx(fmean(task.reward(*pair) for pair in texts))
    assert figures["metric"] == pytest.approx(fmean(len(completion) for _, completion in texts))
    for prompt, completion in asked[50:]:  # the likeliest token, again and again
        tokens = tokenizer.encode(prompt)
        for _ in range(6):
            tokens.append(policy(torch.tensor([tokens]))[0, -1].argmax().item())
            if tokens[-1] == 256:
                break
        assert completion == tokenizer.decode(tokens[len(prompt):])
        logp = explain(reference, torch.tensor([tokens[:-1]]))[0, torch.arange(len(prompt) - 1, len(tokens) - 1), tokens[len(prompt):]]
        assert completion.fluency == pytest.approx(logp.mean().item(), abs=1e-4)
    assert [prompt for prompt, _ in asked[50:]] == task.heldout
    assert figures["greedy"] == pytest.approx(fmean(len(completion) for _, completion in asked[50:]))
    rewards = torch.tensor([task.reward(*pair) for pair in texts], dtype=torch.float64)
    assert figures["reward_ci"] == pytest.approx(1.96 * rewards.std().item() / 50 ** 0.5)
    assert figures["ended"] == fmean(completion.ended for _, completion in texts) and 0 < figures["ended"] < 1
    assert figures["distinct_1"] == reward.distinct_n([completion for _, completion in texts], 1)
    assert figures["distinct_2"] == reward.distinct_n([completion for _, completion in texts], 2)
    lengths = []
    kls, entropies, generator = [], [], torch.Generator().manual_seed(12345)
    for prompts in (texts[:32], texts[32:]):
        r = sample(policy, [tokenizer.encode(prompt) for prompt, _ in prompts], 6, 256, 0.7, generator)
        assert r.completions(tokenizer) == [completion for _, completion in prompts]
        lengths += r.mask.sum(1).tolist()
        logp, ref = (explain(model, r.tokens[:, :-1])[r.mask] for model in (policy, reference))
        kls += (logp.exp() * (logp - ref)).sum(-1).tolist()
        entropies += (-logp.exp() * logp).sum(-1).tolist()
    assert figures["length"] == fmean(lengths)
    assert figures["kl"] == pytest.approx(fmean(kls), rel=1e-3) and figures["entropy"] == pytest.approx(fmean(entropies), rel=1e-3)


def test_before_and_after_stand_side_by_side(capsys):
    train.show([("春眠", "不觉晓，" * 9), ("the", " plot" * 30)], [("春眠", "处处"), ("the", " end")])
    lines = [line for line in capsys.readouterr().out.splitlines() if " | " in line]
    cells = lambda text: sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)
    assert len({cells(line.partition(" | ")[0]) for line in lines}) == 1 and len(lines) >= 1 + 2 + 3
    assert "".join(line.partition(" | ")[0].strip() for line in lines[1:3]) == "春眠" + "不觉晓，" * 9


@pytest.mark.parametrize("kind", train.ADVANTAGES)
def test_every_advantage_runs(out, kind):
    assert go(out, "--name", kind, "--advantage", kind, "--algo", "reinforce") is None
    assert ("explained_variance" in rows(out / kind)[0]) == (kind == "gae")  # only gae needs a critic


@pytest.mark.parametrize("algo", train.ALGOS)
def test_each_algorithm_learns(tmp_path_factory, algo):
    """A small policy, well enough pretrained, learns to say hello, which it did in one reply of fifty."""
    out = tmp_path_factory.getbasetemp() / "learn"
    options = "--task hello --n-embd 32 --n-head 4 --pretrain-steps 300 --iterations 25 --batch-size 128 --minibatches 4 --kl-coef 0.02 --lr 2e-3"
    assert go(out, *options.split(), "--algo", algo, "--name", algo) is None
    result = json.loads((out / algo / "result.json").read_text())
    assert result["reward_before"] < 0.2 and result["reward_after"] > 0.6


def test_kl_penalty_holds_the_policy_back(tmp_path_factory):
    out = tmp_path_factory.getbasetemp() / "learn"
    options = "--task hello --n-embd 32 --n-head 4 --pretrain-steps 300 --iterations 10 --batch-size 128 --minibatches 4"
    for beta in (0, 3):
        go(out, *options.split(), "--kl-coef", beta, "--name", f"beta{beta}")
    kl = {beta: json.loads((out / f"beta{beta}" / "result.json").read_text())["kl"] for beta in (0, 3)}
    assert kl[3] < 0.5 * kl[0]


# Pretraining.

def test_long_texts_go_on_in_the_next_row():
    rows = train.as_rows([[1, 2, 3], [1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4], [5], [1, 2, 3, 4, 5]], 3)
    assert rows.tolist() == [[1, 2, 3, -100], [1, 2, 3, 4], [4, 5, 6, 7], [7, 8, 9, -100], [1, 2, 3, 4], [1, 2, 3, 4], [4, 5, -100, -100]]


def test_what_is_held_out_is_not_learned():
    rows = torch.arange(1000)[:, None]
    learn, heldout = train.split_rows(rows, torch.Generator().manual_seed(0))
    assert len(heldout) == 10 and sorted((learn[:, 0].tolist() + heldout[:, 0].tolist())) == list(range(1000))
    assert len(train.split_rows(torch.zeros(200_000, 1), torch.Generator())[1]) == 1000
    learn, heldout = train.split_rows(rows[:2], torch.Generator())
    assert len(learn) == len(heldout) == 1
    for few in (rows[:1], torch.empty(0, 0)):
        with pytest.raises(BadInput, match="too short"):
            train.split_rows(few, torch.Generator())


@torch.no_grad()
def test_bits_per_byte_by_hand(world):
    _, policy, *_ = world
    tokenizer = Tokenizer.learn(["the plot was the plot "] * 9, 263)
    policy = GPT(GPTConfig(tokenizer.vocab_size, 8, 1, 2, 16), torch.Generator().manual_seed(1))
    texts = ["the plot", "was 中", "a"]
    tokens = [tokenizer.encode(text) + [tokenizer.eos_token] for text in texts]
    bits = size = 0
    for row in tokens:
        logp = policy(torch.tensor([row])).log_softmax(-1)[0] / math.log(2)
        bits -= sum(logp[t, token].item() for t, token in enumerate(row[1:]))
        size += sum(len(tokenizer.encoding.decode_single_token_bytes(t)) for t in row[1:-1]) + 1  # the end counts as one byte
    assert train.bits_per_byte(policy, train.as_rows(tokens, 8), tokenizer.sizes(), 2) == pytest.approx(bits / size, rel=1e-5)


# Tasks of one's own.

FILE = """
import random
corpus = ["the cat sat on the mat.", "the dog sat on the log."] * 30
prompts, heldout = ["the cat", "the dog"], ["the"]
calls = []
def reward(prompt, completion):
    calls.append(completion)
    return len(completion) / 10
"""
SMALL = ["--block-size", 24, "--max-new-tokens", 12]


def task_file(folder, source, name="mine.py"):
    (folder / name).write_text(source, encoding="utf-8")
    return folder / name


def test_a_task_file_runs_from_end_to_end(tmp_path, capsys):
    file = task_file(tmp_path, FILE)
    assert go(tmp_path / "out", "--task", file, *SMALL) is None
    run = tmp_path / "out" / "mine-trpo-0"
    result, config = (json.loads((run / name).read_text()) for name in ("result.json", "config.json"))
    assert result["metric"] == "reward" and result["metric_after"] == pytest.approx(result["reward_after"]) and config["task"] == str(file)
    assert 0 < result["bits_per_byte"] < 8
    assert load_checkpoint(run)[0].config.vocab_size < 512 == config["vocab_size"]  # as many as the corpus gave, of what was asked for
    out = capsys.readouterr().out
    assert len(re.findall("^reward  ", out, re.M)) == 1
    assert re.search(r"^pretrained weights to .*/mine-\w+.pt: \d.\d+ bits per held-out byte$", out, re.M) and "\nreward, greedy " in out


def examples():
    blocks = re.findall(r"```python\n(# (\w+)\.py\n.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    return {name: source for source, name in blocks}


def test_the_readme_has_its_three_examples():
    assert list(examples()) == ["story", "sorting", "translate"]
    assert all(source.count("\n") <= 25 for source in examples().values())


@pytest.mark.parametrize("name", ["story", "sorting", "translate"])
def test_the_examples_of_the_readme_run(tmp_path, monkeypatch, name):
    if name == "translate":
        pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: pip install sacrebleu")
    monkeypatch.chdir(tmp_path)
    task = reward.TASKS["reviews"](0)
    Path("story.txt").write_text("\n\n".join(f"{a} {b}" for a, b in zip(task.corpus[:400:2], task.corpus[1:400:2])), encoding="utf-8")
    task_file(tmp_path, examples()[name], f"{name}.py")
    assert go("runs", "--task", f"{name}.py", "--max-new-tokens", 12) is None
    result, config = (json.loads(Path(f"runs/{name}-trpo-0/{file}.json").read_text()) for file in ("result", "config"))
    assert config["task"] == str(tmp_path / f"{name}.py")  # to be found from anywhere
    assert result["metric"] == ("metric" if name == "story" else "reward") and math.isfinite(result["reward_after"])


def test_the_rewards_of_the_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("story.txt").write_text("\n\n".join(f"word{i} of the sea and of the land and of the air" for i in range(30)), encoding="utf-8")
    tasks = {name: reward.load_task(str(task_file(tmp_path, source, f"{name}.py")), 0) for name, source in examples().items()
             if name != "translate" or pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: pip install sacrebleu")}
    text = lambda words: reward.Text(words, ended=True, fluency=-1.0, length=9)
    assert tasks["story"].reward("a", text(" calm sea")) == 1.5 and tasks["story"].reward("a", text("")) == 0.5
    prompt = tasks["sorting"].heldout[0]
    assert tasks["sorting"].reward(prompt, " " + " ".join(sorted(prompt[:9].split()))) and not tasks["sorting"].reward(prompt, "")
    prompt = tasks["translate"].heldout[0]
    a, b = (tasks["translate"].reward(prompt, t) for t in (prompt.answer, " ".join(prompt.answer.split()[::-1])))
    assert a == pytest.approx(1) and b < 0.2
    for task in tasks.values():  # what is asked in the evaluation was not imitated either, but for openings of one's own text
        assert task is tasks["story"] or not any(text.startswith(prompt) for prompt in task.heldout for text in task.corpus)


def test_text_that_is_not_english(tmp_path, capsys):
    poem = ["床前明月光，疑是地上霜。", "举头望明月，低头思故乡。", "春眠不觉晓，处处闻啼鸟。", "夜来风雨声，花落知多少。"]
    file = task_file(tmp_path, f"""
corpus = {poem} * 20
prompts, heldout = ["床前", "举头", "春眠"], ["夜来"]
def reward(prompt, completion):
    return completion.count("月")
""")
    assert go(tmp_path / "out", "--task", file, "--block-size", 48, "--max-new-tokens", 40, "--pretrain-steps", 300, "--n-embd", 32) is None
    rollout_out = subprocess.run([sys.executable, ROOT / "rollout.py", tmp_path / "out" / "mine-trpo-0", "--prompt", "举头", "-n", "2"], capture_output=True)
    assert len(re.findall(r"^举头望明月，低头思故乡。$", rollout_out.stdout.decode(), re.M)) >= 1


def test_a_book_is_one_long_text(tmp_path):
    file = task_file(tmp_path, FILE + "corpus = ' '.join(f'Chapter {i} in which the cat sat on mat {i * 7}.' for i in range(20_000))")
    assert go(tmp_path / "out", "--task", file, *SMALL) is None  # a megabyte
    assert json.loads((tmp_path / "out" / "mine-trpo-0" / "result.json").read_text())["bits_per_byte"] < 8


def test_the_metric_is_not_taken_for_the_reward(tmp_path, capsys):
    file = task_file(tmp_path, FILE + "def reward(p, c): return -5\ndef ended(p, c): return 7\nmetric = ended")
    assert go(tmp_path / "out", "--task", file, *SMALL, "--iterations", 0) is None
    table = re.findall(r"^(reward|ended|ended, greedy) +(\S+) ", capsys.readouterr().out, re.M)
    assert table[:3] == [("reward", "-5.000"), ("ended", "7.000"), ("ended, greedy", "7.000")]


def test_a_terminal_that_knows_no_unicode(tmp_path):
    file = task_file(tmp_path, FILE.replace("the cat sat", "das Kätzchen saß").replace('"the cat"', '"das"'))
    command = [sys.executable, ROOT / "train.py", *TINY, "--task", file, *map(str, SMALL), "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and (tmp_path / "out" / "mine-trpo-0" / "result.json").exists()


def test_an_error_in_a_reward(tmp_path, capsys):
    file = task_file(tmp_path, FILE.replace("    return len", "    if len(calls) == 16 + 1 + 16 + 3:  # in the second iteration\n        [][completion]\n    return len"))
    assert go(tmp_path / "out", "--task", file, *SMALL, "--iterations", 9) == 2
    err = capsys.readouterr().err
    *trace, last = err.splitlines()
    assert trace[0].startswith("Traceback") and f'File "{file}", line 9, in reward' in err and "train.py" not in err and "in score" not in err
    assert re.match(r"error: reward failed on prompt 'the (cat|dog)' and completion '.*': TypeError: list indices", last)
    policy, reference, _, more = load_checkpoint(tmp_path / "out" / "mine-trpo-0")
    assert more["iteration"] == 1 and not torch.equal(policy.transformer.wte.weight, reference.transformer.wte.weight)


@pytest.mark.parametrize("source, says", [
    ("", "lacks prompts"), ("import nowhere_at_all", "ModuleNotFoundError"), (FILE.replace("corpus =", "other ="), "no corpus"), (FILE + "corpus = []", "no corpus"),
    (FILE + "corpus = ['']", "too short"), (FILE + "corpus = 'one line'", "too short"), (FILE + "def reward(p, c): return 'good'", "one finite number"),
    (FILE + "def reward(p, c): pass", "None"), (FILE + "corpus[0] += chr(0xdc80)", "no Unicode"), (FILE + "def metric(p, c): return 'x'", "metric gave 'x'"),
    (FILE + "from reward import batched\n@batched\ndef reward(p, c): return [1.0]", "list of 16 numbers"), (FILE + "heldout = ['the ' * 30]", "context")])
def test_a_task_that_cannot_be_used(tmp_path, capsys, source, says):
    assert go(tmp_path / "out", "--task", task_file(tmp_path, source), *SMALL, "--pretrain-steps", 2) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "out" / "mine-trpo-0").exists()


# Weights to start from.

def test_init_from_a_run(out, capsys):
    go(out, "--name", "source", "--iterations", 1, "--seed", 9)
    source, _, _, _ = load_checkpoint(out / "source")
    cached = contents(out / "pretrained")
    start = lambda name, *options: train.main([*SHORT, *map(str, ["--out", out, "--name", name, "--init", out / "source", "--iterations", 0, *options])])
    assert start("continued", "--pretrain-steps", 0) is None
    policy, reference, _, more = load_checkpoint(out / "continued")
    for p, q, r in zip(source.parameters(), policy.parameters(), reference.parameters()):
        assert torch.equal(p, q) and torch.equal(p, r)
    assert more["config"]["n_embd"] == 16 and contents(out / "pretrained") == cached
    assert json.loads((out / "continued" / "result.json").read_text())["kl"] < 1e-6
    # With steps, it learns on from there; and finds that again.
    for name in ("a", "b"):
        start(f"learned-{name}", "--pretrain-steps", 3)
    assert "pretrained weights from" in capsys.readouterr().out and len(contents(out / "pretrained")) == len(cached) + 1
    cached = contents(out / "pretrained")
    train.main([*SHORT, *map(str, ["--out", out, "--name", "other", "--init", out / "learned-a", "--iterations", 0, "--pretrain-steps", 3])])
    assert len(contents(out / "pretrained")) == len(cached) + 1  # other weights, another result
    a, b = (load_checkpoint(out / f"learned-{name}")[0] for name in ("a", "b"))
    assert torch.equal(a.transformer.wte.weight, b.transformer.wte.weight) and not torch.equal(a.transformer.wte.weight, source.transformer.wte.weight)


@pytest.mark.parametrize("algo", train.ALGOS)
def test_init_from_gpt2(tmp_path, gpt2_vocabulary, algo):
    GPT(GPTConfig(50257, 32, 1, 2, 8), torch.Generator().manual_seed(0)).to_gpt2(tmp_path / "gpt2", 50256)
    file = task_file(tmp_path, FILE.replace("corpus =", "other ="))  # nothing is learned from it
    options = "--iterations 1 --eval-episodes 8 --max-new-tokens 6 --threads 1 --batch-size 8 --minibatches 2".split()
    assert train.main(["--task", str(file), "--init", str(tmp_path / "gpt2"), "--algo", algo, "--out", str(tmp_path / "out"), *options]) is None
    of = lambda **options: train.configure(dict(init=str(tmp_path / "gpt2"), **options))
    assert of(task="addition", algo=algo).lr == 1e-5 and of(lr=1.0).lr == 1.0 and of(task="addition").max_new_tokens == 4
    config = json.loads((tmp_path / "out" / f"mine-{algo}-0" / "config.json").read_text())
    assert config["tokenizer"] == "gpt2" and config["n_embd"] == 8 and config["block_size"] == 32 and config["lr"] == 1e-5


# Evaluation of what there is.

def test_eval_repeats_what_the_run_said(out, capsys):
    go(out, "--name", "judged", "--seed", 3)
    result, before = json.loads((out / "judged" / "result.json").read_text()), contents(out)
    capsys.readouterr()
    assert train.main(["--eval", str(out / "judged")]) is None
    figures = dict(re.findall(r"^(\S.*?) +(-?\d+\.\d+)$", capsys.readouterr().out, re.M))
    for label, name in {"reward": "reward_after", "± (95%)": "reward_ci_after", "grammatical": "metric_after", "grammatical, greedy": "greedy_after",
                        "KL to the reference, nats": "kl", "entropy, nats": "entropy_after", "distinct words": "distinct_1_after",
                        "distinct pairs": "distinct_2_after", "length, tokens": "length_after", "ended": "ended_after"}.items():
        assert float(figures[label]) == pytest.approx(result[name], abs=6e-4), label
    assert contents(out) == before
    train.main(["--eval", str(out / "judged"), "--temperature", "0.5", "--eval-episodes", "8"])
    assert "8 sampled completions of 8 held-out prompts, at temperature 0.5" in capsys.readouterr().out
    train.main(["--eval", str(next((out / "pretrained").glob("reviews*"))), "--eval-episodes", "8"])
    assert re.search(r"^KL to the reference, nats +0.000$", capsys.readouterr().out, re.M)


def test_eval_executes_no_file_unasked(tmp_path, capsys):
    file = task_file(tmp_path, FILE)
    go(tmp_path / "out", "--task", file, *SMALL)
    run = tmp_path / "out" / "mine-trpo-0"
    file.write_text(FILE + "raise SystemExit('executed')")
    capsys.readouterr()
    assert train.main(["--eval", str(run)]) == 2
    assert f"--task {file}" in capsys.readouterr().err
    assert train.main(["--eval", str(run), "--task", str(file)]) == 2
    assert "executed" in capsys.readouterr().err
    file.write_text(FILE)
    assert train.main(["--eval", str(run), "--task", str(file)]) is None


# Bad input: one line, exit status 2, nothing written over.

def test_an_existing_run_stays(out, capsys):
    go(out, "--name", "mine", "--iterations", 1)
    before = contents(out / "mine")
    assert go(out, "--name", "mine") == 2
    assert "--overwrite" in capsys.readouterr().err and contents(out / "mine") == before
    assert go(out, "--name", "mine", "--iterations", 2, "--overwrite") is None
    assert len(rows(out / "mine")) == 2


def test_what_is_no_run_is_never_replaced(out, capsys):
    (out / "thesis").mkdir()
    (out / "thesis" / "chapter1.txt").write_text("years of work")
    assert go(out, "--name", "thesis", "--overwrite") == 2
    assert (out / "thesis" / "chapter1.txt").read_text() == "years of work"
    (out / "file").write_text("x")
    assert go(out, "--name", "file", "--overwrite") == 2
    assert go(out / "file") == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 3 and all(line.startswith("error: ") for line in err)


def test_the_weights_that_it_starts_from_are_not_overwritten(out, capsys):
    go(out, "--name", "mother", "--iterations", 0)
    GPT(GPTConfig(300, 16, 1, 2, 8)).to_gpt2(out / "weights", 299)
    before = contents(out)
    for name, init in [("mother", "mother"), ("mother", "mother/checkpoint.pt"), ("weights", "mother")]:  # the last is no run
        assert train.main([*SHORT, "--out", str(out), "--name", name, "--init", str(out / init), "--overwrite"]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1 and contents(out) == before


def test_a_failed_overwrite_leaves_the_old_run(out, capsys):
    go(out, "--name", "old", "--iterations", 1)
    before = contents(out / "old")
    assert go(out, "--name", "old", "--overwrite", "--max-new-tokens", 62) == 2  # fits some prompts, not all
    (out / "link").symlink_to(out / "old")
    assert go(out, "--name", "link", "--overwrite") == 2
    assert contents(out / "old") == before


def test_a_run_that_appears_meanwhile_stays(out, capsys, monkeypatch):
    honest = train.load_task

    def meanwhile(*args):
        (out / "raced").mkdir()
        (out / "raced" / "checkpoint.pt").write_text("of another process")
        return honest(*args)
    monkeypatch.setattr(train, "load_task", meanwhile)
    assert go(out, "--name", "raced") == 2
    assert [p.read_text() for p in (out / "raced").iterdir()] == ["of another process"]


@pytest.mark.parametrize("algo", ["reinforce", "ppo"])
def test_divergence_is_said_in_one_line(out, capsys, algo):
    assert go(out, "--name", f"wild-{algo}", "--algo", algo, "--lr", 1e30) == 3
    err = capsys.readouterr().err
    assert re.match(r"error: training stopped at iteration 1, the kl update is nan: lower the step", err) and err.count("\n") == 1
    batch = torch.load(out / f"wild-{algo}" / "diverged.pt", weights_only=True)
    assert batch["actions"].shape == batch["mask"].shape == (16, batch["obs"].shape[1]) and batch["mask"].any()


def test_a_reward_that_is_not_finite(tmp_path, capsys):
    """It ends the run before a weight has moved, keeps the batch, and once mended the run goes on as if it had never been."""
    for name, line in [("mended", ""), ("broken", "    if len(calls) == 16 + 1 + 16 + 3: return float('nan')\n")]:  # in the second iteration
        file = task_file(tmp_path, FILE.replace("    return len", line + "    return len"))
        status = go(tmp_path, "--task", file, *SMALL, "--iterations", 4, "--name", name)
    err, run = capsys.readouterr().err, tmp_path / "broken"
    assert status == 3 and err.startswith("error: training stopped at iteration 2, reward gave nan for prompt 'the ") and err.count("\n") == 1
    batch = torch.load(run / "diverged.pt", weights_only=True)
    assert batch["scores"].index("nan") == 2 and len(batch["prompts"]) == len(batch["completions"]) == 16 and f"completion {batch['completions'][2]!r}" in err
    task_file(tmp_path, FILE)
    assert train.main(["--resume", str(run), "--task", str(file)]) is None and rows(run) == rows(tmp_path / "mended")


def test_rejected_steps_are_counted(out, capsys):
    go(out, "--name", "stubborn", "--iterations", 3, "--delta", 1e30, "--backtracks", 0)
    assert re.findall(r"no step \((\d) in a row\)$", capsys.readouterr().out, re.M) == ["1", "2", "3"]
    policy, reference, _, _ = load_checkpoint(out / "stubborn")
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), reference.parameters()))


def test_divergence_of_the_pretraining(tmp_path, capsys):
    assert go(tmp_path, "--pretrain-lr", 1e30) == 3
    err = capsys.readouterr().err
    assert err.startswith("error: pretraining diverged at step ") and err.count("\n") == 1 and "--pretrain-lr" in err
    assert not list(tmp_path.rglob("*.pt")) and not (tmp_path / "reviews-trpo-0").exists()


@pytest.mark.parametrize("value, status", [(float("nan"), 3), (float("inf"), 3), (1e39, 3), (10 ** 400, 3), (None, 2), ("good", 2), ([0.5, 0.5], 2), (torch.ones(2), 2), (1j, 2)])
def test_a_reward_that_is_no_number(out, capsys, monkeypatch, value, status):
    def broken(seed, honest=reward.TASKS["reviews"]):
        task = honest(seed)
        return reward.Task(task.corpus, task.prompts, task.heldout, lambda p, c: value, task.metric)
    monkeypatch.setitem(reward.TASKS, "reviews", broken)
    assert go(out, "--name", "broken", "--overwrite") == status
    err = capsys.readouterr().err
    assert "one finite number" in err and err.count("\n") == 1
    assert not (out / "broken").exists()


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0
    assert all("--" + name.replace("_", "-") in text for name in train.Config.__dataclass_fields__)
