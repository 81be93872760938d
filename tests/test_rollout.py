import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiktoken
import torch

import rollout
from model import GPT, GPTConfig, gpt2_layout
from rollout import BadInput, Tokenizer, draw, load_checkpoint, load_weights, sample, save_checkpoint, truncate

ROOT = Path(__file__).parent.parent

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
    for prompt, rest in [("the acting", " was superb."), ("the acting was 春眠", "不觉晓 superb.")]:  # cut at a word's end
        assert tokenizer.encode(prompt) + tokenizer.encode(rest) == tokenizer.encode(prompt + rest)


def test_chinese_can_be_cut_after_any_character():
    poem = "春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。"
    tokenizer = Tokenizer.learn([poem] * 50, 300)
    assert len(tokenizer.encode(poem)) < 0.7 * len(poem.encode())
    assert all(tokenizer.encode(poem[:i]) + tokenizer.encode(poem[i:]) == tokenizer.encode(poem) for i in range(len(poem)))


def test_tokenizer_state_is_plain_and_complete():
    tokenizer = Tokenizer.learn(TEXTS, 280)
    again = Tokenizer.from_state(tokenizer.state())
    state = json.loads(json.dumps(tokenizer.state()))
    assert state == tokenizer.state() == again.state() and again.name == "bpe"
    assert again.encode(TEXTS[1]) == tokenizer.encode(TEXTS[1]) and again.eos_token == tokenizer.eos_token


def test_gpt2s_split_is_tiktokens():
    public = pytest.importorskip("tiktoken_ext.openai_public")
    if not hasattr(public, "r50k_pat_str"):
        pytest.skip("this tiktoken does not name GPT-2's pattern")
    merges = Tokenizer.learn(["  it's 12  words,\n\n and  we'll see\t \n", "   a b   c\n \n"] * 50, 300).state()["tokens"]
    ranks, rng = {bytes.fromhex(token): i for i, token in enumerate(merges)}, random.Random(0)
    ours, theirs = (tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}) for pattern in (rollout.GPT2_SPLIT, public.r50k_pat_str))
    for _ in range(2000):
        text = "".join(rng.choice(["a", "it", "'s", "'ll", " ", " ", "  ", "\n", "\t", "7", ",", "é", "中", "\u3000"]) for _ in range(12))
        assert ours.encode_ordinary(text) == theirs.encode_ordinary(text)


def test_a_vocabulary_larger_than_the_corpus_gives():
    few = Tokenizer.learn(["1 2 3 sorted", "3 2 1 sorted"], 512)  # ' sorted' takes 6 merges, ' 1', ' 2', ' 3' one each
    assert 257 < few.vocab_size <= 257 + 9 + 7 and few.decode(few.encode("2 1 3 sorted")) == "2 1 3 sorted"
    with pytest.raises(ValueError):
        Tokenizer.learn(TEXTS, 100)


def test_gpt2_vocabulary_that_cannot_be_fetched(monkeypatch):
    def no_network(name):
        raise ConnectionError("no network")
    monkeypatch.setattr(rollout.tiktoken, "get_encoding", no_network)
    with pytest.raises(BadInput, match="TIKTOKEN_CACHE_DIR"):
        Tokenizer.gpt2()


@pytest.mark.parametrize("texts", [["the acting was superb and the plot was dull. " * 20_000], ["春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。" * 9000]],
                         ids=["one text of a megabyte", "Chinese without a line break"])
def test_a_vocabulary_is_learned_from_a_sample(texts):
    tokenizer = Tokenizer.learn(texts, 270)  # from all of it this would take minutes
    assert tokenizer.vocab_size == 270 and tokenizer.decode(tokenizer.encode(texts[0][:500])) == texts[0][:500]
    assert len(tokenizer.encode(texts[0])) < 0.8 * len(texts[0].encode())


def test_sizes_count_bytes():
    tokenizer = Tokenizer.learn(TEXTS, 280)
    tokens = tokenizer.encode("the naïve 中文 plot")
    assert tokenizer.sizes()[tokens].sum() == len("the naïve 中文 plot".encode()) and tokenizer.sizes()[tokenizer.eos_token] == 1


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


def test_truncate_against_the_definition():
    logp = (2 * torch.randn(50, 9, generator=torch.Generator().manual_seed(0))).log_softmax(-1)
    for top_k, top_p in [(0, 0.5), (0, 0.9), (3, 1.0), (1, 1.0), (4, 0.6), (0, 1e-9), (99, 1.0)]:
        kept = truncate(logp, top_k, top_p)
        for row, out in zip(logp.tolist(), kept.tolist()):
            expected, held = {}, 0.0
            for p, token in sorted(((math.exp(x), i) for i, x in enumerate(row)), reverse=True):
                if held >= top_p or top_k and len(expected) == top_k:
                    break
                expected[token], held = row[token], held + p
            assert {i: x for i, x in enumerate(out) if x > -math.inf} == pytest.approx(expected)
    assert torch.equal(truncate(logp, 0, 1.0), logp)


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


def test_cut_tails_are_never_sampled(policy):
    make = lambda **options: sample(policy, PROMPTS * 20, 8, EOS, 1.0, torch.Generator().manual_seed(1), **options)
    assert torch.equal(make(top_k=1).tokens, sample(policy, PROMPTS * 20, 8, EOS, 0).tokens)
    assert torch.equal(make(top_k=6).tokens, make().tokens) and torch.equal(make(top_p=1 - 1e-9).tokens, make().tokens)
    for options in (dict(top_k=2), dict(top_p=0.6)):
        r = make(**options)
        logp = policy(r.tokens[:, :-1]).log_softmax(-1)
        allowed = truncate(logp[r.mask], **options) > -math.inf
        assert allowed.gather(1, r.tokens[:, 1:][r.mask][:, None]).all() and not allowed.all()
        torch.testing.assert_close(r.logp[r.mask], logp[r.mask], rtol=1e-4, atol=1e-4)  # of the whole distribution


def test_watch_sees_every_column(policy):
    columns = []
    r = sample(policy, PROMPTS, 7, EOS, 1.0, torch.Generator().manual_seed(1), watch=lambda column: columns.append(column.clone()))
    seen = torch.stack(columns, 1)  # from the shortest prompt's end; perhaps some filler more
    assert torch.equal(seen[:, :r.tokens.shape[1] - 1], r.tokens[:, 1:]) and (seen[:, r.tokens.shape[1] - 1:] == EOS).all()


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
    again, reference, tokenizer2, more = load_checkpoint(tmp_path)
    x = torch.tensor([[1, 2]])
    assert torch.equal(again(x), policy(x)) and torch.equal(reference(x), policy(x))
    assert tokenizer2.encode("acting") == tokenizer.encode("acting")
    assert more == {"iteration": 7} and list(tmp_path.iterdir()) == [path]

    whole = path.read_bytes()
    state = torch.load(path)
    misfit = dict(state, model=dict(state["model"], n_embd=16))
    stranger = dict(state, reference=GPT(GPTConfig(262, 16, 1, 2, 16)).state_dict())
    for damage in [lambda: path.write_bytes(whole[:len(whole) // 2]), lambda: path.write_bytes(b""),
                   lambda: path.write_text("not a checkpoint"), lambda: torch.save([1, 2], path),
                   lambda: torch.save({"policy": Malice(tmp_path / "executed")}, path), lambda: torch.save(misfit, path),
                   lambda: torch.save(stranger, path), path.unlink]:
        damage()
        with pytest.raises(BadInput, match="checkpoint.pt") as e:
            load_checkpoint(tmp_path)
        assert "\n" not in str(e.value)
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_knows_its_reference(tmp_path):
    policy, before = (GPT(GPTConfig(262, 16, 1, 2, 8), torch.Generator().manual_seed(i)) for i in range(2))
    save_checkpoint(tmp_path / "checkpoint.pt", policy, Tokenizer.learn(TEXTS, 262), reference=before.state_dict())
    again, reference, _, more = load_checkpoint(tmp_path)
    x = torch.tensor([[1, 2]])
    assert torch.equal(reference(x), before(x)) and torch.equal(again(x), policy(x)) and not torch.equal(again(x), reference(x)) and more == {}


# Weights to start from.

@pytest.fixture
def gpt2_vocabulary(monkeypatch):
    """Stands in for GPT-2's vocabulary, which takes a network: as many tokens, but all of its words are made up."""
    words = [f"{i:05d}".encode() for i in range(50256 - 256)]
    ranks = {bytes([i]): i for i in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    encoding = tiktoken.Encoding("gpt2", pat_str=rollout.SPLIT, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(rollout.tiktoken, "get_encoding", lambda name: {"gpt2": encoding}[name])


def test_weights_of_a_run_a_checkpoint_or_a_gpt2(tmp_path, gpt2_vocabulary):
    policy, x = GPT(GPTConfig(262, 16, 1, 2, 8)), torch.tensor([[1, 2]])
    save_checkpoint(tmp_path / "checkpoint.pt", policy, Tokenizer.learn(TEXTS, 262))
    for init in (tmp_path, tmp_path / "checkpoint.pt"):
        again, tokenizer = load_weights(str(init))
        assert torch.equal(again(x), policy(x)) and tokenizer.vocab_size == 262
    policy = GPT(GPTConfig(50257, 16, 1, 2, 8))
    policy.to_gpt2(tmp_path / "gpt2", 50256)
    again, tokenizer = load_weights(str(tmp_path / "gpt2"))
    assert torch.equal(again(x), policy(x)) and tokenizer.eos_token == 50256 and tokenizer.name == "gpt2"


def test_weights_that_cannot_be_had(tmp_path, monkeypatch, gpt2_vocabulary):
    def offline(url, dst, **options):
        raise ConnectionError(url)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    GPT(GPTConfig(300, 16, 1, 2, 8)).to_gpt2(tmp_path / "other", 299)
    (tmp_path / "empty").mkdir()
    (tmp_path / "young").mkdir()  # a run without a checkpoint yet
    for name in ("config.json", "metrics.csv"):
        (tmp_path / "young" / name).write_text("{}")
    for init, says in [("gpt2", f"pytorch_model.bin into {tmp_path / 'hub' / 'gpt2'}"), (tmp_path / "other", "300 tokens"),
                       (tmp_path / "empty", "config.json"), (tmp_path / "young", "no checkpoint at"), (tmp_path / "nowhere", "nowhere")]:
        with pytest.raises(BadInput, match=re.escape(says)) as e:
            load_weights(str(init))
        assert "\n" not in str(e.value)


def test_gpt2_is_fetched_once(tmp_path, monkeypatch, gpt2_vocabulary):
    policy, fetched = GPT(GPTConfig(50257, 16, 1, 2, 8)), []
    policy.to_gpt2(tmp_path / "source", 50256)
    torch.save(gpt2_layout(policy.state_dict()), tmp_path / "source" / "pytorch_model.bin")

    def download(url, dst):
        fetched.append(url)
        shutil.copy(tmp_path / "source" / url.rpartition("/")[2], dst)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2):
        again, _ = load_weights("gpt2")
        assert torch.equal(again(torch.tensor([[1, 2]])), policy(torch.tensor([[1, 2]])))
    assert [url.rpartition("/")[2] for url in fetched] == ["config.json", "pytorch_model.bin"] and all("gpt2/resolve/main" in url for url in fetched)


# The command line.

@pytest.fixture
def run(tmp_path):
    """A checkpoint that has moved away from its reference."""
    policy, before = (GPT(GPTConfig(262, 24, 1, 2, 8), torch.Generator().manual_seed(i)) for i in range(2))
    for i, p in enumerate([*policy.parameters(), *before.parameters()]):
        p.data += 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    save_checkpoint(tmp_path / "checkpoint.pt", policy, Tokenizer.learn(TEXTS, 262), reference=before.state_dict(), config={"temperature": 0.8})
    return tmp_path


def say(capsys, *options):
    assert rollout.main([str(option) for option in options]) is None
    return capsys.readouterr().out


def test_the_seed_decides(run, capsys):
    first = say(capsys, run, "--prompt", "the", "-n", 2, "--max-new-tokens", 3)
    assert first.startswith("the") and first.count("the") >= 2
    assert say(capsys, run, "--prompt", "the", "-n", 2, "--max-new-tokens", 3) == first
    assert say(capsys, run, "--prompt", "the", "-n", 2, "--max-new-tokens", 3, "--seed", 1) != first


def test_options_reach_the_sampler(run, capsys):
    policy, _, tokenizer, _ = load_checkpoint(run)
    for options, temperature, tail in [(["--greedy"], 0, {}), (["--temperature", 2], 2, {}), ([], 0.8, {}), (["--top-k", 3], 0.8, dict(top_k=3)),
                                       (["--top-p", 0.5], 0.8, dict(top_p=0.5))]:
        r = sample(policy, [tokenizer.encode("the")] * 2, 9, 261, temperature, torch.Generator().manual_seed(0), **tail)
        expected = "".join(f"the{completion}\n" for completion in r.completions(tokenizer))
        assert say(capsys, run, "--prompt", "the", "-n", 2, "--max-new-tokens", 9, *options) == expected


def test_a_terminal_sees_the_same_text_as_it_comes(run, capsys, monkeypatch):
    ask = lambda length, seed: ["--prompt", "the", "-n", 2, "--seed", seed, "--max-new-tokens", length]
    plain = {(length, seed): say(capsys, run, *ask(length, seed)) for length in (1, 15) for seed in range(12)}
    assert any(text.startswith("the\ufffd\n") for text in plain.values())  # some end in the middle of a character
    writes = []

    class Terminal(io.StringIO):
        isatty = lambda self: True
        write = lambda self, text: writes.append(text)
    monkeypatch.setattr(sys, "stdout", Terminal())
    for (length, seed), text in plain.items():
        writes.clear()
        rollout.main([str(run), *map(str, ask(length, seed))])
        assert "".join(writes) == text and (length == 1 or len(writes) > 4)  # token by token


def test_standard_input_is_a_prompt_a_line(run):
    ask = lambda data: subprocess.run([sys.executable, ROOT / "rollout.py", run, "-n", "2", "--max-new-tokens", "3"], input=data, capture_output=True)
    lines = ask("\ufeffthe plot\r\n\n中文".encode()).stdout.decode()
    assert len(re.findall("^the plot", lines, re.M)) == 2 and len(re.findall("^中文", lines, re.M)) == 2
    assert ask(b"").stdout == b""
    for data in (b"\xff\xfe\n", b"the" * 99, b"z" * 24):
        done = ask(data)
        assert done.returncode == 2 and done.stderr.startswith(b"error: ") and done.stderr.count(b"\n") == 1


def test_logprobs_are_those_of_policy_and_reference(run, capsys):
    out = say(capsys, run, "--prompt", "the", "-n", 2, "--max-new-tokens", 6, "--logprobs", "--seed", 5)
    policy, reference, tokenizer, _ = load_checkpoint(run)
    r = sample(policy, [tokenizer.encode("the")] * 2, 6, 261, 0.8, torch.Generator().manual_seed(5))
    table, expected = re.findall(r"^ +([\d.]+) +([\d.]+)  (.+)$", out, re.M), []
    for row in range(2):
        steps = r.mask[row].nonzero().squeeze(1)
        p, q = ((model(r.tokens[:, :-1]) / 0.8).softmax(-1)[row, steps, r.tokens[row, steps + 1]] for model in (policy, reference))
        expected += zip(p.tolist(), q.tolist())
        assert f"log-probability {p.log().sum().item():.2f} under the policy, {q.log().sum().item():.2f} under the reference" in out
    assert len(table) == len(expected) == r.mask.sum() and any(abs(p - q) > 1e-3 for p, q in expected)
    for row, pair in zip(table, expected):
        assert [float(x) for x in row[:2]] == pytest.approx(pair, abs=1e-4)


def test_export(run, capsys):
    assert say(capsys, run, "--export", run / "gpt2") == ""
    policy, _, _, _ = load_checkpoint(run)
    assert torch.equal(GPT.from_gpt2(run / "gpt2")(torch.tensor([[1, 2]])), policy(torch.tensor([[1, 2]])))
    assert json.loads((run / "gpt2" / "config.json").read_text())["eos_token_id"] == 261
    before = (run / "gpt2" / "config.json").read_bytes()
    assert rollout.main([str(run), "--export", str(run / "gpt2")]) == 2 and (run / "gpt2" / "config.json").read_bytes() == before
    for place in ("/proc/nowhere/gpt2", run / "checkpoint.pt" / "gpt2"):
        assert rollout.main([str(run), "--export", str(place)]) == 2
    err = capsys.readouterr().err
    assert err.count("error: ") == err.count("\n") == 3


def test_a_disk_that_is_full(run):
    command = f"ulimit -f 8; exec {sys.executable} {ROOT / 'rollout.py'} {run} --export {run / 'gpt2'}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: cannot write") and done.stderr.count("\n") == 1
    assert [p.name for p in run.iterdir()] == ["checkpoint.pt"]


def test_a_reader_that_leaves(run):
    command = f"set -o pipefail; {sys.executable} {ROOT / 'rollout.py'} {run} --prompt the -n 5000 --max-new-tokens 9 | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("the") and done.stdout.count("\n") == 1 and not done.stderr and done.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_an_output_that_is_full(run):
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, ROOT / "rollout.py", run, "--prompt", "the"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
