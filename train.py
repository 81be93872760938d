"""Teach a tiny GPT to write, then improve it by policy gradient: `python train.py --algo trpo`.

A run: pretraining on the task's corpus, the fit of a reward model if the task has preferences, evaluation on
held-out prompts, RL, evaluation again. Everything goes to runs/NAME. Recovery is one mechanism, the last
checkpoint, which is written atomically every few iterations: whatever ends a run, `--resume` repeats what
came after it, to the bit, since each iteration draws its random numbers from (seed, iteration).
`python train.py --help` lists every option.
"""

import argparse
import copy
import csv
import hashlib
import json
import math
import os
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, fields
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence

from advantage import (ADVANTAGES, IN_GROUPS, WITHOUT_CRITIC, batch_mean, discounted_returns, masked_mean,
                       mean_and_variance, processes, token_rewards, whiten)
from algos import (Batch, check_finite, chosen, fit_critic, in_parts, log_probs, mean_gradient, ppo, reinforce,
                   trpo)
from model import (GPT, BadInput, Critic, GPTConfig, Tokenizer, is_gpt2, load_checkpoint, load_weights,
                   save_checkpoint, write_atomically)
from reward import TASKS, BadTask, distinct_n, learn_reward, load_task, score, use_reward_model
from rollout import check_fit, complete, run_episodes

ALGOS = {"reinforce": reinforce, "trpo": trpo, "ppo": ppo}

# Defaults that differ by advantage, algorithm, task, and weights of --init: the last of these four wins.
# RL's on reviews and addition were checked on another corpus (--pretrain-seed 1): tests/README.md.
DEFAULTS = {
    "rloo": dict(whiten=0),
    "grpo": dict(whiten=0),
    "reinforce": dict(iterations=80),
    "ppo": dict(lr=5e-4),
    "reviews": dict(vocab_size=620, max_new_tokens=44),
    "addition": dict(vocab_size=257, block_size=16, max_new_tokens=4, n_embd=128, n_head=8,
                     pretrain_steps=4500, pretrain_batch=64, pretrain_lr=3e-3, kl_coef=0.01,
                     iterations=150, group_size=1, lr=1e-4, damping=1.0),
    "hello": dict(vocab_size=448, block_size=48, max_new_tokens=28),
    "preferences": dict(vocab_size=620, max_new_tokens=44),
    "init": dict(pretrain_steps=0),
    "init gpt2": dict(pretrain_steps=0, pretrain_batch=32, pretrain_lr=1e-4, batch_size=64, lr=1e-5,
                      critic_lr=1e-4, eval_episodes=64),
}


def option(default, help, low=None, high=1e9, choices=None):
    """A field of Config with its help, range and choices for the command line."""
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class Config:
    task: str = option("reviews", f"{', '.join(TASKS)}, or a Python file that defines a task")
    algo: str = option("trpo", f"{', '.join(ALGOS)}, or several, separated by commas, to compare")
    advantage: str = option("gae", "advantage estimator", choices=ADVANTAGES)
    name: str = option("", "the run's directory in --out (default TASK-ALGO-SEED, TASK-ALGO-ADVANTAGE-SEED)")
    out: str = option("runs", "directory of all runs and of the pretrained weights")
    overwrite: bool = option(False, "replace the run of that name")
    seed: int = option(0, "seed of RL", 0)
    device: str = option("auto", "auto, cpu, cuda or mps")
    threads: int = option(0, "CPU threads, 0 for torch's choice", 0, 1024)
    micro_batch: int = option(1024, "most tokens worked on at once: memory and time, the same results", 1)
    # the model and its pretraining
    init: str = option("", "initial weights: a run, a checkpoint, a GPT-2's directory, or gpt2 (a download)")
    pretrain_seed: int = option(0, "seed of the corpus, the initial weights and pretraining", 0)
    tokenizer: str = option("bpe", "bpe learned from the corpus, or gpt2's", choices=("bpe", "gpt2"))
    vocab_size: int = option(512, "most tokens in the learned vocabulary", 257)
    block_size: int = option(64, "context, tokens", 2)
    n_layer: int = option(2, "transformer blocks", 1)
    n_head: int = option(4, "attention heads per block", 1)
    n_embd: int = option(96, "width", 1)
    pretrain_steps: int = option(1500, "maximum-likelihood steps", 0)
    pretrain_batch: int = option(48, "texts per step", 1)
    pretrain_lr: float = option(1e-2, "peak learning rate", 0)
    # the reward model, where the task has preferences
    comparisons: int = option(8000, "most comparisons to learn the reward from", 20)
    reward_steps: int = option(450, "steps of 64 comparisons to fit the reward model", 1)
    # the episodes
    iterations: int = option(40, "RL iterations", 0)
    batch_size: int = option(256, "episodes per iteration", 1)
    group_size: int = option(4, "episodes per prompt", 1)
    max_new_tokens: int = option(40, "longest completion, tokens", 1)
    temperature: float = option(1.0, "divides the logits, in sampling and in training", 1e-3)
    kl_coef: float = option(0.1, "KL penalty coefficient beta, reward per nat", 0)
    gamma: float = option(1.0, "discount per token (returns, gae)", 0, 1)
    lam: float = option(0.95, "lambda (gae)", 0, 1)
    whiten: int = option(1, "whiten the advantages: 0 or 1", 0, 1)
    # the updates
    lr: float = option(1e-3, "Adam learning rate (all but trpo)", 0)
    max_grad_norm: float = option(1.0, "gradient clipping: largest norm (all but trpo)", 0)
    epochs: int = option(4, "passes over the batch (ppo)", 1)
    minibatches: int = option(4, "minibatches per pass (ppo, critic)", 1)
    clip: float = option(0.2, "clip range epsilon of the probability ratio (ppo)", 0)
    target_kl: float = option(0.03, "mean KL from the old policy that ends an update, nats (ppo)", 0)
    delta: float = option(0.01, "trust region: largest mean KL of an update, nats (trpo)", 0)
    cg_iters: int = option(10, "conjugate gradient iterations (trpo)", 1)
    damping: float = option(0.1, "added to the diagonal of the Fisher matrix (trpo)", 0)
    fisher_fraction: float = option(0.1, "share of the episodes in Fisher products (trpo)", 1e-6, 1)
    critic_lr: float = option(1e-3, "Adam learning rate of the critic and of the reward model", 0)
    critic_epochs: int = option(2, "passes over the batch (critic)", 1)
    eval_episodes: int = option(1000, "sampled completions per evaluation", 2)
    eval_every: int = option(0, "iterations between evaluations, 0: before and after RL alone", 0)
    save_every: int = option(5, "iterations between checkpoints", 1)


# Options that come with the weights of --init.
INHERITED = ("tokenizer", "vocab_size", "block_size", "n_layer", "n_head", "n_embd")
# The options that make sense beside --resume, --eval and --plot.
TAKES = {"resume": ("task", "iterations", "eval_every", "save_every", "device", "threads", "micro_batch"),
         "eval": ("task", "eval_episodes", "max_new_tokens", "temperature", "device", "threads",
                  "micro_batch"),
         "plot": ("out", "name")}


def flag(name):
    return "--" + name.replace("_", "-")


def make_parser():
    """The command line, made from Config. An option that is not given is absent from what it parses."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False,
                                     usage="python train.py [--OPTION VALUE …]",
                                     argument_default=argparse.SUPPRESS)
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--resume", metavar="RUN", default=None, help="continue a run")
    action.add_argument("--eval", metavar="RUN", default=None, help="evaluate a run on its held-out prompts")
    action.add_argument("--plot", metavar="RUN", default=None, nargs="+", help="compare finished runs")
    action.add_argument("--seeds", metavar="N", default=1, type=int, help="compare N seeds of each --algo")
    for f in fields(Config):
        others = [f"{kind}: {values[f.name]}" for kind, values in DEFAULTS.items() if f.name in values]
        default = ", ".join([str(f.default), *others])
        help = f.metadata["help"] + (f" (default {default})" if default not in ("", "False") else "")
        if f.type is bool:
            parser.add_argument(flag(f.name), action="store_true", help=help)
        else:
            parser.add_argument(flag(f.name), type=f.type, choices=f.metadata["choices"], help=help)
    return parser


def parse(argv):
    """(Config, args). The command line wins over the config of a run that is resumed, and over DEFAULTS."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in fields(Config) if hasattr(args, f.name)}
    for action, options in TAKES.items():
        extra = [flag(name) for name in given if name not in options]
        if getattr(args, action) and extra:
            parser.error(f"--{action} does not take {extra[0]}")
    if args.resume or args.eval:
        run = Path(args.resume or args.eval).resolve()
        try:
            defaults = json.loads((run / "config.json").read_text(encoding="utf-8"))
            defaults |= {"out": str(run.parent), "name": run.name, "overwrite": False}
            config = Config(**defaults | given)
            other_task = Path(config.task).name != Path(Config(**defaults).task).name
        except (OSError, ValueError, TypeError, RecursionError) as e:
            reason = " ".join(str(e).split())
            parser.error(f"{run} is not a run of this program ({reason}): give a directory as in runs/NAME")
        if config.task not in TASKS and "task" not in given:  # config.json must not choose what is executed
            parser.error(f"{run} uses a task file: add --task {config.task} to execute it")
        if args.resume and other_task:
            parser.error(f"{run} was trained on another task than {config.task}: --resume keeps the task")
    else:
        asked, defaults = Config(**given), {}
        kinds = [asked.advantage, asked.algo, asked.task]
        if asked.init:
            kinds.append("init gpt2" if is_gpt2(asked.init) else "init")
        for kind in kinds:
            defaults |= DEFAULTS.get(kind, {})
        inherited = [flag(name) for name in given if name in INHERITED]
        if asked.init and inherited:
            parser.error(f"{inherited[0]} comes with the weights of --init: leave it out")
        config = Config(**defaults | given)
    check(config, parser)
    if args.seeds < 1 or is_comparison(config, args) and config.iterations < 1:
        parser.error("--seeds must be at least 1, and a comparison needs --iterations of at least 1")
    if config.task not in TASKS and Path(config.task).is_file():
        config.task = str(Path(config.task).resolve())
    estimator = "" if config.advantage == "gae" else f"-{config.advantage}"
    config.name = config.name or f"{Path(config.task).stem}-{config.algo}{estimator}-{config.seed}"
    return config, args


def is_comparison(config, args):
    return args.seeds > 1 or "," in config.algo


def check(config, parser):
    """parser.error, which exits with status 2, for values that are out of range or contradict each other."""
    for f in fields(Config):
        value, low, high = getattr(config, f.name), f.metadata["low"], f.metadata["high"]
        choices, types = f.metadata["choices"], (int, float) if f.type is float else f.type
        if not isinstance(value, types) or choices and value not in choices:
            parser.error(f"{flag(f.name)} cannot be {value!r}")
        if low is not None and not low <= value <= high:
            parser.error(f"{flag(f.name)} must be from {low:g} to {high:g}, not {value}")
    c = config
    for algo in c.algo.split(","):
        if algo not in ALGOS:
            parser.error(f"there is no --algo {algo!r}: choose from {', '.join(ALGOS)}")
    if c.n_embd % c.n_head:
        parser.error(f"--n-embd {c.n_embd} must be a multiple of --n-head {c.n_head}")
    count = int(os.environ.get("WORLD_SIZE", 1))  # processes
    if c.batch_size % (count * c.group_size):
        parser.error(f"--batch-size {c.batch_size} must be a multiple of --group-size {c.group_size}, times "
                     f"the number of processes, {count}")
    if c.batch_size < count * c.minibatches or c.pretrain_batch < count:
        parser.error(f"--batch-size {c.batch_size} must be at least --minibatches {c.minibatches} times the "
                     f"number of processes, {count}, and --pretrain-batch at least that number")
    if c.advantage in IN_GROUPS and c.group_size < 2:
        parser.error(f"--advantage {c.advantage} needs --group-size 2 or more, to compare within a prompt")
    if c.name and Path(c.name).name != c.name or c.name in ("..", "pretrained") or len(c.name) > 200:
        parser.error(f"--name {c.name} must be a plain name, not pretrained: the directory above it is --out")


def set_up(config):
    """The device of --device, with --threads set and, under torchrun, the process group initialized."""
    if config.threads:
        torch.set_num_threads(config.threads)
    name = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
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


# Pretraining.

def pretrained(config, task, device):
    """The policy that RL starts from, its tokenizer, and {"seconds", "bits_per_byte"} of its pretraining.

    The weights are those of --init, whose sizes config then takes, or random ones, after pretrain_steps on
    the task's corpus. They are kept in --out/pretrained for the next run that would learn the same. Raises
    BadInput.
    """
    policy, tokenizer = load_weights(config.init, device) if config.init else (None, None)
    if policy:
        vars(config).update(asdict(policy.config), tokenizer=tokenizer.name)
        if not config.pretrain_steps:
            return policy, tokenizer, {"seconds": 0.0, "bits_per_byte": None}
    relevant = ("pretrain_seed", "pretrain_steps", "pretrain_batch", "pretrain_lr", *INHERITED)
    key = hashlib.sha256(json.dumps([task.corpus, *(getattr(config, name) for name in relevant)]).encode())
    if policy:
        for tensor in policy.state_dict().values():
            key.update(tensor.cpu().numpy())
    path = Path(config.out) / "pretrained" / f"{key.hexdigest()[:12]}.pt"
    if path.exists():
        policy, _, tokenizer, more = load_checkpoint(path, device)
        print(f"pretrained weights from {path}")
        return policy, tokenizer, more["pretraining"]

    start, generator = time.perf_counter(), torch.Generator().manual_seed(config.pretrain_seed)
    if not policy:
        bpe = config.tokenizer == "bpe"
        tokenizer = Tokenizer.learn(task.corpus, config.vocab_size) if bpe else Tokenizer.gpt2()
        sizes = (config.block_size, config.n_layer, config.n_head, config.n_embd)
        policy = GPT(GPTConfig(tokenizer.vocab_size, *sizes), generator).to(device)
        print(f"a vocabulary of {tokenizer.vocab_size} tokens (--vocab-size {config.vocab_size})")
    texts = [tokenizer.encode(text) + [tokenizer.eos_token] for text in task.corpus]
    rows = to_rows(texts, config.block_size)
    check_fit([*task.prompts, *task.heldout], tokenizer, config.max_new_tokens, config.block_size)
    distinct, which = rows.unique(dim=0, return_inverse=True)  # rows = distinct[which]
    if len(distinct) < 2:
        raise BadInput(f"{config.task} needs a corpus of at least two different texts, or a longer one")
    shuffled = torch.randperm(len(distinct), generator=generator)
    held_out = torch.isin(which, shuffled[:min(1000, math.ceil(len(distinct) / 100))])  # with every copy
    maximize_likelihood(policy, rows[~held_out], config, generator)
    figures = {"bits_per_byte": bits_per_byte(policy, rows[held_out], tokenizer, config),
               "seconds": time.perf_counter() - start}
    save_checkpoint(path, policy, tokenizer, config=asdict(config), pretraining=figures)
    print(f"pretrained weights to {path}: {figures['bits_per_byte']:.3f} bits per held-out byte")
    return policy, tokenizer, figures


def to_rows(texts, block_size):
    """Texts (lists of tokens) as rows (N, T+1) of tokens, padded with -100, which cross_entropy ignores.

    T ≤ block_size. A longer text continues in the next row, which repeats its last token: each token but the
    first of a text is predicted once.
    """
    pieces = [torch.tensor(text[i:i + block_size + 1])
              for text in texts for i in range(0, len(text) - 1, block_size)]
    if not pieces:
        return torch.empty(0, 2, dtype=torch.long)
    return pad_sequence(pieces, batch_first=True, padding_value=-100)


def as_batch(rows, device):
    """Texts as episodes whose actions are their tokens but the first. rows: (N, T+1), padded with -100."""
    rows = rows.to(device)
    return Batch(rows[:, :-1].clamp(min=0), rows[:, 1:].clamp(min=0), mask=rows[:, 1:] >= 0)


def nll(policy, texts):
    """-log π (B, T), in nats, of each token."""
    return -chosen(log_probs(policy, texts.obs, temperature=1.0), texts.actions)


def bits_per_byte(policy, rows, tokenizer, config):
    """-log2 π per byte of text, which compares models of different vocabularies. rows: (N, T+1)."""
    texts = as_batch(rows, next(policy.parameters()).device)
    nats = in_parts(lambda part: {"nll": nll(policy, part)}, texts, config)["nll"][texts.mask].sum().item()
    return nats / math.log(2) / tokenizer.token_bytes()[texts.actions[texts.mask].cpu()].sum().item()


def maximize_likelihood(policy, rows, config, generator):
    """Fit the policy to rows (N, T+1): AdamW with warm-up and linear decay of the learning rate."""
    (rank, count), steps, device = processes(), config.pretrain_steps, next(policy.parameters()).device
    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    start, nats, tokens = time.perf_counter(), 0.0, 0
    lengths, batches = (rows >= 0).sum(1) - 1, []  # of a row, the tokens to predict
    for step in range(1, steps + 1):
        if not batches:  # draw 8, of rows of like length each, so that little is computed on padding
            drawn = torch.randint(len(rows), (8 * config.pretrain_batch,), generator=generator)
            mean_tokens = lengths[drawn].sum().item() / 8  # of all 8 alike, or short texts would weigh more
            drawn = drawn[lengths[drawn].argsort()].view(8, -1)
            batches = list(drawn[torch.randperm(8, generator=generator)])
        batch = batches.pop(0)
        texts = as_batch(rows[batch.tensor_split(count)[rank]], device)  # this process's share
        weight = lengths[batch].sum().item() / mean_tokens
        loss = mean_gradient(policy, lambda part: {"loss": weight * nll(policy, part)}, texts, config,
                             max_grad_norm=1.0)["loss"]
        optimizer.param_groups[0]["lr"] = config.pretrain_lr * min(step / 50, 1 - step / (steps + 1))
        optimizer.step()
        nats, tokens = nats + loss * mean_tokens, tokens + lengths[batch].sum().item()
        if step % 100 == 0:
            print(f"pretrain {step:5d}/{steps}  loss {nats / tokens:.3f} nats per token  "
                  f"{time.perf_counter() - start:.0f} s", flush=True)
            nats, tokens = 0.0, 0


# Episodes.

def collect(task, policy, reference, critic, tokenizer, config, generators):
    """Sample this process's share of an iteration's episodes and judge them. Returns a Batch and statistics.

    The statistics are over the episodes of all processes. Before it is asked for values, the critic gets the
    units of these returns.
    """
    count = processes()[1]
    n = config.batch_size // config.group_size // count
    index = torch.randint(len(task.prompts), (n,), generator=generators["prompts"])
    prompts = [task.prompts[i] for i in index for _ in range(config.group_size)]
    batch, completions, kl, H = run_episodes(policy, reference, prompts, tokenizer, config,
                                             config.temperature, generators["sample"])
    mask = batch.mask
    batch.scores = torch.tensor(score(task.reward, prompts, completions), device=mask.device)  # (B,)
    rewards = token_rewards(batch.scores, mask, batch.logprobs, batch.ref_logprobs, config.kl_coef)  # (B, T)
    batch.values = torch.zeros_like(rewards)
    if critic:  # of a new critic every value becomes the mean return; those of a fitted one stay
        mean, variance = mean_and_variance(discounted_returns(rewards, mask, config.gamma), mask)
        critic.set_units(mean, variance.sqrt())
        batch.values = in_parts(lambda part: {"values": critic(part.obs)}, batch, config)["values"]
    batch.advantages, batch.returns = ADVANTAGES[config.advantage](rewards, batch.scores, batch.values, mask,
                                                                   config)
    check_finite(mean_of_the_advantages=masked_mean(batch.advantages, mask).item())
    if config.whiten:
        batch.advantages = whiten(batch.advantages, mask)
    per_action = lambda x: masked_mean(x, mask).item()
    per_episode = lambda x: batch_mean(torch.as_tensor(x, dtype=torch.float32, device=mask.device)).item()
    stats = {"reward": per_episode(batch.scores), "kl": per_action(kl), "entropy": per_action(H),
             "length": per_episode([text.length for text in completions]),
             "ended": per_episode([text.ended for text in completions])}
    if task.true_reward:
        stats["true_reward"] = per_episode(score(task.true_reward, prompts, completions))
    if config.advantage in IN_GROUPS:
        groups = batch.scores.view(-1, config.group_size)
        stats["equal_groups"] = per_episode((groups == groups[:, :1]).all(1))
    return batch, stats


def evaluate(task, policy, reference, tokenizer, config):
    """Complete held-out prompts, sampled and greedily, with the same random numbers at every call.

    Returns figures and the sampled completions, {prompt, completion, reward, metric} each. Figures: means
    over completions (reward with half of its 95% interval, metric, length, ended; greedy is the metric of
    greedy completions) and over actions (kl, entropy), and the diversity of the completions. The interval is
    that of the prompts' means: completions of one prompt are alike. Raises BadInput for prompts too long.
    """
    check_fit([*task.prompts, *task.heldout], tokenizer, config.max_new_tokens, policy.config.block_size)
    generator = torch.Generator(next(policy.parameters()).device).manual_seed(12345)
    prompts = list(islice(cycle(task.heldout), config.eval_episodes))
    texts, kl, H = complete(policy, reference, prompts, tokenizer, config, config.temperature, generator)
    greedy, _, _ = complete(policy, reference, task.heldout, tokenizer, config, 0, generator)
    judges = {"reward": task.reward, "true_reward": task.true_reward, "metric": task.metric}
    judged = {name: score(judge, prompts, texts) for name, judge in judges.items() if judge}
    n = min(len(task.heldout), len(prompts))  # prompt i is completed in rows i, i + n, i + 2n, …
    _, half = interval([fmean(judged["reward"][i::n]) for i in range(n)])
    figures = {"reward": fmean(judged["reward"]), "reward_ci": half}
    figures |= {name: fmean(numbers) for name, numbers in judged.items()}
    figures |= {"greedy": fmean(score(task.metric, task.heldout, greedy)),
                "kl": kl.mean().item(), "entropy": H.mean().item(),
                "distinct_1": distinct_n(texts, 1), "distinct_2": distinct_n(texts, 2),
                "length": fmean(text.length for text in texts), "ended": fmean(text.ended for text in texts)}
    samples = [{"prompt": prompt, "completion": text, **dict(zip(judged, numbers))}
               for prompt, text, *numbers in zip(prompts, texts, *judged.values())]
    return figures, samples


def metric_name(task):
    return getattr(task.metric, "__name__", "metric").replace("<lambda>", "metric")


def print_figures(task, columns):
    """Print the figures of `evaluate`. columns: {title: figures}."""
    metric = metric_name(task)
    labels = {"reward": "reward", "reward_ci": "± (95%)", "true_reward": "true reward",
              "metric": metric, "greedy": f"{metric}, greedy", "kl": "KL to the reference, nats",
              "entropy": "entropy, nats", "distinct_1": "share of distinct words",
              "distinct_2": "share of distinct pairs", "length": "length, tokens", "ended": "ended"}
    print(f"\n{'on prompts held out of RL':25}" + "".join(f"{title:>10}" for title in columns))
    for name, label in labels.items():
        if name in next(iter(columns.values())):
            print(f"{label:25}" + "".join(f"{figures[name]:10.3f}" for figures in columns.values()))


def warnings(history):
    """What seems wrong with a run, by the rows of metrics.csv."""
    first, last = history[0], history[-1]
    if last["ended"] < first["ended"] / 2:
        yield "fewer than half as many completions end as at first: a larger --kl-coef may help"
    last_ten = history[10:][-10:]  # the critic is new in the first ten
    if len(last_ten) == 10 and fmean(row.get("explained_variance", 0) for row in last_ten) < 0:
        yield "over ten iterations the critic was worse than a constant: more --critic-epochs may help"
    if last.get("equal_groups", 0) > 0.5:
        yield "in most groups all scores are equal, which teaches nothing: a larger --group-size may help"


def print_iteration(history, iterations, warned):
    """Print the last row of metrics.csv, and each warning once. warned: the set of those printed so far."""
    row, done = history[-1], len(history)
    left = fmean(row["seconds"] for row in history) * (iterations - done)
    print(f"{done:4d}/{iterations}  reward {row['reward']:+.3f}  kl {row['kl']:.4f}  "
          f"entropy {row['entropy']:.3f}  {row['seconds']:.2f} s, {left:.0f} s left"
          + "  no step" * (row.get("accepted") == 0), flush=True)
    for warning in warnings(history):
        if warning not in warned:
            print(f"warning: {warning}", flush=True)
        warned.add(warning)


# One run.

def write_json(path, data):
    write_atomically(path, lambda file: file.write((json.dumps(data, indent=2) + "\n").encode()))


def write_table(path, rows):
    """Write rows, dicts of numbers, as CSV with a column for each key."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, *([f"{row.get(name, math.nan):.6g}" for name in names] for row in rows)]
    text = "".join(",".join(line) + "\n" for line in lines)
    write_atomically(path, lambda file: file.write(text.encode()))


def written_files(run):
    """The files of a run but for config.json, its checkpoint first."""
    names = ("checkpoint.pt", "result.json", "metrics.csv", "eval.csv", "samples-*.jsonl")
    return [file for name in names for file in run.glob(name)]


def begin(run, config, resume):
    """Delete what is replaced, the checkpoint first (of a resumed run its result), and write config.json."""
    for file in written_files(run) if processes()[0] == 0 else []:
        if not resume or file.name == "result.json":
            file.unlink()
    write_json(run / "config.json", asdict(config))


def random_generators(seed, iteration, device):
    """This process's generators of an iteration, one for each purpose, from those numbers alone."""
    rank = processes()[0]
    return {purpose: torch.Generator(device if purpose == "sample" else "cpu").manual_seed(
                zlib.crc32(f"{purpose} {seed} {iteration} {rank}".encode()))  # a CPU generator takes 32 bits
            for purpose in ("prompts", "sample", "update")}


def restore(modules, saved, path):
    """Load the saved states of modules, {name: network, optimizer or None}.

    Returns the history, the evaluations and the figures of pretraining. Raises BadInput.
    """
    try:
        for name, module in modules.items():
            if module:
                module.load_state_dict(saved[name])
        return list(saved["history"]), dict(saved["evaluations"]), dict(saved["pretraining"])
    except Exception as e:  # a damaged file can raise nearly anything
        raise BadInput(f"{path} is damaged, or of another run ({type(e).__name__})")


def report(run, task, before, after, history, pretraining):
    """Write result.json, and print what RL changed. before, after: (figures, samples) of `evaluate`."""
    seconds = sum(row["seconds"] for row in history)
    write_json(run / "result.json", {
        "metric": metric_name(task), "before": before[0], "after": after[0], "seconds": seconds,
        "pretraining": pretraining, "processes": processes()[1], "threads": torch.get_num_threads(),
        "torch": torch.__version__})
    for old, new in list(zip(before[1], after[1]))[:6]:
        print(f"\nbefore  {old['prompt']}{old['completion']}\nafter   {new['prompt']}{new['completion']}")
    print_figures(task, {"before": before[0], "after": after[0]})
    print(f"pretraining {pretraining['seconds']:.0f} s, RL {seconds:.0f} s; everything is in {run}")


def train(config, resume=False):
    """Train one run, or resume it: held-out figures, RL, held-out figures again."""
    device, run = set_up(config), Path(config.out) / config.name
    checkpoint = run / "checkpoint.pt"
    task, warned = load_task(config.task, config.pretrain_seed), set()
    if processes()[0] == 0 and not (resume or config.overwrite) and written_files(run):
        raise BadInput(f"{run} exists: give another --name, --overwrite to replace it, or --resume {run}")
    if resume:
        policy, reference, tokenizer, saved = load_checkpoint(checkpoint, device)
        reward_model = saved.get("reward_model")
    else:
        policy, tokenizer, pretraining = pretrained(config, task, device)
        reference = copy.deepcopy(policy)
        generators = random_generators(config.seed, 0, device)  # RL's iterations count from 1
        reward_model = learn_reward(task, policy, tokenizer, config, generators)
    task = use_reward_model(task, reward_model, tokenizer)
    critic = None if config.advantage in WITHOUT_CRITIC else Critic(policy.config, policy).to(device)
    optimizer = torch.optim.Adam(policy.parameters(), config.lr, fused=True)
    critic_optimizer = critic and torch.optim.Adam(critic.parameters(), config.critic_lr, fused=True)
    modules = {"optimizer": optimizer, "critic": critic, "critic_optimizer": critic_optimizer}
    history, evaluations = [], {}  # the rows of metrics.csv; those of eval.csv by iteration
    if resume:
        history, evaluations, pretraining = restore(modules, saved, checkpoint)
        finished = (run / "result.json").exists()  # else its last evaluation is missing
        if config.iterations < len(history) + finished:
            raise BadInput(f"{run} has done {len(history)} iterations: give more --iterations")
    before = evaluate(task, reference, reference, tokenizer, config)

    def save():
        all_modules = {**modules, "reference": reference, "reward_model": reward_model}
        save_checkpoint(checkpoint, policy, tokenizer, config=asdict(config), pretraining=pretraining,
                        history=history, evaluations=evaluations,
                        **{name: module.state_dict() for name, module in all_modules.items() if module})

    def log_evaluation(iteration, figures, samples):
        evaluations[iteration] = {"iteration": iteration, **figures}
        write_table(run / "eval.csv", [*evaluations.values()])
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        write_atomically(run / f"samples-{iteration}.jsonl", lambda file: file.write(lines.encode()))

    begin(run, config, resume)
    save()
    log_evaluation(0, *before)
    size, count = sum(p.numel() for p in policy.parameters()), processes()[1]
    print(f"\n{config.algo} with {config.advantage} on {config.task}: {size:,} weights, {device}, "
          f"{count} process{'es' * (count > 1)} of {torch.get_num_threads()} threads")

    for iteration in range(len(history) + 1, config.iterations + 1):
        start, generators = time.perf_counter(), random_generators(config.seed, iteration, device)
        batch, stats = collect(task, policy, reference, critic, tokenizer, config, generators)
        update = ALGOS[config.algo](policy, batch, optimizer, config, generators["update"])
        fit = fit_critic(critic, batch, critic_optimizer, config, generators["update"]) if critic else {}
        seconds = time.perf_counter() - start
        # A TypeError where an algorithm's column has the name of another.
        row = dict(iteration=iteration, **stats, **update, **fit, seconds=seconds)
        total = sum(p.detach().sum() for model in (policy, critic) if model for p in model.parameters())
        check_finite(**row, sum_of_the_weights=total.item())  # NaN if any weight is
        history.append(row)
        write_table(run / "metrics.csv", history)
        print_iteration(history, config.iterations, warned)
        if config.eval_every and iteration % config.eval_every == 0 and iteration < config.iterations:
            figures, samples = evaluate(task, policy, reference, tokenizer, config)
            log_evaluation(iteration, figures, samples)
            print_figures(task, {f"after {iteration}": figures})
        if iteration % config.save_every == 0:
            save()

    after = evaluate(task, policy, reference, tokenizer, config)
    log_evaluation(len(history), *after)
    save()
    report(run, task, before, after, history, pretraining)


# Several runs.

def read_run(run):
    """A finished run: (label, result, metrics). metrics: {column: [a value for each iteration]}.

    The label is the run's name without its seed and its estimator, plus the estimator. Raises BadInput.
    """
    run = Path(run).resolve()
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
        estimator = config["advantage"]
        label = run.name.removesuffix(f"-{config['seed']}").removesuffix(f"-{estimator}") + f" + {estimator}"
        result = json.loads((run / "result.json").read_text(encoding="utf-8"))
        with open(run / "metrics.csv", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        metrics = {column: [float(row[column]) for row in rows] for column in rows[0]}
        if not ({"metric", "after", "seconds"} <= {*result} and {"reward", "kl"} <= {*metrics}):
            raise ValueError("the files are of another program")
        return label, result, metrics
    except (OSError, ValueError, TypeError, LookupError) as e:
        raise BadInput(f"{run} is not a finished run ({type(e).__name__}): give directories as in runs/NAME")


# The 97.5% quantiles of Student's t distribution for 1 to 9 degrees of freedom.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values):
    """The mean of independent values and half of its 95% interval, nan for a single value."""
    n, mean = len(values), fmean(values)
    if n == 1 or not math.isfinite(mean):
        return mean, math.nan
    quantile = T_QUANTILES[n - 2] if n <= 10 else 1.96 + 2.72 / (n - 1)  # correct to 0.011
    return mean, quantile * stdev(values) / math.sqrt(n)


def text_distance(metrics):
    """√KL(π‖π_ref) of a whole text at each iteration, in √nats. metrics: of `read_run`."""
    return [math.sqrt(kl * length) for kl, length in zip(metrics["kl"], metrics["length"])]


def have_true_rewards(groups):
    """Whether the runs of all groups have true rewards beside learned ones."""
    return all("true_reward" in metrics for group in groups.values() for _, metrics in group)


def compare(runs, path):
    """Finished runs averaged over seeds: a table, printed and written to PATH.md, and curves, PATH.png."""
    groups, runs = {}, [Path(run).resolve() for run in runs]
    if len({run.name for run in runs}) < len(runs):
        raise BadInput("two of these runs have the same name: rename one's directory, or leave it out")
    for run in runs:
        label, result, metrics = read_run(run)
        groups.setdefault(label, []).append((result, metrics))
    metric = " or ".join(sorted({result["metric"] for group in groups.values() for result, _ in group}))
    titles = {"reward": "reward", "true_reward": "true reward", "metric": metric,
              "greedy": f"{metric}, greedy", "kl": "KL", "entropy": "entropy", "length": "length",
              "distinct_2": "distinct pairs"}
    if not have_true_rewards(groups):
        del titles["true_reward"]

    def cell(values):
        mean, half = interval(values)
        return f"{mean:.3f}" + f" ± {half:.3f}" * (len(values) > 1)

    lines = [["", "runs", "iterations", *titles.values(), "seconds"], ["---"] * (len(titles) + 4)]
    for label, group in groups.items():
        iterations = " or ".join(sorted({str(len(metrics["reward"])) for _, metrics in group}))
        figures = [cell([result["after"][name] for result, _ in group]) for name in titles]
        seconds = cell([result["seconds"] for result, _ in group])
        lines.append([label, str(len(group)), iterations, *figures, seconds])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    table += "\n\nMean ± half of the 95% interval over seeds. KL, entropy: nats per token; length: tokens.\n"
    print(f"\n{table}")
    write_atomically(Path(f"{path}.md"), lambda file: file.write(table.encode()))
    drawn = plot(groups, Path(f"{path}.png"))
    print(f"{path}.md" + (f", {path}.png" if drawn else "; with matplotlib installed, learning curves too"))


# Of Okabe & Ito: told apart by the colour-blind and, the first three, in print without colour.
COLOURS = ("#000000", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def plot(groups, path):
    """Learning curves with their 95% interval, and reward against KL, as a PNG. False without matplotlib.

    Where true rewards stand beside learned ones, they are drawn too, dashed, and the KL is √KL of a text.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    both = have_true_rewards(groups)
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    learning, frontier = figure.subplots(1, 2, sharey=True)
    learning.set_prop_cycle(color=COLOURS)
    for label, group in groups.items():
        over_seeds = lambda column: list(zip(*(metrics[column] for _, metrics in group)))
        means = lambda column: list(map(fmean, over_seeds(column)))
        reward, half = zip(*map(interval, over_seeds("reward")))
        steps, distance = range(1, len(reward) + 1), means("kl")
        line, = learning.plot(steps, reward, label=label)
        learning.fill_between(steps, *zip(*((m - h, m + h) for m, h in zip(reward, half))), alpha=0.2)
        if both:
            distance = list(map(fmean, zip(*(text_distance(metrics) for _, metrics in group))))
            for axes, x in (learning, steps), (frontier, distance):
                axes.plot(x, means("true_reward"), "--", color=line.get_color(), label=f"{label}, true")
        frontier.plot(distance, reward, ".-", color=line.get_color(), label=label)
    learning.set(xlabel="iteration", ylabel="reward")
    frontier.set(xlabel="√KL to the reference of a text, √nats" if both else
                 "KL to the reference, nats per token")
    figure.legend(*learning.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=100))
    return True


# Options that a run may change between its start and its end.
INCIDENTAL = ("name", "out", "overwrite", "device", "threads", "micro_batch", "eval_every", "save_every")


def is_finished(config):
    """True for a finished run of this Config, False for an interrupted one, None if there is none.

    Raises BadInput for a run of that name with other options.
    """
    run = Path(config.out) / config.name
    if config.overwrite or not (run / "checkpoint.pt").exists():
        return None
    _, _, _, saved = load_checkpoint(run)
    ignored, before = INCIDENTAL + INHERITED * bool(config.init), asdict(Config()) | saved.get("config", {})
    for name, value in asdict(config).items():
        if name not in ignored and before[name] != value:
            raise BadInput(f"{run} exists with another {flag(name)}: give another --name, or --overwrite")
    return (run / "result.json").exists()


def train_all(argv, config, args):
    """Train each algorithm with each seed, and compare. Finished runs are skipped, interrupted ones resumed.

    A run is the same command line with its --algo, --seed and, if one was given, --name appended.
    """
    plan, runs, diverged = [], [], 0
    for seed in range(config.seed, config.seed + args.seeds):
        for algo in config.algo.split(","):
            name = ["--name", f"{args.name}-{algo}-{seed}"] if hasattr(args, "name") else []
            plan.append(parse([*argv, "--algo", algo, "--seed", str(seed), *name])[0])
    finished = [is_finished(one) for one in plan]
    for one, done in zip(plan, finished):
        run = Path(one.out) / one.name
        print(f"\n{run}" + " is finished" * bool(done))
        try:
            if not done:
                train(one, resume=done is False)
            runs.append(run)
        except FloatingPointError as e:
            if processes()[1] > 1:  # the other processes may not have noticed
                raise
            print(f"error: {run} is left out: {e}", file=sys.stderr)
            diverged += 1
    if runs and processes()[0] == 0:
        compare(runs, Path(config.out) / config.name.replace(",", "+").removesuffix(f"-{config.seed}"))
    if diverged:
        raise FloatingPointError(f"{diverged} of {len(plan)} runs diverged and are not in the table")


def main(argv=None):
    """Do what the command line says. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    config, args = parse(argv)
    run = Path(config.out) / config.name
    try:
        if args.plot:
            compare(args.plot, Path(config.out) / getattr(args, "name", "plot"))
        elif args.eval:
            policy, reference, tokenizer, more = load_checkpoint(run, set_up(config))
            task = load_task(config.task, config.pretrain_seed)
            task = use_reward_model(task, more.get("reward_model"), tokenizer)
            figures, samples = evaluate(task, policy, reference, tokenizer, config)
            print(*(sample["prompt"] + sample["completion"] for sample in samples[:6]), sep="\n")
            print_figures(task, {"after": figures})
        elif is_comparison(config, args):
            train_all(argv, config, args)
        else:
            train(config, resume=bool(args.resume))
    except (BadInput, BadTask) as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(f"error: {e}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        resume = f"--resume {run}" + f" --task {config.task}" * (config.task not in TASKS)
        one_run = not (args.eval or args.plot or is_comparison(config, args))
        begun = one_run and (run / "checkpoint.pt").exists()
        print("\ninterrupted: to go on,",
              resume if begun else "give the same command again, without --overwrite", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that the policy writes
    sys.exit(main())
