"""The policy gradient theorem, by enumeration of every text that a tiny GPT can produce.

The truth is the gradient, by autograd, of J(θ) = Σ p(τ) R(τ), with τ the texts and R their rewards. The
gradients that an algorithm finds for the single texts, weighted by p(τ), must add up to it.
`python tests/test_policy_gradient.py` prints the bias and variance of gae for several γ and λ.
"""

import copy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from advantage import ADVANTAGES, gae, token_rewards, whiten
from algos import Batch, action_log_probs, flatten, ppo, reinforce, trpo
from helpers import on_last_action
from model import GPT, Critic, GPTConfig

V, EOS = 3, 2  # tokens 0 and 1, and the end of text
T = 4  # most tokens after the prompt
PROMPT = [0]
SIZES = GPTConfig(vocab_size=V, block_size=T + 1, n_layer=1, n_head=2, n_embd=4)


def rand(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturbed(model, seed):
    for i, p in enumerate(model.parameters()):
        p.data = p.data.double() + 0.4 * rand(*p.shape, seed=100 * seed + i)
    return model


def make_policy(seed=0):
    return perturbed(GPT(SIZES, torch.Generator().manual_seed(seed)), seed)


def make_critic(seed):
    return perturbed(Critic(SIZES, make_policy(seed)), seed)


def completions(prefix=()):
    if len(prefix) == T or prefix and prefix[-1] == EOS:
        return [prefix]
    return [text for token in range(V) for text in completions((*prefix, token))]


def reward_of(prefix):
    """The reward of a text's last action: a random number that depends on all of the text so far."""
    return rand(1, seed=sum((token + 1) * 5 ** i for i, token in enumerate(prefix))).item()


class Texts:
    """All N texts as the rows of one batch, with random rewards."""

    def __init__(self, policy):
        self.policy, texts = policy, completions()
        self.tokens = torch.tensor([[*PROMPT, *text, *[EOS] * (T - len(text))] for text in texts])
        self.lengths = torch.tensor([len(text) for text in texts])
        self.mask = torch.arange(T) < self.lengths[:, None]
        self.rewards = torch.zeros(len(texts), T, dtype=torch.float64)
        for n, text in enumerate(texts):
            for t in range(len(text)):
                self.rewards[n, t] = reward_of(text[:t + 1])

    def log_probabilities(self, policy):
        """log π(a_t|s_t) (N, T), zero after the end."""
        return action_log_probs(policy(self.tokens[:, :-1]).log_softmax(-1), self.tokens[:, 1:]) * self.mask

    def probabilities(self):
        """p(τ) (N,)."""
        return self.log_probabilities(self.policy).detach().sum(1).exp()

    def exact_gradient(self, objective):
        """∇ Σ p(τ) objective (N,), by autograd. objective: a function of log π (N, T), or a constant."""
        logp = self.log_probabilities(self.policy)
        value = objective(logp) if callable(objective) else objective
        J = (logp.sum(1).exp() * value).sum()
        return flatten(torch.autograd.grad(J, list(self.policy.parameters())))

    def true_values(self, gamma=1.0):
        """V(s_t) (N, T): the expected return of the texts that begin with the same tokens."""
        p, values = self.probabilities(), torch.zeros_like(self.rewards)
        discount = gamma ** torch.arange(T, dtype=torch.float64)
        for n, t in self.mask.nonzero().tolist():
            same = (self.tokens[:, :t + 1] == self.tokens[n, :t + 1]).all(1) & self.mask[:, t]
            returns = self.rewards[same, t:] @ discount[:T - t]
            values[n, t] = (p[same] * returns).sum() / p[same].sum()
        return values

    def gradient(self, rows, advantages, update=reinforce):
        """The gradient that the algorithm finds for these texts: the sum, not the mean, over actions."""
        policy = copy.deepcopy(self.policy)
        logp = self.log_probabilities(policy).detach()
        batch = Batch(self.tokens[rows, :-1], self.tokens[rows, 1:], self.mask[rows], logp[rows], advantages,
                      advantages, 0 * advantages, advantages)
        config = SimpleNamespace(temperature=1.0, micro_batch=1024, max_grad_norm=1e9, clip=0.2, epochs=1,
                                 minibatches=1, target_kl=1, delta=0.01, cg_iters=1, damping=1e9,
                                 fisher_fraction=1.0)
        before = flatten(policy.parameters()).detach()
        stats = update(policy, batch, torch.optim.SGD(policy.parameters(), 1.0), config)
        step = flatten(policy.parameters()).detach() - before
        if update is trpo:  # so much damping leaves the direction of its gradient, at another length
            step *= stats["grad_norm"] / step.norm()
        return step * self.lengths[rows].sum()

    def gradients(self, advantages, update=reinforce):
        """The gradient of each text alone, (N, n)."""
        return torch.stack([self.gradient([n], advantages[[n]], update) for n in range(len(self.tokens))])


def config(gamma=1.0, lam=1.0, group_size=1):
    return SimpleNamespace(gamma=gamma, lam=lam, group_size=group_size)


def assert_equal(gradient, truth):
    torch.testing.assert_close(gradient, truth, rtol=1e-6, atol=1e-6 * truth.norm().item())


@pytest.fixture(scope="module")
def texts():
    return Texts(make_policy())


@pytest.fixture(scope="module")
def truth(texts):
    return texts.exact_gradient(texts.rewards.sum(1))


def test_the_enumeration_is_complete(texts):
    assert len(set(completions())) == len(texts.tokens) == 31
    assert all(text[-1] == EOS or len(text) == T for text in completions())
    assert texts.probabilities().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("update", [reinforce, ppo, trpo])
@pytest.mark.parametrize("estimator", ["returns", "returns less a baseline", "gae"])
def test_the_policy_gradient_is_unbiased(texts, truth, estimator, update):
    """Also with a poor critic, whose values depend on nothing but the state."""
    values = make_critic(5)(texts.tokens[:, :-1]).detach()
    assert values.std() > 0.3
    advantages, _ = ADVANTAGES[estimator.split()[0]](texts.rewards, None, values, texts.mask, config())
    if estimator == "returns less a baseline":
        advantages = advantages - values
    assert_equal(texts.probabilities() @ texts.gradients(advantages, update), truth)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_with_the_true_values_is_unbiased_for_any_lambda(texts, truth, lam):
    advantages, _ = ADVANTAGES["gae"](texts.rewards, None, texts.true_values(), texts.mask, config(lam=lam))
    assert_equal(texts.probabilities() @ texts.gradients(advantages), truth)


def expectation_over_pairs(texts, estimator):
    """The expected gradient under an estimator that compares two texts of the same prompt."""
    p, total = texts.probabilities(), 0
    scores = texts.gradients(texts.mask.double())  # (N, n) ∇log p(τ), for an episode's advantage to multiply
    for i in range(len(p)):
        for j in range(len(p)):
            pair = [i, j]
            rewards = texts.rewards[pair]
            advantages, _ = ADVANTAGES[estimator](rewards, rewards.sum(1), None, texts.mask[pair],
                                                  config(group_size=2))
            gradient = advantages[:, 0] @ scores[pair]
            if (i, j) in ((3, 17), (30, 0)):
                assert_equal(gradient, texts.gradient(pair, advantages))
            total += p[i] * p[j] * gradient / 2
    return total


def test_leave_one_out_is_unbiased(texts, truth):
    assert_equal(expectation_over_pairs(texts, "rloo"), truth)


def test_group_normalization_is_biased_in_length_and_direction(texts, truth):
    gradient = expectation_over_pairs(texts, "grpo")
    assert (gradient - truth).norm() > 0.1 * truth.norm()
    assert torch.cosine_similarity(gradient, truth, dim=0) < 0.999


def test_the_kl_penalty_as_a_reward_has_the_gradient_of_the_kl(texts):
    """J(θ) = Σ p(τ) (score(τ) - β log p(τ)/p_ref(τ)): the penalty depends on θ by itself."""
    beta, scores = 0.3, rand(len(texts.tokens), seed=9)
    logp = texts.log_probabilities(texts.policy).detach()
    ref_logp = texts.log_probabilities(make_policy(seed=1)).detach()
    rewards = token_rewards(on_last_action(scores, texts.mask), texts.mask, logp, ref_logp, beta)
    advantages, _ = ADVANTAGES["returns"](rewards, scores, None, texts.mask, config())
    truth = texts.exact_gradient(lambda logp: scores - beta * (logp - ref_logp).sum(1))
    assert_equal(texts.probabilities() @ texts.gradients(advantages), truth)
    without_penalty = texts.exact_gradient(scores)
    assert (truth - without_penalty).norm() > 0.1 * truth.norm()


# The KL penalty, estimated by k1 = log π/π_ref, k2 = k1² / 2, k3 = π_ref/π - 1 + k1 (Schulman 2020,
# "Approximating KL Divergence"), or exact in each state. As a reward it is a constant, as a loss it is
# differentiated.

def kl_estimates(policy, reference, texts):
    """{name: (N, T)}, zero after the end."""
    logp = policy(texts.tokens[:, :-1]).log_softmax(-1)
    ref_logp = reference(texts.tokens[:, :-1]).log_softmax(-1).detach()
    k1 = action_log_probs(logp - ref_logp, texts.tokens[:, 1:])
    estimates = {"k1": k1, "k2": k1 ** 2 / 2, "k3": (-k1).exp() - 1 + k1,
                 "exact": (logp.exp() * (logp - ref_logp)).sum(-1)}
    return {name: estimate * texts.mask for name, estimate in estimates.items()}


def kl_gradients(texts, reference):
    """The KL of texts, its gradient, and {name: (mean, gradient as a reward, gradient as a loss)}."""
    policy, p = texts.policy, texts.probabilities()
    gradient = lambda value: flatten(torch.autograd.grad(value, list(policy.parameters()), retain_graph=True))
    logp, ref_logp = texts.log_probabilities(policy), texts.log_probabilities(reference).detach()
    kl = (logp.sum(1).exp() * (logp - ref_logp).sum(1)).sum()
    found = {}
    for name, estimate in kl_estimates(policy, reference, texts).items():
        advantages, _ = ADVANTAGES["returns"](estimate.detach(), None, None, texts.mask, config())
        loss = p @ estimate.sum(1)  # p is a constant, because sampling cannot be differentiated
        found[name] = loss.item(), p @ texts.gradients(advantages), gradient(loss)
    return kl.item(), gradient(kl), found


def test_which_estimators_of_the_kl_have_its_gradient(texts):
    reference = make_policy(seed=1)
    kl, truth, found = kl_gradients(texts, reference)
    means, as_reward, as_loss = ({name: row[i] for name, row in found.items()} for i in range(3))
    assert means["k1"] == pytest.approx(kl) == means["k3"] == means["exact"]
    assert means["k2"] != pytest.approx(kl, rel=1e-3)
    assert_equal(as_reward["k1"], truth)
    assert as_loss["k1"].norm() < 1e-9 * truth.norm()  # E[∇log π] = 0: it does nothing
    assert_equal(as_loss["k2"], as_loss["exact"])  # of the KL in the states as they are visited now, and
    assert_equal(as_loss["exact"] + as_reward["exact"], truth)  # of which states will be visited
    # k3 as a reward: the states that follow, and in the action's own state ∇KL(π‖π_ref) - ∇KL(π_ref‖π)
    assert_equal(as_reward["k3"], as_reward["exact"] + as_loss["exact"] - as_loss["k3"])
    wrong = [as_reward["k2"], as_reward["k3"], as_reward["exact"], as_loss["k2"], as_loss["k3"]]
    assert all((gradient - truth).norm() > 0.05 * truth.norm() for gradient in wrong)

    p = texts.probabilities()  # k3 as a loss is the KL the other way round, π_ref first
    logp, ref_logp = (model(texts.tokens[:, :-1]).log_softmax(-1) for model in (texts.policy, reference))
    reverse = p @ ((ref_logp.exp() * (ref_logp - logp)).sum(-1) * texts.mask).sum(1)
    assert_equal(as_loss["k3"], flatten(torch.autograd.grad(reverse, list(texts.policy.parameters()))))


# A text that is cut.

def bias_at_the_cut(texts, truth, lam, bootstrap):
    """|E g - ∇J| / |∇J| with the true values, and with bootstrap (N,) after the last action."""
    advantages, _ = gae(texts.rewards, texts.true_values(), texts.mask, 1.0, lam, bootstrap)
    return ((texts.probabilities() @ texts.gradients(advantages) - truth).norm() / truth.norm()).item()


def values_at_the_cut(texts):
    """What a critic that goes on as before would say after the last token of a text that is cut, else 0."""
    cut = texts.mask[:, -1] & (texts.tokens[:, -1] != EOS)
    return texts.true_values()[:, -1] * cut


def test_a_value_after_the_longest_length_would_bias_the_gradient(texts, truth):
    """The score of a text that is cut is final, so nothing follows."""
    for lam in (0.0, 0.95, 1.0):
        assert bias_at_the_cut(texts, truth, lam, None) < 1e-6
        assert bias_at_the_cut(texts, truth, lam, values_at_the_cut(texts)) > 0.05


def discounted_gradients(texts, gamma):
    """∇J of the discounted sum of rewards; E[Σ ∇log π G_t]; and the latter with a factor γᵗ in each term."""
    powers = gamma ** torch.arange(T, dtype=torch.float64)
    truth = texts.exact_gradient((texts.rewards * powers).sum(1))
    advantages, _ = ADVANTAGES["returns"](texts.rewards, None, None, texts.mask, config(gamma))
    p = texts.probabilities()
    return truth, p @ texts.gradients(advantages), p @ texts.gradients(advantages * powers)


def test_with_a_discount_the_policy_gradient_lacks_a_factor_that_practice_leaves_out(texts):
    truth, without, with_factor = discounted_gradients(texts, 0.8)
    assert_equal(with_factor, truth)
    assert (without - truth).norm() > 0.05 * truth.norm()


# Bias and variance.

def bias_and_variance(texts, truth, values, gamma, lam):
    """Of a single text's gradient g: |E g - ∇J| / |∇J| with J undiscounted, and E|g - E g|² / |∇J|²."""
    advantages, _ = ADVANTAGES["gae"](texts.rewards, None, values, texts.mask, config(gamma, lam))
    p, g = texts.probabilities(), texts.gradients(advantages)
    mean = p @ g
    bias, variance = (mean - truth).norm(), p @ ((g - mean) ** 2).sum(1)
    return (bias / truth.norm()).item(), (variance / truth.norm() ** 2).item()


def imperfect_values(texts, gamma):
    """The true values plus an error of mean 0 and a third of their standard deviation."""
    true, noise = texts.true_values(gamma), make_critic(7)(texts.tokens[:, :-1]).detach()
    return true + whiten(noise, texts.mask) * true[texts.mask].std() / 3


def test_gamma_and_lambda_trade_bias_for_variance(texts, truth):
    bias, variance = {}, {}
    for gamma in (1.0, 0.8):
        values = imperfect_values(texts, gamma)
        for lam in (1.0, 0.5, 0.0):
            measured = bias_and_variance(texts, truth, values, gamma, lam)
            bias[gamma, lam], variance[gamma, lam] = measured
    assert bias[1.0, 1.0] < 1e-6
    assert min(bias[key] for key in bias if key != (1.0, 1.0)) > 0.01
    for gamma in (1.0, 0.8):
        assert bias[gamma, 1.0] < bias[gamma, 0.5] < bias[gamma, 0.0]
        assert max(variance[gamma, 0.5], variance[gamma, 0.0]) < variance[gamma, 1.0]
    for lam in (1.0, 0.5, 0.0):
        assert bias[0.8, lam] > bias[1.0, lam]
    assert variance[0.8, 1.0] < variance[1.0, 1.0]


def main():
    print("policy  gamma  lambda   bias  variance, relative to that with the critic at gamma = lambda = 1")
    for seed in range(3):
        texts = Texts(make_policy(seed))
        truth = texts.exact_gradient(texts.rewards.sum(1))
        _, unit = bias_and_variance(texts, truth, imperfect_values(texts, 1), 1, 1)

        def show(values, gamma, lam, note=""):
            bias, variance = bias_and_variance(texts, truth, values, gamma, lam)
            print(f"{seed:6d}  {gamma:5.2f}  {lam:6.2f}  {bias:5.3f}  {variance / unit:8.2f}   {note}")

        show(torch.zeros_like(texts.rewards), 1, 1, "no critic")
        for gamma in (1, 0.95, 0.8):
            for lam in (1, 0.95, 0.5, 0):
                show(imperfect_values(texts, gamma), gamma, lam)

    for seed in range(3):
        truth, without, _ = discounted_gradients(Texts(make_policy(seed)), 0.8)
        print(f"policy {seed}, gamma 0.8: without the factor gamma^t the gradient is "
              f"{((without - truth).norm() / truth.norm()).item():.2f} of its length off")

    print("\npolicy  KL estimator   mean / KL   error and cosine of the gradient as a reward   as a loss")
    for seed in range(3):
        kl, truth, found = kl_gradients(Texts(make_policy(seed)), make_policy(seed + 1))
        for name, (mean, *gradients) in found.items():
            line = f"{seed:6d}  {name:12} {mean / kl:11.2f}"
            for g in gradients:
                error, cosine = (g - truth).norm() / truth.norm(), torch.cosine_similarity(g, truth, dim=0)
                line += f" {error:20.2f} {cosine:12.2f}"
            print(line)

    print("\npolicy  lambda  bias with a value after the maximum length, without")
    for seed in range(3):
        texts = Texts(make_policy(seed))
        truth = texts.exact_gradient(texts.rewards.sum(1))
        for lam in (1, 0.95, 0.5, 0):
            biases = [bias_at_the_cut(texts, truth, lam, value) for value in (values_at_the_cut(texts), None)]
            print(f"{seed:6d}  {lam:6.2f}  {biases[0]:8.3f} {biases[1]:8.3f}")


if __name__ == "__main__":
    main()
