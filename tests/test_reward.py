import random
import re

import pytest

from reward import BAD, GOOD, HATED, LOVED, REVIEWS, SMALL_TALK, TASKS, Grammar, Text, accuracy, careless_sum, contains, opinion


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
