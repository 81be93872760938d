"""An algorithm with a state, a schedule, and a logger for TensorBoard if that is installed.

`python tests/examples/hooks.py --algo average --advantage rloo`, then `tensorboard --logdir runs`.
"""
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from advantage import batch_mean
from algos import reinforce

try:
    from torch.utils.tensorboard import SummaryWriter
except ImportError:
    SummaryWriter = None


def average(policy, batch, optimizer, config, generator=None):
    """REINFORCE whose baseline is a moving average of the scores of earlier batches. Williams 1992."""
    totals = batch.rewards.sum(1)  # (B,) score plus KL penalty
    mean = batch_mean(totals).item()
    baseline = optimizer.state.get("baseline", mean)
    # Saved and restored with the run. A value is a tensor, a Python number, or a list or dict of these. A
    # tensor comes back on the CPU.
    optimizer.state["baseline"] = 0.9 * baseline + 0.1 * mean
    advantages = (totals - baseline)[:, None] * batch.mask  # (B, T)
    stats = reinforce(policy, replace(batch, advantages=advantages), optimizer, config)
    return stats | {"baseline": baseline}


def decay(iteration):
    """The learning rate is 3e-3 and falls by 3% at each iteration, whatever --lr is."""
    return {"lr": 3e-3 * 0.97 ** (iteration - 1)}


@cache
def writer_of(run):
    return SummaryWriter(run)


def log(run, table, row):
    """run: its directory.  table: "metrics" or "eval".  row: a new row of it, {column: number}."""
    for name, value in row.items():
        writer_of(run).add_scalar(f"{table}/{name}", value, row["iteration"])
    writer_of(run).flush()


train.ALGOS["average"] = average

if __name__ == "__main__":
    sys.exit(train.main(schedule=decay, log=log if SummaryWriter else None))
