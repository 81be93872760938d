"""GPT-2 in and out, by the transformers library (`pip install transformers`). DIR must not exist yet.

`python tests/examples/gpt2.py import SOURCE DIR` writes DIR/checkpoint.pt, for train.py's --init. SOURCE: a
name on the Hugging Face hub, such as gpt2 (a download), a directory as transformers writes it, or a nanoGPT
ckpt.pt.
`python tests/examples/gpt2.py export RUN DIR` writes the weights, configuration and tokenizer of a run, or of
a checkpoint, for transformers' from_pretrained.
"""
import argparse
import itertools
import json
import math
import pickle
import sys
import tempfile
import textwrap
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from model import GPT, SPLITS, BadInput, GPTConfig, Tokenizer, load_checkpoint, save_checkpoint
from reward import TASKS

# What a configuration may say where our GPT has no choice. The first is GPT-2's.
GPT2 = {"model_type": ("gpt2",), "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,), "scale_attn_weights": (True,), "add_cross_attention": (False,),
        "scale_attn_by_inverse_layer_idx": (False,), "tie_word_embeddings": (True,)}
TEXTS = [" ", "the quick brown fox", " two  spaces, at the end  ", "It's we'll THEY'VE 'tis", "naïve café",
         "3.14159 1,000,000", "春眠不觉晓，处处闻啼鸟。", "the 春眠 7号 x", "日本語 かな 한국어",
         "Привет, мир",
         "مرحبا بالعالم", "🎬👩‍👩‍👧 🇨🇭!", "a\r\nb\rc\n\n\nd\n", "\tdef f(x):\n    return x ** 2\n",
         "--- ... ?!", "https://x.org/?a=1&b=%20", "…—“quoted”", "a\u3000b\xa0c\u200bd\x00\x7f", "½ ² Ⅷ ٣"]


def load_transformers():
    """The module, made silent. Raises BadInput where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise BadInput("transformers is not installed: pip install transformers")
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    return transformers


def transpose_linear(tensors):
    """{name: tensor} with every linear layer transposed: from our layout to GPT-2's, or back."""
    embeddings = ("transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight")
    return {name: t.T.contiguous() if t.dim() == 2 and name not in embeddings else t
            for name, t in tensors.items()}


def read_transformers(source):
    """(GPTConfig, {name: tensor} in our layout) of a directory, or of a name on the hub."""
    transformers = load_transformers()
    given, _ = transformers.PretrainedConfig.get_config_dict(source)
    for name, allowed in GPT2.items():
        if given.get(name, allowed[0]) not in allowed:
            raise BadInput(f"this is not a GPT-2: {name} is {given[name]!r}, not {allowed[0]!r}")
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(
        source, output_loading_info=True, ignore_mismatched_sizes=True)  # the report names them
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(key) for key in report[f"{kind}_keys"] if not str(key).endswith(".masked_bias"))
        if names:
            raise BadInput(f"{kind} tensors: {', '.join(names)}")
    c = theirs.config
    config = GPTConfig(c.vocab_size, c.n_positions, c.n_layer, c.n_head, c.n_embd)
    return config, transpose_linear(theirs.state_dict())


def read_nanogpt(path):
    """(GPTConfig, {name: tensor}) of nanoGPT's file. Biases that it was trained without are zeros.

    Since June 2023 nanoGPT has the exact GELU, before that the tanh form, as ours, which is up to 5e-4 away.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    given = state["model_args"]
    config = GPTConfig(*(given[s] for s in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")))
    weights = {name.removeprefix("_orig_mod."): t for name, t in state["model"].items()
               if not name.endswith(".attn.bias")}  # the causal mask
    if not given["bias"]:
        weights = {name: torch.zeros_like(p) for name, p in GPT(config).named_parameters()
                   if name.endswith("bias")} | weights
    return config, weights


def check_tokens(ours, theirs, rows):
    """Raises BadInput unless both agree on pairs of TEXTS and on corpora. rows: their tokens for ours."""
    texts = [*map("".join, itertools.product(TEXTS, repeat=2))]
    for task in TASKS.values():
        texts += task(0).corpus[:100]
    for text in texts:
        if [rows[token] for token in ours.encode(text)] != theirs.encode(text, add_special_tokens=False):
            raise BadInput(f"the tokenizers of transformers and of this program differ on {text!r}")


def read_tokenizer(source):
    """(our Tokenizer, the row of the source's embedding for each of our tokens)."""
    theirs = load_transformers().AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    byte = {character: byte for byte, character in bytes_to_unicode().items()}  # GPT-2's files are printable
    try:
        state = json.loads(theirs.backend_tokenizer.to_str())
        vocab, special = state["model"]["vocab"], {token["content"] for token in state["added_tokens"]}
        # A merge is a pair, or one string with a space in older files.
        ranks = {"".join(pair).replace(" ", ""): i for i, pair in enumerate(state["model"]["merges"])}
        # Single bytes first, then merges by rank. The vocabularies of GPT-2 and of ours keep their order.
        order = lambda token: (-1 if len(token) == 1 else ranks.get(token, math.inf), vocab[token])
        tokens = sorted(vocab.keys() - special, key=order)
        name = "bpe" if json.dumps(SPLITS["bpe"]) in json.dumps(state) else "gpt2"
        ours = Tokenizer.from_state({"name": name, "tokens": [bytes(map(byte.get, t)).hex() for t in tokens]})
        rows = [*(vocab[token] for token in tokens), int(theirs.eos_token_id)]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise BadInput("its tokenizer is not like GPT-2's: BPE with every byte and an end of text")
    check_tokens(ours, theirs, rows)
    return ours, rows


def import_gpt2(source):
    """(policy, tokenizer) of a source as above. Nothing in its files is executed. Raises BadInput.

    Special tokens but the end of text are left out, and so is padding of the vocabulary. A source without the
    files of a tokenizer is taken to have GPT-2's vocabulary, and a line says so.
    """
    path = Path(source)
    try:
        config, weights = read_nanogpt(path) if path.is_file() else read_transformers(source)
        embedding = weights["transformer.wte.weight"]
        if not torch.equal(weights.pop("lm_head.weight", embedding), embedding):
            raise BadInput("this is not a GPT-2: its output head is not the token embedding")
        if not path.exists() or (path / "tokenizer.json").exists() or (path / "vocab.json").exists():
            tokenizer, rows = read_tokenizer(source)
        elif 50257 <= config.vocab_size <= 50304:  # the next multiple of 64
            print(f"{source} has no tokenizer: GPT-2's vocabulary is assumed")
            tokenizer, rows = Tokenizer.gpt2(), [*range(50257)]
        else:
            raise BadInput(f"it has no tokenizer, and {config.vocab_size} tokens, where GPT-2 has 50257")
        policy = GPT(replace(config, vocab_size=len(rows)))
        policy.load_state_dict(weights | {"transformer.wte.weight": embedding[rows]})
    except BadInput as e:
        raise BadInput(f"cannot import {source}: {e}")
    except pickle.UnpicklingError:  # its own message recommends to execute what is in the file
        raise BadInput(f"cannot import {source}: its weights are damaged, or hold more than weights")
    except Exception as e:  # a damaged file or a network can raise nearly anything
        raise BadInput(f"cannot import {source}: give a GPT-2 of the hub, a directory as transformers writes "
                       f"it, or nanoGPT's ckpt.pt ({type(e).__name__}: {textwrap.shorten(str(e), 500)})")
    return policy, tokenizer


def tokenizer_for_transformers(tokenizer):
    """transformers' tokenizer with the same tokens on every text without a literal <|endoftext|>."""
    transformers = load_transformers()
    from transformers.convert_slow_tokenizer import TikTokenConverter
    ranks = {bytes.fromhex(token): i for i, token in enumerate(tokenizer.state()["tokens"])}
    converter = TikTokenConverter(pattern=SPLITS[tokenizer.name])
    converter.load_tiktoken_bpe = lambda _: ranks  # in place of a file
    end = "<|endoftext|>"  # which becomes the last token
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=converter.converted(), bos_token=end,
                                                  eos_token=end, clean_up_tokenization_spaces=False)
    check_tokens(tokenizer, theirs, range(tokenizer.vocab_size))
    return theirs


def export_gpt2(policy, tokenizer, directory):
    """Write a new directory that transformers' GPT2LMHeadModel and AutoTokenizer load. Raises BadInput."""
    transformers, c, end = load_transformers(), policy.config, tokenizer.eos_token
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
        n_head=c.n_head, bos_token_id=end, eos_token_id=end))
    tensors = transpose_linear(policy.state_dict())
    theirs.load_state_dict(tensors | {"lm_head.weight": tensors["transformer.wte.weight"]})
    files, directory = tokenizer_for_transformers(tokenizer), Path(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as beside:  # the directory is whole or absent
            theirs.save_pretrained(f"{beside}/gpt2")
            files.save_pretrained(f"{beside}/gpt2")
            Path(beside, "gpt2").rename(directory)
    except Exception as e:  # of the file system, or safetensors' own
        raise BadInput(f"cannot write {directory}: give a new directory on a disk with room ({e})")


def main(argv=None):
    """The exit status: 2, after a line `error: …`, for input that cannot be used; nothing is written then."""
    parser = argparse.ArgumentParser(description=__doc__, usage=argparse.SUPPRESS,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("command", choices=("import", "export"))
    parser.add_argument("source", help="what to import, or the run to export")
    parser.add_argument("directory", metavar="DIR", help="where to write it: a new directory")
    args = parser.parse_args(argv)
    try:
        if Path(args.directory).exists():
            raise BadInput(f"{args.directory} exists: give a new directory")
        if args.command == "import":
            save_checkpoint(Path(args.directory) / "checkpoint.pt", *import_gpt2(args.source))
        else:
            policy, _, tokenizer, _ = load_checkpoint(args.source)
            export_gpt2(policy, tokenizer, args.directory)
    except BadInput as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
