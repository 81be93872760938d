"""The networks against other implementations; GPT-2's weights in and out."""

import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, Critic, GPTConfig

V, T = 11, 12  # tokens in the vocabulary and in the context
CONFIG = GPTConfig(vocab_size=V, block_size=T, n_layer=3, n_head=2, n_embd=8)
TOKENS = torch.randint(V, (4, T), generator=torch.Generator().manual_seed(1))


def disturbed(model, scale=0.3):
    """The model with weights far from the initial ones, where biases are zero and attention is uniform."""
    for i, p in enumerate(model.parameters()):
        p.data += scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
    return model


@pytest.fixture
def policy():
    return disturbed(GPT(CONFIG, torch.Generator().manual_seed(0)).double())


# The forward pass.

def test_policy_equals_the_transformer_of_torch(policy):
    trunk = policy.transformer
    h = trunk.wte(TOKENS) + trunk.wpe(torch.arange(T))
    gelu = lambda x: F.gelu(x, approximate="tanh")
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=torch.float64)
    for block in trunk.h:
        layer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, gelu, batch_first=True, norm_first=True).double()
        layer.self_attn.in_proj_weight.data = block.attn.c_attn.weight.data
        layer.self_attn.in_proj_bias.data = block.attn.c_attn.bias.data
        layer.self_attn.out_proj.load_state_dict(block.attn.c_proj.state_dict())
        layer.linear1.load_state_dict(block.mlp.c_fc.state_dict())
        layer.linear2.load_state_dict(block.mlp.c_proj.state_dict())
        layer.norm1.load_state_dict(block.ln_1.state_dict())
        layer.norm2.load_state_dict(block.ln_2.state_dict())
        h = layer(h, src_mask=mask, is_causal=True)
    torch.testing.assert_close(policy(TOKENS), trunk.ln_f(h) @ trunk.wte.weight.T)


@pytest.mark.parametrize("cuts", [[8], [1] * 8, [5, 1, 1, 1], [3, 4, 1]])
def test_cached_decoding_equals_the_full_forward(policy, cuts):
    cache, logits = policy.kv_cache(T), policy(TOKENS)
    for part in TOKENS[:, :8].split(cuts, dim=1):
        newest = policy(part, cache)  # the logits of the last token
        torch.testing.assert_close(newest, logits[:, cache[0].length - 1:cache[0].length])
    rows = torch.tensor([3, 1])  # two of the four sequences go on
    for layer in cache:
        layer.keep_rows(rows)
    torch.testing.assert_close(policy(TOKENS[rows, 8:], cache), logits[rows, -1:])


def test_more_tokens_than_the_context_are_refused(policy):
    cache = policy.kv_cache(T)
    policy(TOKENS, cache)
    for arguments in [(torch.zeros(1, T + 1, dtype=torch.long),), (TOKENS[:, :1], cache)]:
        with pytest.raises(ValueError, match="13 tokens do not fit the context of 12"):
            policy(*arguments)


# The weights.

def test_initial_weights_are_those_of_the_paper():
    config = GPTConfig(vocab_size=500, block_size=64, n_layer=4, n_head=4, n_embd=128)
    policy, again = (GPT(config, torch.Generator().manual_seed(5)) for _ in range(2))
    for (name, p), q in zip(policy.named_parameters(), again.parameters()):
        assert torch.equal(p, q)
        if name.endswith("bias"):
            assert (p == 0).all()
        elif "ln_" in name:
            assert (p == 1).all()
        else:
            std = 0.02 / math.sqrt(2 * 4) if "c_proj" in name else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name


def test_critic_starts_at_zero_on_a_copy_of_the_policys_trunk(policy):
    policy = policy.float()
    critic = Critic(CONFIG, policy)
    assert critic(TOKENS).shape == TOKENS.shape and (critic(TOKENS) == 0).all()
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in critic.parameters()}
    nn.init.constant_(critic.value_head.weight, 0.5)
    torch.testing.assert_close(critic(TOKENS), 0.5 * policy.transformer(TOKENS).sum(-1))


def test_other_units_do_not_change_what_a_fitted_critic_predicts(policy):
    critic = Critic(CONFIG, policy).double()
    units = lambda mean, std: critic.rescale_output(*torch.tensor([mean, std], dtype=torch.float64))
    units(7.0, 2.0)
    assert (critic(TOKENS) == 7).all()  # a new critic
    nn.init.normal_(critic.value_head.weight, generator=torch.Generator().manual_seed(0))
    nn.init.constant_(critic.value_head.bias, 0.3)
    values = critic(TOKENS)
    by_hand = 7.6 + 2 * (critic.transformer(TOKENS) @ critic.value_head.weight[0])
    torch.testing.assert_close(values, by_hand)
    units(-500.0, 1000.0)
    torch.testing.assert_close(critic(TOKENS), values)
    assert critic.value_head.bias.item() == pytest.approx(507.6 / 1000)
    units(3.0, 0.0)  # all returns are the same: the unit stays
    torch.testing.assert_close(critic(TOKENS), values)
    assert (critic.mean, critic.std) == (3, 1000)


@pytest.mark.parametrize("sizes", [dict(n_embd=10, n_head=4), dict(n_layer=0), dict(vocab_size=0),
                                   dict(block_size=-1), dict(n_embd=48.0), dict(n_head="2")])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError):
        GPTConfig(**{"vocab_size": 5} | sizes)
