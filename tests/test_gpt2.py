"""The converter tests/examples/gpt2.py against transformers, with small random models and no download."""

import json
import os
import random
import runpy
import shutil
import sys
from dataclasses import replace

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a name on the hub is refused at once

import pytest
import torch
import torch.nn as nn

import train
from helpers import ROOT, Malice, contents, task_file
from model import GPT, GPTConfig, Tokenizer, load_checkpoint, save_checkpoint
from rollout import sample

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
if not transformers.is_torch_available():
    pytest.skip("this version of transformers needs a newer torch", allow_module_level=True)
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

PROGRAM = ROOT / "tests" / "examples" / "gpt2.py"
sys.path.insert(0, str(PROGRAM.parent))
import gpt2

END = "<|endoftext|>"
CORPUS = ["the acting was superb.", "the plot was dull, it's naïve: 春眠不觉晓，处处闻啼鸟。"] * 50
CONFIG = GPTConfig(vocab_size=300, block_size=32, n_layer=3, n_head=4, n_embd=48)
ORIGINAL = GPTConfig(vocab_size=50257, block_size=32, n_layer=1, n_head=2, n_embd=8)  # GPT-2's vocabulary


def disturbed(model):
    """The model with weights far from the initial ones, where biases are zero and attention is uniform."""
    for i, p in enumerate(model.parameters()):
        p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return model.eval()


def make_theirs(c, **changes):
    """transformers' GPT-2 with random weights and the sizes of a GPTConfig."""
    sizes = dict(vocab_size=c.vocab_size, n_positions=c.block_size, n_layer=c.n_layer, n_head=c.n_head,
                 n_embd=c.n_embd, bos_token_id=0, eos_token_id=0)
    return disturbed(GPT2LMHeadModel(GPT2Config(**sizes | changes)))


def write_tokenizer(folder):
    """vocab.json and merges.txt of 300 tokens in no order. The end of text is token 0."""
    learned = ByteLevelBPETokenizer()
    learned.train_from_iterator(CORPUS, vocab_size=300, special_tokens=[END], show_progress=False)
    learned.save_model(str(folder))
    tokens = [*json.loads((folder / "vocab.json").read_text(encoding="utf-8"))][1:]
    random.Random(0).shuffle(tokens)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate([END, *tokens])}))


@pytest.fixture
def folder(tmp_path):
    """A GPT-2 as transformers writes it, with a tokenizer."""
    make_theirs(CONFIG).save_pretrained(tmp_path / "gpt2")
    write_tokenizer(tmp_path / "gpt2")
    return tmp_path / "gpt2"


@pytest.fixture(params=["ours", pytest.param("gpt2", marks=pytest.mark.slow)])
def run(request, tmp_path, gpt2_vocabulary):
    """A checkpoint of ours, with a tokenizer of either kind."""
    tokenizer = Tokenizer.learn(CORPUS, 300) if request.param == "ours" else Tokenizer.gpt2()
    config = replace(CONFIG if request.param == "ours" else ORIGINAL, vocab_size=tokenizer.vocab_size)
    save_checkpoint(tmp_path / "run" / "checkpoint.pt", disturbed(GPT(config)), tokenizer)
    return tmp_path / "run"


def convert(*words):
    return gpt2.main([str(word) for word in words])


def refused(capsys, folder, *words):
    """The line with which a command is refused; nothing below folder may change."""
    before = contents(folder), {*folder.rglob("*")}
    assert convert(*words) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n") and out.count("\n") <= 1
    assert (contents(folder), {*folder.rglob("*")}) == before
    return err


@pytest.mark.slow
def test_greedy_completions_are_those_of_transformers_up_to_the_whole_context(folder):
    config = replace(CONFIG, block_size=1024)
    theirs = make_theirs(config)
    theirs.save_pretrained(folder)
    ours, tokenizer = gpt2.import_gpt2(str(folder))
    _, rows = gpt2.read_tokenizer(str(folder))
    rows, prompt = torch.tensor(rows), tokenizer.encode("the plot")
    n = 1024 - len(prompt)
    batch = sample(ours, [prompt], n, -1, temperature=0)
    continued = theirs.generate(rows[prompt][None], do_sample=False, max_new_tokens=n, eos_token_id=None,
                                pad_token_id=0)
    assert rows[batch.actions[0]].tolist() == continued[0, 1:].tolist() and continued.shape[1] == 1024


def random_texts(count):
    rng = random.Random(0)
    pieces = ["a", "it", "the acting", "'s", "'ll", " ", "  ", "\n", "\t", "\r", "7", "00001", ",", "é", "中",
              "春眠", "眠不觉", "\u3000", "\xa0", "🎬", "\x00", "\u0301", "_"]
    return ["".join(rng.choices(pieces, k=12)) for _ in range(count)]


def same(policy, other):
    state = policy.state_dict()
    equal = (torch.equal(p, state[name]) for name, p in other.state_dict().items())
    return policy.config == other.config and all(equal)


# Import.

SLOW_FORMS = ["in half precision", "pytorch_model.bin", "only the trunk, in half precision"]


@torch.no_grad()
@pytest.mark.parametrize("form", ["safetensors", "in shards",
                                  *(pytest.param(form, marks=pytest.mark.slow) for form in SLOW_FORMS)])
def test_we_compute_what_transformers_computes_and_continue_as_it_does(folder, form):
    theirs = make_theirs(CONFIG)
    if "half" in form:
        theirs = theirs.half()
    if form == "in shards":
        (folder / "model.safetensors").unlink()
        theirs.save_pretrained(folder, max_shard_size="100KB")
        assert len([*folder.glob("model-*.safetensors")]) > 1
    elif form in ("safetensors", "in half precision"):
        theirs.save_pretrained(folder)
    else:
        state = theirs.state_dict()
        if "trunk" in form:  # as the first release is stored
            state = theirs.transformer.state_dict()
            state |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32).tril() for i in range(3)}
            state |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(3)}
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")
    assert convert("import", folder, folder / "ours") is None
    ours, _, tokenizer, _ = load_checkpoint(folder / "ours")
    theirs = theirs.float()
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    assert ours.config == CONFIG and all(p.dtype == torch.float32 for p in ours.parameters())

    vocab, written = json.loads((folder / "vocab.json").read_text(encoding="utf-8")), bytes_to_unicode()
    tokens = ["".join(map(written.get, bytes.fromhex(token))) for token in tokenizer.state()["tokens"]]
    rows = torch.tensor([vocab[token] for token in [*tokens, END]])  # their token for each of ours
    assert tokenizer.eos_token == 299 and rows.sort().values.tolist() == [*range(300)]
    x = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(x), theirs(rows[x]).logits[..., rows], rtol=0, atol=1e-4)
    for text in random_texts(300):
        assert rows[tokenizer.encode(text)].tolist() == their_tokenizer.encode(text)

    prompt = tokenizer.encode("the plot")
    batch = sample(ours, [prompt], 12, tokenizer.eos_token, temperature=0)
    greedy = torch.cat([batch.obs[0, :1], batch.actions[0]])
    continued = theirs.generate(rows[prompt][None], do_sample=False, max_new_tokens=12, pad_token_id=0)
    assert len(greedy) > len(prompt) and rows[greedy].tolist() == continued[0].tolist()


def test_tokens_of_gpt2s_own_vocabulary_keep_their_numbers(folder):
    """GPT-2's has the printable bytes first, then the other bytes, merges, and the end of text."""
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]  # less the version
    tokens = [*bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in merges), END]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    tokenizer, rows = gpt2.read_tokenizer(str(folder))
    assert rows == [*range(300)] and tokenizer.name == "gpt2" and tokenizer.encode("!") == [0]


def test_special_tokens_and_padding_are_left_out(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    make_theirs(replace(CONFIG, vocab_size=320)).save_pretrained(folder)
    policy, tokenizer = gpt2.import_gpt2(str(folder))
    assert policy.config == CONFIG and tokenizer.vocab_size == 300


@pytest.mark.slow
def test_a_name_on_the_hub_is_found_in_its_cache(folder, tmp_path, monkeypatch):
    cached = tmp_path / "hub" / "models--some--gpt2"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, cached / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    policy, tokenizer = gpt2.import_gpt2("some/gpt2")
    expected, expected_tokenizer = gpt2.import_gpt2(str(folder))
    assert same(policy, expected) and tokenizer.state() == expected_tokenizer.state()


@pytest.mark.parametrize("size", [50257, 50304])
def test_without_a_tokenizer_gpt2s_is_assumed_and_padding_is_cut(tmp_path, capsys, gpt2_vocabulary, size):
    theirs = make_theirs(replace(ORIGINAL, vocab_size=size))
    theirs.save_pretrained(tmp_path / "gpt2")
    policy, tokenizer = gpt2.import_gpt2(str(tmp_path / "gpt2"))
    assert capsys.readouterr().out == f"{tmp_path / 'gpt2'} has no tokenizer: GPT-2's vocabulary is assumed\n"
    assert policy.config == ORIGINAL and tokenizer.state() == Tokenizer.gpt2().state()
    assert torch.equal(policy.transformer.wte.weight, theirs.transformer.wte.weight[:50257])


def write_nanogpt(path, config, bias=True, prefix=""):
    """What nanoGPT's train.py writes, where its linear layers have our layout. Returns the same GPT."""
    policy = disturbed(GPT(config))
    for name, p in policy.named_parameters():
        if name.endswith("bias") and not bias:
            p.data.zero_()
    state = {name: t for name, t in policy.state_dict().items() if bias or not name.endswith("bias")}
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, config.block_size, config.block_size).tril()
    state["lm_head.weight"] = state["transformer.wte.weight"]
    sizes = dict(n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, dropout=0.0, bias=bias,
                 block_size=config.block_size, vocab_size=config.vocab_size)
    torch.save({"model": {prefix + name: t for name, t in state.items()}, "model_args": sizes, "iter_num": 7,
                "optimizer": {}, "best_val_loss": torch.tensor(1.5), "config": dict(compile=True)}, path)
    return policy


@pytest.mark.parametrize("size, bias, prefix", [(50257, True, ""), (50304, False, "_orig_mod.")])
def test_nanogpts_checkpoint_is_imported(tmp_path, gpt2_vocabulary, size, bias, prefix):
    written = write_nanogpt(tmp_path / "ckpt.pt", replace(ORIGINAL, vocab_size=size), bias, prefix)
    policy, tokenizer = gpt2.import_gpt2(str(tmp_path / "ckpt.pt"))
    cut = GPT(ORIGINAL)
    cut.load_state_dict(written.state_dict()
                        | {"transformer.wte.weight": written.transformer.wte.weight[:50257]})
    assert same(policy, cut) and tokenizer.eos_token == 50256


# Export.

@torch.no_grad()
def test_export_is_what_transformers_loads_and_import_gives_it_back(run, tmp_path):
    policy, _, tokenizer, _ = load_checkpoint(run)
    assert convert("export", run, tmp_path / "below" / "hf") is None
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "below" / "hf").eval()
    x = torch.randint(tokenizer.vocab_size, (4, 32), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(policy(x), theirs(x).logits, rtol=0, atol=1e-4)

    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "below" / "hf")
    assert len(their_tokenizer) == tokenizer.vocab_size == theirs.config.vocab_size
    assert their_tokenizer.eos_token_id == tokenizer.eos_token == theirs.config.eos_token_id
    for text in random_texts(1000):
        assert tokenizer.encode(text) == their_tokenizer.encode(text)
        assert their_tokenizer.decode(tokenizer.encode(text)) == text

    again, tokenizer_again = gpt2.import_gpt2(str(tmp_path / "below" / "hf"))
    assert same(again, policy) and tokenizer_again.state() == tokenizer.state()
    assert {path.name for path in (tmp_path / "below").iterdir()} == {"hf"}


def test_gpt2_stores_the_transpose_of_its_linear_layers_alone():
    ours = disturbed(GPT(CONFIG))
    stored = gpt2.transpose_linear(ours.state_dict())
    linear = {f"{name}.weight" for name, module in ours.named_modules() if isinstance(module, nn.Linear)}
    for name, t in ours.state_dict().items():
        assert torch.equal(stored[name], t.T if name in linear else t)


def test_a_run_starts_from_an_import_and_is_exported(folder, tmp_path):
    assert convert("import", folder, tmp_path / "start") is None
    options = ("--batch-size 8 --minibatches 2 --eval-episodes 8 --max-new-tokens 6 --threads 1 "
               "--iterations 1").split()
    files = ["--task", str(task_file(tmp_path)), "--out", str(tmp_path)]
    assert train.main([*options, *files, "--init", str(tmp_path / "start"), "--name", "a"]) is None
    policy, reference, _, more = load_checkpoint(tmp_path / "a")
    assert same(reference, load_checkpoint(tmp_path / "start")[0])
    assert [more["config"][name] for name in train.INHERITED] == ["gpt2", 300, 32, 3, 4, 48]
    assert convert("export", tmp_path / "a", tmp_path / "b") is None
    assert same(policy, gpt2.import_gpt2(str(tmp_path / "b"))[0])


# Refusals.

@pytest.mark.parametrize("changes, says", [
    (dict(model_type="llama"), "model_type is 'llama', not 'gpt2'"), (dict(n_head=5), "num_heads"),
    (dict(activation_function="relu"), "activation_function is 'relu'"), (dict(vocab_size=301), "mismatch"),
    (dict(layer_norm_epsilon=1e-6), "layer_norm_epsilon is 1e-06"), (dict(n_inner=50), "mismatched tensors"),
    (dict(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx is True"),
    (dict(tie_word_embeddings=False), "tie_word_embeddings is False"), (dict(n_embd="48"), "n_embd")])
def test_a_configuration_of_another_model_is_refused(folder, capsys, changes, says):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    err = refused(capsys, folder, "import", folder, folder / "new")
    assert says in err and str(folder) in err


def test_every_wrong_tensor_is_named(folder, capsys):
    whole, moved = load_file(folder / "model.safetensors"), "transformer.h.1.ln_2.bias"
    weight = whole["transformer.h.0.mlp.c_fc.weight"]
    for tensors, says in [
            ({name: t for name, t in whole.items() if name != moved}, f"missing tensors: {moved}\n"),
            (whole | {"transformer.extra": weight.clone()}, "unexpected tensors: transformer.extra\n"),
            (whole | {"transformer.h.0.mlp.c_fc.weight": weight.T.contiguous()}, "h.0.mlp.c_fc.weight"),
            (whole | {"lm_head.weight": torch.zeros(300, 48)}, "head is not the token embedding")]:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        assert says in refused(capsys, folder, "import", folder, folder / "new")


def test_damaged_and_hostile_files_are_refused_in_one_line(folder, tmp_path, capsys):
    executed = tmp_path / "executed"
    for file, damages in {"config.json": [b'{"n_embd": 4', b"\xff\xfe", b"[]", b"", None],
                          "model.safetensors": [b"", b"\x08" + bytes(5000), None],
                          "vocab.json": [b"{", b"[]", b'{"a": 0}'], "merges.txt": [b"a b c d\n", b"q zz\n"],
                          }.items():
        whole = (folder / file).read_bytes()
        for damage in [*damages, whole[:len(whole) // 2]] if file != "merges.txt" else damages:
            (folder / file).unlink(missing_ok=True)
            if damage is not None:
                (folder / file).write_bytes(damage)
            assert str(folder) in refused(capsys, folder, "import", folder, tmp_path / "new")
        (folder / file).write_bytes(whole)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    hostile = weights | {"transformer.wte.weight": Malice(executed)}
    for damage in [[1], {"transformer.wte.weight": "x"}, hostile]:
        torch.save(damage, folder / "pytorch_model.bin")
        refused(capsys, folder, "import", folder, tmp_path / "new")
    assert not executed.exists()


def rewrite(path, change):
    state = json.loads(path.read_text(encoding="utf-8"))
    change(state)
    path.write_text(json.dumps(state))


@pytest.mark.parametrize("change, says", [
    (lambda state: state.update(normalizer={"type": "Lowercase"}), "differ on"),
    (lambda state: state["pre_tokenizer"].update(add_prefix_space=True), "differ on"),
    (lambda state: state["model"]["vocab"].update({"\u4e2d": 300}), "not like GPT-2's"),
    (lambda state: state.update(model=dict(type="WordLevel", vocab={"a": 0}, unk_token="a")), "not like"),
    (lambda state: state.update(added_tokens=[]), "")])
def test_another_kind_of_tokenizer_is_refused(folder, capsys, change, says):
    """add_prefix_space and the like are read from tokenizer.json where its class is the general one."""
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink(missing_ok=True)
    rewrite(folder / "tokenizer.json", change)
    rewrite(folder / "tokenizer_config.json", lambda state: state.update(
        {"tokenizer_class": "PreTrainedTokenizerFast"} | ({} if says else {"eos_token": None})))
    assert (says or "not like GPT-2's") in refused(capsys, folder, "import", folder, folder / "new")


def test_a_vocabulary_that_cannot_be_known_is_refused(tmp_path, capsys, gpt2_vocabulary):
    for size in (65, 50256, 50305):  # 65: characters
        write_nanogpt(tmp_path / "ckpt.pt", replace(ORIGINAL, vocab_size=size))
        err = refused(capsys, tmp_path, "import", tmp_path / "ckpt.pt", tmp_path / "new")
        assert f"it has no tokenizer, and {size} tokens, where GPT-2 has 50257" in err
    make_theirs(CONFIG).save_pretrained(tmp_path / "gpt2")
    assert "300 tokens" in refused(capsys, tmp_path, "import", tmp_path / "gpt2", tmp_path / "new")


@pytest.mark.parametrize("run", ["ours"], indirect=True)
def test_other_input_is_refused(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    write_nanogpt(tmp_path / "ckpt.pt", ORIGINAL)
    state = torch.load(tmp_path / "ckpt.pt")
    state["model"].pop("transformer.wpe.weight")
    torch.save(state, tmp_path / "less.pt")
    torch.save(state | {"model": Malice(tmp_path / "executed")}, tmp_path / "malice.pt")
    (tmp_path / "torn.pt").write_bytes((tmp_path / "ckpt.pt").read_bytes()[:5000])
    for words, says in [
            (("import", "no-such-model", tmp_path / "new"), "give a GPT-2 of the hub"),
            (("import", tmp_path / "nowhere", tmp_path / "new"), "give a GPT-2 of the hub"),
            (("import", tmp_path / "empty", tmp_path / "new"), "no file named model.safetensors"),
            (("import", run, tmp_path / "new"), "no file named model.safetensors"),
            (("import", run / "checkpoint.pt", tmp_path / "new"), "ckpt.pt (KeyError: 'model_args')"),
            (("import", tmp_path / "less.pt", tmp_path / "new"), '"transformer.wpe.weight"'),
            (("import", tmp_path / "malice.pt", tmp_path / "new"), "hold more than weights"),
            (("import", tmp_path / "torn.pt", tmp_path / "new"), "torn.pt"),
            (("import", tmp_path / "ckpt.pt", tmp_path / "empty"), "empty exists: give a new directory"),
            (("export", run, tmp_path / "empty"), "empty exists: give a new directory"),
            (("export", run, run / "checkpoint.pt" / "below"), "cannot write"),
            (("export", tmp_path / "nowhere", tmp_path / "new"), "there is no checkpoint")]:
        assert says in refused(capsys, tmp_path, *words)

    def full(self, path):
        raise OSError("no space left")

    monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "save_pretrained", full)  # after the weights
    assert "no space left" in refused(capsys, tmp_path, "export", run, tmp_path / "new")
    monkeypatch.setitem(sys.modules, "transformers", None)  # its import raises ImportError
    assert "pip install transformers" in refused(capsys, tmp_path, "export", run, tmp_path / "new")
    assert "pip install transformers" in refused(capsys, tmp_path, "import", "gpt2", tmp_path / "new")


def test_without_the_vocabulary_of_gpt2_the_message_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    def no_network(name):
        raise ConnectionError

    monkeypatch.setattr("tiktoken.get_encoding", no_network)
    write_nanogpt(tmp_path / "ckpt.pt", ORIGINAL)
    err = refused(capsys, tmp_path, "import", tmp_path / "ckpt.pt", tmp_path / "new")
    assert "TIKTOKEN_CACHE_DIR" in err


def test_help_shows_both_commands(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), "--help"])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(PROGRAM), run_name="__main__")
    assert e.value.code == 0
    out = capsys.readouterr().out
    assert "gpt2.py import SOURCE DIR" in out and "gpt2.py export RUN DIR" in out
