"""Teach a tiny GPT to write, then improve it by policy gradient: `python train.py --algo trpo`.

Phases: a tokenizer and a policy learned from the task's corpus (kept for the next run), a look at held-out prompts, RL, and
the same look again. Everything goes to runs/NAME/. Several algorithms and seeds are several runs and one table.
`python train.py --help` lists every option.
"""

import contextlib
import copy
import csv
import errno
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import time
import unicodedata
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean, stdev

try:
    import fcntl
except ImportError:  # Windows, where two processes in one run's directory go unnoticed
    fcntl = None

import torch
import torch.distributed as dist
import torch.nn.functional as F

from advantage import ADVANTAGES, all_sum, masked_mean, processes, token_rewards, whiten
from algos import (Batch, check_finite, chosen, entropy, fit_critic, gradient_step, kl_divergence, log_probs, ppo, reinforce,
                   trpo)
from model import GPT, Critic, GPTConfig
from reward import TASKS, BadTask, Text, distinct_n, load_task, score
from rollout import (ArgumentParser, BadInput, Tokenizer, check_fit, command, complain, is_gpt2, load_checkpoint, load_weights,
                     sample, save_checkpoint, write_atomically)

# What reading a damaged text, JSON or CSV can raise.
UNREADABLE = (OSError, ValueError, LookupError, TypeError, OverflowError, RecursionError, csv.Error)
ALGOS = {"reinforce": reinforce, "trpo": trpo, "ppo": ppo}


# Options that differ by advantage, algorithm, task or the weights of --init.
DEFAULTS = {
    "rloo": dict(whiten=0),
    "grpo": dict(whiten=0),
    "reinforce": dict(iterations=80),
    "ppo": dict(lr=5e-4),
    "reviews": dict(vocab_size=620, block_size=64, max_new_tokens=44),
    "addition": dict(vocab_size=257, block_size=16, max_new_tokens=4, n_embd=128, n_head=8, pretrain_steps=3000, pretrain_batch=128,
                     pretrain_lr=3e-3, kl_coef=0.01, iterations=150, group_size=1, lr=1e-4, damping=1.0),
    "hello": dict(vocab_size=448, block_size=48, max_new_tokens=28),
    "init": dict(pretrain_steps=0),
    "init gpt2": dict(pretrain_steps=0, pretrain_batch=8, pretrain_lr=1e-4, batch_size=16, lr=1e-5, critic_lr=1e-4,
                      eval_episodes=64),
}


def option(default, help, low=None, high=None, choices=None):
    """A Config field with what the command line needs to know of it."""
    high = high or (10 ** 9 if isinstance(default, int) else 1e30)
    return field(default=default, metadata=dict(help=help, low=low, high=high, choices=choices))


@dataclass
class Config:
    task: str = option("reviews", f"what to learn: {', '.join(TASKS)}, or a Python file that defines a task")
    algo: str = option("trpo", f"how to learn it: {', '.join(ALGOS)}, or several with commas between, to compare")
    advantage: str = option("gae", "estimator of the advantage", choices=ADVANTAGES)
    name: str = option("", "of the run's directory (default TASK-ALGO-SEED, or TASK-ALGO-ADVANTAGE-SEED without gae)")
    out: str = option("runs", "directory of all runs and of the pretrained weights")
    overwrite: bool = option(False, "replace an existing run of that name")
    seed: int = option(0, "of everything after pretraining", 0)
    device: str = option("auto", "auto, cpu, cuda or mps")
    threads: int = option(0, "CPU threads, 0 for torch's choice", 0, 1024)
    dtype: str = option("float32", "of matrix products, but for trpo's update: that takes float32", choices=("float32", "bfloat16"))
    tensorboard: bool = option(False, "write event files too, if tensorboard is installed")
    # the model and its pretraining
    init: str = option("", "weights to start from: a run, a checkpoint, a GPT-2's directory (downloads its vocabulary), or gpt2 (downloads 0.5 GB)")
    pretrain_seed: int = option(0, "of the corpus, the first weights and pretraining", 0)
    tokenizer: str = option("bpe", "bpe learned from the corpus, or GPT-2's (downloads it)", choices=("bpe", "gpt2"))
    vocab_size: int = option(512, "most tokens in the learned vocabulary", 257)
    block_size: int = option(64, "context, tokens", 2)
    n_layer: int = option(2, "transformer blocks", 1)
    n_head: int = option(4, "attention heads per block", 1)
    n_embd: int = option(96, "width", 1)
    pretrain_steps: int = option(1500, "steps of maximum likelihood", 0)
    pretrain_batch: int = option(48, "texts per step", 1)
    pretrain_lr: float = option(1e-2, "peak learning rate", 0)
    # the episodes
    iterations: int = option(40, "RL iterations", 0)
    batch_size: int = option(256, "episodes per iteration", 1)
    group_size: int = option(4, "episodes per prompt", 1)
    max_new_tokens: int = option(40, "longest completion, tokens", 1)
    temperature: float = option(1.0, "of the policy that is sampled and trained", 1e-3)
    kl_coef: float = option(0.1, "reward taken per nat away from the pretrained policy", 0)
    gamma: float = option(1.0, "returns and gae: discount per token", 0, 1)
    lam: float = option(0.95, "GAE's lambda", 0, 1)
    whiten: int = option(1, "1 scales advantages to mean 0 and variance 1, 0 leaves them", 0, 1)
    # the updates
    lr: float = option(1e-3, "reinforce and ppo: Adam's learning rate", 0)
    max_grad_norm: float = option(1.0, "longest gradient of a first-order step", 0)
    epochs: int = option(4, "ppo: passes over the batch", 1)
    minibatches: int = option(4, "ppo and critic: parts of a pass", 1)
    clip: float = option(0.2, "ppo: epsilon, how far the probability ratio may leave 1", 0)
    target_kl: float = option(0.03, "ppo: mean KL from the old policy that ends an update, nats", 0)
    delta: float = option(0.01, "trpo: mean KL that an update may reach, nats", 0)
    cg_iters: int = option(10, "trpo: conjugate gradient iterations", 1)
    damping: float = option(0.1, "trpo: multiple of the identity added to the Fisher matrix", 0)
    fisher_fraction: float = option(0.1, "trpo: part of the episodes that Fisher products use", 1e-6, 1)
    backtracks: int = option(10, "trpo: halvings of the step before it is rejected", 0)
    critic_lr: float = option(1e-3, "Adam's learning rate for the critic", 0)
    critic_epochs: int = option(2, "the critic's passes over the batch", 1)
    eval_episodes: int = option(1000, "sampled completions of held-out prompts per evaluation", 2)
    save_every: int = option(20, "iterations between checkpoints", 1)


def command_line(argv):
    """What the command line gives, {option: value}; eval, plot, resume and seeds are not of Config. Raises BadInput."""
    parser = ArgumentParser(description=__doc__.splitlines()[0], epilog="Where several defaults apply, those of --init come before "
                            "the task's, then the algorithm's, the advantage's, and the first.")
    parser.add_argument("--eval", metavar="RUN", help="train nothing: print the held-out figures of a run or checkpoint")
    parser.add_argument("--plot", metavar="RUN", nargs="+", help="train nothing: compare finished runs; seeds are averaged")
    parser.add_argument("--resume", metavar="RUN", help="go on with a run that was stopped, or with a finished one for more --iterations")
    parser.add_argument("--seeds", metavar="N", type=int, help="train each --algo with N seeds, from --seed on, and compare")
    for f in fields(Config):
        flag, help, choices = "--" + f.name.replace("_", "-"), f.metadata["help"], f.metadata["choices"]
        if f.type is bool:
            parser.add_argument(flag, action="store_const", const=True, help=help)
            continue
        own = [f"{name}: {d[f.name]}" for name, d in DEFAULTS.items() if f.name in d]
        default = ", ".join(([] if f.default == "" else [str(f.default)]) + own)
        parser.add_argument(flag, type=f.type, choices=choices and list(choices),
                            metavar=None if choices else f.type.__name__.upper(),
                            help=help + (f" (default {default})" if default else ""))
    return {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}


def configure(given):
    """The Config of a run. What is not given comes from DEFAULTS, then from the fields. Raises BadInput."""
    first = Config(**given)
    if "init" in given:
        fixed = [name for name in ("tokenizer", *GPTConfig.__dataclass_fields__) if name in given]
        if fixed:
            raise BadInput(f"--{fixed[0].replace('_', '-')} comes with the weights of --init: leave it out")
        if not first.init:
            raise BadInput("--init is empty: give a run, a checkpoint or a GPT-2, or leave it out")
    weights = first.init and ("init gpt2" if is_gpt2(first.init) else "init")
    own = {}
    for name in (first.advantage, first.algo, first.task, weights):  # the last has the last word
        own |= DEFAULTS.get(name, {})
    config = Config(**{**own, **given})
    kind = "" if config.advantage == "gae" else f"-{config.advantage}"
    if config.task not in TASKS and Path(config.task).is_file():
        config.task = str(Path(config.task).resolve())
    if config.init and Path(config.init).exists():
        config.init = str(Path(config.init).resolve())
    config.name = config.name or f"{Path(config.task).stem}-{config.algo}{kind}-{config.seed}"
    return checked(config)


def checked(config):
    """The config, if its values can be. Raises BadInput."""
    def require(condition, message):
        if not condition:
            raise BadInput(message)

    for f in fields(Config):
        low, high, value = f.metadata["low"], f.metadata["high"], getattr(config, f.name)
        kinds, choices = (int, float) if f.type is float else (f.type,), f.metadata["choices"]
        require(type(value) in kinds and (choices is None or value in choices), f"--{f.name.replace('_', '-')} cannot be {value!r}: see --help")
        require(low is None or low <= value <= high, f"--{f.name.replace('_', '-')} is {value}: it must be a number from {low} to {high:g}")
    c = config
    require(c.algo in ALGOS, f"--algo {c.algo} is not known: choose among {', '.join(ALGOS)}")
    require(c.n_embd % c.n_head == 0, f"--n-embd {c.n_embd} must be a multiple of --n-head {c.n_head}")
    require(c.batch_size % c.group_size == 0,
            f"--batch-size {c.batch_size} must be a multiple of --group-size {c.group_size}")
    require(c.group_size > 1 or c.advantage not in ("rloo", "grpo"),
            f"--advantage {c.advantage} compares the episodes of a prompt: give --group-size 2 or more")
    require(c.minibatches <= c.batch_size, f"--minibatches {c.minibatches} must be at most --batch-size {c.batch_size}")
    require(Path(c.name).name == c.name and c.name not in ("..", "pretrained"),
            f"--name {c.name} cannot name a run: choose a plain word; the directory above it is --out")
    return config


def pick_device(config):
    """The device that --device asks for, with --threads and, under torchrun, the other processes at work. Raises BadInput."""
    if config.threads:
        torch.set_num_threads(config.threads)
    name = config.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError):
        raise BadInput(f"there is no device {name} here: --device takes auto, cpu, cuda or mps, and cpu always works")
    if name.startswith("cuda:"):
        torch.cuda.set_device(name)  # where nccl, too, is to work
    if config.dtype == "bfloat16" and name.startswith("cuda") and not torch.cuda.is_bf16_supported():
        raise BadInput("this GPU has no bfloat16: leave --dtype out")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():  # started by torchrun
        dist.init_process_group("nccl" if name.startswith("cuda") else "gloo")
    _, count = processes()
    if config.batch_size % (count * config.group_size):
        raise BadInput(f"--batch-size {config.batch_size} must be a multiple of {count} processes times --group-size {config.group_size}")
    if config.pretrain_batch < count:
        raise BadInput(f"--pretrain-batch {config.pretrain_batch} must be at least the number of processes, {count}")
    return torch.device(name)


def mixed(config, device, **options):
    """Within it matrix products are of --dtype; weights, optimizers and all that is computed from logits stay float32."""
    return torch.autocast(device.type, torch.bfloat16, **options) if config.dtype == "bfloat16" else contextlib.nullcontext()


# What a run's directory holds, by its names' beginnings; half-written files have a dot before.
OURS = ("config.json", "metrics.csv", "checkpoint.pt", "result.json", "diverged.pt", "events.out.tfevents")


def claim_run(config):
    """Raises BadInput where the run, made later, would replace another or could not be written."""
    out, run = Path(config.out), Path(config.out) / config.name
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK | os.X_OK):
            raise BadInput(f"cannot write in {out}: choose another --out")
        if run.exists() and not config.overwrite:
            raise BadInput(f"{run} exists: give another --name, --overwrite to replace it, or --resume {run} to go on")
        if run.is_symlink() or run.exists() and not (run / "metrics.csv").is_file():
            raise BadInput(f"{run} is no run of ours and stays as it is: give another --name")
        foreign = [path.name for path in run.iterdir() if not path.name.removeprefix(".").startswith(OURS)] if run.exists() else []
        if foreign:
            raise BadInput(f"--overwrite would delete {run / foreign[0]}, which is not ours: move it, or give another --name")
        start = Path(config.init).resolve()
        if config.init and run.resolve() in (start, *start.parents):
            raise BadInput(f"--overwrite would delete {run}, which is what --init starts from: give another --name")
    except OSError as e:
        raise BadInput(f"cannot use the directory {run}: choose another --out or --name ({e.strerror})")


def open_run(run, config):
    """Make the run's directory, whole at once, in place of an older run where --overwrite was given. Raises BadInput."""
    beside = run.with_name(f".{run.name}.{os.getpid()}.part")
    try:
        beside.mkdir()
        (beside / "metrics.csv").touch()
        write_json(beside / "config.json", asdict(config))
        if config.overwrite and run.exists():
            shutil.rmtree(run)
        beside.rename(run)
    except OSError as e:
        shutil.rmtree(beside, ignore_errors=True)
        raise BadInput(f"cannot make {run}: give another --name ({e.strerror})")


def open_metrics(path):
    """metrics.csv, for this process alone as long as it is open. Raises BadInput."""
    file = open(path, "r+", encoding="latin-1", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NOFOLLOW", 0)))
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise BadInput(f"{path} is being written by another process: wait for it, or give another --name")
    return file


def cut(metrics, rows):
    """Leave the header and so many rows: what was done after the checkpoint will be done again. Raises BadInput."""
    lines = [metrics.readline() for _ in range(rows + 1 if rows else 0)]
    if not all(line.endswith("\n") for line in lines):
        raise BadInput(f"{metrics.name} has fewer rows than the checkpoint has iterations: the run cannot go on")
    metrics.seek(metrics.tell())
    metrics.truncate()


def write_json(path, data):
    write_atomically(path, lambda beside: beside.write_text(json.dumps(data, indent=2) + "\n"))


def states(parts):
    """What modules, optimizers and generators hold, as plain data. parts: {name: one of them, or None}."""
    return {name: part and (part.get_state() if isinstance(part, torch.Generator) else part.state_dict())
            for name, part in parts.items()}


def restore(saved, parts, path):
    """The reverse of `states`. path: the file that it comes from. Raises BadInput."""
    try:
        for name, part in parts.items():
            if isinstance(part, torch.optim.Optimizer):  # with the options of this run; and Adam's fused kernel checks no shape
                part.load_state_dict({**saved[name], "param_groups": part.state_dict()["param_groups"]})
                if not all(state["exp_avg"].shape == state["exp_avg_sq"].shape == p.shape and state["step"].shape == () for p, state in part.state.items()):
                    raise ValueError("an optimizer of other weights")
            elif part is not None:
                (part.set_state if isinstance(part, torch.Generator) else part.load_state_dict)(saved[name])
    except Exception as e:  # a damaged file can raise nearly anything
        raise BadInput(f"{path} is damaged, or of another run or kind of device: delete it, or give another ({type(e).__name__})")


@contextlib.contextmanager
def stopping():
    """A list that gets the number of a first Ctrl-C or SIGTERM, to be looked at where it is safe to stop. A second one kills."""
    caught, numbers = [], (signal.SIGINT, signal.SIGTERM)

    def note(number, frame):
        caught.append(number)
        for number, usual in zip(numbers, before):
            signal.signal(number, usual)

    try:
        before = [signal.signal(number, note) for number in numbers]
    except ValueError:  # not in the main thread, where signals never arrive
        numbers = before = ()
    try:
        yield caught
    finally:
        for number, usual in zip(numbers, before):
            signal.signal(number, usual)


# Phase 1: imitation.

def pretrained(config, task, device):
    """The policy that RL starts from, and its tokenizer: --init's or a new one, after pretrain_steps on the task's corpus.

    What took steps is kept and found again. Returns (policy, tokenizer, {"seconds", "bits_per_byte"}). Raises BadInput.
    """
    def check_prompts(block_size):
        check_fit([tokenizer.encode(p) for p in task.prompts + task.heldout], config.max_new_tokens, block_size)

    policy, tokenizer = load_weights(config.init, device) if config.init else (None, None)
    if policy and not config.pretrain_steps:
        check_prompts(policy.config.block_size)
        return policy, tokenizer, {"seconds": 0.0, "bits_per_byte": None}
    if not task.corpus:
        raise BadInput(f"{config.task} has no corpus to learn from: define one, or start from weights with --init")
    decisive = "pretrain_seed tokenizer vocab_size block_size n_layer n_head n_embd pretrain_steps pretrain_batch pretrain_lr dtype"
    own = [getattr(config, name) for name in decisive.split() if not (policy and name in INHERITED)]
    key = hashlib.sha256(json.dumps(own + [task.corpus, "1% held out"]).encode())
    for tensor in policy.state_dict().values() if policy else ():
        key.update(tensor.cpu().numpy())
    path = Path(config.out) / "pretrained" / f"{Path(config.task).stem}-{key.hexdigest()[:12]}.pt"
    if path.exists():
        policy, _, tokenizer, more = load_checkpoint(path, device)
        if not all(isinstance(more.get(name), float) for name in ("bits_per_byte", "seconds")):
            raise BadInput(f"{path} is damaged: delete it, and pretraining is done anew")
        check_prompts(policy.config.block_size)
        print(f"pretrained weights from {path}: {more['bits_per_byte']:.3f} bits per held-out byte")
        return policy, tokenizer, more
    start, generator = time.perf_counter(), torch.Generator().manual_seed(config.pretrain_seed)
    if not policy:
        tokenizer = Tokenizer.learn(task.corpus, config.vocab_size) if config.tokenizer == "bpe" else Tokenizer.gpt2()
        check_prompts(config.block_size)
        shape = GPTConfig(tokenizer.vocab_size, config.block_size, config.n_layer, config.n_head, config.n_embd)
        policy = GPT(shape, generator).to(device)
    texts = [tokenizer.encode(text) + [tokenizer.eos_token] for text in task.corpus]
    rows, heldout = split_rows(as_rows(texts, policy.config.block_size), generator)
    imitate(policy, rows, config, generator, path.with_suffix(".part"))
    more = {"bits_per_byte": bits_per_byte(policy, heldout, tokenizer.sizes(), config.pretrain_batch),
            "seconds": time.perf_counter() - start}
    if not math.isfinite(more["bits_per_byte"]):
        raise FloatingPointError(f"pretraining diverged, with {more['bits_per_byte']} bits per held-out byte: lower --pretrain-lr")
    if processes()[0] == 0:
        save_checkpoint(path, policy, tokenizer, config=asdict(config) | asdict(policy.config), **more)
    print(f"pretrained weights to {path}: {more['bits_per_byte']:.3f} bits per held-out byte")
    return policy, tokenizer, more


def as_rows(texts, block_size):
    """Texts (lists of tokens) as rows of at most block_size + 1 tokens, filled up with -100, which cross_entropy passes over.

    A longer text goes on in the next row, which repeats its last token: each token but a text's first is predicted once.
    """
    pieces = [text[i:i + block_size + 1] for text in texts for i in range(0, len(text) - 1, block_size)]
    rows = torch.full((len(pieces), max(map(len, pieces), default=0)), -100)
    for row, piece in zip(rows, pieces):
        row[:len(piece)] = torch.tensor(piece)
    return rows


def split_rows(rows, generator):
    """99% of the rows to learn from, and 1% (at most 1,000) for the bits per byte. Raises BadInput where there are too few."""
    if len(rows) < 2:
        raise BadInput("the corpus is too short: it takes two texts, or one that is longer than --block-size tokens")
    order = torch.randperm(len(rows), generator=generator)
    heldout = min(1000, max(1, len(rows) // 100))
    return rows[order[heldout:]], rows[order[:heldout]]


def nll(policy, rows, reduction):
    """-log π, in nats, of each row's tokens but the first. rows: (B, T+1), -100 where there is none."""
    rows = rows[:, :(rows >= 0).sum(1).max()].to(next(policy.parameters()).device)
    logits = policy(rows[:, :-1].clamp(min=0))  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def bits_per_byte(policy, rows, sizes, batch_size):
    """-log2 π per byte of the predicted text, so that vocabularies compare. sizes: (V,) bytes of each token."""
    nats = sum(nll(policy, part, "sum").item() for part in rows.split(batch_size))
    predicted = rows[:, 1:]
    return nats / math.log(2) / sizes[predicted[predicted >= 0]].sum().item()


def imitate(policy, rows, config, generator, part):
    """Maximum likelihood on rows (N, T+1) of tokens: AdamW with warm-up and linear decay.

    part: the file that holds what is done so far, every 200 steps, and is gone in the end.
    """
    (rank, count), device, lengths = processes(), next(policy.parameters()).device, (rows >= 0).sum(1)

    def batches(pool=8):  # of texts of like length, so that little is computed on padding
        while True:
            drawn = torch.randint(len(rows), (pool * config.pretrain_batch,), generator=generator)
            drawn = drawn[lengths[drawn].argsort()].view(pool, config.pretrain_batch)
            yield from drawn[torch.randperm(pool, generator=generator)]

    optimizer = torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    steps, warmup, start, total, done = config.pretrain_steps, 50, time.perf_counter(), 0.0, 0
    parts = {"policy": policy, "optimizer": optimizer, "generator": generator}
    if part.exists():
        try:
            saved = torch.load(part, weights_only=True)
            done = int(saved["step"])
        except Exception as e:  # a damaged file can raise nearly anything
            raise BadInput(f"{part} is damaged: delete it, and pretraining starts anew ({type(e).__name__})")
        restore(saved, parts, part)
        print(f"pretraining goes on after step {done}")
    with stopping() as stop:
        for step, drawn in zip(range(done + 1, steps + 1), batches()):
            optimizer.param_groups[0]["lr"] = config.pretrain_lr * min(step / warmup, 1 - step / (steps + 1))
            mine = rows[drawn.tensor_split(count)[rank]]
            tokens = (mine[:, 1:] >= 0).sum().to(device)
            with mixed(config, device):
                loss = nll(policy, mine, "mean") * (tokens / all_sum(tokens))
            try:
                gradient_step(policy, loss, optimizer, max_grad_norm=1.0)
            except FloatingPointError as e:
                raise FloatingPointError(f"pretraining diverged at step {step}, {e}: lower --pretrain-lr")
            total += all_sum(loss.detach()).item()
            if step % 100 == 0:
                seconds = time.perf_counter() - start
                print(f"pretrain {step:5d}/{steps}  loss {total / 100:.3f} nats per token  {seconds:.0f} s", flush=True)
                total = 0.0
            if step % 200 == 0 and rank == 0:  # a multiple of the pool
                write_atomically(part, lambda beside: torch.save({"step": step, **states(parts)}, beside))
            if all_sum(torch.tensor(len(stop), device=device)):
                print(f"stopped at step {step} of the pretraining: --resume with the run's directory (beside --overwrite: the same command) goes on after {step - step % 200}")
                sys.exit(128 + (stop or [signal.SIGTERM])[0])
    part.unlink(missing_ok=True)


# Phase 2: episodes.

@torch.no_grad()
def compare(rollout, reference, temperature):
    """log π and log π_ref of the actions, then at each step the exact KL(π‖π_ref) and π's entropy: four (B, T)."""
    actions, logp = rollout.tokens[:, 1:], rollout.logp
    ref_logp = log_probs(reference, rollout.tokens[:, :-1], temperature)  # (B, T, V)
    return chosen(logp, actions), chosen(ref_logp, actions), kl_divergence(logp, ref_logp), entropy(logp)


def complete(policy, reference, prompts, tokenizer, config, temperature, generator):
    """Let the policy complete the prompts. Returns the Rollout, its completions as a reward gets them, and what `compare` says."""
    with mixed(config, next(policy.parameters()).device):
        rollout = sample(policy, [tokenizer.encode(p) for p in prompts], config.max_new_tokens, tokenizer.eos_token, temperature, generator)
        compared = compare(rollout, reference, config.temperature)
    mask, ref_logp = rollout.mask, compared[1]  # (B, T)
    length = mask.sum(1)  # (B,)
    ended = (mask & (rollout.tokens[:, 1:] == tokenizer.eos_token)).any(1)
    fluency = ref_logp.masked_fill(~mask, 0).sum(1) / length
    figures = zip(rollout.completions(tokenizer), length.tolist(), ended.tolist(), fluency.tolist())
    return rollout, [Text(completion, length=n, ended=e, fluency=f) for completion, n, e, f in figures], compared


def collect(task, policy, reference, critic, tokenizer, config, generators):
    """Let the policy complete some training prompts, and judge what it did. Returns a Batch and statistics.

    Of several processes each takes its share of the episodes; the statistics are of all.
    """
    _, count = processes()
    index = torch.randint(len(task.prompts), (config.batch_size // config.group_size // count,), generator=generators["prompts"])
    prompts = [task.prompts[i] for i in index for _ in range(config.group_size)]
    rollout, completions, (logp, ref_logp, kl, H) = complete(policy, reference, prompts, tokenizer, config, config.temperature,
                                                             generators["sample"])
    obs, actions, mask = rollout.tokens[:, :-1], rollout.tokens[:, 1:], rollout.mask  # (B, T)
    scores = torch.tensor(score(task.reward, prompts, completions), device=mask.device)
    rewards = token_rewards(scores, mask, logp, ref_logp, config.kl_coef)
    with torch.no_grad():
        values = critic(obs) if critic else torch.zeros_like(rewards)
    advantages, returns = ADVANTAGES[config.advantage](rewards, values, mask, config)
    if config.whiten:
        advantages = whiten(advantages, mask)
    mean = lambda x: masked_mean(x, mask).item()
    unexplained = mean((returns - values) ** 2) / max(mean((returns - mean(returns)) ** 2), 1e-8)
    everywhere = lambda values: all_sum(torch.tensor(fmean(values), device=mask.device)).item() / count
    stats = {"reward": everywhere(scores.tolist()), "kl": mean(kl), "entropy": mean(H),
             "length": everywhere([c.length for c in completions]), "ended": everywhere([c.ended for c in completions]),
             **({"explained_variance": 1 - unexplained} if critic else {})}
    return Batch(obs, actions, mask, logp, advantages, returns), stats


def evaluate(task, policy, reference, tokenizer, config):
    """Complete held-out prompts, sampled and greedily, with the same random numbers at every call.

    Returns figures and the sampled (prompt, completion) pairs. Figures: means over the completions (reward with half of its 95%
    interval, metric, length, ended; greedy: the metric of the greedy ones) and over the actions (kl, entropy), and the distinct
    words and pairs of words of all completions.
    """
    generator = torch.Generator(next(policy.parameters()).device).manual_seed(12345)

    def episodes(prompts, temperature):
        for start in range(0, len(prompts), config.batch_size):
            part = prompts[start:start + config.batch_size]
            yield part, *complete(policy, reference, part, tokenizer, config, temperature, generator)

    pairs, rewards, metrics, sums = [], [], [], torch.zeros(3)
    prompts = list(itertools.islice(itertools.cycle(task.heldout), config.eval_episodes))
    for part, rollout, completions, (_, _, kl, H) in episodes(prompts, config.temperature):
        pairs += zip(part, completions)
        rewards += score(task.reward, part, completions)
        metrics += rewards[-len(part):] if task.metric is task.reward else score(task.metric, part, completions)
        sums += torch.stack([kl[rollout.mask].sum(), H[rollout.mask].sum(), rollout.mask.sum()]).cpu()
    greedy = [value for part, _, completions, _ in episodes(task.heldout, 0)
              for value in score(task.metric, part, completions)]
    kl, H = (sums[:2] / sums[2]).tolist()
    texts = [completion for _, completion in pairs]
    return {"reward": fmean(rewards), "reward_ci": 1.96 * stdev(rewards) / math.sqrt(len(rewards)),
            "metric": fmean(metrics), "greedy": fmean(greedy), "kl": kl, "entropy": H,
            "distinct_1": distinct_n(texts, 1), "distinct_2": distinct_n(texts, 2),
            "length": fmean(text.length for text in texts), "ended": fmean(text.ended for text in texts)}, pairs


def show(before, after, count=6):
    """Print some completions of the same prompts before and after, side by side."""
    width = max(30, (shutil.get_terminal_size((110, 24)).columns - 3) // 2)
    cells = lambda text: sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in text)  # a Chinese character fills two
    lines = lambda text: textwrap.wrap(text, max(1, width * len(text) // max(1, cells(text))))
    print(f"\n{'before':{width}} | after")
    for (prompt, old), (_, new) in list(zip(before, after))[:count]:
        for a, b in itertools.zip_longest(lines(prompt + old), lines(prompt + new), fillvalue=""):
            print(a + " " * (width - cells(a)), "|", b)
        print("-" * width + "-+-" + "-" * width)


def report(task, *columns):
    """Print the figures of `evaluate`, a column for each (title, figures)."""
    name = name_of(task.metric)
    rows = [("reward", "reward"), ("± (95%)", "reward_ci"), (name, "metric"), (f"{name}, greedy", "greedy"),
            ("KL to the reference, nats", "kl"), ("entropy, nats", "entropy"), ("distinct words", "distinct_1"),
            ("distinct pairs", "distinct_2"), ("length, tokens", "length"), ("ended", "ended")]
    if task.metric is task.reward:
        rows.remove((name, "metric"))
    print(f"\n{'on held-out prompts':25}" + "".join(f"{title:>10}" for title, _ in columns).rstrip())
    for label, figure in rows:
        print(f"{label:25}" + "".join(f" {figures[figure]:9.3f}" for _, figures in columns))


def name_of(metric):
    return getattr(metric, "__name__", "metric").replace("<lambda>", "metric")


def event_writer():
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise BadInput("tensorboard is not installed: pip install tensorboard, or leave --tensorboard out")
    return SummaryWriter


def train(config, resume=False):
    """One run, whole, or what is left of it, and nobody else's meanwhile."""
    try:
        with contextlib.ExitStack() as held:
            train_alone(config, resume, held.enter_context)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise
        raise BadInput(f"no room to write in {Path(config.out) / config.name} or on standard output: free some space and go on with --resume ({e.strerror})")


def train_alone(config, resume, hold):
    """`train`, whose `hold` keeps metrics.csv open, and with it the run locked, until all is done."""
    SummaryWriter = event_writer() if config.tensorboard else None
    device, run = pick_device(config), Path(config.out) / config.name
    rank, count = processes()  # the first alone writes
    if rank == 0 and not resume:
        claim_run(config)
    task, new = load_task(config.task, config.pretrain_seed), rank == 0 and not run.exists()
    if new:
        open_run(run, config)
    metrics = hold(open(os.devnull, "w") if rank else open_metrics(run / "metrics.csv"))
    try:
        if resume and (run / "checkpoint.pt").exists():
            policy, reference, tokenizer, more = load_checkpoint(run, device)
            kinds = {"iteration": int, "seconds": float, "pretraining": dict, "generators": list}
            if not (all(isinstance(more.get(name), kind) for name, kind in kinds.items()) and more["iteration"] >= 0
                    and isinstance(more["pretraining"].get("seconds"), float) and "bits_per_byte" in more["pretraining"]):
                raise BadInput(f"{run / 'checkpoint.pt'} is not of a run that can go on: give another")
        else:
            policy, tokenizer, pretraining = pretrained(config, task, device)
            reference, more = copy.deepcopy(policy), {"iteration": 0, "seconds": 0.0, "pretraining": pretraining}
        done = more["iteration"]
        if resume and (config.iterations < done or config.iterations == done and (run / "result.json").exists()):
            raise BadInput(f"{run} has done {done} iterations: give more --iterations to go on")
        if config.init:
            vars(config).update(asdict(policy.config), tokenizer=tokenizer.name)  # as they are
        reference.requires_grad_(False)
        critic = Critic(policy.config, policy).to(device) if config.advantage == "gae" else None
        optimizer = torch.optim.Adam(policy.parameters(), config.lr, fused=True)
        critic_optimizer = critic and torch.optim.Adam(critic.parameters(), config.critic_lr, fused=True)
        own = 10 ** 11 * rank + 10 * config.seed  # each process draws its own episodes, and all shuffle them alike
        generators = {"prompts": torch.Generator().manual_seed(own + 1), "sample": torch.Generator(device).manual_seed(own + 2),
                      "update": torch.Generator().manual_seed(10 * config.seed + 3)}
        parts = {"critic": critic, "optimizer": optimizer, "critic_optimizer": critic_optimizer}
        if done:
            if len(more["generators"]) != count:
                raise BadInput(f"{run} was trained by {len(more['generators'])} processes, and goes on with as many")
            restore(more, parts, run / "checkpoint.pt")
            restore(more["generators"][rank], generators, run / "checkpoint.pt")
        before, texts_before = evaluate(task, reference, reference, tokenizer, config)
    except Exception:
        if new:  # there is nothing in it
            shutil.rmtree(run)
        raise
    if not resume and not new and rank == 0:
        open_run(run, config)  # in place of the old one, now that nothing is likely to go wrong
        metrics = hold(open_metrics(run / "metrics.csv"))
    iteration, seconds, pretraining, rejected, update = done, more["seconds"], more["pretraining"], 0, ALGOS[config.algo]

    def save(iteration):
        everyone = [states(generators)] * count
        if count > 1:
            dist.all_gather_object(everyone, states(generators))
        if rank == 0:
            os.fsync(metrics.fileno())  # its rows come before what they tell of
            save_checkpoint(run / "checkpoint.pt", policy, tokenizer, reference=reference.state_dict(), config=asdict(config), seconds=seconds,
                            iteration=iteration, pretraining=pretraining, generators=everyone, **states(parts))

    if rank == 0:
        cut(metrics, iteration)
        (run / "result.json").unlink(missing_ok=True)  # of fewer iterations
        write_json(run / "config.json", asdict(config))
    events = SummaryWriter(str(run), purge_step=iteration + 1) if SummaryWriter and rank == 0 else None
    size = sum(p.numel() for p in policy.parameters())
    print(f"\n{config.algo} with {config.advantage} on {config.task}: {size:,} weights, "
          f"{torch.get_num_threads()} threads, {device}" + f", {count} processes" * (count > 1) + f", after iteration {iteration}" * (iteration > 0))
    with stopping() as stop:
        for iteration in range(iteration + 1, config.iterations + 1):
            began, drawn = time.perf_counter(), states(generators)
            try:
                batch, stats = collect(task, policy, reference, critic, tokenizer, config, generators)
                check_finite(**stats)
                with mixed(config, device, cache_enabled=False):  # the weights change within
                    stats |= update(policy, batch, optimizer, config, generators["update"])
                    if critic:
                        stats |= fit_critic(critic, batch, critic_optimizer, config, generators["update"])
                weights = [p.sum() for model in (policy, critic) if model for p in model.parameters()]
                check_finite(**stats, sum_of_the_weights=torch.stack(weights).sum().item())  # nor save what an update has ruined
            except (BadTask, FloatingPointError) as e:
                if isinstance(e, BadTask) and count == 1:  # the others are elsewhere
                    restore(drawn, generators, run)
                    save(iteration - 1)  # since when no weight has moved
                if not isinstance(e, FloatingPointError):
                    raise
                if rank == 0 or isinstance(e, BadTask):  # which the others have not seen
                    saved = e.batch if isinstance(e, BadTask) else vars(batch)
                    write_atomically(run / "diverged.pt", lambda beside: torch.save(saved, beside))
                hint = "" if isinstance(e, BadTask) else ": lower the step (--lr, --critic-lr or --delta) and begin again, with --overwrite or another --name"
                raise FloatingPointError(f"training stopped at iteration {iteration}, {e}{hint}; the batch is in {run / 'diverged.pt'}")
            took = time.perf_counter() - began
            seconds += took
            row = {"iteration": iteration, **stats, "seconds": took}
            if iteration == 1:
                print(*row, sep=",", file=metrics)
            print(*(f"{value:.6g}" for value in row.values()), sep=",", file=metrics, flush=True)
            for name, value in row.items() if events else ():
                events.add_scalar(name, value, iteration)
            rejected = 0 if stats.get("accepted", 1) else rejected + 1
            print(f"{iteration:4d}/{config.iterations}  reward {stats['reward']:+.3f}  kl {stats['kl']:.4f}  entropy {stats['entropy']:.3f}  "
                  f"took {took:.2f} s, {seconds / iteration * (config.iterations - iteration):.0f} s left"
                  + (f"  no step ({rejected} in a row)" if rejected else ""), flush=True)
            stopped = all_sum(torch.tensor(len(stop), device=device))  # any of the processes
            if stopped or iteration % config.save_every == 0:
                save(iteration)
            if stopped:
                print(f"stopped after iteration {iteration}: python train.py --resume {run} goes on")
                sys.exit(128 + (stop or [signal.SIGTERM])[0])
        save(iteration)
    if events:
        events.close()

    after, texts_after = evaluate(task, policy, reference, tokenizer, config)
    figures = {f"{name}_{when}": value for when, side in (("before", before), ("after", after))
               for name, value in side.items() if name != "kl"}
    if rank:
        return
    write_json(run / "result.json", {
        "task": config.task, "algo": config.algo, "advantage": config.advantage, "seed": config.seed,
        "metric": name_of(task.metric), **figures, "kl": after["kl"], "iterations": config.iterations,
        "bits_per_byte": pretraining["bits_per_byte"], "seconds_pretrain": pretraining["seconds"], "seconds_rl": seconds,
        "processes": count, "threads": torch.get_num_threads(), "torch": torch.__version__})
    show(texts_before, texts_after)
    report(task, ("before", before), ("after", after))
    print(f"pretraining {pretraining['seconds']:.0f} s, RL {seconds:.0f} s; everything is in {run}")


def resumed(run, given):
    """The Config of a run that is to go on. given: what the command line says beside --resume. Raises BadInput."""
    run = Path(run).resolve()
    only(given, "resume", "task", "iterations", "save_every", "device", "threads", "tensorboard")
    try:
        was = Config(**json.loads((run / "config.json").read_text()))
        config = checked(replace(was, **given, out=str(run.parent), name=run.name, overwrite=False))
    except BadInput:
        raise
    except UNREADABLE:
        raise BadInput(f"{run} is no run: give its directory, as in runs/NAME")
    if config.task not in TASKS and "task" not in given:  # a directory's word is not enough to execute a file
        raise BadInput(f"{run} is of a task of its own: add --task {was.task} to execute that file")
    if config.task != was.task and str(Path(config.task).resolve()) != was.task:
        raise BadInput(f"{run} is of the task {was.task}, and cannot go on with another")
    return config


# Several runs, side by side.

# What may differ between the runs of one experiment; and what --init decides.
INCIDENTAL = ("name", "out", "overwrite", "device", "threads", "tensorboard", "save_every")
INHERITED = ("tokenizer", *GPTConfig.__dataclass_fields__)


def plan(given):
    """The Configs of a comparison, all algorithms of a seed before the next seed, and its name. Raises BadInput."""
    seeds, name, first = given.pop("seeds", 1), given.pop("name", ""), given.get("seed", 0)
    algos = list(dict.fromkeys(algo.strip() for algo in given.pop("algo", Config.algo).split(",")))
    if seeds < 1 or given.get("iterations") == 0:
        raise BadInput("a comparison takes at least 1 of --seeds and of --iterations")
    configs = [configure({**given, "algo": algo, "seed": seed, "name": name and f"{name}-{algo}-{seed}"})
               for seed in range(first, first + seeds) for algo in algos]
    stem = name or configs[0].name.rpartition(f"-{algos[0]}")[0]
    advantage = "" if name or configs[0].advantage == "gae" else f"-{configs[0].advantage}"
    return configs, f"{stem}-{'+'.join(algos)}{advantage}"


def finished(config):
    """Whether this very run is there and whole, where one that was cut short is to go on. Raises BadInput."""
    run = Path(config.out) / config.name
    if config.overwrite or not run.exists():
        return False
    try:
        was = json.loads((run / "config.json").read_text())
        changed = [name for name, value in asdict(config).items() if was[name] != value
                   and name not in INCIDENTAL and not (config.init and name in INHERITED)]
        if changed:
            raise BadInput(f"{run} is there with another --{changed[0].replace('_', '-')}: give another --name, or --overwrite")
        if config.task not in TASKS and Path(config.task).stat().st_mtime > (run / "config.json").stat().st_mtime:
            raise BadInput(f"{config.task} is newer than {run}: give another --name, or --overwrite")
    except BadInput:
        raise
    except UNREADABLE:
        raise BadInput(f"{run} is no run of ours, or of another version: give another --name")
    return (run / "result.json").exists()


def train_all(configs, name):
    """Train what is not finished, one run after the other, and compare. Raises FloatingPointError where a run diverged."""
    for config in configs:
        finished(config)  # before the first is trained, whether the last can be
    diverged, runs = [], [Path(config.out) / config.name for config in configs]
    for i, (config, run) in enumerate(zip(configs, runs), 1):
        there = finished(config)
        print(f"\nrun {i} of {len(runs)}: {run}" + " is finished, and not trained again" * there)
        if not there:
            try:
                train(config, resume=run.exists() and not config.overwrite)
            except FloatingPointError as e:
                if processes()[1] > 1:  # the others may not know
                    raise
                diverged.append(run)
                complain(e)
    if processes()[0] == 0 and len(diverged) < len(runs):
        side_by_side([run for run in runs if run not in diverged], runs[0].with_name(name))
    if diverged:
        raise FloatingPointError(f"{len(diverged)} of {len(runs)} runs diverged and are not in the table: {', '.join(map(str, diverged))}")


def read_run(run):
    """A finished run: (config, result, metrics {column: [a value for each iteration]}). Raises BadInput."""
    try:
        config, result = (json.loads((run / file).read_text()) for file in ("config.json", "result.json"))
        with open(run / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        metrics = {column: [float(row[column]) for row in rows] for column in rows[0]}
        needed = [*(metrics[name] for name in ("reward", "kl", "kl_update", "seconds")),
                  [result[name] for name in ("reward_before", "reward_after", "metric_after", "greedy_after", "kl")], [config["seed"]]]
        if not all(abs(value) < 1e30 for values in (*needed, *metrics.values()) for value in values) or not all(
                isinstance(name, str) and name for name in (config["task"], result["metric"])):
            raise ValueError
        return config, result, metrics
    except UNREADABLE:
        raise BadInput(f"{run} is no finished run: give directories as in runs/NAME, each with a result.json and an iteration or more")


def grouped(runs):
    """{label: runs}. Runs that differ in no more than the seed stand together; the label says in what the groups do."""
    def label(run, names):
        values = {name: run[0].get(name, getattr(Config, name)) for name in names}
        return " ".join(str(value) if name in ("algo", "advantage") else f"{name}={value}" for name, value in values.items())

    names = ["algo"]
    for name in ("advantage", *Config.__dataclass_fields__):  # only what tells runs apart that the names before do not
        if name not in ("seed", *INCIDENTAL) and len({label(run, [*names, name]) for run in runs}) > len({label(run, names) for run in runs}):
            names.append(name)
    groups = {}
    for run in runs:
        groups.setdefault(label(run, names), []).append(run)
    for name, group in groups.items():
        if len({run[0]["seed"] for run in group}) < len(group):
            raise BadInput(f"two of the runs of {name} have the same seed, and count but once: leave one out")
    return groups


@functools.cache
def t_quantile(df):
    """Within ± this lie 95% of Student's t distribution with df degrees of freedom."""
    t = torch.linspace(0, 13, 130_001, dtype=torch.float64)  # it is 12.71 for df = 1
    density = torch.distributions.StudentT(torch.tensor(df, dtype=torch.float64)).log_prob(t).exp()
    return t[torch.searchsorted(torch.cumulative_trapezoid(density, t), 0.475)].item()


def interval(values):
    """The mean of independent values, and half of its 95% interval (nan where there is but one)."""
    n = len(values)
    return fmean(values), t_quantile(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else math.nan


def trailing(values, window=5):
    """The means of `window` values in a row, from the first that can be had."""
    window = min(window, len(values))
    return [fmean(values[i:i + window]) for i in range(len(values) - window + 1)]


def curve(group, column):
    """The values of a column of metrics.csv, [one per run] for each iteration."""
    return list(zip(*(metrics[column] for _, _, metrics in group)))


def tabulate(groups):
    """A Markdown table: for each group and figure the mean over its runs ± half of the 95% interval."""
    before = fmean(result["reward_before"] for group in groups.values() for _, result, _ in group)
    best = max(max(trailing(list(map(fmean, curve(group, "reward"))))) for group in groups.values())
    goal = before + 0.9 * (best - before)

    def figures(result, metrics):
        """{title: value}, None where there is none."""
        reward, n = metrics["reward"], len(metrics["reward"])
        crossed = next((i for i, mean in enumerate(trailing(reward), min(5, n)) if mean >= goal), None)
        accepted, clipped = metrics.get("accepted"), metrics.get("clip_fraction")
        return {"iterations": n, "reward": result["reward_after"], result["metric"]: result["metric_after"],
                f"{result['metric']}, greedy": result["greedy_after"], "KL": result["kl"], "to 90%": crossed,
                "s to 90%": crossed and sum(metrics["seconds"][:crossed]), "KL of an update": fmean(metrics["kl_update"]),
                "rejected": accepted and len(accepted) - sum(accepted), "clip fraction": clipped and fmean(clipped)}

    def cell(values):
        some = [value for value in values if value is not None]
        if not some:
            return ""
        mean, half = interval(some)
        return (f"{mean:.3g}" + (f" ± {half:.2g}" if half > 0 else "") +
                (f" ({len(some)} of {len(values)})" if len(some) < len(values) else ""))

    table = []
    for label, group in groups.items():
        rows = [figures(result, metrics) for _, result, metrics in group]
        table.append({"": label, "runs": str(len(rows)), **{title: cell([row[title] for row in rows]) for title in rows[0]}})
    lines = [list(table[0]), *([row[title] for title in table[0]] for row in table)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    text = "\n".join("| " + " | ".join(f"{c:{w}}" for c, w in zip(line, widths)) + " |" for line in lines)
    return (f"{text}\n\nMean ± half of the 95% interval over the seeds of RL; the pretrained weights and the held-out prompts are the same.\n"
            f"To 90%: iterations until the mean reward of five in a row is {goal:.3f}, nine tenths of the way from the start to the best.")


def sparklines(groups, width=60):
    """The mean reward of each group over its iterations as a line of blocks, all on one scale."""
    means = {label: list(map(fmean, curve(group, "reward"))) for label, group in groups.items()}
    step = math.ceil(max(map(len, means.values())) / width)
    low, high = min(map(min, means.values())), max(map(max, means.values()))
    lines = []
    for label, values in means.items():
        parts = [fmean(values[i:i + step]) for i in range(0, len(values), step)]
        blocks = "".join("▁▂▃▄▅▆▇█"[int(7.999 * (part - low) / max(high - low, 1e-12))] for part in parts)
        lines.append(f"{label:{max(map(len, means))}} {blocks} {values[0]:.3f} to {values[-1]:.3f}")
    return "\n".join(lines)


def draw(groups, path):
    """The learning curves with their 95% interval, and reward against KL, as a PNG. Whether matplotlib is here to do it."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    learning, frontier = figure.subplots(1, 2, sharey=True)
    for label, group in groups.items():
        reward, half = zip(*map(interval, curve(group, "reward")))
        iterations = range(1, len(reward) + 1)
        learning.plot(iterations, reward, label=label)
        learning.fill_between(iterations, [m - h for m, h in zip(reward, half)], [m + h for m, h in zip(reward, half)], alpha=0.2)
        frontier.plot(list(map(fmean, curve(group, "kl"))), reward, ".-", label=label)
    learning.set(xlabel="iteration", ylabel="reward")
    frontier.set(xlabel="KL to the reference, nats per token")
    learning.legend()
    write_atomically(path, lambda beside: figure.savefig(beside, format="png", dpi=150))
    return True


def side_by_side(runs, path):
    """Compare finished runs: a table, printed and saved as PATH.md, a line of blocks for each group, and PATH.png."""
    runs, text, picture = [read_run(Path(run)) for run in runs], Path(f"{path}.md"), Path(f"{path}.png")
    if len({(config["task"], result["metric"]) for config, result, _ in runs}) > 1:
        raise BadInput("these runs are of different tasks: compare those of one")
    if text.exists() and not text.read_text(encoding="utf-8", errors="replace").startswith("|  "):
        raise BadInput(f"{text} is no table of ours and stays as it is: give another --name")
    if picture.exists() and not text.exists():
        raise BadInput(f"{picture} is no picture of ours and stays as it is: give another --name")
    groups = grouped(runs)
    table = tabulate(groups)
    print(f"\n{table}\n\nreward over the iterations\n{sparklines(groups)}\n")
    write_atomically(text, lambda beside: beside.write_text(table + "\n", encoding="utf-8"))
    print(f"{text}" + (f", {picture}" if draw(groups, picture) else "; with matplotlib installed, a picture too"))


def only(given, option, *takes):
    """Raises BadInput for what has no meaning beside an option."""
    for name in given:
        if name not in takes:
            raise BadInput(f"--{name} has no meaning for --{option}, which takes --{', --'.join(takes)}".replace("_", "-"))


def look(run, given):
    """Print the held-out figures of a run or checkpoint. given: what the command line says beside --eval."""
    only(given, "eval", "task", "eval_episodes", "max_new_tokens", "temperature", "device", "threads", "dtype")
    policy, reference, tokenizer, more = load_checkpoint(run)
    try:
        config = checked(Config(**{**more["config"], **given}))
    except (KeyError, TypeError):  # of another version
        raise BadInput(f"{run} does not say what it was trained for: give a run's directory, as in runs/NAME")
    if config.task not in TASKS and "task" not in given:  # a checkpoint's word is not enough to execute a file
        raise BadInput(f"{run} was trained on a task of its own: add --task {config.task} to execute that file")
    device, task = pick_device(config), load_task(config.task, config.pretrain_seed)
    policy, reference = policy.to(device), reference.to(device)
    check_fit([tokenizer.encode(p) for p in task.heldout], config.max_new_tokens, policy.config.block_size)
    figures, pairs = evaluate(task, policy, reference, tokenizer, config)
    for prompt, completion in pairs[:6]:
        print(prompt + completion)
    report(task, ("", figures))
    asked = min(config.eval_episodes, len(task.heldout))
    print(f"{config.eval_episodes} sampled completions of {asked} held-out prompts, at temperature {config.temperature}")


def main(argv=None):
    def body():
        if int(os.environ.get("RANK", 0)):
            sys.stdout = open(os.devnull, "w")  # the first process speaks for all
        given = command_line(argv)
        if "eval" in given:
            look(given.pop("eval"), given)
        elif "plot" in given:
            runs = given.pop("plot")
            only(given, "plot", "name", "out")
            config = configure({"name": "plot", **given})
            side_by_side(runs, Path(config.out) / config.name)
        elif "resume" in given:
            train(resumed(given.pop("resume"), given), resume=True)
        elif "seeds" in given or "," in given.get("algo", ""):
            train_all(*plan(given))
        else:
            train(configure(given))

    return command(body, BadTask)


if __name__ == "__main__":
    sys.exit(main())
