"""The tokenizer, sampling, checkpoints, the weights of --init, and the command line of rollout.py."""

import io
import json
import math
import random
import re
import subprocess
import sys

import pytest
import regex
import tiktoken
import tiktoken._educational
import torch
from tiktoken_ext import openai_public

import model
import rollout
from algos import Batch
from helpers import ROOT, Malice, contents
from model import GPT, BadInput, GPTConfig, Tokenizer, load_checkpoint, save_checkpoint, write_atomically
from rollout import check_boundaries, check_fit, completion_texts, draw, sample, sample_one, top_k_top_p

TEXTS = ["the acting was superb.", "the plot was dull, and the acting was superb."] * 50
POEM = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"


def seeded(seed):
    return torch.Generator().manual_seed(seed)


# Tokenizer.

@pytest.mark.parametrize("text", ["the acting was superb.", "", " two  spaces\n", "naïve 中文 🎬",
                                  "<|endoftext|>", "\x00\ttab\r\n"])
def test_any_text_survives_the_round_trip(text):
    tokenizer = Tokenizer.learn(TEXTS, 270)
    tokens = tokenizer.encode(text)
    assert tokenizer.decode([*tokens, tokenizer.eos_token]) == text
    assert tokenizer.eos_token not in tokens
    assert tokenizer.token_bytes()[tokens].sum() == len(text.encode())


def test_learned_vocabulary_has_bytes_and_as_many_merges_as_there_are_and_the_end_of_text():
    tokenizer = Tokenizer.learn(TEXTS, 280)
    assert tokenizer.vocab_size == 280 and tokenizer.eos_token == 279
    assert (tokenizer.token_bytes() == 1).sum() == 257 and tokenizer.token_bytes()[279] == 1
    assert Tokenizer.learn(TEXTS, 257).encode(TEXTS[0]) == list(TEXTS[0].encode())
    merges = len(" sorted") - 1 + 3  # and " 1", " 2", " 3"
    assert Tokenizer.learn(["1 2 3 sorted", "3 2 1 sorted"], 512).vocab_size == 257 + merges
    assert Tokenizer.learn([], 512).vocab_size == 257


def test_the_most_frequent_pairs_are_merged_first():
    """The worked example of Sennrich et al. 2016: the merges are e s, es t, l o, lo w."""
    corpus = " ".join(["low"] * 5 + ["lower"] * 2 + ["newest"] * 6 + ["widest"] * 3)
    tokens = [bytes.fromhex(token) for token in Tokenizer.learn([corpus], 261).state()["tokens"]]
    assert len(tokens) == 260 and tokens[257] == b"est" and tokens[259] == b"low"  # e s ties with s t


@pytest.mark.parametrize("corpus, text, ends", [
    (TEXTS, "the acting was superb.", [3, 10, 14]), (TEXTS, "the 春眠不觉晓 superb.", [6, 9]),
    ([POEM] * 50, POEM, range(len(POEM)))])
def test_a_prompt_that_ends_with_a_word_has_the_tokens_of_the_whole_text(corpus, text, ends):
    tokenizer = Tokenizer.learn(corpus, 300)
    tokens = tokenizer.encode(text)
    assert len(tokens) < 0.9 * len(text.encode())
    for i in ends:  # in Chinese, any character
        assert tokenizer.encode(text[:i]) + tokenizer.encode(text[i:]) == tokens


def test_merges_are_as_frequent_in_the_text_as_those_of_tiktokens_trainer():
    """Ties may be broken otherwise, so the numbers of occurrences are compared, not the tokens."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdé", k=rng.randrange(1, 9))) for _ in range(60)]
    corpus = [" ".join(rng.choices(words, k=10)) for _ in range(100)] + ["aaaa aaaaa", "a1 12 !?", POEM]
    theirs = tiktoken._educational.bpe_train("\n".join(corpus), 256 + 80, model.OUR_SPLIT, visualise=None)
    ours = Tokenizer.learn(corpus, 257 + 80)
    tokens = lambda tokenizer: sum(len(tokenizer.encode(text)) for text in corpus)
    tiktokens = Tokenizer.from_state({"name": "bpe", "tokens": [token.hex() for token in theirs]})
    assert tokens(ours) == pytest.approx(tokens(tiktokens), rel=0.01)
    same = set(theirs) & {bytes.fromhex(token) for token in ours.state()["tokens"]}
    assert len(same) >= 256 + 70


def test_tokenizer_state_is_plain_and_complete():
    tokenizer = Tokenizer.learn(TEXTS, 280)
    state = json.loads(json.dumps(tokenizer.state()))
    again = Tokenizer.from_state(state)
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1])
    assert (again.eos_token, again.vocab_size, again.name) == (279, 280, "bpe")
    tokens = state["tokens"]
    for wrong in tokens[1:], tokens + tokens[-1:], tokens + ["x"]:  # no byte 0, a token twice, no token
        with pytest.raises(ValueError):
            Tokenizer.from_state(state | {"tokens": wrong})


def test_gpt2_splits_words_as_tiktoken_does():
    if not hasattr(openai_public, "r50k_pat_str"):
        pytest.skip("this tiktoken does not name GPT-2's pattern")
    rng = random.Random(0)
    pieces = ["a", "it", "'s", "'ll", " ", " ", "  ", "\n", "\t", "7", ",", "é", "中", "\u3000"]
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=12))
        assert regex.findall(model.GPT2_SPLIT, text) == regex.findall(openai_public.r50k_pat_str, text)


# Drawing a token.

def test_draw_inverts_the_cumulative_distribution():
    p = torch.tensor([0.125, 0.0, 0.5, 0.25, 0.125, 0.0])
    uniforms = torch.arange(1, 1025) / 1024  # equally spaced, so each count is exact
    for constant in (0.0, 3.0):  # log-probabilities up to a constant
        drawn = draw((p.log() + constant).expand(1024, 6), uniforms)
        assert torch.equal(drawn, drawn.sort().values)
        assert torch.equal(drawn.bincount(minlength=6), (1024 * p).long())


@pytest.mark.parametrize("uniform", [2.0 ** -24, 0.5, 1.0])  # the least and the greatest that sample draws
def test_draw_never_takes_a_token_of_probability_zero(uniform):
    uniforms = torch.full((4,), uniform)
    assert draw(torch.eye(4).log(), uniforms).tolist() == [0, 1, 2, 3]
    assert draw(torch.full((4, 4), math.nan), uniforms).max() < 4  # at least a token of the vocabulary


@pytest.mark.parametrize("top_k, top_p", [(0, 0.5), (0, 0.9), (3, 1.0), (1, 1.0), (4, 0.6), (0, 1e-9),
                                          (99, 1.0)])
def test_truncate_equals_its_definition(top_k, top_p):
    logp = (2 * torch.randn(50, 9, generator=seeded(0))).log_softmax(-1)
    for row, kept in zip(logp.tolist(), top_k_top_p(logp, top_k, top_p).tolist()):
        expected, held = [-math.inf] * 9, 0.0
        for rank, token in enumerate(sorted(range(9), key=lambda token: -row[token])):
            if held >= top_p or top_k and rank == top_k:
                break
            expected[token] = row[token]
            held += math.exp(row[token])
        assert kept == expected


@pytest.mark.parametrize("top_p", [0.3, 0.5, 0.75, 0.9, 1.0])
def test_top_p_with_ties_keeps_as_many_as_transformers(top_p):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not transformers.is_torch_available():
        pytest.skip("this version of transformers needs a newer torch")
    logits = torch.randint(3, (200, 8), generator=seeded(0)).float()
    theirs = transformers.TopPLogitsWarper(top_p)(None, logits) if top_p < 1 else logits
    ours = top_k_top_p(logits.log_softmax(-1), 0, top_p)
    sizes = [x.softmax(-1).sort(-1).values for x in (ours, theirs)]  # which of equal tokens is kept is open
    torch.testing.assert_close(*sizes)


# Sampling.

EOS = 5
PROMPTS = [[1], [0, 2, 3, 4], [4, 4], [1, 2, 0, 3, 2, 1], [2, 3, 3], [3, EOS, 1]]


@pytest.fixture
def policy():
    """A random policy of 6 tokens whose choices depend on what it read."""
    policy = GPT(GPTConfig(vocab_size=6, block_size=20, n_layer=2, n_head=2, n_embd=16), seeded(3))
    for p in policy.parameters():
        p.data *= 8
    return policy.double()


@torch.no_grad()
def complete_alone(policy, prompt, uniforms, temperature):
    """The definition of sampling: one row, without a cache."""
    tokens = list(prompt)
    for u in uniforms:
        logits = policy(torch.tensor([tokens]))[0, -1]
        cdf = (logits / (temperature or 1)).softmax(-1).cumsum(-1)
        tokens.append(int((cdf < u * cdf[-1]).sum() if temperature else logits.argmax()))
        if tokens[-1] == EOS:
            break
    return tokens


@pytest.mark.parametrize("temperature", [0.001, 0.7, 1.0])
def test_the_samplers_log_probabilities_are_those_of_a_full_forward_pass(policy, temperature):
    batch = sample(policy, PROMPTS * 5, 12, EOS, temperature, seeded(0))
    logp = (policy(batch.obs) / temperature).log_softmax(-1)
    full = logp.gather(-1, batch.actions[..., None]).squeeze(-1)
    torch.testing.assert_close(batch.logprobs[batch.mask], full[batch.mask])


@pytest.mark.parametrize("temperature", [0, 0.7, 1.0])
def test_each_row_of_a_batch_gets_what_it_would_get_alone(policy, temperature):
    prompts, batch_sizes = PROMPTS * 5, []
    hook = policy.register_forward_pre_hook(lambda module, args: batch_sizes.append(len(args[0])))
    r = sample(policy, prompts, 13, EOS, temperature, seeded(7))
    hook.remove()
    uniforms = (1 - torch.rand(len(prompts), 13, generator=seeded(7))).tolist()
    alone = [complete_alone(policy, *pair, temperature) for pair in zip(prompts, uniforms)]
    for prompt, u, tokens in zip(prompts, uniforms, alone):
        assert prompt + sample_one(policy, prompt, torch.tensor(u), EOS, temperature) == tokens

    T = r.obs.shape[1] + 1
    assert T == max(map(len, alone))
    padded = [tokens + [EOS] * (T - len(tokens)) for tokens in alone]
    assert torch.cat([r.obs, r.actions[:, -1:]], 1).tolist() == padded
    # The mask has what was chosen, with the end of text, but neither the prompt nor the padding.
    assert r.mask.tolist() == [[len(prompt) <= t < len(tokens) for t in range(1, T)]
                               for prompt, tokens in zip(prompts, alone)]
    # The log-probabilities are constants: those of a full forward pass, in the precision of the policy.
    logp = (policy(r.obs) / (temperature or 1)).log_softmax(-1)
    assert r.logprobs.isfinite().all()
    assert not r.logprobs.requires_grad and not r.logprobs.is_inference()  # which could not be trained on
    chosen = logp.gather(-1, r.actions[:, :, None]).squeeze(-1)
    torch.testing.assert_close(r.logprobs[r.mask], chosen[r.mask])
    assert len(batch_sizes) <= T + 2  # whether all rows have ended is asked at every fourth token
    if temperature:  # rows end at different times, and the finished ones are not computed any more
        assert len({len(tokens) - len(prompt) for prompt, tokens in zip(prompts, alone)}) > 3
        assert batch_sizes == sorted(batch_sizes, reverse=True) and batch_sizes[-1] < batch_sizes[0] == 30


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(top_k=1), dict(top_k=2), dict(top_p=0.6)])
def test_truncated_tokens_are_never_sampled(policy, options):
    r = sample(policy, PROMPTS * 20, 8, EOS, 1.0, seeded(1), **options)
    logp = policy(r.obs).log_softmax(-1)[r.mask]
    allowed = top_k_top_p(logp, **options) > -math.inf
    assert allowed.gather(1, r.actions[r.mask][:, None]).all()
    chosen = logp.gather(1, r.actions[r.mask][:, None]).squeeze(1)
    torch.testing.assert_close(r.logprobs[r.mask], chosen)  # not truncated


def test_completions_are_the_text_between_the_prompt_and_the_end():
    tokenizer = Tokenizer.learn(TEXTS, 257)
    end = [tokenizer.eos_token]
    actions = torch.tensor([[*b"bcd"] + end, [*b"bc"] + 2 * end])
    mask = torch.tensor([[False, True, True, True], [False, False, True, False]])
    assert completion_texts(Batch(None, actions, mask), tokenizer) == ["cd", ""]


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


@pytest.mark.parametrize("prompts, corpus, size", [
    (["first 21 then 13\n\n"], ["first 21 then 13\n\n\n\n34"] * 50, 300),  # a token of three line ends
    (['{"name":'], ['{"name":"ann"}', '{"name":"bob"}'] * 50, 300),  # a token of :"
    (["the "], ["the cat", "the dog"] * 50, 280), (["the c"], ["the cat sat"] * 20, 280),
    (["the ", "a "], [], "cat"), (["x "], ["the cat"] * 50, 280)])
def test_prompts_that_end_within_a_token_are_refused(prompts, corpus, size):
    tokenizer = Tokenizer.learn(["the cat sat"] * 9, 280) if size == "cat" else Tokenizer.learn(corpus, size)
    with pytest.raises(BadInput, match="ends (within a token|with white space)"):
        check_boundaries(prompts, corpus, tokenizer)


@pytest.mark.parametrize("prompts, corpus, says", [
    (["the cat"], ["the cat sat", "the cat ran"] * 9, ""), (["7 "], ["7 8", "7 9"], ""),  # no merges
    (["the"], ["the cat", "the dog", "theme"] * 9, "of 3 texts that begin with a prompt, 1 do not"),
    (["cat"], ["the dog"], "warning: no text of the corpus"),
    (["the cat"], [], "")])
def test_other_prompts_pass_and_what_is_unusual_is_a_warning(prompts, corpus, says, capsys):
    check_boundaries(prompts, corpus, Tokenizer.learn(corpus, 257 if prompts == ["7 "] else 275))
    printed = capsys.readouterr().out
    assert says in printed and printed.count("warning") == bool(says)


@pytest.mark.slow
@pytest.mark.parametrize("split", model.SPLITS)
@pytest.mark.parametrize("character", "a é\n-")
def test_a_million_characters_without_a_break_are_encoded(character, split):
    text = character * 10 ** 6 + "a"
    byte_tokens = [bytes([i]).hex() for i in range(256)]
    tokenizer = Tokenizer.from_state({"name": split, "tokens": byte_tokens})
    assert tokenizer.encode(text) == list(text.encode())


@pytest.mark.parametrize("split, before", [
    ("bpe", r"\p{Han}|'(?:[sdmt]|ll|ve|re)| ?(?:(?!\p{Han})\p{L})+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
            r"|\s+(?!\S)|\s+"),
    ("gpt2", r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")])
def test_words_are_split_as_by_the_plain_patterns(split, before):
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choices(" \n\t\r\u3000ab'éstlmve中文,.1٣²\u0301😀", k=rng.randrange(12)))
        assert regex.findall(model.SPLITS[split], text) == regex.findall(before, text)


def test_lone_surrogates_and_long_runs_in_a_corpus_are_learned():
    tokenizer = Tokenizer.learn(["caf\ud800 caf\ud800"], 262)
    assert tokenizer.decode(tokenizer.encode("caf\ud800")) == "caf\ufffd"
    runs = Tokenizer.learn([" " * 160_000 + "x"], 300)  # a second; quadratic it took six
    assert len(runs.encode(" " * 2 ** 12 + "x")) < 20


# Checkpoints.

def tiny_gpt(seed=0):
    policy = GPT(GPTConfig(262, 24, 1, 2, 8), seeded(seed))
    for i, p in enumerate(policy.parameters()):
        p.data += 0.3 * torch.randn(p.shape, generator=seeded(100 * seed + i))
    return policy


def same_policy(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.fixture
def run(tmp_path):
    """A run's directory, whose policy has moved away from its reference."""
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", tiny_gpt(0), Tokenizer.learn(TEXTS, 262),
                    reference=tiny_gpt(1).state_dict(), config={"temperature": 0.8})
    return tmp_path / "run"


def test_checkpoint_survives_the_round_trip(run):
    path = run / "checkpoint.pt"
    policy, reference, tokenizer, more = load_checkpoint(path)
    assert same_policy(policy, tiny_gpt(0)) and same_policy(reference, tiny_gpt(1))
    assert tokenizer.state() == Tokenizer.learn(TEXTS, 262).state()
    assert more == {"config": {"temperature": 0.8}}

    save_checkpoint(path, policy, tokenizer)
    again, reference, _, more = load_checkpoint(run)
    assert same_policy(again, policy) and same_policy(reference, policy) and reference is not again
    assert more == {} and list(run.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("no space"), RuntimeError("two\nlines")])
def test_a_failing_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new, but only h")
        file.flush()
        raise error

    with pytest.raises(BadInput) as e:
        write_atomically(path, write)
    assert f"cannot write {path}" in str(e.value) and "\n" not in str(e.value)
    assert contents(tmp_path) == {path: b"old"}


def test_damaged_and_hostile_checkpoints_are_refused_in_one_line(run):
    path, executed = run / "checkpoint.pt", run / "executed"
    whole, state = path.read_bytes(), torch.load(path)
    model, tokenizer = state["model"], state["tokenizer"]
    for damage in [whole[:len(whole) // 2], b"", b"it was the best of times", [1, 2], {},
                   Malice(executed), state | {"policy": Malice(executed)}, state | {"reference": {}},
                   state | {"model": model | {"n_embd": 16}}, state | {"model": model | {"n_embd": 2 ** 40}},
                   state | {"model": model | {"n_layer": 10 ** 9}}, state | {"model": model | {"depth": 2}},
                   state | {"tokenizer": tokenizer | {"tokens": tokenizer["tokens"][:-1]}},
                   state | {"tokenizer": tokenizer | {"name": "latin"}}]:
        if isinstance(damage, bytes):
            path.write_bytes(damage)
        else:
            torch.save(damage, path)
        with pytest.raises(BadInput, match="checkpoint.pt is damaged") as e:
            load_checkpoint(run)
        assert "\n" not in str(e.value)
    assert not executed.exists()


def test_a_vocabulary_that_cannot_be_downloaded_is_bad_input(monkeypatch):
    def no_network(*args):
        raise ConnectionError("no network")

    monkeypatch.setattr(model.tiktoken, "get_encoding", no_network)
    with pytest.raises(BadInput, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer.gpt2()


# The command line.

def output(capsys, *options):
    assert rollout.main([str(option) for option in options]) is None
    return capsys.readouterr().out


@pytest.mark.parametrize("options, room, temperature, seed, tail", [
    ("", None, 0.8, 0, {}), ("--max-new-tokens 3", 3, 0.8, 0, {}), ("--greedy", None, 0, 0, {}),
    ("--temperature 2", None, 2, 0, {}), ("--seed 1", None, 0.8, 1, {}),
    ("--top-k 3", None, 0.8, 0, dict(top_k=3)), ("--top-p 0.5", None, 0.8, 0, dict(top_p=0.5))])
def test_options_reach_the_sampler(run, capsys, options, room, temperature, seed, tail):
    policy, _, tokenizer, _ = load_checkpoint(run)
    prompt = tokenizer.encode("the")
    room = room or 24 - len(prompt)  # completions fill the context by default
    r = sample(policy, [prompt] * 2, room, tokenizer.eos_token, temperature, seeded(seed), **tail)
    expected = "".join(f"the{completion}\n" for completion in completion_texts(r, tokenizer))
    assert output(capsys, run, "--prompt", "the", "-n", 2, *options.split()) == expected


def test_each_line_of_standard_input_is_a_prompt(run, capsys, monkeypatch):
    options = [run, "-n", 2, "--max-new-tokens", 3]
    expected = output(capsys, *options, "--prompt", "the plot")
    monkeypatch.setattr(sys, "stdin", io.StringIO("\nthe plot \n\n中文"))
    assert re.fullmatch(re.escape(expected) + "中文.*\n中文.*\n", output(capsys, *options), re.S)
    for data, says in [(b"the\n" + b"z" * 24, "24 tokens"), (b"\xff\xfe\n", "decode")]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
        with pytest.raises(SystemExit):
            rollout.main([str(run)])
        assert says in capsys.readouterr().err


def test_logprobs_are_those_of_the_policy_and_the_reference(run, capsys):
    options = "--prompt the -n 2 --max-new-tokens 6 --logprobs --seed 5 --top-k 9"
    out = output(capsys, run, *options.split())
    policy, reference, tokenizer, _ = load_checkpoint(run)
    prompts = [tokenizer.encode("the")] * 2
    r = sample(policy, prompts, 6, tokenizer.eos_token, 0.8, seeded(5), top_k=9)
    expected = []
    for obs, actions, mask in zip(r.obs, r.actions, r.mask):
        steps = mask.nonzero().squeeze(1)
        p, q = ((model(obs[None]) / 0.8).softmax(-1)[0, steps, actions[steps]]
                for model in (policy, reference))
        expected.append(torch.stack([p, q], 1))
        assert f"log-probability {p.log().sum():.2f} under the policy, {q.log().sum():.2f} under the" in out
    printed = [[float(x) for x in line] for line in re.findall(r"^ +([\d.]+) +([\d.]+)  ['\"]", out, re.M)]
    torch.testing.assert_close(torch.tensor(printed), torch.cat(expected), rtol=0, atol=1e-4)


def test_a_reader_that_stops_ends_the_program_quietly(run):
    """As a program of its own, with text from another system: a byte order mark and CR LF."""
    (run / "prompts").write_bytes("\ufeffthe plot\r\n中文\r\n".encode() * 500)
    command = f"{sys.executable} {ROOT / 'rollout.py'} {run} -n 9 --max-new-tokens 9 < {run / 'prompts'}"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command} | head -1"], capture_output=True)
    assert done.stdout.decode().startswith("the plot") and done.stdout.count(b"\n") == 1
    assert done.stderr == b"" and done.returncode == 128 + 13  # SIGPIPE
