"""Make trl_preferences.json: what TRL's own preference losses say about random logprobs and rewards, for tests/test_trl.py.

    pip download --no-deps trl==0.11.4 && unzip trl-0.11.4-py3-none-any.whl
    python tests/golden/make_trl_preferences.py trl > tests/golden/trl_preferences.json

In 0.11.4 these losses are methods of numbers alone. They are read out of the files and run, since importing that version
needs an older transformers.
"""

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Optional, Union

import torch

METHODS = {"dpo_trainer.py": "dpo_loss", "cpo_trainer.py": "cpo_loss", "reward_trainer.py": "compute_loss"}
CASES = [
    {"loss": "dpo", "beta": 0.1},
    {"loss": "dpo", "beta": 0.5, "label_smoothing": 0.1},
    {"loss": "ipo", "beta": 0.2},
    {"loss": "simpo", "beta": 2.0, "gamma": 0.5},
    {"loss": "simpo", "beta": 2.5, "gamma": 1.4, "label_smoothing": 0.2},
]


class FDivergenceType:
    """The one that DPO means: the reverse KL."""

    JS_DIVERGENCE, ALPHA_DIVERGENCE = SimpleNamespace(value="js_divergence"), SimpleNamespace(value="alpha_divergence")


def read(package: Path) -> SimpleNamespace:
    """The methods as functions."""
    names: dict[str, Any] = {"torch": torch, "F": torch.nn.functional, "nn": torch.nn, "PreTrainedModel": torch.nn.Module}
    names |= {"Any": Any, "Dict": dict, "Optional": Optional, "Tuple": tuple, "Union": Union, "FDivergenceType": FDivergenceType}
    for file, method in METHODS.items():
        trainer = next(node for node in ast.parse((package / "trainer" / file).read_text()).body if isinstance(node, ast.ClassDef))
        nodes = [node for node in trainer.body if isinstance(node, ast.FunctionDef) and node.name == method]
        exec(compile(ast.Module(nodes, type_ignores=[]), "trl", "exec"), names)
    return SimpleNamespace(**{method: names[method] for method in METHODS.values()})


def preferences(trl: SimpleNamespace, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Six pairs; TRL gets mean logprobs where its trainer passes these on."""
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected, reference_chosen, reference_rejected = -20 * torch.rand(4, 6, generator=generator, dtype=torch.float64)
    chosen_lengths, rejected_lengths = torch.randint(1, 12, (2, 6), generator=generator).double()
    chosen.requires_grad_()
    average = settings["loss"] in ("ipo", "simpo")
    over = (chosen_lengths, rejected_lengths) if average else (1, 1)
    self = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        reference_free=False,
        f_divergence_type="reverse_kl",
        f_divergence_params=None,
        loss_type={"dpo": "sigmoid"}.get(settings["loss"], settings["loss"]),
        beta=settings["beta"],
        label_smoothing=settings.get("label_smoothing", 0),
        simpo_gamma=settings.get("gamma", 0),
    )
    policy = (chosen / over[0], rejected / over[1])
    reference = () if settings["loss"] == "simpo" else (reference_chosen / over[0], reference_rejected / over[1])
    losses, chosen_rewards, rejected_rewards = (trl.cpo_loss if settings["loss"] == "simpo" else trl.dpo_loss)(self, *policy, *reference)
    losses.mean().backward()
    tensors = {
        "chosen": chosen,
        "rejected": rejected,
        "reference_chosen": reference_chosen,
        "reference_rejected": reference_rejected,
        "chosen_lengths": chosen_lengths,
        "rejected_lengths": rejected_lengths,
        "losses": losses,
        "chosen_rewards": chosen_rewards,
        "rejected_rewards": rejected_rewards,
        "gradient": chosen.grad,
    }
    return {"settings": settings, **{name: tensor.detach().tolist() for name, tensor in tensors.items()}}


def ranking(trl: SimpleNamespace, seed: int, with_margin: bool) -> dict[str, Any]:
    """Rewards of six pairs, which the model is asked for by name."""
    chosen, rejected, margin = torch.randn(3, 6, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inputs = {f"{name}_{side}": side for name in ("input_ids", "attention_mask") for side in ("chosen", "rejected")}
    self = SimpleNamespace(use_reward_data_collator=True, args=SimpleNamespace(center_rewards_coefficient=None))
    rewards = {"chosen": chosen.requires_grad_(), "rejected": rejected}
    loss = trl.compute_loss(
        self, lambda input_ids, attention_mask, return_dict: {"logits": rewards[input_ids]}, inputs | ({"margin": margin} if with_margin else {})
    )
    loss.backward()
    found = {"chosen": chosen, "rejected": rejected, "margin": margin * with_margin, "gradient": chosen.grad}
    return {"loss": loss.item()} | {name: tensor.detach()[:, 0].tolist() for name, tensor in found.items()}


if __name__ == "__main__":
    trl = read(Path(sys.argv[1]))
    made = {
        "made_with": "trl 0.11.4",
        "preferences": [preferences(trl, seed, settings) for seed, settings in enumerate(CASES)],
        "ranking": [ranking(trl, 10 + with_margin, bool(with_margin)) for with_margin in (0, 1)],
    }
    print(json.dumps(json.loads(json.dumps(made), parse_float=lambda text: round(float(text), 7))))
