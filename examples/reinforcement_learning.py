"""PPO on gymnasium's control tasks (`pip install gymnasium`): CartPole-v1, or `--task Acrobot-v1`.

Gradients are those of a policy that changes what it sees. LoQT's lines are the same four.
"""

import argparse
from functools import partial

import gymnasium
import numpy
import torch
from compare import Result, compare, measured
from ppo import ENVIRONMENTS, HORIZON, ActorCritic, play, ppo_loss

from loqt_scale import LoQTConfig, MergeConfig, attach, convert_to_loqt

PASSES = 4  # over the frames of each round
CONFIG = LoQTConfig(rank=48, merge=MergeConfig(gap=40))


def train(method: str, seed: int, rate: float, short: bool) -> Result:
    torch.manual_seed(seed)
    rounds, mini_batch = (1, 512) if short else (OPTIONS.rounds, 256)
    updates = rounds * PASSES * (ENVIRONMENTS * HORIZON // mini_batch)
    makers = [partial(gymnasium.make, OPTIONS.task)] * ENVIRONMENTS
    envs = gymnasium.vector.SyncVectorEnv(makers, autoreset_mode=gymnasium.vector.AutoresetMode.SAME_STEP)
    first, _ = envs.reset(seed=seed)
    model = ActorCritic(first.shape[1], int(envs.single_action_space.n))
    before = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if method == "loqt":
        convert_to_loqt(model, CONFIG)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=rate, eps=1e-5, weight_decay=0.0
    )
    if method == "loqt":
        merges = attach(model, optimizer, CONFIG, total_steps=updates, seed=seed, initial_weights=before)
    seen, returns, finished, curve = torch.tensor(first, dtype=torch.float32), numpy.zeros(ENVIRONMENTS), [], []
    for round_ in range(rounds):
        seen, batch = play(model, envs, seen, returns, finished)
        for _ in range(PASSES):
            for rows in torch.randperm(len(batch[0])).split(mini_batch):
                if method == "loqt":
                    merges.prepare()
                ppo_loss(model, *(part[rows] for part in batch)).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                if method == "loqt":
                    merges.finish()
                optimizer.zero_grad()
        curve.append(((round_ + 1) * len(batch[0]), float(numpy.mean(finished[-50:] or [numpy.nan]))))
    return measured(curve[-1][1], curve, model, optimizer)


parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--task", default="CartPole-v1")
parser.add_argument("--rounds", type=int, default=40)
OPTIONS, _ = parser.parse_known_args()
if __name__ == "__main__":
    rates = {"loqt": [3e-3, 1e-3, 1e-2], "full": [3e-3, 3e-4, 1e-3, 1e-2]}
    compare(train, name=f"ppo-{OPTIONS.task}", score="return (last 50 episodes)", curve="return", rates=rates)
