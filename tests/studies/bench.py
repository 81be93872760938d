"""Time and memory, as ratios measured in one run: `python tests/studies/bench.py [PART …] [--json FILE]`.

Parts: fisher, updates, iteration and sampling run by default, in about five minutes. By name only: seconds, a
default run by its phases and operators; growth, an iteration at growing sizes; memory, an iteration with
GPT-2's vocabulary and of GPT-2's size; processes, an iteration on two processes and on two threads; trl, an
iteration against one of TRL's RLOOTrainer (`pip install trl`).
Machines are shared and noisy. Therefore competitors run in turns, and a ratio is the median of the ratios of
the turns. Run nothing else at the same time. OMP_NUM_THREADS sets the number of threads.
"""

import argparse
import contextlib
import copy
import csv
import io
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "examples")]

import algos
import rollout
import train
from algos import Batch, action_log_probs, fisher_vector_product, flatten, log_probs
from gpt2 import export_gpt2, transpose_linear
from model import GPT, Critic, GPTConfig, Tokenizer
from reward import TASKS, Task, score
from rollout import sample

SIZE = "batch, tokens, layers, heads, width, vocabulary"
SIZES = [(256, 10, 2, 3, 96, 257), (128, 64, 4, 4, 128, 257), (64, 128, 4, 4, 128, 257),
         (16, 256, 6, 6, 192, 257)]


def in_turns(rounds, functions):
    """Seconds of each function in each round, {name: [rounds]}, after one round that does not count."""
    seconds = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(a, b):
    return median(x / y for x, y in zip(a, b))


def in_forwards(t, size):
    """A row: the milliseconds of `forward` in the turns t, and everything else as a multiple of it."""
    rest = {name: ratio(seconds, t["forward"]) for name, seconds in t.items() if name != "forward"}
    return {SIZE: size, "forward, ms": 1000 * median(t["forward"]), **rest}


def show(title, rows):
    """Print rows, dicts with the same keys, as a Markdown table. Returns {title: rows}."""
    text = lambda value: f"{float(f'{value:.3g}'):,g}" if isinstance(value, float) else str(value)
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([text(v) for v in row.values()] for row in rows)]
    print(f"\n{title}\n", *(f"| {' | '.join(line)} |" for line in lines), sep="\n", flush=True)
    return {title: rows}


def make(size):
    """A policy, and a Batch of episodes of full length: random tokens and normally distributed advantages."""
    B, T, n_layer, n_head, n_embd, V = size
    generator = torch.Generator().manual_seed(0)
    policy = GPT(GPTConfig(V, T + 1, n_layer, n_head, n_embd), generator)
    tokens = torch.randint(V, (B, T + 1), generator=generator)
    obs, actions, mask = tokens[:, :-1], tokens[:, 1:], torch.ones(B, T, dtype=torch.bool)
    with torch.no_grad():
        logprobs = action_log_probs(log_probs(policy, obs, 1.0), actions)
    advantages = torch.randn(B, T, generator=generator)
    return policy, Batch(obs, actions, mask, logprobs, advantages, advantages, 0 * advantages)


@torch.no_grad()
def forward(policy, obs):
    policy(obs)


def high_water():
    """The most memory that this process has held, MiB. Known on Linux, elsewhere nan."""
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024 if status.exists() else float("nan")


def alone(function, *args):
    """Call it in a process of its own, whose high water is its own too."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def textbook(policy, batch):
    """v -> H v, (n,) -> (n,), with H the Hessian of KL(π_old‖π) at π = π_old: the KL differentiated twice."""
    params = list(policy.parameters())
    with sdpa_kernel(SDPBackend.MATH):  # fused attention cannot be differentiated twice
        logp = log_probs(policy, batch.obs, 1.0)
    kl = (logp.detach().exp() * (logp.detach() - logp)).sum(-1)[batch.mask].mean()
    gradient = flatten(torch.autograd.grad(kl, params, create_graph=True))
    return lambda v: flatten(torch.autograd.grad(gradient @ v, params, retain_graph=True))


def product(policy, batch):
    return fisher_vector_product(policy, batch, train.Config())


def peak(size, make_product):
    """MiB by which one product, with its graph, raises the high water of a forward pass."""
    for shape in [(1, 2, *size[2:]), size]:  # first a small one: what torch loads at first use does not count
        policy, batch = make(shape)
        forward(policy, batch.obs)
        before = high_water()
        make_product(policy, batch)(flatten(policy.parameters()).detach())
    return high_water() - before


def fisher():
    rows = []
    for size in SIZES:
        policy, batch = make(size)
        v = flatten(policy.parameters()).detach()  # some vector of that length
        ours, theirs = product(policy, batch), textbook(policy, batch)
        t = in_turns(5, {"forward": lambda: forward(policy, batch.obs), "ours": lambda: ours(v),
                         "textbook": lambda: theirs(v),
                         "ours with its graph": lambda: product(policy, batch)(v),
                         "textbook with its graph": lambda: textbook(policy, batch)(v)})
        rows.append(in_forwards(t, size) | {
            "ours, MiB": alone(peak, size, product),
            "textbook, MiB": alone(peak, size, textbook),
            "relative difference": ((ours(v) - theirs(v)).norm() / theirs(v).norm()).item()})
    return show("A Fisher-vector product over all episodes, in forward passes", rows)


def updates():
    config, _ = train.parse(["--target-kl", "1000"])  # PPO does not end early
    all_episodes, _ = train.parse(["--fisher-fraction", "1"])
    rows, steps = [], config.epochs * config.minibatches
    for size in SIZES:
        policy, batch = make(size)

        def run(update, config=config):
            mine = copy.deepcopy(policy)
            optimizer = torch.optim.Adam(mine.parameters(), 1e-4, fused=True)
            stats = update(mine, batch, optimizer, config, torch.Generator().manual_seed(0))
            assert stats.get("accepted", 1) and stats.get("steps", steps) == steps

        t = in_turns(3, {"forward": lambda: forward(policy, batch.obs),
                         "reinforce": lambda: run(algos.reinforce), "ppo": lambda: run(algos.ppo),
                         "trpo": lambda: run(algos.trpo), "whole": lambda: run(algos.trpo, all_episodes)})
        whole = t.pop("whole")
        rows.append(in_forwards(t, size) | {"trpo/ppo": ratio(t["trpo"], t["ppo"]),
                                            "trpo/ppo, F over all episodes": ratio(whole, t["ppo"])})
    return show(f"An update, in forward passes: PPO {steps} steps; TRPO {config.cg_iters} products over "
                f"{config.fisher_fraction:.0%} of the episodes", rows)


@contextlib.contextmanager
def timed(labels):
    """Within it, {label: seconds spent so far} in functions of train.py and rollout.py.

    labels: {function's name: label}.
    A call within another such call is part of the outer one.
    """
    spent, running = dict.fromkeys(labels.values(), 0.0), []

    def watch(function, label):
        def watched(*args, **kwargs):
            start = time.perf_counter()
            running.append(label)
            result = function(*args, **kwargs)
            running.pop()
            if not running:
                spent[label] += time.perf_counter() - start
            return result
        return watched

    with contextlib.ExitStack() as patches:
        for name, label in labels.items():
            for names in vars(train), vars(rollout), train.ALGOS:
                if name in names:
                    patches.enter_context(patch.dict(names, {name: watch(names[name], label)}))
        yield spent


REFERENCE = "reference, KL, entropy"
COLLECTING = {"sample": "sampling", "score_actions": "reward", "log_probs": REFERENCE,
              "kl_divergence": REFERENCE, "entropy": REFERENCE}


def rloo_on_addition(options):
    """(config, task, tokenizer, policy, collect, update), pretrained until answers have the usual length.

    collect() -> Batch and update(batch) are the two halves of an iteration.
    """
    config, _ = train.parse(["--task", "addition", "--algo", "reinforce", "--advantage", "rloo",
                             "--group-size", "4", "--pretrain-steps", "300", *options])
    task = TASKS["addition"](0)
    with tempfile.TemporaryDirectory() as config.out, contextlib.redirect_stdout(io.StringIO()):
        policy, tokenizer, _ = train.load_or_pretrain(config, task, torch.device("cpu"))
    reference = copy.deepcopy(policy)
    optimizer = torch.optim.Adam(policy.parameters(), config.lr, fused=True)
    generators = train.random_generators(0, 0, "cpu")

    def collect():
        return train.collect(task, policy, reference, None, tokenizer, config, generators)[0]

    def update(batch):
        algos.reinforce(policy, batch, optimizer, config)

    return config, task, tokenizer, policy, collect, update


def iteration(rounds=25, options=()):
    config, _, _, policy, collect, update = rloo_on_addition(options)
    batches = []
    parts = []

    def collect_in_parts():
        with timed(COLLECTING) as spent:
            batches.append(collect())
        parts.append(spent)

    t = in_turns(rounds, {"collect": collect_in_parts, "forward": lambda: forward(policy, batches[-1].obs),
                          "update": lambda: update(batches[-1])})
    collected = t.pop("collect")
    del parts[0]  # of the round that does not count
    t |= {label: [spent[label] for spent in parts] for label in parts[0]}
    t["text, advantages"] = [c - sum(spent.values()) for c, spent in zip(collected, parts)]
    t["whole iteration"] = [c + u for c, u in zip(collected, t["update"])]
    rows = [{"part": part, "ms": 1000 * median(seconds), "forward passes": ratio(seconds, t["forward"])}
            for part, seconds in t.items()]
    return show(f"An iteration of REINFORCE on addition, {config.batch_size} completions", rows)


def trl(rounds=25, options=()):
    """In turns with TRL's trainer, which begins with the same weights, prompts, reward and options."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import RLOOConfig, RLOOTrainer

    config, task, tokenizer, policy, collect, update = rloo_on_addition(options)
    problems = {str(prompt): prompt for prompt in task.prompts}  # which carry their answers
    t = {"ours": [], "TRL": []}

    class InTurns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            middle = time.perf_counter()
            update(collect())
            t["TRL"].append(middle - self.start)
            t["ours"].append(time.perf_counter() - middle)

    with tempfile.TemporaryDirectory() as folder:
        export_gpt2(policy, tokenizer, f"{folder}/gpt2")
        theirs = RLOOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_steps=10 ** 9, max_steps=rounds + 1,
            per_device_train_batch_size=config.batch_size, num_generations=config.group_size,
            max_completion_length=config.max_new_tokens, learning_rate=config.lr, beta=config.kl_coef,
            top_k=0)
        RLOOTrainer(AutoModelForCausalLM.from_pretrained(f"{folder}/gpt2"), args=theirs,
                    processing_class=AutoTokenizer.from_pretrained(f"{folder}/gpt2", padding_side="left"),
                    reward_funcs=lambda prompts, completions, **_: score(
                        task.reward, [problems[prompt] for prompt in prompts], completions),
                    train_dataset=Dataset.from_dict({"prompt": [*problems]}), callbacks=[InTurns()]).train()
    rows = [{"ours, ms": 1000 * median(t["ours"][1:]), "TRL, ms": 1000 * median(t["TRL"][1:]),
             "TRL/ours": ratio(t["TRL"][1:], t["ours"][1:])}]
    return show(f"An iteration of RLOO on addition, {config.batch_size} completions", rows)


def gpt2_of_transformers(policy):
    """transformers' GPT-2 with the policy's weights; None where transformers is not installed."""
    try:
        from transformers import GPT2Config, GPT2LMHeadModel
    except ImportError:
        return None
    sizes = {**vars(policy.config), "n_positions": policy.config.block_size}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()
    theirs.load_state_dict(transpose_linear(policy.state_dict()), strict=False)  # the head is tied
    return theirs


def sampling():
    rows = []
    for size in SIZES:
        B, T, *_, V = size
        policy, batch = make(size)
        theirs, generator = gpt2_of_transformers(policy), torch.Generator().manual_seed(0)
        functions = {  # V, the end of text, is never drawn
            "forward": lambda: forward(policy, batch.obs),
            "sample": lambda: sample(policy, [[0]] * B, T, eos_token=V, generator=generator)}
        if theirs:
            first = {"inputs": torch.zeros(B, 1, dtype=torch.long), "attention_mask": torch.ones(B, 1)}
            functions["generate"] = lambda: theirs.generate(
                **first, do_sample=True, top_k=0, max_new_tokens=T, min_new_tokens=T, pad_token_id=0)
        t = in_turns(5, functions)
        times = ratio(t.pop("generate"), t["sample"]) if theirs else "not installed"
        rows.append(in_forwards(t, size) | {"transformers' generate/sample": times})
    return show("Sampling, in forward passes over the finished episodes", rows)


PHASES = {"load_or_pretrain": "pretraining", **COLLECTING, "trpo": "update",
          "fit_critic": "training of the critic", "evaluate": "evaluation", "save_checkpoint": "checkpoints"}
OPERATORS = {"mm": "matrix products", "addmm": "matrix products", "bmm": "matrix products", "gelu": "GELU",
             "_scaled_dot_product": "attention", "native_layer_norm": "layer norm", "_softmax": "softmax",
             "_log_softmax": "softmax", "_fused_adam": "Adam"}  # beginnings of names


def seconds(options=()):
    """`python train.py --algo trpo` by its phases, and 10 of its RL iterations by operator."""
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        command = ["--algo", "trpo", "--out", out, *options]
        with timed(PHASES) as spent:
            start = time.perf_counter()
            train.main(command)
            whole = time.perf_counter() - start
        with profile() as profiled:
            train.main([*command, "--name", "profiled", "--iterations", "10", "--eval-episodes", "2"])
    spent["everything else"] = whole - sum(spent.values())
    phases = [{"phase": phase, "s": s, "share": f"{s / whole:.1%}"} for phase, s in spent.items()]

    time_of = Counter()  # microseconds of each operator
    for event in profiled.key_averages():
        name = event.key.removeprefix("aten::")
        name = next((label for start, label in OPERATORS.items() if name.startswith(start)), name)
        time_of[name] += event.self_cpu_time_total
    operators = [{"operator": name, "share": f"{us / time_of.total():.1%}"}
                 for name, us in time_of.most_common(15)]
    return (show(f"A default run, {whole:.0f} s", phases) |
            show("10 RL iterations and two greedy evaluations, by operator: the 15 largest", operators))


GROWTH = {"episodes": [("trpo", batch, 64, 2, 4, 128, 257) for batch in (64, 256, 1024)],
          "tokens": [("trpo", 64, tokens, 2, 4, 128, 257) for tokens in (16, 64, 256)],
          "weights": [("trpo", 16, 32, *shape, 257) for shape in
                      ((2, 2, 64), (5, 4, 128), (6, 12, 384))]}
MEMORY = {"of GPT-2's vocabulary": [(algo, 256, 64, 4, 4, 256, 50257) for algo in train.ALGOS],
          "of GPT-2's vocabulary, fewer episodes": [("reinforce", 64, 64, 4, 4, 256, 50257)],
          "of GPT-2's size": [(algo, 64, 32, 12, 12, 768, 50257) for algo in train.ALGOS]}


def one_iteration(algo, batch_size, length, n_layer, n_head, n_embd, vocab_size, warm_up):
    """An iteration with its critic: {"parameters", "s", "MiB" at most held, "above the start, MiB"}.

    warm_up: whether another iteration goes before that which is timed.
    """
    config, _ = train.parse(["--algo", algo, "--batch-size", str(batch_size),
                             "--max-new-tokens", str(length - 1), "--target-kl", "1000"])
    tokens = [bytes([i]) for i in range(256)] + [f"{i:05}".encode() for i in range(vocab_size - 257)]
    tokenizer = Tokenizer.from_state({"name": "bpe", "tokens": [token.hex() for token in tokens]})
    policy = GPT(GPTConfig(vocab_size - 1, length, n_layer, n_head, n_embd))  # no end of text: all are full
    task = Task([], ["a"], ["a"], lambda prompt, completion: completion.count("1"), None)
    before = high_water()
    reference, critic = copy.deepcopy(policy).requires_grad_(False), Critic(policy.config, policy)
    optimizer = torch.optim.Adam(policy.parameters(), config.lr, fused=True)
    critic_optimizer = torch.optim.Adam(critic.parameters(), config.critic_lr, fused=True)
    generators = train.random_generators(0, 0, "cpu")
    for _ in range(1 + warm_up):
        start = time.perf_counter()
        batch, _ = train.collect(task, policy, reference, critic, tokenizer, config, generators)
        train.ALGOS[algo](policy, batch, optimizer, config, generators["update"])
        algos.fit_critic(critic, batch, critic_optimizer, config, generators["update"])
    return {"parameters": sum(p.numel() for p in policy.parameters()), "s": time.perf_counter() - start,
            "MiB": high_water(), "above the start, MiB": high_water() - before}


def iterations(title, kinds, warm_up):
    tables = {}
    for kind, sizes in kinds.items():
        rows = [{"algo": algo, SIZE: size, **alone(one_iteration, algo, *size, warm_up)}
                for algo, *size in sizes]
        tables |= show(f"{title} {kind}", rows)
    return tables


def growth():
    return iterations("A TRPO iteration with the training of its critic: more", GROWTH, warm_up=True)


def memory():
    return iterations("An iteration with the training of its critic", MEMORY, warm_up=False)


KINDS = {"one process, one thread": (1, 1), "two processes, one thread each": (2, 1),
         "one process, two threads": (1, 2)}


def seconds_of_iterations(kind, algo, out):
    """Of all iterations but the first, which warms up."""
    count, threads = KINDS[kind]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    options = (f"--algo {algo} --threads {threads} --iterations 6 --eval-episodes 2 "
               f"--name timed --overwrite --out {out}")
    subprocess.run([sys.executable, *torchrun * (count > 1), train.__file__, *options.split()], check=True,
                   stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    with open(Path(out) / "timed" / "metrics.csv", encoding="utf-8") as file:
        return [float(row["seconds"]) for row in csv.DictReader(file)][1:]


def processes(rounds=2):
    rows = []
    with tempfile.TemporaryDirectory() as out:
        for algo in train.ALGOS:
            turns = [{kind: seconds_of_iterations(kind, algo, out) for kind in KINDS} for _ in range(rounds)]
            t = {kind: sum((turn[kind] for turn in turns), []) for kind in KINDS}
            single = t.pop("one process, one thread")
            rows.append({"algo": algo, "s": median(single),
                         **{kind: ratio(single, values) for kind, values in t.items()}})
    return show("An iteration on reviews, with the training of the critic: how many times faster than one "
                "process with one thread", rows)


PARTS = {part.__name__: part
         for part in (fisher, updates, iteration, sampling, seconds, growth, memory, processes, trl)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--json", metavar="FILE", help="write the results to this file too")
    args = parser.parse_args()
    if set(args.parts) - set(PARTS):
        parser.error(f"choose parts from {', '.join(PARTS)}")
    results = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(results)
    for part in args.parts or ["fisher", "updates", "iteration", "sampling"]:
        results |= PARTS[part]()
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
