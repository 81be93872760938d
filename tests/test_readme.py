"""README.md and tests/README.md: commands can be run, and excerpts look like what the program prints."""

import re
import shlex
import subprocess
import sys
from dataclasses import fields

import pytest

import train
from helpers import FENCED, ROOT, TINY, blocks_of_readme

README = (ROOT / "README.md").read_text(encoding="utf-8")
EVIDENCE = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
SHELL = blocks_of_readme("sh")
PRINTED = blocks_of_readme("")
SPANS = [" ".join(span.split()) for text in (README, EVIDENCE)
         for span in re.findall(r"`([^`]*)`", FENCED.sub("", text))]


def commands(texts):
    """[script, argument, …] for each command that runs one of our programs."""
    found = []
    for text in texts:
        for line in text.replace("&&", "\n").splitlines():
            words = shlex.split(line, comments=True)
            scripts = [word for word in words if word.endswith(".py")][:1]
            if words[:1] in (["python"], ["torchrun"]) and scripts:
                found.append(words[words.index(scripts[0]):])
    return found


EVERYWHERE = [*SHELL, *SPANS, *(body for _, body in FENCED.findall(EVIDENCE))]


@pytest.mark.parametrize("command", commands(EVERYWHERE), ids=" ".join)
def test_a_command_names_a_script_and_options_that_exist(command):
    script, *arguments = command
    if script.startswith("PATH/"):
        script = script.removeprefix("PATH/")
    source = (ROOT / script).read_text(encoding="utf-8")
    trained = {train.flag(f.name) for f in fields(train.Config)}
    trained |= {"--resume", "--eval", "--explain", "--help"}
    trains = script == "train.py" or "compare" in script or "train.main(" in source
    for option in [word.split("=")[0] for word in arguments if word.startswith("--")]:
        assert f'"{option}"' in source or trains and option in trained, option


@pytest.mark.slow
def test_the_commands_run_one_after_another(tmp_path):
    """Those of the shell blocks, with small models; not the installation, and what needs a download."""
    tiny = {"train.py": TINY, "tests/studies/compare.py": [*TINY, "--seeds", "2"]}
    done = []
    for script, *arguments in commands(SHELL):
        if script == "tests/examples/gpt2.py" or "runs/gpt2" in arguments:
            continue
        argv = [sys.executable, ROOT / script, *arguments, *tiny.get(script, [])]
        if "--iterations" in arguments:  # of a run without RL
            argv += ["--iterations", arguments[arguments.index("--iterations") + 1]]
        result = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, (script, arguments, result.stderr[-2000:])
        done.append(script)
    assert {"train.py", "rollout.py", "tests/studies/compare.py", "tests/examples/idea.py"} <= {*done}


def shape(line):
    """A line with # in place of each number, and one space in place of several."""
    return " ".join(re.sub(r"[-+]?\d+(\.\d+)?", "#", line).split())


def test_the_excerpts_have_the_form_of_what_is_printed(tmp_path, capsys):
    explained, = [block for block in PRINTED if "log π_ref" in block]
    assert train.main([*TINY, "--iterations", "2", "--eval-episodes", "80", "--out", str(tmp_path)]) is None
    printed = {shape(line) for line in capsys.readouterr().out.splitlines()}
    for line in PRINTED[0].splitlines():
        if line.startswith(("before", "after")):
            assert any(text.startswith(line.split()[0] + " ") for text in printed)
        else:
            assert shape(line) in printed, line
    assert train.main(["--explain", str(tmp_path / "reviews-trpo-0")]) is None
    printed = {shape(line) for line in capsys.readouterr().out.splitlines()}
    header = next(line for line in explained.splitlines() if "log π_ref" in line)
    assert {shape(header), "score #"} <= printed
    rows = explained[explained.index(header):].splitlines()[1:]
    assert rows and all(re.fullmatch(r"(# ){7}'.*'", shape(row)) for row in rows)
