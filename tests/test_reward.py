"""Rewards and their pieces, the grammars, the built-in tasks, task files, and scoring."""

import itertools
import math
import random
import sys
import traceback

import numpy as np
import pytest
import torch

from helpers import TASK, task_file
from reward import (BAD, GOOD, HATED, LOVED, REVIEWS, TASKS, BadTask, Grammar, Text, accuracy, batched,
                    careless_sum, contains, distinct_n, fluency, length, load_task, opinion, repetition,
                    score, words)


# Pieces.

def test_text_is_a_string_that_carries_attributes():
    prompt = Text("7+5=", answer="12")
    assert prompt == "7+5=" and prompt.answer == "12" and {prompt: 1}["7+5="] == 1


def test_words_are_lower_case_and_chinese_and_japanese_characters_are_words():
    assert words("Don't stop, naïve CAT-5!") == ["don", "t", "stop", "naïve", "cat", "5"]
    assert words("春眠 不覺曉, ok") == ["春", "眠", "不", "覺", "曉", "ok"]
    assert words("ひらカナ") == ["ひ", "ら", "カ", "ナ"]
    assert words(" ,. ") == []


def test_distinct_n_counts_by_hand():
    assert distinct_n(["a b a b", "b a"], 1) == 2 / 6  # a, b of six words
    assert distinct_n(["a b a b", "b a"], 2) == 2 / 4  # ab ba ab | ba: no pair across texts
    assert distinct_n(["a", ""], 2) == 1.0


def test_repetition_is_the_share_of_repeated_pairs():
    assert repetition("a b", "a b a b") == pytest.approx(1 / 3)
    assert repetition("a b", "c d e") == repetition("", "") == 0.0


def test_contains_ignores_case_and_the_prompt():
    assert contains("Hello")("", "Oh HELLO!") == contains("hell")("", "hello") == 1.0
    assert contains("hello")("hello", "hi there") == 0.0


def test_length_falls_linearly_from_its_target():
    assert [length(4)("", "w " * n) for n in (0, 2, 4, 6, 8, 20)] == [0, 0.5, 1, 0.5, 0, 0]


def test_fluency_is_carried_by_the_completion():
    assert fluency("", Text("abc", fluency=-1.5)) == -1.5


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


@pytest.mark.parametrize("text", [
    "the acting was superb.", "i found the plot rather dull at times, and we loved the music.",
    "critics called the camera bold and cold, but the plot of this film was lazy, yet i hated the cast."])
def test_a_review_is_grammatical(text):
    grammar = Grammar(REVIEWS)
    assert all(grammar.grammatical(text[:i], text[i:]) == 1.0 for i in range(len(text)))


@pytest.mark.parametrize("text", [
    "", ".", "the acting was superb", "the acting was superb. ", "The acting was superb.",
    "the acting was superb superb.", "the acting was very.", "the acting was superb and.",
    "the acting was superb, and.", "the acting was, superb.", "the acting was superb, the plot was dull.",
    "the acting was superb and the plot was dull.",
    "i found the acting superb, and i found the plot dull, but i loved the cast, yet we hated the sound."])
def test_not_a_review_is_not_grammatical(text):
    assert Grammar(REVIEWS).grammatical("", text) == 0.0


# The built-in tasks.

@pytest.fixture(scope="module", params=TASKS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def task(name):
    return TASKS[name](0)


def test_heldout_prompts_are_disjoint_from_training_prompts(task):
    assert task.prompts and task.heldout
    assert len({*task.prompts, *task.heldout}) == len(task.prompts) + len(task.heldout)


def test_a_task_is_a_function_of_its_seed(name, task):
    again, other = TASKS[name](0), TASKS[name](1)
    assert (again.corpus, again.prompts, again.heldout) == (task.corpus, task.prompts, task.heldout)
    assert other.corpus != task.corpus and set(other.heldout) != set(task.heldout)


def test_every_training_prompt_opens_a_text_of_the_corpus(name, task):
    openings = {text[:i] for text in task.corpus for i in range(len(text))}
    assert openings.issuperset(task.prompts)
    if name == "addition":
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


@pytest.mark.parametrize("completion, reward", [
    ("", 0), (" good.", 0), (" superbly.", 0), (" superb.", 0.5), (" dull.", -0.5), (" superb and dull.", 0),
    (" superb, and i loved the plot.", 1), (" superb superb superb superb", 1), (" dull awful cold", -1)])
def test_opinion_counts_the_words_of_the_completion(completion, reward):
    assert opinion("the superb plot was", completion) == reward


def test_careless_sums_lack_the_carry_in_60_percent_of_the_cases():
    rng = random.Random(0)
    for a, b in itertools.product(range(100), repeat=2):
        assert a + b - careless_sum(a, b, rng) in ((0, 10) if a % 10 + b % 10 >= 10 else (0,))
    task = TASKS["addition"](0)
    assert len(task.corpus) == 5 * len(task.prompts) == 45_000 and len(task.heldout) == 1000
    forgotten = []
    for text in task.corpus:
        problem, answer = text.split("=")
        a, b = map(int, problem.split("+"))
        if a % 10 + b % 10 >= 10:
            forgotten.append(int(answer) == a + b - 10)
        else:
            assert int(answer) == a + b
    assert sum(forgotten) / len(forgotten) == pytest.approx(0.6, abs=5 * math.sqrt(0.24 / len(forgotten)))


def test_addition_prompts_carry_the_sum():
    task = TASKS["addition"](0)
    answers = {str(prompt): prompt.answer for prompt in task.prompts + task.heldout}
    assert answers == {f"{a}+{b}=": str(a + b) for a in range(100) for b in range(100)}


@pytest.mark.parametrize("completion", ["85", "75", "", "085", " 85", "85 ", "850"])
def test_accuracy_accepts_the_answer_alone(completion):
    assert accuracy(Text("27+58=", answer="85"), completion) == (completion == "85")


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


def test_a_python_file_is_a_task(load):
    task = load(TASK)
    assert task.prompts == ["the cat", "the dog"] and task.heldout == ["the"] and len(task.corpus) == 60
    assert task.reward("the", "four") == 0.4 and task.metric is task.reward
    task = load(TASK + "corpus = 'a whole book'\ndef metric(prompt, completion): return 7")
    assert task.corpus == ["a whole book"] and task.metric("", "") == 7
    assert load(TASK.replace("corpus", "other")).corpus == []


def test_a_task_file_may_import_its_neighbours(load, tmp_path):
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
    with pytest.raises(BadTask, match=says) as e:
        load(source)
    assert "mine.py" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("source, error, line", [
    ("x = 1\n\nopen('/nowhere/book.txt')", FileNotFoundError, 3), ("x = 1\nimport nowhere", ImportError, 2),
    ("def f():\n    raise ValueError('no')\nf()", ValueError, 2)])
def test_an_error_in_a_file_keeps_its_traceback(load, source, error, line):
    with pytest.raises(error) as e:
        load(source)
    where = [frame for frame in traceback.extract_tb(e.tb) if frame.filename.endswith("mine.py")]
    assert where[-1].lineno == line


def test_a_task_that_does_not_exist_is_refused(tmp_path):
    for name in ("chess", str(tmp_path / "chess.py"), str(tmp_path)):
        with pytest.raises(BadTask, match="there is no task"):
            load_task(name, 0)


# Scores.

@pytest.mark.parametrize("value", [True, 3, np.float32(0.5), np.int64(2), torch.tensor(0.25)])
def test_any_real_number_is_a_score(value):
    scores = score(lambda prompt, completion: value, ["a", "b"], ["x", "y"])
    assert scores == [float(value)] * 2 and all(type(x) is float for x in scores)


def test_a_reward_gets_prompt_and_completion():
    assert score(lambda p, c: len(c) - int(p.answer), [Text("a", answer="2")], ["xyz"]) == [1.0]


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor])
def test_a_batched_reward_gets_two_lists(kind):
    @batched
    def lengths(prompts, completions):
        assert prompts == ["a", "b"] and isinstance(completions, list)
        return kind([len(c) for c in completions])
    assert score(lengths, ("a", "b"), ("xyz", "")) == [3.0, 0.0]


@pytest.mark.parametrize("value", [None, "good", [0.5, 0.5], torch.ones(2), np.ones(2), 1j, 10 ** 400])
def test_a_score_that_is_no_number_is_refused(value):
    values = {"fine": 0.0, "wow\n": value}
    with pytest.raises(BadTask, match="must return a number") as e:
        score(lambda p, c: values[c], ["a", "b"], ["fine", "wow\n"])
    assert "the prompt 'b' and the completion 'wow\\n'" in str(e.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_a_score_that_is_not_finite_is_an_arithmetic_error(value):
    with pytest.raises(FloatingPointError, match="must return a finite number") as e:
        score(batched(lambda p, c: [0.0, value]), ["a", "b"], ["fine", "wow"])
    assert "the prompt 'b' and the completion 'wow'" in str(e.value)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0, 3.0]])
def test_a_batch_without_a_score_for_each_is_refused(values):
    with pytest.raises(BadTask, match=f"returned {len(values)} numbers for 2 completions"):
        score(batched(lambda p, c: values), ["a", "b"], ["x", "y"])


@pytest.mark.parametrize("whole_batch", [False, True])
def test_an_error_in_a_reward_keeps_its_traceback_and_names_the_texts(whole_batch, capsys):
    def mine(prompt, completion):
        return {"x": 1}[completion]

    def mine_batched(prompts, completions):
        return [mine(*pair) for pair in zip(prompts, completions)]
    function = batched(mine_batched) if whole_batch else mine
    with pytest.raises(KeyError) as e:
        score(function, [Text("b"), Text("a")], [Text("x"), Text("y\ny")])
    assert traceback.extract_tb(e.tb)[-1].name == "mine"
    note = "it came with the prompt 'a' and the completion 'y\\ny'"
    if whole_batch:  # which one failed is unknown
        note = "it came with the prompt ['b', 'a'] and the completion ['x', 'y\\ny']"
    if sys.version_info >= (3, 11):
        assert e.value.__notes__ == [note]
    else:
        assert capsys.readouterr().err == note + "\n"
