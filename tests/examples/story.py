"""Your own text, story.txt in the directory where you run this: more of the sea in it, and an ending."""

import random
import re
from pathlib import Path

from reward import contains, repetition

text = Path("story.txt").read_text(encoding="utf-8")
corpus = re.split(r"\n\s*\n\s*", text.strip())  # paragraphs between empty lines: two dozen, or a whole book
openings = {re.match(r"\S+\s+\S+\s+\S+", paragraph)[0] for paragraph in corpus if len(paragraph.split()) > 9}
openings = sorted(openings)  # the first three words, with the white space between them
random.Random(0).shuffle(openings)
prompts, heldout = openings[10:], openings[:10]


def reward(prompt, completion):
    return contains("sea")(prompt, completion) + 0.5 * completion.ended - repetition(prompt, completion)


def metric(prompt, completion):  # how likely the pretrained model finds it: what is left of the language
    return completion.mean_ref_logprob
