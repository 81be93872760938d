"""Dynamic sampling: draw batches until enough groups have different scores. Yu et al. 2025, "DAPO".

`python tests/examples/dynamic.py --task hello --advantage grpo`. Groups of equal scores teach nothing there.
They fill the batch after MAX_DRAWS draws. The columns describe the episodes that are kept.
"""
import sys
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from algos import Batch

MAX_DRAWS = 8


def collect(task, policy, reference, critic, tokenizer, config, generators):
    n_groups = config.batch_size // config.group_size // train.processes()[1]  # of this process
    useful, uniform, draws = [], [], 0  # groups: (Batch, prompts, completions) each
    while len(useful) < n_groups and draws < MAX_DRAWS:
        draws += 1
        batch, *texts = train.scored_episodes(task, policy, reference, tokenizer, config, generators)
        for start in range(0, len(batch.mask), config.group_size):
            rows = slice(start, start + config.group_size)
            groups = useful if len(batch.scores[rows].unique()) > 1 else uniform
            groups.append((batch.rows(rows), *(text[rows] for text in texts)))
    batches, prompts, completions = zip(*(useful + uniform)[:n_groups])
    batch = concatenate(batches)
    stats = train.episode_statistics(task, sum(prompts, []), sum(completions, []), batch, config)
    stats["advantage_std"] = train.add_advantages(batch, critic, config)
    return batch, stats | {"episodes": draws * config.batch_size}  # sampled, not kept


def concatenate(batches):
    whole = Batch(None, None, None)
    for name in [name for name, x in vars(batches[0]).items() if x is not None]:
        rows = [row for batch in batches for row in getattr(batch, name)]
        setattr(whole, name, pad_sequence(rows, batch_first=True) if rows[0].dim() else torch.stack(rows))
    return whole


if __name__ == "__main__":
    sys.exit(train.main(collect=collect))
