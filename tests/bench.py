"""How long things take and how much memory, as ratios within one run: `python tests/bench.py [PART …] [--json FILE]`.

Parts: fisher, updates, iteration, sampling; these are what runs by default, some five minutes. And `seconds`, a whole default run
of train.py taken apart; `growth`, one RL iteration at growing sizes; and `processes`, one on two processes, two threads and in
bfloat16. Machines are shared and noisy: what is compared is run in turns, and a ratio is the median of the turns' ratios. Let
nothing else run beside it.
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

sys.path.insert(0, str(Path(__file__).parent.parent))

import algos
import train
from algos import Batch, chosen, fisher_vector_product, flatten, log_probs
from model import GPT, Critic, GPTConfig, gpt2_layout
from reward import TASKS, Task
from rollout import Tokenizer, sample

SIZE = "batch, tokens, layers, heads, width, vocabulary"
SIZES = [(256, 10, 2, 3, 96, 257), (128, 64, 4, 4, 128, 257), (64, 128, 4, 4, 128, 257), (16, 256, 6, 6, 192, 257)]


def in_turns(rounds, **functions):
    """Seconds of each function in each round, {name: [rounds]}, after one round that does not count."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(a, b):
    return statistics.median(x / y for x, y in zip(a, b))


def median_ms(values):
    return 1000 * statistics.median(values)


def show(title, rows):
    print(f"\n{title}")
    columns = list(rows[0])
    cells = [columns] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)), flush=True)
    return {title: rows}


def make(size):
    """A policy and a batch of full-length episodes of random tokens, with advantages of mean 0 and variance 1."""
    B, T, n_layer, n_head, n_embd, V = size
    policy = GPT(GPTConfig(V, T + 1, n_layer, n_head, n_embd), torch.Generator().manual_seed(0))
    tokens = torch.randint(V, (B, T + 1), generator=torch.Generator().manual_seed(1))
    obs, actions, mask = tokens[:, :-1], tokens[:, 1:], torch.ones(B, T, dtype=torch.bool)
    with torch.no_grad():
        logprobs = chosen(log_probs(policy, obs, 1.0), actions)
    advantages = torch.randn(B, T, generator=torch.Generator().manual_seed(2))
    return policy, Batch(obs, actions, mask, logprobs, advantages, advantages)


def forward(policy, obs):
    with torch.no_grad():
        policy(obs)


# One Fisher-vector product.

def textbook(policy, batch):
    """v -> the Hessian of KL(π_old‖π_θ) at θ_old times v: the KL differentiated twice."""
    params = list(policy.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        logp = log_probs(policy, batch.obs, 1.0)
    kl = (logp.detach().exp() * (logp.detach() - logp)).sum(-1)[batch.mask].mean()
    gradient = flatten(torch.autograd.grad(kl, params, create_graph=True))
    return lambda v: flatten(torch.autograd.grad(gradient @ v, params, retain_graph=True))


def direction(policy):
    return torch.randn(sum(p.numel() for p in policy.parameters()), generator=torch.Generator().manual_seed(3))


def high_water():
    """The most memory that this process has had resident, MiB. Linux: elsewhere the figures of memory are missing."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else float("nan")


def peak(size, make_product):
    """MiB by which one product raises the peak of this process above that of a forward pass."""
    policy, batch = make((1, 2, *size[2:]))
    make_product(policy, batch)(direction(policy))  # what torch imports at its first use does not count
    policy, batch = make(size)
    forward(policy, batch.obs)
    before = high_water()
    make_product(policy, batch)(direction(policy))
    return high_water() - before


def alone(function, *args):
    """Call it in a process of its own, for its peak memory."""
    with multiprocessing.get_context("spawn").Pool(1, torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        return pool.apply(function, args)


def fisher():
    rows = []
    for size in SIZES:
        policy, batch = make(size)
        v, ours, theirs = direction(policy), fisher_vector_product(policy, batch), textbook(policy, batch)
        difference = (ours(v) - theirs(v)).norm() / theirs(v).norm()
        t = in_turns(5, forward=lambda: forward(policy, batch.obs), ours=lambda: ours(v), theirs=lambda: theirs(v),
                     first=lambda: fisher_vector_product(policy, batch)(v), their_first=lambda: textbook(policy, batch)(v))
        rows.append({SIZE: size, "forward ms": median_ms(t["forward"]),
                     "ours/forward": ratio(t["ours"], t["forward"]), "textbook/forward": ratio(t["theirs"], t["forward"]),
                     "with the graph: ours": ratio(t["first"], t["forward"]), "textbook": ratio(t["their_first"], t["forward"]),
                     "ours MiB": alone(peak, size, fisher_vector_product), "textbook MiB": alone(peak, size, textbook), "relative difference": difference.item()})
    return show("One Fisher-vector product over all episodes, the graph kept from the product before", rows)


# Whole updates.

def updates():
    config, rows = train.configure({"target_kl": 1000.0}), []  # so that PPO takes all its steps
    all_episodes = train.configure({"fisher_fraction": 1.0})
    for size in SIZES:
        policy, batch = make(size)

        def run(update, config=config):
            mine = copy.deepcopy(policy)
            stats = update(mine, batch, torch.optim.Adam(mine.parameters(), 1e-4, fused=True), config, torch.Generator().manual_seed(0))
            assert stats.get("accepted", 1) and stats.get("steps", 16) == 16
        t = in_turns(3, forward=lambda: forward(policy, batch.obs), reinforce=lambda: run(algos.reinforce),
                     ppo=lambda: run(algos.ppo), trpo=lambda: run(algos.trpo), whole=lambda: run(algos.trpo, all_episodes))
        rows.append({SIZE: size, "forward ms": median_ms(t["forward"]),
                     **{f"{name}/forward": ratio(t[name], t["forward"]) for name in ("reinforce", "ppo", "trpo")},
                     "trpo/ppo": ratio(t["trpo"], t["ppo"]), "trpo/ppo with all episodes in F": ratio(t["whole"], t["ppo"])})
    return show(f"An update: PPO {config.epochs} x {config.minibatches} steps; TRPO {config.cg_iters} products over "
                f"{config.fisher_fraction:.0%} of the episodes", rows)


# Whole iterations.

@contextlib.contextmanager
def timed(*functions):
    """Note the seconds of each call, {name: [calls]}; not of calls inside another of them. functions: (namespace, name)."""
    originals, seconds, inside = [namespace[name] for namespace, name in functions], {name: [] for _, name in functions}, []

    def watched(original, name):
        def call(*args, **kwargs):
            inside.append(name)
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                inside.pop()
                if not inside:
                    seconds[name].append(time.perf_counter() - start)
        return call
    for (namespace, name), original in zip(functions, originals):
        namespace[name] = watched(original, name)
    try:
        yield seconds
    finally:
        for (namespace, name), original in zip(functions, originals):
            namespace[name] = original


def iteration():
    """REINFORCE with the leave-one-out baseline on addition: a policy that has learned in 300 steps how long its answers are."""
    config = train.configure(dict(task="addition", algo="reinforce", advantage="rloo", group_size=4, pretrain_steps=300))
    task = TASKS["addition"](0)
    with tempfile.TemporaryDirectory() as config.out, contextlib.redirect_stdout(io.StringIO()):
        policy, tokenizer, _ = train.pretrained(config, task, torch.device("cpu"))
    reference, optimizer = copy.deepcopy(policy), torch.optim.Adam(policy.parameters(), config.lr, fused=True)
    generators = {name: torch.Generator().manual_seed(0) for name in ("prompts", "sample", "update")}
    batches = []

    def collect():
        batches.append(train.collect(task, policy, reference, None, tokenizer, config, generators)[0])
    with timed(*((vars(train), name) for name in ("sample", "score", "compare"))) as parts:
        t = in_turns(25, collect=collect, update=lambda: algos.reinforce(policy, batches[-1], optimizer, config),
                     forward=lambda: forward(policy, batches[-1].obs))
    t |= {name: values[1:] for name, values in parts.items()}
    t["other"] = [c - sum(rest) for c, *rest in zip(t["collect"], *(t[name] for name in parts))]
    t["iteration"] = [a + b for a, b in zip(t["collect"], t["update"])]
    labels = {"sample": "sample", "score": "reward", "compare": "reference, KL, entropy", "other": "text, advantages",
              "update": "update", "iteration": "iteration"}
    rows = [{"part": label, "ms": median_ms(t[name]), "/forward": ratio(t[name], t["forward"])} for name, label in labels.items()]
    return show(f"An iteration of REINFORCE with leave-one-out on addition, 256 completions (forward {median_ms(t['forward']):.1f} ms)", rows)


def sampling():
    rows = []
    for size in SIZES:
        B, T, V = size[0], size[1], size[-1]
        policy, _ = make(size)
        generator = torch.Generator().manual_seed(0)

        def complete():
            return sample(policy, [[0]] * B, T, eos_token=V, generator=generator)  # V is never drawn
        tokens = complete().tokens
        functions = {"sample": complete, "forward": lambda: forward(policy, tokens[:, :-1])}
        theirs = gpt2_of_transformers(policy)
        if theirs:
            functions["generate"] = lambda: theirs.generate(tokens[:, :1], attention_mask=torch.ones(B, 1, dtype=torch.long), do_sample=True,
                                                            max_new_tokens=T, min_new_tokens=T, top_k=0, use_cache=True, pad_token_id=0)
        t = in_turns(5, **functions)
        rows.append({SIZE: size, "forward ms": median_ms(t["forward"]), "sample ms": median_ms(t["sample"]),
                     "forward/sample": ratio(t["forward"], t["sample"]),
                     "transformers' generate/sample": ratio(t["generate"], t["sample"]) if theirs else "not installed"})
    return show("Sampling, beside one forward pass over the finished episodes", rows)


def gpt2_of_transformers(policy):
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    c = policy.config
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
                                        bos_token_id=None, eos_token_id=None)).eval()
    theirs.load_state_dict(gpt2_layout(policy.state_dict()), strict=False)  # the head is tied
    return theirs


# A default run, taken apart.

OPERATORS = {"matrix products": ("mm", "addmm", "bmm"), "attention": ("_scaled_dot_product",), "GELU": ("gelu",), "layer norm": ("native_layer_norm",),
             "softmax": ("_softmax", "_log_softmax"), "Adam": ("_fused_adam",)}


def seconds():
    """`python train.py --algo trpo` by its phases; and which operators the time of 10 RL iterations goes to."""
    phases = {"pretrained": "pretraining", "sample": "sampling", "score": "reward", "compare": "reference, KL, entropy", "trpo": "update",
              "fit_critic": "critic's fit", "evaluate": "evaluation", "save_checkpoint": "checkpoints"}
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        with timed(*((train.ALGOS if name == "trpo" else vars(train), name) for name in phases)) as t:
            start = time.perf_counter()
            train.main(["--algo", "trpo", "--out", out])
            whole = time.perf_counter() - start
        with profile() as profiled:
            train.main(["--algo", "trpo", "--out", out, "--name", "profiled", "--iterations", "10", "--eval-episodes", "1"])
    spent = {label: sum(t[name]) for name, label in phases.items()}
    spent["everything else"] = whole - sum(spent.values())
    figures = show(f"A default run, {whole:.0f} s", [{"phase": p, "s": s, "share": f"{s / whole:.1%}"} for p, s in spent.items()])
    return figures | show("10 RL iterations and two greedy evaluations by operator, as the profiler sees it (the one-token attention "
                          "of sampling is in everything else)", by_operator(profiled.key_averages()))


def by_operator(events):
    """The shares of OPERATORS in the profiler's events, and of the rest with its largest."""
    spent, others = dict.fromkeys(OPERATORS, 0), [0]
    for event in events:
        name = event.key.removeprefix("aten::")
        label = next((label for label, prefixes in OPERATORS.items() if name.startswith(prefixes)), None)
        if label:
            spent[label] += event.self_cpu_time_total
        else:
            others.append(event.self_cpu_time_total)
    total = sum(spent.values()) + sum(others)
    spent[f"everything else, none of it more than {max(others) / total:.1%}"] = sum(others)
    return [{"operator": label, "share": f"{us / total:.1%}"} for label, us in spent.items()]


# Growth.

def one_iteration(batch_size, length, n_layer, n_head, n_embd):
    """Seconds of the second of two default TRPO iterations, its critic's fit included, and MiB of peak above the start of both."""
    config = train.configure(dict(batch_size=batch_size, max_new_tokens=length - 1, block_size=length))
    tokenizer = Tokenizer.from_merges([])
    policy = GPT(GPTConfig(256, length, n_layer, n_head, n_embd))  # has no end-of-text token, so all episodes are of full length
    task = Task([], ["a"], ["a"], lambda prompt, completion: completion.count("e"), None)
    before = high_water()
    reference, critic = copy.deepcopy(policy).requires_grad_(False), Critic(policy.config, policy)
    optimizer = torch.optim.Adam(critic.parameters(), config.critic_lr, fused=True)
    generators = {name: torch.Generator().manual_seed(0) for name in ("prompts", "sample", "update")}
    for _ in range(2):
        start = time.perf_counter()
        batch, _ = train.collect(task, policy, reference, critic, tokenizer, config, generators)
        algos.trpo(policy, batch, None, config, generators["update"])
        algos.fit_critic(critic, batch, optimizer, config, generators["update"])
        taken = time.perf_counter() - start
    size = sum(p.numel() for p in policy.parameters())
    return size, taken, high_water() - before


def growth():
    figures = {}
    small = (2, 4, 128)
    for title, sizes in {"Growth with the batch": [(b, 64, *small) for b in (64, 128, 256, 512, 1024)],
                         "Growth with the tokens": [(64, t, *small) for t in (16, 32, 64, 128, 256)],
                         "Growth with the parameters": [(16, 32, *shape) for shape in ((2, 2, 64), (5, 4, 128), (6, 12, 384), (14, 12, 768))]}.items():
        rows = []
        for size in sizes:
            parameters, taken, memory = alone(one_iteration, *size)
            first = rows[0] if rows else {"s": taken, "MiB": memory}
            rows.append({"batch": size[0], "tokens": size[1], "parameters": parameters, "s": taken, "s / first": taken / first["s"],
                         "MiB": memory, "MiB / first": memory / first["MiB"]})
        figures |= show(f"{title}: a default TRPO iteration", rows)
    return figures


# Processes, threads and precision.

def processes(rounds=2, iterations=6):
    """Seconds of a default iteration on reviews: of one process with one thread, and what two processes, two threads or bfloat16 make of it."""
    kinds = {"one process, one thread": (1, 1), "two processes, one thread each": (2, 1), "one process, two threads": (1, 2), "bfloat16": (1, 1)}
    rows = []
    with tempfile.TemporaryDirectory() as out:
        def run(algo, kind):
            count, threads = kinds[kind]
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
            options = dict(algo=algo, out=out, name="timed", threads=threads, iterations=iterations, dtype=kind if kind == "bfloat16" else "float32")
            options = ["--eval-episodes=2", "--overwrite", *(f"--{name}={value}" for name, value in options.items())]
            subprocess.run([sys.executable, *launcher, train.__file__, *options], check=True, capture_output=True,
                           env={**os.environ, "OMP_NUM_THREADS": str(threads)})
            with open(Path(out) / "timed" / "metrics.csv") as file:
                return [float(row["seconds"]) for row in csv.DictReader(file)][1:]  # the first of all warms up
        for algo in train.ALGOS:
            t = {kind: [] for kind in kinds}
            for _ in range(rounds):
                for kind in kinds:
                    t[kind] += run(algo, kind)
            alone = t.pop("one process, one thread")
            rows.append({"": algo, "s": statistics.median(alone), **{f"gain of {kind}": ratio(alone, values) for kind, values in t.items()}})
    return show("An iteration of 256 episodes, its critic's fit included: how many times faster than one process with one thread", rows)


PARTS = {f.__name__: f for f in (fisher, updates, iteration, sampling, seconds, growth, processes)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--json", help="write the figures to this file too")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part named {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, {args.threads} threads")
    figures = {"torch": torch.__version__, "threads": args.threads}
    for part in args.parts or ["fisher", "updates", "iteration", "sampling"]:
        figures |= PARTS[part]()
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
