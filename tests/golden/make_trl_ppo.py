"""Make trl_ppo.json: what TRL's own PPO functions say about random numbers, for tests/test_trl.py.

    pip download --no-deps trl==0.11.4 && unzip trl-0.11.4-py3-none-any.whl
    python tests/golden/make_trl_ppo.py trl > tests/golden/trl_ppo.json

0.11.4 is the last version in which advantages and losses of PPO are functions of their own. They are read out of the files
and run, since importing that version needs an older transformers.
"""

import ast
import json
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional

import torch

FUNCTIONS = ("flatten_dict", "masked_mean", "masked_var", "masked_whiten", "clip_by_value", "entropy_from_logits")
METHODS = ("compute_advantages", "loss")


def read(package: Path) -> SimpleNamespace:
    """The functions, and the methods as functions."""
    core = ast.parse((package / "core.py").read_text()).body
    trainer = next(node for node in ast.parse((package / "trainer" / "ppo_trainer.py").read_text()).body if isinstance(node, ast.ClassDef))
    nodes = [node for node in (*core, *trainer.body) if isinstance(node, ast.FunctionDef) and node.name in FUNCTIONS + METHODS]
    space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "warnings": warnings, "Optional": Optional, "Dict": dict, "Mapping": Mapping}
    exec(compile(ast.Module(nodes, type_ignores=[]), "trl", "exec"), space)
    return SimpleNamespace(**{name: space[name] for name in FUNCTIONS + METHODS})


def case(trl: SimpleNamespace, seed: int, discount: float, gae_lambda: float, clip: float, value_clip: float) -> dict[str, Any]:
    """Four responses of several lengths behind prompts of several lengths."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.arange(9)
    mask = (columns >= torch.tensor([[2], [1], [3], [2]])) & (columns < torch.tensor([[9], [4], [8], [3]]))
    rewards, values, noise, old, moved = torch.randn(5, 4, 9, generator=generator, dtype=torch.float64)
    config = SimpleNamespace(whiten_rewards=False, gamma=discount, lam=gae_lambda, cliprange=clip, cliprange_value=value_clip, vf_coef=1.0, ratio_threshold=10)
    self = SimpleNamespace(config=config)
    _, advantages, returns = trl.compute_advantages(self, values, rewards, mask.double())
    logprobs, new_values = (old + 0.3 * noise).requires_grad_(), (values + 0.5 * moved).requires_grad_()
    policy, value, stats = trl.loss(self, old, values, torch.zeros(4, 9, 2), new_values, logprobs, mask.double(), advantages, returns)
    (policy + value).backward()
    return {
        "discount": discount,
        "gae_lambda": gae_lambda,
        "clip": clip,
        "value_clip": value_clip,
        "mask": mask.int().tolist(),
        **{
            name: tensor.detach().tolist()
            for name, tensor in {
                "rewards": rewards,
                "values": values,
                "old_logprobs": old,
                "logprobs": logprobs,
                "new_values": new_values,
                "advantages": advantages,
                "returns": returns,
                "policy_loss": policy,
                "value_loss": value,
                "policy_gradient": logprobs.grad,
                "value_gradient": new_values.grad,
                "policy_clip_fraction": stats["policy/clipfrac"],
                "value_clip_fraction": stats["val/clipfrac"],
                "ratio_mean": trl.masked_mean(stats["policy/ratio"], mask),
            }.items()
        },
    }


if __name__ == "__main__":
    trl = read(Path(sys.argv[1]))
    settings = [(1.0, 0.95, 0.2, 0.2), (0.9, 0.5, 0.1, 0.4), (1.0, 1.0, 0.3, 0.1)]
    cases = [case(trl, seed, *setting) for seed, setting in enumerate(settings)]
    rounded = json.loads(json.dumps(cases), parse_float=lambda text: round(float(text), 7))
    print(json.dumps({"made_with": "trl 0.11.4", "cases": rounded}))
