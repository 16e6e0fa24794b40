"""PPO's three parts: the network, rounds of play with their advantages, the loss."""

import numpy
import torch
from torch import Tensor, nn

ENVIRONMENTS, HORIZON, WIDTH = 8, 128, 128
GAMMA, TRACE, CLIP = 0.99, 0.95, 0.2


class ActorCritic(nn.Module):
    """Logits of the actions and the value of observations."""

    def __init__(self, size: int, actions: int) -> None:
        super().__init__()
        self.actor, self.critic = (
            nn.Sequential(
                nn.Linear(size, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, outputs)
            )
            for outputs in (actions, 1)
        )
        nn.init.uniform_(self.actor[-1].weight, -0.01, 0.01)

    def forward(self, seen: Tensor) -> tuple[torch.distributions.Categorical, Tensor]:
        return torch.distributions.Categorical(logits=self.actor(seen)), self.critic(seen).squeeze(-1)


@torch.no_grad()
def play(model: ActorCritic, envs, seen: Tensor, returns: numpy.ndarray, finished: list[float]):
    """HORIZON steps everywhere: observations, actions, their log-probabilities, advantages, values to learn."""
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
