"""What is put into vLLM for a CPU: experts with the weights as they were loaded, so that later ones count, and kernels in place of many calls."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts
from vllm import ir
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

from actors.vllm_cpu import KERNELS
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


@pytest.mark.slow
@torch.no_grad()
def test_kernels_give_what_the_layers_are_defined_by() -> None:
    """Also for a view into the heads of a larger tensor, as queries and keys are."""
    torch.manual_seed(0)
    hidden, residual, weight = torch.randn(5, 32), torch.randn(5, 32), torch.randn(32)
    heads, of_a_head = torch.randn(5, 3 * 16)[:, :32].view(5, 2, 16), torch.randn(16)
    norm, added = (ir.ops.rms_norm.impls[KERNELS["rms_norm"][0]], ir.ops.fused_add_rms_norm.impls[KERNELS["fused_add_rms_norm"][0]])
    torch.testing.assert_close(norm.impl_fn(hidden, weight, 1e-6), functional.rms_norm(hidden, (32,), weight, 1e-6))
    torch.testing.assert_close(norm.impl_fn(heads, of_a_head, 1e-6), functional.rms_norm(heads, (16,), of_a_head, 1e-6))
    expected = functional.rms_norm(hidden + residual, (32,), weight, 1e-6), hidden + residual
    torch.testing.assert_close(added.impl_fn(hidden, residual, weight, 1e-6), expected)
    gate, up = heads.chunk(2, dim=-1)
    torch.testing.assert_close(SiluAndMul.forward_cpu(None, heads), functional.silu(gate) * up)
