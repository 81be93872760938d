"""Teach a tiny GPT to write, then improve it with policy gradients: `python train.py --algo trpo`.

A run pretrains a GPT on the corpus of a task, learns a reward if the task has preferences, evaluates on
held-out prompts, trains with RL, and evaluates again. Its files are in runs/NAME. A run recovers from its
last checkpoint, which is written atomically every few iterations. `--resume` repeats the iterations after it
bit for bit, because the random numbers of an iteration depend only on (seed, iteration).

Read `collect`, `train` and `evaluate` first. This file leaves out comparisons of several runs, because
tests/studies/compare.py makes them from runs of this program.
"""

import argparse
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch.nn.utils.rnn import pad_sequence

from advantage import (
    ADVANTAGES,
    CRITIC_FREE,
    GROUP_BASED,
    batch_mean,
    discounted_returns,
    masked_mean,
    mean_and_variance,
    processes,
    token_rewards,
    whiten,
)
from algos import (
    Batch,
    action_log_probs,
    check_finite,
    fit_critic,
    log_probs,
    map_micro_batches,
    mean_gradient,
    mean_kl,
    ppo,
    reinforce,
    trpo,
)
from model import (
    GPT,
    BadInput,
    Critic,
    GPTConfig,
    Tokenizer,
    load_checkpoint,
    save_checkpoint,
    write_atomically,
)
from reward import TASKS, Task, distinct_n, learn_reward, load_task, score, score_actions, use_reward_model
from rollout import check_boundaries, check_fit, complete

ALGOS = {"reinforce": reinforce, "trpo": trpo, "ppo": ppo}


# Options.

def option(default, help, low=None, high=1e9, choices=None):
    """A field of Config with its help, range and choices for the command line."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class Config:
    task: str = option("reviews", f"{', '.join(TASKS)}, or a Python file that defines a task")
    algo: str = option("trpo", ", ".join(ALGOS))
    advantage: str = option("gae", "advantage estimator", choices=ADVANTAGES)
    name: str = option("", "directory of the run in --out (default TASK-ALGO-SEED, TASK-ALGO-ADVANTAGE-SEED)")
    out: str = option("runs", "directory of all runs and of the pretrained weights")
    overwrite: bool = option(False, "replace the run of that name")
    seed: int = option(0, "random seed for RL", 0)
    device: str = option("auto", "auto, cpu, cuda or mps")
    threads: int = option(0, "CPU threads, 0 for torch's choice", 0, 1024)
    micro_batch: int = option(1024, "maximum tokens per forward and backward pass; affects memory and speed, "
                                    "not the results", 1)

    init: str = option("", "initial weights: a run or a checkpoint")
    pretrain_seed: int = option(0, "random seed for the corpus, the initial weights and pretraining", 0)
    tokenizer: str = option("bpe", "bpe learned from the corpus, or gpt2's", choices=("bpe", "gpt2"))
    vocab_size: int = option(512, "maximum number of tokens in the learned vocabulary", 257)
    block_size: int = option(64, "context length, in tokens", 2)
    n_layer: int = option(2, "transformer blocks", 1)
    n_head: int = option(4, "attention heads per block", 1)
    n_embd: int = option(96, "embedding size", 1)
    pretrain_steps: int = option(1500, "maximum-likelihood steps", 0)
    pretrain_batch: int = option(48, "texts per step", 1)
    pretrain_lr: float = option(1e-2, "peak learning rate", 0)

    comparisons: int = option(8000, "maximum number of comparisons to learn the reward from", 20)
    reward_steps: int = option(450, "training steps of 64 comparisons", 1)
    reward_lr: float = option(1e-3, "Adam learning rate of the reward model", 0)

    iterations: int = option(40, "RL iterations", 0)
    batch_size: int = option(256, "episodes per iteration", 1)
    group_size: int = option(4, "episodes per prompt", 1)
    max_new_tokens: int = option(40, "maximum length of a completion, in tokens", 1)
    temperature: float = option(1.0, "divides the logits, in sampling and in training", 1e-3)
    kl_coef: float = option(0.1, "KL penalty coefficient beta, reward per nat", 0)
    gamma: float = option(1.0, "discount per token (returns, gae)", 0, 1)
    lam: float = option(0.95, "lambda (gae)", 0, 1)
    whiten: int = option(1, "whiten the advantages: 0 or 1", 0, 1)

    lr: float = option(1e-3, "Adam learning rate (all but trpo)", 0)
    max_grad_norm: float = option(1.0, "clip the gradient to this norm (all but trpo)", 0)
    epochs: int = option(4, "epochs over the batch (ppo)", 1)
    minibatches: int = option(4, "minibatches per epoch (ppo, critic)", 1)
    clip: float = option(0.2, "clip range epsilon of the probability ratio (ppo)", 0)
    target_kl: float = option(0.03, "end an update when the mean KL from the old policy exceeds this, in "
                                    "nats (ppo)", 0)
    delta: float = option(0.01, "trust-region radius: maximum mean KL of an update, in nats (trpo)", 0)
    cg_iters: int = option(10, "conjugate gradient iterations (trpo)", 1)
    damping: float = option(0.1, "added to the diagonal of the Fisher matrix (trpo)", 0)
    fisher_fraction: float = option(0.1, "share of the episodes in Fisher products (trpo)", 1e-6, 1)
    critic_lr: float = option(3e-3, "Adam learning rate of the critic", 0)
    critic_epochs: int = option(2, "epochs over the batch (critic)", 1)

    eval_episodes: int = option(1000, "sampled completions per evaluation", 2)
    eval_every: int = option(0, "iterations between evaluations; 0: only before and after RL", 0)
    save_every: int = option(5, "iterations between checkpoints", 1)


# Defaults that differ by advantage, algorithm, task, task and algorithm together, and weights of --init. The
# later of these wins if two name an option, and an option that is given wins over all. The step sizes of
# reviews and addition were tuned on another corpus than the reported one, by tests/studies/tuning.py.
DEFAULTS = {
    "rloo": dict(whiten=0),
    "grpo": dict(whiten=0),
    "reinforce": dict(lr=3e-3),
    "reviews": dict(vocab_size=620, max_new_tokens=44),
    "addition": dict(vocab_size=257, block_size=16, max_new_tokens=4, n_embd=128, n_head=8,
                     pretrain_steps=4500, pretrain_batch=64, pretrain_lr=3e-3, kl_coef=0.01,
                     iterations=150, group_size=1, lr=1e-4, damping=1.0),
    "addition reinforce": dict(lr=1e-3),
    "hello": dict(vocab_size=448, block_size=48, max_new_tokens=28),
    "preferences": dict(vocab_size=620, max_new_tokens=44),
    "init": dict(pretrain_steps=0),
    "large init": dict(pretrain_steps=0, pretrain_batch=32, pretrain_lr=1e-4, batch_size=64, lr=1e-5,
                       critic_lr=1e-4, reward_lr=1e-4, eval_episodes=64),  # 10 million weights or more
}


# An iteration's episodes.

def random_generators(seed, iteration, device):
    """Random numbers for an iteration, {purpose: generator}, from (seed, iteration, process) only.

    The global generators, which a custom reward or algorithm may use, are seeded in the same way.
    """
    def number(purpose):
        return zlib.crc32(f"{purpose} {seed} {iteration} {processes()[0]}".encode())  # 32 bits: numpy's limit

    seed_globally(number("global"))
    return {purpose: torch.Generator(device if purpose == "sample" else "cpu").manual_seed(number(purpose))
            for purpose in ("prompts", "sample", "update")}


def seed_globally(number):
    """Seed the global generators of Python, numpy and torch. number: 0 to 2³² - 1."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def collect(task, policy, reference, critic, tokenizer, config, generators):
    """Sample prompts, complete them, score the completions, and turn scores into advantages.

    Returns this process's share of the Batch, and statistics over the episodes of all processes, which are
    columns of metrics.csv.  critic: None if the estimator does not use one.  generators: `random_generators`.
    `main` takes another function in place of this one, such as that of tests/examples/dynamic.py.
    """
    batch, prompts, completions = scored_episodes(task, policy, reference, tokenizer, config, generators)
    stats = episode_statistics(task, prompts, completions, batch, config)
    stats["advantage_std"] = add_advantages(batch, critic, config)
    return batch, stats


def scored_episodes(task, policy, reference, tokenizer, config, generators):
    """Complete random prompts, group_size times each, side by side, and score the completions.

    Returns a Batch, without values, advantages and returns; its prompts; and its completions.
    """
    n = config.batch_size // config.group_size // processes()[1]
    index = torch.randint(len(task.prompts), (n,), generator=generators["prompts"])
    prompts = [task.prompts[i] for i in index for _ in range(config.group_size)]
    batch, completions = task.run_episodes(policy, reference, prompts, tokenizer, config, config.temperature,
                                           generators["sample"])

    # A reward that is one number is the score of the last action; the other actions get 0.
    numbers = [number for row in score_actions(task.reward, prompts, completions) for number in row]
    scores = torch.zeros_like(batch.logprobs)  # (B, T)
    scores[batch.mask] = torch.tensor(numbers, device=scores.device)  # row by row
    batch.scores = scores.sum(1)  # (B,)
    batch.rewards = token_rewards(scores, batch.mask, batch.logprobs, batch.ref_logprobs, config.kl_coef)
    return batch, prompts, completions


def add_advantages(batch, critic, config):
    """Fill in returns, values, advantages and targets of a Batch, all of them (B, T).

    Returns the standard deviation of the advantages before they are whitened, a column of metrics.csv.
    """
    rewards = batch.rewards
    mask = batch.mask
    batch.returns = discounted_returns(rewards, mask, config.gamma)
    batch.values = torch.zeros_like(rewards)
    if critic is not None:
        mean, variance = mean_and_variance(batch.returns, mask)
        critic.rescale_output(mean, variance.sqrt())  # to their scale; a trained critic keeps its values
        batch.values = map_micro_batches(lambda part: critic(part.obs), batch, config)  # without a graph

    estimator = ADVANTAGES[config.advantage]
    batch.advantages, batch.targets = estimator(rewards, batch.scores, batch.values, mask, config)
    check_finite({"mean of the advantages": masked_mean(batch.advantages, mask).item()})
    std = standard_deviation(batch.advantages, mask)
    if config.whiten:
        batch.advantages = whiten(batch.advantages, mask)
    if config.gamma == 1 and standard_deviation(batch.scores) == 0:
        # there is nothing to compare, and whitening would make a full step of the critic's errors
        batch.advantages = torch.zeros_like(batch.advantages)
    return std


def standard_deviation(x, mask=None):
    """The standard deviation of x over its elements, or those of a mask, of all processes."""
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    return mean_and_variance(x, mask)[1].sqrt().item()


def episode_statistics(task, prompts, completions, batch, config):
    """Means over the episodes, or the actions, of all processes: the first columns of metrics.csv."""
    def per_episode(numbers):
        return batch_mean(torch.as_tensor(numbers, dtype=torch.float32, device=batch.mask.device)).item()

    stats = {"reward": per_episode(batch.scores),
             "reward_std": standard_deviation(batch.scores),
             "kl": masked_mean(batch.kl, batch.mask).item(),
             "entropy": masked_mean(batch.entropy, batch.mask).item(),
             "length": per_episode([text.length for text in completions]),
             "ended": per_episode([text.ended for text in completions])}
    stats["objective"] = objective(stats, config)
    if task.true_reward:
        stats["true_reward"] = per_episode(score(task.true_reward, prompts, completions))
    groups = batch.scores.view(-1, config.group_size)
    uniform = per_episode((groups == groups[:, :1]).all(1))
    stats["uniform_groups"] = uniform if config.group_size > 1 else float(stats["reward_std"] == 0)
    return stats


def objective(stats, config):
    """What RL maximizes if γ = 1: the mean score minus β times the KL of a text, KL per token × length.

    It comes from the exact KL of each state. The penalty in the reward is an estimate with the same mean.
    """
    return stats["reward"] - config.kl_coef * stats["kl"] * stats["length"]


# The RL loop.

def train(config, resume=False, collect=collect, schedule=None, log=None):
    """Train one run, or resume it: evaluation, RL, evaluation again. For the last arguments see `main`.

    Raises BadInput, FloatingPointError.
    """
    custom = [collect.__module__ != __name__, schedule is not None]
    run, before = prepare(config, resume, log, custom)
    task, policy, reference, critic = run.task, run.policy, run.reference, run.critic
    warned = set()

    for iteration in range(len(run.history) + 1, config.iterations + 1):
        start = time.perf_counter()
        generators = random_generators(config.seed, iteration, run.device)
        now = options_of_iteration(config, schedule, iteration)
        run.optimizer.param_groups[0]["lr"] = now.lr
        batch, stats = collect(task, policy, reference, critic, run.tokenizer, now, generators)
        old = copy.deepcopy(policy)
        update = ALGOS[config.algo](policy, batch, run.optimizer, now, generators["update"]) or {}
        if "kl_update" not in update:
            # of 64 episodes, because all would take a quarter of a small update's time
            update["kl_update"] = mean_kl(old, policy, batch.rows(slice(64)), now)
        fit = {}
        if critic is not None:
            run.critic_optimizer.param_groups[0]["lr"] = now.critic_lr
            fit = fit_critic(critic, batch, run.critic_optimizer, now, generators["update"])
        seconds = time.perf_counter() - start

        # Raises TypeError if a custom algorithm returns a column that is there already.
        sampled = run.history[-1]["episodes"] if run.history else 0  # before this iteration
        episodes = sampled + stats.pop("episodes", config.batch_size)
        row = dict(iteration=iteration, episodes=episodes, **stats, **update, **fit, seconds=seconds)
        row = {name: float(value) for name, value in row.items()}  # numpy's numbers would not be loaded again
        check_finite(row | {"sum of the weights": sum_of_weights(policy, critic)})  # NaN if any weight is
        run.log_iteration(row)
        print_iteration(run.history, config.iterations, warned)
        if config.eval_every and iteration % config.eval_every == 0 and iteration < config.iterations:
            results, _ = run.evaluate_and_log(iteration)
            print_results(task, {f"after {iteration}": results})
            print_best(run.evaluations)
        if iteration % config.save_every == 0:
            run.save()

    after = run.evaluate_and_log(len(run.history))
    run.save()
    report(run, before, after)


# Options that a schedule may change.
SCHEDULED = ("kl_coef", "temperature", "lr", "clip", "delta", "critic_lr", "critic_epochs")


def options_of_iteration(config, schedule, iteration):
    """The options of an iteration: a copy, which an algorithm may change, with the schedule's values."""
    values = schedule(iteration) if schedule else {}
    if not isinstance(values, dict) or not {*values} <= {*SCHEDULED}:
        raise BadInput(f"the schedule returned {values!r:.200} for iteration {iteration}: it must return a "
                       f"dict of values for some of {', '.join(SCHEDULED)}")
    try:
        now = replace(config, **{name: np.asarray(value).item() for name, value in values.items()})
        check(now)
    except ValueError as e:  # BadInput, or not a single number
        raise BadInput(f"the schedule of iteration {iteration}: {e}")
    return now


def sum_of_weights(*models):
    return sum(p.detach().sum() for model in filter(None, models) for p in model.parameters()).item()


# What the loop works with.

@dataclass
class Run:
    """What a run works with, keeps in its checkpoint and writes to its directory."""

    path: Path  # the directory
    config: Config
    device: torch.device
    task: Task  # with the learned reward, if the task has preferences
    tokenizer: Tokenizer
    policy: GPT
    reference: GPT  # the policy before RL, frozen
    reward_model: Critic  # None without preferences
    critic: Critic  # None if the estimator does not use one
    optimizer: torch.optim.Optimizer
    critic_optimizer: torch.optim.Optimizer  # None without a critic
    pretraining: dict  # its seconds and bits per held-out byte
    prompts_hash: str  # by which --resume notices other prompts
    history: list = field(default_factory=list)  # rows of metrics.csv
    evaluations: dict = field(default_factory=dict)  # rows of eval.csv by iteration
    log: object = None  # see `main`
    custom: list = field(default_factory=list)  # whether `collect` and `schedule` are custom

    def evaluate_and_log(self, iteration):
        evaluation = evaluate(self.task, self.policy, self.reference, self.tokenizer, self.config)
        self.log_evaluation(iteration, *evaluation)
        if self.config.eval_every:
            self.save(f"checkpoint-{iteration}.pt")
        return evaluation

    def log_evaluation(self, iteration, results, samples):
        """Write eval.csv and samples-ITERATION.jsonl."""
        self.evaluations[iteration] = {"iteration": iteration, **results}
        write_table(self.path / "eval.csv", [*self.evaluations.values()])
        if self.log:
            self.log(self.path, "eval", dict(self.evaluations[iteration]))
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        write_atomically(self.path / f"samples-{iteration}.jsonl", lambda file: file.write(lines.encode()))

    def log_iteration(self, row):
        """Write metrics.csv."""
        self.history.append(row)
        write_table(self.path / "metrics.csv", self.history)
        if self.log:
            self.log(self.path, "metrics", dict(row))

    def modules(self):
        """{name: what has a state besides the policy}. What the run does not have is left out."""
        modules = {"optimizer": self.optimizer, "critic": self.critic,
                   "critic_optimizer": self.critic_optimizer}
        return {name: module for name, module in modules.items() if module is not None}

    def save(self, name="checkpoint.pt"):
        """Write a checkpoint. Raises BadInput."""
        check_custom_state(self.optimizer.state)
        modules = {**self.modules(), "reference": self.reference}
        if self.reward_model is not None:
            modules["reward_model"] = self.reward_model
        save_checkpoint(self.path / name, self.policy, self.tokenizer, config=asdict(self.config),
                        pretraining=self.pretraining, history=self.history, evaluations=self.evaluations,
                        prompts_hash=self.prompts_hash, custom=self.custom,
                        **{name: module.state_dict() for name, module in modules.items()})

    def restore(self, saved):
        """Take over what `save` wrote besides the models. Raises BadInput."""
        try:
            for name, module in self.modules().items():
                module.load_state_dict(saved[name])
                for p, averages in getattr(module, "state", {}).items():  # torch does not check their shapes
                    if isinstance(p, str):  # the state of a custom algorithm
                        continue
                    if any(x.dim() and x.shape != p.shape for x in averages.values()):
                        raise ValueError("the averages of the optimizer do not fit the weights")
            self.history = list(saved["history"])
            self.evaluations = dict(saved["evaluations"])
            self.pretraining = dict(saved["pretraining"])
        except Exception as e:  # a damaged file can raise nearly anything
            path = self.path / "checkpoint.pt"
            raise BadInput(f"{path} is damaged, or of another run ({type(e).__name__})")


def check_custom_state(state):
    """Raises BadInput if what a custom algorithm keeps in optimizer.state could not be loaded again."""
    for key, value in state.items():
        if isinstance(key, torch.Tensor):  # a weight, whose state is the optimizer's own
            continue
        file = io.BytesIO()
        try:
            torch.save({key.lower(): value}, file)  # a key without lower() is no string
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception as e:
            raise BadInput(f"optimizer.state[{key!r:.50}] cannot be saved ({type(e).__name__}): let the key "
                           "be a string, and the value a tensor, a Python number, or a list or dict of these")


def prepare(config, resume, log, custom):
    """A new or resumed Run that has its directory, and its evaluation before RL. Raises BadInput.

    Nothing is written or deleted in the directory before everything that can fail has been done.
    """
    device = set_up(config)
    path = Path(config.out) / config.name
    task = load_seeded_task(config)
    hash_of_prompts = prompts_hash(task)

    if resume:
        policy, reference, tokenizer, saved = load_checkpoint(path, device)
        if saved.get("prompts_hash") != hash_of_prompts:
            raise BadInput(f"{config.task} has other prompts than when {path} began: restore them, or begin "
                           "a new run")
        if saved.get("custom", custom) != custom:
            raise BadInput(f"{path} was trained with another `collect` or `schedule`: give --resume to the "
                           "script that it was trained with")
        check_fit([*task.prompts, *task.heldout], tokenizer, config.max_new_tokens, policy.config.block_size)
        reward_model = saved.get("reward_model")
        pretraining = None  # restored below
    else:
        policy, tokenizer, pretraining = load_or_pretrain(config, task, device)
        reference = copy.deepcopy(policy)
        generators = random_generators(config.seed, 0, device)  # the iterations of RL count from 1
        reward_model = learn_reward(task, policy, tokenizer, config, generators)

    check_same("vocabularies or weights", [tokenizer.state(), sum_of_weights(policy, reward_model)])
    task = use_reward_model(task, reward_model, tokenizer, config)
    optimizer = torch.optim.Adam(policy.parameters(), config.lr, fused=True)
    critic = None
    critic_optimizer = None
    if config.advantage not in CRITIC_FREE:
        critic = Critic(policy.config, policy).to(device)
        critic_optimizer = torch.optim.Adam(critic.parameters(), config.critic_lr, fused=True)
    run = Run(path, config, device, task, tokenizer, policy, reference, reward_model, critic, optimizer,
              critic_optimizer, pretraining, hash_of_prompts, log=log, custom=custom)
    if resume:
        run.restore(saved)
        done = len(run.history)
        has_ended = (path / "result.json").exists()  # otherwise its last evaluation is missing
        if config.iterations < done or (config.iterations == done and has_ended):
            raise BadInput(f"{path} has done {done} iterations: give more --iterations")

    before = evaluate(task, reference, reference, tokenizer, config)
    clear_run_dir(path, resume)
    run.save()  # before any other file: from here --resume repeats the evaluation and writes the others
    write_json(path / "config.json", asdict(config))
    if resume:  # without the iterations after the checkpoint
        write_table(path / "metrics.csv", run.history)
    run.log_evaluation(0, *before)
    print(f"\n{config.algo} with {config.advantage} on {config.task}: "
          f"{sum(p.numel() for p in policy.parameters()):,} weights, device: {device}, "
          f"processes: {processes()[1]}, threads each: {torch.get_num_threads()}")
    return run, before


# Evaluation.

def evaluate(task, policy, reference, tokenizer, config):
    """Complete held-out prompts, sampled and greedily, with the same random numbers at every call.

    Returns (results, samples). results: the columns of eval.csv, which EPILOG lists. Intervals are computed
    from the means of the prompts, because completions of one prompt are alike. samples: a dict of prompt,
    completion, reward, metric and, if the task has one, true_reward for each sampled completion.
    """
    generator = torch.Generator(next(policy.parameters()).device).manual_seed(12345)
    seed_globally(12345)
    prompts = list(islice(cycle(task.heldout), config.eval_episodes))
    texts = complete(task, policy, reference, prompts, tokenizer, config, config.temperature, generator)
    greedy = complete(task, policy, reference, task.heldout, tokenizer, config, 0, generator)

    functions = {"reward": task.reward, "true_reward": task.true_reward, "metric": task.metric}
    numbers = {name: score(f, prompts, texts) for name, f in functions.items() if f is not None}
    n = min(len(task.heldout), len(prompts))  # different prompts

    def ci(values):
        return half_width([fmean(values[i::n]) for i in range(n)])  # prompt i has rows i, i + n, …

    results = {name: fmean(values) for name, values in numbers.items()}
    results |= {f"{name}_ci": ci(values) for name, values in numbers.items()}
    if {*numbers["reward"]} <= {0, 1}:  # pass@1 is the reward
        for k in (4, 16):
            if len(prompts) >= k * n:
                solved = [pass_at_k(numbers["reward"][i::n], k) for i in range(n)]
                results |= {f"pass_{k}": fmean(solved), f"pass_{k}_ci": half_width(solved)}
    results["greedy"] = fmean(score(task.metric, task.heldout, greedy))
    length = fmean(text.length for text in texts)
    kl = fmean(text.kl for text in texts) / length  # per action
    results |= {"kl": kl, "kl_ci": ci([text.kl - kl * text.length for text in texts]) / length,
                "entropy": fmean(text.entropy for text in texts) / length,
                "distinct_1": distinct_n(texts, 1), "distinct_2": distinct_n(texts, 2),
                "length": length, "ended": fmean(text.ended for text in texts)}
    results["objective"] = objective(results, config)
    samples = [{"prompt": prompt, "completion": text, **dict(zip(numbers, values))}
               for prompt, text, *values in zip(prompts, texts, *numbers.values())]
    return results, samples


def pass_at_k(rewards, k):
    """An unbiased estimate of the probability that at least one of k completions of a prompt has reward 1.

    rewards: 0 or 1 for each of its n ≥ k completions. It is the share of all choices of k of them that
    contain a 1. Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    failures = rewards.count(0)
    return 1 - math.comb(failures, k) / math.comb(len(rewards), k)


# The 97.5% quantiles of Student's t distribution for 1 to 9 degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def half_width(values):
    """Half the width of the 95% interval of the mean of independent values; nan for a single value."""
    n = len(values)
    if n == 1 or not math.isfinite(sum(values)):
        return math.nan
    quantile = T_QUANTILES[n - 2] if n <= 10 else 1.96 + 2.72 / (n - 1)  # correct to 0.011
    return quantile * stdev(values) / math.sqrt(n)


def metric_name(task):
    if task.metric is task.true_reward:
        return "true reward"
    return getattr(task.metric, "__name__", "metric").replace("<lambda>", "metric")


def with_interval(results, name):
    """The text of a number, such as 0.978 ± 0.008."""
    ci = results.get(f"{name}_ci", math.nan)
    return f"{results[name]:.3f}" if math.isnan(ci) else f"{results[name]:.3f} ± {ci:.3f}"


def print_results(task, columns):
    """Print the results of `evaluate`. columns: {title: results}."""
    metric = metric_name(task)
    labels = {"reward": "reward", "true_reward": "true reward", "pass_4": "pass@4", "pass_16": "pass@16",
              "metric": metric, "greedy": f"{metric}, greedy", "kl": "KL to the reference, nats",
              "entropy": "entropy, nats", "distinct_1": "share of distinct words",
              "distinct_2": "share of distinct pairs", "length": "length, tokens", "ended": "ended",
              "objective": "reward - β·KL·length"}
    if metric in ("reward", "true reward"):  # a task without a metric
        del labels["metric"]
    print(f"\n{'on held-out prompts':25}" + "".join(f"{title:>16}" for title in columns))
    for name, label in labels.items():
        if all(name in results for results in columns.values()):
            cells = [with_interval(results, name) for results in columns.values()]
            print(f"{label:25}" + "".join(f"{cell:>16}" for cell in cells))


def print_best(evaluations):
    """Print which evaluation has the highest reward, and a warning if the last is clearly worse."""
    last = evaluations[max(evaluations)]
    name = "true_reward" if "true_reward" in last else "reward"
    best = max(evaluations.values(), key=lambda row: row[name])
    print(f"the highest held-out {name.replace('_', ' ')} is {with_interval(best, name)}, after "
          f"{best['iteration']} iterations")
    if last[name] < best[name] - best[f"{name}_ci"]:
        print("warning: it has fallen since then by more than the number after ±")


def warnings(history):
    """Yield what seems wrong with a run, from the rows of metrics.csv."""
    first = history[0]
    last = history[-1]
    if last["ended"] < first["ended"] / 2:
        yield "fewer than half as many completions end as at first: a larger --kl-coef may help"
    last_ten = history[10:][-10:]  # of those after the tenth: before, the critic is new
    if len(last_ten) == 10 and fmean(row.get("explained_variance", 0) for row in last_ten) < 0:
        yield "over ten iterations the critic was worse than a constant: more --critic-epochs may help"
    uniform = last.get("uniform_groups", 0)
    if uniform < 1 and last.get("grad_norm") == 0:
        yield ("the gradient is zero: the policy is certain, or the rewards differ by rounding only, so "
               "subtract a constant from them")
    if uniform == 1 or uniform > 0.5 and "explained_variance" not in last:  # a critic compares prompts, too
        yield ("in most groups all scores are equal, and only differences teach: the task is solved, or it "
               "needs a larger --group-size or another reward")


def print_iteration(history, iterations, warned):
    """Print the last row of metrics.csv, and each warning once. warned: the set of those printed so far."""
    row = history[-1]
    left = fmean(row["seconds"] for row in history) * (iterations - len(history))
    rejected = "  no step" if row.get("accepted") == 0 else ""
    print(f"{len(history):4d}/{iterations}  reward {row['reward']:+.3f}  kl {row['kl']:.4f}  "
          f"entropy {row['entropy']:.3f}  {row['seconds']:.2f} s, {left:.0f} s left{rejected}", flush=True)
    for warning in warnings(history):
        if warning not in warned:
            print(f"warning: {warning}", flush=True)
        warned.add(warning)


# Pretraining.

# Options that come with the weights of --init.
INHERITED = ("tokenizer", "vocab_size", "block_size", "n_layer", "n_head", "n_embd")


def load_or_pretrain(config, task, device):
    """The policy that RL starts from, its tokenizer, and {"seconds", "bits_per_byte"} of its pretraining.

    The weights are those of --init or random, after pretrain_steps on the corpus of the task. They are kept
    in --out/pretrained for the next run that would learn the same. Raises BadInput.
    """
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(config.pretrain_seed)
    prompts = [*task.prompts, *task.heldout]
    policy = None
    if config.init:
        policy, _, tokenizer, _ = load_checkpoint(config.init, device)
    path = Path(config.out) / "pretrained" / f"{pretraining_key(config, task, policy, device)}.pt"
    found = path.exists()
    check_same("weights, or files of pretrained weights", [path.name, found])
    if found:
        policy, _, tokenizer, more = load_checkpoint(path, device)
        print(f"pretrained weights from {path}")
    elif policy is None:
        if config.tokenizer == "bpe":
            tokenizer = Tokenizer.learn(task.corpus, config.vocab_size)
        else:
            tokenizer = Tokenizer.gpt2()
        sizes = (config.block_size, config.n_layer, config.n_head, config.n_embd)
        policy = GPT(GPTConfig(tokenizer.vocab_size, *sizes), generator).to(device)
        print(f"a vocabulary of {tokenizer.vocab_size} tokens (--vocab-size {config.vocab_size})")
    check_fit(prompts, tokenizer, config.max_new_tokens, policy.config.block_size)
    check_boundaries(prompts, task.corpus, tokenizer)
    if found:
        return policy, tokenizer, more["pretraining"]
    if config.init and not config.pretrain_steps:
        return policy, tokenizer, {"seconds": 0.0, "bits_per_byte": None}

    texts = [tokenizer.encode(text) + [tokenizer.eos_token] for text in task.corpus]
    learned, held_out = hold_out_rows(to_rows(texts, config.block_size), generator, config)
    maximize_likelihood(policy, learned, config, generator)
    results = {"bits_per_byte": bits_per_byte(policy, held_out, tokenizer, config),
               "seconds": time.perf_counter() - start}
    check_finite(results | {"sum of the weights": sum_of_weights(policy)})
    save_checkpoint(path, policy, tokenizer, config=asdict(config), pretraining=results)
    print(f"pretrained weights to {path}: {results['bits_per_byte']:.3f} bits per held-out byte")
    return policy, tokenizer, results


def pretraining_key(config, task, policy, device):
    """A hash of what decides the pretrained weights, except --micro-batch. policy: of --init, or None."""
    names = ("pretrain_seed", "pretrain_steps", "pretrain_batch", "pretrain_lr", *INHERITED)
    # The last three change the order of sums, and so the last digits of the weights.
    decides = [task.corpus, *(getattr(config, name) for name in names), torch.get_num_threads(),
               processes()[1], device.type]
    key = hashlib.sha256(json.dumps(decides).encode())
    if policy is not None:
        for tensor in policy.state_dict().values():
            key.update(tensor.cpu().numpy())
    return key.hexdigest()[:12]


def to_rows(texts, block_size):
    """Texts (lists of tokens) as rows (N, T+1) of tokens, T ≤ block_size, padded with -100.

    A longer text continues in the next row, which repeats its last token: with block_size 2, [a b c d]
    becomes [a b c] and [c d]. So each token except the first of a text is predicted once.
    """
    pieces = [torch.tensor(text[i:i + block_size + 1])
              for text in texts for i in range(0, len(text) - 1, block_size)]
    if not pieces:
        return torch.empty(0, 2, dtype=torch.long)
    return pad_sequence(pieces, batch_first=True, padding_value=-100)


def hold_out_rows(rows, generator, config):
    """(rows to learn from, rows held out): 1% of the different rows, at most 1,000, with all their copies."""
    distinct, which = rows.unique(dim=0, return_inverse=True)  # rows = distinct[which]
    if len(distinct) < 2:
        raise BadInput(f"{config.task} needs a corpus of at least two different texts, or a longer one")
    shuffled = torch.randperm(len(distinct), generator=generator)
    held_out = torch.isin(which, shuffled[:min(1000, math.ceil(len(distinct) / 100))])
    return rows[~held_out], rows[held_out]


def as_batch(rows, device):
    """Texts as episodes whose actions are their tokens except the first. rows: (N, T+1), padded with -100."""
    rows = rows.to(device)
    return Batch(rows[:, :-1].clamp(min=0), rows[:, 1:].clamp(min=0), mask=rows[:, 1:] >= 0)


def nll(policy, texts):
    """-log π (B, T), in nats, of each token."""
    return -action_log_probs(log_probs(policy, texts.obs, temperature=1.0), texts.actions)


def bits_per_byte(policy, rows, tokenizer, config):
    """-log2 π per byte of text, which compares models of different vocabularies. rows: (N, T+1)."""
    texts = as_batch(rows, next(policy.parameters()).device)
    nats = map_micro_batches(lambda part: nll(policy, part), texts, config)[texts.mask].sum().item()
    n_bytes = tokenizer.token_bytes()[texts.actions[texts.mask].cpu()].sum().item()
    return nats / math.log(2) / n_bytes


def pretraining_batches(lengths, batch_size, generator):
    """Yield (rows, mean_tokens) without end: indices of texts of similar length, so little is padding.

    lengths: (N,) tokens to predict in each row. Eight batches are drawn and sorted by length together;
    mean_tokens is their mean number of tokens, by which a loss is divided. If each batch were divided by its
    own number, short texts would weigh more.
    """
    while True:
        drawn = torch.randint(len(lengths), (8 * batch_size,), generator=generator)
        mean_tokens = lengths[drawn].sum().item() / 8
        drawn = drawn[lengths[drawn].argsort()].view(8, -1)
        for i in torch.randperm(8, generator=generator):
            yield drawn[i], mean_tokens


def maximize_likelihood(policy, rows, config, generator):
    """Train the policy on rows (N, T+1): AdamW with warm-up and linear decay of the learning rate."""
    rank, count = processes()
    steps = config.pretrain_steps
    device = next(policy.parameters()).device
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    lengths = (rows >= 0).sum(1) - 1  # (N,)
    start = time.perf_counter()
    nats = 0.0
    tokens = 0
    batches = pretraining_batches(lengths, config.pretrain_batch, generator)
    for step, (batch, mean_tokens) in enumerate(islice(batches, steps), start=1):
        texts = as_batch(rows[batch.tensor_split(count)[rank]], device)  # this process's share
        n_tokens = lengths[batch].sum().item()
        weight = n_tokens / mean_tokens  # mean_gradient divides by n_tokens, this by mean_tokens
        loss = mean_gradient(policy, lambda part: weight * nll(policy, part), texts, config, 1.0)["loss"]
        optimizer.param_groups[0]["lr"] = config.pretrain_lr * min(step / 50, 1 - step / (steps + 1))
        optimizer.step()
        nats += loss * mean_tokens
        tokens += n_tokens
        if step % 100 == 0:
            print(f"pretrain {step:5d}/{steps}  loss {nats / tokens:.3f} nats per token  "
                  f"{time.perf_counter() - start:.0f} s", flush=True)
            nats = 0.0
            tokens = 0


# What a run reads, which must be the same in all processes.

def load_seeded_task(config):
    """The task of --task. Raises BadInput, also if it is not the same in all processes."""
    seed_globally(config.pretrain_seed)
    task = load_task(config.task, config.pretrain_seed)
    comparisons = None if callable(task.preferences) else task.preferences
    check_same("tasks", [task.corpus, prompts_hash(task), comparisons])
    return task


def prompts_hash(task):
    """A hash of all prompts, with the attributes that they carry."""
    prompts = [(prompt, getattr(prompt, "__dict__", None)) for prompt in [*task.prompts, *task.heldout]]
    # A set, or an object, has another form at every start: only its type counts.
    text = json.dumps(prompts, sort_keys=True, skipkeys=True, default=lambda x: type(x).__name__)
    return hashlib.sha256(text.encode()).hexdigest()


def check_same(what, value):
    """Raises BadInput unless this value, plain data, is the same in all processes."""
    count = processes()[1]
    if count == 1:
        return
    digests = [None] * count
    dist.all_gather_object(digests, hashlib.sha256(json.dumps(value).encode()).hexdigest())
    if len({*digests}) > 1:
        raise BadInput(f"the processes have different {what}: let them read the same files, sort what comes "
                       "from a set, and draw from random.Random(0)")


# The files of a run.

def write_json(path, data):
    """Write strict JSON: a number that is not finite becomes null."""
    def strict(value):
        if isinstance(value, dict):
            return {key: strict(inner) for key, inner in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    text = json.dumps(strict(data), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def write_table(path, rows):
    """Write rows, dicts of numbers, as CSV with a column for each key."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names]
    for row in rows:
        lines.append([f"{row.get(name, math.nan):.6g}" for name in names])
    text = "".join(",".join(line) + "\n" for line in lines)
    write_atomically(path, lambda file: file.write(text.encode()))


def written_files(run, suffix=""):
    """The files of a run, its checkpoint first. run: the directory."""
    names = ("checkpoint.pt", "config.json", "result.json", "metrics.csv", "eval.csv", "samples-*.jsonl",
             "checkpoint-*.pt")
    return [file for name in names for file in run.glob(name + suffix)]


@contextlib.contextmanager
def claimed(run, may_exist):
    """Make the directory of a run, and lock it until the block or this process has ended. Raises BadInput.

    Under torchrun only the first process does this.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        yield
        return
    lock = FileLock(run / ".lock", timeout=0)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise BadInput(f"{run} is being trained by another process: wait, or give another --name")
    except (OSError, NotImplementedError) as e:
        raise BadInput(f"cannot make or lock {run}: give another --out or --name ({e})")
    try:
        if not may_exist and {*run.iterdir()} - {run / ".lock", *written_files(run, ".*.part")}:
            raise BadInput(f"{run} exists: give another --name, --overwrite to replace it, or --resume {run}")
        yield
    finally:
        with contextlib.suppress(OSError):
            (run / ".lock").unlink()
            run.rmdir()  # if nothing was written
        lock.release()


def clear_run_dir(run, resume):
    """Delete the files of a run that is replaced, or the result of one that is resumed.

    The checkpoint goes first, so a crash cannot leave it with the tables of another run.
    """
    if processes()[0] == 0:
        for file in written_files(run):
            if not resume or file.name == "result.json":
                file.unlink()
        for file in written_files(run, ".*.part"):  # checkpoint.pt.4711.part, of a process that was killed
            file.unlink()


def digest(path):
    """The SHA-256 of a file, None if there is no such file."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if os.path.isfile(path) else None


def provenance(run):
    """What a paper needs to say about a run, as plain data."""
    try:
        git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True,
                             text=True)
        commit = git.stdout.strip() or None
    except OSError:  # there is no git
        commit = None
    return {"command": sys.argv, "commit": commit, "python": platform.python_version(),
            "torch": torch.__version__, "device": str(run.device), "threads": torch.get_num_threads(),
            "processes": processes()[1], "task_sha256": digest(run.config.task),
            "script_sha256": digest(sys.argv[0])}


def report(run, before, after):
    """Write result.json, and print what RL changed. before, after: (results, samples) of `evaluate`."""
    seconds = sum(row["seconds"] for row in run.history)
    write_json(run.path / "result.json", {
        "metric": metric_name(run.task), "before": before[0], "after": after[0], "seconds": seconds,
        "pretraining": run.pretraining, **provenance(run)})
    for old, new in list(zip(before[1], after[1]))[:6]:
        print(f"\nbefore  {old['prompt']}{old['completion']}\nafter   {new['prompt']}{new['completion']}")
    print_results(run.task, {"before": before[0], "after": after[0]})
    if run.config.eval_every:
        print_best(run.evaluations)
    print(f"{seconds:.0f} s of RL; everything is in {run.path}")


# The command line.

# The first option of each group of --help, and the title of the group.
GROUPS = {"task": "the run", "init": "the model and its pretraining", "comparisons": "the reward model",
          "iterations": "the episodes", "lr": "the updates", "eval_episodes": "evaluation and checkpoints"}

# The options that make sense together with --resume, --eval and --explain.
TAKES = {"resume": ("task", "iterations", "eval_every", "save_every", "device", "threads", "micro_batch"),
         "eval": ("task", "eval_episodes", "max_new_tokens", "temperature", "device", "threads",
                  "micro_batch"),
         "explain": ("task", "seed", "device", "threads")}

EPILOG = """\
files of a run, in runs/NAME
  config.json              the options
  checkpoint.pt            all weights and states, for --resume, --eval, --init and rollout.py
  checkpoint-ITERATION.pt  the same at each evaluation after that before RL, with --eval-every
  metrics.csv              a row for each iteration
  eval.csv                 a row for each evaluation
  samples-ITERATION.jsonl  the completions of that evaluation
  result.json              the evaluations before and after RL, and what produced them

columns of metrics.csv
  episodes                 sampled so far
  reward, length, ended    means over episodes: score without KL penalty; number of actions; share that chose
                           the end of text
  kl, entropy              exact KL from the reference policy, and entropy, in nats per token
  objective                reward - kl_coef × kl × length, which RL maximizes if gamma is 1
  reward_std, advantage_std   standard deviations of scores, and of advantages before whitening
  true_reward              the task's own reward, if the reward is learned
  uniform_groups           share of the prompts whose completions all have the same score; with --group-size 1
                           1 if all scores of the batch are equal
  loss, grad_norm          of the policy; the gradient's norm before it is clipped
  clip_fraction, steps     share of ratios outside 1 ± clip, also of those that still have a gradient;
                           minibatch steps taken (ppo)
  kl_update                exact mean KL(old policy || new policy) of the update, nats per token (except for
                           trpo: of the first 64 episodes per process)
  accepted, halvings       1, or 0 if no step was taken; halvings by the line search (trpo)
  surrogate_gain           improvement of the surrogate (trpo)
  step_norm                length of the step, in weights (trpo)
  cg_relative_residual     unsolved part of (F + damping I) x = g, as |r| / |g| (trpo)
  critic_loss              E[(G-V)²] / Var[G] before the critic is trained; G: Monte-Carlo returns
  explained_variance       1 - Var[G-V] / Var[G], likewise; below 0 is worse than a constant
  seconds                  of the iteration

columns of eval.csv, over completions of held-out prompts
  reward, metric           means of the reward and of the task's metric
  greedy                   the metric of a greedy completion of each prompt
  pass_4, pass_16          probability that one of k completions of a prompt has reward 1, if all
                           rewards are 0 or 1 and each prompt has at least k completions
  NAME_ci                  for some columns NAME: half the width of its 95% interval over prompts
  kl, entropy, objective, length, ended, true_reward   as above
  distinct_1, distinct_2   share of different words, or pairs of words, among the first 1,000; nan if fewer

exit status: 2 for unusable input, 3 for a number that is not finite, 130 for Ctrl-C, 1 with Python's
traceback for an error in a custom file
"""


def defaults_of(advantage, algo, task):
    """The defaults of an estimator, an algorithm and a task."""
    defaults = {}
    for kind in (advantage, algo, task, f"{task} {algo}"):
        defaults |= DEFAULTS.get(kind, {})
    return defaults


def flag(name):
    return "--" + name.replace("_", "-")


def make_parser():
    """The command line, made from Config. An option that is not given is absent from what it parses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog=EPILOG, allow_abbrev=False,
                                     usage=argparse.SUPPRESS,  # a wrong option gets one line
                                     argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--resume", metavar="RUN", default=None, help="continue a run")
    action.add_argument("--eval", metavar="RUN", default=None, help="evaluate a run on its held-out prompts")
    action.add_argument("--explain", metavar="RUN", default=None,
                        help="print the numbers of each action of some completions")
    for f in fields(Config):
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        others = [f"{kind}: {values[f.name]}" for kind, values in DEFAULTS.items() if f.name in values]
        default = ", ".join([str(f.default), *others])
        help = f.metadata["help"]
        if default not in ("", "False"):
            help += f" (default {default})"
        if f.type is bool:
            group.add_argument(flag(f.name), action="store_true", help=help)
        else:
            group.add_argument(flag(f.name), type=f.type, choices=f.metadata["choices"], help=help)
    return parser


def parse(argv):
    """(Config, args) of a command line. Bad options exit with status 2.

    `given` are the options on the command line. All others have the values of the run that is resumed or
    evaluated; of a new run, those of DEFAULTS, otherwise of Config.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    if args.resume or args.eval or args.explain:
        config = config_of_run(args, given, parser)
    else:
        asked = Config(**given)
        if "," in asked.algo:
            parser.error(f"--algo takes one algorithm; python tests/studies/compare.py --algo {asked.algo} "
                         "compares several")
        defaults = defaults_of(asked.advantage, asked.algo, asked.task)
        if asked.init:
            defaults |= defaults_of_init(asked.init, given, parser)
        config = Config(**defaults | given)
    if config.task not in TASKS and os.path.isfile(config.task):
        config.task = str(Path(config.task).resolve())
    if not config.name:
        estimator = "" if config.advantage == "gae" else f"-{config.advantage}"
        config.name = f"{Path(config.task).stem}-{config.algo}{estimator}-{config.seed}"
    try:
        check(config)
    except BadInput as e:
        parser.error(str(e))
    return config, args


def config_of_run(args, given, parser):
    """The Config of the run that --resume, --eval or --explain names, with the given options."""
    action = next(name for name in TAKES if getattr(args, name))
    for name in given:
        if name not in TAKES[action]:
            parser.error(f"--{action} does not take {flag(name)}")
    run = Path(getattr(args, action)).resolve()
    if not os.path.exists(run / "config.json"):
        parser.error(f"there is no run in {run} (no config.json): use a directory such as runs/NAME")
    try:
        saved = json.loads((run / "config.json").read_text(encoding="utf-8"))
        saved |= {"out": str(run.parent), "name": run.name, "overwrite": False}
        if ({*saved} - {f.name for f in fields(Config)} or saved["algo"] not in ALGOS
                or saved["advantage"] not in ADVANTAGES):
            parser.error(f"{run} was made with a custom script: give --{action} to that script")
        config = Config(**saved | given)
        other_task = Path(config.task).name != Path(Config(**saved).task).name
    except Exception as e:  # JSON of any kind
        reason = " ".join(str(e).split())
        parser.error(f"{run} is not a run of this program ({reason}): use a directory such as runs/NAME")
    if config.task not in TASKS and "task" not in given:  # config.json must not choose what is executed
        parser.error(f"{run} uses a task file: add --task {config.task} to execute it")
    if args.resume and other_task:
        parser.error(f"{run} was trained on another task than {config.task}: --resume keeps the task")
    return config


def defaults_of_init(init, given, parser):
    """The defaults that come with the weights of --init, among them the sizes of the model."""
    for name in given:
        if name in INHERITED:
            parser.error(f"{flag(name)} comes with the weights of --init: leave it out")
    if not os.path.isfile(init) and not os.path.exists(Path(init) / "checkpoint.pt"):
        parser.error(f"--init takes a run or a checkpoint, which {init} is not. A GPT-2 becomes one with "
                     f"python tests/examples/gpt2.py import {init} runs/gpt2")
    try:
        policy, _, tokenizer, _ = load_checkpoint(init)
    except BadInput as e:
        parser.error(str(e))
    n_weights = sum(p.numel() for p in policy.parameters())
    defaults = DEFAULTS["large init" if n_weights >= 10_000_000 else "init"]
    return {**defaults, **asdict(policy.config), "tokenizer": tokenizer.name}


def check(config):
    """Raises BadInput for values that are out of range or contradict each other."""
    for f in fields(Config):
        value = getattr(config, f.name)
        low, high, choices = f.metadata["low"], f.metadata["high"], f.metadata["choices"]
        types = (int, float) if f.type is float else f.type
        if not isinstance(value, types) or choices and value not in choices:
            raise BadInput(f"{flag(f.name)} cannot be {value!r}")
        if low is not None and not low <= value <= high:
            raise BadInput(f"{flag(f.name)} must be from {low:g} to {high:g}, not {value}")
    c = config
    if c.algo not in ALGOS:
        raise BadInput(f"unknown --algo {c.algo!r}: choose from {', '.join(ALGOS)}")
    if c.n_embd % c.n_head:
        raise BadInput(f"--n-embd {c.n_embd} must be a multiple of --n-head {c.n_head}")
    count = int(os.environ.get("WORLD_SIZE", 1))  # processes
    if c.batch_size % (count * c.group_size):
        raise BadInput(f"--batch-size {c.batch_size} must be a multiple of --group-size {c.group_size}, "
                       f"times the number of processes, {count}")
    if c.batch_size < count * c.minibatches or c.pretrain_batch < count:
        raise BadInput(f"--batch-size {c.batch_size} must be at least --minibatches {c.minibatches} times "
                       f"the number of processes, {count}, and --pretrain-batch at least that number")
    if c.advantage in GROUP_BASED and c.group_size < 2:
        raise BadInput(f"--advantage {c.advantage} needs --group-size 2 or more, to compare within a prompt")
    if c.name and Path(c.name).name != c.name or c.name in ("..", "pretrained") or len(c.name) > 200:
        raise BadInput(f"--name {c.name} must not contain a slash, be 'pretrained', or be longer than 200 "
                       "characters; use --out to choose the parent directory")


def set_up(config):
    """The device of --device, with --threads set and, under torchrun, the process group initialized."""
    if config.threads:
        torch.set_num_threads(config.threads)
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, ImportError):
        raise BadInput(f"there is no device {name}: give --device auto, cpu, cuda or mps")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if name.startswith("cuda") else "gloo")
    return torch.device(name)


def load_run(config):
    """(task, policy, reference, critic, tokenizer) of a run. critic: None if it has none. Raises BadInput."""
    device = set_up(config)
    path = Path(config.out) / config.name
    policy, reference, tokenizer, saved = load_checkpoint(path, device)
    critic = None
    if "critic" in saved:
        critic = Critic(policy.config).to(device)
        try:
            critic.load_state_dict(saved["critic"])
        except Exception as e:  # a damaged file can raise nearly anything
            raise BadInput(f"the critic in {path} is damaged ({type(e).__name__})")
    task = use_reward_model(load_seeded_task(config), saved.get("reward_model"), tokenizer, config)
    check_fit([*task.prompts, *task.heldout], tokenizer, config.max_new_tokens, policy.config.block_size)
    return task, policy, reference, critic, tokenizer


def evaluate_again(config):
    """--eval: evaluate a run, and print its first samples and its results."""
    task, policy, reference, _, tokenizer = load_run(config)
    results, samples = evaluate(task, policy, reference, tokenizer, config)
    print(*(sample["prompt"] + sample["completion"] for sample in samples[:6]), sep="\n")
    print_results(task, {"now": results})


def explain(config):
    """--explain: print the numbers of an iteration for each action of its first four completions."""
    task, policy, reference, critic, tokenizer = load_run(config)
    generators = random_generators(config.seed, 0, next(policy.parameters()).device)
    batch, prompts, texts = scored_episodes(task, policy, reference, tokenizer, config, generators)
    add_advantages(batch, critic, replace(config, whiten=0))
    columns = {"log π": batch.logprobs, "log π_ref": batch.ref_logprobs, "reward": batch.rewards,
               "return": batch.returns, "value": batch.values, "advantage": batch.advantages,
               "whitened": whiten(batch.advantages, batch.mask)}
    for row, (prompt, text) in enumerate(list(zip(prompts, texts))[:4]):
        print(f"\n{prompt}{text}\nscore {batch.scores[row]:.3f}")
        print("".join(f"{name:>11}" for name in columns) + "  action")
        for t, token in zip(batch.mask[row].nonzero().flatten().tolist(), text.tokens):
            print("".join(f"{column[row, t]:11.3f}" for column in columns.values()) + f"  {token!r}")


def main(argv=None, collect=collect, schedule=None, log=None):
    """Do what the command line says. Returns the exit status. A custom script may give three functions:

    collect: replaces `train.collect`. Its columns may have `episodes`, the number that it sampled.
    schedule: iteration, from 1 -> {option: value} for that iteration, see SCHEDULED. It must depend on
    nothing else, because a resumed run repeats iterations. Its values win over the command line.
    log: (directory of the run, "metrics" or "eval", row) -> None, called with each row, a dict, that is added
    to metrics.csv or eval.csv, in the first of several processes. A resumed run repeats rows.
    """
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w", errors="replace")  # the first process speaks for all
        log = None
    config, args = parse(sys.argv[1:] if argv is None else argv)
    run = Path(config.out) / config.name
    checkpoint = run / "checkpoint.pt"
    # With --overwrite the old checkpoint is there until the new run writes its first one.
    replaced = config.overwrite and checkpoint.exists() and checkpoint.stat().st_mtime_ns
    try:
        if args.eval:
            evaluate_again(config)
        elif args.explain:
            explain(config)
        else:
            with claimed(run, may_exist=bool(args.resume) or config.overwrite):
                train(config, bool(args.resume), collect, schedule, log)
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(f"error: {e}", file=sys.stderr)
        return 3
    except SystemExit as e:
        if e.code not in (None, 0):
            raise
        print("error: a custom file has ended the program: remove its exit()", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        advice = "give the same command again"
        trains = not (args.eval or args.explain)
        if trains and checkpoint.exists() and checkpoint.stat().st_mtime_ns != replaced:
            advice = f"--resume {run}"
            if config.task not in TASKS:
                advice += f" --task {config.task}"
        print(f"\ninterrupted: to go on, {advice}", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that the policy writes
    sys.exit(main())
