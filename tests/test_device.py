"""Runs on a device that is not the CPU: a private one, which refuses to mix its tensors with the CPU's.

Its tensors are empty, and each holds a tensor of the CPU that does the work. PyTorch sends every operation on
them to `on_device`, which fails where CUDA would and counts the operations that a GPU has to wait for.
The whole runs happen in a process of their own, because a device cannot be removed again.
"""

import collections
import contextlib
import functools
import io
import json
import linecache
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.utils.backend_registration
from torch.utils import _pytree as pytree

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import ROOT, SMALL, TASK, TINY, rows, run_script, task_file

NAME = "elsewhere"
SYNCHRONIZE = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")
TRANSFERS = ("_to_copy", "copy_", "_copy_from")
INDEXING = ("index", "index_put_", "_index_put_impl_")  # CUDA takes their indices from the CPU
waits = collections.Counter()  # {(file, line number): how often the device was waited for}


class Elsewhere(torch.Tensor):
    """A tensor of the device. Its numbers are in `work`, a tensor of the CPU with the same strides."""

    @staticmethod
    def __new__(cls, work):
        self = torch.Tensor._make_wrapper_subclass(cls, work.shape, strides=work.stride(), dtype=work.dtype,
                                                   storage_offset=work.storage_offset(), device=f"{NAME}:0")
        self.work = work
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return on_device(op, *args, **kwargs or {})

    def tolist(self):
        note_wait()
        return self.work.tolist()

    def __reduce_ex__(self, protocol):
        return self.cpu().__reduce_ex__(protocol)


def on_device(op, *args, **kwargs):
    """Do an operation on tensors of the device, or make one there."""
    name = op._schema.name.removeprefix("aten::")
    leaves = pytree.tree_leaves((args, kwargs))
    strangers = [x for x in leaves if type(x) is torch.Tensor and x.dim() > 0]
    if strangers and name not in (*TRANSFERS, *INDEXING):
        raise RuntimeError(f"{name}: some tensors are on {NAME}, others on the CPU")
    target = kwargs.pop("device", NAME)
    kwargs.pop("pin_memory", None)
    to_cpu = torch.device(target).type == "cpu" or name == "copy_" and not isinstance(args[0], Elsewhere)
    if to_cpu or name in SYNCHRONIZE or name in INDEXING and any(
            x.dtype == torch.bool for x in args[1] if x is not None):
        note_wait()
    if name == "_fused_sdp_choice":
        return 0  # attention written out: the fused kernels of the CPU have other names
    work = pytree.tree_map_only(Elsewhere, lambda x: x.work, (args, kwargs))
    out = op(*work[0], **work[1])
    if to_cpu:
        return out
    if name.endswith("_"):
        return args[0] if op._schema.returns else None
    return pytree.tree_map_only(torch.Tensor, Elsewhere, out)


def note_wait():
    """Count the line of the product that has to wait for the device."""
    frame = sys._getframe()
    while os.path.dirname(frame.f_code.co_filename) != str(ROOT):
        frame = frame.f_back
    waits[frame.f_code.co_filename, frame.f_lineno] += 1


class Generator(torch.Generator):
    """Random numbers of the device come from the CPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def register():
    """Returns what must be kept alive."""
    torch.utils.backend_registration._setup_privateuseone_for_python_backend(NAME)
    library = torch.library.Library("_", "IMPL")
    library.fallback(on_device, "PrivateUse1")  # for what makes a tensor there
    return library


def train_run(folder, device, *options, file="mine.py"):
    """The directory of a run, which is new unless it is resumed or evaluated."""
    import train
    run, task = folder / device / "run", ["--task", str(folder / file), "--device", device]
    if options[0] in ("--resume", "--eval"):
        options = [options[0], run, *options[1:]]
    else:
        options = [*TINY, *SMALL, "--pretrain-steps", 5, "--eval-episodes", 2, "--batch-size", 8, "--out",
                   run.parent, "--name", run.name, "--overwrite", *options]
    assert train.main([*map(str, options), *task]) is None
    return run


def waits_of_an_iteration(folder, *options):
    """{"file: line": number} of the second of three iterations."""
    import train
    seen = []

    def counting(*args):
        seen.append({f"{os.path.basename(file)}: {linecache.getline(file, line).strip()}": n
                     for (file, line), n in waits.items()})
        waits.clear()
        return scored_episodes(*args)

    scored_episodes, train.scored_episodes = train.scored_episodes, counting
    train_run(folder, NAME, "--iterations", 3, "--save-every", 100, *options)
    train.scored_episodes = scored_episodes
    return seen[2]


# In the process that has the device.

def main(folder, *algos):
    library = register()
    torch.Generator = Generator
    for name in ("tensor", "as_tensor"):  # of a list: PyTorch's own passes by the dispatcher
        setattr(torch, name, functools.partial(make_and_move, getattr(torch, name)))
    result = {"rows": [], "waits": []}
    with contextlib.redirect_stdout(io.StringIO()):
        if not algos:
            train_run(folder, NAME, "--iterations", 1, "--pretrain-steps", 1, "--max-new-tokens", 4)
        for algo in algos:
            file = "preferences.py" if algo == "reinforce" else "mine.py"
            runs = []
            for device in ("cpu", NAME):
                train_run(folder, device, "--algo", algo, "--reward-steps", 5, file=file)
                train_run(folder, device, "--resume", "--iterations", 3, file=file)
                runs.append(rows(train_run(folder, device, "--eval", file=file)))
            result["rows"].append(runs)
            options = ["--algo", algo, "--target-kl", 1e9, "--delta", 1e-4, "--max-new-tokens"]
            result["waits"].append([waits_of_an_iteration(folder, *options, n) for n in (4, 12)])
    del library
    (folder / "result.json").write_text(json.dumps(result))


def make_and_move(make, data, device="cpu", **kwargs):
    return make(data, **kwargs).to(device)


def run_in_a_process(tmp_path, *algos):
    """What `main` has written."""
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices that are written in Python")
    task_file(tmp_path)
    comparisons = [("the cat", " sat", f" ran {i}") for i in range(9)]
    comparisons += [("the dog", " sat", " ran"), ("the mat", " sat", " ran")]
    task_file(tmp_path, TASK + f"preferences = {comparisons}", "preferences.py")
    run_script(__file__, tmp_path / "printed", tmp_path, *algos)
    return json.loads((tmp_path / "result.json").read_text())


def test_a_short_run_on_a_device(tmp_path):
    run_in_a_process(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["trpo", "ppo", "reinforce"])
def test_runs_on_a_device(tmp_path, algo):
    """They compute what they compute on the CPU, and do not wait for the device at each token."""
    result = run_in_a_process(tmp_path, algo)
    (cpu, device), = result["rows"]
    assert len(cpu) == len(device) == 3
    for name, value in cpu[0].items():  # later rows amplify what differs in attention's last digits
        if name != "cg_relative_residual":  # which is rounding here
            assert float(device[0][name]) == pytest.approx(float(value), rel=1e-3, abs=1e-5), name

    (few, many), = result["waits"]
    asked = [key for key in many if "unfinished = " in key]  # who has finished, at every fourth token
    assert sum(many.pop(key) for key in asked) <= 12 // 4 + 1
    for key in asked:
        few.pop(key, None)
    for counts in (few, many):  # the line search asks as often as it halves the step
        assert sum(counts.pop(key) for key in [*counts] if "masked_mean(map_" in key or "lengths" in key) < 40
    assert few == many and 10 < sum(many.values()) < 100


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
