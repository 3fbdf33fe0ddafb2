"""Reinforcement learning: policies that act in a changing number of environments, and updates from changing batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.architectures.program import PADDED, Batch, Program, Sizes

KIND = "reinforcement learning"
OBSERVED, ACTIONS = 8, 4


class ActorCritic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(OBSERVED, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.policy, self.value = nn.Linear(16, ACTIONS), nn.Linear(16, 1)

    def forward(self, observed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.body(observed)
        return self.policy(h), self.value(h).squeeze(-1)


class Gaussian(nn.Module):
    """SAC's actor and its twin critics."""

    def __init__(self) -> None:
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(OBSERVED, 16), nn.ReLU(), nn.Linear(16, 2 * ACTIONS))
        self.first, self.second = _critic(), _critic()

    def act(self, observed: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A squashed sample, by the reparameterisation trick, and the logarithm of its density."""
        mean, log_std = self.actor(observed).chunk(2, -1)
        normal = torch.distributions.Normal(mean, log_std.clamp(-5, 2).exp(), validate_args=False)
        raw = normal.mean + normal.stddev * noise
        action = raw.tanh()
        return action, (normal.log_prob(raw) - (1 - action.square() + 1e-6).log()).sum(-1)

    def worth(self, observed: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([observed, action], -1)
        return self.first(both).squeeze(-1), self.second(both).squeeze(-1)


def _critic() -> nn.Module:
    return nn.Sequential(nn.Linear(OBSERVED + ACTIONS, 16), nn.ReLU(), nn.Linear(16, 1))


def _rollout(sizes: Sizes) -> Batch:
    n = sizes["batch"]
    return {
        "observed": torch.randn(n, OBSERVED),
        "actions": torch.randint(0, ACTIONS, (n,)),
        "before": -torch.rand(n) - 1,
        "advantages": torch.randn(n),
        "returns": torch.randn(n),
    }


def _replay(sizes: Sizes) -> Batch:
    n = sizes["batch"]
    return {
        "observed": torch.randn(n, OBSERVED),
        "later": torch.randn(n, OBSERVED),
        "actions": torch.rand(n, ACTIONS) * 2 - 1,
        "rewards": torch.randn(n),
        "done": (torch.rand(n) < 0.2).float(),
        "noise": torch.randn(n, ACTIONS),
    }


def _episode(sizes: Sizes) -> Batch:
    steps, batch = sizes["steps"], sizes["batch"]
    return {
        "observed": torch.randn(steps, batch, OBSERVED),
        "actions": torch.randint(0, ACTIONS, (steps, batch)),
        "rewards": torch.randn(steps, batch),
        "done": (torch.rand(steps, batch) < 0.1).float(),
    }


def _sampled(model: nn.Module, observed: torch.Tensor, **_: Any) -> Any:
    logits, value = model(observed)
    choices = torch.distributions.Categorical(logits=logits, validate_args=False)
    action = choices.sample()
    return action, choices.log_prob(action), value


def _by_gumbel(model: nn.Module, observed: torch.Tensor, **_: Any) -> Any:
    logits, value = model(observed)
    noise = -(-torch.rand_like(logits).clamp(1e-6, 1 - 1e-6).log()).log()
    action = (logits + noise).argmax(-1)
    return action, logits.log_softmax(-1).gather(1, action[:, None]).squeeze(1), value


def _greedy(model: nn.Module, observed: torch.Tensor, **_: Any) -> Any:
    logits, value = model(observed)
    return logits.argmax(-1), value


def _clipped(
    model: nn.Module,
    observed: torch.Tensor,
    actions: torch.Tensor,
    before: torch.Tensor,
    advantages: torch.Tensor,
    returns: torch.Tensor,
) -> torch.Tensor:
    """PPO's loss: of the policy, clipped, of the value, and of the entropy."""
    logits, value = model(observed)
    choices = torch.distributions.Categorical(logits=logits, validate_args=False)
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    ratio = (choices.log_prob(actions) - before).exp()
    policy = -torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()
    return policy + 0.5 * F.mse_loss(value, returns) - 0.01 * choices.entropy().mean()


def _tanh_action(model: Any, observed: torch.Tensor, noise: torch.Tensor, **_: Any) -> Any:
    return model.act(observed, noise)


def _tanh_action_drawn(model: Any, observed: torch.Tensor, **_: Any) -> Any:
    return model.act(observed, torch.randn(observed.shape[0], ACTIONS))


def _soft(
    model: Any,
    observed: torch.Tensor,
    later: torch.Tensor,
    actions: torch.Tensor,
    rewards: torch.Tensor,
    done: torch.Tensor,
    noise: torch.Tensor,
) -> torch.Tensor:
    """SAC's losses of critics and actor, in one."""
    with torch.no_grad():
        action, density = model.act(later, noise)
        target = rewards + 0.99 * (1 - done) * (torch.min(*model.worth(later, action)) - 0.2 * density)
    first, second = model.worth(observed, actions)
    action, density = model.act(observed, noise)
    actor = (0.2 * density - torch.min(*model.worth(observed, action))).mean()
    return F.mse_loss(first, target) + F.mse_loss(second, target) + actor


def _returns(rewards: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """Sums of what is still to come, with the value of the last state: by a reversed scan."""
    rewards = torch.cat([rewards, last[None]])
    discount = 0.9 ** torch.arange(rewards.shape[0])[:, None]
    return ((rewards * discount).flip(0).cumsum(0).flip(0) / discount)[:-1]


def _bootstrapped(model: nn.Module, observed: torch.Tensor, rewards: torch.Tensor, **_: Any) -> torch.Tensor:
    _, value = model(observed)
    return _returns(rewards, value[-1])


def _reinforce(
    model: nn.Module, observed: torch.Tensor, actions: torch.Tensor, rewards: torch.Tensor, **_: Any
) -> torch.Tensor:
    logits, value = model(observed)
    returns = _returns(rewards, value[-1].detach())
    chosen = logits.log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)
    return -(chosen * (returns - value.detach())).mean() + F.smooth_l1_loss(value, returns)


def _temporal_difference(
    model: nn.Module, observed: torch.Tensor, rewards: torch.Tensor, done: torch.Tensor, **_: Any
) -> torch.Tensor:
    """Value learning from one step to the next."""
    _, value = model(observed)
    target = rewards[:-1] + 0.9 * (1 - done[:-1]) * value[1:].detach()
    return F.mse_loss(value[:-1], target)


def programs() -> Iterator[Program]:
    batch = {"batch": PADDED}
    rollout = dict.fromkeys(("observed", "actions", "before", "advantages", "returns"), ("batch",))
    replay = dict.fromkeys(("observed", "later", "actions", "rewards", "done", "noise"), ("batch",))
    episode = dict.fromkeys(("observed", "actions", "rewards", "done"), ("steps", "batch"))
    both = {"steps": PADDED, "batch": PADDED}
    yield Program("PPO (greedy actor, update)", KIND, ActorCritic, _rollout, rollout, _greedy, _clipped, batch, batch)
    yield Program("PPO (Categorical.sample)", KIND, ActorCritic, _rollout, rollout, _sampled, None, batch, draws=True)
    yield Program("PPO (Gumbel noise)", KIND, ActorCritic, _rollout, rollout, _by_gumbel, None, batch, draws=True)
    yield Program("SAC (noise given)", KIND, Gaussian, _replay, replay, _tanh_action, _soft, batch, batch)
    yield Program("SAC (noise drawn)", KIND, Gaussian, _replay, replay, _tanh_action_drawn, None, batch, draws=True)
    yield Program(
        "REINFORCE (returns by a scan)", KIND, ActorCritic, _episode, episode, _bootstrapped, _reinforce, both, both
    )
    yield Program(
        "TD(0) over an episode", KIND, ActorCritic, _episode, episode, None, _temporal_difference, training=both
    )
