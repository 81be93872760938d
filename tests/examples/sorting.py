"""Sort five digits. The author of the corpus often swaps two neighbours. A prompt carries its answer."""
import random

from reward import Text


def careless(digits, rng):
    digits, i = sorted(digits), rng.randrange(4)
    if rng.random() < 0.5:
        digits[i:i + 2] = digits[i + 1], digits[i]
    return " ".join(digits)

rng = random.Random(0)
rows = sorted({tuple(rng.choices("0123456789", k=5)) for _ in range(10_000)})
rng.shuffle(rows)
tasks = [Text(f"{' '.join(row)} sorted", answer=" " + " ".join(sorted(row))) for row in rows]
prompts, heldout = tasks[500:], tasks[:500]
corpus = [f"{prompt} {careless(row, rng)}" for prompt, row in zip(prompts, rows[500:])]

def reward(prompt, completion):
    return completion == prompt.answer
