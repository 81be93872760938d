"""What does RL do to words? `python tests/studies/words.py RUN RUN … --out tests/words.png` draws a picture.

RUNs: runs on one task, from the same pretrained weights, with more and more iterations. Every policy, first
the pretrained one, completes the same two held-out prompts with the same random numbers. The colour of a
token is log π - log π_ref, by which RL has made it more or less likely, in nats. Needs matplotlib.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from compare import save_small
from model import BadInput
from reward import score

LIMIT = 3.0  # nats, of the colours
COLUMNS = 108  # characters of a line, of which the first 33 are for the numbers
START = 33


def completions(run, task_file, n_prompts, seed, pretrained=False):
    """(iterations, [(prompt, completion, score, [log π - log π_ref of each action])]) of a run's policy.

    pretrained: let the reference act in its place.
    """
    config, _ = train.parse(["--explain", run] + (["--task", task_file] if task_file else []))
    task, policy, reference, _, tokenizer = train.load_run(config)
    prompts = task.heldout[:n_prompts]
    acts = reference if pretrained else policy
    batch, texts = task.run_episodes(acts, reference, prompts, tokenizer, config, config.temperature,
                                     torch.Generator().manual_seed(seed))
    changes = [(logp - ref)[mask].tolist()
               for logp, ref, mask in zip(batch.logprobs, batch.ref_logprobs, batch.mask)]
    found = zip(prompts, texts, score(task.reward, prompts, texts), changes)
    return 0 if pretrained else config.iterations, [*found]


def lay_out(prompt, completion, changes):
    """Lines of (text, colour in nats or None), broken between tokens where a line is full."""
    lines = [[(prompt, None)]]
    for token, change in zip(completion.tokens, changes):
        token = token.replace("<|endoftext|>", " □")
        if sum(len(text) for text, _ in lines[-1]) + len(token) > COLUMNS - START:
            lines.append([])
        lines[-1].append((token, change))
    return lines


def draw(rows, title, path):
    """Draw rows of (label, [(text, colour in nats or None)]), a line each, as a picture."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    colours = ScalarMappable(Normalize(-LIMIT, LIMIT), colormaps["PuOr_r"])
    figure = Figure(figsize=(10, 0.24 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(len(rows), 0)
    font = dict(family="monospace", fontsize=10.5, va="center")
    for y, (label, texts) in enumerate(rows):
        axes.text(0, y + 0.5, label, **font)
        x = START
        for text, change in texts:
            if change is not None:
                colour = colours.to_rgba(change, alpha=0.6)  # paler, so black letters stay readable
                axes.add_patch(Rectangle((x, y + 0.06), len(text), 0.88, color=colour))
            axes.text(x, y + 0.5, text, **font)
            x += len(text)
    figure.colorbar(colours, ax=axes, location="bottom", shrink=0.5, aspect=50, alpha=0.6,
                    label="log π - log π_ref of a token, nats (□: the end of text)")
    figure.suptitle(title, fontsize=11)
    save_small(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--task", help="the runs' task, if it is a file: its code will be executed")
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--title", default="The same prompts and random numbers after more and more RL")
    parser.add_argument("--out", type=Path, default=Path("runs/words.png"))
    args = parser.parse_args()
    options = args.task, args.prompts, args.seed
    try:
        policies = [completions(args.runs[0], *options, pretrained=True)]
        policies += [completions(run, *options) for run in args.runs]
    except BadInput as e:
        parser.error(str(e))

    rows = []
    for i in range(args.prompts):
        rows.append(("iterations  score    KL  length", []))
        for iterations, texts in policies:
            prompt, text, number, changes = texts[i]
            label = f"{iterations:10d} {number:6.2f} {text.kl:5.1f} {text.length:7d}"
            for line in lay_out(prompt, text, changes):
                rows.append((label, line))
                label = ""
    for label, texts in rows:
        print(f"{label:{START}}{''.join(text for text, _ in texts)}")
    try:
        draw(rows, args.title, args.out)
    except ImportError:
        parser.error("pictures need matplotlib: pip install matplotlib")
    print(args.out)


if __name__ == "__main__":
    main()
