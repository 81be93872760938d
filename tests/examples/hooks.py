"""An algorithm with a state, a schedule, and a logger for TensorBoard if that is installed.

`python tests/examples/hooks.py --algo average --advantage rloo`, then `tensorboard --logdir runs`.
"""
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import train
from advantage import batch_mean
from algos import reinforce


def average(policy, batch, optimizer, config, generator=None):
    """REINFORCE whose baseline is a moving average of the scores of earlier batches. Williams 1992."""
    mean = batch_mean(batch.scores).item()
    baseline = optimizer.state.get("baseline", mean)
    # Saved and restored with the run. A key is a string; a value is a tensor, a number, a list or a dict.
    optimizer.state["baseline"] = 0.9 * baseline + 0.1 * mean
    advantages = (batch.scores - baseline)[:, None] * batch.mask  # (B, T)
    stats = reinforce(policy, replace(batch, advantages=advantages), optimizer, config)
    return stats | {"baseline": baseline}


def decay(iteration):
    """The learning rate falls by 3% at each iteration, also after --resume."""
    return {"lr": 3e-3 * 0.97 ** iteration}


def log(table, row):
    """table: "metrics" or "eval".  row: a new row of it, {column: number}."""
    for name, value in row.items():
        writer.add_scalar(f"{table}/{name}", value, row["iteration"])


train.ALGOS["average"] = average

if __name__ == "__main__":
    try:
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter("runs/tensorboard")
    except ImportError:
        log = None
    sys.exit(train.main(schedule=decay, log=log))
