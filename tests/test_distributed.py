"""Two processes with half of the batch each do what one does with all of it. `torchrun` starts this very file."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))

from advantage import processes, whiten
from algos import Batch, chosen, fisher_vector_product, fit_critic, flatten, log_probs, ppo, reinforce, trpo
from model import GPT, Critic, GPTConfig
from test_train import FILE, TINY, rows, task_file

ROOT, B, T = Path(__file__).parent.parent, 12, 7
SETTINGS = dict(temperature=0.9, max_grad_norm=0.1, clip=0.01, epochs=3, minibatches=6, target_kl=0.01, delta=0.01, cg_iters=10, damping=0.1,
                fisher_fraction=0.1, backtracks=10, critic_epochs=2)


def generator():
    return torch.Generator().manual_seed(5)


def results():
    """What every update makes of the same B episodes, of which this process has its share."""
    from types import SimpleNamespace
    config, shape = SimpleNamespace(**SETTINGS), GPTConfig(11, 8, 1, 2, 8)
    policy = GPT(shape, generator()).double()
    for p in policy.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=generator(), dtype=torch.float64)
    tokens = torch.randint(11, (B, T + 1), generator=generator())
    length = torch.randint(1, T + 1, (B, 1), generator=generator())
    mask, noise = torch.arange(T) < length, torch.randn(B, T, generator=generator(), dtype=torch.float64)
    logp = chosen(log_probs(policy, tokens[:, :-1], 0.9), tokens[:, 1:]).detach() + 0.02 * noise.sin()
    rank, count = processes()
    mine = slice(rank * B // count, (rank + 1) * B // count)
    advantages = whiten(noise[mine] * 2 + 1, mask[mine])
    batch = Batch(tokens[mine, :-1], tokens[mine, 1:], mask[mine], logp[mine], advantages, noise[mine])
    product = fisher_vector_product(policy, batch, 0.9)
    vector = torch.randn(sum(p.numel() for p in policy.parameters()), generator=generator(), dtype=torch.float64)
    found = {"fisher": product(vector)}
    for update in (reinforce, ppo, trpo, fit_critic):
        model = copy.deepcopy(policy) if update is not fit_critic else Critic(shape, policy).double()
        before = flatten(model.parameters()).detach()
        stats = update(model, batch, torch.optim.SGD(model.parameters(), 1.0), config, generator())
        found[update.__name__] = flatten(model.parameters()).detach() - before
        stats.pop("kl_update") if update is reinforce else None  # which looks at a part of the episodes only
        found[f"{update.__name__}, said"] = torch.tensor([float(v) for v in stats.values()], dtype=torch.float64)
    return found


def torchrun(*command, count=2, **kwargs):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}", *map(str, command)], text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300, **kwargs)


@pytest.mark.parametrize("count", [2, 4])
def test_a_shared_batch_is_one_batch(tmp_path, count):
    done = torchrun(__file__, tmp_path, count=count)
    assert done.returncode == 0, done.stderr
    ranks, alone = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(count)], results()
    for name, value in alone.items():
        assert value.norm() > 1e-6
        for rank in ranks:
            torch.testing.assert_close(rank[name], value, rtol=1e-7, atol=1e-8, msg=lambda m: f"{name}: {m}")
            assert torch.equal(rank[name], ranks[0][name]), name  # to the bit, or they would drift apart


SHARED = [*TINY, "--pretrain-steps", "210", "--save-every", "2"]


def test_a_run_of_two_processes(tmp_path):
    for name, iterations in (("whole", 4), ("cut", 2)):
        done = torchrun(ROOT / "train.py", *SHARED, "--out", tmp_path, "--name", name, "--iterations", iterations)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("everything is in") == 1 and "2 processes" in done.stdout
    done = torchrun(ROOT / "train.py", "--resume", tmp_path / "cut", "--iterations", 4)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole") and len(rows(tmp_path / "whole")) == 4
    assert {p.name for p in (tmp_path / "whole").iterdir()} == {"config.json", "metrics.csv", "checkpoint.pt", "result.json"}
    alone = subprocess.run([sys.executable, ROOT / "train.py", "--resume", tmp_path / "cut", "--iterations", "5"], capture_output=True, text=True)
    assert alone.returncode == 2 and "2 processes" in alone.stderr


def test_a_process_that_dies_ends_the_job(tmp_path):
    file = task_file(tmp_path, FILE.replace("    return len", "    if len(calls) > 30 and os.environ['RANK'] == '1':\n        os._exit(7)\n    return len").replace("import random", "import os"))
    done = torchrun(ROOT / "train.py", *SHARED, "--task", file, "--out", tmp_path, "--iterations", 500, "--max-new-tokens", 8, "--vocab-size", 270, "--block-size", 32)
    assert done.returncode != 0 and "exitcode  : 7" in done.stderr


if __name__ == "__main__":
    dist.init_process_group("gloo")
    torch.save(results(), Path(sys.argv[1]) / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()
