"""The whole idea on one page: REINFORCE with a leave-one-out baseline, without a KL penalty or options.

    python train.py --iterations 0 --name base   # a policy that has learned to write film reviews
    python tests/examples/idea.py runs/base      # teaches it to write favourable ones
"""
import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from model import load_checkpoint
from reward import reviews
from rollout import completion_texts, sample

random.seed(0)
torch.manual_seed(0)
policy, _, tokenizer, _ = load_checkpoint(sys.argv[1])
task = reviews(seed=0)
optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3)

for iteration in range(1, 41):
    # Sample: the policy completes 32 random prompts, 4 times each.
    prompts = [prompt for prompt in random.choices(task.prompts, k=32) for _ in range(4)]
    batch = sample(policy, [tokenizer.encode(prompt) for prompt in prompts], 44, tokenizer.eos_token)
    texts = completion_texts(batch, tokenizer)

    # Score: the advantage of a text is its score minus the mean score of the 3 others.
    scores = torch.tensor([task.reward(prompt, text) for prompt, text in zip(prompts, texts)]).view(32, 4)
    others = (scores.sum(1, keepdim=True) - scores) / 3
    advantages = (scores - others).view(128, 1)

    # Loss: minus the mean over all actions of the log-probability times the advantage of the text.
    logp = policy(batch.obs).log_softmax(-1)  # (B, T, V)
    logp = logp.gather(-1, batch.actions.unsqueeze(-1)).squeeze(-1)  # (B, T), of the actions
    loss = -(logp * advantages)[batch.mask].mean()

    # Step.
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    print(f"{iteration:2d}  reward {scores.mean():+.2f}  {prompts[0]}{texts[0]}")
