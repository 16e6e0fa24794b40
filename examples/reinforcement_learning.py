"""PPO on gymnasium's control tasks (`pip install gymnasium`): CartPole-v1, or `--task Acrobot-v1`.

Gradients are those of a policy that changes what it sees. LoQT's lines are the same four.
"""

import argparse

import gymnasium
import numpy
import torch
from compare import Result, compare, measured
from torch import Tensor, nn

from loqt_scale import LoQTConfig, MergeConfig, attach, convert_to_loqt

ENVIRONMENTS, HORIZON, PASSES, WIDTH = 8, 128, 4, 128
GAMMA, TRACE, CLIP = 0.99, 0.95, 0.2
CONFIG = LoQTConfig(rank=48, merge=MergeConfig(gap=40))


class ActorCritic(nn.Module):
    """Logits of the actions and the value of observations."""

    def __init__(self, size: int, actions: int) -> None:
        super().__init__()
        self.actor, self.critic = (
            nn.Sequential(nn.Linear(size, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, outputs))
            for outputs in (actions, 1)
        )
        nn.init.uniform_(self.actor[-1].weight, -0.01, 0.01)

    def forward(self, seen: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
        return torch.distributions.Categorical(logits=self.actor(seen)), self.critic(seen).squeeze(-1)


@torch.no_grad()
def play(model: ActorCritic, envs, seen: Tensor, returns: numpy.ndarray, finished: list[float]):
    """HORIZON steps of all environments: observations, actions, their log-probabilities, advantages, values to learn."""
    record = []
    for _ in range(HORIZON):
        policy, value = model(seen)
        action = policy.sample()
        following, reward, ended, cut, _ = envs.step(action.numpy())
        over = ended | cut
        returns += reward
        finished.extend(returns[over])
        returns[over] = 0
        record.append((seen, action, policy.log_prob(action), value, torch.tensor(reward), torch.tensor(over)))
        seen = torch.tensor(following, dtype=torch.float32)
    observed, actions, logs, values, rewards, overs = (torch.stack(part) for part in zip(*record, strict=True))
    advantages, gain, after = torch.zeros_like(values), torch.zeros(ENVIRONMENTS), model(seen)[1]
    for step in reversed(range(HORIZON)):
        alive = 1 - overs[step].float()
        gain = rewards[step] + GAMMA * after * alive - values[step] + GAMMA * TRACE * alive * gain
        advantages[step], after = gain, values[step]
    batch = (observed, actions, logs, advantages.float(), (advantages + values).float())
    return seen, [part.flatten(0, 1) for part in batch]


def ppo_loss(model: ActorCritic, seen, action, log, advantage, target) -> Tensor:
    policy, value = model(seen)
    ratio = (policy.log_prob(action) - log).exp()
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
    return -gain + 0.5 * (value - target).square().mean() - 0.01 * policy.entropy().mean()


def train(method: str, seed: int, rate: float, short: bool) -> Result:
    torch.manual_seed(seed)
    rounds, mini_batch = (1, 512) if short else (OPTIONS.rounds, 256)
    updates = rounds * PASSES * (ENVIRONMENTS * HORIZON // mini_batch)
    same_step = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    envs = gymnasium.make_vec(OPTIONS.task, num_envs=ENVIRONMENTS, vector_kwargs=same_step)
    first, _ = envs.reset(seed=seed)
    model = ActorCritic(first.shape[1], int(envs.single_action_space.n))
    before = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if method == "loqt":
        convert_to_loqt(model, CONFIG)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, eps=1e-5, weight_decay=0.0)
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
        curve.append(((round_ + 1) * len(batch[0]), float(numpy.mean(finished[-50:] or [0]))))
    return measured(curve[-1][1], curve, model, optimizer)


parser = argparse.ArgumentParser(add_help=False)
parser.add_argument("--task", default="CartPole-v1")
parser.add_argument("--rounds", type=int, default=40)
OPTIONS, _ = parser.parse_known_args()
if __name__ == "__main__":
    rates = {"loqt": [3e-3, 1e-3, 1e-2], "full": [1e-3, 3e-4, 3e-3]}
    compare(train, name=f"ppo-{OPTIONS.task}", score="return (last 50 episodes)", curve="return", rates=rates)
