"""Tasks: what to imitate, what to be prompted with, and what to be rewarded for.

A task is a function of a seed that returns a Task; `TASKS` names them. All three here make their corpus themselves.
"""

import random
import re
from dataclasses import dataclass
from typing import Callable


@dataclass(frozen=True)
class Task:
    corpus: list[str]  # texts to imitate in pretraining
    prompts: list[str]  # openings to complete in RL
    heldout: list[str]  # openings for evaluation, none of them in prompts
    reward: Callable[[str, str], float]  # (prompt, completion) -> what RL maximises
    metric: Callable[[str, str], float]  # (prompt, completion) -> what evaluation reports and RL never sees
    metric_name: str


def split(items, heldout, rng):
    """Shuffle items; returns (all but the last `heldout`, the last `heldout`)."""
    items = list(items)
    rng.shuffle(items)
    return items[:-heldout], items[-heldout:]


class Grammar:
    """A grammar without recursion: {symbol: its alternatives}, where {symbol} in an alternative stands for any of its own.

    It writes (`generate`), lists (`expansions`) and reads (`parses`) the texts of a symbol.
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

    def parses(self, prompt, completion):
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
    return Task(corpus, prompts, heldout, opinion, grammar.parses, "grammatical")


# Addition: imitation learns the mistake, the reward unlearns it.

def careless_sum(a, b, rng):
    """a + b by a pupil who in 60% of the cases forgets to carry from the units to the tens."""
    carry = (a % 10 + b % 10) // 10
    return a + b - 10 * (carry and rng.random() < 0.6)


def exact(prompt, completion):
    """1.0 where the completion of "a+b=" is the sum and nothing else."""
    a, b = prompt.rstrip("=").split("+")
    return float(completion == str(int(a) + int(b)))


def addition(seed):
    """Sums of two numbers in 0..99. The corpus writes every training problem five times, often wrongly; held out are 1,000."""
    rng = random.Random(seed)
    problems, heldout = split([(a, b) for a in range(100) for b in range(100)], 1000, rng)
    corpus = [f"{a}+{b}={careless_sum(a, b, rng)}" for _ in range(5) for a, b in problems]
    rng.shuffle(corpus)
    text = lambda problem: "{}+{}=".format(*problem)
    return Task(corpus, [*map(text, problems)], [*map(text, heldout)], exact, exact, "accuracy")


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


def says_hello(prompt, completion):
    return float("hello" in completion.lower())


def hello(seed):
    """Small talk in which one reply of fifty says hello."""
    rng, grammar = random.Random(seed), Grammar(SMALL_TALK)
    corpus = [grammar.generate(rng) for _ in range(10_000)]
    prompts, heldout = split(grammar.expansions("opening"), 16, rng)
    return Task(corpus, prompts, heldout, says_hello, grammar.parses, "grammatical")


TASKS = {"reviews": reviews, "addition": addition, "hello": hello}
