"""The course of a PPO run: which step is next, what is saved and restored, what happens when a learner is lost, how fast it goes."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from actors import evaluation
from actors.critic import Critic
from actors.generator import Generator
from actors.group import Group, OutOfRestarts, PublicationUnsent, RoleLost, covered_seconds, gather
from actors.parent import driver_restarts, got_further
from actors.placement import peak_flops
from actors.policy import Policy
from actors.preparation import Preparation
from minigpt_ray.checkpoint import CheckpointError, naming, write_json_atomic
from minigpt_ray.cli import write_resolved
from minigpt_ray.data.prompts import PromptStream
from minigpt_ray.flops import ppo_step_flops
from minigpt_ray.model_directory import ExportError
from minigpt_ray.rl.experience import RolloutBatch, TrainingState
from minigpt_ray.scaling import Requests
from minigpt_ray.tracking import Rates, Timer, Tracker, writing

SENTENCES = (*evaluation.SENTENCES, CheckpointError, ExportError, FloatingPointError)
"""What ends a run that has begun, and says in a sentence why."""


class Terminated(Exception):
    """SIGTERM came."""


class Training:
    """Steps, checkpoints and rates of one run."""

    def __init__(self, ready: Preparation, tracker: Tracker, generator: Generator, policy: Policy, critic: Critic, others: Sequence[Group]) -> None:
        """Waits until every role is built, then goes on from the checkpoint of `ready`, or from the beginning."""
        self.ready, self.config, self.tracker = ready, ready.config, tracker
        self.generator, self.policy, self.critic = generator, policy, critic
        self.roles: list[Group] = [generator, policy, critic, *others]
        generator.obey(Requests(ready.directory), tracker.message)
        for role in [*self.roles[1:], self.roles[0]]:  # the generator last, which may share a GPU with the others
            role.ready()
        self._devices = [str(process["device"]) for role in (policy, *self.roles) for process in role.whereabouts()]
        self.rates = Rates(self.config.steps, self._peak_flops(self.config.placement.generator.workers))
        self._rewinds_left = self.config.restart_limit
        self._changing = self._is_ending = False
        self._restore(ready.start)

    def _restore(self, checkpoint: Path | None) -> None:
        """Learners, state and prompts as they were at a checkpoint, or at the beginning; the generator gets the policy's weights."""
        self.state = TrainingState(0, prompts_drawn=0, epoch=1, num_tokens_generated=0, kl_coef=self.config.algorithm.kl_coef)
        if checkpoint is not None:
            self.state = TrainingState(**self.ready.checkpoints.load_state(checkpoint))
            gather(self.policy.load(checkpoint), self.critic.load(checkpoint)).result()
        self._saved = self.state.step
        self.prompts = PromptStream(self.ready.prompts.prompts, self.config.seed, start=self.state.prompts_drawn)
        self.generator.receive(self.policy.publish(self.state.step))
        self._write_processes()

    def _write_processes(self) -> None:
        """Keep processes.json up to date: which process of which host is which rank of which role."""
        self._changes_written = sum(role.changes for role in self.roles)
        roles = {role.role: role.whereabouts() for role in self.roles}
        path = self.ready.directory / "processes.json"
        with writing(path):
            write_json_atomic(path, {"driver": os.getpid(), "roles": roles})

    def run(self, step: Callable[[TrainingState], TrainingState]) -> None:
        """Take the steps that are left.

        When a learner's process dies, both learners start again from the newest checkpoint, and the prompts and the
        metrics go back with them; OutOfRestarts is raised once restart_limit is used up between two checkpoints.
        At SIGTERM the last whole step is committed and the process ends with 0: at once, or, while the models stand between two steps, after the step. After the
        last one it changes nothing, since the job is about to end: its model is written and delivered.
        """
        with self._answering_sigterm():
            while self.state.step < self.config.steps:
                for role in self.roles:
                    role.reset_usage()
                try:
                    self._commit(step(self.state))
                except RoleLost as lost:
                    self._recover(lost)
            self._is_ending = True

    @contextmanager
    def _answering_sigterm(self) -> Iterator[None]:
        def terminate(number: int, frame: object) -> None:
            again, self._is_ending = self._is_ending, True
            if not again and not self._changing:
                raise Terminated

        handler = signal.signal(signal.SIGTERM, terminate)
        try:
            yield
        except Terminated:  # another SIGTERM changes nothing, to the end: `ray job stop` sends one to the driver, and the parent passes one on
            self._save()
            saved = f"step {self.state.step} is saved; checkpoint.resume=auto goes on from there"
            self.tracker.message(f"SIGTERM: {saved if self.state.step else 'no step was complete, so nothing is saved'}")
            raise SystemExit(0) from None
        finally:
            if not self._is_ending:
                signal.signal(signal.SIGTERM, handler)

    def begin_update(self) -> None:
        """From here to the end of the step the models stand between two steps."""
        self._changing = True

    def _peak_flops(self, workers: int) -> float:
        """Of all devices, with so many generator workers."""
        pool = self.config.placement.generator.model_copy(update={"workers": workers})
        return peak_flops({**self.ready.roles, "generator": pool}, self._devices)

    def metrics(self, state: TrainingState, batch: RolloutBatch, learnt: Sequence[Mapping[str, float]], timer: Timer) -> dict[str, float]:
        """Progress, rates, and what every role was doing in the step that led to `state`; `learnt` is what policy and critic say of their updates."""
        seconds = sum(s for name, s in timer.seconds.items() if "/" not in name)
        for role in self.roles:
            self.tracker.events(role.role, role.usage.spans, role.marks)
            role.marks = []
        self.rates.peak_flops = self._peak_flops(self.generator.meter.workers)
        updates_per_epoch = self.config.updates_per_step / self.config.algorithm.ppo_epochs
        policy_epochs, critic_epochs = (said.get(f"{role}/updates", 0.0) / updates_per_epoch for role, said in zip(("policy", "critic"), learnt, strict=True))
        flops = ppo_step_flops(self.ready.shapes, batch.prompt_lengths.tolist(), batch.lengths.tolist(), policy_epochs, critic_epochs)
        return {
            "train/epoch": self.prompts.epoch,
            "train/num_tokens_generated": state.num_tokens_generated,
            **self.rates.step(state.step, seconds, int(batch.response_mask.sum()), len(batch), flops),
            "time/step_s": seconds,
            "time/overhead_s": max(0.0, seconds - covered_seconds([span for role in self.roles for span in role.usage.spans])),
            **timer.metrics(),
            **{name: value for role in self.roles for name, value in role.usage_metrics(seconds).items()},
            "restarts/driver": driver_restarts(),
        }

    def _commit(self, state: TrainingState) -> None:
        """The step is complete; a checkpoint is written when one is due."""
        self.state = replace(state, prompts_drawn=self.prompts.drawn, epoch=self.prompts.epoch)
        if state.step % self.config.checkpoint.every == 0 or state.step == self.config.steps:
            self._save()
        if sum(role.changes for role in self.roles) != self._changes_written:
            self._write_processes()
        self._end_change()

    def _end_change(self) -> None:
        self._changing = False
        if self._is_ending:
            raise Terminated

    def _save(self) -> None:
        """Write the checkpoint of the last whole step, unless it is there."""
        if self.state.step == self._saved:
            return
        with Timer(self.tracker.phase)("checkpoint"):
            directory = self.ready.checkpoints.begin(self.state.step)
            gather(self.policy.save(directory), self.critic.save(directory)).result()
            self.ready.checkpoints.save_state(directory, asdict(self.state))
            with naming(directory):
                write_resolved(self.config, directory)
            self.tracker.sync()  # no checkpoint has steps of which metrics.jsonl does not know
            self.ready.checkpoints.commit(self.state.step)
        self._saved = self.state.step
        got_further()
        self._rewinds_left = self.config.restart_limit
        for role in self.roles:
            role.refill()

    def _recover(self, lost: RoleLost) -> None:
        """Rewind, and again when a learner is lost while they start."""
        try:
            self._rewind(lost)
        except RoleLost as again:
            self._recover(again)

    def _rewind(self, lost: RoleLost) -> None:
        """Start both learners, and whoever shares their processes, again from the newest checkpoint."""
        with_a_learner = self.policy.cluster.with_a_learner
        if not with_a_learner(lost.role) or self._rewinds_left == 0:
            raise OutOfRestarts(lost.role, f"restart_limit={self.config.restart_limit}", lost) from lost
        self._rewinds_left -= 1
        self._changing = True
        checkpoint = self.ready.checkpoints.latest()
        step = 0 if checkpoint is None else self.ready.checkpoints.step_of(checkpoint)
        died = self.policy.who_died() if isinstance(lost, PublicationUnsent) else ""
        self.tracker.message(f"{lost}{died and f': {died}'}; the learners start again and go on after step {step}")
        groups = [role for role in self.roles if with_a_learner(role.role)]
        for group in groups:
            group.close()
        self.generator.rest()  # new learners build, and load, beside an engine that sleeps, as the first ones learnt
        for group in groups:
            group.start()
        for group in groups:
            group.ready()
            group.mark_restart()
        self._restore(checkpoint)
        self.tracker.rewind(step)
        self._end_change()
