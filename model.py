"""A GPT-2 written out by hand: the policy π(token | tokens so far) and the critic V(tokens so far).

Small pieces first: attention and its cache, the MLP, the block, the trunk. Then the two networks, GPT and
Critic; the tokenizer; and the files that hold them: checkpoints, and GPT-2's weights. Modules are named as in
OpenAI's release, so that tensors are found by name.
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import contextlib
import json
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
    block_size: int = 64  # the context: the most tokens (prompt and completion) in one sequence
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128  # width, a multiple of n_head

    def __post_init__(self):
        if not all(isinstance(size, int) and size >= 1 for size in vars(self).values()):
            raise ValueError(f"every size of a GPT must be a whole number of at least 1: {self}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")


class KVCache:
    """The keys and values of one attention layer for the S tokens read so far: k and v (B, H, S, D)."""

    def __init__(self, max_length):
        self.max_length, self.length = max_length, 0
        self.k = self.v = None  # made by the first append, which knows B, H and D

    def append(self, k, v):
        """Store the keys and values (B, H, T, D) of T new tokens. Returns those of all, (B, H, S, D) each."""
        if self.length == 0:
            B, H, _, D = k.shape
            self.k, self.v = (k.new_empty(B, H, self.max_length, D) for _ in range(2))
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start:self.length] = k
        self.v[:, :, start:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]

    def keep_rows(self, rows):
        """Drop all sequences of the batch but these. rows: (B',) indices."""
        k, v = self.k[rows, :, :self.length], self.v[rows, :, :self.length]
        self.length = 0
        self.append(k, v)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        visible = None
        if cache is not None:
            k, v = cache.append(k, v)  # (B, H, S, D) each, of which q is the newest T
            S = k.shape[2]
            if T > 1:  # query t sees the keys up to S-T+t; a single one sees all
                visible = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, visible, is_causal=cache is None)  # (B, H, T, D)
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
                # The outputs (c_proj) of 2 n_layer branches add up in the residual stream: keep its variance.
                std = 0.02 / math.sqrt(2 * config.n_layer) if "c_proj" in name else 0.02
                p.data.normal_(0, std, generator=generator)
            elif name.endswith("bias"):
                p.data.zero_()

    def forward(self, tokens, cache=None):
        start = cache[0].length if cache else 0
        stop = start + tokens.shape[1]
        if stop > self.config.block_size:
            raise ValueError(f"{stop} tokens do not fit the context of {self.config.block_size}")
        x = self.wte(tokens) + self.wpe.weight[start:stop]  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, cache[i] if cache else None)
        return self.ln_f(x)


class GPT(nn.Module):
    """The policy. tokens (B, T) int64 -> logits (B, T, V); column t scores the token after tokens[:, :t+1].

    With a cache from `kv_cache`, tokens are only the new ones, and logits (B, 1, V) only those of the last.
    The output head is the token embedding (tied). Raises ValueError for more than block_size tokens.
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, generator)

    def forward(self, tokens, cache=None):
        embedding, x = self.transformer.wte.weight, self.transformer(tokens, cache)  # (V, C), (B, T, C)
        return F.linear(x[:, -1:] if cache else x, embedding)

    def kv_cache(self, max_length):
        """An empty cache for sequences of at most max_length tokens: one KVCache per layer."""
        return [KVCache(max_length) for _ in range(self.config.n_layer)]


class Critic(nn.Module):
    """The same trunk with a scalar head. tokens (B, T) -> values (B, T): the expected return.

    With another loss it is a reward model, of which `at_end` gives the reward of a text.

    A separate network: a value head on the policy's trunk would move the policy while it is fitted, outside
    any trust region. `policy`, where given, provides the trunk's initial weights. The head starts at zero, so
    that every value is the mean in `set_units`, at first 0. The head predicts deviations from that mean.
    """

    def __init__(self, config, policy=None):
        super().__init__()
        self.transformer = Transformer(config)
        self.value_head = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        self.register_buffer("mean", torch.tensor(0.0))  # of the returns
        self.register_buffer("std", torch.tensor(1.0))  # the head's unit
        if policy is not None:
            self.transformer.load_state_dict(policy.transformer.state_dict())

    def forward(self, tokens):
        return self.mean + self.std * self.value_head(self.transformer(tokens)).squeeze(-1)

    def at_end(self, tokens):
        """(B,) the value at the last token of each row: of a whole text. tokens: (B, T), padded with -100."""
        last = (tokens >= 0).sum(1, keepdim=True) - 1
        return self(tokens.clamp(min=0)).gather(1, last).squeeze(1)

    @torch.no_grad()
    def set_units(self, mean, std):
        """Predict in units of returns with this mean and standard deviation: their size does not matter then.

        A fitted critic's values stay the same, those of a new one become the mean. mean, std: 0-d tensors.
        PopArt: van Hasselt et al. 2016, "Learning values across many orders of magnitude".
        """
        std = torch.where(std > 0, std, self.std)
        weight, bias = self.value_head.weight, self.value_head.bias
        if weight.any():
            weight *= self.std / std
            bias.copy_((self.mean + self.std * bias - mean) / std)
        self.mean.copy_(mean)
        self.std.copy_(std)


# Text to tokens.

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


# Checkpoints.

def write_atomically(path, write):
    """write(file) beside path, then rename: readers find the old file or the whole new one.

    Of several processes only the first writes. Raises BadInput where there is no room or no permission.
    """
    if int(os.environ.get("RANK", 0)) > 0:  # torchrun's
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


# GPT-2's weights, in files as Hugging Face writes them.

GPT2 = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
        "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
        "tie_word_embeddings": True}


def transpose_linear(tensors):
    """{name: tensor} with every linear layer transposed: from our layout to GPT-2's, or back."""
    embeddings = ("transformer.wte.weight", "transformer.wpe.weight")
    return {name: t.T.contiguous() if t.dim() == 2 and name not in embeddings else t
            for name, t in tensors.items()}


def read_tensors(path):
    """The tensors of a GPT-2 directory, in GPT-2's layout, under our names."""
    if (path / "pytorch_model.bin").exists():
        tensors = torch.load(path / "pytorch_model.bin", map_location="cpu", weights_only=True)
    elif (path / "model.safetensors").exists():
        from safetensors.torch import load_file
        tensors = load_file(path / "model.safetensors")
    else:
        raise FileNotFoundError("it holds neither pytorch_model.bin nor model.safetensors")
    causal_masks = (".attn.bias", ".attn.masked_bias")
    tensors = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": t.float()
               for name, t in tensors.items() if not name.endswith(causal_masks)}

    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors["transformer.wte.weight"]):
        raise ValueError("lm_head.weight is not the token embedding")
    return tensors


def load_gpt2(path):
    """The GPT in a directory as Hugging Face writes it: config.json and the weights.

    Nothing in the files is executed. Raises BadInput for a file that is missing or damaged, for a model that
    is no GPT-2, and for tensors that are missing, unexpected or misshapen, by name.
    """
    path = Path(path)
    try:
        given = json.loads((path / "config.json").read_text(encoding="utf-8"))
        for name, value in GPT2.items():
            if given.get(name, value) != value:
                raise ValueError(f"this is not a GPT-2: {name} is {given[name]!r} in config.json")
        sizes = [given[name] for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")]
        policy = GPT(GPTConfig(*sizes))
        policy.load_state_dict(transpose_linear(read_tensors(path)))
    except Exception as e:  # a damaged file can raise nearly anything
        raise BadInput(f"cannot load a GPT-2 from {path}: {type(e).__name__}: {' '.join(str(e).split())}")
    return policy


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


def save_gpt2(policy, path, eos_token):
    """Write the directory that `load_gpt2` and transformers' GPT2LMHeadModel.from_pretrained load.

    path: a directory that does not exist yet. Raises BadInput where it does, or cannot be written.
    """
    c, path = policy.config, Path(path)
    config = GPT2 | {"architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size,
                     "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer,
                     "n_head": c.n_head, "bos_token_id": eos_token, "eos_token_id": eos_token}
    tensors = transpose_linear(policy.state_dict())
    try:
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        try:
            from safetensors.torch import save_file
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        except ImportError:
            torch.save(tensors, path / "pytorch_model.bin")
    except Exception as e:  # of the file system, or safetensors' own
        raise BadInput(f"cannot write {path}: give a new directory on a disk with room ({e})")
