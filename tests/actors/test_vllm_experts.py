"""On a CPU, vLLM computes a mixture of experts with the weights as they were loaded, so that later ones count."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

import actors.vllm_engine  # noqa: F401  what is tested is what it puts into vLLM
from minigpt_ray.presets import PRESETS


@pytest.mark.slow
@torch.no_grad()
def test_experts_give_what_those_of_transformers_give_also_with_other_weights() -> None:
    torch.manual_seed(0)
    shape = PRESETS["qwen3-moe-nano"]
    experts = Qwen3MoeExperts(AutoConfig.for_model(**shape.to_hf(), experts_implementation="eager"))
    hidden, weights = torch.randn(7, shape.hidden_size), torch.rand(7, 2)
    chosen = torch.stack([torch.randperm(shape.num_experts)[:2] for _ in range(7)])
    for _ in range(2):
        for parameter in experts.parameters():
            parameter.normal_(0, 0.2)
        found = torch.full_like(hidden, torch.nan)
        CPUUnquantizedExperts.apply(None, found, hidden, experts.gate_up_proj, experts.down_proj, weights, chosen.int())
        torch.testing.assert_close(found, experts(hidden, chosen, weights), atol=1e-5, rtol=1e-5)
