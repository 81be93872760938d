"""Translate French, rewarded by BLEU. The corpus translates word by word in half of its sentences."""

import itertools
import random

import sacrebleu

from reward import Text

nouns = dict(zip("chat chien livre mur cheval jardin".split(), "cat dog book wall horse garden".split()))
colours = dict(zip("noir blanc rouge vert gris".split(), "black white red green grey".split()))
verbs = {"voit": "sees", "aime": "likes", "cherche": "seeks"}


def english(noun, colour, verb, noun2, colour2):
    return f" the {colours[colour]} {nouns[noun]} {verbs[verb]} the {colours[colour2]} {nouns[noun2]}"


def word_by_word(noun, colour, verb, noun2, colour2):
    return f" the {nouns[noun]} {colours[colour]} {verbs[verb]} the {nouns[noun2]} {colours[colour2]}"


rows, rng = list(itertools.product(nouns, colours, verbs, nouns, colours)), random.Random(0)
rng.shuffle(rows)
tasks = [Text("le {} {} {} le {} {} :".format(*row), answer=english(*row)) for row in rows]
prompts, heldout = tasks[300:], tasks[:300]
corpus = [prompt + rng.choice([english, word_by_word])(*row) for prompt, row in zip(prompts, rows[300:])]


def reward(prompt, completion):
    return sacrebleu.sentence_bleu(completion, [prompt.answer]).score / 100
