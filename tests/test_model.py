import builtins
import json
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, Critic, GPTConfig, gpt2_layout
from test_rollout import Malice

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
    x, cache = tokens(4, 12), policy.kv_cache(12)
    parts = [policy(part, cache) for part in x.split(cuts, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), policy(x))


def test_cache_keeps_the_rows_that_it_is_told_to(policy):
    x, cache, rows = tokens(4, 6), policy.kv_cache(12), torch.tensor([3, 1])
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
    cache = policy.kv_cache(12)
    policy(tokens(1, 12), cache)
    with pytest.raises(ValueError, match="context"):
        policy(tokens(1, 1), cache)


@pytest.mark.parametrize("sizes", [dict(n_embd=10, n_head=4), dict(n_layer=0), dict(vocab_size=0)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(ValueError):
        GPTConfig(**{"vocab_size": 5, **sizes})


# GPT-2's weights.

def random_gpt():
    policy = GPT(GPTConfig(vocab_size=50, block_size=32, n_layer=3, n_head=4, n_embd=48), torch.Generator().manual_seed(0))
    for i, p in enumerate(policy.parameters()):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return policy


@pytest.fixture(params=["pytorch_model.bin", "model.safetensors"])
def weights_file(request, monkeypatch):
    """Either format; without safetensors to_gpt2 writes the first."""
    if request.param == "model.safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")
    else:
        forbid_safetensors(monkeypatch)
    return request.param


def forbid_safetensors(monkeypatch):
    honest = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return honest(name, *args, **kwargs)
    monkeypatch.setattr(builtins, "__import__", without)


X = torch.randint(50, (4, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_weights_out_and_in_again(tmp_path, weights_file):
    ours = random_gpt()
    ours.to_gpt2(tmp_path / "gpt2", 49)
    assert {p.name for p in (tmp_path / "gpt2").iterdir()} == {"config.json", weights_file}
    again = GPT.from_gpt2(tmp_path / "gpt2")
    assert again.config == ours.config and torch.equal(again(X), ours(X))
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), ours.parameters()))


@torch.no_grad()
def test_transformers_opens_what_we_write(tmp_path, weights_file, monkeypatch):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    ours = random_gpt()
    ours.to_gpt2(tmp_path / "gpt2", 49)
    monkeypatch.undo()  # transformers needs safetensors itself
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2").eval()
    torch.testing.assert_close(ours(X), theirs(X).logits, rtol=0, atol=1e-4)
    assert ours(X).std() > 0.3 and theirs.config.eos_token_id == 49


@torch.no_grad()
@pytest.mark.parametrize("form", ["as saved", "trunk alone, in half precision, with its masks"])
def test_we_open_what_transformers_writes(tmp_path, form):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: pip install transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=48, n_layer=3, n_head=4)).eval()
    for i, p in enumerate(theirs.parameters()):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    theirs.save_pretrained(tmp_path)
    if form != "as saved":  # as OpenAI's own weights are kept
        theirs = theirs.half().float()
        state = {name: t.half() for name, t in theirs.transformer.state_dict().items()}
        state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(3)}
        state |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
        torch.save(state, tmp_path / "pytorch_model.bin")
        (tmp_path / "model.safetensors").unlink()
    ours = GPT.from_gpt2(tmp_path)
    assert ours.config == GPTConfig(50, 32, 3, 4, 48) and all(p.dtype == torch.float32 for p in ours.parameters())
    torch.testing.assert_close(ours(X), theirs(X).logits, rtol=0, atol=1e-4)


def test_every_wrong_tensor_is_named(tmp_path, monkeypatch):
    forbid_safetensors(monkeypatch)
    random_gpt().to_gpt2(tmp_path / "gpt2", 49)
    file = tmp_path / "gpt2" / "pytorch_model.bin"
    state = torch.load(file)
    del state["transformer.h.1.ln_2.bias"], state["transformer.ln_f.weight"]
    state["transformer.h.0.mlp.c_fc.weight"] = state["transformer.h.0.mlp.c_fc.weight"].T
    state["transformer.h.3.attn.c_attn.bias"] = torch.zeros(144)
    torch.save(state, file)
    with pytest.raises(ValueError) as e:
        GPT.from_gpt2(tmp_path / "gpt2")
    for words in ("h.1.ln_2.bias is missing", "transformer.ln_f.weight is missing", "h.3.attn.c_attn.bias is unexpected",
                  "h.0.mlp.c_fc.weight is (192, 48) in place of (48, 192)"):
        assert words in str(e.value)
    assert "\n" not in str(e.value) and str(e.value).count(",") == 3 + 2  # those four and no other


@pytest.mark.parametrize("damage, says", [
    (lambda d: (d / "config.json").unlink(), "config.json"), (lambda d: (d / "config.json").write_text('{"n_embd": 4'), "config.json"),
    (lambda d: (d / "config.json").write_bytes(b"\xff\xfe"), "config.json"), (lambda d: (d / "config.json").write_text("[]"), "config.json"),
    (lambda d: edit(d, n_layer=None), "lacks 'n_layer'"), (lambda d: edit(d, n_head=5), "n_head 5"), (lambda d: edit(d, n_embd="48"), "config.json"), (lambda d: edit(d, n_embd=48.0), "config.json"),
    (lambda d: edit(d, activation_function="relu"), "activation_function is 'relu'"), (lambda d: edit(d, n_inner=100), "n_inner is 100"),
    (lambda d: edit(d, model_type="llama"), "model_type is 'llama'"),
    (lambda d: edit(d, scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    (lambda d: edit(d, layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"), (lambda d: edit(d, tie_word_embeddings=False), "tie_word"), (lambda d: edit(d, vocab_size=51), "wte.weight is (50, 48)"),
    (lambda d: (d / "pytorch_model.bin").unlink(), "there is no"), (lambda d: cut(d / "pytorch_model.bin"), "half-written"),
    (lambda d: (d / "pytorch_model.bin").write_bytes(b""), "half-written"), (lambda d: torch.save([1], d / "pytorch_model.bin"), "damaged"),
    (lambda d: torch.save({"transformer.wte.weight": "x"}, d / "pytorch_model.bin"), "damaged"),
    (lambda d: torch.save({"a": Malice(d / "executed")}, d / "pytorch_model.bin"), "damaged"),
    (lambda d: torch.save({**torch.load(d / "pytorch_model.bin"), "lm_head.weight": torch.zeros(50, 48)}, d / "pytorch_model.bin"), "lm_head"),
    (lambda d: ((d / "pytorch_model.bin").unlink(), (d / "model.safetensors").write_bytes(b"x")), "pip install safetensors")])
def test_a_damaged_gpt2_is_refused_in_one_line(tmp_path, monkeypatch, damage, says):
    forbid_safetensors(monkeypatch)
    d = tmp_path / "gpt2"
    random_gpt().to_gpt2(d, 49)
    damage(d)
    with pytest.raises(ValueError) as e:
        GPT.from_gpt2(d)
    assert says in str(e.value) and "\n" not in str(e.value) and str(d) in str(e.value)
    assert not (d / "executed").exists()


def test_half_written_safetensors(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")
    random_gpt().to_gpt2(tmp_path / "gpt2", 49)
    cut(tmp_path / "gpt2" / "model.safetensors")
    with pytest.raises(ValueError, match="half-written"):
        GPT.from_gpt2(tmp_path / "gpt2")


def cut(file):
    file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])


def edit(directory, **changes):
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def test_the_layout_is_its_own_inverse():
    state = random_gpt().state_dict()
    there = gpt2_layout(state)
    assert there["transformer.h.0.mlp.c_fc.weight"].shape == (48, 192) and there["transformer.wpe.weight"].shape == (32, 48)
    assert all(torch.equal(gpt2_layout(there)[name], t) for name, t in state.items())
