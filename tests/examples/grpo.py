"""GRPO as published, an algorithm of one's own: `python tests/examples/grpo.py --algo grpo --advantage grpo`.

Unlike `train.py --algo ppo --advantage grpo` it has its KL penalty in the loss, as the estimator k3, and each
episode weighs the same, whatever its length. Shao et al. 2024, "DeepSeekMath", equations 3 and 4.
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from advantage import all_sum, group_normalize
from algos import chosen, gradient_step, log_probs, minibatches


def grpo(policy, batch, optimizer, config, generator=None):
    advantages = group_normalize(batch.scores, config.group_size)[:, None] * batch.mask
    batch, losses = replace(batch, advantages=advantages), []
    for _, mb in minibatches(batch, config.epochs, config.minibatches, generator):
        logp = chosen(log_probs(policy, mb.obs, config.temperature), mb.actions)  # (b, T)
        ratio, log_ratio = (logp - mb.logprobs).exp(), mb.ref_logprobs - logp
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        k3 = log_ratio.exp() - 1 - log_ratio
        gain = torch.min(ratio * mb.advantages, clipped * mb.advantages) - config.kl_coef * k3
        means = gain.masked_fill(~mb.mask, 0).sum(1) / mb.mask.sum(1)  # (b,) of each episode's actions
        loss = -means.sum() / all_sum(torch.tensor(len(means), device=means.device))
        gradient_step(policy, loss, optimizer, config.max_grad_norm)
        losses.append(loss.item())
    return {"loss": sum(losses) / len(losses)}


train.ALGOS["grpo"] = grpo

if __name__ == "__main__":
    sys.exit(train.main())
