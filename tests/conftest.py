import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two test files run side by side

import pytest
import tiktoken

import model


@pytest.fixture
def gpt2_vocabulary(monkeypatch):
    """Made-up words in place of GPT-2's vocabulary, which takes a download: as many tokens."""
    words = [f"{i:05d}".encode() for i in range(50256 - 256)]
    ranks = {bytes([i]): i for i in range(256)} | {word: 256 + i for i, word in enumerate(words)}
    encoding = tiktoken.Encoding("gpt2", pat_str=model.GPT2_SPLIT, mergeable_ranks=ranks,
                                 special_tokens={"<|endoftext|>": 50256})
    monkeypatch.setattr(model.tiktoken, "get_encoding", lambda name: {"gpt2": encoding}[name])
