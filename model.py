"""A GPT-2 written out by hand: the policy π(token | tokens so far) and the critic V(tokens so far).

Small pieces first: attention and its cache, the MLP, the block, the trunk. Then the two networks, GPT and
Critic. Last, files of GPT-2's weights: modules are named as in OpenAI's release, so that tensors are found by
name.
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

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
