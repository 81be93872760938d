"""Tasks: a corpus for pretraining, prompts for RL, and a reward function, also a learned one.

A built-in task is a function of a seed that returns a Task; `TASKS` names the four of them, at the end of
this file. A custom task is a Python file that defines the same fields: prompts, heldout, reward or
preferences and, optionally, corpus, metric and run_episodes. The building blocks for rewards come first, then
what turns a task into numbers, then the reward model.

This file leaves out rewards from a server, because a reward is any Python function.
"""

import copy
import itertools
import math
import os
import random
import re
import runpy
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from advantage import all_sum, batch_mean, mean_and_variance, processes
from algos import Batch, check_finite, map_micro_batches, mean_gradient, minibatches
from model import BadInput, Critic
from rollout import Text, complete, run_episodes


@dataclass(frozen=True)
class Task:
    corpus: list[str]  # texts to imitate in pretraining
    prompts: list[str]  # openings to complete in RL
    heldout: list[str]  # openings for evaluation, none of them in prompts
    # (prompt, completion) -> what RL maximizes: a number, or a list with one number per action
    reward: Callable[[str, str], float]
    metric: Callable[[str, str], float]  # (prompt, completion) -> what evaluation reports and RL never sees
    # If the reward is to be learned. Either a list of some hundred comparisons of at least three prompts,
    # (prompt, better, worse), as in ("the dog is", " kind.", " loud."). Or an annotator: a function (prompt,
    # first, second) -> the probability that the first of two completions is preferred, which is asked about
    # --comparisons pairs of the pretrained policy. A task file's `reward` then becomes the true_reward.
    preferences: Any = None
    true_reward: Callable[[str, str], float] = None  # next to a learned reward: reported, never trained on
    run_episodes: Callable = run_episodes  # how an episode goes: in turns, for example


# Building blocks for rewards, to be added up: lambda p, c: contains("tea")(p, c) - repetition(p, c).

def words(text):
    """The words of a text in lower case. A Chinese or Japanese character is a word."""
    return re.findall(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+", text.lower())


def distinct_n(texts, n, count=1000):
    """The share of different n-grams of words among the first `count` of the texts; nan if there are fewer.

    The number of n-grams is fixed, because the share falls as it grows: longer texts would seem less diverse.
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
    """A reward of 1.0 for completions in which the word occurs, in any case, also within another word."""
    def contained(prompt, completion):
        return float(word.lower() in completion.lower())
    return contained


def length(target):
    """A reward of 1.0 for completions of `target` words; it falls linearly to 0 at none and at 2 target."""
    if target <= 0:
        raise BadInput(f"length({target}): the number of words must be at least 1")

    def near(prompt, completion):
        return max(0.0, 1 - abs(len(words(completion)) - target) / target)
    return near


def batched(function):
    """Mark a reward or metric that takes a list of prompts and one of completions, and returns a list."""
    function.batched = True
    return function


# From a task to numbers.

def load_task(name, seed):
    """The built-in task of that name, or the one that a Python file defines, which is executed.

    Raises BadInput. An error in the file keeps its own traceback.
    """
    if name in TASKS:
        return TASKS[name](seed)
    if not os.path.isfile(name):
        raise BadInput(f"unknown task {name}: choose {', '.join(TASKS)} or a Python file")
    sys.path.append(str(Path(name).resolve().parent))  # the file may import its neighbours
    directory = os.getcwd()
    with torch.enable_grad():  # restores what the file may change, as do the two lines below
        fields = runpy.run_path(name)
    os.chdir(directory)
    torch.set_default_dtype(torch.float32)
    preferences = fields.get("preferences")
    reward = fields.get("reward")
    needed = ["prompts", "heldout"] if preferences is not None else ["prompts", "heldout", "reward"]
    missing = [field for field in needed if field not in fields]
    if missing:
        raise BadInput(f"{name} does not define {', '.join(missing)}")
    corpus = fields.get("corpus", [])
    corpus = [corpus] if isinstance(corpus, str) else corpus
    task = Task(corpus, fields["prompts"], fields["heldout"], reward, fields.get("metric", reward),
                preferences, run_episodes=fields.get("run_episodes", run_episodes))
    for field in ("corpus", "prompts", "heldout"):
        texts = getattr(task, field)
        if not (isinstance(texts, (list, tuple)) and all(isinstance(text, str) for text in texts)):
            raise BadInput(f"{name}: {field} must be a list of texts")
    for function in (task.reward, task.metric):
        may_be_missing = function is None and preferences is not None  # it will be learned
        if not (callable(function) or may_be_missing):
            raise BadInput(f"{name}: reward and metric must be functions of a prompt and a completion")
    if not callable(task.run_episodes):
        raise BadInput(f"{name}: run_episodes must be a function, see rollout.run_episodes")
    if not (preferences is None or callable(preferences)):
        check_comparisons(name, preferences)
    if not (task.prompts and task.heldout):
        raise BadInput(f"{name}: prompts and heldout need at least one text each")
    # copies, because a reward may change its own lists
    task = replace(task, corpus=[*task.corpus], prompts=[*task.prompts], heldout=[*task.heldout])
    common = set(task.prompts) & set(task.heldout)
    if common:
        raise BadInput(f"{name}: {min(common)!r} is in prompts and in heldout: heldout must be other texts")
    return task


def check_comparisons(name, comparisons):
    """Raises BadInput unless they are a list of (prompt, better, worse), of at least three prompts."""
    if not isinstance(comparisons, (list, tuple)) or not comparisons:
        raise BadInput(f"{name}: preferences must be a function, or a list of (prompt, better, worse)")
    for comparison in comparisons:
        if not (isinstance(comparison, (list, tuple)) and len(comparison) == 3
                and all(isinstance(text, str) for text in comparison)):
            raise BadInput(f"{name}: the preference {comparison!r:.200} must be (prompt, better, worse)")
        if comparison[1] == comparison[2]:
            raise BadInput(f"{name}: the preference {comparison!r:.200} has the same text twice")
    if len({prompt for prompt, *_ in comparisons}) < 3:
        raise BadInput(f"{name}: preferences need three different prompts, two of them to be held out")


def call(function, prompt, completion):
    """function(prompt, completion). If it fails, a note with both is added to its own traceback."""
    try:
        with torch.enable_grad():  # afterwards gradients are enabled again, or not, as before
            return function(prompt, completion)
    except Exception as e:
        note = f"it came with the prompt {prompt!r:.500} and the completion {completion!r:.500}"
        if sys.version_info >= (3, 11):
            e.add_note(note)
        else:
            print(note, file=sys.stderr)
        raise


def score(function, prompts, completions):
    """The number that a reward or metric returns for each of B completions. A list counts as its sum."""
    return [sum(numbers) for numbers in score_actions(function, prompts, completions)]


def score_actions(function, prompts, completions):
    """For each of B completions a list with one number per action. A single number r becomes [0, …, 0, r].

    Raises BadInput if it returns something other than a number or such a list, FloatingPointError if a number
    is not finite or exceeds 1e15.
    """
    name = getattr(function, "__name__", "the reward")
    scores = []
    if getattr(function, "batched", False):
        values = plain(call(function, list(prompts), list(completions)))
        if not isinstance(values, (list, tuple)) or len(values) != len(completions):
            raise BadInput(f"{name} is marked @batched and returned {values!r:.200} for {len(completions)} "
                           f"completions: return a list of {len(completions)} numbers or lists")
    else:
        values = [call(function, *pair) for pair in zip(prompts, completions, strict=True)]
    for value, prompt, completion in zip(values, prompts, completions):
        at = f"for the prompt {prompt!r} and the completion {completion!r}"
        value = plain(value)
        n = getattr(completion, "length", 1)  # actions; an annotator's pair of completions has no length
        numbers = value if isinstance(value, (list, tuple)) else [0.0] * (n - 1) + [value]
        try:
            scores.append([float(number) for number in numbers])
            if len(numbers) != n:
                raise ValueError
        except (TypeError, ValueError, OverflowError, RuntimeError):
            shown = "a huge number" if isinstance(value, int) else f"{value!r:.200}"
            raise BadInput(f"{name} returned {shown} {at}: it must return a number, a list with one for each "
                           f"of its {n} actions, or for lists of texts be marked @batched")
        # or the squares that a variance adds up would overflow
        if not all(abs(number) <= 1e15 for number in scores[-1]):
            raise FloatingPointError(f"{name} returned {value!r:.200} {at}: it must return a finite number "
                                     "of at most 1e15, so divide all rewards by a constant")
    largest = max((abs(number) for numbers in scores for number in numbers), default=0)
    if 0 < largest < 1e-15:  # or the squares would underflow
        raise FloatingPointError(f"{name} returned {values[0]!r:.200} and nothing above 1e-15: multiply it "
                                 "by a constant")
    return scores


def plain(value):
    """A tensor or array as numbers and lists; everything else unchanged."""
    return value.tolist() if isinstance(value, (torch.Tensor, np.ndarray)) else value


def annotate(annotator, prompts, first, second, rng):
    """Let an annotator compare first and second, two completions of each prompt. rng: a random.Random.

    annotator: (prompt, first, second) -> the probability with which the first is preferred.
    Returns [(prompt, better, worse)], without pairs of equal texts. Raises BadInput if a number is not a
    probability.
    """
    def preferences(prompt, pair):  # for `score`, which names it in messages: here a completion is a pair
        return annotator(prompt, *pair)

    comparisons = []
    pairs = list(zip(first, second))
    for prompt, (a, b), p in zip(prompts, pairs, score(preferences, prompts, pairs)):
        if not 0 <= p <= 1:
            raise BadInput(f"preferences returned {p} for {prompt!r}, {a!r} and {b!r}: return a probability")
        better, worse = (a, b) if rng.random() < p else (b, a)
        if a != b:
            comparisons.append((prompt, better, worse))
    return comparisons


# The reward model: a reward that is learned from comparisons of two texts.

def text_rows(prompts, completions, tokenizer, block_size):
    """Whole texts as tokens: prompt, completion and, unless completion.ended is False, the end of text.

    Returns (B, T) int64, padded with -100, T ≤ block_size: tokens beyond the context are cut off.
    """
    rows = []
    for prompt, completion in zip(prompts, completions):
        tokens = tokenizer.encode(prompt) + tokenizer.encode(completion)
        if getattr(completion, "ended", True):
            tokens.append(tokenizer.eos_token)
        rows.append(torch.tensor(tokens[:block_size]))
    return pad_sequence(rows, batch_first=True, padding_value=-100)


def one_decision_each(texts):
    """A Batch for `map_micro_batches` and `mean_gradient`, in which K texts together count as one action.

    K is 1 for a text that gets a reward, and 2 for a comparison, because its loss is one number.
    texts: (N, K, T) tokens. obs is (N, 1, K, T) and mask (N, 1): one column per row, and K T cells each.
    """
    return Batch(texts[:, None], None, torch.ones(len(texts), 1, dtype=torch.bool, device=texts.device))


def learned_reward(model, tokenizer, config):
    """The reward function of a reward model, a Critic that is read at the last token of a text."""
    def reward_of_text(part):
        return model.last_value(part.obs[:, 0, 0])[:, None]  # obs (b, 1, 1, T) -> (b, 1)

    @batched
    def learned(prompts, completions):
        rows = text_rows(prompts, completions, tokenizer, model.transformer.config.block_size)  # (B, T)
        texts = one_decision_each(rows[:, None].to(model.mean.device))
        rewards = map_micro_batches(reward_of_text, texts, config)  # (B, 1)
        return rewards[:, 0].tolist()
    return learned


def to_batch(comparisons, tokenizer, block_size, device):
    """Comparisons [(prompt, better, worse)] as a Batch of one decision each, obs (N, 1, 2, T)."""
    prompts, better, worse = zip(*comparisons)
    tokens = text_rows(prompts * 2, better + worse, tokenizer, block_size).to(device)  # (2N, T)
    return one_decision_each(torch.stack(tokens.chunk(2), 1))


def choose_comparisons(task, tokenizer, config, block_size):
    """At most --comparisons of the task's own list, at random. Raises BadInput for unfit texts."""
    count = min(config.comparisons, len(task.preferences))
    comparisons = random.Random(config.seed).sample(task.preferences, count)
    for prompt, better, worse in comparisons:
        if not prompt:
            raise BadInput("the prompt of a preference is empty: give it at least one character")
        longer = max(len(tokenizer.encode(better)), len(tokenizer.encode(worse)))
        n = len(tokenizer.encode(prompt)) + longer + 1  # and the end of text
        if n > block_size:
            raise BadInput(f"a preference for the prompt {prompt!r} has {n} tokens, its end included, which "
                           f"exceed the context of {block_size}: shorten it, or give a larger --block-size")
    return comparisons


def hold_out(comparisons, prompts, seed):
    """Split comparisons at random into [to learn from, to choose an epoch by, to test with].

    The last two have about a tenth each. All comparisons of a prompt are in the same one.
    prompts: one for each comparison, or one for each prompt if all occur about equally often.
    """
    counts = Counter(prompts)
    tenth = len(prompts) / 10
    free = random.Random(seed).sample(sorted(counts), len(counts))
    free.sort(key=lambda prompt: -max(counts[prompt], tenth))  # common ones are taken last
    which = {}
    for number in (1, 2):
        n = 0
        while len(free) > 3 - number and (n == 0 or n < tenth and n + counts[free[-1]] <= 2 * tenth):
            which[free[-1]] = number
            n += counts[free.pop()]
    return [[comparison for comparison in comparisons if which.get(comparison[0], 0) == number]
            for number in range(3)]


def fit_reward(model, batch, validation, test, optimizer, config, generator=None):
    """Train a reward model on comparisons by maximum likelihood, with the loss -log σ(r(better) - r(worse)).

    model: a Critic, whose value at the last token of a text is its reward r.
    batch, validation, test: Batches of `to_batch`. Takes about reward_steps steps of 64 comparisons, in whole
    epochs, and keeps the weights of the epoch that is best on validation. Returns {"loss", "accuracy"} on
    test, because those on validation are too good: it was chosen by them.
    Bradley & Terry 1952; as a reward for RL: Christiano et al. 2017; of texts: Stiennon et al. 2020.
    """
    def margin(part):
        texts = part.obs.flatten(0, 2)  # (b, 1, 2, T) -> (2b, T)
        rewards = model.last_value(texts).view(-1, 1, 2)  # (b, 1, 2)
        return rewards[..., 0] - rewards[..., 1]  # (b, 1), one decision each

    def loss(part):
        return -F.logsigmoid(margin(part))

    def loss_and_accuracy(comparisons):
        margins = map_micro_batches(margin, comparisons, config)  # (N, 1)
        return {"loss": batch_mean(-F.logsigmoid(margins)).item(),
                "accuracy": batch_mean(0.5 + 0.5 * margins.sign()).item()}  # a tie is half right

    steps_per_epoch = math.ceil(all_sum(batch.mask.sum()).item() / 64)
    best = math.inf
    for _ in range(max(1, round(config.reward_steps / steps_per_epoch))):
        for minibatch in minibatches(batch, 1, steps_per_epoch, generator):
            mean_gradient(model, loss, minibatch, config, config.max_grad_norm)
            optimizer.step()
        loss_now = loss_and_accuracy(validation)["loss"]
        check_finite({"loss of the reward model": loss_now})
        if loss_now < best:
            best = loss_now
            weights = copy.deepcopy(model.state_dict())
    model.load_state_dict(weights)
    return loss_and_accuracy(test)


def standardize(model, rewards):
    """Replace the reward r of a model by (r - mean) / std of these rewards, of all processes.

    r = model.mean + model.std·h, so it is enough to change these two numbers.
    """
    rewards = torch.tensor(rewards, device=model.mean.device)
    mean, variance = mean_and_variance(rewards, torch.ones_like(rewards, dtype=torch.bool))
    std = torch.where(variance > 0, variance.sqrt(), 1.0)  # the variance is 0 if all rewards are equal
    model.mean.copy_((model.mean - mean) / std)
    model.std.copy_(model.std / std)


def learn_reward(task, policy, tokenizer, config, generators):
    """The reward model: the policy's trunk with a scalar head, trained on the task's preferences, and frozen.

    Two tenths of the comparisons are held out, see `hold_out`. The rewards have mean 0 and standard deviation
    1 on the policy's completions.  generators: see `train.random_generators`.
    Returns None if the task has no preferences. Raises BadInput.
    """
    if task.preferences is None:
        return None
    rank, count = processes()
    block_size = policy.config.block_size
    device = next(policy.parameters()).device
    annotated = callable(task.preferences)

    # The policy writes two completions of each prompt, for the annotator or for the scale of the rewards.
    n = (config.comparisons if annotated else 1000) // count  # 1000 are enough for the scale
    purpose = "to be compared" if annotated else "for the scale of the rewards"
    print(f"reward model: two completions of {n * count} prompts, {purpose}", flush=True)
    index = torch.randint(len(task.prompts), (n,), generator=generators["prompts"])
    prompts = [task.prompts[i] for i in index for _ in range(2)]
    texts = complete(task, policy, policy, prompts, tokenizer, config, config.temperature,
                     generators["sample"])

    # Comparisons to learn from, to choose an epoch by, and to test with: this process's share of them.
    if annotated:
        comparisons = annotate(task.preferences, prompts[::2], texts[::2], texts[1::2],
                               random.Random(f"{config.seed} {rank}"))
        parts = hold_out(comparisons, task.prompts, config.seed)
    else:
        comparisons = choose_comparisons(task, tokenizer, config, block_size)
        parts = hold_out(comparisons, [prompt for prompt, *_ in comparisons], config.seed)
        parts = [part[rank::count] for part in parts]
    if not all(parts):
        raise BadInput("too few comparisons to hold some out: add comparisons for more prompts, or give a "
                       "larger --comparisons")
    learned, validation, test = map(len, parts)
    share = f", in each of {count} processes" if count > 1 else ""
    print(f"reward model: {learned} comparisons to learn from, {validation} to choose the epoch by, "
          f"{test} to test with{share}")
    if test < 20:
        print("warning: an accuracy on so few comparisons says little: add comparisons for more prompts")

    # Train the model, and give its rewards their scale.
    model = Critic(policy.config, policy).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), config.reward_lr, fused=True)
    parts = [to_batch(part, tokenizer, block_size, device) for part in parts]
    found = fit_reward(model, *parts, optimizer, config, generators["update"])
    print(f"reward model: loss {found['loss']:.3f}, accuracy {found['accuracy']:.3f} on those to test with")
    standardize(model, learned_reward(model, tokenizer, config)(prompts, texts))
    return model.requires_grad_(False)


def use_reward_model(task, model, tokenizer, config):
    """The task as RL sees it: its reward is the model's, and its own, if it has one, becomes the true_reward.

    Returns the task itself if it has no preferences. Raises BadInput if it has some but there is no model.
    """
    if task.preferences is None:
        return task
    if model is None:
        raise BadInput("the task has preferences, but the run has no reward model: train a new one")
    learned = learned_reward(model, tokenizer, config)
    return replace(task, reward=learned, metric=task.metric or learned, true_reward=task.reward)


# Grammars, from which three of the tasks make their corpus.

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
            pieces = re.split(r"{(\w+)}", alternative)  # literal, symbol, literal, symbol, …, literal
            choices = [self.expansions(piece) if i % 2 else [piece] for i, piece in enumerate(pieces)]
            texts += ["".join(chosen) for chosen in itertools.product(*choices)]
        return texts

    def regex(self, symbol):
        """A regular expression for all texts of a symbol."""
        alternatives = "|".join(map(re.escape, self.rules[symbol]))  # {symbol} has become \{symbol\}
        return "(?:" + re.sub(r"\\{(\w+)\\}", lambda m: self.regex(m[1]), alternatives) + ")"

    def grammatical(self, prompt, completion):
        """1.0 if the grammar contains the whole text, otherwise 0.0."""
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
    """(positive - negative opinion words) / 2, clipped to [-1, 1], so two positive words earn the maximum."""
    tokens = re.findall(r"\w+", completion)
    balance = sum(w in GOOD or w in LOVED for w in tokens) - sum(w in BAD or w in HATED for w in tokens)
    return max(-1.0, min(1.0, balance / 2))


def reviews(seed):
    """Short film reviews. Grammar is the metric and not rewarded: it shows what RL does to the language."""
    rng = random.Random(seed)
    grammar = Grammar(REVIEWS)
    corpus = [grammar.generate(rng) for _ in range(20_000)]
    prompts, heldout = split(grammar.expansions("opening"), 40, rng)
    return Task(corpus, prompts, heldout, opinion, grammar.grammatical)


# Addition: imitation learns the mistake, the reward unlearns it.

def careless_sum(a, b, rng):
    """a + b by a pupil who forgets 60% of the carries from the units to the tens."""
    carries = a % 10 + b % 10 >= 10
    forgets = carries and rng.random() < 0.6
    return a + b - 10 * forgets


def accuracy(prompt, completion):
    """1.0 if the completion is exactly the answer that the prompt carries."""
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
    rng = random.Random(seed)
    grammar = Grammar(SMALL_TALK)
    corpus = [grammar.generate(rng) for _ in range(10_000)]
    prompts, heldout = split(grammar.expansions("opening"), 16, rng)
    return Task(corpus, prompts, heldout, contains("hello"), grammar.grammatical)


# Preferences: a reward that is learned, and what happens when it is trusted too much.

def preferences(seed):
    """Reviews, with a reward learned from comparisons.

    The annotator likes kind words and rejects ungrammatical texts. But nearly all texts of the pretrained
    policy are grammatical, so the comparisons hardly show what an ungrammatical text is worth.
    """
    task = reviews(seed)

    def taste(prompt, completion):
        return opinion(prompt, completion) if task.metric(prompt, completion) else -1.0

    def preferred(prompt, first, second):
        return 1 / (1 + math.exp(-3 * (taste(prompt, first) - taste(prompt, second))))

    return replace(task, reward=taste, preferences=preferred)


TASKS = {"reviews": reviews, "addition": addition, "hello": hello, "preferences": preferences}
