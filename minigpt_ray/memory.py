"""How much memory each role needs, estimated from the shape of its model before any process starts.

    for role in estimate(config):
        print(role.name, role.gib)

It is an estimate to plan by: of PPO's processes in debug mode it is within 15 % of what they turn out to hold
(`python -m benchmarks.shared_processes` prints both). This module imports neither torch
nor ray: the model is known by its config.json, and without one the answer is that it is unknown until the model exists.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from minigpt_ray.config import (
    AnyPlacement,
    EngineConfig,
    EvaluateConfig,
    GeneratePreferencesConfig,
    GeneratorConfig,
    GeneratorPlacement,
    LearnerConfig,
    ModelReward,
    PPOConfig,
    ReferenceConfig,
    RolePlacement,
)
from minigpt_ray.presets import ModelShape

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2}

PROCESS_GIB = {"generator": 0.65, "policy": 0.5, "critic": 0.5, "rewards": 0.2}
"""What a process holds with its libraries loaded and no model, in GiB."""
OTHER_PROCESS_GIB = 0.36
GPU_CONTEXT_GIB = 0.6
"""CUDA context and communication buffers of one process on a GPU."""


@dataclass(frozen=True)
class RoleMemory:
    """One role: its processes, its model, and the GiB that one rank needs, by what they are for."""

    name: str
    placement: AnyPlacement
    parameters: int | None
    """Of the whole model; None where it is unknown or the role has none."""
    parts: dict[str, float]
    """GiB of one rank, on its GPU if it has one, on each of its GPUs if it is split over several."""
    note: str = ""
    own_processes: bool = True
    """False where the role lives in those of another one, which has the CPUs and GPUs."""

    @property
    def devices(self) -> int:
        """How many hold `parts`: the GPUs of a rank that is split over several count each."""
        return self.placement.ranks * _split(self.placement)

    @property
    def gib(self) -> float | None:
        """GiB of one rank, or of one of its GPUs, together; None where the model is unknown."""
        return sum(self.parts.values()) if self.parts else None


Answering = EvaluateConfig | GeneratePreferencesConfig
"""Configurations of jobs that answer prompts, and learn nothing."""


def estimate(config: PPOConfig | Answering) -> list[RoleMemory]:
    """All roles of a job that has a placement."""
    if not isinstance(config, PPOConfig):
        return _estimate_of_answering(config)
    place, policy = config.placement, find_shape(config.policy.init_from, config.run_dir)

    def shape_of(init_from: str) -> ModelShape | None:
        return policy if init_from == "policy" else find_shape(init_from, config.run_dir)

    longest = config.data.max_prompt_tokens + config.sampling.max_tokens
    updated, scored = config.algorithm.mini_batch_size * longest, config.score_chunk * config.sampling.n * longest
    roles = [
        _generator(config, config.policy.init_from, policy),
        _learner("policy", place.policy, config.policy, policy, updated, scalar_head=False),
        *(
            [_learner("critic", place.critic, config.critic, shape_of(config.critic.init_from), updated, scalar_head=True)]
            if config.algorithm.uses_critic
            else []
        ),
        _frozen("reference", place.reference, config.reference, shape_of(config.reference.init_from), scored, scalar_head=False),
        *_reward_roles(config, shape_of, scored),
    ]
    return [role if place.home(role.name) == role.name else _in_processes_of(place.home(role.name), role) for role in roles]


def _estimate_of_answering(config: Answering) -> list[RoleMemory]:
    """The generator holds one of the models at a time, so the largest counts."""
    asked = config.models if isinstance(config, EvaluateConfig) else (config.model,)
    found = [shape for shape in (find_shape(model, config.run_dir) for model in asked) if shape is not None]
    largest = max(found, key=ModelShape.num_parameters, default=None)
    answers = config.sampling.n * (config.num_prompts if isinstance(config, EvaluateConfig) else config.prompts_per_batch)
    scored = answers * (config.data.max_prompt_tokens + config.sampling.max_tokens)
    return [_generator(config, " ".join(asked), largest), *_reward_roles(config, lambda init_from: find_shape(init_from, config.run_dir), scored)]


def _reward_roles(config: PPOConfig | Answering, shape_of: Callable[[str], ModelShape | None], scored: int) -> list[RoleMemory]:
    models = [source for source in config.rewards.values() if isinstance(source, ModelReward)]
    place = config.placement.reward_model
    return [
        *(_frozen(f"reward_model_{i}", place, model, shape_of(model.init_from), scored, scalar_head=True) for i, model in enumerate(models)),
        RoleMemory("rewards", RolePlacement(), None, {"process": PROCESS_GIB["rewards"]}),
    ]


def per_process(config: PPOConfig | Answering) -> dict[str, float]:
    """GiB of one process of each role that has some, on its GPU or, without one, in its host; without the roles of which one is unknown.

    Roles that share a process compute in turn, so their largest activations count. On a GPU the generator's cache does
    not count: vLLM makes it as large as there is room.
    """
    tenants: dict[str, list[RoleMemory]] = {}
    for role in estimate(config):
        tenants.setdefault(role.name if role.own_processes else config.placement.home(role.name), []).append(role)
    found = {}
    for home, roles in tenants.items():
        if all(role.gib is not None for role in roles):
            left_out = {"activations", "cache"} if roles[0].placement.gpus else {"activations"}
            kept = sum(gib for role in roles for part, gib in role.parts.items() if part not in left_out)
            found[home] = kept + max(role.parts.get("activations", 0.0) for role in roles)
    return found


def find_shape(init_from: str, run_dir: Path) -> ModelShape | None:
    """Shape of a stage of the run or of a local directory; None when there is no such model yet, or it is on the hub."""
    for directory in (run_dir / init_from / "model", Path(init_from)):
        if (directory / "config.json").is_file():
            return ModelShape.from_config_json(directory / "config.json")
    return None


# ------------------------------------------------------------------------------------------------------- roles


def state_bytes(parameters: int, engine: EngineConfig, ranks: int) -> dict[str, float]:
    """Bytes on one rank of weights, gradients and optimizer states, sharded as the ZeRO stage says (arXiv:1910.02054).

    AdamW keeps two float32 moments; bfloat16, and every ZeRO stage above 0, also a float32 copy of the weights.
    """
    width, stage = BYTES[engine.dtype], engine.zero_stage
    master = 4 if engine.dtype == "bfloat16" or stage > 0 else 0
    return {
        "weights": parameters * width / (ranks if stage == 3 else 1),
        "gradients": parameters * width / (ranks if stage >= 2 else 1),
        "optimizer": 0.0 if engine.offload_optimizer else parameters * (8 + master) / (ranks if stage >= 1 else 1),
    }


def activation_bytes(shape: ModelShape, tokens: int, dtype: str, *, training: bool, checkpointing: bool = False, logits: bool) -> float:
    """Bytes that a forward (and backward) over so many tokens holds, attention scores never being stored.

    A layer keeps per token its input, two norms, queries, keys and values before and after their rotation, the attention's
    output, and four values of the feed-forward width for each expert that a token passes. Logits are float32, with their log-softmax and, in training, gradient.
    """
    heads = shape.head_dim * (shape.num_heads + 2 * shape.num_kv_heads)
    layer = (6 * shape.hidden_size + 3 * heads + 4 * shape.intermediate_size * shape.experts_per_token) * tokens * BYTES[dtype]
    residual = shape.hidden_size * tokens * BYTES[dtype]
    kept = layer if not training else shape.num_layers * residual + layer if checkpointing else shape.num_layers * layer
    return float(kept + (tokens * (shape.vocab_size or 0) * 4 * (3 if training else 2) if logits else 0))


def cache_bytes(shape: ModelShape, tokens: int, dtype: str) -> int:
    """Bytes of keys and values of so many tokens in every layer."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * tokens * BYTES[dtype]


def _parameters(shape: ModelShape, scalar_head: bool) -> int:
    return shape.num_trunk_parameters() + shape.hidden_size if scalar_head else shape.num_parameters()


def _learner(name: str, placement: RolePlacement, learner: LearnerConfig, shape: ModelShape | None, tokens: int, *, scalar_head: bool) -> RoleMemory:
    if shape is None:
        return _unknown(name, placement, learner.init_from)
    parameters = _parameters(shape, scalar_head)
    parts = state_bytes(parameters, learner, placement.ranks)
    parts["activations"] = activation_bytes(
        shape,
        _in_a_micro_batch(learner.micro_batch_tokens, tokens, placement),
        learner.dtype,
        training=True,
        checkpointing=learner.activation_checkpointing,
        logits=not scalar_head,
    )
    note = f"optimizer states of {parameters * 12 / placement.ranks / GIB:.2f} GiB in host memory" if learner.offload_optimizer else ""
    return _known(name, placement, parameters, parts, note)


def _frozen(
    name: str, placement: RolePlacement, model: ReferenceConfig | ModelReward, shape: ModelShape | None, tokens: int, *, scalar_head: bool
) -> RoleMemory:
    if shape is None:
        return _unknown(name, placement, model.init_from)
    parameters = _parameters(shape, scalar_head)
    activations = activation_bytes(shape, _in_a_micro_batch(model.micro_batch_tokens, tokens, placement), model.dtype, training=False, logits=not scalar_head)
    parts = {"weights": float(parameters * BYTES[model.dtype]), "activations": activations}
    return _known(name, placement, parameters, parts)


def _in_a_micro_batch(most: int, tokens: int, placement: RolePlacement) -> int:
    """Tokens that one rank computes at a time: of its share of `tokens`, all at their longest, at most `most`."""
    return min(most, -(-tokens // placement.ranks))


def _generator(config: PPOConfig | Answering, init_from: str, shape: ModelShape | None) -> RoleMemory:
    generator, placement = config.generator, config.placement.generator
    if shape is None:
        return _unknown("generator", placement, init_from)
    parameters = shape.num_parameters()
    weights = {"weights": parameters * BYTES[generator.dtype] / _split(placement)}
    sequences = generator.max_num_seqs
    logits = {"activations": float(sequences * (shape.vocab_size or 0) * 4 * 2)}
    tokens = sequences * (config.data.max_prompt_tokens + config.sampling.max_tokens)
    cache = {"cache": _cache(generator, placement, shape, tokens) / _split(placement)}  # heads are split
    more = {"processes of its parts": placement.tensor_parallel * PROCESS_GIB["generator"] * GIB} if _parts_are_processes(placement) else {}
    return _known("generator", placement, parameters, weights | logits | cache | more, _cache_note(generator, placement))


def _split(placement: AnyPlacement) -> int:
    """GPUs over which the model of a rank is split."""
    return placement.tensor_parallel if isinstance(placement, GeneratorPlacement) and placement.gpus else 1


def _parts_are_processes(placement: GeneratorPlacement) -> bool:
    """Without GPUs the parts of a model share the memory of the host, each in a process beside the worker's own."""
    return placement.tensor_parallel > 1 and not placement.gpus


def _cache(generator: GeneratorConfig, placement: AnyPlacement, shape: ModelShape, tokens: int) -> float:
    if generator.backend == "vllm" and not placement.gpus:
        return float(generator.kv_cache_mib * 2**20)
    return float(cache_bytes(shape, tokens, generator.dtype))


def _cache_note(generator: GeneratorConfig, placement: AnyPlacement) -> str:
    if generator.backend == "vllm" and placement.gpus:
        return f"at the longest sequences; vLLM takes {generator.gpu_memory_utilization:.0%} of each GPU and queues what does not fit"
    return ""


def _known(name: str, placement: AnyPlacement, parameters: int, parts: dict[str, float], note: str = "") -> RoleMemory:
    process = GPU_CONTEXT_GIB if placement.gpus else PROCESS_GIB.get(name, OTHER_PROCESS_GIB)
    return RoleMemory(name, placement, parameters, {part: size / GIB for part, size in parts.items()} | {"process": process}, note)


def _in_processes_of(home: str, role: RoleMemory) -> RoleMemory:
    parts = {part: gib for part, gib in role.parts.items() if part != "process"} | ({"process": 0.0} if role.parts else {})
    return replace(role, parts=parts, note="; ".join(filter(None, [role.note, f"in the processes of {home}"])), own_processes=False)


def _unknown(name: str, placement: AnyPlacement, init_from: str) -> RoleMemory:
    return RoleMemory(name, placement, None, {}, f"unknown until the model exists on this machine ({init_from})")


# ------------------------------------------------------------------------------------------------------- table


def placement_table(roles: list[RoleMemory]) -> Table:
    """Roles, their processes and what one rank of each needs."""
    table = Table(title="Placement", title_justify="left", show_footer=True)
    total = [role.placement for role in roles if role.own_processes]
    known = [role.gib * role.devices for role in roles if role.gib is not None]
    table.add_column("role", footer="all")
    for name, footer in (
        ("ranks", f"{sum(p.ranks for p in total)}"),
        ("CPUs", f"{sum(p.ranks * p.cpus for p in total)}"),
        ("GPUs", f"{sum(p.ranks * p.gpus for p in total):g}"),
        ("parameters", ""),
        ("GiB per rank", f"{sum(known):.1f} in all" if len(known) == len(roles) else "unknown"),
    ):
        table.add_column(name, footer=footer, justify="right")
    table.add_column("of which, largest first")
    for role in roles:
        place = role.placement
        parts = sorted(role.parts.items(), key=lambda item: -item[1])
        split = ", ".join(f"{part} {gib:.2f}" for part, gib in parts if gib >= 0.005)
        table.add_row(
            role.name,
            f"{place.ranks}" if role.own_processes else "",
            f"{place.ranks * place.cpus}" if role.own_processes else "",
            f"{place.ranks * place.gpus:g}" if role.own_processes else "",
            "" if role.parameters is None else f"{role.parameters:,}",
            "?" if role.gib is None else f"{role.gib:.2f}",
            "; ".join(filter(None, [split, role.note])),
        )
    return table


def print_placement(config: PPOConfig | Answering) -> None:
    """The placement table on stdout."""
    console = Console()
    # A pipe has no width of its own; 80 columns would break every row.
    (console if console.is_terminal else Console(width=160)).print(placement_table(estimate(config)))
