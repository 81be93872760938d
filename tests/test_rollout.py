"""The tokenizer, sampling, checkpoints, the weights of --init, and the command line of rollout.py."""

import io
import itertools
import json
import math
import random
import re
import shutil
import subprocess
import sys

import pytest
import tiktoken
import torch

import rollout
from helpers import ROOT, Malice, contents
from model import GPT, BadInput, GPTConfig, load_gpt2, save_gpt2, transpose_linear
from rollout import (Rollout, Tokenizer, check_fit, draw, load_checkpoint, load_weights, sample,
                     save_checkpoint, truncate, write_atomically)

TEXTS = ["the acting was superb.", "the plot was dull, and the acting was superb."] * 50
POEM = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# Tokenizer.

@pytest.mark.parametrize("text", ["the acting was superb.", "", " two  spaces\n", "naïve 中文 🎬", POEM,
                                  "<|endoftext|>", "\x00\ttab\r\n"])
def test_any_text_survives_the_round_trip(text):
    tokenizer = Tokenizer.learn(TEXTS, 270)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode([*tokens, tokenizer.eos_token]) == text
    assert tokenizer.eos_token not in tokens
    assert tokenizer.token_bytes()[tokens].sum() == len(text.encode())


def test_learned_vocabulary_has_bytes_and_merges_and_the_end_of_text():
    tokenizer = Tokenizer.learn(TEXTS, 280)
    assert tokenizer.vocab_size == 280 and tokenizer.eos_token == 279
    assert tokenizer.token_bytes()[tokenizer.eos_token] == 1
    assert (tokenizer.token_bytes() == 1).sum() == 257
    only_bytes = Tokenizer.learn(TEXTS, 257)
    assert only_bytes.encode(TEXTS[0]) == list(TEXTS[0].encode())
    assert len(tokenizer.encode(TEXTS[0])) < len(TEXTS[0])
    with pytest.raises(ValueError):
        Tokenizer.learn(TEXTS, 256)


def test_the_most_frequent_pairs_are_merged_first():
    """The worked example of Sennrich et al. 2016: the merges are e s, es t, l o, lo w."""
    corpus = " ".join(["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3)
    tokens = [bytes.fromhex(token) for token in Tokenizer.learn([corpus], 261).state()["tokens"]]
    assert len(tokens) == 260 and tokens[257] == b"est" and tokens[259] == b"low"  # e s ties with s t


def test_a_prompt_that_ends_with_a_word_has_the_tokens_of_the_whole_text():
    tokenizer = Tokenizer.learn(TEXTS, 280)
    for prompt, rest in [("the acting", " was superb."), ("the acting was 春眠", "不觉晓 superb.")]:
        assert tokenizer.encode(prompt) + tokenizer.encode(rest) == tokenizer.encode(prompt + rest)


def test_a_chinese_prompt_may_end_after_any_character():
    tokenizer = Tokenizer.learn([POEM] * 50, 300)
    for i in range(len(POEM)):
        assert tokenizer.encode(POEM[:i]) + tokenizer.encode(POEM[i:]) == tokenizer.encode(POEM)
    assert len(tokenizer.encode(POEM)) < 0.7 * len(POEM.encode())


def test_vocabulary_is_learned_from_a_sample_of_all_texts(monkeypatch):
    train, samples = tiktoken._educational.bpe_train, []

    def record(data, *args, **options):
        samples.append(data)
        return train(data, *args, **options)
    monkeypatch.setattr(tiktoken._educational, "bpe_train", record)
    texts = ["the acting was superb. " * 10_000, "two plots", POEM * 10_000]
    Tokenizer.learn(texts, 270, sample_size=10_000)
    [data] = samples
    assert 9000 < len(data) < 12_000
    for text, opening in zip(texts[::2], ("acting", "春眠")):  # by its share of the characters
        assert data.count(opening) / 10_000 == pytest.approx(text.count(opening) / 470_000, rel=0.2)


def test_vocabulary_is_smaller_where_the_corpus_has_too_little_to_merge():
    few = Tokenizer.learn(["1 2 3 sorted", "3 2 1 sorted"], 512)
    merges = len(" sorted") - 1 + len("sorted") - 1 + 3  # at most; and " 1", " 2", " 3"
    assert 257 < few.vocab_size <= 257 + merges
    assert few.decode(few.encode("2 1 3 sorted")) == "2 1 3 sorted"


def test_tokenizer_state_is_plain_and_complete():
    tokenizer = Tokenizer.learn(TEXTS, 280)
    state = json.loads(json.dumps(tokenizer.state()))
    again = Tokenizer.from_state(state)
    assert state == tokenizer.state() == again.state()
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert (again.eos_token, again.vocab_size, again.name) == (279, 280, "bpe")


@pytest.mark.parametrize("change", [lambda tokens: tokens[1:], lambda tokens: tokens + tokens[-1:],
                                    lambda tokens: tokens + ["x"]])
def test_vocabulary_without_a_byte_or_with_a_token_twice_is_refused(change):
    state = Tokenizer.learn(TEXTS, 280).state()
    with pytest.raises(ValueError):
        Tokenizer.from_state(state | {"tokens": change(state["tokens"])})


def test_gpt2_splits_words_as_tiktoken_does():
    public = pytest.importorskip("tiktoken_ext.openai_public")
    if not hasattr(public, "r50k_pat_str"):
        pytest.skip("this tiktoken does not name GPT-2's pattern")
    merges = Tokenizer.learn(["  it's 12  words,\n\n and  we'll see\t \n", "   a b   c\n \n"] * 50, 300)
    ranks = {bytes.fromhex(token): i for i, token in enumerate(merges.state()["tokens"])}
    ours, theirs = (tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
                    for pattern in (rollout.GPT2_SPLIT, public.r50k_pat_str))
    rng = random.Random(0)
    pieces = ["a", "it", "'s", "'ll", " ", " ", "  ", "\n", "\t", "7", ",", "é", "中", "\u3000"]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=12))
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


def test_gpt2_vocabulary_without_a_network_is_bad_input(monkeypatch):
    def no_network(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(rollout.tiktoken, "get_encoding", no_network)
    with pytest.raises(BadInput, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer.gpt2()


# Drawing a token.

def test_draw_inverts_the_cumulative_distribution():
    p = torch.tensor([0.125, 0.0, 0.5, 0.25, 0.125, 0.0])
    uniforms = torch.arange(1, 1025) / 1024  # equally spaced, so that each count is exact
    for constant in (0.0, 3.0):  # log-probabilities up to a constant
        drawn = draw((p.log() + constant).expand(1024, 6), uniforms)
        assert torch.equal(drawn, drawn.sort().values)
        assert torch.equal(drawn.bincount(minlength=6), (1024 * p).long())


@pytest.mark.parametrize("token", range(4))
@pytest.mark.parametrize("uniform", [2.0 ** -24, 0.5, 1.0])  # the least and the greatest that sample draws
def test_draw_never_takes_a_token_of_probability_zero(token, uniform):
    logp = torch.full((1, 4), -math.inf)
    logp[0, token] = 0.0
    assert draw(logp, torch.tensor([uniform])).item() == token


def test_draw_stays_in_the_vocabulary_where_the_policy_is_not_finite():
    assert draw(torch.full((1, 4), math.nan), torch.tensor([0.5])).item() < 4


@pytest.mark.parametrize("top_k, top_p", [(0, 0.5), (0, 0.9), (3, 1.0), (1, 1.0), (4, 0.6), (0, 1e-9),
                                          (99, 1.0)])
def test_truncate_equals_its_definition(top_k, top_p):
    logp = (2 * torch.randn(50, 9, generator=seeded(0))).log_softmax(-1)
    for row, kept in zip(logp.tolist(), truncate(logp, top_k, top_p).tolist()):
        expected, held = [-math.inf] * 9, 0.0
        for rank, token in enumerate(sorted(range(9), key=lambda token: -row[token])):
            if held >= top_p or top_k and rank == top_k:
                break
            expected[token] = row[token]
            held += math.exp(row[token])
        assert kept == expected


# Sampling.

EOS = 5
PROMPTS = [[1], [0, 2, 3, 4], [4, 4], [1, 2, 0, 3, 2, 1], [2, 3, 3], [3, EOS, 1]]


@pytest.fixture
def policy():
    """A random policy of 6 tokens whose choices depend on what it read."""
    policy = GPT(GPTConfig(vocab_size=6, block_size=20, n_layer=2, n_head=2, n_embd=16), seeded(3))
    for p in policy.parameters():
        p.data *= 8
    return policy


@torch.no_grad()
def complete_alone(policy, prompt, uniforms, temperature):
    """The definition of sampling: one row, without a cache."""
    tokens = list(prompt)
    for u in uniforms:
        logits = policy(torch.tensor([tokens]))[0, -1]
        if temperature == 0:
            tokens.append(int(logits.argmax()))
        else:
            cdf = (logits / temperature).softmax(-1).cumsum(-1)
            tokens.append(int((cdf < u * cdf[-1]).sum()))
        if tokens[-1] == EOS:
            break
    return tokens


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_each_row_of_a_batch_gets_what_it_would_get_alone(policy, temperature):
    prompts, batch_sizes = PROMPTS * 5, []
    hook = policy.register_forward_pre_hook(lambda module, args: batch_sizes.append(len(args[0])))
    r = sample(policy, prompts, 13, EOS, temperature, seeded(7))
    hook.remove()
    uniforms = (1 - torch.rand(len(prompts), 13, generator=seeded(7))).tolist()
    alone = [complete_alone(policy, *pair, temperature) for pair in zip(prompts, uniforms)]

    T = r.tokens.shape[1]
    assert T == max(map(len, alone))
    assert r.tokens.tolist() == [tokens + [EOS] * (T - len(tokens)) for tokens in alone]
    # The mask has what was chosen, with the end of text, but neither the prompt nor the filler.
    assert r.mask.tolist() == [[len(prompt) <= t < len(tokens) for t in range(1, T)]
                               for prompt, tokens in zip(prompts, alone)]
    # The log-probabilities are those of a full forward pass.
    logp = (policy(r.tokens[:, :-1]) / (temperature or 1)).log_softmax(-1)
    assert r.logp.shape == logp.shape and r.logp.isfinite().all()
    torch.testing.assert_close(r.logp[r.mask], logp[r.mask], rtol=1e-4, atol=1e-4)
    if temperature:  # rows end at different times, and the finished ones are not computed any more
        assert len({len(tokens) - len(prompt) for prompt, tokens in zip(prompts, alone)}) > 3
        assert batch_sizes == sorted(batch_sizes, reverse=True) and batch_sizes[-1] < batch_sizes[0] == 30


@torch.no_grad()
def test_completions_occur_as_often_as_the_policy_says(policy):
    """All completions of at most 3 tokens are enumerated; each count is within 5 standard deviations."""
    n, temperature, T = 20_000, 1.5, 3
    completions = [c for k in range(1, T + 1) for c in itertools.product(range(6), repeat=k)
                   if EOS not in c[:-1] and (k == T or c[-1] == EOS)]
    expected = {}
    for c in completions:
        logp = (policy(torch.tensor([[1, *c]])) / temperature).log_softmax(-1)[0]
        expected[c] = math.exp(sum(logp[t, token].item() for t, token in enumerate(c)))
    assert sum(expected.values()) == pytest.approx(1, abs=1e-5)

    r = sample(policy, [[1]] * n, T, EOS, temperature, seeded(0))
    drawn = [tuple(row[1:][mask].tolist()) for row, mask in zip(r.tokens, r.mask)]
    counts = {c: 0 for c in completions}
    for c in drawn:
        counts[c] += 1
    for c, p in expected.items():
        assert abs(counts[c] - n * p) <= 5 * math.sqrt(n * p) + 1, c


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(top_k=2), dict(top_p=0.6)])
def test_truncated_tokens_are_never_sampled(policy, options):
    r = sample(policy, PROMPTS * 20, 8, EOS, 1.0, seeded(1), **options)
    logp = policy(r.tokens[:, :-1]).log_softmax(-1)[r.mask]
    allowed = truncate(logp, **options) > -math.inf
    assert allowed.gather(1, r.tokens[:, 1:][r.mask][:, None]).all()
    torch.testing.assert_close(r.logp[r.mask], logp, rtol=1e-4, atol=1e-4)  # not truncated


def test_truncation_to_one_token_is_greedy_and_to_all_is_none(policy):
    tokens = lambda *options: sample(policy, PROMPTS * 20, 8, EOS, *options).tokens
    assert torch.equal(tokens(1.0, seeded(1), 1), tokens(0))
    assert torch.equal(tokens(1.0, seeded(1), 6), tokens(1.0, seeded(1)))


def test_a_row_chooses_at_most_max_new_tokens(policy):
    r = sample(policy, PROMPTS * 5, 3, EOS, 1.0, seeded(0))
    assert r.mask.sum(1).max() == 3 and r.mask.sum(1).min() >= 1


def test_sampling_ends_when_all_rows_have_ended(policy):
    policy.transformer.ln_f.weight.data.zero_()
    policy.transformer.ln_f.bias.data = 100 * policy.transformer.wte.weight[EOS].detach()
    calls = []
    policy.register_forward_pre_hook(lambda module, args: calls.append(args))
    r = sample(policy, [[1], [2]], 19, EOS, 0)
    assert r.tokens.tolist() == [[1, EOS], [2, EOS]] and r.mask.tolist() == [[True], [True]]
    assert len(calls) <= 4  # asked at every fourth token


def test_a_rollout_has_the_precision_of_the_policy_and_can_be_trained_on(policy):
    r = sample(policy.double(), PROMPTS, 4, EOS)
    logp = policy(r.tokens[:, :-1]).log_softmax(-1)
    torch.testing.assert_close(r.logp[r.mask], logp[r.mask])
    assert not r.logp.requires_grad
    (logp - r.logp).exp()[r.mask].sum().backward()  # fails on tensors made in inference mode
    assert policy.transformer.wte.weight.grad is not None


def test_completions_are_the_text_between_the_prompt_and_the_end():
    tokenizer = Tokenizer.learn(TEXTS, 257)
    end = [tokenizer.eos_token]
    tokens = torch.tensor([[*b"abcd"] + end, [*b"abc"] + 2 * end])
    mask = torch.tensor([[False, True, True, True], [False, False, True, False]])
    assert Rollout(tokens, mask, None).completions(tokenizer) == ["cd", ""]


def test_prompts_that_cannot_be_completed_are_refused(policy):
    with pytest.raises(ValueError, match="empty"):
        sample(policy, [[1], []], 4, EOS)
    with pytest.raises(ValueError, match="22 tokens exceed the context 20"):
        sample(policy, [[1] * 18], 4, EOS)
    tokenizer = Tokenizer.learn(TEXTS, 257)
    check_fit(["abc"], tokenizer, 4, 7)
    with pytest.raises(BadInput, match="'abcd' has 4 tokens; 4 more exceed the context of 7"):
        check_fit(["abc", "abcd"], tokenizer, 4, 7)
    with pytest.raises(BadInput, match="empty"):
        check_fit([""], tokenizer, 4, 7)


# Checkpoints.

TINY_GPT = GPTConfig(262, 24, 1, 2, 8)
X = torch.tensor([[1, 2, 3]])


def tiny_gpt(seed=0):
    policy = GPT(TINY_GPT, seeded(seed))
    for i, p in enumerate(policy.parameters()):
        p.data += 0.3 * torch.randn(p.shape, generator=seeded(100 * seed + i))
    return policy


def same_policy(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_checkpoint_survives_the_round_trip(tmp_path):
    policy, before, tokenizer = tiny_gpt(0), tiny_gpt(1), Tokenizer.learn(TEXTS, 262)
    path = tmp_path / "run" / "checkpoint.pt"
    save_checkpoint(path, policy, tokenizer, history=[{"kl": 0.5}])
    again, reference, tokenizer_again, more = load_checkpoint(tmp_path / "run")
    assert same_policy(again, policy) and same_policy(reference, policy) and reference is not again
    assert tokenizer_again.state() == tokenizer.state() and more == {"history": [{"kl": 0.5}]}

    save_checkpoint(path, policy, tokenizer, reference=before.state_dict())
    again, reference, _, more = load_checkpoint(path)
    assert same_policy(again, policy) and same_policy(reference, before) and more == {}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("no space"), RuntimeError("two\nlines"), KeyboardInterrupt()])
def test_a_failing_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new, but only h")
        file.flush()
        assert path.read_bytes() == b"old"
        raise error
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else BadInput) as e:
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    if e.type is BadInput:
        assert str(path) in str(e.value) and "\n" not in str(e.value) and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda file: file.write(b"new"))
    assert contents(tmp_path) == {path: b"new"}


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path):
    resource = pytest.importorskip("resource", reason="file size limits are Unix's")
    path, tokenizer = tmp_path / "checkpoint.pt", Tokenizer.learn(TEXTS, 262)
    save_checkpoint(path, tiny_gpt(0), tokenizer)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(BadInput, match="cannot write"):
            save_checkpoint(path, tiny_gpt(1), tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert same_policy(load_checkpoint(path)[0], tiny_gpt(0)) and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_bad_input(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="cannot write"):
        write_atomically(tmp_path / "file" / "checkpoint.pt", lambda file: None)


def test_damaged_and_hostile_checkpoints_are_refused_in_one_line(tmp_path):
    path, executed = tmp_path / "checkpoint.pt", tmp_path / "executed"
    save_checkpoint(path, tiny_gpt(), Tokenizer.learn(TEXTS, 262), config={"temperature": 1.0})
    whole, state = path.read_bytes(), torch.load(path)
    model, tokenizer = state["model"], state["tokenizer"]
    wider = GPT(GPTConfig(262, 24, 1, 2, 16)).state_dict()
    for damage in [whole[:len(whole) // 2], b"", b"it was the best of times", [1, 2], {},
                   Malice(executed), state | {"policy": Malice(executed)},
                   state | {"policy": wider}, state | {"reference": wider}, state | {"policy": None},
                   state | {"model": model | {"n_embd": 16}}, state | {"model": model | {"n_embd": 2 ** 40}},
                   state | {"model": model | {"n_layer": 10 ** 9}}, state | {"model": model | {"depth": 2}},
                   state | {"tokenizer": tokenizer | {"tokens": tokenizer["tokens"][:-1]}},
                   state | {"tokenizer": tokenizer | {"name": "latin"}},
                   state | {"config": {"temperature": math.nan}}, state | {"config": {"temperature": "hot"}}]:
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            torch.save(damage, path)
        with pytest.raises(BadInput, match="checkpoint.pt is damaged") as e:
            load_checkpoint(tmp_path)
        assert "\n" not in str(e.value)
    path.unlink()
    with pytest.raises(BadInput, match="no checkpoint at"):
        load_checkpoint(tmp_path)
    assert not executed.exists()


# Weights to start from.

def test_weights_come_from_a_run_or_a_checkpoint_or_a_gpt2(tmp_path, gpt2_vocabulary):
    policy = tiny_gpt()
    save_checkpoint(tmp_path / "checkpoint.pt", policy, Tokenizer.learn(TEXTS, 262))
    for init in (tmp_path, tmp_path / "checkpoint.pt"):
        again, tokenizer = load_weights(str(init))
        assert same_policy(again, policy) and tokenizer.name == "bpe"
    policy = GPT(GPTConfig(50257, 16, 1, 2, 8))
    save_gpt2(policy, tmp_path / "gpt2", 50256)
    again, tokenizer = load_weights(str(tmp_path / "gpt2"))
    assert same_policy(again, policy) and tokenizer.name == "gpt2" and tokenizer.eos_token == 50256


def test_weights_that_cannot_be_had_are_bad_input(tmp_path, monkeypatch):
    def no_network(url, path):
        raise ConnectionError(url)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    save_gpt2(tiny_gpt(), tmp_path / "other", 261)
    (tmp_path / "empty").mkdir()
    for init, says in {"gpt2": f"into {tmp_path / 'hub' / 'gpt2'}", tmp_path / "other": "262 tokens",
                       tmp_path / "empty": "config.json", tmp_path / "nowhere": "no checkpoint at"}.items():
        with pytest.raises(BadInput, match=re.escape(says)) as e:
            load_weights(str(init))
        assert "\n" not in str(e.value)


def test_gpt2_is_downloaded_once(tmp_path, monkeypatch, gpt2_vocabulary):
    policy, fetched = GPT(GPTConfig(50257, 16, 1, 2, 8)), []
    save_gpt2(policy, tmp_path / "source", 50256)
    torch.save(transpose_linear(policy.state_dict()), tmp_path / "source" / "pytorch_model.bin")

    def download(url, path):
        fetched.append(url)
        shutil.copy(tmp_path / "source" / url.rpartition("/")[2], path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        assert same_policy(load_weights("gpt2")[0], policy)
    assert fetched == [f"https://huggingface.co/openai-community/gpt2/resolve/main/{name}"
                       for name in ("config.json", "pytorch_model.bin")]


# The command line.

@pytest.fixture
def run(tmp_path):
    """A run's directory, whose policy has moved away from its reference."""
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", tiny_gpt(0), Tokenizer.learn(TEXTS, 262),
                    reference=tiny_gpt(1).state_dict(), config={"temperature": 0.8})
    return tmp_path / "run"


def output(capsys, *options):
    assert rollout.main([str(option) for option in options]) is None
    return capsys.readouterr().out


@pytest.mark.parametrize("options, temperature, seed, tail", [
    ("", 0.8, 0, {}), ("--greedy", 0, 0, {}), ("--temperature 2", 2, 0, {}), ("--seed 1", 0.8, 1, {}),
    ("--top-k 3", 0.8, 0, dict(top_k=3)), ("--top-p 0.5", 0.8, 0, dict(top_p=0.5))])
def test_options_reach_the_sampler(run, capsys, options, temperature, seed, tail):
    policy, _, tokenizer, _ = load_checkpoint(run)
    prompts = [tokenizer.encode("the")] * 2
    r = sample(policy, prompts, 9, tokenizer.eos_token, temperature, seeded(seed), **tail)
    expected = "".join(f"the{completion}\n" for completion in r.completions(tokenizer))
    options = ["--prompt", "the", "-n", 2, "--max-new-tokens", 9, *options.split()]
    assert output(capsys, run, *options) == expected


def test_each_line_of_standard_input_is_a_prompt(run, capsys, monkeypatch):
    options = [run, "-n", 2, "--max-new-tokens", 3]
    expected = output(capsys, *options, "--prompt", "the plot")
    for stdin, prompts in [("", 0), ("\nthe plot \n\n", 1), ("the plot\n中文", 2)]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        lines = output(capsys, *options)
        assert lines[:len(expected)] == (expected if prompts else "")
        assert len(re.findall("^中文", lines, re.M)) == (2 if prompts == 2 else 0)


def test_completions_fill_the_context_by_default(run, capsys):
    tokenizer = load_checkpoint(run)[2]
    options = ["--prompt", "the", "-n", 20, "--logprobs"]
    tables = output(capsys, run, *options).split("  policy  reference  token\n")[1:]
    lengths = [len(re.findall(r"^ +[\d.]+ +[\d.]+  ['\"]", table, re.M)) for table in tables]
    assert max(lengths) == TINY_GPT.block_size - len(tokenizer.encode("the"))


def test_logprobs_are_those_of_the_policy_and_the_reference(run, capsys):
    options = ["--prompt", "the", "-n", 2, "--max-new-tokens", 6, "--logprobs", "--seed", 5, "--top-k", 9]
    out = output(capsys, run, *options)
    policy, reference, tokenizer, _ = load_checkpoint(run)
    prompts = [tokenizer.encode("the")] * 2
    r = sample(policy, prompts, 6, tokenizer.eos_token, 0.8, seeded(5), top_k=9)
    expected = []
    for tokens, mask in zip(r.tokens, r.mask):
        steps = mask.nonzero().squeeze(1)
        p, q = ((model(tokens[None, :-1]) / 0.8).softmax(-1)[0, steps, tokens[steps + 1]]
                for model in (policy, reference))
        expected.append(torch.stack([p, q], 1))
        assert f"log-probability {p.log().sum():.2f} under the policy, {q.log().sum():.2f} under the" in out
    printed = [[float(x) for x in line] for line in re.findall(r"^ +([\d.]+) +([\d.]+)  ['\"]", out, re.M)]
    torch.testing.assert_close(torch.tensor(printed), torch.cat(expected), rtol=0, atol=1e-4)
    assert any(p != q for p, q in printed)


def test_export_writes_a_gpt2_and_replaces_nothing(run, capsys):
    assert output(capsys, run, "--export", run / "gpt2") == ""
    assert same_policy(load_gpt2(run / "gpt2"), load_checkpoint(run)[0])
    assert json.loads((run / "gpt2" / "config.json").read_text())["eos_token_id"] == 261
    before = contents(run)
    for place in (run / "gpt2", run / "checkpoint.pt" / "gpt2"):
        with pytest.raises(SystemExit) as e:
            rollout.main([str(run), "--export", str(place)])
        assert e.value.code == 2 and contents(run) == before


@pytest.mark.parametrize("data, says", [(b"the\n" + b"z" * 24, "24 tokens"), (b"\xff\xfe\n", "decode")])
def test_a_bad_line_of_standard_input_ends_with_status_2(run, capsys, monkeypatch, data, says):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    with pytest.raises(SystemExit) as e:
        rollout.main([str(run)])
    assert e.value.code == 2 and says in capsys.readouterr().err


def test_a_reader_that_stops_ends_the_program_quietly(run):
    """As a program of its own, with text from another system: a byte order mark and CR LF."""
    (run / "prompts").write_bytes("\ufeffthe plot\r\n中文\r\n".encode() * 500)
    command = f"{sys.executable} {ROOT / 'rollout.py'} {run} -n 9 --max-new-tokens 9 < {run / 'prompts'}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True)
    assert done.stdout.decode().startswith("the plot") and done.stdout.count(b"\n") == 1
    assert done.stderr == b"" and done.returncode == 128 + 13  # SIGPIPE
