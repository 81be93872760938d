"""Rewards to advantages: pure functions on (B, T) tensors.

Column t of every tensor belongs to the action that chose token t + 1 of its row. mask (B, T) is True where
the policy acted; elsewhere inputs are ignored and outputs are zero. Time is counted in actions: a recursion
passes over prompts and padding.
"""

import torch
import torch.distributed as dist


# Several processes (torchrun) hold a part of the batch each; every mean is over the whole of it.

def processes():
    """(rank of this process, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_sum(x):
    """The sum of x over all processes, the same bits on each. It has no gradient."""
    total = x.detach()
    if dist.is_initialized():
        total = total.clone()
        dist.all_reduce(total)
    return total


def batch_mean(x):
    """The mean of x, of any shape, over the elements of all processes."""
    return all_sum(x.sum()) / all_sum(torch.tensor(x.numel(), device=x.device))


def masked_mean(x, mask):
    """The mean of x (B, T) over the actions of the batch."""
    return all_sum(x.masked_fill(~mask, 0).sum()) / all_sum(mask.sum())


def mean_and_variance(x, mask):
    """The mean and the variance of x (B, T) over the actions of the batch."""
    mean = masked_mean(x, mask)
    return mean, masked_mean((x - mean) ** 2, mask)


def token_rewards(scores, mask, logprobs, ref_logprobs, kl_coef):
    """r_t = -β (log π(a_t|s_t) - log π_ref(a_t|s_t)) for each action, plus the score on the last one.

    scores: (B,), one per sequence.  mask: (B, T).  logprobs, ref_logprobs: (B, T), of the sampled actions.
    kl_coef: β, in units of reward per nat.  Returns (B, T). A row sums to its score minus β times the
    log-ratio of the sampled text, in expectation to score - β KL(π‖π_ref).
    Ziegler et al. 2019, "Fine-Tuning Language Models from Human Preferences", equation 2.
    """
    rewards = -kl_coef * (logprobs - ref_logprobs).masked_fill(~mask, 0)
    actions_left = mask.flip(1).cumsum(1).flip(1)  # (B, T), this one included
    last = mask & (actions_left == 1)
    return rewards + scores[:, None] * last  # the reward sits on the last action, usually the end of text


def discounted_returns(rewards, mask, gamma):
    """Reward-to-go: G_t = r_t + γ G_{t+1}, zero after the last action.

    rewards, mask: (B, T).  gamma: discount per action, in [0, 1].  Returns (B, T).
    """
    returns = torch.zeros_like(rewards)
    G = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        G = torch.where(mask[:, t], rewards[:, t] + gamma * G, G)
        returns[:, t] = G
    return returns.masked_fill(~mask, 0)


def gae(rewards, values, mask, gamma, lam, bootstrap=None):
    """Generalized advantage estimation: A_t = Σ_k (γλ)^k δ_{t+k}, with δ_t = r_t + γ V(s_{t+1}) - V(s_t).

    λ=0 is the TD(0) error, λ=1 the Monte-Carlo return minus the baseline V. After the last action V is 0,
    also where a text is cut at its longest length: its score is final, so that nothing follows.
    rewards, values, mask: (B, T), values the critic's V(s_t) before action t.  gamma, lam: in [0, 1].
    bootstrap: (B,) the value of the state after the last action, where a time limit interrupted an episode
    that would have gone on to earn rewards; None where all ended, as texts do.
    Returns advantages (B, T) and returns (B, T) = advantages + values, the critic's targets.
    Schulman et al. 2016, "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation", equation 16.
    """
    advantages = torch.zeros_like(rewards)
    adv = torch.zeros_like(rewards[:, 0])  # (B,) A_{t+1}
    next_value = torch.zeros_like(adv) if bootstrap is None else bootstrap  # (B,) V(s_{t+1})
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        adv = torch.where(mask[:, t], delta + gamma * lam * adv, adv)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        advantages[:, t] = adv
    return advantages.masked_fill(~mask, 0), (advantages + values).masked_fill(~mask, 0)


def leave_one_out(scores, group_size):
    """Each score minus the mean of the others in its group: a baseline independent of the action, so no bias.

    scores: (B,), the samples of one prompt side by side.  group_size: K ≥ 2, samples per prompt.
    Returns (B,).  RLOO: Kool et al. 2019; Ahmadian et al. 2024, "Back to Basics".
    """
    groups = scores.view(-1, group_size)
    deviation = groups - groups.mean(1, keepdim=True)  # (K-1)/K of the difference from the others' mean
    return (deviation * group_size / (group_size - 1)).view(-1)


def group_normalize(scores, group_size, eps=1e-4):
    """Each score minus its group's mean, divided by its group's standard deviation.

    scores: (B,), the samples of one prompt side by side.  group_size: K ≥ 2, samples per prompt.
    Returns (B,), close to zero in a group of equal scores.
    GRPO: Shao et al. 2024, "DeepSeekMath", section 4.1.2.
    """
    groups = scores.view(-1, group_size)
    return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + eps)).view(-1)


def whiten(x, mask, eps=1e-8):
    """x (B, T) shifted and scaled to mean 0 and variance 1 over the actions; 0 elsewhere."""
    mean, variance = mean_and_variance(x, mask)
    return ((x - mean) * (variance + eps).rsqrt()).masked_fill(~mask, 0)


# What --advantage chooses from: (rewards, scores, values, mask, config) -> advantages and critic's targets,
# (B, T). rewards (B, T): of `token_rewards`, scores (B,) included.  values (B, T): 0 without a critic.

def from_returns(rewards, scores, values, mask, config):
    returns = discounted_returns(rewards, mask, config.gamma)
    return returns, returns


def from_gae(rewards, scores, values, mask, config):
    return gae(rewards, values, mask, config.gamma, config.lam)


def from_group(relative):
    """Every action of an episode gets its score and its KL penalty, both relative to the prompt's group.

    relative: leave_one_out or group_normalize, for the scores. The penalty is never normalized: where all
    scores of a group are equal, its noise would become as large as a difference of scores, whatever β is.
    gamma and lam play no part.
    """
    def estimate(rewards, scores, values, mask, config):
        totals = rewards.masked_fill(~mask, 0).sum(1)  # (B,) score minus KL penalty
        penalties = leave_one_out(totals - scores, config.group_size)
        return (relative(scores, config.group_size) + penalties)[:, None] * mask, totals[:, None] * mask
    return estimate


ADVANTAGES = {"gae": from_gae, "returns": from_returns,
              "rloo": from_group(leave_one_out), "grpo": from_group(group_normalize)}
WITHOUT_CRITIC = ("returns", "rloo", "grpo")  # those that ignore the values
