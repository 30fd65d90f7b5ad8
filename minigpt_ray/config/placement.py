"""How many processes each role has, of what size, and who shares them."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from minigpt_ray.config.base import Config


class ProcessPlacement(Config):
    """What one process of a role has."""

    cpus: PositiveInt = 1
    """CPUs, and compute threads, of one process."""
    gpus: float = Field(default=0, ge=0)
    """GPUs of one process; a fraction shares a GPU. More than one is for the generator's tensor parallel alone."""
    resources: dict[str, PositiveFloat] = {}
    """Custom resources of one process, as nodes were given them: `{learner: 1}` after `ray start --resources='{"learner": 4}'`."""
    labels: dict[str, str] = {}
    """Labels that a node must have to hold a process, by Ray's selectors: `{role: learner}` after `ray start --labels=role=learner`, `{ray.io/accelerator-type: "in(H100, H200)"}`, `{zone: "!a"}`."""

    @model_validator(mode="after")
    def _custom_resources(self) -> "ProcessPlacement":
        for name in self.resources:
            if name in ("CPU", "GPU", "memory", "object_store_memory"):
                raise ValueError(f"resources names {name}, which is none of the custom ones; use cpus or gpus")
        return self


class RolePlacement(ProcessPlacement):
    """Processes of one role."""

    ranks: PositiveInt = 1
    """Processes."""
    strategy: Literal["pack", "spread"] | None = None
    """Prefer few nodes or many for these ranks; null: as `placement.strategy`."""


class GeneratorPlacement(ProcessPlacement):
    """Processes of the generator, a pool: workers come and go while the job runs."""

    workers: PositiveInt = 1
    """Workers that the job starts with; `python -m jobs.scale RUN_DIR generator=4` changes it in a running job."""
    min_workers: PositiveInt = 1
    """Fewest workers that may be asked for."""
    max_workers: PositiveInt | None = None
    """Most workers that may be asked for, null: as many as the cluster holds. A Ray that the job starts by itself on this machine has room for so many."""
    autoscale: bool = False
    """Between min_workers and max_workers: a worker more after a step in which prompts waited for one, a worker less after three in which half the pool had nothing to do."""
    tensor_parallel: PositiveInt = 1
    """GPUs, or processes where there are none, over which one worker's model is split."""

    @property
    def ranks(self) -> int:
        """Processes when the job starts."""
        return self.workers

    @property
    def room(self) -> int:
        """Processes for which a Ray of the job's own has room."""
        return self.workers if self.max_workers is None else self.max_workers

    @model_validator(mode="after")
    def _workers_within_bounds(self) -> "GeneratorPlacement":
        if self.autoscale and self.max_workers is None:
            raise ValueError("autoscale=true needs a bound, but max_workers=null; set max_workers")
        if not self.min_workers <= self.workers <= self.room:
            raise ValueError(f"workers={self.workers} is not between min_workers={self.min_workers} and max_workers={self.max_workers}; change one of them")
        return self

    @model_validator(mode="after")
    def _a_gpu_for_each_part(self) -> "GeneratorPlacement":
        if self.gpus and self.gpus != self.tensor_parallel and max(self.gpus, self.tensor_parallel) > 1:
            raise ValueError(
                f"gpus={self.gpus:g} does not give every part of tensor_parallel={self.tensor_parallel} one whole GPU; set gpus={self.tensor_parallel} or change tensor_parallel"
            )
        return self


AnyPlacement = RolePlacement | GeneratorPlacement


class PlacementConfig(Config):
    """Who runs where."""

    address: str | None = None
    """Ray cluster to join; none: the one this job was submitted to, else a fresh local one."""
    strategy: Literal["pack", "spread"] = "pack"
    """Prefer few nodes or many for the ranks of a role; each role may have its own. Generator workers are placed one by one."""
    wait_seconds: NonNegativeFloat = 5
    """How long the job waits for room, saying what is missing, before it is refused, which by default is within ten seconds of its start; where an autoscaler brings nodes, as long as these take."""
    check_memory: bool = True
    """Refuse roles whose estimated memory no node, or no GPU, has."""
    hang_after_s: PositiveFloat = 3600
    """After so many seconds a call to a role counts as hung: its ranks' stacks are printed, and they are ended and replaced like ranks that died."""
    generator: GeneratorPlacement = GeneratorPlacement()
    """Generator workers."""
    policy: RolePlacement = RolePlacement()
    """Policy ranks."""
    critic: RolePlacement = RolePlacement()
    """Critic ranks."""
    reference: RolePlacement = RolePlacement()
    """Reference ranks."""
    reward_model: RolePlacement = RolePlacement()
    """Ranks of each reward model."""
    colocate: tuple[tuple[str, ...], ...] = ()
    """Sets of roles that share processes, for example `[[policy, reference], [critic, reward_model, rewards]]`: rank i of each lives in one process, which has the CPUs and GPUs of the set's first role. They compute in turn, and libraries, contexts and memory are paid once. The generator has processes of its own."""

    def home(self, role: str) -> str:
        """The role whose processes `role` lives in: the first of its set, or its own."""
        kind = "reward_model" if role.startswith("reward_model_") else role
        return next((shared[0] for shared in self.colocate if kind in shared), role)

    @property
    def generator_asks_for_no_other_nodes(self) -> bool:
        """Whether generator workers may be wherever the policy may, by labels and custom resources."""
        policy, generator = getattr(self, self.home("policy")), self.generator
        return generator.labels in ({}, policy.labels) and generator.resources.keys() <= policy.resources.keys()

    @property
    def pairs(self) -> bool:
        """Whether rank i of the policy and worker i of the generator share a GPU: as many of both, each with a part, together more than half and at most a whole one, on nodes of one kind."""
        policy, generator = getattr(self, self.home("policy")), self.generator
        parts = round(policy.gpus + generator.gpus, 4)
        return bool(self.generator_asks_for_no_other_nodes and generator.workers == policy.ranks and min(policy.gpus, generator.gpus) > 0 and 0.5 < parts <= 1)

    @model_validator(mode="after")
    def _sets_that_can_be(self) -> "PlacementConfig":
        listed = [name for shared in self.colocate for name in shared]
        ranks = {name: getattr(self, name).ranks for name in ("policy", "critic", "reference", "reward_model")} | {"rewards": 1}
        for name in listed:
            if name not in ranks:
                raise ValueError(f"colocate names {name!r}; use some of {', '.join(ranks)}")
            if listed.count(name) > 1:
                raise ValueError(f"colocate names {name} twice; a role lives in one place")
        for shared in self.colocate:
            if not shared or shared[0] not in ("policy", "critic", "reference"):
                raise ValueError(f"colocate has the set [{', '.join(shared)}]; its first role gives the processes and must be policy, critic or reference")
            for name in shared:
                if ranks[name] != ranks[shared[0]]:
                    raise ValueError(
                        f"colocate puts {name} with {ranks[name]} ranks into the processes of {shared[0]} with {ranks[shared[0]]}; give both the same number"
                    )
            for name in (name for name in shared[1:] if name != "rewards"):
                tenant, home = getattr(self, name), getattr(self, shared[0])
                for field in ProcessPlacement.model_fields:
                    asked, usual = getattr(tenant, field), ProcessPlacement.model_fields[field].default
                    if asked not in (usual, getattr(home, field)):
                        raise ValueError(
                            f"{name}.{field}={asked} has no effect, since colocate puts {name} into the processes of {shared[0]}; set {shared[0]}.{field}"
                        )
        return self

    @model_validator(mode="after")
    def _a_gpu_for_each_rank(self) -> "PlacementConfig":
        for name in ("policy", "critic", "reference", "reward_model"):
            role = getattr(self, name)
            if role.gpus > 1:
                raise ValueError(f"{name}.gpus={role.gpus:g}, but a rank computes on one GPU; set {name}.gpus=1 and raise {name}.ranks")
            paired = self.pairs and self.home(name) == self.home("policy")
            if name in ("policy", "critic") and role.ranks > 1 and 0 < role.gpus < 1 and not paired:
                raise ValueError(
                    f"{name}.ranks={role.ranks} with {name}.gpus={role.gpus:g} may meet on one GPU, which NCCL refuses; set {name}.gpus=1 or {name}.ranks=1, "
                    "or let every policy rank share a GPU with a generator worker: as many workers as ranks, more than half a GPU together, all learners in the policy's processes, "
                    "no labels or custom resources of the generator that the policy lacks"
                )
        return self
