"""The networks against their definition and other implementations; GPT-2's weights in and out."""

import json
import math
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from helpers import Malice
from model import (GPT, BadInput, CausalSelfAttention, Critic, GPTConfig, KVCache, load_gpt2, save_gpt2,
                   transpose_linear)

V, T = 11, 12  # tokens in the vocabulary and in the context
CONFIG = GPTConfig(vocab_size=V, block_size=T, n_layer=3, n_head=2, n_embd=8)
TOKENS = torch.randint(V, (4, T), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def disturbed(model, scale=0.3):
    """The model with weights far from the initial ones, where biases are zero and attention is uniform."""
    for i, p in enumerate(model.parameters()):
        p.data += scale * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype)
    return model


@pytest.fixture
def policy():
    return disturbed(GPT(CONFIG).double())


@pytest.fixture
def critic():
    return disturbed(Critic(CONFIG).double())


# The forward pass.

@torch.no_grad()
@pytest.mark.parametrize("cached", [False, True])
def test_attention_is_the_mean_of_the_visible_values_with_softmax_weights(cached):
    attention = disturbed(CausalSelfAttention(CONFIG).double())
    x = torch.randn(1, T, 8, dtype=torch.float64)
    heads = torch.empty(T, 8, dtype=torch.float64)
    for head in (slice(0, 4), slice(4, 8)):
        q, k, v = (part[0, :, head] for part in attention.c_attn(x).split(8, dim=-1))
        for t in range(T):
            scores = [math.exp(q[t] @ k[s] / math.sqrt(4)) for s in range(t + 1)]
            heads[t, head] = sum(score * v[s] for s, score in enumerate(scores)) / sum(scores)
    cache = KVCache(T)
    parts = [attention(part, cache) for part in x.split([5, 1, 6], dim=1)] if cached else [attention(x)]
    torch.testing.assert_close(torch.cat(parts, 1)[0], attention.c_proj(heads))


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


@pytest.mark.parametrize("model", ["policy", "critic"])
def test_no_output_depends_on_a_later_token(model, request):
    model = request.getfixturevalue(model)
    before = model(TOKENS[:1]).view(T, -1)
    for t in range(T):
        changed = TOKENS[:1].clone()
        changed[:, t] = (changed[:, t] + 1) % V
        moved = (model(changed).view(T, -1) != before).any(-1)
        assert not moved[:t].any()
        assert moved[t:].all()


@pytest.mark.parametrize("cuts", [[T], [1] * T, [5] + [1] * 7, [3, 4, 1, 2, 2]])
def test_cached_decoding_equals_the_full_forward(policy, cuts):
    cache = policy.kv_cache(T)
    parts = [policy(part, cache) for part in TOKENS.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), policy(TOKENS))


def test_cache_goes_on_with_the_rows_that_are_kept(policy):
    cache, rows = policy.kv_cache(T), torch.tensor([3, 1])
    policy(TOKENS[:, :5], cache)
    for layer in cache:
        layer.keep_rows(rows)
    torch.testing.assert_close(policy(TOKENS[rows, 5:], cache), policy(TOKENS)[rows, 5:])


def test_more_tokens_than_the_context_are_refused(policy):
    cache = policy.kv_cache(T)
    policy(TOKENS, cache)
    with pytest.raises(ValueError, match="13 tokens do not fit the context of 12"):
        policy(torch.zeros(1, T + 1, dtype=torch.long))
    with pytest.raises(ValueError, match="13 tokens do not fit the context of 12"):
        policy(TOKENS[:, :1], cache)


@pytest.mark.parametrize("model", ["policy", "critic"])
def test_outputs_have_the_precision_of_the_weights_under_autocast(model, request):
    model = request.getfixturevalue(model).float()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(TOKENS)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, model(TOKENS), rtol=0.1, atol=0.1)
    assert not torch.equal(output, model(TOKENS))  # the matrix products were rounded


# The weights.

def test_gpt2_small_has_its_published_size():
    with torch.device("meta"):
        policy = GPT(GPTConfig(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768))
    assert sum(p.numel() for p in policy.parameters()) == 124_439_808


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
    loss = F.cross_entropy(policy(torch.arange(64)[None])[0], torch.arange(1, 65))
    assert loss.item() == pytest.approx(math.log(500), abs=0.1)  # nearly uniform


def test_every_parameter_gets_a_gradient(policy):
    F.cross_entropy(policy(TOKENS).flatten(0, 1), TOKENS.flatten()).backward()
    for name, p in policy.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name


def test_output_head_is_the_token_embedding(policy):
    logits = policy(TOKENS)
    policy.transformer.wte.weight.data[7] += 1  # a row that is read by token 7 alone, but written to logit 7
    others = (TOKENS == 7).cumsum(1) == 0  # (B, T): no 7 so far
    moved = (policy(TOKENS) != logits)[others]
    assert moved[:, 7].all() and moved.any(0).sum() == 1


def test_critic_starts_at_zero_on_a_copy_of_the_policys_trunk(policy):
    policy = policy.float()
    critic = Critic(CONFIG, policy)
    assert critic(TOKENS).shape == TOKENS.shape and (critic(TOKENS) == 0).all()
    assert torch.equal(critic.transformer(TOKENS), policy.transformer(TOKENS))
    assert not {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in critic.parameters()}
    nn.init.constant_(critic.value_head.weight, 0.5)
    torch.testing.assert_close(critic(TOKENS), 0.5 * policy.transformer(TOKENS).sum(-1))


@pytest.mark.parametrize("sizes", [dict(n_embd=10, n_head=4), dict(n_layer=0), dict(vocab_size=0),
                                   dict(block_size=-1), dict(n_embd=48.0), dict(n_head="2")])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError):
        GPTConfig(**{"vocab_size": 5} | sizes)


# GPT-2's weights.

X = torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(1))


def random_gpt():
    return disturbed(GPT(GPTConfig(vocab_size=50, block_size=32, n_layer=3, n_head=4, n_embd=48)), 0.1)


@pytest.fixture
def without_safetensors(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)  # its import raises ImportError


@pytest.fixture(params=["pytorch_model.bin", "model.safetensors"])
def weights_file(request):
    """Either format. Without safetensors, save_gpt2 writes the first."""
    if request.param == "model.safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")
    else:
        request.getfixturevalue("without_safetensors")
    return request.param


def test_weights_survive_the_round_trip(tmp_path, weights_file):
    ours = random_gpt()
    save_gpt2(ours, tmp_path / "gpt2", 49)
    assert {path.name for path in (tmp_path / "gpt2").iterdir()} == {"config.json", weights_file}
    again = load_gpt2(tmp_path / "gpt2")
    assert again.config == ours.config
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), ours.parameters()))


@torch.no_grad()
def test_transformers_computes_the_same_with_our_weights(tmp_path, weights_file, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    ours = random_gpt()
    save_gpt2(ours, tmp_path / "gpt2", 49)
    monkeypatch.undo()  # transformers itself needs safetensors
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()
    torch.testing.assert_close(ours(X), theirs(X).logits, rtol=0, atol=1e-4)
    assert theirs.config.eos_token_id == 49


@torch.no_grad()
@pytest.mark.parametrize("form", ["as saved", "trunk alone, in half precision, with causal masks"])
def test_we_compute_the_same_with_the_weights_of_transformers(tmp_path, form):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=48, n_layer=3, n_head=4)
    theirs = disturbed(transformers.GPT2LMHeadModel(config), 0.1).eval()
    theirs.save_pretrained(tmp_path)
    if form != "as saved":  # as the first release is stored
        theirs = theirs.half().float()
        state = {name: t.half() for name, t in theirs.transformer.state_dict().items()}
        state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(3)}
        state |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    ours = load_gpt2(tmp_path)
    assert ours.config == GPTConfig(50, 32, 3, 4, 48)
    assert all(p.dtype == torch.float32 for p in ours.parameters())
    torch.testing.assert_close(ours(X), theirs(X).logits, rtol=0, atol=1e-4)


def test_gpt2_stores_the_transpose_of_its_linear_layers_alone():
    state = random_gpt().state_dict()
    stored = transpose_linear(state)
    assert {name for name in state if stored[name].shape != state[name].shape} == {
        f"transformer.h.{i}.{layer}.weight" for i in range(3)
        for layer in ("attn.c_attn", "mlp.c_fc", "mlp.c_proj")}  # attn.c_proj is square
    square = "transformer.h.0.attn.c_proj.weight"
    assert torch.equal(stored[square], state[square].T) and stored[square].is_contiguous()
    assert all(torch.equal(transpose_linear(stored)[name], t) for name, t in state.items())


def saved_gpt2(folder):
    """A GPT-2's directory with a pytorch_model.bin, and its tensors."""
    save_gpt2(random_gpt(), folder, 49)
    return torch.load(folder / "pytorch_model.bin")


def test_every_wrong_tensor_is_named(tmp_path, without_safetensors):
    tensors = saved_gpt2(tmp_path / "gpt2")
    del tensors["transformer.h.1.ln_2.bias"]
    tensors["transformer.h.3.attn.c_attn.bias"] = torch.zeros(144)
    tensors["transformer.h.0.mlp.c_fc.weight"] = tensors["transformer.h.0.mlp.c_fc.weight"].T
    torch.save(tensors, tmp_path / "gpt2" / "pytorch_model.bin")
    with pytest.raises(BadInput) as e:
        load_gpt2(tmp_path / "gpt2")
    message = str(e.value)
    assert 'Missing key(s) in state_dict: "transformer.h.1.ln_2.bias".' in message
    assert 'Unexpected key(s) in state_dict: "transformer.h.3.attn.c_attn.bias".' in message
    assert "size mismatch for transformer.h.0.mlp.c_fc.weight" in message
    assert message.count("transformer.") == 3  # those and no other
    assert "\n" not in message


@pytest.mark.parametrize("changes, says", [
    (dict(n_layer=None), "n_layer"), (dict(n_head=5), "n_head 5"), (dict(n_embd="48"), "'48'"),
    (dict(n_embd=48.0), "48.0"), (dict(vocab_size=51), "wte.weight"),
    (dict(activation_function="relu"), "'relu'"), (dict(model_type="llama"), "'llama'"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    (dict(layer_norm_epsilon=1e-6), "1e-06"), (dict(tie_word_embeddings=False), "tie_word_embeddings")])
def test_a_configuration_of_another_model_is_refused(tmp_path, without_safetensors, changes, says):
    saved_gpt2(tmp_path / "gpt2")
    file = tmp_path / "gpt2" / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    with pytest.raises(BadInput, match=says):
        load_gpt2(tmp_path / "gpt2")


def test_damaged_and_hostile_files_are_refused_in_one_line(tmp_path, without_safetensors):
    folder, executed = tmp_path / "gpt2", tmp_path / "executed"
    tensors = saved_gpt2(folder)
    damaged = {"config.json": [b'{"n_embd": 4', b"\xff\xfe", b"[]", b"", None],
               "pytorch_model.bin": [(folder / "pytorch_model.bin").read_bytes()[:5000], b"", None,
                                     [1], {"transformer.wte.weight": "x"}, {"a": Malice(executed)},
                                     tensors | {"lm_head.weight": torch.zeros(50, 48)}]}
    for name, contents in damaged.items():
        whole = (folder / name).read_bytes()
        for content in contents:
            if content is None:
                (folder / name).unlink()
            elif isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                torch.save(content, folder / name)
            with pytest.raises(BadInput) as e:
                load_gpt2(folder)
            assert str(folder) in str(e.value) and "\n" not in str(e.value)
        (folder / name).write_bytes(whole)
    assert load_gpt2(folder) and not executed.exists()


def test_half_written_safetensors_are_refused(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")
    save_gpt2(random_gpt(), tmp_path / "gpt2", 49)
    file = tmp_path / "gpt2" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(BadInput, match="gpt2"):
        load_gpt2(tmp_path / "gpt2")
