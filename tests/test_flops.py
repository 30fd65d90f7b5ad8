import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from minigpt_ray.flops import (
    GPU_PEAKS,
    PPOShapes,
    attention_flops,
    cpu_peak_flops,
    forward_flops,
    generation_flops,
    gpu_peak_flops,
    head_flops,
    linear_flops,
    mfu_percent,
    ppo_step_flops,
    training_flops,
)
from minigpt_ray.presets import PRESETS, ModelShape

VOCAB = 320


def model(shape: ModelShape) -> PreTrainedModel:
    """Eager attention, since torch counts its matrix products; it computes the whole square."""
    config = AutoConfig.for_model(**{**shape.to_hf(), "vocab_size": VOCAB}, eos_token_id=0, pad_token_id=0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")


def upper_half(shape: ModelShape, batch: int, length: int) -> int:
    """What the square of attention has over its causal half."""
    return attention_flops(shape, batch * length * (length - 1) // 2)


@pytest.mark.parametrize("name", ["nano", "llama-nano", "qwen3-moe-nano", "qwen3-2m", "qwen3-3m"])
def test_forward_is_what_torch_counts_less_the_upper_half_of_attention(name: str) -> None:
    shape, batch, length = PRESETS[name], 3, 40
    with FlopCounterMode(display=False) as counter:
        model(shape)(torch.zeros(batch, length, dtype=torch.long))
    ours = forward_flops(shape, VOCAB, [length] * batch, batch * length)
    assert ours + upper_half(shape, batch, length) == counter.get_total_flops()


def test_training_is_what_torch_counts_less_the_upper_half_of_attention() -> None:
    shape, batch, length = PRESETS["nano"], 2, 24
    token_ids = torch.zeros(batch, length, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(shape)(token_ids).logits.sum().backward()
    ours = training_flops(shape, VOCAB, [length] * batch, batch * length)
    assert ours + 3 * upper_half(shape, batch, length) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_generation_is_what_torch_counts_with_a_cache_less_the_upper_half_of_the_prefill() -> None:
    shape, prompt, response = PRESETS["nano"], 7, 5
    network = model(shape)
    with FlopCounterMode(display=False) as counter:
        answer = network(torch.zeros(1, prompt, dtype=torch.long), use_cache=True, logits_to_keep=1)
        for _ in range(response - 1):
            answer = network(torch.zeros(1, 1, dtype=torch.long), past_key_values=answer.past_key_values, use_cache=True)
    ours = generation_flops(shape, VOCAB, [prompt], [prompt + response])
    assert ours + upper_half(shape, 1, prompt) == counter.get_total_flops()


def test_parts_of_a_forward_by_hand() -> None:
    """Hidden 64, 2 heads and 1 key head of 32, feed-forward 128, 2 layers."""
    shape = PRESETS["nano"]
    matrices = 2 * (64 * 64 + 64 * 32 + 64 * 32 + 64 * 64 + 3 * 64 * 128)
    assert linear_flops(shape, 10) == 2 * matrices * 10
    assert attention_flops(shape, 6) == 2 * 2 * (2 * 2 * 32 * 6)
    assert head_flops(shape, VOCAB, 4) == 2 * 64 * VOCAB * 4
    assert forward_flops(shape, VOCAB, [3], 2) == linear_flops(shape, 3) + attention_flops(shape, 6) + head_flops(shape, VOCAB, 2)


def test_large_models_cost_six_flops_per_parameter_and_trained_token() -> None:
    shape = PRESETS["qwen3-0.5b"]
    flops = training_flops(shape, 6400, [64] * 4, 256)
    assert flops == pytest.approx(6 * shape.num_parameters(6400) * 256, rel=0.02)


def test_a_step_counts_every_role() -> None:
    """One rollout, prompt 3 and response 2: five tokens, logits at 2 of them, values before each and after the last."""
    policy, critic, reference, reward = PRESETS["nano"], PRESETS["llama-nano"], PRESETS["qwen3-2m"], PRESETS["qwen3-3m"]
    shapes = PPOShapes(policy, critic, reference, (reward,), VOCAB)
    generate = forward_flops(policy, VOCAB, [4], 2)
    score = forward_flops(policy, VOCAB, [5], 2) + forward_flops(reference, VOCAB, [5], 2) + forward_flops(critic, 1, [5], 3)
    learn = 3 * (forward_flops(policy, VOCAB, [5], 2) + forward_flops(critic, 1, [5], 3))
    judge = forward_flops(reward, 1, [5], 1)
    assert ppo_step_flops(shapes, [3], [5], policy_epochs=2.0, critic_epochs=2.0) == generate + score + judge + 2 * learn


def test_updates_that_were_not_made_do_not_count() -> None:
    """The critic's warm-up, an early stop after half of an epoch."""
    policy, critic = PRESETS["nano"], PRESETS["llama-nano"]
    shapes = PPOShapes(policy, critic, policy, (), VOCAB)
    full, warm_up, stopped = (ppo_step_flops(shapes, [3], [5], epochs, 1.0) for epochs in (1.0, 0.0, 0.5))
    assert full - warm_up == 3 * forward_flops(policy, VOCAB, [5], 2)
    assert full - stopped == (full - warm_up) / 2


def test_without_a_critic_its_passes_do_not_count() -> None:
    shape = PRESETS["nano"]
    with_critic, without = (ppo_step_flops(PPOShapes(shape, critic, shape, (), VOCAB), [3], [5], 2.0, 2.0 if critic else 0.0) for critic in (shape, None))
    assert with_critic - without == 7 * forward_flops(shape, 1, [5], 3)


def test_flops_of_a_step_add_up_over_its_rollouts() -> None:
    shape = PRESETS["nano"]
    shapes = PPOShapes(shape, shape, shape, (), VOCAB)
    parts = [ppo_step_flops(shapes, [p], [n], 1.0, 1.0) for p, n in ((3, 5), (4, 9), (2, 3))]
    assert ppo_step_flops(shapes, [3, 4, 2], [5, 9, 3], 1.0, 1.0) == sum(parts)


def test_mfu_is_a_percentage_of_the_peak_of_all_devices() -> None:
    assert mfu_percent(flops=3e12, seconds=2.0, peak=4 * 1e12) == 37.5


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA H20", 148.0),
        ("NVIDIA A800-SXM4-80GB", 312.0),
        ("NVIDIA A30", 165.0),
        ("Tesla V100-PCIE-16GB", 112.0),
        ("Tesla V100-SXM2-32GB", 125.0),
        ("Tesla T4", 65.0),
        ("NVIDIA GeForce RTX 5070 Ti", 87.9),
    ],
)
def test_a_gpu_is_known_by_the_name_that_torch_gives_it(device: str, tflops: float) -> None:
    assert gpu_peak_flops(device, "bfloat16") == tflops * 1e12


def test_tensor_cores_are_faster_than_float32_on_every_gpu() -> None:
    assert all(peaks["bfloat16"] > peaks["float32"] for peaks in GPU_PEAKS.values())


@pytest.mark.parametrize("device", ["Quadro P400", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"])
def test_an_unknown_gpu_has_no_peak_and_is_named_once_with_the_way_out(device: str, caplog: pytest.LogCaptureFixture) -> None:
    gpu_peak_flops.cache_clear()
    assert all(math.isnan(gpu_peak_flops(device, "bfloat16")) for _ in range(3))
    (line,) = caplog.messages
    assert line.startswith(f"no peak is known for GPU {device!r}") and "GPU_PEAKS" in line


def test_the_peak_of_a_cpu_is_measured_once_and_leaves_the_thread_count() -> None:
    threads = torch.get_num_threads()
    peak = cpu_peak_flops(1)
    assert 1e8 < peak < 1e13
    assert cpu_peak_flops(1) == peak
    assert torch.get_num_threads() == threads
