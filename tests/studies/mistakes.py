"""Classic mistakes, made on purpose: how wrong is the policy gradient, and what would a run show?

    python tests/studies/mistakes.py bias          # the expected gradient with each mistake: a minute
    python tests/studies/mistakes.py trunk RUN     # what one training of a shared value head does to a policy
    python tests/studies/mistakes.py --mistake late_reward --algo reinforce    # train.py with a mistake
    python tests/studies/compare.py --script tests/studies/mistakes.py --algo reinforce --mistake none,top_p

A mistake is one line of this project, changed: MISTAKES has the right and the wrong text of the line, and
`make` puts the wrong one into the running program. `bias` takes a tiny GPT, two prompts and every completion,
and compares the expected gradient E g of REINFORCE with ∇J by autograd. J is the expected score minus β·KL.
"""

import argparse
import contextlib
import copy
import inspect
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import FunctionType

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parents[1]))

import advantage
import rollout
import train
from advantage import discounted_returns, token_rewards
from algos import Batch, action_log_probs, fit_critic, flatten, mean_kl, reinforce
from helpers import on_last_action
from model import GPT, Critic
from rollout import top_k_top_p
from test_policy_gradient import EOS, SIZES, T, completions, perturbed, rand
from variance import collect, load_run, policy_gradient


@dataclass
class Change:
    function: FunctionType
    right: str  # a part of its source
    wrong: str  # what stands there instead


@dataclass
class Mistake:
    changes: list
    test: str  # fails with it, a file and a function of tests/
    options: dict  # under which its expected gradient is computed
    acts: FunctionType = None  # log π (…, A) -> those of the distribution from which actions are drawn


def kl_in_the_loss(estimator):
    """A KL penalty that is differentiated, in place of that in the reward. estimator: of x = log π/π_ref."""
    changes = [Change(token_rewards, "scores - kl_coef *", "scores - 0 *"),
               Change(reinforce, "return -action_log_probs(logp, part.actions) * part.advantages",
                      "logp = action_log_probs(logp, part.actions)\n"
                      "        x = (logp - part.ref_logprobs).masked_fill(~part.mask, 0)\n"
                      f"        return -logp * part.advantages + config.kl_coef * ({estimator})")]
    return Mistake(changes, LOSS_TEST, ONLY_PENALTY)


def kl_in_the_reward(estimator):
    """Another penalty in the reward than x = log π/π_ref."""
    changes = [Change(token_rewards, "return (scores - kl_coef * (logprobs - ref_logprobs))",
                      f"x = logprobs - ref_logprobs\n    return (scores - kl_coef * ({estimator}))")]
    return Mistake(changes, PENALTY_TEST, ONLY_PENALTY)


RETURNS = dict(advantage="returns", whiten=1, kl_coef=0.0)
CRITIC = dict(advantage="gae", lam=0.95, whiten=0, kl_coef=0.0)  # a perfect one
GROUPS = dict(advantage="grpo", whiten=0, kl_coef=0.1)
ONLY_PENALTY = dict(advantage="rloo", whiten=0, kl_coef=1.0)  # scores are a thousandth: J is minus the KL
LOSS_TEST = "test_algos.py::test_first_step_is_the_policy_gradient"
PENALTY_TEST = "test_advantage.py::test_an_action_pays_where_the_policy_is_likelier_than_the_reference"
SAMPLING_TEST = "test_train.py::test_actions_are_sampled_from_the_policy_that_is_trained"

MISTAKES = {
    # The reward stands one column late.
    "late_reward": Mistake(
        [Change(token_rewards, "return (scores -", "return (scores.roll(1, 1) -")],
        "test_advantage.py::test_the_score_of_an_action_stays_there", dict(RETURNS, kl_coef=0.1)),
    # The end of text, the last token of the vocabulary, gets no gradient.
    "end_untrained": Mistake(
        [Change(reinforce, "* part.advantages", "* part.advantages * (part.actions < logp.shape[-1] - 1)")],
        "test_policy_gradient.py::test_the_policy_gradient_is_unbiased", RETURNS),
    # The tokens of the prompt are trained, too.
    "prompt_trained": Mistake(
        [Change(train.add_advantages, "mask = batch.mask",
                "mask = batch.mask = batch.mask | (batch.mask.cumsum(1) == 0)")],
        "test_train.py::test_collect_aligns_every_number_with_its_action", RETURNS),
    # Texts are sampled at temperature 0.7, and their log-probabilities are those at 1.
    "cold_sampling": Mistake(
        [Change(train.scored_episodes, "config, config.temperature,", "config, 0.7 * config.temperature,")],
        SAMPLING_TEST, RETURNS, lambda logp: (logp / 0.7).log_softmax(-1)),
    # Texts are sampled with top-p, and their log-probabilities are those of all of π.
    "top_p": Mistake(
        [Change(rollout.run_episodes, "tokenizer.eos_token, temperature, generator)",
                "tokenizer.eos_token, temperature, generator, top_p=0.9)")],
        SAMPLING_TEST, RETURNS,
        lambda logp: top_k_top_p(logp.flatten(0, 1), top_p=0.9).view_as(logp).log_softmax(-1)),
    # Advantages are whitened over the padding, too.
    "padding_whitened": Mistake(
        [Change(advantage.whiten, "mean_and_variance(x, mask)", "mean_and_variance(x, mask | True)")],
        "test_advantage.py::test_whiten_uses_the_actions_alone", RETURNS),
    # Each episode's loss is divided by its own length.
    "episode_means": Mistake(
        [Change(reinforce, "* part.advantages", "* part.advantages / part.mask.sum(1, keepdim=True)")],
        LOSS_TEST, RETURNS),
    # A text that reaches the last column of its batch gets the critic's value after its end.
    "value_at_the_cut": Mistake(
        [Change(advantage.gae, "torch.zeros_like(adv) if bootstrap is None",
                "values[:, -1] * mask[:, -1] if True")],
        "test_advantage.py::test_gae_is_the_double_sum_of_its_definition", CRITIC),
    # The KL penalty is divided by the group's standard deviation, as if it were a part of the score.
    "penalty_over_std": Mistake(
        [Change(advantage.from_group, "relative(scores, config.group_size) + penalties",
                "relative(totals, config.group_size)")],
        "test_advantage.py::test_a_group_of_equal_scores_learns_the_kl_penalty_in_proportion_to_its_"
        "coefficient", GROUPS),
    "k1_loss": kl_in_the_loss("x"),
    "k2_loss": kl_in_the_loss("x ** 2 / 2"),
    "k3_loss": kl_in_the_loss("(-x).exp() - 1 + x"),
    "k3_reversed_loss": kl_in_the_loss("x.exp() - 1 - x"),
    "k2_reward": kl_in_the_reward("x ** 2 / 2"),
    "k3_reward": kl_in_the_reward("(-x).exp() - 1 + x"),
}


def make(name):
    """Make a mistake in the running program: change the code of its functions, wherever they are used."""
    for change in MISTAKES[name].changes:
        source = inspect.getsource(change.function)
        if source.count(change.right) != 1:
            raise ValueError(f"{change.function.__name__} does not have the line {change.right!r} once")
        changed = dict(change.function.__globals__)
        exec(source.replace(change.right, change.wrong), changed)
        change.function.__code__ = changed[change.function.__name__].__code__
    remake_estimators()


def remake_estimators():
    """Because those that compare groups were made by a function that may have changed."""
    advantage.ADVANTAGES["rloo"] = advantage.from_group(advantage.leave_one_out)
    advantage.ADVANTAGES["grpo"] = advantage.from_group(advantage.group_normalize)


@contextlib.contextmanager
def made(name):
    """Within the block the program makes the mistake; "none" makes none."""
    changes = MISTAKES[name].changes if name != "none" else []
    right = [(change.function, change.function.__code__) for change in changes]
    try:
        if changes:
            make(name)
        yield
    finally:
        for function, code in right:
            function.__code__ = code
        remake_estimators()


# The expected gradient.

class Census:
    """A batch of pairs of completions, each as often as the policy samples it, in place of a random batch.

    It has the gradient of infinitely large batches, up to an error of 0.01, because the number of pairs is
    finite. It goes through the functions of a run.
    """

    def __init__(self, seed, options, acts=None, pairs=50_000):
        self.policy, reference = (
            perturbed(GPT(replace(SIZES, block_size=T + 2), torch.Generator().manual_seed(s)), s).float()
            for s in (seed, seed + 1))
        self.config = train.Config(group_size=2, micro_batch=10 ** 9, gamma=1.0, **options)
        texts = completions()
        tokens = torch.tensor([[*prompt, *text, *[EOS] * (T - len(text))]
                               for prompt in ([0, 1], [1, 0]) for text in texts])  # (N, T+2)
        self.obs = tokens[:, :-1]
        self.actions = tokens[:, 1:]
        lengths = torch.tensor([len(text) for text in texts * 2])
        columns = torch.arange(T + 1)
        self.mask = (columns >= 1) & (columns <= lengths[:, None])
        self.ref_logprobs = self.log_probabilities(reference).detach()
        self.scores = rand(len(tokens), seed=seed).float()
        if options is ONLY_PENALTY:
            self.scores *= 1e-3
        self.placed_scores = on_last_action(self.scores, self.mask)  # (N, T+1)

        with torch.no_grad():
            q = self.log_probabilities(self.policy, acts).sum(1).exp().view(2, -1)  # of each prompt's texts
        joint = (q[:, :, None] * q[:, None, :] / 2).flatten()  # of all pairs
        counts = (joint.double().cumsum(0) * pairs).round().diff(prepend=torch.zeros(1)).long()
        pair = torch.arange(len(joint)).repeat_interleave(counts)
        n = len(texts)
        self.rows = torch.stack([pair // n, pair // n ** 2 * n + pair % n], 1).flatten()

    def log_probabilities(self, policy, acts=None):
        """log π(a_t|s_t) (N, T+1), 0 where the policy does not act."""
        logp = policy(self.obs).log_softmax(-1)
        logp = acts(logp) if acts else logp
        return action_log_probs(logp, self.actions).masked_fill(~self.mask, 0)

    def __call__(self, obs):
        """V(s_t) (B, T), the expected score of the texts that begin in the same way: a perfect critic."""
        base = SIZES.vocab_size + 1
        states = ((self.obs + 1) * base ** torch.arange(T + 1)).cumsum(1)  # (N, T+1) a number for each prefix
        p = self.log_probabilities(self.policy).sum(1, keepdim=True).exp().expand_as(states)
        weights = torch.stack([p, p * self.scores[:, None]], -1)[self.mask]  # (actions, 2)
        totals = torch.zeros(base ** (T + 1), 2).index_add(0, states[self.mask], weights)
        values = (totals[:, 1] / totals[:, 0]).nan_to_num()  # padding is no state
        return values[((obs + 1) * base ** torch.arange(obs.shape[1])).cumsum(1)]

    def rescale_output(self, mean, std):
        pass

    def truth(self):
        """∇J by autograd. Whitening divides advantages by a standard deviation, and so does this."""
        logp = self.log_probabilities(self.policy)
        p = logp.sum(1).exp() / 2
        penalty = self.config.kl_coef * (logp - self.ref_logprobs)
        J = p @ (self.scores - penalty.sum(1))
        gradient = flatten(torch.autograd.grad(J, list(self.policy.parameters())))
        if self.config.whiten:
            returns = discounted_returns((self.placed_scores - penalty).detach(), self.mask, 1.0)
            gradient /= returns[self.rows][self.mask[self.rows]].std()
        return gradient

    def gradient(self):
        """The gradient that a run finds, as the sum over the actions of an episode."""
        mask = self.mask[self.rows]
        scores = self.placed_scores[self.rows]
        logprobs = self.log_probabilities(self.policy).detach()[self.rows]
        ref_logprobs = self.ref_logprobs[self.rows]
        batch = Batch(self.obs[self.rows], self.actions[self.rows], mask, logprobs, scores=scores.sum(1),
                      ref_logprobs=ref_logprobs)
        batch.rewards = token_rewards(scores, mask, logprobs, ref_logprobs, self.config.kl_coef)
        train.add_advantages(batch, self if self.config.advantage == "gae" else None, self.config)
        return policy_gradient(self.policy, batch, self.config) * batch.mask.sum() / len(mask)


def bias():
    """Print |E g - ∇J| / |∇J| and the cosine of E g and ∇J for each mistake, on three tiny GPTs."""
    rows = {}
    for name, mistake in MISTAKES.items():
        rows.setdefault(f"none: {describe(mistake.options)}", ("none", mistake.options, None))
        rows[name] = (name, mistake.options, mistake.acts)
    print(f"{'':50} |E g - ∇J| / |∇J|    cosine")
    for label, (name, options, acts) in rows.items():
        errors = []
        cosines = []
        for seed in range(3):
            census = Census(seed, options, acts)
            truth = census.truth()
            with made(name):
                g = census.gradient()
            errors.append(f"{((g - truth).norm() / truth.norm()).item():.3f}")
            cosines.append(f"{torch.cosine_similarity(g, truth, dim=0).item():.3f}")
        print(f"{label:50} {' '.join(errors)}  {' '.join(cosines)}", flush=True)


def describe(options):
    return ", ".join(f"{name} {value}" for name, value in options.items())


# A value head on the policy's trunk.

def trunk(run):
    """Print how far one training of the critic moves the policy if both have the same trunk."""
    world, _ = load_run(run, None, argparse.ArgumentParser())
    policy, config = world[1], world[-1]
    critic = Critic(policy.config)
    critic.transformer = policy.transformer
    batch = collect(world, critic, seed=0)
    generator = train.random_generators(0, 10 ** 6, "cpu")["update"]
    old = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(critic.parameters(), config.critic_lr)
    for epoch in range(1, config.critic_epochs + 1):
        fit_critic(critic, batch, optimizer, replace(config, critic_epochs=1), generator)
        print(f"epochs of the critic: {epoch}   KL(old policy || policy): "
              f"{mean_kl(old, policy, batch, config):.4f} nats per token")


# train.py with a mistake.

@dataclass
class Config(train.Config):
    mistake: str = train.option("none", ", ".join(MISTAKES), choices=("none", *MISTAKES))


if __name__ != "mistakes":  # which is its name where a test imports it
    train.Config = Config


def main():
    if sys.argv[1:] == ["bias"]:
        return bias()
    if sys.argv[1:2] == ["trunk"] and len(sys.argv) == 3:
        return trunk(sys.argv[2])
    config, _ = train.parse(sys.argv[1:])
    if config.mistake != "none":
        make(config.mistake)
    return train.main()


if __name__ == "__main__":
    sys.exit(main())
