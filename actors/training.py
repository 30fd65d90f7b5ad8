"""The course of a PPO run: which step is next, what is saved and restored, how fast it goes."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace

from actors.critic import Critic
from actors.group import Group, covered_seconds, gather
from actors.placement import peak_flops
from actors.policy import Policy
from actors.preparation import Preparation
from minigpt_ray.cli import write_resolved
from minigpt_ray.data.prompts import PromptStream
from minigpt_ray.flops import ppo_step_flops
from minigpt_ray.rl.experience import RolloutBatch, TrainingState
from minigpt_ray.tracking import Rates, Timer


class Terminated(Exception):
    """SIGTERM came."""


class Training:
    """Steps, checkpoints and rates of one run.

    As a context it answers SIGTERM: the last whole step is committed, and the process ends with 0. While the models are
    being changed that waits until the step is whole.
    """

    def __init__(self, ready: Preparation, policy: Policy, critic: Critic, roles: Sequence[Group]) -> None:
        """Waits until every role is built, then goes on from the checkpoint of `ready`, or from the beginning."""
        self.ready, self.config, self.policy, self.critic, self.roles = ready, ready.config, policy, critic, roles
        for role in roles:
            role.ready()
        self.state = TrainingState(0, prompts_drawn=0, epoch=1, num_tokens_generated=0, kl_coef=self.config.algorithm.kl_coef, skipped_updates=0)
        if ready.start is not None:
            self.state = TrainingState(**ready.checkpoints.load_state(ready.start))
            gather(policy.load(ready.start), critic.load(ready.start)).result()
        self._saved = self.state.step
        self._changing = self._asked_to_end = False
        self.prompts = PromptStream(ready.prompts.prompts, self.config.seed, start=self.state.prompts_drawn)
        self.rates = Rates(self.config.steps, peak_flops(ready.roles, policy.device_name()))

    def __enter__(self) -> "Training":
        self._handler = signal.signal(signal.SIGTERM, self._terminate)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if kind is Terminated else self._handler)
        if kind is Terminated:
            if self.state.step > 0:
                self._save()
            raise SystemExit(0)

    def _terminate(self, number: int, frame: object) -> None:
        self._asked_to_end = True
        if not self._changing:
            raise Terminated

    def begin_update(self) -> None:
        """From here to `commit` the models stand between two steps."""
        self._changing = True

    def steps(self) -> Iterator[TrainingState]:
        """The state before each step that is left."""
        while self.state.step < self.config.steps:
            for role in self.roles:
                role.reset_usage()
            yield self.state

    def metrics(self, state: TrainingState, batch: RolloutBatch, timer: Timer) -> dict[str, float]:
        """Progress, rates, and what every role was doing in the step that led to `state`."""
        seconds = sum(s for name, s in timer.seconds.items() if "/" not in name)
        flops = ppo_step_flops(self.ready.shapes, batch.prompt_lengths.tolist(), batch.lengths.tolist(), self.config.algorithm.ppo_epochs)
        return {
            "train/epoch": self.prompts.epoch,
            "train/num_tokens_generated": state.num_tokens_generated,
            **self.rates.step(state.step, seconds, int(batch.response_mask.sum()), len(batch), flops),
            "time/step_s": seconds,
            "time/overhead_s": max(0.0, seconds - covered_seconds([span for role in self.roles for span in role.usage.spans])),
            **timer.metrics(),
            **{name: value for role in self.roles for name, value in role.usage_metrics(seconds).items()},
        }

    def commit(self, state: TrainingState) -> None:
        """The step is complete; a checkpoint is written when one is due."""
        self.state = replace(state, prompts_drawn=self.prompts.drawn, epoch=self.prompts.epoch)
        if state.step % self.config.checkpoint.every == 0 or state.step == self.config.steps:
            self._save()
        self._changing = False
        if self._asked_to_end:
            raise Terminated

    def _save(self) -> None:
        """Write the checkpoint of the last whole step, unless it is there."""
        if self.state.step == self._saved:
            return
        directory = self.ready.checkpoints.begin(self.state.step)
        gather(self.policy.save(directory), self.critic.save(directory)).result()
        self.ready.checkpoints.save_state(directory, asdict(self.state))
        write_resolved(self.config, directory)
        self.ready.checkpoints.commit(self.state.step)
        self._saved = self.state.step
