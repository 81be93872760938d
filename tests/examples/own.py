"""An estimator and an algorithm of one's own: `python tests/examples/own.py --algo awr --advantage mean`."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from advantage import ADVANTAGES, batch_mean
from algos import chosen, log_probs, mean_gradient, minibatches


def less_the_mean(rewards, scores, values, mask, config):
    """Every action gets its episode's score and KL penalty, minus their mean over the batch."""
    totals = (rewards * mask).sum(1)  # (B,)
    advantages = (totals - batch_mean(totals))[:, None] * mask  # (B, T)
    return advantages, totals[:, None] * mask  # the second are the critic's targets


def awr(policy, batch, optimizer, config, generator=None):
    """Advantage-weighted regression: imitate each action with the weight exp(A). Peng et al. 2019."""
    def loss(part):
        logp = chosen(log_probs(policy, part.obs, config.temperature), part.actions)  # (b, T)
        return {"loss": -part.advantages.exp().clamp(max=20) * logp}

    for minibatch in minibatches(batch, config.epochs, config.minibatches, generator):
        stats = mean_gradient(policy, loss, minibatch, config, config.max_grad_norm)
        optimizer.step()
    return stats  # columns of metrics.csv, here of the last minibatch


ADVANTAGES["mean"] = less_the_mean
train.ALGOS["awr"] = awr

if __name__ == "__main__":
    sys.exit(train.main())
