"""Recurrent PPO on a task of memory: a cue is shown for one step and has to be named when asked for, later.

A policy without memory names one cue in four by chance. Rollouts are longer than episodes, so episodes begin
in the midst of the sequences that the update trains on. ``reset=`` sets the state there, in one call for the
whole rollout; the usual way is a loop that takes a step, masks the state, and takes the next. Both are
trained from the same seed: they learn the same, and the time of their updates is compared.

    python -m examples.reinforcement
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F
from tqdm import trange

import fusedrnn

from . import common
from .trainer import save_atomically

CUES = 4
WAIT, ASK = CUES, CUES + 1  # what is seen between the cue and the question, and the question
BEST_WITHOUT_MEMORY = 1 / CUES  # what is seen when asked does not depend on the cue
DELAY = (3, 9)  # steps from the cue to the question, at least and at most

GAMMA, LAMBDA = 0.95, 0.95
CLIP, ENTROPY, VALUE = 0.2, 0.01, 0.5
EPOCHS, MINIBATCHES = 4, 2

State = tuple[Tensor, Tensor]  # h and c, each [1, B, H]


class Recall:
    """B environments side by side; an episode ends with the question, and the next begins at once."""

    def __init__(self, count: int, device: torch.device) -> None:
        self.cue, self.clock, self.ask = torch.zeros(3, count, dtype=torch.int64, device=device)
        self._begin(torch.ones(count, dtype=torch.bool, device=device))

    def _begin(self, which: Tensor) -> None:
        self.clock = self.clock.masked_fill(which, 0)
        self.cue = torch.where(which, torch.randint_like(self.cue, CUES), self.cue)
        self.ask = torch.where(which, torch.randint_like(self.ask, DELAY[0], DELAY[1] + 1), self.ask)

    def observe(self) -> Tensor:
        """What is seen, ``[B, CUES + 2]``."""
        shown = torch.where(self.clock == 0, self.cue, WAIT)
        return F.one_hot(shown.masked_fill(self.clock == self.ask, ASK), CUES + 2).float()

    def step(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """Takes actions ``[B]``; returns rewards, 1 for the cue when asked for it, and which episodes end."""
        asked = self.clock == self.ask
        reward = (asked & (action == self.cue)).float()
        self.clock = self.clock + 1
        self._begin(asked)
        return reward, asked


class Agent(nn.Module):
    """Observations ``[T, B, CUES + 2]``, the state before them, and where episodes begin, bool ``[T, B]``, to
    logits ``[T, B, CUES]``, values ``[T, B]`` and the state behind."""

    def __init__(self, hidden: int, *, loop: bool) -> None:
        super().__init__()
        self.lstm = fusedrnn.LSTM(CUES + 2, hidden)
        self.policy, self.value = nn.Linear(hidden, CUES), nn.Linear(hidden, 1)
        self.loop = loop

    def forward(self, seen: Tensor, state: State, begins: Tensor) -> tuple[Tensor, Tensor, State]:
        if self.loop:
            outputs = []
            for x, begin in zip(seen.unbind(0), begins.unbind(0), strict=True):
                h, c = (s * ~begin[None, :, None] for s in state)
                y, state = self.lstm(x[None], (h, c))
                outputs.append(y)
            y = torch.cat(outputs)
        else:
            y, state = self.lstm(seen, state, reset=begins)
        return self.policy(y), self.value(y).squeeze(-1), state


class Rollout(NamedTuple):
    """What T steps of B environments gave: all ``[T, B]`` but the first two."""

    seen: Tensor  # [T, B, CUES + 2]
    state: State  # before the first step
    begins: Tensor
    actions: Tensor
    log_probs: Tensor
    returns: Tensor
    advantages: Tensor


class Learner:
    """PPO (Schulman et al., 2017), recurrent; minibatches are the whole sequences of some environments.

    Attributes:
        curve: for each iteration the share of questions answered right.
        seconds: for each iteration the time of its update.
    """

    def __init__(
        self, environments: int, steps: int, hidden: int, device: torch.device, *, loop: bool
    ) -> None:
        self.steps = steps
        self.agent = Agent(hidden, loop=loop).to(device)
        self.optimizer = torch.optim.Adam(self.agent.parameters(), lr=3e-3)
        self.world = Recall(environments, device)
        h, c = torch.zeros(2, 1, environments, hidden, device=device)
        self.state: State = (h, c)
        self.begins = torch.ones(environments, dtype=torch.bool, device=device)
        self.curve: list[float] = []
        self.seconds: list[float] = []

    def iterate(self) -> None:
        rollout = self._collect()
        start = time.perf_counter()
        self._update(rollout)
        if rollout.actions.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def _collect(self) -> Rollout:
        before, taken = self.state, []
        for _ in range(self.steps):
            seen, begins = self.world.observe(), self.begins
            logits, values, self.state = self.agent(seen[None], self.state, begins[None])
            policy = Categorical(logits=logits[0])
            action = policy.sample()
            reward, self.begins = self.world.step(action)
            taken.append((seen, begins, action, policy.log_prob(action), values[0], reward, self.begins))
        seen, begins, actions, log_probs, values, rewards, ends = map(torch.stack, zip(*taken, strict=True))
        self.curve.append((rewards.sum() / ends.sum()).item())
        _, last, _ = self.agent(self.world.observe()[None], self.state, self.begins[None])
        advantages, ahead, value_ahead = torch.zeros_like(values), torch.zeros_like(last[0]), last[0]
        for t in reversed(
            range(self.steps)
        ):  # generalised advantage estimation; nothing passes an episode's end
            goes_on = (~ends[t]).float()
            error = rewards[t] + GAMMA * goes_on * value_ahead - values[t]
            ahead = error + GAMMA * LAMBDA * goes_on * ahead
            advantages[t], value_ahead = ahead, values[t]
        return Rollout(seen, before, begins, actions, log_probs, advantages + values, advantages)

    def _update(self, rollout: Rollout) -> None:
        environments = rollout.actions.size(1)
        for _ in range(EPOCHS):
            for some in torch.randperm(environments, device=rollout.actions.device).chunk(MINIBATCHES):
                h, c = (s[:, some] for s in rollout.state)
                logits, values, _ = self.agent(rollout.seen[:, some], (h, c), rollout.begins[:, some])
                policy = Categorical(logits=logits)
                ratio = (policy.log_prob(rollout.actions[:, some]) - rollout.log_probs[:, some]).exp()
                gain = rollout.advantages[:, some]
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                surrogate = torch.minimum(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
                error = (values - rollout.returns[:, some]).square().mean()
                self.optimizer.zero_grad()
                (VALUE * error - surrogate - ENTROPY * policy.entropy().mean()).backward()
                nn.utils.clip_grad_norm_(self.agent.parameters(), 0.5)
                self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Everything the next iteration depends on, the episodes under way and the random state included."""
        return {
            "agent": self.agent.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "world": [self.world.cue, self.world.clock, self.world.ask],
            "state": list(self.state),
            "begins": self.begins,
            "curve": self.curve,
            "seconds": self.seconds,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.agent.load_state_dict(saved["agent"])
        self.optimizer.load_state_dict(saved["optimizer"])
        device = self.begins.device
        self.world.cue, self.world.clock, self.world.ask = (t.to(device) for t in saved["world"])
        h, c = saved["state"]
        self.state, self.begins = (h.to(device), c.to(device)), saved["begins"].to(device)
        self.curve, self.seconds = saved["curve"], saved["seconds"]
        torch.set_rng_state(saved["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(saved["random_cuda"])


def draw(path: Path, learners: dict[str, Learner]) -> None:
    with common.figure(path) as drawn:
        axes = drawn.subplots()
        for (name, learner), colour, style in zip(
            learners.items(), (common.OURS, common.QUIET), ("-", "--"), strict=False
        ):
            axes.plot(range(1, len(learner.curve) + 1), learner.curve, style, color=colour, label=name)
        axes.axhline(BEST_WITHOUT_MEMORY, color=common.BASELINE, linestyle=":", label="best without memory")
        axes.set(xlabel="iteration", ylabel="questions answered right", ylim=(0, 1.05))
        axes.legend(frameon=False, fontsize=8, loc="lower right")


def main(
    iterations: Annotated[int, typer.Option(min=1, help="Rollouts to learn from.")] = 30,
    environments: Annotated[int, typer.Option(min=MINIBATCHES, help="Side by side.")] = 32,
    steps: Annotated[int, typer.Option(min=2, help="Of a rollout.")] = 64,
    hidden: Annotated[int, typer.Option(help="Units of the LSTM.")] = 64,
    compare: Annotated[bool, typer.Option(help="Also train with the loop over steps.")] = True,
    checkpoint: Annotated[
        Path | None, typer.Option(help="File to save to every ten iterations.", is_eager=True)
    ] = None,
    resume: common.Resume = False,
    backend: common.Backend = "auto",
    device: common.Device = "",
    seed: common.Seed = 0,
    plot: common.Plot = common.PLOTS / "reinforcement.png",
) -> dict[str, Learner]:
    """Train an agent that has to remember, with reset= and, beside it, with a loop over steps."""
    found = torch.load(checkpoint, "cpu") if checkpoint and resume and checkpoint.exists() else {}
    learners = {}
    print(f"task: naming one cue of {CUES}, {DELAY[0]} to {DELAY[1]} steps after it was shown")
    for name in ("reset=", "loop over steps")[: 1 + compare]:
        with common.prepared(backend, seed, device) as place:
            learner = learners[name] = Learner(environments, steps, hidden, place, loop=name != "reset=")
            if name in found:
                learner.load_state_dict(found[name])
            for done in (bar := trange(len(learner.curve), iterations, desc=name, disable=None)):
                learner.iterate()
                bar.set_postfix(right=f"{learner.curve[-1]:.2f}")
                if checkpoint and ((done + 1) % 10 == 0 or done + 1 == iterations):
                    found[name] = learner.state_dict()
                    save_atomically(found, checkpoint)
        median = torch.tensor(learner.seconds).median()
        print(f"{name:16} right {learner.curve[-1]:.3f}, update {1e3 * median:.0f} ms (median)")
    print(f"best without memory: {BEST_WITHOUT_MEMORY:.3f}")
    if compare:
        ours, loop = (torch.tensor(learner.seconds).median().item() for learner in learners.values())
        print(f"an update with reset= is {loop / ours:.1f} times as fast as with the loop")
    draw(plot, learners)
    return learners


if __name__ == "__main__":
    common.application(main)()
