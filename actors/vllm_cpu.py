"""What vLLM does on a CPU in another way here: weights stay as they are loaded, so that later ones count, and small layers are one call.

Importing this puts it into vLLM, for the process that does so.
"""

from typing import Any

import torch
import vllm._custom_ops
from torch import Tensor
from torch.nn import functional
from vllm import ir
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.platforms import current_platform

# ------------------------------------------------------------------------------------------- weights that stay live

# With oneDNN, vLLM on CPU packs linear weights into a private format, and a tied output head keeps the packed copy of
# old weights after an update, silently. Without it the parameters stay live; at this size the speed is the same.
vllm._custom_ops._supports_onednn = False


def _keep_as_loaded(experts: CPUUnquantizedExperts, layer: torch.nn.Module) -> None:
    """What replaces the packing of experts into a private format, into which no later weights could be loaded."""


def _apply_as_loaded(
    experts: CPUUnquantizedExperts,
    output: Tensor,
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *unused: Any,
    **named: Any,
) -> None:
    """Each token through its experts, weighted, into `output`; w1 holds gate and up of every expert, w2 down."""
    output.zero_()
    for expert in topk_ids.unique().tolist():
        tokens, places = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = functional.linear(hidden_states[tokens], w1[expert]).chunk(2, dim=-1)
        found = functional.linear(functional.silu(gate) * up, w2[expert])
        output.index_add_(0, tokens, found * topk_weights[tokens, places, None].to(found.dtype))


CPUUnquantizedExperts.process_weights_after_loading = _keep_as_loaded  # type: ignore[method-assign, assignment]
CPUUnquantizedExperts.apply = _apply_as_loaded  # type: ignore[method-assign, assignment]

# ---------------------------------------------------------------------------------------------------- small layers

# vLLM's own kernels for a CPU, which it passes by there since it expects a compiler to fuse what they do. Without one, a
# norm is eight calls of PyTorch, and at these sizes calls are what a step of generation costs.

KERNELS = {"rms_norm": ["vllm_c_cpu"], "fused_add_rms_norm": ["vllm_c_cpu"]}
"""`ir_op_priority` of an engine on a CPU: operation -> whose implementations to prefer."""


def _weight_alone(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return variance_size is None and weight is not None and weight.dtype == x.dtype


def _weight_and_residual(x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> bool:
    return _weight_alone(x, weight, epsilon, variance_size)


@ir.ops.rms_norm.register_impl("vllm_c_cpu", supported=current_platform.is_cpu(), supports_args=_weight_alone)
def _rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    x = x.contiguous()
    normed = torch.empty_like(x)
    torch.ops._C.rms_norm(normed, x, weight, epsilon)
    return normed


@ir.ops.fused_add_rms_norm.register_impl("vllm_c_cpu", supported=current_platform.is_cpu(), supports_args=_weight_and_residual, inplace=True)
def _fused_add_rms_norm(x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> tuple[Tensor, Tensor]:
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


def _silu_and_mul(layer: SiluAndMul, x: Tensor) -> Tensor:
    found = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    torch.ops._C.silu_and_mul(found, x.contiguous())
    return found


SiluAndMul.forward_cpu = _silu_and_mul  # type: ignore[method-assign, assignment]
