"""A reward that is learned from comparisons: its loss, its training, and a run that is trained on it."""

import copy
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

import overoptimization as study
import train
from algos import flatten
from helpers import SMALL, TASK, TINY, rows, task_file
from model import GPT, BadInput, Critic, GPTConfig, Tokenizer, load_checkpoint
from reward import (
    Task,
    annotate,
    choose_comparisons,
    fit_reward,
    hold_out,
    learn_reward,
    learned_reward,
    load_task,
    to_batch,
    use_reward_model,
)
from rollout import Text, complete

WORDS = ["good", "fine", "bad", "poor", "film", "plot"]
PROMPTS = [f"{a} {b}" for a in WORDS for b in WORDS]
CPU = torch.device("cpu")


def generators(seed=0):
    """Those of a run before its first iteration."""
    return train.random_generators(seed, 0, CPU)


def value(text):
    """The known reward: good words less bad ones."""
    return sum({"good": 1, "fine": 1, "bad": -1, "poor": -1}.get(word, 0) for word in text.split())


def comparisons(n, seed=0):
    """[(prompt, better, worse)] by that reward, without noise."""
    rng, found = random.Random(seed), []
    while len(found) < n:
        two = [" " + " ".join(rng.choices(WORDS, k=rng.randint(1, 6))) for _ in range(2)]
        if value(two[0]) != value(two[1]):
            found.append((rng.choice(PROMPTS), *sorted(two, key=value, reverse=True)))
    return found


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.learn([prompt for prompt in PROMPTS], 300)


@pytest.fixture
def policy(tokenizer):
    return GPT(GPTConfig(tokenizer.vocab_size, 32, 1, 2, 16), torch.Generator().manual_seed(0))


@pytest.fixture
def model(policy):
    """A reward model whose values differ from text to text, in float64."""
    model = Critic(policy.config, policy).double()
    torch.nn.init.normal_(model.value_head.weight, generator=torch.Generator().manual_seed(1))
    return model


def config(**options):
    return train.Config(**{"task": "preferences", "batch_size": 64, "max_new_tokens": 8, **options})


def options(**given):
    """For one pass."""
    return SimpleNamespace(**{"micro_batch": 1024, "max_grad_norm": 1e9, "reward_steps": 0, **given})


def value_alone(model, tokenizer, prompt, text):
    """The value after the end of a text, by a forward pass over nothing else."""
    tokens = tokenizer.encode(prompt) + tokenizer.encode(text) + [tokenizer.eos_token]
    return model(torch.tensor([tokens]))[0, -1]


@pytest.mark.parametrize("micro_batch", [1, 40, 10 ** 6])
def test_the_loss_and_its_gradient_are_those_of_bradley_and_terry_by_hand(model, tokenizer, micro_batch):
    pairs, params = comparisons(9), list(model.parameters())
    likelihoods, right = [], []
    for prompt, better, worse in pairs:
        a, b = (value_alone(model, tokenizer, prompt, text) for text in (better, worse))
        likelihoods.append(a.exp() / (a.exp() + b.exp()))
        right.append(float(a > b))
    loss = -sum(p.log() for p in likelihoods) / 9
    gradient = flatten(torch.autograd.grad(loss, params, materialize_grads=True))
    assert gradient.norm() > 1e-3 and {*right} == {0, 1}

    before, batch = flatten(params).detach(), to_batch(pairs, tokenizer, 32, CPU)
    for lr, step in (0.0, 0 * gradient), (1.0, gradient):
        found = fit_reward(model, batch, batch, batch, torch.optim.SGD(params, lr),
                           options(micro_batch=micro_batch))
        torch.testing.assert_close(before - flatten(params).detach(), step, rtol=1e-6, atol=1e-9)
        if lr == 0:
            assert found == pytest.approx({"loss": loss.item(), "accuracy": sum(right) / 9})


@pytest.mark.parametrize("contrary, best", [(False, 3), (True, 0)])
def test_the_best_pass_on_held_out_comparisons_counts(policy, tokenizer, contrary, best):
    """The last where they agree with those of the training, the first where they contradict them."""
    pairs, (model, later) = comparisons(64), (Critic(policy.config, policy).double() for _ in range(2))
    fitted, still = to_batch(pairs, tokenizer, 32, CPU), torch.optim.SGD([torch.zeros(1)], 0.0)
    others = [(prompt, *two[::-1 if contrary else 1]) for prompt, *two in pairs]
    heldout = to_batch(others, tokenizer, 32, CPU)
    found = fit_reward(model, fitted, heldout, fitted, torch.optim.SGD(model.parameters(), 0.02),
                       options(reward_steps=4))
    passes = []
    for _ in range(4):
        one = fit_reward(later, fitted, fitted, heldout, torch.optim.SGD(later.parameters(), 0.02), options())
        tested = fit_reward(copy.deepcopy(later), fitted, fitted, fitted, still, options())
        passes.append((one["loss"], tested["loss"], flatten(later.parameters()).detach()))
    assert min(range(4), key=lambda i: passes[i][0]) == best
    assert found["loss"] == pytest.approx(passes[best][1])  # on comparisons that did not choose
    torch.testing.assert_close(flatten(model.parameters()).detach(), passes[best][2])


def test_a_learned_reward_does_not_depend_on_padding_or_batch_mates(model, tokenizer):
    reward = learned_reward(model, tokenizer, config())
    texts = [" good", " bad bad film plot plot poor film", " fine film", ""]
    together = reward(["film"] * 4, texts)
    for text, number in zip(texts, together):
        assert reward(["film"], [text]) == pytest.approx([number], abs=1e-12)
        assert value_alone(model, tokenizer, "film", text).item() == pytest.approx(number, abs=1e-12)
    cut, = reward(["film"], [Text(" good", ended=False)])  # it is read at its last token
    assert cut != pytest.approx(together[0], abs=1e-3)
    long, = reward(["film"], [" good" * 99])  # cut to the context
    assert math.isfinite(long)


def test_the_fit_recovers_the_order_of_a_known_reward_on_held_out_prompts(policy, tokenizer, capsys):
    task = Task([], PROMPTS, ["x"], None, None, preferences=comparisons(600))
    model = learn_reward(task, policy, tokenizer, config(reward_steps=70, reward_lr=5e-3), generators())
    printed = capsys.readouterr().out
    loss, accuracy = (float(printed.split(name)[1].split()[0].strip(",")) for name in ("loss", "accuracy"))
    assert loss < 0.25 and accuracy > 0.9
    fresh, reward = comparisons(200, seed=1), learned_reward(model, tokenizer, config())
    prompts, better, worse = zip(*fresh)
    right = [a > b for a, b in zip(reward(prompts, better), reward(prompts, worse))]
    assert sum(right) > 0.9 * 200


def test_rewards_have_mean_0_and_spread_1_on_the_policys_own_completions(policy, tokenizer):
    task = Task([], PROMPTS, ["x"], None, None, preferences=comparisons(100))
    run = config(batch_size=500)
    model = learn_reward(task, policy, tokenizer, run, generators())
    assert not any(p.requires_grad for p in model.parameters())
    generator = torch.Generator().manual_seed(3)
    texts = complete(task, policy, policy, PROMPTS * 60, tokenizer, run, 1.0, generator)
    rewards = torch.tensor(learned_reward(model, tokenizer, config())(PROMPTS * 60, texts))
    assert rewards.mean().abs() < 0.1 and (rewards.std() - 1).abs() < 0.1


def test_an_annotator_decides_with_the_probability_that_it_gives():
    def preferences(prompt, first, second):
        return 0.8 if len(first) > len(second) else 0.2

    rng = random.Random(0)
    prompts = rng.choices(PROMPTS, k=4000)
    first, second = ([rng.choice(["a", "aa", "aaa"]) for _ in prompts] for _ in range(2))
    found = annotate(preferences, prompts, first, second, rng)
    kept = [(prompt, {a, b}) for prompt, a, b in zip(prompts, first, second) if a != b]
    assert [(prompt, {better, worse}) for prompt, better, worse in found] == kept
    longer = [len(better) > len(worse) for _, better, worse in found]
    assert sum(longer) / len(longer) == pytest.approx(0.8, abs=0.03)


def test_two_completions_of_the_same_prompt_are_compared(policy, tokenizer, monkeypatch):
    def complete(task, policy, reference, prompts, *args):
        return [f" {prompt} {i}" for i, prompt in enumerate(prompts)]

    def preferences(prompt, *two):
        seen.append((prompt, *two))
        return 0.5

    seen = []
    monkeypatch.setattr("reward.complete", complete)
    task = Task([], PROMPTS, ["x"], None, None, preferences=preferences)
    learn_reward(task, policy, tokenizer, config(comparisons=80, reward_steps=1), generators())
    assert [two for _, *two in seen] == [[f" {prompt} {2 * i}", f" {prompt} {2 * i + 1}"]
                                         for i, (prompt, *_) in enumerate(seen)]
    assert len(seen) == 80 and len({prompt for prompt, *_ in seen}) > 20


@pytest.mark.parametrize("returned, error, message", [
    (1.5, BadInput, "returned 1.5"), (-1, BadInput, "returned -1"),
    ("first", BadInput, "must return a number"),
    (math.nan, FloatingPointError, "finite")])
def test_what_is_no_probability_is_refused(returned, error, message):
    with pytest.raises(error, match=message):
        annotate(lambda *texts: returned, ["film"], ["a"], ["b"], random.Random(0))


LISTED = [("film", " good", " bad"), ("plot", " fine", " poor"), ("a", " good", " poor")]


@pytest.mark.parametrize("preferences, message", [
    ([], "list of"), ("film", "list of"), (7, "list of"), ([("film", " good")], "must be .prompt, better"),
    ([("film", " good", None)], "must be .prompt, better"),
    ([*LISTED, ("film", "a", "a")], "same text twice"),
    ([("film", " good", " bad")] * 9, "three different prompts")])
def test_unusable_preferences_are_refused(tmp_path, preferences, message):
    file = task_file(tmp_path, TASK.split("def reward")[0] + f"preferences = {preferences!r}")
    with pytest.raises(BadInput, match=message):
        load_task(str(file), 0)


@pytest.mark.parametrize("one, message", [
    (("film" * 40, " good", " bad"), "context"), (("film", " good" * 40, " bad"), "context"),
    (("film", " bad", " good" * 40), "context"), (("", " good", " bad"), "empty")])
def test_preferences_that_do_not_fit_are_refused(policy, tokenizer, one, message):
    task = Task([], PROMPTS, ["x"], None, None, preferences=[one, *LISTED])
    with pytest.raises(BadInput, match=message):
        learn_reward(task, policy, tokenizer, config(), generators())


def test_a_preference_fits_by_the_tokens_that_are_learned_from(tokenizer):
    """Prompt and text have tokens of their own: together, "go" and "od" would be one."""
    pair = ("film go", "od", "")
    n = len(tokenizer.encode("film go")) + len(tokenizer.encode("od")) + 1
    assert n > len(tokenizer.encode("film good")) + 1
    task = Task([], PROMPTS, ["x"], None, None, preferences=[pair, *LISTED])
    assert {*choose_comparisons(task, tokenizer, config(), n)} == {pair, *LISTED}
    with pytest.raises(BadInput, match=f"'film go' has {n} tokens"):
        choose_comparisons(task, tokenizer, config(), n - 1)


def test_two_tenths_of_the_comparisons_are_held_out_by_prompt(policy, tokenizer, monkeypatch):
    seen = []
    monkeypatch.setattr("reward.to_batch", lambda part, *args: seen.append(part) or to_batch(part, *args))
    listed = comparisons(300)
    task = Task([], PROMPTS, ["x"], None, None, preferences=listed)
    learn_reward(task, policy, tokenizer, config(reward_steps=1), generators())
    assert sorted(sum(seen, [])) == sorted(listed)
    assert 30 <= len(seen[1]) <= 60 and 30 <= len(seen[2]) <= 60
    prompts = [{prompt for prompt, *_ in part} for part in seen]
    assert sum(map(len, prompts)) == len({*PROMPTS})


@pytest.mark.parametrize("sizes, held_out", [
    ((200, 1, 1), {1}), ((1, 200, 1), {1}), ((100, 100, 100), {100}), ((1,) * 50, {5, 6}),
    ((30, 30, 1, 1), {2, 30}), ((1, 1, 1), {1}), ((50,) + (1,) * 50, {10, 11})])
def test_about_a_tenth_of_the_comparisons_is_held_out_whatever_the_prompts(sizes, held_out):
    listed = [(f"p{i}", "a", "b") for i, n in enumerate(sizes) for _ in range(n)]
    for seed in range(20):
        parts = hold_out(listed, [prompt for prompt, *_ in listed], seed)
        assert sorted(sum(parts, [])) == sorted(listed) and {*map(len, parts[1:])} <= held_out
        assert sum(len({prompt for prompt, *_ in part}) for part in parts) == len(sizes)


def test_of_a_long_list_comparisons_are_chosen_at_random(tokenizer):
    listed = sorted(comparisons(240))
    task = Task([], PROMPTS, ["x"], None, None, preferences=listed)
    one, other = (choose_comparisons(task, tokenizer, config(comparisons=40, seed=seed), 64)
                  for seed in (0, 1))
    assert len({*one}) == 40 and {*one} != {*other} and {*one, *other} <= {*listed}
    assert len({prompt for prompt, *_ in one}) > 15


def test_a_file_with_preferences_needs_no_reward(tmp_path):
    source = TASK.split("def reward")[0] + f"preferences = {LISTED!r}"
    task = load_task(str(task_file(tmp_path, source)), 0)
    assert task.preferences == LISTED and task.reward is None and task.metric is None
    task = use_reward_model(task, object(), None, None)
    assert task.metric is task.reward and task.true_reward is None
    task = load_task(str(task_file(tmp_path, TASK + f"preferences = {LISTED!r}")), 0)
    learned = use_reward_model(task, object(), None, None)
    assert learned.true_reward is task.reward is learned.metric is not learned.reward
    assert train.metric_name(learned) == "true reward"  # "reward" is the learned one
    with pytest.raises(BadInput, match="no reward model"):
        use_reward_model(task, None, None, None)


def test_the_built_in_annotator_prefers_kind_words_and_grammar():
    task = load_task("preferences", 0)
    prefer = lambda first, second: task.preferences("the plot was", first, second)
    assert prefer(" superb.", " dull.") == pytest.approx(1 / (1 + math.exp(-3)))
    assert prefer(" dull.", " superb.") == pytest.approx(1 / (1 + math.exp(3)))
    assert prefer(" superb.", " witty.") == 0.5
    assert task.reward("the plot was", " superb superb") == -1 != task.reward("the plot was", " superb.")
    assert load_task("reviews", 0).prompts == task.prompts


# Runs.

SOURCE = TASK.replace('"the dog"]', '"the dog", "the mat"]') + """
def metric(prompt, completion):
    return float("cat" in completion)

def preferences(prompt, first, second):
    return 0.9 if first.count("o") > second.count("o") else 0.1
"""
OPTIONS = [*TINY, *SMALL, "--comparisons", "200", "--reward-steps", "6"]


def go(out, *options):
    return train.main([*OPTIONS, "--task", str(out / "mine.py"), "--out", str(out), *map(str, options)])


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A directory with a run of four iterations, and one of two of which another two are resumed."""
    out = tmp_path_factory.mktemp("runs")
    task_file(out, SOURCE)
    assert go(out, "--iterations", 4, "--name", "whole") is None
    assert go(out, "--iterations", 2, "--name", "resumed") is None
    (out / "first.pt").write_bytes((out / "resumed" / "checkpoint.pt").read_bytes())
    resume = ["--resume", out / "resumed", "--task", out / "mine.py", "--iterations", "4"]
    assert train.main(list(map(str, resume))) is None
    return out


def states(path):
    policy, _, _, more = load_checkpoint(path)
    return flatten(policy.parameters()), more["reward_model"].state_dict()


def test_the_reward_model_is_frozen_to_the_bit_and_a_resumed_run_is_the_whole_one(out):
    (early_policy, early), (policy, late), (whole_policy, whole) = map(
        states, (out / "first.pt", out / "resumed", out / "whole"))
    assert not torch.equal(early_policy, policy)
    assert torch.equal(policy, whole_policy)
    for name in early:
        assert torch.equal(early[name], late[name]) and torch.equal(early[name], whole[name]), name
    assert late["value_head.weight"].any()
    assert rows(out / "resumed") == rows(out / "whole")


def test_a_run_reports_the_true_reward_and_never_trains_on_it(out):
    task_file(out, SOURCE.replace("len(completion) / 10", "-7"), "other.py")
    assert go(out, "--iterations", 4, "--name", "other", "--task", out / "other.py") is None
    assert torch.equal(states(out / "other")[0], states(out / "whole")[0])
    whole, other = rows(out / "whole"), rows(out / "other")
    assert {row.pop("true_reward") for row in other} == {"-7"}
    lengths = [row.pop("true_reward") for row in whole]
    assert "-7" not in lengths and whole == other
    results = json.loads((out / "whole" / "result.json").read_text())["after"]
    samples = [json.loads(line) for line in (out / "whole" / "samples-4.jsonl").read_text().splitlines()]
    assert results["true_reward"] == pytest.approx(sum(len(s["completion"]) for s in samples) / 160)


def test_eval_knows_the_learned_reward(out, capsys):
    task = str(out / "mine.py")
    assert train.main(["--eval", str(out / "whole"), "--task", task]) is None
    printed = capsys.readouterr().out
    after = json.loads((out / "whole" / "result.json").read_text())["after"]
    for label, name in (("reward  ", "reward"), ("true reward  ", "true_reward")):
        line, = [line for line in printed.splitlines() if line.startswith(label)]
        assert float(line.split()[-1]) == pytest.approx(after[name], abs=6e-4)


# The study.

def test_the_law_is_fitted_by_least_squares():
    d = [0.1 * i for i in range(40)]
    for form in (lambda x: x, torch.log):
        gain = [0.0] + [x * (1.5 - 0.4 * form(torch.tensor(x)).item()) for x in d[1:]]
        alpha, beta, error = study.law(d, [0.3 + g for g in gain], form)
        assert (alpha, beta, error) == pytest.approx((1.5, 0.4, 0), abs=1e-4)


def test_the_turn_is_where_the_smoothed_true_reward_is_highest():
    true = [0, 0, 1, 1, 1, 0, 0, 5, 0, -1, -1, -1]
    row = study.turn(list(range(12)), [i / 10 for i in range(12)], true)
    assert row["best true"] == pytest.approx(5 / 3) and row["at √KL"] in (6, 7, 8)
    assert row["true at √KL = 1"] == pytest.approx(1 / 3)
    assert row["last true"] == -1 and row["last √KL"] == 10 and row["last learned"] == pytest.approx(1.0)


def test_best_of_n_is_chosen_by_the_learned_reward(out):
    best = study.best_of(out / "whole", 0, (1, 4, 16), task=str(out / "mine.py"))
    learned = [best[n][0] for n in (1, 4, 16)]
    assert learned == sorted(learned) and learned[2] > learned[0] + 0.5
    assert all(true >= 0 for _, true in best.values())
