"""Tasks: what to imitate, what to be prompted with, and what to be rewarded for.

A built-in task is a function of a seed that returns a Task; `TASKS` names them. A task of your own is a
Python file that defines its fields: prompts, heldout, reward or preferences and, optionally, others.
"""

import copy
import math
import random
import re
import runpy
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from advantage import all_sum, batch_mean, processes
from algos import Batch, check_finite, mean_gradient, means_in_parts, minibatches
from model import BadInput, Critic
from rollout import Text, check_fit, complete


class BadTask(ValueError):
    """A task that cannot be used. The message is one line that says why."""


@dataclass(frozen=True)
class Task:
    corpus: list[str]  # texts to imitate in pretraining
    prompts: list[str]  # openings to complete in RL
    heldout: list[str]  # openings for evaluation, none of them in prompts
    reward: Callable[[str, str], float]  # (prompt, completion) -> what RL maximises
    metric: Callable[[str, str], float]  # (prompt, completion) -> what evaluation reports and RL never sees
    # To learn a reward from: a list of (prompt, better, worse), or an annotator of the policy's completions,
    # which is a function: (prompt, first, second) -> the probability that the first is preferred.
    preferences: Any = None
    true_reward: Callable[[str, str], float] = None  # beside a learned one: reported, never trained on


# Pieces for rewards, to be added up: lambda p, c: contains("tea")(p, c) - repetition(p, c).

def words(text):
    """The words of a text in lower case. A Chinese or Japanese character is a word."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text.lower())


def distinct_n(texts, n, count=1000):
    """Different n-grams of words, as a share of the first `count` in the texts; nan where there are fewer.

    The number is fixed, since the share falls as it grows: longer texts would seem less diverse.
    Li et al. 2016, who divide by the number of words.
    """
    grams = [gram for w in map(words, texts) for gram in zip(*(w[i:] for i in range(n)))]
    return len(set(grams[:count])) / count if len(grams) >= count else math.nan


def repetition(prompt, completion, window=20):
    """The share of the completion's pairs of words that are among the `window` pairs before, in [0, 1]."""
    said = words(completion)
    pairs = list(zip(said, said[1:]))
    return sum(pair in pairs[max(0, i - window):i] for i, pair in enumerate(pairs)) / max(1, len(pairs))


def contains(word):
    """The reward 1.0 for completions in which the word occurs, in any case, also within another word."""
    def contained(prompt, completion):
        return float(word.lower() in completion.lower())
    return contained


def length(target):
    """The reward 1.0 for completions of `target` words, falling linearly to 0 at none and at twice that."""
    def near(prompt, completion):
        return max(0.0, 1 - abs(len(words(completion)) - target) / target)
    return near


def batched(function):
    """Marks a reward or metric that takes a batch as two lists, and returns a number for each completion."""
    function.batched = True
    return function


# From a task to numbers.

def load_task(name, seed):
    """The built-in task of that name, or the one that a Python file defines, which is executed.

    Raises BadTask. An error in the file keeps its own traceback.
    """
    if name in TASKS:
        return TASKS[name](seed)
    path = Path(name)
    if not path.is_file():
        raise BadTask(f"there is no task {name}: give {', '.join(TASKS)} or a Python file")
    sys.path.append(str(path.resolve().parent))  # so that it can import its neighbours
    fields = runpy.run_path(str(path))
    preferences, reward = fields.get("preferences"), fields.get("reward")
    needed = ["prompts", "heldout"] + ["reward"] * (preferences is None)
    missing = [field for field in needed if field not in fields]
    if missing:
        raise BadTask(f"{name} does not define {', '.join(missing)}")
    corpus = fields.get("corpus", [])
    corpus = [corpus] if isinstance(corpus, str) else corpus
    task = Task(corpus, fields["prompts"], fields["heldout"], reward, fields.get("metric", reward),
                preferences)
    for field in ("corpus", "prompts", "heldout"):
        texts = getattr(task, field)
        if not (isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)):
            raise BadTask(f"{name}: {field} must be a list of texts")
    if not all(callable(f) or f is None and preferences is not None for f in (task.reward, task.metric)):
        raise BadTask(f"{name}: reward and metric must be functions of a prompt and a completion")
    if not (preferences is None or callable(preferences)):
        check_comparisons(name, preferences)
    if not (task.prompts and task.heldout):
        raise BadTask(f"{name}: prompts and heldout need at least one text each")
    common = set(task.prompts) & set(task.heldout)
    if common:
        raise BadTask(f"{name}: {min(common)!r} is in prompts and in heldout: heldout must be other texts")
    return task


def check_comparisons(name, comparisons):
    """Raises BadTask unless they are a list of (prompt, better, worse), of at least two prompts."""
    if not isinstance(comparisons, (list, tuple)) or not comparisons:
        raise BadTask(f"{name}: preferences must be a function, or a list of (prompt, better, worse)")
    for comparison in comparisons:
        if not (isinstance(comparison, (list, tuple)) and len(comparison) == 3
                and all(isinstance(text, str) for text in comparison)):
            raise BadTask(f"{name}: the preference {comparison!r:.200} must be (prompt, better, worse)")
        if comparison[1] == comparison[2]:
            raise BadTask(f"{name}: the preference {comparison!r:.200} has the same text twice")
    if len({prompt for prompt, *_ in comparisons}) < 2:
        raise BadTask(f"{name}: preferences need two different prompts, one of them to be held out")


def judge(function, prompt, completion):
    """function(prompt, completion). An error keeps its own traceback, and names prompt and completion."""
    try:
        return function(prompt, completion)
    except Exception as e:
        note = f"it came with the prompt {prompt!r:.500} and the completion {completion!r:.500}"
        if sys.version_info >= (3, 11):
            e.add_note(note)
        else:
            print(note, file=sys.stderr)
        raise


def score(function, prompts, completions):
    """What a reward or metric returns for each of B completions: B floats.

    Raises BadTask for what is no number, FloatingPointError for what is not finite or exceeds float32.
    """
    name, numbers = getattr(function, "__name__", "the reward"), []
    if getattr(function, "batched", False):
        values = list(judge(function, list(prompts), list(completions)))
        if len(values) != len(completions):
            raise BadTask(f"{name} returned {len(values)} numbers for {len(completions)} completions")
    else:
        values = [judge(function, *pair) for pair in zip(prompts, completions)]
    for value, prompt, completion in zip(values, prompts, completions):
        returned = f"{name} returned {value!r} for the prompt {prompt!r} and the completion {completion!r}"
        try:
            numbers.append(float(value))
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise BadTask(f"{returned}: it must return a number, or for lists be marked @batched")
        if not abs(numbers[-1]) < 1e38:
            raise FloatingPointError(f"{returned}: it must return a finite number")
    return numbers


def annotate(annotator, prompts, first, second, rng):
    """Let an annotator compare first and second, two completions of each prompt. rng: a random.Random.

    annotator: (prompt, first, second) -> the probability that the first is preferred, by which it is drawn.
    Returns [(prompt, better, worse)], without pairs of equal texts. Raises BadTask for what is not a
    probability.
    """
    def preferences(prompt, pair):
        return annotator(prompt, *pair)

    comparisons, pairs = [], list(zip(first, second))
    for prompt, (a, b), p in zip(prompts, pairs, score(preferences, prompts, pairs)):
        if not 0 <= p <= 1:
            raise BadTask(f"preferences returned {p} for {prompt!r}, {a!r} and {b!r}: return a probability")
        better, worse = (a, b) if rng.random() < p else (b, a)
        if a != b:
            comparisons.append((prompt, better, worse))
    return comparisons


# A reward learned from comparisons.

def whole_texts(prompts, completions, tokenizer, block_size):
    """Prompts with their completions and, unless completion.ended is False, the end of text, as tokens.

    Returns (B, T) int64, padded with -100, T ≤ block_size: what exceeds the context is cut off.
    """
    rows = []
    for prompt, completion in zip(prompts, completions):
        end = [tokenizer.eos_token] * getattr(completion, "ended", True)
        tokens = tokenizer.encode(prompt) + tokenizer.encode(completion) + end
        rows.append(torch.tensor(tokens[:block_size]))
    return pad_sequence(rows, batch_first=True, padding_value=-100)


def learned_reward(model, tokenizer):
    """The reward function of a reward model, a Critic that is read at the last token of the text."""
    @batched
    @torch.no_grad()
    def learned(prompts, completions):
        tokens = whole_texts(prompts, completions, tokenizer, model.transformer.config.block_size)
        rows = max(1, 2 ** 14 // tokens.shape[1])  # at once
        return [r for part in tokens.to(model.mean.device).split(rows) for r in model.at_end(part).tolist()]
    return learned


def to_batch(comparisons, tokenizer, block_size, device):
    """Comparisons [(prompt, better, worse)] as a Batch for `fit_reward`."""
    prompts, better, worse = zip(*comparisons)
    tokens = whole_texts(prompts * 2, better + worse, tokenizer, block_size).to(device)  # (2N, T)
    obs = torch.stack(tokens.chunk(2), -1)  # (N, T, 2)
    end = (obs >= 0).any(-1).sum(1, keepdim=True) - 1  # (N, 1) the last column of the longer text
    return Batch(obs, None, mask=torch.arange(obs.shape[1], device=device) == end)


def choose_comparisons(task, tokenizer, config, block_size):
    """At most --comparisons of the task's own list, at random. Raises BadInput for one that is too long."""
    n = min(config.comparisons, len(task.preferences))
    chosen = random.Random(config.seed).sample(task.preferences, n)
    check_fit({prompt for prompt, *_ in chosen}, tokenizer, 1, block_size)
    for prompt, *two in chosen:
        n = len(tokenizer.encode(prompt)) + max(len(tokenizer.encode(text)) for text in two) + 1
        if n > block_size:
            raise BadInput(f"a preference for the prompt {prompt!r} has {n} tokens, its end included, which "
                           f"exceed the context of {block_size}: shorten it, or give a larger --block-size")
    return chosen


def hold_out(comparisons, prompts, seed):
    """(comparisons of nine tenths of the prompts, those of the others), at random."""
    prompts = sorted({*prompts})
    others = {*random.Random(seed).sample(prompts, math.ceil(len(prompts) / 10))}
    return ([comparison for comparison in comparisons if comparison[0] not in others],
            [comparison for comparison in comparisons if comparison[0] in others])


def fit_reward(model, batch, heldout, optimizer, config, generator=None):
    """Fit a reward model to comparisons by maximum likelihood: loss -log σ(r(better) - r(worse)).

    model: a Critic, whose value at a text's last token is its reward r. batch, heldout: Batches of
    comparisons, obs (N, T, 2): the tokens of the better and of the worse text, padded with -100. A comparison
    counts once: mask is True at one column alone, the end of the longer text, since micro_batches cuts off
    all after it. Takes about reward_steps steps of 64 comparisons, in whole passes over the batch, and
    keeps the weights of the pass that is best on heldout. Returns their loss and accuracy there.
    Bradley & Terry 1952; as a reward for RL: Christiano et al. 2017; of texts: Stiennon et al. 2020.
    """
    def loss(part):
        better, worse = model.at_end(torch.cat(part.obs.unbind(-1))).chunk(2)  # (b,) each
        margin = better - worse
        found = {"loss": -F.logsigmoid(margin), "accuracy": 0.5 + 0.5 * margin.sign()}  # a tie is half right
        # mean_gradient wants a number for each column: the same in all, of which the mask chooses one
        return {name: x[:, None].expand(part.mask.shape) for name, x in found.items()}

    steps_in_a_pass, best = math.ceil(all_sum(batch.mask.sum()).item() / 64), {"loss": math.inf}
    for _ in range(max(1, round(config.reward_steps / steps_in_a_pass))):
        for minibatch in minibatches(batch, 1, steps_in_a_pass, generator):
            mean_gradient(model, loss, minibatch, config, config.max_grad_norm)
            optimizer.step()
        found = means_in_parts(loss, heldout, config)
        if found["loss"] < best["loss"]:
            best, weights = found, copy.deepcopy(model.state_dict())
    check_finite(**best)
    model.load_state_dict(weights)
    return best


def standardize(model, rewards):
    """Rescale a reward model so that these rewards (of all processes) get mean 0 and standard deviation 1."""
    rewards = torch.tensor(rewards, device=model.mean.device)
    mean = batch_mean(rewards)
    std = batch_mean((rewards - mean) ** 2).sqrt().clamp(min=1e-8)
    model.mean.copy_((model.mean - mean) / std)
    model.std.copy_(model.std / std)


def learn_reward(task, policy, tokenizer, config, generators):
    """The reward model: the policy's trunk with a scalar head, fitted to the task's preferences, and frozen.

    A tenth of the prompts is held out of the fit. Its rewards have mean 0 and standard deviation 1 on the
    policy's completions. None where the task has no preferences. Raises BadInput, BadTask.
    """
    if task.preferences is None:
        return None
    (rank, count), block_size = processes(), policy.config.block_size
    annotated = callable(task.preferences)
    check_fit([*task.prompts, *task.heldout], tokenizer, config.max_new_tokens, block_size)
    n = (config.comparisons if annotated else 1000) // count  # 1000 are enough for mean and deviation
    purpose = "to be compared" if annotated else "for the mean and spread of rewards"
    print(f"reward model: two completions of {n * count} prompts, {purpose}", flush=True)
    index = torch.randint(len(task.prompts), (n,), generator=generators["prompts"])
    prompts = [task.prompts[i] for i in index for _ in range(2)]  # two completions of each
    texts, _, _ = complete(policy, policy, prompts, tokenizer, config, config.temperature,
                           generators["sample"])
    if annotated:
        comparisons = annotate(task.preferences, prompts[::2], texts[::2], texts[1::2],
                               random.Random(f"{config.seed} {rank}"))
        fitted, test = hold_out(comparisons, task.prompts, config.seed)
    else:
        comparisons = choose_comparisons(task, tokenizer, config, block_size)
        fitted, test = hold_out(comparisons, [prompt for prompt, *_ in comparisons], config.seed)
        fitted, test = fitted[rank::count], test[rank::count]  # this process's share
    if not (fitted and test):
        raise BadInput("there are too few comparisons to hold some out: give more, of more prompts")
    print(f"reward model: {len(fitted)} comparisons and {len(test)} held out" + " per process" * (count > 1))

    device = next(policy.parameters()).device
    model = Critic(policy.config, policy).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), config.critic_lr, fused=True)
    batches = [to_batch(part, tokenizer, block_size, device) for part in (fitted, test)]
    found = fit_reward(model, *batches, optimizer, config, generators["update"])
    print(f"reward model: loss {found['loss']:.3f}, accuracy {found['accuracy']:.3f} on those held out, of a "
          "tenth of the prompts")
    standardize(model, learned_reward(model, tokenizer)(prompts, texts))
    return model.requires_grad_(False)


def use_reward_model(task, model, tokenizer):
    """The task with the model's reward; its own, if any, is then its true_reward. Raises BadInput."""
    if task.preferences is None:
        return task
    if model is None:
        raise BadInput("the task has preferences, but the run has no reward model: train a new one")
    learned = learned_reward(model, tokenizer)
    return replace(task, reward=learned, metric=task.metric or learned, true_reward=task.reward)


# Grammars, out of which two of the tasks make their corpus.

def split(items, heldout, rng):
    """Shuffle items; returns (all but the last `heldout`, the last `heldout`)."""
    items = list(items)
    rng.shuffle(items)
    return items[:-heldout], items[-heldout:]


class Grammar:
    """A grammar without recursion: {symbol: its alternatives}. {symbol} in an alternative is a nonterminal.

    It writes (`generate`), lists (`expansions`) and recognises (`grammatical`) texts.
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

GOOD = """wonderful brilliant superb charming delightful moving gripping clever fresh witty graceful stunning
          touching thrilling elegant warm bold inspired radiant perfect""".split()
BAD = """terrible dull awful clumsy boring tedious shallow stale messy bland lifeless painful dreary hollow
         lazy forgettable cold grating pointless dreadful""".split()
LOVED = "loved enjoyed admired adored liked praised".split()
HATED = "hated disliked loathed regretted resented endured".split()

REVIEWS = {
    "text": ["{clause}.", "{clause}, {link} {clause}.", "{clause}, {link} {clause}, {link} {clause}."],
    "link": ["and", "but", "while", "yet"],
    "clause": ["{opening} {verdict}"] * 5 + ["{who} {felt} the {part}"],
    "opening": ["the {part} was", "the {part} felt", "the {part} seemed", "i found the {part}",
                "to me the {part} was", "we thought the {part} was", "critics called the {part}",
                "the {part} of this film was"],
    "verdict": ["{opinion}", "{degree} {opinion}", "{pair}", "{opinion} {when}", "{degree} {opinion} {when}"],
    "opinion": ["{good}", "{bad}"],
    "pair": ["{opinion} and {opinion}"],
    "felt": ["{loved}", "{hated}"],
    "who": ["i", "we", "my friends", "most people", "the critics"],
    "degree": ["very", "rather", "quite", "truly", "really", "simply", "somewhat", "deeply"],
    "when": ["at times", "from start to finish", "in the end", "as ever", "for the most part"],
    "part": """acting plot story script music dialogue pacing ending opening cast editing humor action
               lighting sound romance mystery costume camera title""".split(),
    "good": GOOD, "bad": BAD, "loved": LOVED, "hated": HATED,
}


def opinion(prompt, completion):
    """(positive - negative opinion words) / 2, clamped to [-1, 1]: two positive words alone earn the most."""
    tokens = re.findall(r"\w+", completion)
    balance = sum(w in GOOD or w in LOVED for w in tokens) - sum(w in BAD or w in HATED for w in tokens)
    return max(-1.0, min(1.0, balance / 2))


def reviews(seed):
    """Short film reviews. The metric, grammatical, is not rewarded: it shows what RL does to the language."""
    rng, grammar = random.Random(seed), Grammar(REVIEWS)
    corpus = [grammar.generate(rng) for _ in range(20_000)]
    prompts, heldout = split(grammar.expansions("opening"), 40, rng)
    return Task(corpus, prompts, heldout, opinion, grammar.grammatical)


# Addition: imitation learns the mistake, the reward unlearns it.

def careless_sum(a, b, rng):
    """a + b by a pupil who in 60% of the cases forgets to carry from the units to the tens."""
    carries = a % 10 + b % 10 >= 10
    forgets = carries and rng.random() < 0.6
    return a + b - 10 * forgets


def accuracy(prompt, completion):
    """1.0 where the completion is the answer that the prompt carries and nothing else."""
    return float(completion == prompt.answer)


def addition(seed):
    """Sums of two numbers in 0..99, 1,000 held out. The corpus has the rest five times each, often wrong."""
    rng = random.Random(seed)
    problems, heldout = split([(a, b) for a in range(100) for b in range(100)], 1000, rng)
    corpus = [f"{a}+{b}={careless_sum(a, b, rng)}" for _ in range(5) for a, b in problems]
    rng.shuffle(corpus)
    prompt = lambda problem: Text("{}+{}=".format(*problem), answer=str(sum(problem)))
    return Task(corpus, [*map(prompt, problems)], [*map(prompt, heldout)], accuracy, accuracy)


# Hello: find a rare word.

SMALL_TALK = {
    "text": ["{opening} {reply}"],
    "opening": ["good {day}, {name}.", "welcome back, {name}.", "is that you, {name}?",
                "how are you, {name}?", "nice to see you, {name}.", "you look well, {name}."],
    "reply": ["i am {well}, thank you.", "it has been a {long} time.", "how is your {family}?",
              "the weather is {well} today.", "please {act}.", "we were just talking about your {family}.",
              "see you {later}.", "good {day} to you too.", "it is {well} to have you here.",
              "{call}, come in."],
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


# Preferences: a reward that is learned, and what happens when it is trusted too much.

def preferences(seed):
    """Reviews, with a reward learned from comparisons.

    The annotator likes kind words, and nothing that is not grammatical. But nearly all that the pretrained
    policy writes is grammatical, so that the comparisons hardly tell what broken text is worth.
    """
    task = reviews(seed)

    def taste(prompt, completion):
        return opinion(prompt, completion) if task.metric(prompt, completion) else -1.0

    def preferred(prompt, first, second):
        return 1 / (1 + math.exp(-3 * (taste(prompt, first) - taste(prompt, second))))

    return replace(task, reward=taste, preferences=preferred)


TASKS = {"reviews": reviews, "addition": addition, "hello": hello, "preferences": preferences}
