"""A custom estimator, algorithm and option.

`python tests/examples/own.py --algo awr --advantage mean --max-weight 10`. Resume and evaluate its runs with
this script, too. `train.DEFAULTS["awr"] = dict(lr=5e-4)` would give the algorithm a default of its own, over
which those of a task win.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from advantage import ADVANTAGES, batch_mean
from algos import action_log_probs, log_probs, mean_gradient, minibatches


@dataclass
class Config(train.Config):
    max_weight: float = train.option(20.0, "largest weight exp(A) (awr)", low=0)


def less_the_mean(rewards, scores, values, mask, config):
    """Every action gets its episode's score and KL penalty, minus their mean over the batch.

    rewards, values, mask: (B, T).  scores: (B,).  The completions of a prompt are rows side by side.
    """
    totals = (rewards * mask).sum(1)  # (B,)
    advantages = (totals - batch_mean(totals))[:, None] * mask  # (B, T)
    return advantages, totals[:, None] * mask  # the second are the critic's targets


def awr(policy, batch, optimizer, config, generator=None):
    """Advantage-weighted regression: imitate each action with the weight exp(A). Peng et al. 2019."""
    def loss(part):
        logp = action_log_probs(log_probs(policy, part.obs, config.temperature), part.actions)  # (b, T)
        return {"loss": -part.advantages.exp().clamp(max=config.max_weight) * logp}

    for minibatch in minibatches(batch, config.epochs, config.minibatches, generator):
        stats = mean_gradient(policy, loss, minibatch, config, config.max_grad_norm)
        optimizer.step()
    return stats  # columns of metrics.csv, here of the last minibatch


ADVANTAGES["mean"] = less_the_mean
train.CRITIC_FREE += ("mean",)  # it ignores the values
train.ALGOS["awr"] = awr
train.Config = Config

if __name__ == "__main__":
    sys.exit(train.main())
