"""The networks against other implementations; GPT-2's weights in and out."""

import json
import math
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from helpers import Malice
from model import GPT, BadInput, Critic, GPTConfig, load_gpt2, save_gpt2, transpose_linear

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
    units = lambda mean, std: critic.set_units(*torch.tensor([mean, std], dtype=torch.float64))
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


# GPT-2's weights.

X = torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ours():
    return disturbed(GPT(GPTConfig(vocab_size=50, block_size=32, n_layer=3, n_head=4, n_embd=48)), 0.1)


@pytest.fixture
def folder(ours, tmp_path, monkeypatch):
    """The directory of a GPT-2, saved without safetensors."""
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "safetensors.torch", None)  # its import raises ImportError
        save_gpt2(ours, tmp_path / "gpt2", 49)
    return tmp_path / "gpt2"


@pytest.fixture(params=["pytorch_model.bin", "model.safetensors"])
def weights(request, ours, folder):
    """The file of weights, in either format, in the directory of a GPT-2."""
    if request.param == "model.safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")
        folder = folder.with_name("safe")
        save_gpt2(ours, folder, 49)
    assert {path.name for path in folder.iterdir()} == {"config.json", request.param}
    return folder / request.param


def test_weights_survive_the_round_trip_unless_half_of_them_is_lost(ours, weights):
    again = load_gpt2(weights.parent)
    assert again.config == ours.config
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), ours.parameters()))
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(BadInput, match="cannot load a GPT-2"):
        load_gpt2(weights.parent)


def import_transformers():
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not transformers.is_torch_available():
        pytest.skip("this version of transformers needs a newer torch")
    return transformers


@torch.no_grad()
def test_transformers_computes_the_same_with_our_weights(ours, weights):
    transformers = import_transformers()
    theirs = transformers.GPT2LMHeadModel.from_pretrained(weights.parent).eval()
    torch.testing.assert_close(ours(X), theirs(X).logits, rtol=0, atol=1e-4)
    assert theirs.config.eos_token_id == 49


@torch.no_grad()
@pytest.mark.parametrize("form", ["as saved", "trunk alone, in half precision, with causal masks"])
def test_we_compute_the_same_with_the_weights_of_transformers(tmp_path, form):
    transformers = import_transformers()
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    theirs = disturbed(transformers.GPT2LMHeadModel(config), 0.1).eval()
    theirs.save_pretrained(tmp_path)
    if form != "as saved":  # as the first release is stored
        theirs = theirs.half().float()
        state = {name: t.half() for name, t in theirs.transformer.state_dict().items()}
        state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(3)}
        state |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
        torch.save(state, tmp_path / "pytorch_model.bin")
    ours = load_gpt2(tmp_path)
    assert ours.config == GPTConfig(50, 32, 3, 4, 48)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    torch.testing.assert_close(ours(X), theirs(X).logits, rtol=0, atol=1e-4)


def test_gpt2_stores_the_transpose_of_its_linear_layers_alone(ours):
    stored = transpose_linear(ours.state_dict())
    linear = {f"{name}.weight" for name, module in ours.named_modules() if isinstance(module, nn.Linear)}
    for name, t in ours.state_dict().items():
        assert torch.equal(stored[name], t.T if name in linear else t)


def test_every_wrong_tensor_is_named(folder):
    tensors = torch.load(folder / "pytorch_model.bin")
    tensors["transformer.extra"] = tensors.pop("transformer.h.1.ln_2.bias")
    tensors["transformer.h.0.mlp.c_fc.weight"] = tensors["transformer.h.0.mlp.c_fc.weight"].T
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(BadInput) as e:
        load_gpt2(folder)
    message = str(e.value)
    assert 'Missing key(s) in state_dict: "transformer.h.1.ln_2.bias".' in message
    assert 'Unexpected key(s) in state_dict: "transformer.extra".' in message
    assert "size mismatch for transformer.h.0.mlp.c_fc.weight" in message
    assert message.count("transformer.") == 3 and "\n" not in message  # those and no other


@pytest.mark.parametrize("changes, says", [
    (dict(n_layer=None), "n_layer"), (dict(n_head=5), "n_head 5"), (dict(n_embd="48"), "'48'"),
    (dict(vocab_size=51), "wte.weight"), (dict(model_type="llama"), "'llama'"),
    (dict(activation_function="relu"), "'relu'"), (dict(layer_norm_epsilon=1e-6), "1e-06"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings")])
def test_a_configuration_of_another_model_is_refused(folder, changes, says):
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match=says):
        load_gpt2(folder)


def test_damaged_and_hostile_files_are_refused_in_one_line(folder, tmp_path):
    executed, tensors = tmp_path / "executed", torch.load(folder / "pytorch_model.bin")
    damaged = {"config.json": [b'{"n_embd": 4', b"\xff\xfe", b"[]", b"", None],
               "pytorch_model.bin": [b"", None, [1], {"transformer.wte.weight": "x"}, {"a": Malice(executed)},
                                     tensors | {"lm_head.weight": torch.zeros(50, 48)}]}
    for name, contents in damaged.items():
        whole = (folder / name).read_bytes()
        for content in contents:
            (folder / name).unlink(missing_ok=True)
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            elif content is not None:
                torch.save(content, folder / name)
            with pytest.raises(BadInput) as e:
                load_gpt2(folder)
            assert str(folder) in str(e.value) and "\n" not in str(e.value)
        (folder / name).write_bytes(whole)
    assert load_gpt2(folder) and not executed.exists()
