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
from algos import action_log_probs, log_probs, mean_gradient, minibatches


def grpo(policy, batch, optimizer, config, generator=None):
    advantages = group_normalize(batch.scores, config.group_size)[:, None] * batch.mask
    batch, losses = replace(batch, advantages=advantages), []
    for minibatch in minibatches(batch, config.epochs, config.minibatches, generator):
        lengths = minibatch.mask.sum(1)
        mean_length = all_sum(lengths.sum()) / all_sum(torch.ones_like(lengths).sum())

        def loss(part):
            logp = action_log_probs(log_probs(policy, part.obs, config.temperature), part.actions)  # (b, T)
            ratio, log_ratio = (logp - part.logprobs).exp(), part.ref_logprobs - logp
            clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
            k3 = log_ratio.exp() - 1 - log_ratio
            gain = torch.min(ratio * part.advantages, clipped * part.advantages) - config.kl_coef * k3
            return {"loss": -gain * mean_length / part.mask.sum(1, keepdim=True)}  # not by action: by episode

        losses.append(mean_gradient(policy, loss, minibatch, config, config.max_grad_norm)["loss"])
        optimizer.step()
    return {"loss": sum(losses) / len(losses)}


train.ALGOS["grpo"] = grpo

if __name__ == "__main__":
    sys.exit(train.main())
