"""Losses of other papers, each as its loss per action; the rest is that of PPO without its target KL.

`python tests/examples/losses.py --algo gspo --advantage grpo --kl-coef 0`

The papers take advantages that are relative to a group (`--advantage grpo`; for Dr. GRPO `rloo`, which is
K / (K - 1) times theirs) and no KL penalty in the reward (`--kl-coef 0`).
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from advantage import batch_mean
from algos import action_log_probs, log_probs, mean_gradient, minibatches


@dataclass
class Config(train.Config):
    clip_high: float = train.option(0.28, "clip range above 1 (dapo, gspo, cispo); below 1 it is --clip", 0)
    loss_kl: float = train.option(0.04, "coefficient of the KL in the loss (grpo_paper, ppo_k2)", 0)


# A loss: (part, logp, mean_length, config) -> (b, T). part: a micro-batch. logp: (b, T) log π(a|s).
# mean_length: the mean number of actions of an episode of the minibatch. mean_gradient divides by the number
# of actions; a loss times mean_length is divided by the number of episodes instead.

def ppo_objective(ratio, advantages, low, high):
    return torch.min(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def grpo_paper(part, logp, mean_length, config):
    """GRPO as published: the mean over episodes of each one's mean, and the KL in the loss, as k3.

    Shao et al. 2024, "DeepSeekMath", equations 3 and 4.
    """
    objective = ppo_objective((logp - part.logprobs).exp(), part.advantages, config.clip, config.clip)
    log_ratio = (part.ref_logprobs - logp).masked_fill(~part.mask, 0)  # or padding could overflow
    k3 = log_ratio.exp() - 1 - log_ratio
    return -(objective - config.loss_kl * k3) * mean_length / part.mask.sum(1, keepdim=True)


def dr_grpo(part, logp, mean_length, config):
    """Dr. GRPO: a sum over the actions, divided by the same number for short and long episodes.

    Liu et al. 2025, "Understanding R1-Zero-Like Training", section 3.2. The number is max_new_tokens.
    """
    objective = ppo_objective((logp - part.logprobs).exp(), part.advantages, config.clip, config.clip)
    return -objective * mean_length / config.max_new_tokens


def dapo(part, logp, mean_length, config):
    """DAPO: a mean over actions, and more room above 1, so an unlikely action can become likely sooner.

    Yu et al. 2025, "DAPO", equation 8. Its dynamic sampling is in dynamic.py.
    """
    return -ppo_objective((logp - part.logprobs).exp(), part.advantages, config.clip, config.clip_high)


def gspo(part, logp, mean_length, config):
    """GSPO: one ratio for each episode, (π(text) / π_old(text)) to the power of 1 / length, is clipped.

    Zheng et al. 2025, "Group Sequence Policy Optimization", equations 5 and 7. A micro-batch holds whole
    episodes, so its size changes nothing.
    """
    length = part.mask.sum(1, keepdim=True)  # (b, 1)
    log_ratio = (logp - part.logprobs).masked_fill(~part.mask, 0).sum(1, keepdim=True) / length
    objective = ppo_objective(log_ratio.exp(), part.advantages, config.clip, config.clip_high)  # (b, T)
    return -objective * mean_length / length


def cispo(part, logp, mean_length, config):
    """CISPO: REINFORCE with the ratio as a weight, which is bounded above; no action loses its gradient.

    MiniMax 2025, "MiniMax-M1", equations 4 and 5, without their lower bound, which they do not use.
    """
    weight = (logp - part.logprobs).exp().clamp(max=1 + config.clip_high).detach()
    return -weight * part.advantages * logp


def ppo_k2(part, logp, mean_length, config):
    """PPO with k2 = (log π - log π_ref)² / 2 in the loss, whose mean gradient is that of a state's exact KL.

    Schulman 2020, "Approximating KL Divergence"; Tang & Munos 2025.
    """
    objective = ppo_objective((logp - part.logprobs).exp(), part.advantages, config.clip, config.clip)
    return -objective + config.loss_kl * (logp - part.ref_logprobs) ** 2 / 2


def algorithm(loss):
    """The algorithm with this loss: epochs of minibatch steps."""
    def update(policy, batch, optimizer, config, generator=None):
        steps = []
        for minibatch in minibatches(batch, config.epochs, config.minibatches, generator):
            mean_length = batch_mean(minibatch.mask.sum(1).float())

            def loss_of_part(part):
                logp = log_probs(policy, part.obs, config.temperature)  # (b, T, A)
                return loss(part, action_log_probs(logp, part.actions), mean_length, config)

            steps.append(mean_gradient(policy, loss_of_part, minibatch, config, config.max_grad_norm))
            optimizer.step()
        return {name: fmean(step[name] for step in steps) for name in steps[0]}
    return update


for function in (grpo_paper, dr_grpo, dapo, gspo, cispo, ppo_k2):
    train.ALGOS[function.__name__] = algorithm(function)
train.DEFAULTS["gspo"] = dict(clip=3e-4, clip_high=4e-4)  # the paper's
train.Config = Config

if __name__ == "__main__":
    sys.exit(train.main())
