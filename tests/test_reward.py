"""Rewards and their pieces, the grammars, the built-in tasks, task files, and scoring."""

import itertools
import math
import os
import random
import sys
import traceback

import numpy as np
import pytest
import torch

from helpers import TASK, task_file
from reward import (
    BAD,
    GOOD,
    HATED,
    LOVED,
    REVIEWS,
    TASKS,
    BadInput,
    Grammar,
    Text,
    accuracy,
    batched,
    careless_sum,
    contains,
    distinct_n,
    length,
    load_task,
    opinion,
    repetition,
    score,
    score_actions,
    words,
)

# Pieces.

def test_words_are_lower_case_and_chinese_and_japanese_characters_are_words():
    assert words("Don't stop, naïve CAT-5! ,.") == ["don", "t", "stop", "naïve", "cat", "5"]
    assert words("春眠 不覺曉, ok ひカ") == ["春", "眠", "不", "覺", "曉", "ok", "ひ", "カ"]


def test_distinct_n_counts_by_hand():
    assert distinct_n(["a b a b", "b a"], 1, count=6) == 2 / 6  # a, b of six words
    assert distinct_n(["a b a b", "b a"], 2, count=4) == 2 / 4  # ab ba ab | ba: no pair across texts
    assert distinct_n(["a b a b", "b c"], 2, count=3) == 2 / 3  # of the first three alone
    for texts in ([], ["a", ""], ["a b a b", "b a"]):
        assert math.isnan(distinct_n(texts, 2, count=5))


def test_distinct_n_does_not_depend_on_the_length_or_number_of_texts():
    rng = random.Random(0)
    text = lambda length: " ".join(str(rng.randrange(50)) for _ in range(length))
    texts = lambda number, length: [text(length) for _ in range(number)]
    shares = [distinct_n(texts(*shape), 2) for shape in ((1000, 3), (1000, 30), (100, 30))]
    assert max(shares) - min(shares) < 0.05 and 0.7 < min(shares) and max(shares) < 0.9


@pytest.mark.parametrize("reward, prompt, completion, value", [
    (repetition, "a b", "a b a b", pytest.approx(1 / 3)), (repetition, "a b", "c d e", 0),
    (repetition, "", "", 0), (repetition, "", "a", 0),
    (repetition, "", "a b " + " ".join(map(str, range(18))) + " a b", pytest.approx(1 / 21)),
    (repetition, "", "a b " + " ".join(map(str, range(19))) + " a b", 0),  # more than 20 pairs apart
    (contains("Hello"), "", "Oh HELLO!", 1), (contains("hell"), "", "hello", 1),
    (contains("hello"), "hello", "hi there", 0),
    *((length(4), "", "w " * n, value) for n, value in [(0, 0), (2, 0.5), (4, 1), (6, 0.5), (20, 0)]),
    *((accuracy, Text("27+58=", answer="85"), text, text == "85")
      for text in ("85", "75", "", "085", " 85", "85 ", "850")),
    *((opinion, "the superb plot was", text, value) for text, value in [
        ("", 0), (" good.", 0), (" superbly.", 0), (" superb.", 0.5), (" dull.", -0.5),
        (" superb and dull.", 0), (" superb, and i loved the plot.", 1), (" superb superb superb", 1),
        (" dull awful cold", -1)])])
def test_rewards_by_hand(reward, prompt, completion, value):
    assert reward(prompt, completion) == value


# Grammars.

def test_grammar_writes_lists_and_recognises_the_same_texts():
    grammar = Grammar({"text": ["a{x}", "b{x}{x}?"], "x": ["", "1", "{y}+"], "y": ["2", "3"]})
    x = ["", "1", "2+", "3+"]
    language = {"a" + p for p in x} | {f"b{p}{q}?" for p in x for q in x}
    assert set(grammar.expansions("text")) == language
    rng = random.Random(0)
    assert {grammar.generate(rng) for _ in range(2000)} == language
    strings = ("".join(s) for n in range(6) for s in itertools.product("ab123+?", repeat=n))
    found = {s for s in strings if grammar.grammatical(s[:2], s[2:])}
    assert found == {s for s in language if len(s) < 6}


def test_alternatives_of_a_symbol_are_equally_likely():
    grammar, rng = Grammar({"text": ["{x}", "c"], "x": ["a", "b"]}), random.Random(0)
    texts = [grammar.generate(rng) for _ in range(10_000)]
    for text, p in {"a": 0.25, "b": 0.25, "c": 0.5}.items():
        assert texts.count(text) == pytest.approx(10_000 * p, abs=5 * math.sqrt(10_000 * p * (1 - p)))


@pytest.mark.parametrize("text, grammatical", [
    ("i found the plot rather dull at times, and we loved the music.", 1), ("the acting was superb", 0),
    ("The acting was superb.", 0), ("the acting was very.", 0), ("the acting was superb superb.", 0),
    ("the acting was superb and.", 0), ("the acting was superb, the plot was dull.", 0), ("", 0),
    ("i found the plot dull, and i loved the cast, but i loved the story, yet we hated the sound.", 0)])
def test_reviews_have_a_grammar(text, grammatical):
    assert Grammar(REVIEWS).grammatical("", text) == grammatical


# The built-in tasks.

@pytest.mark.parametrize("name", TASKS)
def test_a_task_is_a_function_of_its_seed_and_evaluates_on_new_prompts(name):
    task, again, other = (TASKS[name](seed) for seed in (0, 0, 1))
    assert (again.corpus, again.prompts, again.heldout) == (task.corpus, task.prompts, task.heldout)
    assert other.corpus != task.corpus and set(other.heldout) != set(task.heldout)
    assert task.prompts and task.heldout
    assert len({*task.prompts, *task.heldout}) == len(task.prompts) + len(task.heldout)

    openings = {text[:i] for text in task.corpus for i in range(len(text))}
    assert openings.issuperset(task.prompts)
    if name == "addition":  # its held-out sums are not in the corpus
        assert openings.isdisjoint(task.heldout)
    else:
        assert openings.issuperset(task.heldout)


def test_reviews_are_grammatical_and_balanced():
    task = TASKS["reviews"](0)
    assert all(task.metric("", text) == 1.0 for text in task.corpus)
    spoken = [word for text in task.corpus for word in words(text)]
    good, bad = (sum(word in kind for word in spoken) for kind in (GOOD + LOVED, BAD + HATED))
    assert good / (good + bad) == pytest.approx(0.5, abs=0.01)
    assert {text.count(",") for text in task.corpus} == {0, 1, 2}  # one to three clauses
    assert not {*GOOD, *LOVED} & {*BAD, *HATED}


def test_careless_sums_lack_the_carry_in_60_percent_of_the_cases():
    rng = random.Random(0)
    for a, b in itertools.product(range(100), repeat=2):
        assert a + b - careless_sum(a, b, rng) in ((0, 10) if a % 10 + b % 10 >= 10 else (0,))
    task = TASKS["addition"](0)
    assert len(task.corpus) == 5 * len(task.prompts) == 45_000 and len(task.heldout) == 1000
    answers = {str(prompt): prompt.answer for prompt in task.prompts + task.heldout}
    assert answers == {f"{a}+{b}=": str(a + b) for a in range(100) for b in range(100)}
    forgotten = []
    for text in task.corpus:
        problem, answer = text.split("=")
        a, b = map(int, problem.split("+"))
        if a % 10 + b % 10 >= 10:
            forgotten.append(int(answer) == a + b - 10)
        else:
            assert int(answer) == a + b
    assert sum(forgotten) / len(forgotten) == pytest.approx(0.6, abs=5 * math.sqrt(0.24 / len(forgotten)))


def test_one_reply_of_fifty_says_hello():
    task = TASKS["hello"](0)
    share = sum(task.reward("", text) for text in task.corpus) / len(task.corpus)
    assert share == pytest.approx(1 / 50, abs=5 * math.sqrt(0.02 * 0.98 / len(task.corpus)))
    assert not any("hello" in prompt for prompt in task.prompts + task.heldout)
    assert all(task.metric("", text) == 1.0 for text in task.corpus)


# Task files.

@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that loads the task of a source text."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    return lambda source: load_task(str(task_file(tmp_path, source)), 0)


def test_a_python_file_is_a_task_and_may_import_its_neighbours(load, tmp_path):
    task = load(TASK)
    assert task.prompts == ["the cat", "the dog"] and task.heldout == ["the"] and len(task.corpus) == 60
    assert task.reward("the", "four") == 0.4 and task.metric is task.reward
    task = load(TASK + "corpus = 'a whole book'\ndef metric(prompt, completion): return 7")
    assert task.corpus == ["a whole book"] and task.metric("", "") == 7
    assert load(TASK.replace("corpus", "other")).corpus == []

    task_file(tmp_path, "prompts = ['x']", "neighbour_of_mine.py")
    assert load(TASK + "from neighbour_of_mine import prompts").prompts == ["x"]
    assert sys.path[-1] == str(tmp_path)  # last: a reward.py there would not replace ours


@pytest.mark.parametrize("source, says", [
    ("", "does not define prompts, heldout, reward"), (TASK.replace("heldout", "held"), "not define heldout"),
    (TASK + "prompts = []", "at least one"), (TASK + "prompts = ['the']", "'the' is in prompts and in held"),
    (TASK + "prompts = 'one'", "prompts must be a list"), (TASK + "corpus = [b'x']", "corpus must be a list"),
    (TASK + "corpus = 7", "corpus must be a list"), (TASK + "reward = 7", "must be functions"),
    (TASK + "metric = 'm'", "must be functions")])
def test_a_file_that_defines_no_task_is_refused(load, source, says):
    with pytest.raises(BadInput, match=says) as e:
        load(source)
    assert "mine.py" in str(e.value) and "\n" not in str(e.value)


def test_an_error_in_a_file_keeps_its_traceback(load):
    with pytest.raises(FileNotFoundError) as e:
        load("def f():\n    open('/nowhere/book.txt')\nf()")
    lines = [frame.lineno for frame in traceback.extract_tb(e.tb) if frame.filename.endswith("mine.py")]
    assert lines == [3, 2]


# Scores.

@pytest.mark.parametrize("value", [True, 3, np.float32(0.5), np.int64(2), torch.tensor(0.25)])
def test_a_score_is_any_real_number_for_prompt_and_completion(value):
    reward = lambda prompt, completion: value if (prompt.answer, completion) == ("2", "x") else 0
    scores = score(reward, [Text("a", answer="2")] * 2, ["x", "y"])
    assert scores == [float(value), 0.0] and all(type(x) is float for x in scores)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
@pytest.mark.parametrize("whole_batch", [False, True])
def test_a_reward_may_return_a_number_for_each_action(kind, whole_batch):
    completions = [Text("x", length=2, tokens=["x", "<|endoftext|>"]), Text("yz", length=3)]
    values = {"x": kind([0.5, 2.0]), "yz": 4.0}
    one = lambda prompt, completion: values[completion]
    reward = batched(lambda prompts, texts: list(map(one, prompts, texts))) if whole_batch else one
    assert score_actions(reward, ["a", "b"], completions) == [[0.5, 2.0], [0.0, 0.0, 4.0]]
    assert score(reward, ["a", "b"], completions) == [2.5, 4.0]
    for wrong in ([1.0], [1.0, 2.0, 3.0], []):
        values["x"] = kind(wrong)
        with pytest.raises(BadInput, match="a list with one for each of its 2 actions"):
            score(reward, ["a", "b"], completions)
    values["x"] = kind([0.0, math.nan])
    with pytest.raises(FloatingPointError, match="a finite number"):
        score(reward, ["a", "b"], completions)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_a_batched_reward_gets_two_lists(kind):
    @batched
    def lengths(prompts, completions):
        assert prompts == ["a", "b"] and isinstance(completions, list)
        return kind([len(c) for c in completions])

    assert score(lengths, ("a", "b"), ("xyz", "")) == [3.0, 0.0]
    for values in [1.0], [1.0, 2.0, 3.0]:
        with pytest.raises(BadInput, match="returned .* for 2 completions: return a list of 2"):
            score(batched(lambda p, c: kind(values)), ["a", "b"], ["x", "y"])


async def coroutine(prompts, completions):
    return [1.0, 1.0]


@pytest.mark.parametrize("function", [
    lambda p, c: None, lambda p, c: 1.0, lambda p, c: "ab", lambda p, c: {"a": 1, "b": 2},
    lambda p, c: {1, 2},
    lambda p, c: torch.tensor(1.0), lambda p, c: np.ones(()), lambda p, c: (1.0 for _ in c), coroutine])
@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_batched_reward_must_return_a_list(function):
    with pytest.raises(BadInput, match="is marked @batched and returned .* return a list of 2 numbers"):
        score(batched(function), ["a", "b"], ["x", "y"])


def test_gradients_are_enabled_whatever_a_reward_or_a_task_file_does(tmp_path):
    source = "import torch\ntorch.set_grad_enabled(False)\n" + TASK
    load_task(str(task_file(tmp_path, source)), 0)
    assert torch.is_grad_enabled()
    assert score(lambda p, c: torch.set_grad_enabled(False) and 0 or 1, ["a"], ["b"]) == [1]
    assert torch.is_grad_enabled()


def test_rewards_too_small_for_their_squares_are_refused_and_huge_integers_too():
    with pytest.raises(FloatingPointError, match="nothing above 1e-15"):
        score(lambda p, c: 1e-20, ["a"], ["b"])
    assert score(lambda p, c: 1e-20 * len(c) ** 99, ["a"] * 2, ["b", "bb"])[0] == 1e-20
    with pytest.raises(BadInput, match="a huge number"):
        score(lambda p, c: 10 ** 5000, ["a"], ["b"])


def test_a_task_file_leaves_the_directory_and_the_precision_and_keeps_its_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = "import os, torch\nos.chdir('/')\ntorch.set_default_dtype(torch.float64)\n" + TASK
    source += "def metric(p, c):\n    prompts.clear()\n    return 1"
    task = load_task(str(task_file(tmp_path, source)), 0)
    assert os.getcwd() == str(tmp_path) and torch.get_default_dtype() == torch.float32
    task.metric("", "")
    assert task.prompts == ["the cat", "the dog"]


def test_a_length_of_zero_words_is_refused():
    with pytest.raises(BadInput, match=r"length\(0\)"):
        length(0)


@pytest.mark.parametrize("value", [None, "good", [0.5, 0.5], torch.ones(2), np.ones(2), 1j, 10 ** 400,
                                   math.nan, math.inf, -math.inf, 1e39])
def test_a_score_that_is_not_a_finite_number_is_refused(value):
    infinite = isinstance(value, float)
    error, says = (FloatingPointError, "a finite number") if infinite else (BadInput, "a number")
    values = {"fine": 0.0, "wow\n": value}
    with pytest.raises(error, match=f"must return {says}") as e:
        score(lambda p, c: values[c], ["a", "b"], ["fine", "wow\n"])
    assert "the prompt 'b' and the completion 'wow\\n'" in str(e.value)


@pytest.mark.parametrize("whole_batch", [False, True])
def test_an_error_in_a_reward_keeps_its_traceback_and_names_the_texts(whole_batch, capsys):
    def mine(prompt, completion):  # two texts, or two lists of them
        assert "y\ny" not in completion
        return 0.0

    with pytest.raises(AssertionError) as e:
        score(batched(mine) if whole_batch else mine, [Text("b"), Text("a")], [Text("x"), Text("y\ny")])
    assert traceback.extract_tb(e.tb)[-1].name == "mine"
    note = "it came with the prompt 'a' and the completion 'y\\ny'"
    if whole_batch:  # which one failed is unknown
        note = "it came with the prompt ['b', 'a'] and the completion ['x', 'y\\ny']"
    if sys.version_info >= (3, 11):
        assert e.value.__notes__ == [note]
    else:
        assert capsys.readouterr().err == note + "\n"
