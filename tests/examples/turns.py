"""A task of two turns: the policy guesses a number, the text answers, and the policy guesses again.

`python train.py --task tests/examples/turns.py --pretrain-steps 400`. In the corpus both guesses are random,
and one of them is right in a fifth of the texts. RL learns to begin in the middle and to use the answer.
"""
import random

from rollout import Text, compare_with_reference, sample

NUMBERS = [*"123456789"]


def answer(secret, guess):
    if guess not in NUMBERS:
        return " what"
    return " right" if guess == secret else " higher" if guess < secret else " lower"


def run_episodes(policy, reference, prompts, tokenizer, config, temperature, generator):
    """One action, the answer, one action. Returns a Batch whose mask has a hole, and the completions."""
    tokens = [tokenizer.encode(prompt) for prompt in prompts]
    starts = [len(row) - 1 for row in tokens]  # the columns of the first actions
    first = sample(policy, tokens, 1, tokenizer.eos_token, temperature, generator)
    for row, prompt, guess in zip(tokens, prompts, first.actions[first.mask].tolist()):
        said = answer(prompt.secret, tokenizer.decode([guess]).strip())
        row += [guess, *tokenizer.encode(said)]
    batch = sample(policy, tokens, 1, tokenizer.eos_token, temperature, generator)
    batch.mask[range(len(starts)), starts] = True  # a turn of n actions: the n columns from its start on
    return batch, compare_with_reference(batch, policy, reference, tokenizer, config)


def text(name, rng):
    secret, first, second = rng.choices(NUMBERS, k=3)
    return f"{name} thinks of a number. {first}{answer(secret, first)} {second}"


rng = random.Random(0)
names = "ada ben cleo dan eva finn gus hana ida jon kim leo mia nora otto pia".split()
corpus = [text(name, rng) for name in names for _ in range(300)]
prompts = [Text(f"{name} thinks of a number.", secret=secret) for name in names[4:] for secret in NUMBERS]
heldout = [Text(f"{name} thinks of a number.", secret=secret) for name in names[:4] for secret in NUMBERS]


def reward(prompt, completion):  # the completion is " 7 lower 2"
    return float(prompt.secret in completion)
