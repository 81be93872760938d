"""The policy acts: `sample` completes prompts, and `run_episodes` compares the policy with the reference.

`python rollout.py runs/NAME --prompt "the acting was"` samples from a trained policy; `--help` lists the
options.

A Batch (algos.py) has one column per action: obs, the token that was read, and actions, the token that was
chosen next. `map_micro_batches` computes a function of it in pieces that fit the memory.

This file leaves out beam search, which is no way for a policy to act, and repetition penalties, which would
train another distribution than the one that is sampled.
"""

import argparse
import bisect
import math
import signal
import sys

import torch

from algos import Batch, action_log_probs, entropy, kl_divergence, log_probs, map_micro_batches
from model import BadInput, load_checkpoint, replace_surrogates


def draw(logp, uniforms):
    """Draw one token per row: the uniform number falls into one token's interval of cumulative probabilities.

    logp: (B, V) log-probabilities, up to a constant per row.  uniforms: (B,) in (0, 1]; 0 is excluded, so a
    token of probability zero is never drawn.  Returns (B,) int64. This takes one random number per row,
    whereas torch.multinomial takes V.
    """
    cdf = logp.exp().cumsum(-1)  # (B, V)
    drawn = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:]).squeeze(-1)
    return drawn.clamp(max=logp.shape[-1] - 1)  # NaN would give V, which is not a token


def top_k_top_p(logp, top_k=0, top_p=1.0):
    """logp (B, V), with -inf for all but the top_k most likely (0: all) and the fewest that hold top_p.

    For people who read samples. Training samples from all of π.
    Top-k: Fan et al. 2018; top-p, or nucleus: Holtzman et al. 2020.
    """
    ordered, index = logp.sort(-1, descending=True)
    before = ordered.exp().cumsum(-1) - ordered.exp()  # (B, V) the probability of all more likely tokens
    keep = before < (top_p if top_p < 1 else math.inf)  # 1 keeps all, whatever the rounding
    if top_k:
        keep[:, top_k:] = False
    keep = keep.gather(-1, index.argsort(-1))  # from sorted order back to the order of the vocabulary
    return logp.masked_fill(~keep, -math.inf)


def choose(logits, uniforms, temperature=1.0, top_k=0, top_p=1.0):
    """The next token of each row and its log-probability, (B,) each.

    logits: (B, V).  uniforms: (B,) in (0, 1].
    temperature: divides the logits; 0 is greedy. The log-probability is at the temperature (1 if greedy), and
    it is that of all of π, whatever top_k and top_p are.
    """
    logp = (logits / (temperature or 1)).log_softmax(-1)
    if temperature == 0:
        choice = logp.argmax(-1)
    elif top_k or top_p < 1:
        choice = draw(top_k_top_p(logp, top_k, top_p), uniforms)
    else:
        choice = draw(logp, uniforms)
    return choice, action_log_probs(logp, choice)


@torch.no_grad()
def sample_one(policy, prompt, uniforms, eos_token, temperature=1.0):
    """The definition of sampling: complete one prompt, and compute everything anew for each token.

    prompt: a list of tokens.  uniforms: (max_new_tokens,) in (0, 1], one for each action.
    Returns the completion, a list of tokens.
    """
    tokens = torch.tensor([prompt], device=uniforms.device)  # (1, T)
    for u in uniforms:
        choice, _ = choose(policy(tokens)[:, -1], u[None], temperature)
        tokens = torch.cat([tokens, choice[None]], 1)
        if choice == eos_token:
            break
    return tokens[0, len(prompt):].tolist()


@torch.no_grad()
def sample(policy, prompts, max_new_tokens, eos_token, temperature=1.0, generator=None, top_k=0, top_p=1.0):
    """Complete each prompt until the policy chooses eos_token or has chosen max_new_tokens.

    Each row gets what `sample_one` would give it, up to rounding, whatever the other rows are.
    policy: (tokens, cache) -> logits, with `kv_cache`.  prompts: B lists of at least one token each.
    temperature, top_k, top_p: see `choose`.
    Returns a Batch of obs, actions, mask and logprobs as long as its longest row: prompt, completion and its
    end of text, then end-of-text tokens as padding. logprobs are undefined where mask is False.
    Raises ValueError for an empty prompt, or one that leaves too little room in the context.
    """
    device = next(policy.parameters()).device
    lengths = [len(prompt) for prompt in prompts]
    B = len(prompts)
    # Column t chooses tokens[:, t+1]. A prompt of 2 tokens and 3 new ones: 5 tokens, 4 columns, of which 1, 2
    # and 3 are actions.
    T = max(lengths) + max_new_tokens - 1
    if min(lengths) == 0 or T + 1 > policy.config.block_size:
        raise ValueError(f"an empty prompt, or {T + 1} tokens exceed the context {policy.config.block_size}")

    tokens = torch.full((B, T + 1), eos_token)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    start = torch.tensor(lengths, device=device) - 1  # (B,) the column of each row's first action
    stop = start + max_new_tokens  # (B,) one past its last action; sooner once it chooses eos_token
    uniforms = 1 - torch.rand(B, max_new_tokens, generator=generator, device=device)  # in (0, 1]
    logprobs = next(policy.parameters()).new_zeros(B, T)

    active = torch.arange(B, device=device)  # the rows that are still computed, which are those in the cache
    cache = policy.kv_cache(T + 1)
    n_cached = 0
    for t in range(min(lengths) - 1, T):  # the first column is the last token of the shortest prompt
        logits = policy(tokens[active, n_cached:t + 1], cache)[:, -1]  # (active, V)
        n_cached = t + 1

        # Random numbers belong to a row: its i-th action uses its i-th number.
        i = (t - start[active]).clamp(0, max_new_tokens - 1)  # any number for a row that does not act
        choice, logp = choose(logits, uniforms[active, i], temperature, top_k, top_p)

        # Prompt tokens are forced: inside its own, longer prompt a row keeps the token that is there.
        acts = (start[active] <= t) & (t < stop[active])
        tokens[active, t + 1] = torch.where(acts, choice, tokens[active, t + 1])
        logprobs[active, t] = logp
        stop[active] = torch.where(acts & (choice == eos_token), t + 1, stop[active])

        # Finished rows are dropped once they are a quarter. A GPU has to wait for this question, so it is
        # asked at every fourth token only.
        if t % 4 == 3:
            unfinished = (t + 1 < stop[active]).nonzero().squeeze(-1)
            if len(unfinished) == 0:
                break
            if len(unfinished) <= 0.75 * len(active):
                active = active[unfinished]
                for layer in cache:
                    layer.keep_rows(unfinished)

    longest = int(stop.max())
    columns = torch.arange(longest, device=device)
    mask = (columns >= start[:, None]) & (columns < stop[:, None])
    return Batch(tokens[:, :longest], tokens[:, 1:longest + 1], mask, logprobs[:, :longest])


def completion_texts(batch, tokenizer):
    """The B completions of a sampled Batch as text, without prompt and end of text.

    A completion reaches from the first action to the last, so it contains what stands in a hole of the mask.
    """
    texts = []
    for actions, mask in zip(batch.actions.tolist(), batch.mask.tolist()):
        start = mask.index(True)
        stop = len(mask) - mask[::-1].index(True)
        texts.append(tokenizer.decode(actions[start:stop]))
    return texts


# Episodes.

class Text(str):
    """A string that carries attributes: Text("7+5=", answer="12").answer is "12".

    A prompt may carry what its reward compares with. A completion carries `tokens`, its actions as strings,
    the end of text among them (a character of several tokens is not readable there); `length`, their number;
    `ended`, whether the last one is the end of text; `kl` and `entropy`, the sums over its actions, in nats;
    and, for custom rewards and metrics, `mean_ref_logprob`, its mean log-probability per token, in nats,
    under the reference policy at the run's temperature.
    """

    def __new__(cls, text, **attributes):
        self = super().__new__(cls, text)
        vars(self).update(attributes)
        return self


def run_episodes(policy, reference, prompts, tokenizer, config, temperature, generator):
    """Let the policy complete the prompts, and compare it with the reference.

    temperature: of sampling; 0 is greedy. KL and entropy are those at config.temperature.
    Returns a Batch without scores, values, advantages and returns, and the completions, a Text each.
    A task may have its own `run_episodes`, in which the policy acts in several turns, each by `sample`. Its
    Batch holds whole texts, and the mask is True at the actions of all turns.
    """
    batch = sample(policy, [tokenizer.encode(prompt) for prompt in prompts], config.max_new_tokens,
                   tokenizer.eos_token, temperature, generator)
    return batch, compare_with_reference(batch, policy, reference, tokenizer, config)


@torch.no_grad()
def compare_with_reference(batch, policy, reference, tokenizer, config):
    """Fill in logprobs, ref_logprobs, kl and entropy of a sampled Batch. Returns its completions, B Texts."""
    def compare(part):
        logp = log_probs(policy, part.obs, config.temperature)  # (b, T, V)
        ref_logp = log_probs(reference, part.obs, config.temperature)
        return torch.stack([action_log_probs(logp, part.actions), action_log_probs(ref_logp, part.actions),
                            kl_divergence(logp, ref_logp), entropy(logp)], -1)  # (b, T, 4)

    # The log-probabilities are computed anew. Those of the sampler differ in the last digits, because it
    # computes with a cache, and equal policies would have a penalty that is nothing but rounding.
    columns = map_micro_batches(compare, batch, config).masked_fill(~batch.mask.unsqueeze(-1), 0)
    batch.logprobs, batch.ref_logprobs, batch.kl, batch.entropy = columns.unbind(-1)

    sums = torch.stack([batch.kl.sum(1), batch.entropy.sum(1), batch.ref_logprobs.sum(1)], 1)  # (B, 3)
    texts = []
    for text, actions, mask, (kl, nats, ref) in zip(completion_texts(batch, tokenizer), batch.actions.cpu(),
                                                    batch.mask.cpu(), sums.tolist()):
        actions = actions[mask].tolist()
        texts.append(Text(text, tokens=[tokenizer.encoding.decode([action]) for action in actions],
                          length=len(actions), ended=actions[-1] == tokenizer.eos_token, kl=kl, entropy=nats,
                          mean_ref_logprob=ref / len(actions)))
    return texts


def complete(task, policy, reference, prompts, tokenizer, config, temperature, generator):
    """The completions of any number of prompts, with --batch-size of them at a time."""
    texts = []
    for start in range(0, len(prompts), config.batch_size):
        some = prompts[start:start + config.batch_size]
        texts += task.run_episodes(policy, reference, some, tokenizer, config, temperature, generator)[1]
    return texts


def check_fit(prompts, tokenizer, max_new_tokens, block_size):
    """Raises BadInput that names the first prompt (a text) which cannot be completed in the context."""
    for prompt in prompts:
        n = len(tokenizer.encode(prompt))
        if n == 0:
            raise BadInput("a prompt is empty: give it at least one character")
        if n + max_new_tokens > block_size:
            raise BadInput(f"the prompt {str(prompt)!r:.200} has {n} tokens; {max_new_tokens} more "
                           f"exceed the context of {block_size}: use a shorter prompt, a smaller "
                           "--max-new-tokens, or a model with a larger --block-size")


def check_boundaries(prompts, corpus, tokenizer):
    """Raises BadInput, or prints a warning, for prompts that end within a token of the texts that they begin.

    The policy would have to go on from tokens that it never saw in pretraining. Up to ten texts of the corpus
    are compared for each prompt, and one is refused if nearly all of its texts differ. If no text begins with
    a prompt, it must only not end with white space that a token of the vocabulary joins to the next word.
    """
    def differs(text, prompt):
        tokens = tokenizer.encode(prompt)
        return tokenizer.encode(text[:len(prompt) + 100])[:len(tokens)] != tokens

    texts = sorted({*corpus})
    compared = 0
    differing = 0
    for prompt in prompts:
        start = bisect.bisect_left(texts, prompt)
        stop = bisect.bisect_left(texts, prompt + chr(sys.maxunicode))
        examples = texts[start:stop:(stop - start) // 10 + 1]
        n = sum(differs(text, prompt) for text in examples)
        if n > 0.9 * len(examples):
            raise BadInput(f"the prompt {str(prompt)!r:.200} ends within a token of {examples[0]!r:.200}: "
                           "let it end with a token, for example before the white space")
        if not examples and prompt[-1:].isspace():
            tokens = tokenizer.encoding.token_byte_values()
            if any(differs(prompt + token.decode(errors="ignore").strip(), prompt) for token in tokens):
                raise BadInput(f"the prompt {str(prompt)!r:.200} ends with white space, which belongs to the "
                               "next word's token: remove it")
        compared += len(examples)
        differing += n
    if corpus and not compared:
        print("warning: no text of the corpus begins with a prompt: let prompts be beginnings of texts")
    if differing:
        print(f"warning: of {compared} texts that begin with a prompt, {differing} do not begin with its "
              "tokens: let prompts end with a token of the texts")


# The command line.

@torch.no_grad()
def print_logprobs(episode, reference, tokenizer, temperature):
    """Print a line per action of a Batch of one: its probability under the policy and under the reference."""
    ref_logprobs = action_log_probs(log_probs(reference, episode.obs, temperature or 1), episode.actions)
    p, q, actions = (x[episode.mask] for x in (episode.logprobs, ref_logprobs, episode.actions))  # (n,) each
    print("  policy  reference  token")
    for a, b, token in zip(p.exp().tolist(), q.exp().tolist(), actions.tolist()):
        print(f"{a:8.4f}  {b:9.4f}  {tokenizer.encoding.decode([token])!r}")
    print(f"log-probability {p.sum():.2f} under the policy, {q.sum():.2f} under the reference, in nats")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Sample from a trained policy: python rollout.py runs/NAME",
                                     allow_abbrev=False, usage=argparse.SUPPRESS)
    parser.add_argument("run", help="a run's directory, such as runs/NAME, or a checkpoint")
    parser.add_argument("--prompt", help="text to complete, without a space at its end "
                                         "(default: each line of standard input)")
    parser.add_argument("-n", type=int, help="completions of each prompt (default 4, or 1 with --greedy)")
    parser.add_argument("--max-new-tokens", type=int,
                        help="maximum length of a completion, in tokens (default: what fits)")
    parser.add_argument("--temperature", type=float, help="divides the logits (default: that of training)")
    parser.add_argument("--greedy", action="store_true", help="choose the most likely token at each step")
    parser.add_argument("--top-k", type=int, default=0, help="keep the K most likely tokens (default 0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the fewest tokens that hold this "
                                                                 "probability together (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="random seed (default 0)")
    parser.add_argument("--logprobs", action="store_true",
                        help="print the probability of each token, now and before RL")
    args = parser.parse_args(argv)
    n = (1 if args.greedy else 4) if args.n is None else args.n
    if not 1 <= n <= 10_000 or args.max_new_tokens is not None and args.max_new_tokens < 1:
        parser.error("-n must be from 1 to 10000, --max-new-tokens at least 1")
    if not (0 <= args.seed < 2 ** 63 and args.top_k >= 0 and 0 < args.top_p <= 1):
        parser.error("--seed and --top-k must be at least 0, --top-p above 0 and at most 1")
    if args.temperature is not None and (args.greedy or not 1e-3 <= args.temperature < math.inf):
        parser.error("--temperature must be at least 0.001, and cannot be combined with --greedy")
    try:
        policy, reference, tokenizer, more = load_checkpoint(args.run)
        temperature = 0 if args.greedy else args.temperature or more.get("config", {}).get("temperature", 1.0)
        if not 0 <= temperature < math.inf:
            raise BadInput(f"{args.run} was trained at a temperature of {temperature}: give --temperature")
        generator = torch.Generator().manual_seed(args.seed)
        lines = filter(None, map(str.rstrip, sys.stdin))
        for prompt in lines if args.prompt is None else [args.prompt]:
            if prompt != replace_surrogates(prompt):
                raise BadInput(f"the prompt {prompt!r} is not UTF-8: set PYTHONUTF8=1, or pipe it in")
            tokens = tokenizer.encode(prompt)
            block_size = policy.config.block_size
            room = args.max_new_tokens or max(1, block_size - len(tokens))
            check_fit([prompt], tokenizer, room, block_size)
            check_boundaries([prompt], [], tokenizer)
            batch = sample(policy, [tokens] * n, room, tokenizer.eos_token, temperature, generator,
                           args.top_k, args.top_p)
            for row, completion in enumerate(completion_texts(batch, tokenizer)):
                print(prompt + completion)
                if args.logprobs:
                    print_logprobs(batch.rows([row]), reference, tokenizer, temperature)
    except (BadInput, OSError, UnicodeDecodeError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when the reader does, as in `… | head`
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdin.reconfigure(encoding="utf-8-sig")
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that the policy writes
    main()
