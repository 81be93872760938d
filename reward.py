"""Tasks: what to imitate, what to be prompted with, and what to be rewarded for.

A built-in task is a function of a seed that returns a Task; `TASKS` names them. A task of your own is a Python file that defines
the same names: corpus, prompts, heldout, reward and, optionally, metric.
"""

import numbers
import random
import re
import runpy
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Callable


class BadTask(ValueError):
    """A task that cannot be used. The message is one line that says why; the cause, if any, is the error of the task's own code."""


class NotFinite(BadTask, FloatingPointError):
    """A score that is no finite number. batch: the prompts, completions and scores among which it stands, as texts."""

    def __init__(self, message, batch):
        super().__init__(message)
        self.batch = batch


class Text(str):
    """A string that carries more than its characters: Text("7+5=", answer="12").answer is "12".

    A prompt may carry what its reward is to compare with. A completion carries `length`, its tokens with the end of text;
    `ended`, whether it has one; and `fluency`, the mean log-likelihood per token, in nats, that the reference gives it, at the
    run's temperature. The reference is the policy as it was before RL.
    """

    def __new__(cls, text, **more):
        self = super().__new__(cls, text)
        vars(self).update(more)
        return self


@dataclass(frozen=True)
class Task:
    corpus: list[str]  # texts to imitate in pretraining
    prompts: list[str]  # openings to complete in RL
    heldout: list[str]  # openings for evaluation, none of them in prompts
    reward: Callable[[str, str], float]  # (prompt, completion) -> what RL maximises
    metric: Callable[[str, str], float]  # (prompt, completion) -> what evaluation reports and RL never sees


# Pieces for rewards. A sum of them is a line of Python: lambda p, c: contains("tea")(p, c) - repetition(p, c).

def words(text):
    """The words of a text in lower case; a Chinese or Japanese character is a word of its own."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text.lower())


def distinct_n(texts, n):
    """Different n-grams of words, as a share of all of them in the texts; 1.0 where there are none. Li et al. 2016."""
    grams = [gram for w in map(words, texts) for gram in zip(*(w[i:] for i in range(n)))]
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(prompt, completion):
    """The share of the completion's pairs of words that it had said before, in [0, 1]."""
    return 1 - distinct_n([completion], 2)


def contains(word):
    """The reward 1.0 for completions in which the word occurs, in capitals or not, also within another."""
    def contained(prompt, completion):
        return float(word.lower() in completion.lower())
    return contained


def length(target):
    """The reward 1.0 for completions of `target` words, falling evenly to 0 at none and at twice as many."""
    def near(prompt, completion):
        return max(0.0, 1 - abs(len(words(completion)) - target) / target)
    return near


def fluency(prompt, completion):
    """The reference's mean log-likelihood per token of the completion, in nats: 0 at most, higher for more likely text."""
    return completion.fluency


def batched(function):
    """Marks a reward or metric that takes the prompts and completions of a batch as two lists, and returns a number for each."""
    function.batched = True
    return function


# From a task to numbers.

def load_task(name, seed):
    """The built-in task of that name, or the one that a Python file defines. The file is executed. Raises BadTask."""
    if name in TASKS:
        return TASKS[name](seed)
    path = Path(name)
    if not path.is_file():
        raise BadTask(f"there is no task {name}: give {', '.join(TASKS)} or a Python file")
    sys.path.append(str(path.resolve().parent))  # so that it can import what lies beside it
    try:
        names = runpy.run_path(str(path))
    except (Exception, SystemExit) as e:
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == str(path)]
        raise BadTask(f"{name}, line {lines[-1] if lines else getattr(e, 'lineno', '?')}: {one_line(e)}")

    def texts(field):
        value = names.get(field, [])
        value = [value] if isinstance(value, str) and field == "corpus" else value
        if not (isinstance(value, (list, tuple)) and all(isinstance(text, str) for text in value)):
            raise BadTask(f"{name}: {field} must be a list of texts")
        try:
            "".join(value).encode()
        except UnicodeEncodeError:
            raise BadTask(f"{name}: {field} is no Unicode text: read its files with encoding=\"utf-8\" and errors=\"strict\"")
        return list(value)

    missing = [field for field in ("prompts", "heldout", "reward") if field not in names]
    if missing:
        raise BadTask(f"{name} lacks {', '.join(missing)}: a task defines corpus, prompts, heldout, reward and, optionally, metric")
    task = Task(texts("corpus"), texts("prompts"), texts("heldout"), names["reward"], names.get("metric", names["reward"]))
    if not (callable(task.reward) and callable(task.metric)):
        raise BadTask(f"{name}: reward and metric must be functions of a prompt and a completion")
    if not (task.prompts and task.heldout and all(task.prompts + task.heldout)):
        raise BadTask(f"{name}: prompts and heldout need at least one text each, and none of them empty")
    common = set(task.prompts) & set(task.heldout)
    if common:
        raise BadTask(f"{name}: the prompt {min(common)!r} is also in heldout: what was trained on cannot test")
    return task


def one_line(error):
    return " ".join(f"{type(error).__name__}: {error}".split())


def score(function, prompts, completions):
    """What a reward or metric says of each of B completions: B floats.

    Raises BadTask where it fails (the cause is its own error) or gives anything but a number each, NotFinite for NaN and the like.
    """
    pairs, values, together = list(zip(prompts, completions)), [], getattr(function, "batched", False)
    name = getattr(function, "__name__", "reward")
    about = lambda pair: "prompt {!r} and completion {!r}".format(*map(str, pair))
    pair = pairs[0]
    try:
        if together:
            values = function(list(prompts), list(completions))
        else:
            for pair in pairs:
                values.append(function(*pair))
    except (Exception, SystemExit) as e:
        where = ("a batch that begins with " if together else "") + about(pair)
        raise BadTask(f"{name} failed on {where}: {one_line(e)}") from e.with_traceback(e.__traceback__.tb_next)
    values = values.tolist() if hasattr(values, "tolist") else values
    if not (isinstance(values, (list, tuple)) and len(values) == len(pairs)):
        raise BadTask(f"{name} must give a list of {len(pairs)} numbers, one for each completion of the batch")
    values = [v.tolist() if hasattr(v, "tolist") else v for v in values]  # what numpy and torch call a number
    for value, pair in zip(values, pairs):
        if isinstance(value, numbers.Real) and abs(value) < 1e38:  # neither NaN nor more than float32 holds
            continue
        what = f"{name} gave {value!r} for {about(pair)}: a reward must be one finite number"
        if not isinstance(value, numbers.Real):
            raise BadTask(what)
        raise NotFinite(what, {"prompts": [*map(str, prompts)], "completions": [*map(str, completions)], "scores": [*map(repr, values)]})
    return [float(value) for value in values]


# Grammars, out of which two of the tasks make their corpus.

def split(items, heldout, rng):
    """Shuffle items; returns (all but the last `heldout`, the last `heldout`)."""
    items = list(items)
    rng.shuffle(items)
    return items[:-heldout], items[-heldout:]


class Grammar:
    """A grammar without recursion: {symbol: its alternatives}, where {symbol} in an alternative stands for any of its own.

    It writes (`generate`), lists (`expansions`) and reads (`grammatical`) the texts of a symbol.
    """

    def __init__(self, rules):
        self.rules = rules
        self.pattern = re.compile(self.regex("text"))

    def generate(self, rng, symbol="text"):
        """A random text: each alternative of a symbol is equally likely."""
        return re.sub(r"{(\w+)}", lambda m: self.generate(rng, m[1]), rng.choice(self.rules[symbol]))

    def expansions(self, symbol):
        """All texts of a symbol."""
        texts = []
        for alternative in self.rules[symbol]:
            head, *rest = re.split(r"{(\w+)}", alternative)  # literal, symbol, literal, symbol, …, literal
            partial = [head]
            for inner, literal in zip(rest[::2], rest[1::2]):
                partial = [p + e + literal for p in partial for e in self.expansions(inner)]
            texts += partial
        return texts

    def regex(self, symbol):
        parts = [re.split(r"{(\w+)}", alternative) for alternative in self.rules[symbol]]
        inline = lambda p: "".join(self.regex(s) if i % 2 else re.escape(s) for i, s in enumerate(p))
        return "(?:" + "|".join(map(inline, parts)) + ")"

    def grammatical(self, prompt, completion):
        """1.0 where the whole text is one of the grammar's, else 0.0."""
        return float(self.pattern.fullmatch(prompt + completion) is not None)


# Reviews: raise the opinion, keep the language.

GOOD = """wonderful brilliant superb charming delightful moving gripping clever fresh witty graceful stunning touching
          thrilling elegant warm bold inspired radiant perfect""".split()
BAD = """terrible dull awful clumsy boring tedious shallow stale messy bland lifeless painful dreary hollow lazy
         forgettable cold grating pointless dreadful""".split()
LOVED = "loved enjoyed admired adored liked praised".split()
HATED = "hated disliked loathed regretted resented endured".split()

REVIEWS = {
    "text": ["{clause}.", "{clause}, {link} {clause}.", "{clause}, {link} {clause}, {link} {clause}."],
    "link": ["and", "but", "while", "yet"],
    "clause": ["{opening} {verdict}"] * 5 + ["{who} {felt} the {part}"],
    "opening": ["the {part} was", "the {part} felt", "the {part} seemed", "i found the {part}", "to me the {part} was",
                "we thought the {part} was", "critics called the {part}", "the {part} of this film was"],
    "verdict": ["{opinion}", "{degree} {opinion}", "{pair}", "{opinion} {when}", "{degree} {opinion} {when}"],
    "opinion": ["{good}", "{bad}"],
    "pair": ["{opinion} and {opinion}"],
    "felt": ["{loved}", "{hated}"],
    "who": ["i", "we", "my friends", "most people", "the critics"],
    "degree": ["very", "rather", "quite", "truly", "really", "simply", "somewhat", "deeply"],
    "when": ["at times", "from start to finish", "in the end", "as ever", "for the most part"],
    "part": """acting plot story script music dialogue pacing ending opening cast editing humor action lighting sound
               romance mystery costume camera title""".split(),
    "good": GOOD, "bad": BAD, "loved": LOVED, "hated": HATED,
}


def opinion(prompt, completion):
    """(positive - negative opinion words) / 2, held to [-1, 1]: two kind words and no unkind one earn all there is."""
    words = re.findall(r"\w+", completion)
    score = sum(w in GOOD or w in LOVED for w in words) - sum(w in BAD or w in HATED for w in words)
    return max(-1.0, min(1.0, score / 2))


def reviews(seed):
    """Short film reviews. The metric, grammatical, is not rewarded: what RL does to the language shows there."""
    rng, grammar = random.Random(seed), Grammar(REVIEWS)
    corpus = [grammar.generate(rng) for _ in range(20_000)]
    prompts, heldout = split(grammar.expansions("opening"), 40, rng)
    return Task(corpus, prompts, heldout, opinion, grammar.grammatical)


# Addition: imitation learns the mistake, the reward unlearns it.

def careless_sum(a, b, rng):
    """a + b by a pupil who in 60% of the cases forgets to carry from the units to the tens."""
    carry = (a % 10 + b % 10) // 10
    return a + b - 10 * (carry and rng.random() < 0.6)


def accuracy(prompt, completion):
    """1.0 where the completion is the answer that the prompt carries and nothing else."""
    return float(completion == prompt.answer)


def addition(seed):
    """Sums of two numbers in 0..99. The corpus writes every training problem five times, often wrongly; held out are 1,000."""
    rng = random.Random(seed)
    problems, heldout = split([(a, b) for a in range(100) for b in range(100)], 1000, rng)
    corpus = [f"{a}+{b}={careless_sum(a, b, rng)}" for _ in range(5) for a, b in problems]
    rng.shuffle(corpus)
    prompt = lambda problem: Text("{}+{}=".format(*problem), answer=str(sum(problem)))
    return Task(corpus, [*map(prompt, problems)], [*map(prompt, heldout)], accuracy, accuracy)


# Hello: find a rare word.

SMALL_TALK = {
    "text": ["{opening} {reply}"],
    "opening": ["good {day}, {name}.", "welcome back, {name}.", "is that you, {name}?", "how are you, {name}?",
                "nice to see you, {name}.", "you look well, {name}."],
    "reply": ["i am {well}, thank you.", "it has been a {long} time.", "how is your {family}?", "the weather is {well} today.",
              "please {act}.", "we were just talking about your {family}.", "see you {later}.", "good {day} to you too.",
              "it is {well} to have you here.", "{call}, come in."],
    "call": ["hi there", "hey you", "oh my", "well well", "hello"],
    "day": ["morning", "day", "evening"],
    "name": "anna ben clara david emma frank grace henry iris jack".split(),
    "well": ["fine", "good", "lovely", "great"],
    "long": ["long", "very long", "short"],
    "family": ["mother", "father", "sister", "brother", "dog"],
    "act": ["sit down", "come in", "have some tea", "stay for dinner"],
    "later": ["later", "tomorrow", "on sunday", "next week"],
}


def hello(seed):
    """Small talk in which one reply of fifty says hello."""
    rng, grammar = random.Random(seed), Grammar(SMALL_TALK)
    corpus = [grammar.generate(rng) for _ in range(10_000)]
    prompts, heldout = split(grammar.expansions("opening"), 16, rng)
    return Task(corpus, prompts, heldout, contains("hello"), grammar.grammatical)


TASKS = {"reviews": reviews, "addition": addition, "hello": hello}
