"""Episodes: `sample`, which lets a policy act, and `run_episodes`, which compares it with the reference.

`python rollout.py runs/NAME --prompt "the acting was"` samples from a trained policy; `--help` lists the
options.
"""

import argparse
import math
import signal
import sys
from dataclasses import dataclass

import torch

from algos import Batch, chosen, entropy, in_parts, kl_divergence, log_probs
from model import BadInput, load_checkpoint, save_gpt2


@dataclass
class Rollout:
    """B sampled episodes of up to T actions. mask[b, t] is True where the policy chose tokens[b, t + 1].

    logprobs is undefined where mask is False.
    """

    tokens: torch.Tensor  # (B, T+1) int64: prompt, completion, its end of text, then end of text as filler
    mask: torch.Tensor  # (B, T) bool: prompt False, completion and its end of text True, filler False
    logprobs: torch.Tensor  # (B, T) log π(a|s) when the action a was drawn

    def completions(self, tokenizer):
        """The B completions as text, without prompt and end of text."""
        rows = zip(self.tokens[:, 1:].tolist(), self.mask.tolist())
        return [tokenizer.decode([t for t, acted in zip(tokens, mask) if acted]) for tokens, mask in rows]


def draw(logp, uniforms):
    """One token per row by inverse CDF: the first whose cumulative probability reaches the uniform number.

    logp: (B, V) log-probabilities, up to a constant.  uniforms: (B,) in (0, 1], so that a token of
    probability zero is never drawn.  Returns (B,) int64. One random number per row, where torch.multinomial
    draws V.
    """
    cdf = logp.exp().cumsum(-1)  # (B, V)
    drawn = torch.searchsorted(cdf, uniforms[:, None] * cdf[:, -1:]).squeeze(-1)
    return drawn.clamp(max=logp.shape[-1] - 1)  # NaN would give V, which is no token


def truncate(logp, top_k=0, top_p=1.0):
    """logp (B, V) of the top_k likeliest tokens (0: all) and the fewest that hold top_p; -inf elsewhere.

    For people to read: training samples from all of π.
    Top-k: Fan et al. 2018; top-p, or nucleus: Holtzman et al. 2020.
    """
    ordered, index = logp.sort(-1, descending=True)
    likelier = ordered.exp().cumsum(-1) - ordered.exp()  # (B, V) the probability of all likelier tokens
    keep = likelier < (top_p if top_p < 1 else math.inf)  # 1 keeps all, whatever the rounding
    if top_k:
        keep[:, top_k:] = False
    return logp.masked_fill(~keep.gather(-1, index.argsort(-1)), -math.inf)


@torch.no_grad()
def sample(policy, prompts, max_new_tokens, eos_token, temperature=1.0, generator=None, top_k=0, top_p=1.0):
    """Let the policy complete each prompt until it chooses eos_token or has chosen max_new_tokens.

    policy: (tokens, cache) -> logits, with `kv_cache`.  prompts: B lists of at least one token each.
    temperature: divides the logits; 0 is greedy.  top_k, top_p: see `truncate`.
    Returns a Rollout as long as its longest row. Its logprobs are at the temperature (1 if greedy) and not
    truncated.
    Raises ValueError for an empty prompt, or one that leaves too little room in the context.

    Prompts stand at the left without padding. The loop starts at the end of the shortest prompt; a row whose
    prompt is longer takes its own tokens until that ends. Random numbers belong to a row and its i-th choice,
    not to a column, so that each row gets what it would get alone.
    """
    device, lengths = next(policy.parameters()).device, [len(prompt) for prompt in prompts]
    B, T = len(prompts), max(lengths) + max_new_tokens - 1  # T columns: column t chooses tokens[:, t+1]
    if min(lengths) == 0 or T + 1 > policy.config.block_size:
        raise ValueError(f"an empty prompt, or {T + 1} tokens exceed the context {policy.config.block_size}")
    tokens = torch.full((B, T + 1), eos_token)
    for row, prompt in zip(tokens, prompts):
        row[:len(prompt)] = torch.tensor(prompt)
    tokens = tokens.to(device)
    start = torch.tensor(lengths, device=device) - 1  # (B,) each row's first action
    stop = start + max_new_tokens  # (B,) one past its last action; sooner once it chooses eos_token
    logprobs = next(policy.parameters()).new_zeros(B, T)

    # Column t is for action t: a row's i-th action gets its i-th number.
    uniforms = torch.ones(B, T, device=device)  # in (0, 1]
    random = 1 - torch.rand(B, max_new_tokens, generator=generator, device=device)
    uniforms.scatter_(1, start[:, None] + torch.arange(max_new_tokens, device=device), random)

    active = torch.arange(B, device=device)  # the rows in the cache: finished ones are dropped
    cache, n_cached = policy.kv_cache(T + 1), 0
    for t in range(min(lengths) - 1, T):
        logits = policy(tokens[active, n_cached:t + 1], cache)[:, -1]  # (active, V); at first many columns
        n_cached = t + 1
        logp = (logits / (temperature or 1)).log_softmax(-1)
        if temperature == 0:
            choice = logp.argmax(-1)
        else:
            choice = draw(truncate(logp, top_k, top_p) if top_k or top_p < 1 else logp, uniforms[active, t])
        logprobs[active, t] = logp.gather(1, choice[:, None]).squeeze(1)
        acts = (start[active] <= t) & (t < stop[active])  # False inside a prompt and after the end
        tokens[active, t + 1] = torch.where(acts, choice, tokens[active, t + 1])
        stop[active] = torch.where(acts & (choice == eos_token), t + 1, stop[active])
        if t % 4 == 3:  # not at every token, since asking makes a GPU wait
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
    return Rollout(tokens[:, :longest + 1], mask, logprobs[:, :longest])


class Text(str):
    """A string that carries attributes: Text("7+5=", answer="12").answer is "12".

    A prompt may carry what its reward compares with. A completion carries `length`, its number of tokens with
    the end of text; `ended`, whether it chose the end of text; and `fluency`, the mean log-likelihood per
    token, in nats, under the reference: the policy as it was before RL, at the run's temperature.
    """

    def __new__(cls, text, **attributes):
        self = super().__new__(cls, text)
        vars(self).update(attributes)
        return self


@torch.no_grad()
def run_episodes(policy, reference, prompts, tokenizer, config, temperature, generator):
    """Let the policy complete the prompts, and compare it with the reference.

    temperature: of sampling, 0 is greedy. KL and entropy are those at config.temperature.
    Returns a Batch without scores, values and advantages; the completions, a Text each; and (B, T) each the
    exact KL(π‖π_ref) and the entropy of π(·|s_t).
    """
    def compare(part):
        logp = log_probs(policy, part.obs, config.temperature)  # (b, T, V)
        ref_logp = log_probs(reference, part.obs, config.temperature)
        return {"ref_logprobs": chosen(ref_logp, part.actions), "kl": kl_divergence(logp, ref_logp),
                "entropy": entropy(logp)}

    rollout = sample(policy, [tokenizer.encode(prompt) for prompt in prompts], config.max_new_tokens,
                     tokenizer.eos_token, temperature, generator)
    obs, actions, mask = rollout.tokens[:, :-1], rollout.tokens[:, 1:], rollout.mask  # (B, T)
    batch = Batch(obs, actions, mask, rollout.logprobs)
    found = in_parts(compare, batch, config)
    batch.ref_logprobs = found["ref_logprobs"]
    length, ended = mask.sum(1), (mask & (actions == tokenizer.eos_token)).any(1)  # (B,)
    fluency = batch.ref_logprobs.masked_fill(~mask, 0).sum(1) / length
    columns = zip(rollout.completions(tokenizer), length.tolist(), ended.tolist(), fluency.tolist())
    completions = [Text(text, length=n, ended=e, fluency=f) for text, n, e, f in columns]
    return batch, completions, found["kl"], found["entropy"]


def complete(policy, reference, prompts, tokenizer, config, temperature, generator):
    """`run_episodes` with --batch-size prompts at a time.

    Returns all completions, and the KL and entropy of all their actions, (n,) each.
    """
    texts, kls, entropies = [], [], []
    for start in range(0, len(prompts), config.batch_size):
        batch, completions, kl, H = run_episodes(policy, reference, prompts[start:start + config.batch_size],
                                                 tokenizer, config, temperature, generator)
        texts += completions
        kls.append(kl[batch.mask])
        entropies.append(H[batch.mask])
    return texts, torch.cat(kls), torch.cat(entropies)


def check_fit(prompts, tokenizer, max_new_tokens, block_size):
    """Raises BadInput that names a prompt (text) which cannot be completed, or leaves no room for that."""
    for prompt in prompts:
        n = len(tokenizer.encode(prompt))
        if n == 0:
            raise BadInput("a prompt is empty: give it at least one character")
        if prompt.endswith(" "):
            raise BadInput(f"the prompt {str(prompt)!r} ends with a space: leave it out, words bring one")
        if n + max_new_tokens > block_size:
            raise BadInput(f"the prompt {str(prompt)!r} has {n} tokens; {max_new_tokens} more exceed the "
                           f"context of {block_size}: use a shorter prompt, a smaller --max-new-tokens or a "
                           "larger --block-size")


# The command line.

def print_logprobs(rollout, row, reference, tokenizer, temperature):
    """A line per sampled token: its probability under the policy and under the reference."""
    with torch.no_grad():
        ref_logits = reference(rollout.tokens[row:row + 1, :-1])[0]  # (T, V)
        ref_logp = (ref_logits / (temperature or 1)).log_softmax(-1)
    steps = rollout.mask[row].nonzero().squeeze(-1)  # (n,)
    actions = rollout.tokens[row, steps + 1]
    p, q = rollout.logprobs[row, steps], ref_logp[steps, actions]
    print("  policy  reference  token")
    for a, b, token in zip(p.exp().tolist(), q.exp().tolist(), actions.tolist()):
        print(f"{a:8.4f}  {b:9.4f}  {tokenizer.encoding.decode([token])!r}")
    print(f"log-probability {p.sum():.2f} under the policy, {q.sum():.2f} under the reference, in nats")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Sample from a trained policy.", allow_abbrev=False,
                                     usage="python rollout.py RUN [--OPTION VALUE …]")
    parser.add_argument("run", help="a run's directory, as in runs/NAME, or a checkpoint")
    parser.add_argument("--prompt", help="text to complete, without a space at its end "
                                         "(default: each line of standard input)")
    parser.add_argument("-n", type=int, help="completions of each prompt (default 4, 1 with --greedy)")
    parser.add_argument("--max-new-tokens", type=int, help="longest completion, tokens (default: what fits)")
    parser.add_argument("--temperature", type=float, help="divides the logits (default: that of training)")
    parser.add_argument("--greedy", action="store_true", help="choose the likeliest token at each step")
    parser.add_argument("--top-k", type=int, default=0, help="keep the K likeliest tokens (default 0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="keep the fewest tokens that hold this "
                                                                 "probability together (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default 0)")
    parser.add_argument("--logprobs", action="store_true",
                        help="print the probability of each token, now and before RL")
    parser.add_argument("--export", metavar="DIR", help="write the weights for transformers' GPT2LMHeadModel")
    args = parser.parse_args(argv)
    n = (1 if args.greedy else 4) if args.n is None else args.n
    if not 1 <= n <= 10_000 or args.max_new_tokens is not None and args.max_new_tokens < 1:
        parser.error("-n must be from 1 to 10000, --max-new-tokens at least 1")
    if not (0 <= args.seed < 2 ** 63 and args.top_k >= 0 and 0 < args.top_p <= 1):
        parser.error("--seed and --top-k must be at least 0, --top-p above 0 and at most 1")
    if args.temperature is not None and (args.greedy or not 1e-3 <= args.temperature < math.inf):
        parser.error("--temperature must be at least 0.001, and contradicts --greedy")
    try:
        policy, reference, tokenizer, more = load_checkpoint(args.run)
        if args.export:
            save_gpt2(policy, args.export, tokenizer.eos_token)
            return
        temperature = 0 if args.greedy else args.temperature or more.get("config", {}).get("temperature", 1.0)
        generator = torch.Generator().manual_seed(args.seed)
        lines = filter(None, map(str.rstrip, sys.stdin))
        for prompt in lines if args.prompt is None else [args.prompt]:
            tokens, block_size = tokenizer.encode(prompt), policy.config.block_size
            room = args.max_new_tokens or max(1, block_size - len(tokens))
            check_fit([prompt], tokenizer, room, block_size)
            rollout = sample(policy, [tokens] * n, room, tokenizer.eos_token, temperature, generator,
                             args.top_k, args.top_p)
            for row, completion in enumerate(rollout.completions(tokenizer)):
                print(prompt + completion)
                if args.logprobs:
                    print_logprobs(rollout, row, reference, tokenizer, temperature)
    except (BadInput, OSError, UnicodeDecodeError) as e:
        parser.error(str(e))


if __name__ == "__main__":
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly when the reader does, as in `… | head`
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.stdin.reconfigure(encoding="utf-8-sig")
    sys.stdout.reconfigure(errors="replace")  # a terminal may lack characters that the policy writes
    main()
