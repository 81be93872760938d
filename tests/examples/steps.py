"""A reward for each action, on the sums of scratchpad.py.

Each column before the first wrong one is worth a quarter, and the right sum 1, at the last action.

`python train.py --task tests/examples/steps.py --vocab-size 257 --max-new-tokens 46 --iterations 20`
"""
import scratchpad

corpus, prompts, heldout = scratchpad.corpus, scratchpad.prompts, scratchpad.heldout
metric = scratchpad.metric


def right_columns(text, solution):
    """The number of columns that are finished and right, up to the first one that is wrong."""
    n = 0
    for column, right in zip(text.split(" ")[:-1], solution.split(" ")[:-1]):
        if column != right:
            break
        n += 1
    return n


def reward(prompt, completion):
    """A number for each of completion.tokens: a column is paid for at the token that finishes it."""
    solution = scratchpad.worked_out(*prompt[:-1].split("+"))
    rewards, text, paid = [], "", 0
    for token in completion.tokens:
        text += token
        rewards.append(0.25 * (right_columns(text, solution) - paid))
        paid = right_columns(text, solution)
    rewards[-1] += float(completion.split(" ")[-1] == prompt.answer)
    return rewards
