"""A GPT-2 written by hand, a critic, the tokenizer, and the checkpoint that holds them.

Small pieces come first: attention, the MLP, the block, the trunk. Then follow the two networks, GPT and
Critic, the tokenizer that turns text into tokens, and the checkpoint that holds all of them. This file
imports nothing else of this project, so it can be copied on its own.

This file leaves out dropout (pretraining takes few epochs), mixed precision (nothing here is large), and the
files of other programs (tests/examples/gpt2.py converts GPT-2's).
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import contextlib
import math
import os
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import regex  # comes with tiktoken: re has no \p{L}
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F


class BadInput(ValueError):
    """The user's input cannot be used. The message is one line that says what is wrong and what to do."""


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int  # number of tokens, end-of-text included
    block_size: int = 64  # the context: maximum number of tokens (prompt and completion) in a sequence
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128  # width, a multiple of n_head

    def __post_init__(self):
        if not all(isinstance(size, int) and size >= 1 for size in vars(self).values()):
            raise ValueError(f"every size of a GPT must be a whole number of at least 1: {self}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")


class KVCache:
    """The keys and values of one attention layer for the S tokens read so far. Only sampling needs it.

    A sampler reads one more token at each step. With the cache it computes that token's keys and values only,
    instead of those of the whole text. k and v: (B, H, max_length, D), of which S are filled, for B texts and
    H heads of size D.
    """

    def __init__(self, max_length):
        self.max_length = max_length
        self.length = 0  # S
        self.k = None  # allocated by the first append, which knows B, H and D
        self.v = None

    def append(self, k, v):
        """Store the keys and values (B, H, T, D) of T new tokens. Returns those of all, (B, H, S, D) each."""
        if self.k is None:
            B, H, _, D = k.shape
            self.k = k.new_empty(B, H, self.max_length, D)
            self.v = v.new_empty(B, H, self.max_length, D)
        start = self.length
        self.length += k.shape[2]
        self.k[:, :, start:self.length] = k
        self.v[:, :, start:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]

    def keep_rows(self, rows):
        """Keep only these texts of the batch. rows: (B',) indices."""
        self.k = self.k[rows]
        self.v = self.v[rows]


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        # queries, keys and values of all heads in one product
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each

        # softmax(q kᵀ / √D) v, where each query sees the keys up to its own token
        if cache is None:  # T queries, T keys
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        else:  # T queries, which belong to the last T of S keys: query t sees the keys up to S - T + t
            k, v = cache.append(k, v)  # (B, H, S, D) each
            S = k.shape[2]
            visible = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T) if T > 1 else None
            y = F.scaled_dot_product_attention(q, k, v, visible)  # (B, H, T, D)

        # the heads side by side again
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The trunk: tokens (B, T) -> hidden states (B, T, n_embd)."""

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                # The outputs (c_proj) of 2 n_layer branches are added up. Without the smaller standard
                # deviation the variance of their sum would grow with the number of layers.
                std = 0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02
                p.data.normal_(0, std, generator=generator)
            elif name.endswith("bias"):
                p.data.zero_()

    def forward(self, tokens, cache=None):
        start = cache[0].length if cache else 0  # the position of the first of these tokens
        stop = start + tokens.shape[1]
        if stop > self.config.block_size:
            raise ValueError(f"{stop} tokens do not fit the context of {self.config.block_size}")
        x = self.wte(tokens) + self.wpe.weight[start:stop]  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)
        return self.ln_f(x)


class GPT(nn.Module):
    """The policy. tokens (B, T) int64 -> logits (B, T, V); column t scores the token after tokens[:, :t+1].

    With a cache from `kv_cache`, tokens are only the new ones, and logits (B, 1, V) only those of the last
    one. The output head is the token embedding (tied weights). Raises ValueError for more than block_size
    tokens.
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, generator)

    def forward(self, tokens, cache=None):
        x = self.transformer(tokens, cache)  # (B, T, C)
        if cache:
            x = x[:, -1:]  # a sampler needs the logits of the last token only
        return F.linear(x, self.transformer.wte.weight)

    def kv_cache(self, max_length):
        """An empty cache for sequences of at most max_length tokens: one KVCache per layer."""
        return [KVCache(max_length) for _ in range(self.config.n_layer)]


class Critic(nn.Module):
    """The same trunk with a scalar head. tokens (B, T) -> values (B, T), predictions of the return.

    The critic is a separate network. A value head on the policy's trunk would move the policy whenever the
    critic is trained, outside any trust region. `policy`, if given, provides the trunk's initial weights.

    The output is V = mean + std·h, with h = w·x + b. The head starts at w = 0 and b = 0, so V is the mean
    until the critic is trained.

    Trained with another loss, a Critic serves as the reward model (reward.py). `last_value` then returns the
    reward of a whole text.
    """

    def __init__(self, config, policy=None):
        super().__init__()
        self.transformer = Transformer(config)
        self.value_head = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.register_buffer("mean", torch.tensor(0.0))
        self.register_buffer("std", torch.tensor(1.0))
        if policy is not None:
            self.transformer.load_state_dict(policy.transformer.state_dict())

    def forward(self, tokens):
        return self.mean + self.std * self.value_head(self.transformer(tokens)).squeeze(-1)

    def last_value(self, tokens):
        """The values (B,) at the last token of each row. tokens: (B, T), padded with -100."""
        last = (tokens >= 0).sum(1, keepdim=True) - 1  # (B, 1)
        values = self(tokens[:, :last.max() + 1].clamp(min=0))
        return values.gather(1, last).squeeze(1)

    @torch.no_grad()
    def rescale_output(self, mean, std):
        """Set mean and std of V = mean + std·h, so the head always predicts numbers of order 1.

        mean, std: 0-d tensors, of the returns. A std of zero is ignored.
        A trained critic keeps its values: mean + std·h_new = mean_old + std_old·h_old, solved for h_new, is
        w ← w·std_old/std, b ← (mean_old + std_old·b - mean)/std. A new critic (w = 0) predicts the new mean.
        Adam's averages are not rescaled, which is an approximation.
        PopArt: van Hasselt et al. 2016, "Learning values across many orders of magnitude".
        """
        std = torch.where(std > 0, std, self.std)
        w = self.value_head.weight
        b = self.value_head.bias
        if w.any():
            b.copy_((self.mean + self.std * b - mean) / std)
            w.mul_(self.std / std)
        self.mean.copy_(mean)
        self.std.copy_(std)


# Text to tokens.

# How a text is split into words: contractions; letters, digits or signs with the space before them; white
# space. BPE merges bytes within a word only. In our pattern a Chinese character is a word: if two were
# merged, a prompt that ends between them would not have the tokens that it has in a longer text.
# [^\P{L}\p{Han}] is a letter but no Han, and 999 bounds what tiktoken keeps on its stack.
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s{1,999}(?!\S)|\s+"
OUR_SPLIT = r"\p{Han}|'(?:[sdmt]|ll|ve|re)| ?[^\P{L}\p{Han}]+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s{1,999}(?!\S)|\s+"
SPLITS = {"bpe": OUR_SPLIT, "gpt2": GPT2_SPLIT}


def learn_merges(texts, max_merges):
    """Byte-pair encoding: merge the most frequent pair of neighbours within a word into a token, and repeat.

    Returns the tokens, as bytes, in the order of their merges: at most max_merges, fewer if no pair is left.
    Sennrich et al. 2016, algorithm 1, with the counts of the pairs kept up to date.
    """
    words = Counter(word for text in texts for word in regex.findall(OUR_SPLIT, replace_surrogates(text)))
    pieces = {word: [bytes([byte]) for byte in word.encode()] for word in words}
    counts = Counter()  # how often each pair of neighbours occurs
    found_in = defaultdict(set)  # in which words, also some that have lost the pair, which does no harm

    def add(word, sign):
        for pair in zip(pieces[word], pieces[word][1:]):
            counts[pair] += sign * words[word]
            found_in[pair].add(word)

    for word in words:
        add(word, 1)
    tokens = []
    while len(tokens) < max_merges and any(counts.values()):
        pair = max(counts, key=lambda pair: (counts[pair], pair))  # a tie is broken by the order of bytes
        tokens.append(pair[0] + pair[1])
        for word in found_in[pair].copy():  # take the word's pairs out, merge, put the new ones in
            add(word, -1)
            pieces[word] = merge(pieces[word], pair)
            add(word, 1)
        del counts[pair], found_in[pair]
    return tokens


def replace_surrogates(text):
    """The text with U+FFFD in place of a lone surrogate, which no UTF-8 can hold. tiktoken does the same."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def merge(piece, pair):
    """The list of tokens, with each occurrence of the pair of neighbours joined."""
    merged = []
    for token in piece:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


class Tokenizer:
    """Text to tokens and back, by byte-pair encoding over bytes, so every text has tokens.

    The last token of the vocabulary is the end of text. `learn` learns a vocabulary from a corpus, offline;
    `gpt2` is GPT-2's. Encoding and decoding are tiktoken's.
    Sennrich et al. 2016; Radford et al. 2019.
    """

    def __init__(self, encoding):
        self.encoding = encoding  # a tiktoken.Encoding
        self.name = encoding.name
        self.eos_token = encoding.eot_token
        self.vocab_size = encoding.n_vocab

    @classmethod
    def learn(cls, texts, vocab_size):
        """Learn a vocabulary of at most vocab_size ≥ 257 tokens: 256 bytes, merges, the end of text."""
        tokens = [bytes([i]) for i in range(256)] + learn_merges(texts, vocab_size - 257)
        return cls.from_state({"name": "bpe", "tokens": [token.hex() for token in tokens]})

    def state(self):
        """The whole vocabulary as plain data, for `from_state`."""
        tokens = map(self.encoding.decode_single_token_bytes, range(self.eos_token))
        return {"name": self.name, "tokens": [token.hex() for token in tokens]}

    @classmethod
    def from_state(cls, state):
        ranks = {bytes.fromhex(token): i for i, token in enumerate(state["tokens"])}
        if len(ranks) < len(state["tokens"]) or not all(bytes([i]) in ranks for i in range(256)):
            raise ValueError("a vocabulary must contain each byte, and no token twice")
        return cls(tiktoken.Encoding(state["name"], pat_str=SPLITS[state["name"]], mergeable_ranks=ranks,
                                     special_tokens={"<|endoftext|>": len(ranks)}))

    @classmethod
    def gpt2(cls):
        """GPT-2's vocabulary, which tiktoken downloads at its first use. Raises BadInput."""
        try:
            return cls.from_state(cls(tiktoken.get_encoding("gpt2")).state())  # with GPT2_SPLIT
        except Exception as e:  # whatever the network or the cache can raise
            raise BadInput(f"cannot load GPT-2's vocabulary ({type(e).__name__}): let tiktoken download it "
                           "where there is a network, and set TIKTOKEN_CACHE_DIR to its folder")

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, tokens):
        return self.encoding.decode([t for t in tokens if t != self.eos_token])

    def token_bytes(self):
        """The number of bytes in each token, (vocab_size,). The end of text counts as one, like a newline."""
        sizes = [len(self.encoding.decode_single_token_bytes(token)) for token in range(self.eos_token)]
        return torch.tensor([*sizes, 1])


# Checkpoints.

def write_atomically(path, write):
    """Call write(file) for a new file next to path, then rename it to path.

    Readers find the old file or the whole new one. Under torchrun only the first process writes. Raises
    BadInput if there is no room or no permission.
    """
    if int(os.environ.get("RANK", 0)) > 0:  # torchrun's number of this process
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
    """Write the file that `load_checkpoint` reads.

    more: state_dicts and plain data. Two of the state_dicts become models again when they are loaded:
    `reference`, of a policy, and `reward_model`, of a Critic.
    """
    state = {"model": asdict(policy.config), "policy": policy.state_dict(), "tokenizer": tokenizer.state()}
    write_atomically(path, lambda file: torch.save(state | more, file))


def load_checkpoint(path, device="cpu"):
    """Load a checkpoint. Returns (policy, reference, tokenizer, more).

    path: the file, or a run's directory.  more: a dict of everything else that was given to
    `save_checkpoint`; its reward_model is a model. The reference is a copy of the policy if none
    was saved. Nothing in the file is executed. Raises BadInput if the file is missing, damaged or
    inconsistent.
    """
    path = Path(path) / "checkpoint.pt" if os.path.isdir(path) else Path(path)
    if not os.path.isfile(path):  # unlike Path.is_file, it also takes a name that is too long
        raise BadInput(f"there is no checkpoint {path}: give a run's directory, such as runs/NAME")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        config = GPTConfig(**state.pop("model"))
        weights = state.pop("policy")
        tokenizer = Tokenizer.from_state(state.pop("tokenizer"))
        # Checked before GPT(config), because a forged n_layer must not allocate a giant model.
        if tokenizer.vocab_size != config.vocab_size or config.n_layer > len(weights):
            raise ValueError("the sizes of the model do not fit its tokenizer or weights")
        policy = GPT(config)
        policy.load_state_dict(weights)
        reference = GPT(config)
        reference.load_state_dict(state.pop("reference", weights))
        if "reward_model" in state:
            reward_model = Critic(config)
            reward_model.load_state_dict(state["reward_model"])
            state["reward_model"] = reward_model.to(device).requires_grad_(False)
    except Exception as e:  # a damaged file can raise nearly anything
        raise BadInput(f"{path} is damaged or not a checkpoint of this program ({type(e).__name__})")
    return policy.to(device), reference.to(device), tokenizer, state
