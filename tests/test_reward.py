import math
import random
import re
import sys

import numpy as np
import pytest
import torch

from reward import (BAD, GOOD, HATED, LOVED, REVIEWS, SMALL_TALK, TASKS, BadTask, Grammar, Text, accuracy, batched, careless_sum, contains,
                    distinct_n, fluency, length, load_task, opinion, repetition, score, words)


@pytest.fixture(scope="module", params=TASKS)
def task(request):
    return TASKS[request.param](0)


def test_prompts_never_overlap(task):
    assert not set(task.prompts) & set(task.heldout)
    assert len(set(task.prompts)) == len(task.prompts) and len(set(task.heldout)) == len(task.heldout)


def test_a_task_is_its_seed(task, request):
    name = request.node.callspec.params["task"]
    again, other = TASKS[name](0), TASKS[name](1)
    assert again.corpus == task.corpus and again.prompts == task.prompts and again.heldout == task.heldout
    assert other.corpus != task.corpus and set(other.heldout) != set(task.heldout)


def test_the_corpus_scores_as_its_own_language(task):
    if task.metric.__name__ == "grammatical":
        assert all(task.metric(text[:7], text[7:]) == 1.0 for text in task.corpus[:500])


def test_every_prompt_opens_a_text_of_the_corpus():
    for name in ("reviews", "hello"):
        task = TASKS[name](0)
        texts = "\n" + "\n".join(task.corpus)
        assert all("\n" + prompt in texts for prompt in task.prompts + task.heldout)


# Grammar.

def test_grammar_lists_writes_and_reads_one_language():
    grammar = Grammar({"text": ["a{x}", "b{x}{x}?"], "x": ["", "1", "{y}+"], "y": ["2", "3"]})
    texts = grammar.expansions("text")
    assert sorted(texts) == sorted(["a", "a1", "a2+", "a3+"] + [f"b{x}{z}?" for x in ("", "1", "2+", "3+") for z in ("", "1", "2+", "3+")])
    rng = random.Random(0)
    assert {grammar.generate(rng) for _ in range(2000)} == set(texts)
    alphabet = "ab123+?"
    for n in range(4):  # every short string: the ones that parse are the ones listed
        for k in range(len(alphabet) ** n):
            s = "".join(alphabet[k // len(alphabet) ** i % len(alphabet)] for i in range(n))
            assert grammar.grammatical("", s) == float(s in texts), s


@pytest.mark.parametrize("text", [
    "the acting was superb", "the acting was superb. ", "The acting was superb.", "the acting was superb superb.",
    "the acting was very.", "the acting was superb and.", "the acting was superb, and.", "the acting was, superb.",
    "the acting was superb and the plot was dull.", "the acting was superb, the plot was dull.", "", ".",
    "i found the acting superb, and i found the plot dull, but i loved the cast, yet we hated the sound."])
def test_not_a_review(text):
    assert Grammar(REVIEWS).grammatical("", text) == 0.0


@pytest.mark.parametrize("text", [
    "the acting was superb.", "i found the plot rather dull at times, and we loved the music.",
    "critics called the camera bold and cold, but the plot of this film was lazy, yet to me the sound was quite witty."])
def test_a_review(text):
    assert Grammar(REVIEWS).grammatical("", text) == 1.0


def test_reviews_are_rich_and_balanced():
    task = TASKS["reviews"](0)
    words = set(re.findall(r"\w+", " ".join(task.corpus)))
    assert len(words) > 100
    good = sum(w in GOOD + LOVED for text in task.corpus for w in re.findall(r"\w+", text))
    bad = sum(w in BAD + HATED for text in task.corpus for w in re.findall(r"\w+", text))
    assert good / (good + bad) == pytest.approx(0.5, abs=0.01)
    assert {1 + text.count(",") for text in task.corpus} == {1, 2, 3}  # clauses
    assert not set(GOOD + LOVED) & set(BAD + HATED)


@pytest.mark.parametrize("completion, score", [
    (" superb.", 0.5), (" dull.", -0.5), (" superb and dull.", 0), (" superb, and i loved the plot.", 1), (" good.", 0), ("", 0),
    (" superb superb superb superb", 1), (" dull awful cold", -1), (" superbly.", 0)])
def test_opinion(completion, score):
    assert opinion("the superb plot was", completion) == score  # the prompt does not count


# Addition.

def test_the_careless_pupil():
    rng = random.Random(0)
    for a in range(100):
        for b in range(100):
            assert a + b - careless_sum(a, b, rng) in ((0, 10) if a % 10 + b % 10 >= 10 else (0,))
    forgets = sum(careless_sum(27, 58, rng) == 75 for _ in range(10_000)) / 10_000
    assert forgets == pytest.approx(0.6, abs=0.02)


def test_addition_split():
    task = TASKS["addition"](0)
    assert len(task.prompts) == 9000 and len(task.heldout) == 1000
    assert not {text.split("=")[0] + "=" for text in task.corpus} & set(task.heldout)  # nor was one ever imitated
    answers = {prompt: prompt.answer for prompt in task.prompts + task.heldout}
    assert all(answers[f"{a}+{b}="] == str(a + b) for a in range(100) for b in range(100))
    right = sum(answers[text.partition("=")[0] + "="] == text.partition("=")[2] for text in task.corpus) / len(task.corpus)
    assert right == pytest.approx(1 - 0.45 * 0.6, abs=0.01)


@pytest.mark.parametrize("completion, score", [("85", 1), ("75", 0), ("", 0), ("085", 0), (" 85", 0), ("85 ", 0), ("850", 0)])
def test_accuracy(completion, score):
    assert accuracy(Text("27+58=", answer="85"), completion) == score


# Hello.

def test_hello_is_rare():
    task = TASKS["hello"](0)
    assert 0.01 < sum(task.reward("", text) for text in task.corpus) / len(task.corpus) < 0.04
    assert contains("hello")("hello", "hi there") == 0.0 and contains("Hello")("", "Oh HELLO!") == 1.0
    assert not any("hello" in prompt for prompt in task.prompts + task.heldout)
    assert Grammar(SMALL_TALK).grammatical("good day, ben.", " hello, come in.") == 1.0


# Pieces.

def test_words():
    assert words("Don't stop, naïve CAT-5!") == ["don", "t", "stop", "naïve", "cat", "5"]
    assert words("春眠 不覺曉, ok") == ["春", "眠", "不", "覺", "曉", "ok"] and words(" ,. ") == []


def test_distinct_n_by_hand():
    assert distinct_n(["a b a b", "b a"], 1) == 2 / 6  # a, b of six words
    assert distinct_n(["a b a b", "b a"], 2) == 2 / 4  # ab ba ab | ba: no pair across texts
    assert distinct_n(["a", ""], 2) == 1.0
    assert repetition("a b", "a b a b") == pytest.approx(1 / 3) and repetition("a b", "c d e") == 0.0 == repetition("", "")


def test_length_and_fluency():
    assert [length(4)("", "w " * n) for n in (0, 2, 4, 6, 8, 20)] == [0, 0.5, 1, 0.5, 0, 0]
    assert fluency("", Text("abc", fluency=-1.5)) == -1.5


def test_a_text_is_a_string_that_carries_more():
    prompt = Text("7+5=", answer="12")
    assert prompt == "7+5=" and prompt.answer == "12" and isinstance(prompt, str) and {prompt: 1}["7+5="] == 1


# Scores.

def test_scores_are_taken_as_given():
    assert score(lambda p, c: len(c), ["a", "b"], ["xyz", ""]) == [3.0, 0.0]
    for value in (True, np.float32(0.5), np.int64(2), torch.tensor(0.25)):
        assert score(lambda p, c: value, ["a"], ["b"]) == [float(value)]


@pytest.mark.parametrize("kind", [list, np.array, torch.tensor])
def test_a_batched_reward_sees_lists(kind):
    @batched
    def lengths(prompts, completions):
        assert prompts == ["a", "b"] and isinstance(prompts, list)
        return kind([len(c) for c in completions])
    assert score(lengths, ("a", "b"), ("xyz", "")) == [3.0, 0.0]


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39, 10 ** 400, None, "good", [0.5, 0.5], torch.ones(2), 1j])
def test_a_score_that_is_no_number_is_named(value):
    with pytest.raises(BadTask, match="'wow'") as e:
        score(lambda p, c: value, ["a", "b"], ["wow", "oh"])
    assert "one finite number" in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("value", [[1.0], None, 0.5, {"x": 1.0, "y": 2.0}, torch.tensor(0.5), np.array(0.5), "xy"])
def test_a_batch_without_a_score_for_each(value):
    with pytest.raises(BadTask, match="must give a list of 2 numbers"):
        score(batched(lambda p, c: value), ["a", "b"], ["x", "y"])


def test_a_batch_that_fails():
    with pytest.raises(BadTask, match="failed on a batch that begins with prompt 'a'"):
        score(batched(lambda p, c: p + 1), ["a", "b"], ["x", "y"])
    with pytest.raises(BadTask, match="SystemExit"):
        score(lambda p, c: exec("raise SystemExit(0)"), ["a"], ["x"])


def test_an_error_in_a_reward_keeps_its_own_traceback():
    def mine(prompt, completion):
        return {"x": 1}[completion]
    with pytest.raises(BadTask, match="mine failed on prompt 'b' and completion 'y\\\\ny': KeyError: 'y") as e:
        score(mine, ["a", "b"], ["x", "y\ny"])
    frames = []
    tb = e.value.__cause__.__traceback__
    while tb:
        frames.append(tb.tb_frame.f_code.co_name)
        tb = tb.tb_next
    assert frames == ["mine"] and "\n" not in str(e.value)


# Task files.

GOOD_FILE = """
corpus = ["one two three"] * 10
prompts, heldout = ["one", "two"], ["three"]
def reward(prompt, completion):
    return len(completion)
"""


def write(tmp_path, source):
    (tmp_path / "mine.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    return str(tmp_path / "mine.py")


def test_a_file_is_a_task(tmp_path):
    task = load_task(write(tmp_path, GOOD_FILE), 0)
    assert task.corpus == ["one two three"] * 10 and task.prompts == ["one", "two"] and task.heldout == ["three"]
    assert task.reward("a", "bcd") == 3 and task.metric is task.reward
    task = load_task(write(tmp_path, GOOD_FILE + "corpus = 'a whole book'\ndef metric(p, c): return 7\n"), 0)
    assert task.corpus == ["a whole book"] and task.metric("", "") == 7 and task.metric.__name__ == "metric"
    assert load_task(write(tmp_path, GOOD_FILE.replace("corpus", "other")), 0).corpus == []
    assert [p.name for p in tmp_path.iterdir()] == ["mine.py"]  # no compiled file beside it


def test_a_file_may_import_its_neighbour(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("prompts = ['x']")
    assert load_task(write(tmp_path, GOOD_FILE + "from neighbour_of_mine import prompts"), 0).prompts == ["x"]
    assert sys.path[-1] == str(tmp_path)  # behind ours: its reward.py would not stand in for this one


@pytest.mark.parametrize("source, says", [
    ("", "lacks prompts, heldout, reward"), (GOOD_FILE.replace("heldout", "held"), "lacks heldout"), ("import nowhere_to_be_found", "line 1: ModuleNotFoundError"),
    (GOOD_FILE + "x = = 1", "line 6: SyntaxError"), ("x = 1\n\nopen('/nowhere/book.txt')", "line 3: FileNotFoundError"),
    ("from pathlib import Path\nPath(__file__).with_name('latin.txt').read_text(encoding='utf-8')", "line 2: UnicodeDecodeError"),
    (b"x = '\xff\xfe'", "mine.py"), ("def f():\n    raise ValueError('two\\nlines')\nf()", "line 2: ValueError: two lines"),
    (GOOD_FILE + "prompts = []", "at least one"), (GOOD_FILE + "heldout = ['']", "empty"), (GOOD_FILE + "prompts = ['three']", "'three' is also in heldout"),
    (GOOD_FILE + "prompts = 'one'", "prompts must be a list of texts"), (GOOD_FILE + "corpus = [b'bytes']", "corpus must be a list of texts"),
    (GOOD_FILE + "corpus = 7", "corpus must be"), (GOOD_FILE + "reward = 7", "functions"), (GOOD_FILE + "metric = 'm'", "functions"),
    (GOOD_FILE + "raise SystemExit('no')", "SystemExit: no")])
def test_a_file_that_is_no_task(tmp_path, source, says):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadTask, match=re.escape(says)) as e:
        load_task(write(tmp_path, source), 0)
    assert "\n" not in str(e.value) and "mine.py" in str(e.value)


def test_no_such_task(tmp_path):
    for name in ("chess", str(tmp_path / "chess.py"), str(tmp_path)):
        with pytest.raises(BadTask, match="there is no task"):
            load_task(name, 0)
