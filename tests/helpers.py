"""What several test files share."""

import csv
import functools
import multiprocessing
import os
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent

# Options of a run that takes a second or two on the reviews; later options win.
TINY = ("--n-layer 1 --n-embd 16 --n-head 2 --pretrain-steps 60 --iterations 2 --batch-size 16 "
        "--minibatches 2 --eval-episodes 16 --threads 1").split()

# A task file that is read at once, and options that fit it.
TASK = """
corpus = ["the cat sat on the mat.", "the dog sat on the log."] * 30
prompts, heldout = ["the cat", "the dog"], ["the"]

def reward(prompt, completion):
    return len(completion) / 10
"""
SMALL = "--block-size 24 --max-new-tokens 12 --vocab-size 270".split()


FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)  # a block of Markdown: its language and its text


def blocks_of_readme(language):
    """The blocks of README.md in a language, "" for those without one."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return [body for name, body in FENCED.findall(readme) if name == language]


def task_file(folder, source=TASK, name="mine.py"):
    """Write a task file into folder. Returns its path."""
    (folder / name).write_text(source, encoding="utf-8")
    return folder / name


def on_last_action(scores, mask):
    """Scores (B,) as (B, T), each at the last action of its row."""
    placed = torch.zeros(mask.shape, dtype=scores.dtype)
    for b, row in enumerate(mask.tolist()):
        if any(row):
            placed[b, len(row) - 1 - row[::-1].index(True)] = scores[b]
    return placed


def contents(folder):
    """{path: bytes} of all files below folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(run):
    """The rows of a run's metrics.csv as dicts of strings, without the seconds."""
    with open(run / "metrics.csv", encoding="utf-8") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@functools.cache
def forks():
    """Starts processes that are forked from one in which everything is imported, within milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])  # an optimizer imports the latter
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        first = context.Process(target=int)
        first.start()
        first.join()
    return context


def start_script(script, arguments, output, **environment):
    """A process that runs a script and writes to a file what it prints."""
    arguments = [str(script), *map(str, arguments)]
    process = forks().Process(target=run_as_main, args=(arguments, output, environment))
    process.start()
    return process


def run_script(script, output, *arguments):
    """Run a script in a process. Returns what it printed, which is in the file output, too."""
    process = start_script(script, arguments, output)
    process.join()
    printed = output.read_text(encoding="utf-8")
    assert process.exitcode == 0, printed
    return printed


def run_as_main(argv, output, environment):
    os.environ.update(environment)
    file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


class Malice:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
