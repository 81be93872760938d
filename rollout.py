"""Text to tokens, tokens to episodes: the tokenizer, and `sample`, which lets a policy act.

`python rollout.py runs/NAME --prompt "the acting was"` samples from a trained checkpoint, `--help` says what else it does.
"""

import argparse
import codecs
import contextlib
import math
import os
import shutil
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

import tiktoken
import tiktoken._educational
import torch

from model import GPT, GPTConfig


# How a text is split into words: contractions, then letters, digits or signs with the space before them, then spaces. In ours a
# Chinese character is a word: no token goes beyond it, and a prompt may end after any.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|\p{Han}| ?(?:(?!\p{Han})\p{L})+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPLITS = {"bpe": SPLIT, "gpt2": GPT2_SPLIT}


class BadInput(ValueError):
    """What the user gave cannot be used. The message is one line that says what is wrong and what to do."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one line for a mistake, and no guessing at shortened options."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message):
        raise BadInput(f"{message}: see --help")


class Tokenizer:
    """text <-> tokens: byte-level byte-pair encoding, so that every text has an encoding, and one token that ends a text.

    `learn` makes a vocabulary from a corpus, offline; `gpt2` is GPT-2's own. Sennrich et al. 2016; Radford et al. 2019.
    """

    def __init__(self, encoding):
        self.encoding, self.name = encoding, encoding.name
        self.eos_token, self.vocab_size = encoding.eot_token, encoding.n_vocab

    @classmethod
    def from_merges(cls, merges):
        """merges: the tokens of more than one byte, as bytes, in the order in which they were learned."""
        tokens = [*(bytes([i]) for i in range(256)), *merges]
        return cls.from_state({"name": "bpe", "tokens": [token.hex() for token in tokens]})

    @classmethod
    def learn(cls, texts, vocab_size, sample_size=20_000):
        """Learn at most vocab_size ≥ 257 tokens (256 bytes, merges, the end of text) from a sample of the texts.

        sample_size: characters, in pieces from all over the texts; the trainer's time grows with it.
        Where there is too little to merge, the number of merges is halved until there is enough.
        """
        pieces = [text[i:i + 1000] for text in texts for i in range(0, len(text), 1000)]
        stride = max(1, sum(map(len, texts)) // sample_size)
        data = "\n".join(pieces[::stride])
        merges = min(vocab_size - 257, len(data.encode()))
        while True:
            try:
                ranks = tiktoken._educational.bpe_train(data, 256 + merges, SPLIT, visualise=None)
                return cls.from_merges(list(ranks)[256:])
            except ValueError:
                if merges <= 0:
                    raise
                merges //= 2

    @classmethod
    def gpt2(cls):
        """GPT-2's, which tiktoken fetches where it has not before. Raises BadInput."""
        try:
            return cls(tiktoken.get_encoding("gpt2"))
        except Exception as e:  # whatever the network or the cache can raise
            raise BadInput("GPT-2's vocabulary is not here: let tiktoken fetch it once where there is a network, and set "
                           f"TIKTOKEN_CACHE_DIR to its folder ({type(e).__name__})")

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens):
        return self.encoding.decode([t for t in tokens if t != self.eos_token])

    def sizes(self):
        """The bytes of each token's text (vocab_size,); the end of text counts as one, like the newline that it stands for."""
        sizes = [len(self.encoding.decode_single_token_bytes(token)) for token in range(self.vocab_size)]
        sizes[self.eos_token] = 1
        return torch.tensor(sizes)

    def state(self):
        """What `from_state` needs to make it again without a network: plain data, safe to load from a stranger."""
        tokens = map(self.encoding.decode_single_token_bytes, range(self.eos_token))
        return {"name": self.name, "tokens": [token.hex() for token in tokens]}

    @classmethod
    def from_state(cls, state):
        ranks = {bytes.fromhex(token): i for i, token in enumerate(state["tokens"])}
        if len(ranks) < len(state["tokens"]) or not all(bytes([i]) in ranks for i in range(256)):
            raise ValueError("a vocabulary holds each byte, and no token twice")
        return cls(tiktoken.Encoding(state["name"], pat_str=SPLITS[state["name"]], mergeable_ranks=ranks,
                                     special_tokens={"<|endoftext|>": len(ranks)}))


@dataclass
class Rollout:
    """B sampled episodes. mask is aligned on actions: mask[b, t] is True where the policy chose tokens[b, t + 1]."""

    tokens: torch.Tensor  # (B, T) int64: prompt, completion with its end-of-text token, and end-of-text as filler
    mask: torch.Tensor  # (B, T-1) bool: prompt False, completion True, its end-of-text True, filler False
    logp: torch.Tensor  # (B, T-1, V) log π(·|s) when the actions were drawn; of no meaning where mask is False

    def completions(self, tokenizer):
        """The B completions as text, without prompt and end of text."""
        rows = zip(self.tokens[:, 1:].tolist(), self.mask.tolist())
        return [tokenizer.decode([t for t, chosen in zip(tokens, mask) if chosen]) for tokens, mask in rows]


def draw(logp, uniforms):
    """One token per row by inverse CDF: the first whose cumulative probability reaches the row's uniform number.

    logp: (B, V) log-probabilities, up to a constant.  uniforms: (B,) in (0, 1], so that a token of probability zero is never
    drawn.  Returns (B,) int64. One random number per row, where torch.multinomial draws V.
    """
    cdf = logp.exp().cumsum(-1)  # (B, V)
    drawn = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:]).squeeze(-1)
    return drawn.clamp(max=logp.shape[-1] - 1)  # beyond which NaN would point


def truncate(logp, top_k=0, top_p=1.0):
    """logp (B, V) without its tail: -inf but for the top_k likeliest tokens (0: all) and the fewest that hold top_p together.

    Top-k: Fan et al. 2018; top-p, or nucleus: Holtzman et al. 2020. For people to read; training samples from all of π.
    """
    ordered, index = logp.sort(-1, descending=True)
    likelier = ordered.exp().cumsum(-1) - ordered.exp()  # (B, V) what the tokens before hold
    keep = likelier < top_p
    if top_k:
        keep[:, top_k:] = False
    keep[:, 0] = True
    return logp.masked_fill(~keep.gather(-1, index.argsort(-1)), -math.inf)


def check_fit(prompts, max_new_tokens, block_size):
    """Raises BadInput for an empty prompt, or one whose completion would not fit the context."""
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise BadInput("a prompt is empty: give it at least one character")
    if longest + max_new_tokens > block_size:
        raise BadInput(f"a prompt of {longest} tokens and a completion of {max_new_tokens} exceed the context of "
                       f"{block_size}: use a shorter prompt, a smaller --max-new-tokens or a model with a larger --block-size")


def sample(policy, prompts, max_new_tokens, eos_token, temperature=1.0, generator=None, top_k=0, top_p=1.0, watch=None):
    """Let the policy complete each prompt until it chooses eos_token or has chosen max_new_tokens.

    policy: (tokens, cache) -> logits, with `kv_cache`.  prompts: B lists of tokens, of any lengths of at least 1.
    temperature: divides the logits; 0 is greedy.  top_k, top_p: see `truncate`.  watch: gets each new column of tokens (B,).
    Returns a Rollout, cut after its longest row; its logp is of the temperature (greedy: of 1), also where tails were cut.
    Raises BadInput for an empty prompt or one that leaves no room in the context.

    Prompts stand at the left without padding. Reading begins together at the shortest prompt's end; where a prompt is longer
    its own next token is taken in place of a sampled one. So each row gets what it would get alone, from its own random
    numbers.
    """
    weight = next(policy.parameters())
    device = weight.device
    check_fit(prompts, max_new_tokens, policy.config.block_size)
    B, T = len(prompts), max(map(len, prompts)) + max_new_tokens
    tokens = torch.full((B, T), eos_token)
    for row, prompt in enumerate(prompts):
        tokens[row, :len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    start = torch.tensor([len(prompt) for prompt in prompts], device=device)  # (B,) position of each row's first own token
    ends = start + max_new_tokens  # (B,) position after its last: at the latest, until it chooses eos_token
    own = 1 - torch.rand(B, max_new_tokens, generator=generator, device=device)  # in (0, 1], one for each own token
    positions = start[:, None] + torch.arange(max_new_tokens, device=device)  # (B, max_new_tokens)
    uniforms = torch.ones(B, T, device=device).scatter_(1, positions, own)  # (B, T), aligned with tokens
    logp = weight.new_zeros(B, T - 1, policy.config.vocab_size)

    with torch.inference_mode():
        rows = torch.arange(B, device=device)  # the rows that the cache holds: in the end only those still being written
        t = min(map(len, prompts))  # the position to be written next
        cache = policy.kv_cache(T)
        logits = policy(tokens[:, :t], cache)[:, -1]  # (rows, V)
        while True:
            forced, ended = t < start[rows], t >= ends[rows]  # (rows,) still in the prompt; done, with eos_token as filler
            step_logp = (logits / (temperature or 1)).log_softmax(-1)  # (rows, V)
            logp[rows, t - 1] = step_logp
            allowed = truncate(step_logp, top_k, top_p) if top_k or top_p < 1 else step_logp
            drawn = draw(allowed, uniforms[rows, t]) if temperature else step_logp.argmax(-1)
            choice = torch.where(forced | ended, tokens[rows, t], drawn)
            tokens[rows, t] = choice
            ends[rows] = torch.where(~forced & ~ended & (choice == eos_token), t + 1, ends[rows])
            if watch:
                watch(tokens[:, t])
            t += 1
            if t == T:
                break
            if t % 4 == 0:  # asking costs a GPU a synchronisation, so not at every token
                live = (t < ends[rows]).nonzero().squeeze(-1)
                if len(live) == 0:
                    break
                if len(live) <= 0.75 * len(rows):
                    rows = rows[live]
                    for layer in cache:
                        layer.keep(live)
            logits = policy(tokens[rows, t - 1:t], cache)[:, -1]

    T = int(ends.max())
    position = torch.arange(1, T, device=device)  # of the token that each action chose
    return Rollout(tokens[:, :T], (position >= start[:, None]) & (position < ends[:, None]), logp[:, :T - 1])


# Files.

def write_atomically(path, write):
    """write(a path beside it), then rename: a reader finds the old file or the whole new one. Raises BadInput."""
    folder = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))  # a name that nobody can know, nor prepare a link at
        beside = folder / path.name
        write(beside)
        if beside.is_file():
            with open(beside, "rb+") as file:  # Windows syncs only what could be written
                os.fsync(file.fileno())  # so that the name never comes to disk before the content
        os.replace(beside, path)
    except Exception as e:  # for a full disk, torch and safetensors have errors of their own
        raise BadInput(f"cannot write {path}: free some space or choose another place ({' '.join(str(e).split())})")
    finally:  # also where the user interrupts
        if folder:
            shutil.rmtree(folder, ignore_errors=True)


def save_checkpoint(path, policy, tokenizer, **more):
    """Write what `load_checkpoint` reads. more: `reference`, the state_dict of another policy of that shape, and plain data."""
    state = {"model": asdict(policy.config), "policy": policy.state_dict(), "tokenizer": tokenizer.state(), **more}
    write_atomically(path, lambda beside: torch.save(state, beside))


def load_checkpoint(path, device="cpu"):
    """What `save_checkpoint` wrote: (policy, reference, tokenizer, {…everything else}). Nothing in the file is executed.

    path: the file, or a run's directory.  The reference is the policy itself where none was saved.  Raises BadInput where the
    file is missing, damaged or inconsistent.
    """
    try:
        path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise BadInput(f"no checkpoint at {path}: give a run's directory, as in runs/NAME")
        state = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = GPTConfig(**state.pop("model")), state.pop("policy")
        tokenizer = Tokenizer.from_state(state.pop("tokenizer"))
        if config.n_layer > len(weights):
            raise ValueError("it has fewer layers than it says")
        policy = reference = GPT(config)
        policy.load_state_dict(weights)
        if "reference" in state:
            reference = GPT(config)
            reference.load_state_dict(state.pop("reference"))
        if tokenizer.vocab_size != config.vocab_size or not math.isfinite(state.get("config", {}).get("temperature", 1.0)):
            raise ValueError("the tokenizer or the run's config is not this model's")
        if not all(p.isfinite().all() for model in (policy, reference) for p in model.parameters()):
            raise ValueError("a weight is not finite")
    except BadInput:
        raise
    except PermissionError as e:
        raise BadInput(f"cannot read {path}: {e.strerror}")
    except Exception as e:  # a damaged file can raise nearly anything
        raise BadInput(f"{path} is damaged or no checkpoint of ours: delete it, or give another ({type(e).__name__})")
    return policy.to(device), reference.to(device), tokenizer, state


def is_gpt2(init):
    """Whether `load_weights` takes this for a GPT-2, not for a checkpoint of ours."""
    path = Path(init)
    if not path.is_dir():
        return init == "gpt2"
    return not any((path / name).exists() for name in ("checkpoint.pt", "metrics.csv"))  # a run of ours has one or both


def load_weights(init, device="cpu"):
    """The (policy, tokenizer) to start from. init: a run, a checkpoint, a directory with a GPT-2, or gpt2, which is fetched.

    Raises BadInput.
    """
    if not is_gpt2(init):
        policy, _, tokenizer, _ = load_checkpoint(init, device)
        return policy, tokenizer
    path = Path(init) if Path(init).is_dir() else fetch_gpt2()
    try:
        policy = GPT.from_gpt2(path)
    except ValueError as e:
        raise BadInput(f"{e}")
    if policy.config.vocab_size != 50257:
        raise BadInput(f"{path} has {policy.config.vocab_size} tokens, and GPT-2's vocabulary, the only one known here, 50257")
    return policy.to(device), Tokenizer.gpt2()


def fetch_gpt2():
    """The directory with GPT-2's smallest model, 0.5 GB, fetched once. Raises BadInput."""
    source, folder = "https://huggingface.co/openai-community/gpt2/resolve/main", Path(torch.hub.get_dir()) / "gpt2"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "pytorch_model.bin"):
            if not (folder / name).exists():
                torch.hub.download_url_to_file(f"{source}/{name}", str(folder / name))
    except Exception as e:  # whatever a network can raise
        raise BadInput(f"cannot fetch GPT-2: download {source}/config.json and {source}/pytorch_model.bin into {folder}, "
                       f"or give --init a directory that has them ({type(e).__name__})")
    return folder


# Talking to the result.

def explain(rollout, row, reference, tokenizer, temperature):
    """A line per chosen token: its probability under the policy and under the reference, at the same temperature."""
    with torch.no_grad():
        ref_logp = (reference(rollout.tokens[row:row + 1, :-1]) / (temperature or 1)).log_softmax(-1)[0]  # (T-1, V)
    steps = rollout.mask[row].nonzero().squeeze(-1)
    actions = rollout.tokens[row, steps + 1]
    p, q = rollout.logp[row, steps, actions], ref_logp[steps, actions]  # (T',)
    lines = ["  policy  reference  token"] + [f"{a:8.4f}  {b:9.4f}  {tokenizer.encoding.decode([t])!r}" for a, b, t in
                                              zip(p.exp().tolist(), q.exp().tolist(), actions.tolist())]
    return "\n".join(lines) + f"\nlog-probability {p.sum():.2f} under the policy, {q.sum():.2f} under the reference, in nats"


def talk(prompt, policy, reference, tokenizer, args, temperature, generator):
    """Print args.n completions of the prompt; on a terminal the first of them as it comes."""
    tokens = tokenizer.encode(prompt)
    room = args.max_new_tokens or max(1, policy.config.block_size - len(tokens))
    check_fit([tokens], room, policy.config.block_size)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several tokens
    stream = sys.stdout.isatty()

    def watch(column):
        if column[0] != tokenizer.eos_token:
            print(decoder.decode(tokenizer.encoding.decode_single_token_bytes(int(column[0]))), end="", flush=True)

    if stream:
        print(prompt, end="", flush=True)
    rollout = sample(policy, [tokens] * args.n, room, tokenizer.eos_token, temperature, generator, args.top_k, args.top_p,
                     watch if stream else None)
    for row, completion in enumerate(rollout.completions(tokenizer)):
        print(decoder.decode(b"", True) if stream and row == 0 else prompt + completion)
        if args.logprobs:
            print(explain(rollout, row, reference, tokenizer, temperature))


def complain(error):
    """What went wrong, as one line on standard error."""
    print(f"error: {error}".replace("\n", " "), file=sys.stderr)


def command(body, *errors):
    """Run the body of a command. What a user can mend is one line and exit status 2; an error of his own code, its traceback too."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    with contextlib.suppress(AttributeError):  # what stands in for standard output in a notebook or a test
        sys.stdout.reconfigure(errors="replace")
    try:
        body()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read this has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except FloatingPointError as e:
        complain(e)
        return 3
    except (BadInput, OSError, *errors) as e:
        if isinstance(e, errors) and e.__cause__:
            traceback.print_exception(e.__cause__)
        complain(e)
        return 2
    except (MemoryError, RuntimeError) as e:  # torch has no error of its own for a processor's memory
        if "memory" not in f"{type(e).__name__} {e}".lower():
            raise
        complain("this takes more memory than there is: lower --batch-size, -n or another size")
        return 2


def lines():
    """The lines of standard input but for empty ones. Raises BadInput."""
    if sys.stdin is None:
        raise BadInput("there is no standard input: give --prompt")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="strict")
    try:
        yield from filter(None, (line.rstrip("\r\n") for line in sys.stdin))
    except UnicodeDecodeError:
        raise BadInput("standard input is not UTF-8 text")


def main(argv=None):
    parser = ArgumentParser(description="Sample completions from a trained policy.")
    parser.add_argument("run", help="a run's directory, as in runs/NAME, or a checkpoint")
    parser.add_argument("--prompt", help="the text to complete, without a space at its end (default: each line of standard input)")
    parser.add_argument("-n", type=int, default=4, help="completions of each prompt (default 4)")
    parser.add_argument("--max-new-tokens", type=int, help="longest completion, tokens (default: what the context holds)")
    parser.add_argument("--temperature", type=float, help="divides the logits (default: as it was trained)")
    parser.add_argument("--greedy", action="store_true", help="the likeliest token at each step")
    parser.add_argument("--top-k", type=int, default=0, help="only among the K likeliest tokens (default 0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="only among the fewest that hold this probability (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")
    parser.add_argument("--logprobs", action="store_true", help="each token's probability, before any cut, and what it was before RL")
    parser.add_argument("--export", metavar="DIR", help="write the weights for transformers' GPT2LMHeadModel, and end")

    def body():
        args = parser.parse_args(argv)
        if min(args.n, 1 if args.max_new_tokens is None else args.max_new_tokens) < 1:
            raise BadInput("-n and --max-new-tokens must be at least 1")
        if not (0 <= args.seed < 2 ** 63 and args.top_k >= 0 and 0 < args.top_p <= 1):
            raise BadInput("--seed must be at least 0 and below 2**63, --top-k at least 0, --top-p above 0 and at most 1")
        if args.temperature is not None and (args.greedy or not 1e-3 <= args.temperature < math.inf):
            raise BadInput("--temperature must be at least 0.001, and has no meaning with --greedy")
        policy, reference, tokenizer, more = load_checkpoint(args.run)
        if args.export is not None:
            if Path(args.export).exists():
                raise BadInput(f"{args.export} exists: give another directory to --export")
            write_atomically(Path(args.export), lambda beside: policy.to_gpt2(beside, tokenizer.eos_token))
            return
        temperature = 0 if args.greedy else args.temperature or more.get("config", {}).get("temperature", 1.0)
        generator = torch.Generator().manual_seed(args.seed)
        for prompt in lines() if args.prompt is None else [args.prompt]:
            talk(prompt, policy, reference, tokenizer, args, temperature, generator)

    return command(body)


if __name__ == "__main__":
    sys.exit(main())
