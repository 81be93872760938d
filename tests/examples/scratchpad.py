"""Sums of four digits, worked out column by column from the right, as pupils do who forget a carry.

A text is "4827+0935=7+5+0=12 2+3+1=06 8+9+0=17 4+0+1=05 05762". In the corpus a third of the carries, at
random, is forgotten, so imitation gets about half of the sums right. The reward looks at the sum alone: how
the columns are to be done is left to RL.

`python train.py --task tests/examples/scratchpad.py --vocab-size 257 --max-new-tokens 46 --iterations 20`
"""

import random

from reward import Text


def worked_out(a, b, rng=None):
    """The columns of a + b and the sum. With rng, a third of the carries is forgotten."""
    carry = 0
    columns = []
    digits = ""
    for x, y in zip(reversed(a), reversed(b)):
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}+{carry}={total:02d}")
        digits = str(total % 10) + digits
        carry = total // 10
        if rng is not None and rng.random() < 1 / 3:
            carry = 0
    return f"{' '.join(columns)} {carry}{digits}"


rng = random.Random(0)
problems = [(f"{rng.randrange(10_000):04d}", f"{rng.randrange(10_000):04d}") for _ in range(20_500)]
problems = list(dict.fromkeys(problems))
corpus = [f"{a}+{b}={worked_out(a, b, rng)}" for a, b in problems[500:]]
prompts = [Text(f"{a}+{b}=", answer=f"{int(a) + int(b):05d}") for a, b in problems[500:]]
heldout = [Text(f"{a}+{b}=", answer=f"{int(a) + int(b):05d}") for a, b in problems[:500]]


def reward(prompt, completion):
    return float(completion.split(" ")[-1] == prompt.answer)


def metric(prompt, completion):  # every column is right, too
    a, b = prompt[:-1].split("+")
    return float(completion == worked_out(a, b))
