"""A GPT-2 written out by hand: the policy π(token | tokens so far), and the critic V(tokens so far).

Small pieces first: attention with its cache, the MLP, the block, the trunk; then the two heads, GPT and Critic. Last, GPT-2's
weights in and out: module names follow OpenAI's release, so that its tensors are found by name.
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int  # tokens, end-of-text included
    block_size: int = 64  # the context: most tokens (prompt and completion) in one sequence
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 128  # width, a multiple of n_head

    def __post_init__(self):
        if not all(isinstance(size, int) and size >= 1 for size in vars(self).values()):
            raise ValueError(f"every size of a GPT must be a whole number of at least 1: {self}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd {self.n_embd} must be a multiple of n_head {self.n_head}")


class KVCache:
    """The keys and values of one attention layer for the tokens read so far, (S, B, H, D) each.

    Time comes first: what was read is then one block of memory, which a step reads through in order and never copies.
    """

    def __init__(self, max_length):
        self.max_length, self.length = max_length, 0  # S, tokens read so far

    def append(self, k, v):
        """Add the keys and values (B, H, T, D) of T new tokens; returns those of all S tokens, (S, B, H, D) each."""
        if self.length == 0:
            B, H, _, D = k.shape
            self.k, self.v = (k.new_empty(self.max_length, B, H, D) for _ in range(2))
        start, self.length = self.length, self.length + k.shape[2]
        self.k[start:self.length], self.v[start:self.length] = k.permute(2, 0, 1, 3), v.permute(2, 0, 1, 3)
        return self.k[:self.length], self.v[:self.length]

    def keep(self, rows):
        """Keep only these rows of the batch. rows: (B',) indices."""
        self.k, self.v = self.k[:, rows], self.v[:, rows]


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None):
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
        if cache is not None:
            k, v = cache.append(k, v)  # (S, B, H, D), S tokens so far
            if T == 1:  # the sampler's step: softmax(q kᵀ / √D) v, written out: the fused kernel is slower for one query
                weights = (k * (q[:, :, 0] / math.sqrt(q.shape[-1]))).sum(-1).softmax(0)  # (S, B, H)
                return self.c_proj((weights.unsqueeze(-1) * v).sum(0).view(B, 1, C))
            k, v = k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)  # (B, H, S, D)
        S = k.shape[2]
        # Token t of the T new ones stands at position S-T+t and sees everything up to there.
        mask = None if T == S else torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S)  # (B, H, T, D)
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
            if p.dim() == 2:  # each layer adds two branches to the residual stream: scaled so that its variance stays put
                p.data.normal_(0, 0.02 / (math.sqrt(2 * config.n_layer) if "c_proj" in name else 1), generator=generator)
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
    """The policy. tokens (B, T) int64 -> logits (B, T, vocab_size); column t scores the token after tokens[:, :t+1].

    With a cache from `kv_cache`, tokens are only the new ones, and the logits those that the full sequence would give
    there. Raises ValueError past block_size. The output head is the token embedding (tied). Logits come in the weights' precision,
    also where torch.autocast computed them in less.
    """

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.transformer = Transformer(config, generator)

    def forward(self, tokens, cache=None):
        embedding = self.transformer.wte.weight
        return F.linear(self.transformer(tokens, cache), embedding).to(embedding.dtype)

    def kv_cache(self, max_length):
        """An empty cache for sequences of at most max_length tokens: one KVCache per layer."""
        return [KVCache(max_length) for _ in range(self.config.n_layer)]

    @classmethod
    def from_gpt2(cls, path):
        """The GPT-2 of a directory in Hugging Face's layout: config.json with pytorch_model.bin or model.safetensors.

        Nothing in the files is executed. Raises ValueError, in one line, for a file that is missing or damaged, for a model that
        is no GPT-2, and for tensors that are missing, unexpected or misshapen, each by its name.
        """
        config, tensors = read_gpt2(Path(path))
        policy = cls(config)
        expected = {name: tuple(t.shape) for name, t in gpt2_layout(policy.state_dict()).items()}
        wrong = [f"{name} is missing" for name in expected if name not in tensors]
        wrong += [f"{name} is unexpected" for name in tensors if name not in expected]
        wrong += [f"{name} is {tuple(tensors[name].shape)} in place of {shape}" for name, shape in expected.items()
                  if name in tensors and tensors[name].shape != shape]
        if wrong:
            raise ValueError(f"the weights in {path} do not fit its config.json: {', '.join(wrong)}")
        policy.load_state_dict(gpt2_layout(tensors))
        return policy

    def to_gpt2(self, path, eos_token):
        """Write the directory that `from_gpt2` and transformers' GPT2LMHeadModel.from_pretrained open. path: not yet there."""
        c, path = self.config, Path(path)
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(GPT2 | {
            "architectures": ["GPT2LMHeadModel"], "vocab_size": c.vocab_size, "n_positions": c.block_size, "n_embd": c.n_embd,
            "n_layer": c.n_layer, "n_head": c.n_head, "bos_token_id": eos_token, "eos_token_id": eos_token}, indent=2) + "\n")
        tensors = gpt2_layout(self.state_dict())
        try:
            from safetensors.torch import save_file
            save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        except ImportError:
            torch.save(tensors, path / "pytorch_model.bin")


class Critic(nn.Module):
    """The same trunk with a scalar head. tokens (B, T) -> values (B, T): the return expected after tokens[:, :t+1].

    A network of its own: a value head on the policy's trunk would move the policy while it learns, outside any trust
    region. `policy`, where given, lends its weights as the trunk's start. The head starts at zero, and so does every value.
    """

    def __init__(self, config, policy=None):
        super().__init__()
        self.transformer = Transformer(config)
        self.value_head = nn.Linear(config.n_embd, 1)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        if policy is not None:
            self.transformer.load_state_dict(policy.transformer.state_dict())

    def forward(self, tokens):
        return self.value_head(self.transformer(tokens)).to(self.value_head.weight.dtype).squeeze(-1)


# GPT-2's weights as Hugging Face keeps them.

GPT2 = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "tie_word_embeddings": True}  # what GPT is too


def gpt2_layout(tensors):
    """Our tensors as GPT-2 lays them out, or its tensors as ours: its linear layers hold the transpose. {name: tensor} both."""
    embeddings = ("transformer.wte.weight", "transformer.wpe.weight")
    return {name: t.T.contiguous() if t.dim() == 2 and name not in embeddings else t for name, t in tensors.items()}


def read_gpt2(path):
    """The GPTConfig of a directory and its tensors, in GPT-2's layout by our names. Raises ValueError."""
    file = path / "config.json"
    try:
        given = json.loads(file.read_text(encoding="utf-8"))
        config = GPTConfig(*(given[name] for name in ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")))
        file = path / "model.safetensors"
        if file.exists() and not (path / "pytorch_model.bin").exists():
            from safetensors.torch import load_file
            tensors = load_file(file)
        else:
            file = path / "pytorch_model.bin"
            tensors = torch.load(file, map_location="cpu", weights_only=True)
        tensors = {name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": t.float()
                   for name, t in tensors.items()
                   if not name.endswith((".attn.bias", ".attn.masked_bias"))}  # the causal mask, which some files hold too
    except FileNotFoundError:
        raise ValueError(f"there is no {file}: a GPT-2 is config.json with pytorch_model.bin or model.safetensors in a directory")
    except PermissionError:
        raise ValueError(f"{file} may not be read")
    except KeyError as e:
        raise ValueError(f"{file} is not of a GPT-2: it lacks {e}")
    except ImportError:
        raise ValueError(f"{file} takes a package that is not here: pip install safetensors, or put pytorch_model.bin beside it")
    except Exception as e:  # a damaged file can raise nearly anything
        reason = " ".join(str(e).split())[:80]
        raise ValueError(f"{file} is damaged or half-written: fetch it again ({type(e).__name__}: {reason})")
    other = [f"{name} is {given.get(name)!r}" for name, value in GPT2.items() if given.get(name, value) != value]
    n_inner = given.get("n_inner") or 4 * config.n_embd
    if n_inner != 4 * config.n_embd:
        other.append(f"n_inner is {n_inner}")
    head = tensors.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, tensors.get("transformer.wte.weight", head)):
        other.append("lm_head.weight is not the token embedding")
    if other:
        raise ValueError(f"{path} is no GPT-2 as this one is: {', '.join(other)}")
    return config, tensors
