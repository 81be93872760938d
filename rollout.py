"""Text to tokens, tokens to episodes: the tokenizer, and `sample`, which lets a policy act. Then checkpoints.

`python rollout.py runs/NAME --prompt "the acting was"` samples from a trained policy; `--help` lists the
options.
"""

import argparse
import contextlib
import math
import os
import signal
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import regex  # comes with tiktoken: re has no \p{L}
import tiktoken
import torch

from advantage import processes
from model import GPT, BadInput, Critic, GPTConfig, load_gpt2, save_gpt2

# How a text is split into words, within which BPE merges bytes: contractions; letters, digits or signs with
# the space before them; spaces. In ours a Chinese character is a word, so that a prompt that ends after one
# has the tokens that it has within a longer text.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
OUR_SPLIT = GPT2_SPLIT.replace(r" ?\p{L}+", r"\p{Han}| ?(?:(?!\p{Han})\p{L})+")
SPLITS = {"bpe": OUR_SPLIT, "gpt2": GPT2_SPLIT}


def learn_merges(texts, most):
    """Byte-pair encoding: merge the most frequent pair of neighbours within a word into a token, and repeat.

    Returns the tokens, as bytes, in the order of their merges: at most `most`, fewer where no pair is left.
    Sennrich et al. 2016, algorithm 1, with the counts of the pairs kept up to date.
    """
    words = Counter(word for text in texts for word in regex.findall(OUR_SPLIT, text))
    pieces = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    counts, found_in = Counter(), defaultdict(set)  # of each pair of neighbours: how often, in which words

    def count(word, sign):
        for pair in zip(pieces[word], pieces[word][1:]):
            counts[pair] += sign * words[word]
            found_in[pair].add(word)

    for word in words:
        count(word, 1)
    tokens = []
    while len(tokens) < most and any(counts.values()):
        pair = max(counts, key=lambda pair: (counts[pair], pair))  # a tie is broken by the order of bytes
        tokens.append(pair[0] + pair[1])
        for word in found_in[pair].copy():
            count(word, -1)
            piece, i = pieces[word], 0
            while i < len(piece) - 1:
                if (piece[i], piece[i + 1]) == pair:
                    piece[i:i + 2] = [tokens[-1]]
                i += 1
            count(word, 1)
        del counts[pair], found_in[pair]
    return tokens


class Tokenizer:
    """text <-> tokens: byte-pair encoding over bytes, so that every text has tokens, and an end of text.

    `learn` learns a vocabulary from a corpus, offline; `gpt2` is GPT-2's.
    Sennrich et al. 2016; Radford et al. 2019.
    """

    def __init__(self, encoding):
        self.encoding, self.name = encoding, encoding.name
        self.eos_token, self.vocab_size = encoding.eot_token, encoding.n_vocab

    @classmethod
    def learn(cls, texts, vocab_size):
        """Learn at most vocab_size ≥ 257 tokens: 256 bytes, merges, the end of text."""
        return cls.from_merges(learn_merges(texts, vocab_size - 257))

    @classmethod
    def from_merges(cls, merges):
        """merges: the tokens of more than one byte, as bytes, in the order in which they were learned."""
        tokens = [*(bytes([i]) for i in range(256)), *merges]
        return cls.from_state({"name": "bpe", "tokens": [token.hex() for token in tokens]})

    def state(self):
        """The whole vocabulary as plain data, for `from_state`."""
        tokens = map(self.encoding.decode_single_token_bytes, range(self.eos_token))
        return {"name": self.name, "tokens": [token.hex() for token in tokens]}

    @classmethod
    def from_state(cls, state):
        ranks = {bytes.fromhex(token): i for i, token in enumerate(state["tokens"])}
        if len(ranks) < len(state["tokens"]) or not all(bytes([i]) in ranks for i in range(256)):
            raise ValueError("a vocabulary must hold each byte, and no token twice")
        return cls(tiktoken.Encoding(state["name"], pat_str=SPLITS[state["name"]], mergeable_ranks=ranks,
                                     special_tokens={"<|endoftext|>": len(ranks)}))

    @classmethod
    def gpt2(cls):
        """GPT-2's vocabulary, which tiktoken downloads at its first use. Raises BadInput."""
        try:
            return cls(tiktoken.get_encoding("gpt2"))
        except Exception as e:  # whatever the network or the cache can raise
            raise BadInput(f"cannot load GPT-2's vocabulary ({type(e).__name__}): let tiktoken download it "
                           "where there is a network, and set TIKTOKEN_CACHE_DIR to its folder")

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens):
        return self.encoding.decode([t for t in tokens if t != self.eos_token])

    def token_bytes(self):
        """The bytes in each token (vocab_size,); the end of text counts as one, as a newline would."""
        sizes = [len(self.encoding.decode_single_token_bytes(token)) for token in range(self.vocab_size)]
        sizes[self.eos_token] = 1
        return torch.tensor(sizes)


@dataclass
class Rollout:
    """B sampled episodes of up to T actions. mask[b, t] is True where the policy chose tokens[b, t + 1].

    logprobs is undefined where mask is False.
    """

    tokens: torch.Tensor  # (B, T+1) int64: prompt, completion, its end of text, then end of text as filler
    mask: torch.Tensor  # (B, T) bool: prompt False, completion and its end of text True, filler False
    logprobs: torch.Tensor  # (B, T) log π(a|s) when the action a was drawn

    def completions(self, tokenizer):
        """The B completions as text, without prompt and end of text."""
        rows = zip(self.tokens[:, 1:].tolist(), self.mask.tolist())
        return [tokenizer.decode([t for t, acted in zip(tokens, mask) if acted]) for tokens, mask in rows]


def draw(logp, uniforms):
    """One token per row by inverse CDF: the first whose cumulative probability reaches the uniform number.

    logp: (B, V) log-probabilities, up to a constant.  uniforms: (B,) in (0, 1], so that a token of
    probability zero is never drawn.  Returns (B,) int64. One random number per row, where torch.multinomial
    draws V.
    """
    cdf = logp.exp().cumsum(-1)  # (B, V)
    drawn = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:]).squeeze(-1)
    return drawn.clamp(max=logp.shape[-1] - 1)  # NaN would give V, which is no token


def truncate(logp, top_k=0, top_p=1.0):
    """logp (B, V) of the top_k likeliest tokens (0: all) and the fewest that hold top_p; -inf elsewhere.

    For people to read: training samples from all of π.
    Top-k: Fan et al. 2018; top-p, or nucleus: Holtzman et al. 2020.
    """
    ordered, index = logp.sort(-1, descending=True)
    likelier = ordered.exp().cumsum(-1) - ordered.exp()  # (B, V) the probability of all likelier tokens
    keep = likelier < (top_p if top_p < 1 else math.inf)  # 1 keeps all, whatever the rounding
    if top_k:
        keep[:, top_k:] = False
    return logp.masked_fill(~keep.gather(-1, index.argsort(-1)), -math.inf)


@torch.no_grad()
def sample(policy, prompts, max_new_tokens, eos_token, temperature=1.0, generator=None, top_k=0, top_p=1.0):
    """Let the policy complete each prompt until it chooses eos_token or has chosen max_new_tokens.

    policy: (tokens, cache) -> logits, with `kv_cache`.  prompts: B lists of at least one token each.
    temperature: divides the logits; 0 is greedy.  top_k, top_p: see `truncate`.
    Returns a Rollout as long as its longest row. Its logprobs are at the temperature (1 if greedy) and not
    truncated.
    Raises ValueError for an empty prompt, or one that leaves too little room in the context.

    Prompts stand at the left without padding. The loop starts at the end of the shortest prompt; a row whose
    prompt is longer takes its own tokens until that ends. Random numbers belong to a row and its i-th choice,
    not to a column, so that each row gets what it would get alone.
    """
    device, lengths = next(policy.parameters()).device, [len(prompt) for prompt in prompts]
    B, T = len(prompts), max(lengths) + max_new_tokens - 1  # T columns: column t chooses tokens[:, t+1]
    if min(lengths) == 0 or T + 1 > policy.config.block_size:
        raise ValueError(f"an empty prompt, or {T + 1} tokens exceed the context {policy.config.block_size}")
    tokens = torch.full((B, T + 1), eos_token)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    start = torch.tensor(lengths, device=device) - 1  # (B,) each row's first action
    stop = start + max_new_tokens  # (B,) one past its last action; sooner once it chooses eos_token
    logprobs = next(policy.parameters()).new_zeros(B, T)

    # Column t is for action t: a row's i-th action gets its i-th number.
    uniforms = torch.ones(B, T, device=device)  # in (0, 1]
    random = 1 - torch.rand(B, max_new_tokens, generator=generator, device=device)
    uniforms.scatter_(1, start[:, None] + torch.arange(max_new_tokens, device=device), random)

    active = torch.arange(B, device=device)  # the rows in the cache: finished ones are dropped
    cache, n_cached = policy.kv_cache(T + 1), 0
    for t in range(min(lengths) - 1, T):
        logits = policy(tokens[active, n_cached:t + 1], cache)[:, -1]  # (active, V); at first many columns
        n_cached = t + 1
        logp = (logits / (temperature or 1)).log_softmax(-1)
        if temperature == 0:
            choice = logp.argmax(-1)
        else:
            choice = draw(truncate(logp, top_k, top_p) if top_k or top_p < 1 else logp, uniforms[active, t])
        logprobs[active, t] = logp.gather(1, choice[:, None]).squeeze(1)
        acts = (start[active] <= t) & (t < stop[active])  # False inside a prompt and after the end
        tokens[active, t + 1] = torch.where(acts, choice, tokens[active, t + 1])
        stop[active] = torch.where(acts & (choice == eos_token), t + 1, stop[active])
        if t % 4 == 3:  # not at every token, since asking makes a GPU wait
            unfinished = (t + 1 < stop[active]).nonzero().squeeze(-1)
            if len(unfinished) == 0:
                break
            if len(unfinished) <= 0.75 * len(active):
                active = active[unfinished]
                for layer in cache:
                    layer.keep_rows(unfinished)

    longest = int(stop.max())
    columns = torch.arange(longest, device=device)
    mask = (columns >= start[:, None]) & (columns < stop[:, None])
    return Rollout(tokens[:, :longest + 1], mask, logprobs[:, :longest])


def check_fit(prompts, tokenizer, max_new_tokens, block_size):
    """Raises BadInput that names a prompt (text) which cannot be completed, or leaves no room for that."""
    for prompt in prompts:
        n = len(tokenizer.encode(prompt))
        if n == 0:
            raise BadInput("a prompt is empty: give it at least one character")
        if prompt.endswith(" "):
            raise BadInput(f"the prompt {str(prompt)!r} ends with a space: leave it out, words bring one")
        if n + max_new_tokens > block_size:
            raise BadInput(f"the prompt {str(prompt)!r} has {n} tokens; {max_new_tokens} more exceed the "
                           f"context of {block_size}: use a shorter prompt, a smaller --max-new-tokens or a "
                           "larger --block-size")


# Checkpoints.

def write_atomically(path, write):
    """write(file) beside path, then rename: readers find the old file or the whole new one.

    Of several processes only the first writes. Raises BadInput where there is no room or no permission.
    """
    if processes()[0] > 0:
        return
    beside = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:  # RuntimeError is torch.save's
        with contextlib.suppress(OSError):
            beside.unlink()
        reason = " ".join(str(e).split())
        raise BadInput(f"cannot write {path}: free some space or choose another place ({reason})")


def save_checkpoint(path, policy, tokenizer, **more):
    """Write what `load_checkpoint` reads. more: state_dicts (`reference`: a policy's) and plain data."""
    state = {"model": asdict(policy.config), "policy": policy.state_dict(), "tokenizer": tokenizer.state()}
    write_atomically(path, lambda file: torch.save(state | more, file))


def load_checkpoint(path, device="cpu"):
    """What `save_checkpoint` wrote: (policy, reference, tokenizer, {everything else}).

    path: the file, or a run's directory. The reference is a copy of the policy where none was saved, and
    {everything else}["reward_model"] a Critic where one was. Nothing in the file is executed. Raises BadInput
    where it is missing, damaged or inconsistent.
    """
    path = Path(path) / "checkpoint.pt" if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise BadInput(f"no checkpoint at {path}: give a run's directory, as in runs/NAME")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        config, weights = GPTConfig(**state.pop("model")), state.pop("policy")
        tokenizer = Tokenizer.from_state(state.pop("tokenizer"))
        if tokenizer.vocab_size != config.vocab_size or config.n_layer > len(weights):
            raise ValueError("the sizes of the model do not fit its tokenizer or weights")
        policy, reference = GPT(config), GPT(config)
        policy.load_state_dict(weights)
        reference.load_state_dict(state.pop("reference", weights))
        if "reward_model" in state:
            weights, state["reward_model"] = state["reward_model"], Critic(config)
            state["reward_model"].load_state_dict(weights)
            state["reward_model"].to(device).requires_grad_(False)
    except Exception as e:  # a damaged file can raise nearly anything
        raise BadInput(f"{path} is damaged or not a checkpoint of this program ({type(e).__name__})")
    return policy.to(device), reference.to(device), tokenizer, state


def is_gpt2(init):
    """Whether `load_weights` takes init for a GPT-2, not for a checkpoint of ours."""
    return init == "gpt2" or Path(init).is_dir() and not (Path(init) / "checkpoint.pt").exists()


def load_weights(init, device="cpu"):
    """(policy, tokenizer) to start from. Raises BadInput.

    init: a run, a checkpoint, a GPT-2's directory, or gpt2 (a download).
    """
    if not is_gpt2(init):
        policy, _, tokenizer, _ = load_checkpoint(init, device)
        return policy, tokenizer
    path = Path(init) if Path(init).is_dir() else download_gpt2()
    policy = load_gpt2(path)
    if policy.config.vocab_size != 50257:
        raise BadInput(f"{path} has {policy.config.vocab_size} tokens, but the vocabulary of GPT-2 has 50257")
    return policy.to(device), Tokenizer.gpt2()


def download_gpt2():
    """The directory of GPT-2's smallest model (0.5 GB), downloaded at the first call. Raises BadInput."""
    source = "https://huggingface.co/openai-community/gpt2/resolve/main"
    folder = Path(torch.hub.get_dir()) / "gpt2"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("config.json", "pytorch_model.bin"):
            if not (folder / name).exists():
                torch.hub.download_url_to_file(f"{source}/{name}", str(folder / name))
    except Exception as e:  # whatever a network can raise
        raise BadInput(f"cannot download GPT-2 ({type(e).__name__}): put config.json and pytorch_model.bin "
                       f"of {source} into {folder}, or give --init a directory that has them")
    return folder


# The command line.

def print_logprobs(rollout, row, reference, tokenizer, temperature):
    """A line per sampled token: its probability under the policy and under the reference."""
    with torch.no_grad():
        ref_logits = reference(rollout.tokens[row:row + 1, :-1])[0]  # (T, V)
        ref_logp = (ref_logits / (temperature or 1)).log_softmax(-1)
    steps = rollout.mask[row].nonzero().squeeze(-1)  # (n,)
    actions = rollout.tokens[row, steps + 1]
    p, q = rollout.logprobs[row, steps], ref_logp[steps, actions]
    print("  policy  reference  token")
    for a, b, token in zip(p.exp().tolist(), q.exp().tolist(), actions.tolist()):
        print(f"{a:8.4f}  {b:9.4f}  {tokenizer.encoding.decode([token])!r}")
    print(f"log-probability {p.sum():.2f} under the policy, {q.sum():.2f} under the reference, in nats")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Sample from a trained policy.", allow_abbrev=False,
                                     usage="python rollout.py RUN [--OPTION VALUE …]")
    parser.add_argument("run", help="a run's directory, as in runs/NAME, or a checkpoint")
    parser.add_argument("--prompt", help="text to complete, without a space at its end "
                                         "(default: each line of standard input)")
    parser.add_argument("-n", type=int, help="completions of each prompt (default 4, 1 with --greedy)")
    parser.add_argument("--max-new-tokens", type=int, help="longest completion, tokens (default: what fits)")
    parser.add_argument("--temperature", type=float, help="divides the logits (default: that of training)")
    parser.add_argument("--greedy", action="store_true", help="choose the likeliest token at each step")
    parser.add_argument("--top-k", type=int, default=0, help="keep the K likeliest tokens (default 0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the fewest tokens that hold this "
                                                                 "probability together (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default 0)")
    parser.add_argument("--logprobs", action="store_true",
                        help="print the probability of each token, now and before RL")
    parser.add_argument("--export", metavar="DIR", help="write the weights for transformers' GPT2LMHeadModel")
    args = parser.parse_args(argv)
    n = (1 if args.greedy else 4) if args.n is None else args.n
    if not 1 <= n <= 10_000 or args.max_new_tokens is not None and args.max_new_tokens < 1:
        parser.error("-n must be from 1 to 10000, --max-new-tokens at least 1")
    if not (0 <= args.seed < 2 ** 63 and args.top_k >= 0 and 0 < args.top_p <= 1):
        parser.error("--seed and --top-k must be at least 0, --top-p above 0 and at most 1")
    if args.temperature is not None and (args.greedy or not 1e-3 <= args.temperature < math.inf):
        parser.error("--temperature must be at least 0.001, and contradicts --greedy")
    try:
        policy, reference, tokenizer, more = load_checkpoint(args.run)
        if args.export:
            save_gpt2(policy, args.export, tokenizer.eos_token)
            return
        temperature = 0 if args.greedy else args.temperature or more.get("config", {}).get("temperature", 1.0)
        generator = torch.Generator().manual_seed(args.seed)
        lines = filter(None, map(str.rstrip, sys.stdin))
        for prompt in lines if args.prompt is None else [args.prompt]:
            tokens, block_size = tokenizer.encode(prompt), policy.config.block_size
            room = args.max_new_tokens or max(1, block_size - len(tokens))
            check_fit([prompt], tokenizer, room, block_size)
            rollout = sample(policy, [tokens] * n, room, tokenizer.eos_token, temperature, generator,
                             args.top_k, args.top_p)
            for row, completion in enumerate(rollout.completions(tokenizer)):
                print(prompt + completion)
                if args.logprobs:
                    print_logprobs(rollout, row, reference, tokenizer, temperature)
    except (BadInput, OSError, UnicodeDecodeError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when the reader does, as in `… | head`
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdin.reconfigure(encoding="utf-8-sig")
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that the policy writes
    main()
