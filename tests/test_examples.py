"""The task files in tests/examples, which users start from: they say what they claim, and they train."""

import json
import math
import re
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import train
from algos import Batch, action_log_probs
from helpers import ROOT, SMALL, TINY, rows, task_file
from reward import Text, load_task

EXAMPLES = ROOT / "tests" / "examples"


@pytest.fixture(params=["story", "sorting", "translate", "scratchpad"])
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
    # average, so that of the four pairs of sorted neighbours a share is equal, and its swap shows no mistake.
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


def test_published_grpo_is_the_gradient_of_its_objective(monkeypatch):
    """One step on one minibatch: ∇ of the mean over episodes of each one's mean of A log π - β k3."""
    monkeypatch.setattr(train, "ALGOS", {**train.ALGOS})
    grpo = runpy.run_path(str(EXAMPLES / "grpo.py"))["grpo"]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    policy = torch.nn.Embedding.from_pretrained(logits.clone(), freeze=False)
    obs, actions = torch.randint(5, (2, 6, 4), generator=generator)
    mask = torch.arange(4) < torch.tensor([4, 1, 2, 3, 4, 2])[:, None]
    logprobs = action_log_probs(logits.log_softmax(-1)[obs], actions)
    ref_logprobs = logprobs - torch.rand(6, 4, generator=generator, dtype=torch.float64)
    scores = torch.tensor([1, 0, 0, 0.5, 0.5, 0.5], dtype=torch.float64)
    nothing = torch.full((6, 4), math.nan)  # what it must not read
    batch = Batch(obs, actions, mask, logprobs, nothing, nothing, nothing, nothing, ref_logprobs,
                  scores)
    config = SimpleNamespace(temperature=1.0, micro_batch=1024, clip=0.2, epochs=1, minibatches=1,
                             max_grad_norm=1e9, kl_coef=0.3, group_size=3)
    grpo(policy, batch, torch.optim.SGD(policy.parameters(), 1.0), config, None)

    deviation = math.sqrt(1 / 3)  # of 1, 0, 0
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for b, t in mask.nonzero().tolist():
        advantage = 0 if b >= 3 else (scores[b] - 1 / 3) / deviation
        slope = advantage - 0.3 * (1 - (ref_logprobs[b, t] - logprobs[b, t]).exp())  # ∂k3 = 1 - π_ref/π
        score = -logits[obs[b, t]].softmax(-1)
        score[actions[b, t]] += 1
        expected[obs[b, t]] += slope * score / mask[b].sum() / 6
    torch.testing.assert_close(policy.weight.detach() - logits, expected)


def run_example(name, folder, *options):
    options = [*TINY, *SMALL, "--out", folder, "--task", task_file(folder), *options]
    command = [sys.executable, EXAMPLES / name, *map(str, options)]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_published_grpo_trains(tmp_path):
    run_example("grpo.py", tmp_path, "--algo", "grpo")
    assert [math.isfinite(float(row["loss"])) for row in rows(tmp_path / "mine-grpo-0")] == [True, True]


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


def test_readme_shows_sorting_as_it_is():
    source = (EXAMPLES / "sorting.py").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.M | re.S)
    first_line = source.splitlines()[0]
    assert [block for block in blocks if block.splitlines()[:1] == [first_line]] == [source]
