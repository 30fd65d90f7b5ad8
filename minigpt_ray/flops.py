"""Model FLOPs, the peak of a device, and MFU.

Counted is what the mathematics asks for, at 2 FLOPs per multiply-add of a matrix product: a token attends to itself
and to what is before it (a kernel that computes the whole square gets no credit for the upper half), logits only where
they are used, no padding, no recomputation. Norms, rotations and softmax are left out; they are below a percent.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from minigpt_ray.presets import ModelShape

logger = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------------ the work


def linear_flops(shape: ModelShape, num_tokens: int) -> int:
    """Projections and feed-forward layers of the trunk."""
    return 2 * shape.matrix_parameters * num_tokens


def attention_flops(shape: ModelShape, num_pairs: int) -> int:
    """Scores and weighted sum for so many (query, key) pairs, in every layer and head."""
    return 4 * shape.num_layers * shape.num_heads * shape.head_dim * num_pairs


def head_flops(shape: ModelShape, outputs: int, num_tokens: int) -> int:
    """The output layer; outputs: the vocabulary, or 1 for a critic or reward model."""
    return 2 * shape.hidden_size * outputs * num_tokens


def forward_flops(shape: ModelShape, outputs: int, lengths: Sequence[int], num_outputs_at: int) -> int:
    """One forward over sequences of these lengths, with the output layer at `num_outputs_at` of all their tokens."""
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    return linear_flops(shape, sum(lengths)) + attention_flops(shape, pairs) + head_flops(shape, outputs, num_outputs_at)


TRAINING = 3
"""Forward and backward over forward: the backward pass has two matrix products for each one of the forward pass."""


def training_flops(shape: ModelShape, outputs: int, lengths: Sequence[int], num_outputs_at: int) -> int:
    """Forward and backward."""
    return TRAINING * forward_flops(shape, outputs, lengths, num_outputs_at)


def generation_flops(shape: ModelShape, vocab_size: int, prompt_lengths: Sequence[int], lengths: Sequence[int]) -> int:
    """Prefill and decoding with a KV cache; the last token of a sequence is drawn but never read.

    Every rollout's prompt counts, although prefix caching may compute that of a group once. lengths: prompt and response.
    """
    return forward_flops(shape, vocab_size, [length - 1 for length in lengths], sum(lengths) - sum(prompt_lengths))


@dataclass(frozen=True)
class PPOShapes:
    """The models that take part in a PPO step; the reference and the policy share a vocabulary."""

    policy: ModelShape
    critic: ModelShape | None
    """None where the estimator needs none."""
    reference: ModelShape
    reward_models: tuple[ModelShape, ...]
    vocab_size: int


def ppo_step_flops(shapes: PPOShapes, prompt_lengths: Sequence[int], lengths: Sequence[int], policy_epochs: float, critic_epochs: float) -> float:
    """Every role of one step: generation, scoring forwards, and trainings of policy and critic.

    lengths: prompt and response of each rollout; policy_epochs, critic_epochs: how often the learner went through them, less than
    configured where updates were skipped or an early stop came. Language models need logits for response tokens only, the critic a
    value before each of these and one after, a reward model one output. A reward model with a tokenizer of its own is
    counted at the policy's lengths.
    """
    responses = sum(lengths) - sum(prompt_lengths)
    generator = generation_flops(shapes.policy, shapes.vocab_size, prompt_lengths, lengths)
    policy = forward_flops(shapes.policy, shapes.vocab_size, lengths, responses)
    reference = forward_flops(shapes.reference, shapes.vocab_size, lengths, responses)
    critic = 0 if shapes.critic is None else forward_flops(shapes.critic, 1, lengths, responses + len(lengths))
    rewards = sum(forward_flops(shape, 1, lengths, len(lengths)) for shape in shapes.reward_models)
    return generator + policy + reference + critic + rewards + TRAINING * (policy_epochs * policy + critic_epochs * critic)


def mfu_percent(flops: float, seconds: float, peak: float) -> float:
    """Model FLOPs utilisation (arXiv:2204.02311): 100 * flops / (seconds * peak); peak: FLOP/s of all devices used."""
    return 100 * flops / (seconds * peak)


# ------------------------------------------------------------------------------------------------------ the peaks

Dtype = Literal["bfloat16", "float32"]

GPU_PEAKS: dict[str, dict[Dtype, float]] = {
    "GB300": {"bfloat16": 2500.0, "float32": 80.0},
    "GB200": {"bfloat16": 2500.0, "float32": 80.0},
    "B300": {"bfloat16": 2250.0, "float32": 75.0},
    "B200": {"bfloat16": 2250.0, "float32": 75.0},
    "H200 NVL": {"bfloat16": 835.5, "float32": 60.0},
    "H200": {"bfloat16": 989.4, "float32": 66.9},
    "GH200": {"bfloat16": 989.4, "float32": 66.9},
    "H100 PCIe": {"bfloat16": 756.0, "float32": 51.2},
    "H100 NVL": {"bfloat16": 835.5, "float32": 60.0},
    "H100": {"bfloat16": 989.4, "float32": 66.9},
    "H800 PCIe": {"bfloat16": 756.0, "float32": 51.2},
    "H800": {"bfloat16": 989.4, "float32": 66.9},
    "H20": {"bfloat16": 148.0, "float32": 44.0},
    "A100": {"bfloat16": 312.0, "float32": 19.5},
    "A800": {"bfloat16": 312.0, "float32": 19.5},
    "A40": {"bfloat16": 149.7, "float32": 37.4},
    "A30": {"bfloat16": 165.0, "float32": 10.3},
    "A10G": {"bfloat16": 70.0, "float32": 35.0},
    "A10": {"bfloat16": 125.0, "float32": 31.2},
    "A2": {"bfloat16": 18.0, "float32": 4.5},
    "L40S": {"bfloat16": 362.0, "float32": 91.6},
    "L40": {"bfloat16": 181.0, "float32": 90.5},
    "L20": {"bfloat16": 119.5, "float32": 59.8},
    "L4": {"bfloat16": 121.0, "float32": 30.3},
    "V100S": {"bfloat16": 130.0, "float32": 16.4},
    "V100 PCIE": {"bfloat16": 112.0, "float32": 14.0},
    "V100": {"bfloat16": 125.0, "float32": 15.7},
    "T4": {"bfloat16": 65.0, "float32": 8.1},
    "RTX PRO 6000 Blackwell Max Q": {"bfloat16": 438.9, "float32": 109.7},
    "RTX PRO 6000 Blackwell Workstation": {"bfloat16": 503.8, "float32": 126.0},
    "RTX 6000 Ada": {"bfloat16": 364.2, "float32": 91.1},
    "RTX 5000 Ada": {"bfloat16": 261.1, "float32": 65.3},
    "RTX A6000": {"bfloat16": 154.8, "float32": 38.7},
    "RTX A5000": {"bfloat16": 111.1, "float32": 27.8},
    "Quadro RTX 8000": {"bfloat16": 130.5, "float32": 16.3},
    "Quadro RTX 6000": {"bfloat16": 130.5, "float32": 16.3},
    "RTX 5090": {"bfloat16": 209.5, "float32": 104.8},
    "RTX 5080": {"bfloat16": 112.6, "float32": 56.3},
    "RTX 5070 Ti": {"bfloat16": 87.9, "float32": 43.9},
    "RTX 5070": {"bfloat16": 61.7, "float32": 30.9},
    "RTX 4090": {"bfloat16": 165.2, "float32": 82.6},
    "RTX 4080": {"bfloat16": 97.5, "float32": 48.7},
    "RTX 3090 Ti": {"bfloat16": 80.0, "float32": 40.0},
    "RTX 3090": {"bfloat16": 71.0, "float32": 35.6},
    "RTX 3080 Ti": {"bfloat16": 68.2, "float32": 34.1},
    "RTX 3080": {"bfloat16": 59.5, "float32": 29.8},
}
"""Dense tensor-core bfloat16 with float32 accumulation, and float32 without TF32, of one GPU in TFLOP/s.

From NVIDIA's data sheets of each product (those of GB200 NVL72, GB300 NVL72, HGX B200 and B300, divided by their GPUs; half of what is said to be
with sparsity) and, for RTX cards, its white papers of the architectures: Turing, Ampere GA102, Ada, RTX Blackwell. V100, T4 and Quadro RTX have no
bfloat16 in their tensor cores; theirs is float16. The first name that all stands in the device's name counts: so the special before the general.
"""

OTHERS = ("D", "Laptop", "MIG", "SUPER")
"""Words by which a GPU is another than the one that its name begins with."""


@cache
def gpu_peak_flops(device_name: str, dtype: Dtype) -> float:
    """Peak FLOP/s of one GPU by the name that `torch.cuda.get_device_name()` gives it; nan, and a line in the log, for one that is unknown."""
    words = device_name.replace("-", " ").split()
    for name, peaks in GPU_PEAKS.items():
        if all(word in words for word in name.split()) and not any(word in words for word in OTHERS):
            return 1e12 * peaks[dtype]
    logger.warning("no peak is known for GPU %r, so MFU is null; add its data sheet's dense TFLOP/s to GPU_PEAKS in minigpt_ray/flops.py", device_name)
    return math.nan


@cache
def cpu_peak_flops(threads: int) -> float:
    """FLOP/s of float32 matrix products on so many threads of this machine: that of one thread, measured once, times threads.

    One thread finds a free moment even on a busy machine, where a product over all of them would never be at its best.
    bfloat16 is measured against it too: a CPU without matrix units is slower there.
    """
    import torch  # a job's inputs are checked with the rest of this module, before torch is imported

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    size = 512
    a, b, out = torch.ones(size, size), torch.ones(size, size), torch.empty(size, size)
    seconds: list[float] = []
    while sum(seconds) < 0.3 or len(seconds) < 10:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(before)
    return threads * 2 * size**3 / min(seconds)
