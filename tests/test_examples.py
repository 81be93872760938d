"""The task files in tests/examples, which users start from: they say what they claim, and they train."""

import json
import math
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch

import train
from algos import Batch, action_log_probs
from helpers import ROOT, SMALL, TINY, blocks_of_readme, rows, run_script, task_file
from model import GPT, GPTConfig, Tokenizer
from reward import Text, load_task

EXAMPLES = ROOT / "tests" / "examples"


@pytest.fixture(params=["story", "sorting", "translate", "scratchpad", "steps", "turns"])
def example(request, tmp_path, monkeypatch):
    """The path of an example, in a directory with all that it needs."""
    if request.param == "translate":
        pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: pip install sacrebleu")
    write_story(tmp_path, monkeypatch)
    return EXAMPLES / f"{request.param}.py"


def write_story(folder, monkeypatch):
    """story.txt in the working directory: forty paragraphs, each with an opening of its own."""
    nouns = "captain harbour sailor island seagull lighthouse storm net".split()
    verbs = "feared watched forgot remembered followed".split()
    paragraphs = [f"the {noun} {verb} the old boats. they {verb} the {noun} from the cold sea."
                  for noun in nouns for verb in verbs]
    (folder / "story.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    monkeypatch.chdir(folder)


def test_every_example_trains(example, tmp_path):
    sizes = "--iterations 1 --pretrain-steps 30 --vocab-size 300 --block-size 96 --max-new-tokens 16".split()
    task = ["--task", str(example), "--out", str(tmp_path / "runs"), "--name", "run"]
    assert train.main([*task, *TINY, *sizes]) is None
    result = json.loads((tmp_path / "runs" / "run" / "result.json").read_text())
    assert math.isfinite(result["after"]["reward"]) and math.isfinite(result["after"]["metric"])


def test_scratchpad_rewards_the_sum_and_measures_its_columns():
    task = load_task(str(EXAMPLES / "scratchpad.py"), 0)
    prompt = Text("4827+0935=", answer="05762")
    right = "7+5+0=12 2+3+1=06 8+9+0=17 4+0+1=05 05762"
    assert task.reward(prompt, right) == task.metric(prompt, right) == 1
    assert task.reward(prompt, "05762") == 1 and task.metric(prompt, "05762") == 0
    assert task.reward(prompt, right[:-1] + "1") == task.reward(prompt, "") == 0
    right = 0
    for text in task.corpus:
        problem, _, answer = text.partition("=")
        right += answer.endswith(f"{sum(map(int, problem.split('+'))):05d}")
    assert 0.4 < right / len(task.corpus) < 0.6  # it forgets carries


def test_story_keeps_the_white_space_of_its_paragraphs(tmp_path, monkeypatch):
    paragraphs = [f"  the\t{i} men\nwent over the hill to the sea and home" for i in range(30)]
    (tmp_path / "story.txt").write_text(" \n\n \n".join(paragraphs) + "\n", newline="\r\n")
    monkeypatch.chdir(tmp_path)
    task = load_task(str(EXAMPLES / "story.py"), 0)
    assert len(task.corpus) == len(task.prompts) + len(task.heldout) == 30
    assert all(any(text.startswith(prompt) for text in task.corpus) for prompt in task.prompts + task.heldout)


def test_story_rewards_the_sea_and_an_ending_and_no_repetition(tmp_path, monkeypatch):
    write_story(tmp_path, monkeypatch)
    task = load_task(str(EXAMPLES / "story.py"), 0)
    assert all(any(text.startswith(prompt) for text in task.corpus) for prompt in task.prompts + task.heldout)
    reward = lambda text, ended: task.reward("the", Text(text, ended=ended, mean_ref_logprob=-2.0))
    assert reward(" blue sea", True) == 1.5
    assert reward(" blue sea", False) == 1.0
    assert reward(" blue hill", True) == 0.5
    assert reward(" ha ha ha", False) == -0.5  # one of two pairs of words is a repetition
    assert task.metric("the", Text("", mean_ref_logprob=-2.0)) == -2.0


def test_sorting_rewards_sorted_digits_which_its_corpus_often_lacks():
    task = load_task(str(EXAMPLES / "sorting.py"), 0)
    for prompt in task.prompts + task.heldout:
        digits = [int(digit) for digit in prompt.split()[:5]]
        answer = "".join(f" {digit}" * digits.count(digit) for digit in range(10))
        assert task.reward(prompt, answer) == 1
        assert task.reward(prompt, answer[:-2]) == 0
    right = sum(task.reward(prompt, text[len(prompt):]) for prompt, text in zip(task.prompts, task.corpus))
    # Half of the texts have two neighbours swapped. Five random digits have 10 (1 - 0.9^5) different ones on
    # average, so a share of the four pairs of sorted neighbours is equal, and its swap shows no mistake.
    equal = (5 - 10 * (1 - 0.9 ** 5)) / 4
    assert right / len(task.corpus) == pytest.approx(0.5 + 0.5 * equal, abs=0.03)


def test_translate_rewards_english_word_order():
    pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: pip install sacrebleu")
    task = load_task(str(EXAMPLES / "translate.py"), 0)
    prompts = {str(prompt): prompt for prompt in task.prompts + task.heldout}
    prompt = prompts["le chat noir voit le chien blanc :"]
    assert task.reward(prompt, " the black cat sees the white dog") == pytest.approx(1)
    assert 0 < task.reward(prompt, " the cat black sees the dog white") < 0.5
    assert task.reward(prompt, "") == 0


def test_steps_pays_for_a_column_where_it_ends_unless_an_earlier_one_is_wrong():
    task = load_task(str(EXAMPLES / "steps.py"), 0)
    prompt = Text("4827+0935=", answer="05762")

    def paid(*tokens):
        rewards = task.reward(prompt, Text("".join(tokens).removesuffix("<end>"), tokens=tokens))
        assert len(rewards) == len(tokens)
        return {token: reward for token, reward in zip(tokens, rewards) if reward}

    right = ("7+5+", "0=12", " 2+3+1=06", " 8+9+0=17 4", "+0+1=05", " ", "05762", "<end>")
    assert paid(*right) == {" 2+3+1=06": 0.25, " 8+9+0=17 4": 0.5, " ": 0.25, "<end>": 1}
    wrong = ("7+5+0=12", " 2+3+1=07", " 8+9+0=17", " 4+0+1=05", " 05762")
    assert paid(*wrong) == {" 2+3+1=07": 0.25, " 05762": 1}


def test_turns_has_a_hole_where_the_text_answers(tmp_path):
    task = load_task(str(EXAMPLES / "turns.py"), 0)
    tokenizer = Tokenizer.learn(task.corpus, 320)
    generator = torch.Generator().manual_seed(0)
    policy, reference = (GPT(GPTConfig(tokenizer.vocab_size, 32, 1, 2, 16), generator) for _ in range(2))
    for p in policy.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    config = SimpleNamespace(temperature=0.7, micro_batch=200)
    prompts = task.prompts[::3]  # of several lengths
    batch, texts = task.run_episodes(policy, reference, prompts, tokenizer, config, 0.7, generator)
    assert batch.mask.sum(1).tolist() == [2] * len(prompts)
    logp = (policy(batch.obs) / 0.7).log_softmax(-1)  # a fresh forward pass
    for b, (prompt, text) in enumerate(zip(prompts, texts)):
        first, second = batch.mask[b].nonzero().squeeze(1).tolist()
        assert tokenizer.decode(batch.obs[b, :first + 1].tolist()) == prompt
        guess, *hole, last = batch.actions[b, first:second + 1].tolist()
        guessed = tokenizer.decode([guess])
        said = task.run_episodes.__globals__["answer"](prompt.secret, guessed.strip())
        assert tokenizer.decode(hole) == said
        assert text == guessed + said + tokenizer.decode([last]) and text.length == len(text.tokens) == 2
        for t, action in ((first, guess), (second, last)):
            assert batch.logprobs[b, t].item() == pytest.approx(logp[b, t, action].item(), abs=1e-5)
    answer = task.run_episodes.__globals__["answer"]
    assert [answer("5", guess) for guess in ("5", "4", "7", "", "12", "x")] == [
        " right", " higher", " lower", " what", " what", " what"]
    assert task.reward(prompts[0], f" 9 lower {prompts[0].secret}") == 1
    assert task.reward(prompts[0], " what what") == 0


@pytest.mark.parametrize("different, draws", [(0.5, 3), (0.0, 8), (1.0, 1)])
def test_dynamic_sampling_keeps_groups_of_different_scores(monkeypatch, different, draws):
    """Of the groups that are drawn, about a share `different` has different scores."""
    dynamic = runpy.run_path(str(EXAMPLES / "dynamic.py"))
    generator = torch.Generator().manual_seed(1)
    numbers = iter(range(10 ** 6))

    def scored_episodes(task, policy, reference, tokenizer, config, generators):
        T = 2 + int(torch.randint(4, (1,), generator=generator))  # batches of several widths
        mask = torch.arange(T) < torch.randint(1, T + 1, (16, 1), generator=generator)
        obs = torch.arange(16 * T).view(16, T)
        zeros = torch.zeros(16, T)
        scores = torch.zeros(8, 2)
        scores[:, 0] += torch.rand(8, generator=generator) < different
        names = [f"{next(numbers)}" for _ in range(16)]
        texts = [Text(name, length=n, ended=True) for name, n in zip(names, mask.sum(1).tolist())]
        batch = Batch(obs, obs + 1, mask, zeros, ref_logprobs=zeros, kl=zeros, entropy=zeros,
                      scores=scores.view(-1), rewards=scores.view(-1, 1) * mask)
        drawn.extend(zip(names, batch.scores.tolist(), mask.sum(1).tolist()))
        return batch, names, texts

    drawn = []
    monkeypatch.setattr(train, "scored_episodes", scored_episodes)
    config = SimpleNamespace(batch_size=16, group_size=2, gamma=1, lam=1, advantage="rloo", whiten=0)
    kept = []
    monkeypatch.setattr(train, "episode_statistics",
                        lambda task, prompts, texts, batch, config: kept.extend(zip(prompts, texts)) or {})
    batch, stats = dynamic["collect"](None, None, None, None, None, config, None)
    assert len(batch.scores) == len(kept) == 16 and all(prompt == text for prompt, text in kept)
    pairs = list(zip(drawn[::2], drawn[1::2]))
    useful = [pair for pair in pairs if pair[0][1] != pair[1][1]]
    uniform = [pair for pair in pairs if pair[0][1] == pair[1][1]]
    expected = [one for pair in (useful + uniform)[:8] for one in pair]
    assert [(prompt, score, n) for (prompt, _), score, n in zip(
        kept, batch.scores.tolist(), batch.mask.sum(1).tolist())] == expected
    assert stats["episodes"] == len(drawn) and abs(len(drawn) // 16 - draws) <= 1
    assert (batch.advantages != 0).any() == (different > 0)


@pytest.mark.parametrize("name", ["grpo_paper", "dr_grpo", "dapo", "gspo", "cispo", "ppo_k2"])
@pytest.mark.parametrize("micro_batch", [1, 1000])
def test_a_loss_is_the_gradient_of_its_objective_by_hand(monkeypatch, name, micro_batch):
    """One step on one minibatch, from a policy that differs from the old one, so some actions are clipped."""
    monkeypatch.setattr(train, "ALGOS", {**train.ALGOS})
    monkeypatch.setattr(train, "Config", train.Config)
    update = runpy.run_path(str(EXAMPLES / "losses.py")) and train.ALGOS[name]
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)
    logits = 2 * rand(5, 5)
    policy = torch.nn.Embedding.from_pretrained(logits.clone(), freeze=False)
    obs, actions = torch.randint(5, (2, 6, 4), generator=generator)
    lengths = torch.tensor([4, 1, 2, 3, 4, 2])
    mask = torch.arange(4) < lengths[:, None]
    logp = action_log_probs(logits.log_softmax(-1)[obs], actions)
    old, ref = logp + 2 * rand(6, 4) - 1, logp + rand(6, 4) - 0.5
    A = (rand(6, 1) - 0.5).expand(6, 4)
    batch = Batch(obs, actions, mask, old, A, ref_logprobs=ref)
    config = SimpleNamespace(temperature=1.0, micro_batch=micro_batch, clip=0.1, clip_high=0.2, loss_kl=0.3,
                             epochs=1, minibatches=1, max_grad_norm=1e9, max_new_tokens=4)
    update(policy, batch, torch.optim.SGD(policy.parameters(), 1.0), config, None)

    def clipped(ratio, a, high):
        """Whether min(ρA, clip(ρ)A) has no gradient."""
        return ratio > 1 + high and a > 0 or ratio < 1 - 0.1 and a < 0

    expected = torch.zeros(5, 5, dtype=torch.float64)
    n_clipped = 0
    for b, t in mask.nonzero().tolist():
        ratio, a, n = (logp[b, t] - old[b, t]).exp().item(), A[b, t].item(), lengths[b].item()
        k1 = (logp[b, t] - ref[b, t]).item()
        text_ratio = (logp[b, :n] - old[b, :n]).mean().exp().item()
        high = 0.2 if name in ("dapo", "gspo") else 0.1
        gone = clipped(text_ratio if name == "gspo" else ratio, a, high)
        n_clipped += gone
        slope = {  # the derivative of the objective with respect to log π of this action
            "grpo_paper": ((0 if gone else ratio * a) - 0.3 * (1 - math.exp(-k1))) / n / 6,
            "dr_grpo": (0 if gone else ratio * a) / 4 / 6,
            "dapo": (0 if gone else ratio * a) / 16,
            "gspo": (0 if gone else text_ratio * a) / n / 6,
            "cispo": min(ratio, 1.2) * a / 16,
            "ppo_k2": ((0 if gone else ratio * a) - 0.3 * k1) / 16}[name]
        score = -logits[obs[b, t]].softmax(-1)
        score[actions[b, t]] += 1
        expected[obs[b, t]] += slope * score
    assert 0 < n_clipped < 16
    torch.testing.assert_close(policy.weight.detach() - logits, expected, rtol=1e-6, atol=1e-9)


def run_example(name, folder, *options):
    run_script(EXAMPLES / name, folder / "printed", *TINY, *SMALL, "--out", folder, "--task",
               task_file(folder), *options)


@pytest.mark.parametrize("options", ["losses.py --algo gspo --advantage grpo --kl-coef 0",
                                     "dynamic.py --algo ppo --advantage grpo",
                                     "hooks.py --algo average --advantage rloo"])
def test_a_custom_script_trains(tmp_path, options):
    run_example(*options.split()[:1], tmp_path, *options.split()[1:], "--name", "run")
    assert [math.isfinite(float(row["loss"])) for row in rows(tmp_path / "run")] == [True, True]


EVERY_EXAMPLE = [["own.py", "--algo", "awr", "--advantage", "mean"], ["hooks.py", "--algo", "average"],
                 ["dynamic.py", "--advantage", "grpo"],
                 ["losses.py", "--algo", "gspo", "--advantage", "grpo"], ["turns.py"], ["steps.py"],
                 ["scratchpad.py"], ["sorting.py"], ["story.py"], ["translate.py"]]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("pkill") is None, reason="there is no pkill")
@pytest.mark.parametrize("example", EVERY_EXAMPLE, ids=lambda example: example[0])
def test_a_killed_example_resumes_bit_for_bit_in_two_processes(tmp_path, monkeypatch, example):
    name, *options = example
    if name == "translate.py":
        pytest.importorskip("sacrebleu", reason="sacrebleu is not installed: pip install sacrebleu")
    write_story(tmp_path, monkeypatch)
    is_task = "train.main" not in (EXAMPLES / name).read_text(encoding="utf-8")
    script = ROOT / "train.py" if is_task else EXAMPLES / name
    task = EXAMPLES / name if is_task else task_file(tmp_path)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    sizes = "--pretrain-steps 10 --vocab-size 300 --block-size 96 --max-new-tokens 16 --save-every 2".split()
    new = [*start, *TINY, *sizes, *options, "--iterations", 8, "--task", task, "--out", tmp_path,
           "--name"]

    def run(*command):
        done = subprocess.run([*map(str, command)], text=True, capture_output=True)
        assert done.returncode == 0, done.stderr

    def plain(x):
        if isinstance(x, dict):
            return {key: plain(value) for key, value in x.items()}
        return x.tolist() if isinstance(x, torch.Tensor) else x

    run(*new, "whole")
    process = subprocess.Popen([*map(str, new), "killed"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    table = tmp_path / "killed" / "metrics.csv"
    while process.poll() is None and (not table.exists() or len(rows(tmp_path / "killed")) < 3):
        time.sleep(0.01)
    subprocess.run(["pkill", "-KILL", "-f", f"{tmp_path} --name killed"])
    process.wait()
    assert not (tmp_path / "killed" / "result.json").exists()
    run(*start, "--resume", tmp_path / "killed", "--task", task)
    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    whole, killed = (torch.load(tmp_path / run / "checkpoint.pt") for run in ("whole", "killed"))
    for one in (whole, killed):
        for row in one["history"]:
            del row["seconds"]
        del one["config"]["name"], one["pretraining"]
    assert str(plain(whole)) == str(plain(killed))


def test_a_custom_algorithm_estimator_and_option_train(tmp_path):
    run_example("own.py", tmp_path, "--algo", "awr", "--advantage", "mean", "--max-weight", 3)
    run = tmp_path / "mine-awr-mean-0"
    assert json.loads((run / "config.json").read_text())["max_weight"] == 3
    assert not any("explained_variance" in row for row in rows(run))  # no critic


def test_advantage_weighted_regression_follows_its_gradient(monkeypatch):
    monkeypatch.setattr(train, "ALGOS", {**train.ALGOS})
    monkeypatch.setattr("advantage.ADVANTAGES", {**train.ADVANTAGES})
    monkeypatch.setattr(train, "CRITIC_FREE", train.CRITIC_FREE)
    monkeypatch.setattr(train, "Config", train.Config)
    own = runpy.run_path(str(EXAMPLES / "own.py"))
    logits = torch.zeros(1, 2, dtype=torch.float64)
    policy = torch.nn.Embedding.from_pretrained(logits.clone(), freeze=False)
    actions, mask = torch.tensor([[0, 1], [0, 0]]), torch.tensor([[True, True], [True, False]])
    rewards = torch.tensor([[-0.5, 2.0], [0.5, 99.0]], dtype=torch.float64)
    advantages, targets = own["less_the_mean"](rewards, None, None, mask, None)
    assert advantages.tolist() == [[0.5, 0.5], [-0.5, 0]] and targets.tolist() == [[1.5, 1.5], [0.5, 0]]
    batch = Batch(torch.zeros_like(actions), actions, mask, advantages=advantages)
    config = SimpleNamespace(temperature=1.0, micro_batch=1024, epochs=1, minibatches=1, max_grad_norm=1e9,
                             max_weight=20)
    own["awr"](policy, batch, torch.optim.SGD(policy.parameters(), 1.0), config)
    up = (math.exp(-0.5) * 0.5) / 3  # of action 0: the two actions of the first episode cancel out
    torch.testing.assert_close(policy.weight.detach(), torch.tensor([[up, -up]], dtype=torch.float64))


@pytest.fixture(scope="module")
def policy_of_reviews(tmp_path_factory):
    """A run that has hardly learned to write reviews."""
    out = tmp_path_factory.mktemp("reviews")
    assert train.main([*TINY, "--iterations", "0", "--out", str(out), "--name", "base"]) is None
    return out / "base"


def test_readme_shows_the_loop_of_the_whole_idea():
    source = (EXAMPLES / "idea.py").read_text(encoding="utf-8")
    assert source[source.index("for iteration"):] in blocks_of_readme("python")


@pytest.mark.parametrize("algo", ["as it is", "ppo"])
def test_the_whole_idea_runs_also_with_the_lines_that_ppo_changes(tmp_path, policy_of_reviews, algo):
    source = (EXAMPLES / "idea.py").read_text(encoding="utf-8").replace("range(1, 41)", "range(1, 4)")
    source = source.replace("Path(__file__).parents[2]", repr(str(ROOT)))
    if algo == "ppo":
        lines = [(line[0], line[1:] + "\n") for line in blocks_of_readme("diff")[0].splitlines()]
        old = "".join(line[4:] for sign, line in lines if sign != "+")  # not yet indented
        new = "".join(line for sign, line in lines if sign != "-")
        step = "    optimizer.zero_grad()\n    loss.backward()\n    optimizer.step()\n"
        assert old in source and step in source
        source = source.replace(old, new).replace(step, textwrap.indent(step, "    "))
    script = task_file(tmp_path, source, "idea.py")
    printed = run_script(script, tmp_path / "printed", policy_of_reviews)
    assert re.findall(r"^ *\d+  reward [+-]\d\.\d\d  ", printed, re.M)


def test_readme_shows_sorting_as_it_is():
    source = (EXAMPLES / "sorting.py").read_text(encoding="utf-8")
    blocks = blocks_of_readme("python")
    first_line = source.splitlines()[0]
    assert [block for block in blocks if block.splitlines()[:1] == [first_line]] == [source]
