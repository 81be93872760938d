"""Several processes, each with a part of the batch, do what one does with all of it.

torchrun starts this file: `test_distributed.py FOLDER [OPTIONS of train.py]`.
"""

import copy
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
from advantage import all_sum, masked_mean, processes, whiten
from algos import (
    Batch,
    action_log_probs,
    fisher_vector_product,
    fit_critic,
    flatten,
    log_probs,
    ppo,
    reinforce,
    trpo,
)
from helpers import ROOT, SMALL, TASK, TINY, rows, start_script, task_file
from model import GPT, Critic, GPTConfig, Tokenizer
from reward import Task, fit_reward

B, T, V, TEMPERATURE = 12, 7, 11, 0.9
SIZES = GPTConfig(vocab_size=V, block_size=8, n_layer=1, n_head=2, n_embd=8)
CONFIG = dict(temperature=TEMPERATURE, max_grad_norm=0.1, clip=0.01, epochs=3, target_kl=0.01, delta=0.01,
              cg_iters=10, damping=0.1, critic_epochs=2)
WHOLE = dict(minibatches=1, fisher_fraction=1.0)
PARTS = dict(minibatches=2, fisher_fraction=0.4)


def micro_batch():
    """One process takes all cells at once. Of several processes each takes another number of them."""
    rank, count = processes()
    return 10 ** 6 if count == 1 else 7 + 13 * rank


def generator(seed=5):
    return torch.Generator().manual_seed(seed)


def rand(*shape):
    return torch.randn(shape, generator=generator(), dtype=torch.float64)


def make_policy():
    policy = GPT(SIZES, generator()).double()
    for p in policy.parameters():
        p.data += 0.3 * rand(*p.shape)
    return policy


def my_batch(policy):
    """This process's rows of a batch of B episodes."""
    tokens = torch.randint(V, (B, T + 1), generator=generator())
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1), generator=generator())
    noise = rand(B, T)
    obs, actions = tokens[:, :-1], tokens[:, 1:]
    logp = action_log_probs(log_probs(policy, obs, TEMPERATURE), actions).detach()
    whole = Batch(obs, actions, mask, logp + 0.02 * noise.sin(), 2 * noise + 1, noise, noise.cos(),
                  noise.exp())
    rank, count = processes()
    mine = whole.rows(slice(rank * B // count, (rank + 1) * B // count))
    mine.advantages = whiten(mine.advantages, mine.mask)
    return mine


def update_results(choice, random_numbers):
    """What each update adds to the weights, and its diagnostics."""
    policy, results = make_policy(), {}
    batch, config = my_batch(policy), SimpleNamespace(**CONFIG | choice, micro_batch=micro_batch())
    for update in (reinforce, ppo, trpo, fit_critic):
        model = Critic(SIZES, policy).double() if update is fit_critic else copy.deepcopy(policy)
        before = flatten(model.parameters()).detach()
        stats = update(model, batch, torch.optim.SGD(model.parameters(), 1.0), config, random_numbers())
        results[update.__name__] = flatten(model.parameters()).detach() - before
        diagnostics = torch.tensor(list(map(float, stats.values())), dtype=torch.float64)
        results[f"{update.__name__}, diagnostics"] = diagnostics
    return results


def summed():
    """A sum over processes, and this process's number after it."""
    x = torch.tensor(processes()[0] + 1.0)
    return all_sum(x).item(), x.item()


def whole_batch_results():
    policy = make_policy()
    batch = my_batch(policy)
    vector = rand(sum(p.numel() for p in policy.parameters()))
    config = SimpleNamespace(**CONFIG, micro_batch=micro_batch())
    return update_results(WHOLE, generator) | {
        "mean": masked_mean(batch.returns, batch.mask),
        "fisher": fisher_vector_product(policy, batch, config)(vector),
        "pretraining": pretraining_result(), "reward model": reward_model_result()}


def pretraining_result():
    """What five steps of pretraining add to the weights, on texts of several lengths."""
    policy = make_policy()
    before = flatten(policy.parameters()).detach()
    texts = [torch.randint(V, (2 + i % 7,), generator=generator(i)).tolist() for i in range(40)]
    rows = train.to_rows(texts, 8)
    config = SimpleNamespace(pretrain_steps=5, pretrain_batch=6, pretrain_lr=1e-2,
                             micro_batch=micro_batch())
    train.maximize_likelihood(policy, rows, config, generator())
    return flatten(policy.parameters()).detach() - before


def reward_model_result():
    """What a step of a reward model's training adds to the weights. The texts have several lengths."""
    model = Critic(SIZES, make_policy()).double()
    torch.nn.init.ones_(model.value_head.weight)
    before, (rank, count) = flatten(model.parameters()).detach(), processes()
    texts = torch.randint(V, (12, 2, T), generator=generator())
    ends = torch.arange(12)[:, None, None] % (T - 1)
    texts[(torch.arange(T) > ends + 1).expand_as(texts)] = -100
    batch = Batch(texts[:, None], None, torch.ones(12, 1, dtype=torch.bool)).rows(slice(rank, None, count))
    config = SimpleNamespace(**CONFIG, micro_batch=micro_batch(), reward_steps=0)
    fit_reward(model, batch, batch, batch, torch.optim.SGD(model.parameters(), 1.0), config, generator())
    return flatten(model.parameters()).detach() - before


def collected():
    """This process's episodes of an iteration, and the statistics of all processes' episodes."""
    text = "the cat sat on the mat and the dog sat on the log"
    task = Task([text], text.split(), ["x"], lambda prompt, completion: len(completion), len)
    tokenizer = Tokenizer.learn([text], 260)
    policy = GPT(GPTConfig(tokenizer.vocab_size, 16, 1, 2, 8), generator())
    config = train.Config(batch_size=32, group_size=2, max_new_tokens=8, advantage="returns")
    generators = train.random_generators(seed=0, iteration=1, device="cpu")
    batch, stats = train.collect(task, policy, policy, None, tokenizer, config, generators)
    return {"prompts": batch.obs[:, 0], "actions": batch.actions, "mask": batch.mask, "stats": stats}


def torchrun(*command, count=2):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    return subprocess.run([*launcher, *map(str, command)], text=True, capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def fork_two(folder, *arguments):
    """(exit status, what it printed) of each of two processes of train.py, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    files = [folder / f"printed-{rank}" for rank in "01"]
    started = [start_script(ROOT / "train.py", arguments, file, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",
                            MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for rank, file in zip("01", files)]
    for process in started:
        process.join(timeout=300)
    return [(process.exitcode, file.read_text(encoding="utf-8")) for process, file in zip(started, files)]


def load_results(folder, count):
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


def check_ranks(ranks):
    n = len(ranks)
    assert [rank["summed"] for rank in ranks] == [(n * (n + 1) / 2, i + 1) for i in range(n)]
    for name, truth in whole_batch_results().items():
        assert truth.norm() > 1e-6
        for rank in ranks:
            torch.testing.assert_close(rank["whole"][name], truth, rtol=1e-7, atol=1e-8,
                                       msg=lambda message: f"{name}: {message}")
    for kind in ("whole", "parts"):
        for name, value in ranks[0][kind].items():  # bit for bit, or the processes would drift apart
            assert all(torch.equal(rank[kind][name], value) for rank in ranks), (kind, name)


@pytest.mark.slow
def test_four_processes_take_the_step_of_one(tmp_path):
    done = torchrun(__file__, tmp_path, count=4)
    assert done.returncode == 0, done.stderr
    check_ranks(load_results(tmp_path, 4))


# Of each process: 16 calls in the evaluation before RL, 8 in each iteration. Call 40 is in the third.
FRAGILE_TASK = """
import os

corpus = ["the cat sat on the mat.", "the dog sat on the log."] * 30
prompts, heldout = ["the cat", "the dog"], ["the"]
calls = []

def reward(prompt, completion):
    calls.append(completion)
    if "RANK_THAT_DIES" in os.environ and os.environ["RANK"] == os.environ["RANK_THAT_DIES"]:
        if len(calls) == 40:
            os._exit(7)
    return len(completion) / 10

def metric(prompt, completion):
    return 0.0
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(folder, task, job): of two processes that saved their results, trained a run, and died in another."""
    folder = tmp_path_factory.mktemp("job")
    task = task_file(folder, FRAGILE_TASK)
    options = [*TINY, *SMALL, "--out", folder, "--task", task, "--iterations", 4, "--save-every", 2]
    return folder, task, torchrun(__file__, folder, *options)


def test_two_processes_take_the_step_of_one(job):
    folder, _, done = job
    assert (folder / "1.pt").exists(), done.stderr
    check_ranks(load_results(folder, 2))


def test_processes_draw_episodes_of_their_own_and_share_statistics(job):
    ranks = [rank["collected"] for rank in load_results(job[0], 2)]
    first, second = ranks
    assert len(first["prompts"]) == len(second["prompts"]) == 16
    assert first["prompts"].tolist() != second["prompts"].tolist()
    columns = min(first["actions"].shape[1], second["actions"].shape[1])
    assert not torch.equal(first["actions"][:, :columns], second["actions"][:, :columns])
    assert first["stats"] == second["stats"]
    lengths = [length for rank in ranks for length in rank["mask"].sum(1).tolist()]
    assert first["stats"]["length"] == pytest.approx(sum(lengths) / 32)


def test_a_process_that_dies_ends_the_job_and_the_run_can_be_resumed(job):
    folder, task, dead = job
    assert dead.returncode != 0
    assert "exitcode  : 7" in dead.stderr
    assert len(rows(folder / "cut")) == 2
    assert not (folder / "cut" / "result.json").exists()

    (status, printed), second = fork_two(folder, "--resume", folder / "cut", "--task", task)
    assert status == 0, printed
    assert second == (0, "")  # the first process prints for both
    assert "processes: 2" in printed and printed.count("everything is in") == 1
    assert len(rows(folder / "whole")) == 4
    assert rows(folder / "cut") == rows(folder / "whole")
    files = {"config.json", "metrics.csv", "checkpoint.pt", "result.json", "eval.csv", "samples-0.jsonl",
             "samples-4.jsonl"}
    for run in ("cut", "whole"):
        assert {path.name for path in (folder / run).iterdir()} == files


def options_with_corpus(folder, corpus):
    task = task_file(folder, TASK + f"import random\ncorpus = {corpus}\n")
    return [*TINY, *SMALL, "--out", folder / "runs", "--task", task]


def test_processes_that_read_different_tasks_are_refused(tmp_path):
    for status, printed in fork_two(tmp_path, *options_with_corpus(
            tmp_path, "[str(random.Random().random()) for _ in range(20)]")):
        assert status == 2 and printed.startswith("error: the processes have different tasks: ")
    assert not [*tmp_path.glob("runs/*/*")]


@pytest.mark.slow
def test_a_set_has_another_order_in_another_process(tmp_path):
    options = options_with_corpus(tmp_path, "[*{f'the cat {i}' for i in range(20)}]")
    done = torchrun(ROOT / "train.py", *options)
    assert done.returncode != 0 and "error: the processes have different tasks: " in done.stderr
    assert not [*tmp_path.glob("runs/*/*")]


def main(folder, *options):
    dist.init_process_group("gloo")
    rank, _ = processes()
    torch.save({"whole": whole_batch_results(), "parts": update_results(PARTS, lambda: generator(rank)),
                "collected": collected(), "summed": summed()}, Path(folder) / f"{rank}.pt")
    if options:
        assert train.main([*options, "--name", "whole"]) is None
        os.environ["RANK_THAT_DIES"] = "1"
        train.main([*options, "--name", "cut"])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
