"""Nothing is lost: runs that are stopped, killed or out of disk go on as if nothing had been."""

import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import train
from rollout import load_checkpoint
from test_train import FILE, TINY, task_file

ROOT = Path(__file__).parent.parent
SMALL = [*TINY, "--save-every", "3", "--iterations", "12"]  # later options win


@pytest.fixture(scope="module")
def processes():
    """A process that has imported everything and run nothing, to fork from: a start takes milliseconds."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "torch._dynamo"])  # which an optimizer imports at its first step
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # where it finds what to import
        context.Process(target=int).start()
    return context


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def go(out, *options):
    return train.main([*SMALL, "--out", str(out), *map(str, options)])


def resume(run, *options):
    return train.main(["--resume", str(run), *map(str, options)])


def rows(run):
    """The lines of metrics.csv without their time."""
    return [line.rpartition(",")[0] for line in (run / "metrics.csv").read_text().splitlines()]


def outcome(run):
    """Everything that a run leaves behind, but for times and its name."""
    policy, reference, _, more = load_checkpoint(run)
    result = json.loads((run / "result.json").read_text())
    weights = [t.tolist() for t in (*policy.parameters(), *reference.parameters(), *more["critic"].values())]
    return rows(run), weights, {k: v for k, v in result.items() if "seconds" not in k}, more["iteration"]


def start(out, *options):
    return subprocess.Popen([sys.executable, ROOT / "train.py", *SMALL, "--out", out, *map(str, options)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(process, condition):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize("algo, number, code", [("reinforce", signal.SIGINT, 130), ("ppo", signal.SIGTERM, 143), ("trpo", signal.SIGTERM, 143)])
def test_a_stopped_run_goes_on_bit_for_bit(out, algo, number, code):
    go(out, "--algo", algo, "--name", f"{algo}-whole")
    run = out / f"{algo}-cut"
    process = start(out, "--algo", algo, "--name", run.name, "--iterations", 5000)
    wait_for(process, lambda: (run / "metrics.csv").exists() and len(rows(run)) > 4)
    process.send_signal(number)
    stdout, stderr = process.communicate()
    done = len(rows(run)) - 1
    assert process.returncode == code and not stderr
    assert stdout.endswith(f"stopped after iteration {done}: python train.py --resume {run} goes on\n") and load_checkpoint(run)[3]["iteration"] == done
    whole = 12
    if done >= 12:  # a slow look at a fast run
        whole = done + 3
        assert resume(out / f"{algo}-whole", "--iterations", whole) is None
    assert resume(run, "--iterations", whole) is None
    assert outcome(run) == outcome(out / f"{algo}-whole")


def test_more_iterations_are_what_one_longer_run_would_have_been(out):
    go(out, "--name", "six", "--iterations", 6)
    assert resume(out / "six", "--iterations", 12, "--save-every", 2) is None
    go(out, "--name", "twelve")
    assert outcome(out / "six") == outcome(out / "twelve")
    assert json.loads((out / "six" / "config.json").read_text())["iterations"] == 12


def test_a_finished_run_that_goes_on_is_no_longer_finished(out, processes):
    go(out, "--name", "longer", "--iterations", 3)
    run = out / "longer"
    process = processes.Process(target=train.main, args=(["--resume", str(run), "--iterations", "5000"],))
    process.start()
    while len(rows(run)) < 6:
        assert process.is_alive()
        time.sleep(0.01)
    before = (run / "config.json").read_bytes()
    for options in (["--resume", run, "--iterations", 7777], [*TINY, "--out", out, "--name", "longer", "--overwrite"]):
        assert train.main([*map(str, options)]) == 2  # it is at work
    process.kill()
    process.join()
    assert (run / "config.json").read_bytes() == before and json.loads(before)["iterations"] == 5000
    assert not (run / "result.json").exists() and train.main(["--plot", str(run)]) == 2


def test_stopped_in_pretraining(tmp_path):
    long = ("--pretrain-steps", 500, "--iterations", 2)
    process = start(tmp_path, *long)
    wait_for(process, lambda: list(tmp_path.glob("pretrained/*.part")))
    process.terminate()
    stdout, stderr = process.communicate()
    assert process.returncode == 143 and not stderr and "stopped at step" in stdout
    run = tmp_path / "reviews-trpo-0"
    assert resume(run) is None
    assert [p.suffix for p in (tmp_path / "pretrained").iterdir()] == [".pt"]
    go(tmp_path / "whole", *long)
    assert outcome(run) == outcome(tmp_path / "whole" / run.name)


def test_killed_at_fifty_moments(tmp_path, processes):
    """kill -9 at random: no run is lost, no more than an interval repeated, and metrics.csv is whole in the end."""
    task = ["--task", str(task_file(tmp_path, FILE))]  # which is there at once
    options = [*TINY, *task, *"--block-size 24 --max-new-tokens 12 --iterations 60 --save-every 4 --pretrain-steps 500 --pretrain-batch 8 --algo reinforce".split()]

    def begin(*argv):
        process = processes.Process(target=train.main, args=(argv,))
        process.start()
        return process
    started = time.monotonic()
    begin(*options, "--out", str(tmp_path / "whole"), "--name", "run").join()
    whole, rng, kills, seen = time.monotonic() - started, random.Random(0), 0, set()
    run, done, finished = tmp_path / "cut" / "run", 0, False
    while kills < 50:
        if finished:  # a new one, with new weights to begin with
            shutil.rmtree(tmp_path / "cut")
            done, finished = 0, False
        process = begin("--resume", str(run), *task) if run.exists() else begin(*options, "--out", str(run.parent), "--name", "run")
        process.join(rng.uniform(0, whole / 3))
        if process.is_alive():
            process.kill()
            process.join()
            kills += 1
        else:
            assert process.exitcode == 0
            finished = True
            assert rows(run) == rows(tmp_path / "whole" / "run")
        part, saved = list(tmp_path.glob("cut/pretrained/*.part")), (run / "checkpoint.pt").exists()
        seen.add("finished" if finished else "saved" if saved else "half pretrained" if part else "begun" if run.exists() else "nothing yet")
        if saved:
            saved = load_checkpoint(run)[3]["iteration"]
            written = (run / "metrics.csv").read_text().count("\n") - 1
            assert saved >= done and saved <= written <= saved + 4
            done = saved
    assert {"finished", "saved", "half pretrained", "begun"} <= seen
    assert finished or resume(run, *task) is None
    assert outcome(run) == outcome(tmp_path / "whole" / "run")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on a file's size")
def test_a_full_disk(tmp_path, capsys):
    """Where nothing more can be written the run ends, and goes on from the last whole checkpoint when there is room."""
    import resource
    go(tmp_path, "--name", "whole")
    go(tmp_path, "--name", "cut", "--iterations", 3)
    run, long = tmp_path / "cut", tmp_path / "long"
    limits, size = resource.getrlimit(resource.RLIMIT_FSIZE), (run / "checkpoint.pt").stat().st_size

    def out_of_room(room, *options):
        before = (run / "checkpoint.pt").read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            status = train.main([*map(str, options)])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        err = capsys.readouterr().err
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and "free some space" in err
        assert (run / "checkpoint.pt").read_bytes() == before and json.loads((run / "config.json").read_text())
        assert not [path for path in tmp_path.rglob("*.part") if path.parent.name != "pretrained"]
        return err

    capsys.readouterr()
    assert str(run / "checkpoint.pt") in out_of_room(size - 1, "--resume", run, "--iterations", 12)  # a checkpoint does not fit
    assert len(rows(run)) == 1 + 6 and load_checkpoint(run)[3]["iteration"] == 3
    room = (run / "config.json").stat().st_size + 99
    assert f"no room to write in {run}" in out_of_room(room, "--resume", run, "--iterations", 12, "--save-every", 99)  # a row does not
    assert not (run / "metrics.csv").read_text().endswith("\n")  # it is torn
    assert resume(run, "--iterations", 12) is None and outcome(run) == outcome(tmp_path / "whole")
    err = out_of_room(size // 2, *SMALL, "--out", long, "--pretrain-steps", 201)  # nor what pretraining keeps
    assert ".part" in err and not list(long.rglob("*.p*t"))
