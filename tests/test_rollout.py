import torch
import pytest

import rollout
from model import GPT, GPTConfig
from rollout import BadInput, Tokenizer, draw, load_checkpoint, sample, save_checkpoint

EOS = 5
TEXTS = ["the acting was superb.", "the plot was dull, and the acting was superb."] * 50
PROMPTS = [[1], [0, 2, 3, 4], [4, 4], [1, 2, 0, 3, 2, 1], [2, 3, 3], [3, EOS, 1]]


@pytest.fixture
def policy():
    """A random policy of 6 tokens, decided enough that its choices depend on what it read."""
    policy = GPT(GPTConfig(vocab_size=6, block_size=20, n_layer=2, n_head=2, n_embd=16), torch.Generator().manual_seed(3))
    for p in policy.parameters():
        p.data *= 8
    return policy


# Tokenizer.

@pytest.mark.parametrize("text", ["the acting was superb.", "", " two  spaces\n", "naïve 中文 🎬", "<|endoftext|>"])
def test_text_survives_the_round_trip(text):
    tokenizer = Tokenizer.learn(TEXTS, 270)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token not in tokenizer.encode(text)


def test_learned_vocabulary():
    tokenizer = Tokenizer.learn(TEXTS, 280)
    assert tokenizer.vocab_size == 280 and tokenizer.eos_token == 279
    assert len(tokenizer.encode(TEXTS[0])) < len(Tokenizer.learn(TEXTS, 257).encode(TEXTS[0])) == len(TEXTS[0])
    prompt, rest = "the acting", " was superb."  # a prompt is cut out of the text at a word's end
    assert tokenizer.encode(prompt) + tokenizer.encode(rest) == tokenizer.encode(prompt + rest)


def test_tokenizer_state_is_plain_and_complete():
    tokenizer = Tokenizer.learn(TEXTS, 280)
    again = Tokenizer.from_state(tokenizer.state())
    assert all(isinstance(s, str) for s in tokenizer.state())
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1]) and again.eos_token == tokenizer.eos_token


@pytest.mark.parametrize("size", [100, 100_000])
def test_a_vocabulary_that_cannot_be_learned(size):
    with pytest.raises(BadInput, match="--vocab-size"):
        Tokenizer.learn(TEXTS, size)


def test_gpt2_vocabulary_that_cannot_be_fetched(monkeypatch):
    def no_network(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(rollout.tiktoken, "get_encoding", no_network)
    with pytest.raises(BadInput, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer.gpt2()


# Drawing.

def test_draw_follows_the_distribution():
    p = torch.tensor([0.1, 0.0, 0.5, 0.25, 0.15, 0.0])
    uniforms = torch.arange(1, 1001) / 1000  # evenly spread, so each count is exact but for rounding at the borders
    counts = draw(p.log().expand(1000, 6), uniforms).bincount(minlength=6)
    assert (counts - 1000 * p).abs().max() <= 1
    assert counts[1] == counts[5] == 0


@pytest.mark.parametrize("u", [2.0 ** -24, 1.0])
def test_draw_never_takes_what_has_no_probability(u):
    logp = torch.full((1, 4), -float("inf"))
    logp[0, 2] = 0.0
    assert draw(logp, torch.tensor([u])).item() == 2


# Sampling.

def by_hand(policy, prompt, max_new_tokens, uniforms, temperature):
    """One row, without cache or batch: the definition of sampling."""
    tokens = list(prompt)
    for u in uniforms[:max_new_tokens]:
        logits = policy(torch.tensor([tokens]))[0, -1]
        cdf = (logits / temperature).softmax(-1).cumsum(-1) if temperature else None
        tokens.append(int((cdf < u * cdf[-1]).sum()) if temperature else int(logits.argmax()))
        if tokens[-1] == EOS:
            break
    return tokens


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_a_mixed_batch_gives_each_row_what_it_gets_alone(policy, temperature):
    prompts = PROMPTS * 5
    generator = torch.Generator().manual_seed(7)
    r = sample(policy, prompts, 13, EOS, temperature, generator)
    uniforms = 1 - torch.rand(len(prompts), 13, generator=generator.manual_seed(7))
    lengths = set()
    for b, prompt in enumerate(prompts):
        tokens = by_hand(policy, prompt, 13, uniforms[b].tolist(), temperature)
        lengths.add(len(tokens))
        assert r.tokens[b, :len(tokens)].tolist() == tokens
        assert (r.tokens[b, len(tokens):] == EOS).all()  # filler
        # The mask covers what was chosen, the end of text too, and nothing before or after.
        assert r.mask[b].tolist() == [len(prompt) <= t < len(tokens) for t in range(1, r.tokens.shape[1])]
    assert r.tokens.shape[1] == max(lengths)
    # What it was drawn from is what a forward pass over the whole rows gives, at the temperature.
    expected = (policy(r.tokens[:, :-1]) / (temperature or 1)).log_softmax(-1)
    torch.testing.assert_close(r.logp[r.mask], expected[r.mask], rtol=1e-4, atol=1e-4)
    assert r.logp.shape == expected.shape and r.logp.isfinite().all()
    assert temperature == 0 or len(lengths) > 3  # the batch was mixed at its ends as well


def test_sampling_keeps_the_policys_precision(policy):
    r = sample(policy.double(), PROMPTS, 4, EOS)
    assert r.logp.dtype == torch.float64
    torch.testing.assert_close(r.logp[r.mask], policy(r.tokens[:, :-1]).log_softmax(-1)[r.mask])


def test_a_row_stops_after_max_new_tokens(policy):
    r = sample(policy, PROMPTS * 5, 3, EOS, generator=torch.Generator().manual_seed(0))
    assert r.mask.sum(1).max() == 3 and r.mask.sum(1).min() >= 1


def test_sampling_ends_when_all_rows_have(policy):
    calls = []

    class Ender(torch.nn.Module):
        config, kv_cache = policy.config, policy.kv_cache

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, cache):
            calls.append(tokens.shape)
            logits = torch.zeros(*tokens.shape, 6)
            logits[..., EOS] = 100
            return logits

    r = sample(Ender(), [[1], [2]], 19, EOS)
    assert r.tokens.tolist() == [[1, EOS], [2, EOS]] and r.mask.all()
    assert len(calls) <= 4


def test_rollout_can_be_trained_on(policy):
    r = sample(policy, PROMPTS, 4, EOS)
    policy(r.tokens[:, :-1]).sum().backward()  # fails on tensors made in inference mode
    assert policy.transformer.wte.weight.grad is not None


def test_completions_are_the_text_between_prompt_and_end():
    tokenizer = Tokenizer.learn(TEXTS, 257)
    eos = tokenizer.eos_token
    text = lambda s: list(s.encode())
    tokens = torch.tensor([text("ab") + text("cd") + [eos], text("abc") + [eos, eos]])
    mask = torch.tensor([[False, True, True, True], [False, False, True, False]])
    assert rollout.Rollout(tokens, mask, None).completions(tokenizer) == ["cd", ""]


def test_prompts_that_cannot_be_completed(policy):
    with pytest.raises(BadInput, match="empty"):
        sample(policy, [[1], []], 4, EOS)
    with pytest.raises(BadInput, match="context of 20"):
        sample(policy, [[1] * 18], 4, EOS)


# Files.

class Malice:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_checkpoint_round_trip_and_damage(tmp_path):
    tokenizer, path = Tokenizer.learn(TEXTS, 262), tmp_path / "checkpoint.pt"
    policy = GPT(GPTConfig(262, 16, 1, 2, 8))
    save_checkpoint(path, policy, tokenizer, iteration=7)
    again, tokenizer2, more = load_checkpoint(tmp_path)
    assert torch.equal(again(torch.tensor([[1, 2]])), policy(torch.tensor([[1, 2]])))
    assert tokenizer2.encode("acting") == tokenizer.encode("acting")
    assert more == {"iteration": 7} and list(tmp_path.iterdir()) == [path]

    whole = path.read_bytes()
    state = torch.load(path)
    misfit = dict(state, model=dict(state["model"], n_embd=16))
    for damage in [lambda: path.write_bytes(whole[:len(whole) // 2]), lambda: path.write_bytes(b""),
                   lambda: path.write_text("not a checkpoint"), lambda: torch.save([1, 2], path),
                   lambda: torch.save({"policy": Malice(tmp_path / "executed")}, path), lambda: torch.save(misfit, path), path.unlink]:
        damage()
        with pytest.raises(BadInput, match="checkpoint.pt") as e:
            load_checkpoint(tmp_path)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "executed").exists()


def test_command_line(tmp_path, capsys):
    save_checkpoint(tmp_path / "checkpoint.pt", GPT(GPTConfig(262, 16, 1, 2, 8)), Tokenizer.learn(TEXTS, 262),
                    config={"temperature": 1.0})
    assert rollout.main([str(tmp_path), "--prompt", "the", "-n", "2", "--max-new-tokens", "3"]) is None
    first = capsys.readouterr().out
    assert first.startswith("the") and first.count("the") >= 2
    rollout.main([str(tmp_path), "--prompt", "the", "-n", "2", "--max-new-tokens", "3"])
    assert capsys.readouterr().out == first  # the same seed, the same text
    for bad in [["nowhere"], [str(tmp_path), "-n", "0"], [str(tmp_path), "--temperature", "-1"], [str(tmp_path), "--what"],
                [str(tmp_path), "--max-new-tokens", "99"], [str(tmp_path), "--max-new-tokens", "0"], [str(tmp_path), "--seed", "-1"],
                [str(tmp_path), "--temperature", "nan"]]:
        assert rollout.main(bad + ["--prompt", "the"]) == 2
        out = capsys.readouterr()
        assert out.err.startswith("error: ") and out.err.count("\n") == 1 and not out.out
