import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from bench import gpt2_state
from model import GPT, Critic, GPTConfig

CONFIG = GPTConfig(vocab_size=11, block_size=12, n_layer=3, n_head=2, n_embd=8)


@pytest.fixture
def policy():
    policy = GPT(CONFIG, torch.Generator().manual_seed(0)).double()
    for p in policy.parameters():  # away from the start, where biases are zero and attention nearly uniform
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()), dtype=p.dtype)
    return policy


def tokens(B, T):
    return torch.randint(CONFIG.vocab_size, (B, T), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("cuts", [[12], [1] * 12, [5, 1, 1, 1, 1, 1, 1, 1], [3, 4, 1, 2, 2]])
def test_cached_decoding_equals_the_full_forward(policy, cuts):
    x, cache = tokens(4, 12), policy.kv_cache(4, 12)
    parts = [policy(part, cache) for part in x.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), policy(x))


def test_cache_keeps_the_rows_that_it_is_told_to(policy):
    x, cache, rows = tokens(4, 6), policy.kv_cache(4, 12), torch.tensor([3, 1])
    policy(x[:, :5], cache)
    for layer in cache:
        layer.keep(rows)
    torch.testing.assert_close(policy(x[rows, 5:], cache), policy(x)[rows, 5:])


def test_no_logit_depends_on_a_later_token(policy):
    x = tokens(1, 12)
    for t in range(12):
        changed = x.clone()
        changed[:, t] = (x[:, t] + 1) % CONFIG.vocab_size
        moved = (policy(changed) != policy(x)).any(-1)[0]
        assert not moved[:t].any() and moved[t]


def test_equals_the_transformer_that_torch_ships(policy):
    x = tokens(3, 12)
    trunk = policy.transformer
    h = trunk.wte(x) + trunk.wpe(torch.arange(12))
    for block in trunk.h:
        layer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, lambda z: F.gelu(z, approximate="tanh"), batch_first=True,
                                           norm_first=True, dtype=torch.float64)
        layer.self_attn.in_proj_weight.data, layer.self_attn.in_proj_bias.data = block.attn.c_attn.weight.data, block.attn.c_attn.bias.data
        for theirs, ours in [(layer.self_attn.out_proj, block.attn.c_proj), (layer.linear1, block.mlp.c_fc),
                             (layer.linear2, block.mlp.c_proj), (layer.norm1, block.ln_1), (layer.norm2, block.ln_2)]:
            theirs.load_state_dict(ours.state_dict())
        h = layer(h, src_mask=nn.Transformer.generate_square_subsequent_mask(12, dtype=torch.float64), is_causal=True)
    torch.testing.assert_close(policy(x), trunk.ln_f(h) @ trunk.wte.weight.T)


def test_gpt2_small_has_its_published_size():
    with torch.device("meta"):
        policy = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768))
    assert sum(p.numel() for p in policy.parameters()) == 124_439_808


def test_first_weights():
    config = GPTConfig(vocab_size=500, block_size=64, n_layer=4, n_head=4, n_embd=128)
    a, b = GPT(config, torch.Generator().manual_seed(5)), GPT(config, torch.Generator().manual_seed(5))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    for name, p in a.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        elif "ln_" in name:
            assert (p == 1).all()
        else:
            std = 0.02 / math.sqrt(2 * 4) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05)
    loss = F.cross_entropy(a(torch.arange(64)[None])[0], torch.arange(1, 65))
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)  # knows nothing yet


def test_every_policy_parameter_gets_a_gradient(policy):
    F.cross_entropy(policy(tokens(4, 12)).flatten(0, 1), tokens(4, 12).flatten()).backward()
    for name, p in policy.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_critic_starts_at_zero_on_weights_of_its_own(policy):
    policy = policy.float()
    critic = Critic(CONFIG, policy)
    assert critic(tokens(3, 12)).shape == (3, 12) and (critic(tokens(3, 12)) == 0).all()
    torch.testing.assert_close(critic.transformer(tokens(3, 12)), policy.transformer(tokens(3, 12)))
    shared = {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in critic.parameters()}
    assert not shared


def test_past_the_context_it_refuses(policy):
    with pytest.raises(ValueError, match="13 tokens do not fit the context of 12"):
        policy(torch.zeros(1, 13, dtype=torch.long))
    cache = policy.kv_cache(1, 12)
    policy(tokens(1, 12), cache)
    with pytest.raises(ValueError, match="context"):
        policy(tokens(1, 1), cache)


@pytest.mark.parametrize("sizes", [dict(n_embd=10, n_head=4), dict(n_layer=0), dict(vocab_size=0)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError):
        GPTConfig(**{"vocab_size": 5, **sizes})


def test_logits_are_those_of_transformers_gpt2():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=48, n_layer=3, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).eval()
    ours = GPT(GPTConfig(vocab_size=50, block_size=32, n_layer=3, n_head=4, n_embd=48), torch.Generator().manual_seed(0))
    for i, p in enumerate(ours.parameters()):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    missing = theirs.load_state_dict(gpt2_state(ours), strict=False)
    assert missing.unexpected_keys == [] and missing.missing_keys == ["lm_head.weight"]  # which is tied
    x = torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x).logits, rtol=0, atol=1e-4)
        assert ours(x).std() > 0.3
