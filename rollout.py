"""Text to tokens, tokens to episodes: the tokenizer, and `sample`, which lets a policy act.

`python rollout.py runs/NAME --prompt "the acting was"` samples from a trained checkpoint.
"""

import argparse
import math
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tiktoken
import tiktoken._educational
import torch

from model import GPT, GPTConfig


# GPT-2's split of a text into words: contractions, then letters, digits or signs with the space before them, then spaces.
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


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

    def __init__(self, encoding, merges=None):
        self.encoding, self.merges = encoding, merges
        self.eos_token, self.vocab_size = encoding.eot_token, encoding.n_vocab

    @classmethod
    def from_merges(cls, merges):
        """merges: the tokens of more than one byte, as bytes, in the order in which they were learned."""
        ranks = {bytes([i]): i for i in range(256)} | {token: 256 + i for i, token in enumerate(merges)}
        special = {"<|endoftext|>": len(ranks)}
        return cls(tiktoken.Encoding("bpe", pat_str=SPLIT, mergeable_ranks=ranks, special_tokens=special), merges)

    @classmethod
    def learn(cls, texts, vocab_size, sample_bytes=20_000):
        """Learn vocab_size tokens (256 bytes, merges, the end of text) from a spread of the texts. Raises BadInput."""
        pieces = [text[i:i + 1000] for text in texts for i in range(0, len(text), 1000)]
        stride = max(1, sum(map(len, texts)) // sample_bytes)
        data = "\n".join(pieces[::stride])
        try:
            ranks = tiktoken._educational.bpe_train(data, vocab_size - 1, SPLIT, visualise=None)
        except ValueError:  # fewer than 256 bytes asked for, or nothing left to merge
            raise BadInput(f"this corpus does not give {vocab_size} tokens: choose a --vocab-size from 257 to fewer than that")
        return cls.from_merges(list(ranks)[256:])

    @classmethod
    def gpt2(cls):
        try:
            return cls(tiktoken.get_encoding("gpt2"))
        except Exception as e:  # whatever the network or the cache can raise
            raise BadInput("GPT-2's vocabulary is not here: let tiktoken fetch it once where there is a network, and set "
                           f"TIKTOKEN_CACHE_DIR to its folder; or use --tokenizer bpe ({type(e).__name__})")

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
        """What `from_state` needs to make it again: plain data, safe to load from a stranger."""
        return "gpt2" if self.merges is None else [token.hex() for token in self.merges]

    @classmethod
    def from_state(cls, state):
        return cls.gpt2() if state == "gpt2" else cls.from_merges([bytes.fromhex(token) for token in state])


@dataclass
class Rollout:
    """B sampled episodes. mask is aligned on actions: mask[b, t] is True where the policy chose tokens[b, t + 1]."""

    tokens: torch.Tensor  # (B, T) int64: prompt, completion with its end-of-text token, and end-of-text as filler
    mask: torch.Tensor  # (B, T-1) bool: prompt False, completion True, its end-of-text True, filler False
    logp: torch.Tensor  # (B, T-1, V) log π(·|s) that the actions were drawn from; of no meaning where mask is False

    def completions(self, tokenizer):
        """The B completions as text, without prompt and end of text."""
        rows = zip(self.tokens[:, 1:].tolist(), self.mask.tolist())
        return [tokenizer.decode([t for t, chosen in zip(tokens, mask) if chosen]) for tokens, mask in rows]


def draw(logp, uniforms):
    """One token per row by inverse CDF: the first whose cumulative probability reaches the row's uniform number.

    logp: (B, V) log-probabilities.  uniforms: (B,) in (0, 1], so that a token of probability zero is never drawn.
    Returns (B,) int64. One random number per row, where torch.multinomial draws V.
    """
    cdf = logp.exp().cumsum(-1)  # (B, V)
    return torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:]).squeeze(-1)  # the last entry is 1 but for rounding


def check_fit(prompts, max_new_tokens, block_size):
    """Raises BadInput for an empty prompt, or one whose completion would not fit the context."""
    longest = max(map(len, prompts))
    if min(map(len, prompts)) == 0:
        raise BadInput("a prompt is empty: give it at least one character")
    if longest + max_new_tokens > block_size:
        raise BadInput(f"a prompt of {longest} tokens and a completion of {max_new_tokens} exceed the context of "
                       f"{block_size}: use a shorter prompt, a smaller --max-new-tokens or, in training, a larger --block-size")


def sample(policy, prompts, max_new_tokens, eos_token, temperature=1.0, generator=None):
    """Let the policy complete each prompt until it chooses eos_token or has chosen max_new_tokens.

    policy: (tokens, cache) -> logits, with `kv_cache`.  prompts: B lists of tokens, of any lengths of at least 1.
    temperature: divides the logits; 0 is greedy (logp is then that of temperature 1).  Returns a Rollout, cut after its
    longest row.
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
        cache = policy.kv_cache(B, T)
        logits = policy(tokens[:, :t], cache)[:, -1]  # (rows, V)
        while True:
            forced, ended = t < start[rows], t >= ends[rows]  # (rows,) still in the prompt; done, with eos_token as filler
            step_logp = (logits / (temperature or 1)).log_softmax(-1)  # (rows, V)
            logp[rows, t - 1] = step_logp
            drawn = draw(step_logp, uniforms[rows, t]) if temperature else step_logp.argmax(-1)
            choice = torch.where(forced | ended, tokens[rows, t], drawn)
            tokens[rows, t] = choice
            ends[rows] = torch.where(~forced & ~ended & (choice == eos_token), t + 1, ends[rows])
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
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")  # another process may be writing the same file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:  # torch.save reports a full disk as the latter
        beside.unlink(missing_ok=True)
        raise BadInput(f"cannot write {path}: free some space or choose another --out ({e})")


def save_checkpoint(path, policy, tokenizer, **more):
    """Write what `load_checkpoint` reads."""
    state = {"model": asdict(policy.config), "policy": policy.state_dict(), "tokenizer": tokenizer.state(), **more}
    write_atomically(path, lambda beside: torch.save(state, beside))


def load_checkpoint(path, device="cpu"):
    """What `save_checkpoint` wrote: (policy, tokenizer, {…everything else}). Nothing in the file is executed.

    path: the file, or a run's directory.  Raises BadInput where it is missing, damaged or inconsistent.
    """
    try:
        path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise BadInput(f"no checkpoint at {path}: give a run's directory, as in runs/NAME")
        state = torch.load(path, map_location=device, weights_only=True)
        policy = GPT(GPTConfig(**state.pop("model"))).to(device)
        policy.load_state_dict(state.pop("policy"))
        tokenizer = Tokenizer.from_state(state.pop("tokenizer"))
        if tokenizer.vocab_size != policy.config.vocab_size:
            raise ValueError("the tokenizer is not this model's")
        return policy, tokenizer, state
    except BadInput:
        raise
    except OSError as e:
        raise BadInput(f"cannot read {path}: {e.strerror or e}")
    except Exception as e:  # a damaged file can raise nearly anything
        raise BadInput(f"{path} is damaged or no checkpoint of ours: give another, or train it again ({type(e).__name__})")


# Talking to the result.


def main(argv=None):
    parser = ArgumentParser(description="Sample completions from a trained policy.")
    parser.add_argument("run", help="a run's directory, as in runs/NAME")
    parser.add_argument("--prompt", required=True, help="the text to complete, without a space at its end")
    parser.add_argument("-n", type=int, default=4, help="completions (default 4)")
    parser.add_argument("--max-new-tokens", type=int,
                        help="longest completion, tokens (default: what the context holds)")
    parser.add_argument("--temperature", type=float, help="divides the logits; 0 is greedy (default: as it was trained)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default 0)")
    try:
        args = parser.parse_args(argv)
        if min(args.n, 1 if args.max_new_tokens is None else args.max_new_tokens) < 1:
            raise BadInput("-n and --max-new-tokens must be at least 1")
        if not 0 <= args.seed < 2 ** 63:
            raise BadInput("--seed must be at least 0 and below 2**63")
        policy, tokenizer, more = load_checkpoint(args.run)
        temperature = args.temperature if args.temperature is not None else more.get("config", {}).get("temperature", 1.0)
        if not (temperature == 0 or 1e-3 <= temperature < math.inf):
            raise BadInput("--temperature must be 0 (greedy) or at least 0.001")
        prompt = tokenizer.encode(args.prompt)
        room = args.max_new_tokens or max(1, policy.config.block_size - len(prompt))
        generator = torch.Generator().manual_seed(args.seed)
        rollout = sample(policy, [prompt] * args.n, room, tokenizer.eos_token, temperature, generator)
        for completion in rollout.completions(tokenizer):
            print(args.prompt + completion)
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
