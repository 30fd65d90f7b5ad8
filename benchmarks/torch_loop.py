"""A bare torch loop over the windows that a stage has stored: the peer of supervised_vs_torch.py, in a process of its own.

    python -m benchmarks.torch_loop <directory of a stage that ran> <steps>

The same model, loss, windows in the same order, clipping and AdamW as the stage, float32, as many threads, and nothing else: no Ray,
no DeepSpeed, no metrics, no checkpoints. Writes tokens and seconds of every step to <directory>/torch_loop.json.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from actors.dataset import Sources
from actors.engine import schedule
from actors.supervised_rank import HEADS, num_steps
from minigpt_ray.cli import read_config
from minigpt_ray.config import SupervisedConfig
from minigpt_ray.config.pipeline import STAGE_CONFIGS
from minigpt_ray.data.mixing import Reading
from minigpt_ray.data.prepared import MANIFEST
from minigpt_ray.model_directory import resolve_model
from minigpt_ray.models import load_causal, load_scalar
from minigpt_ray.stages import REFERENCE, STAGES, Batch


def main(directory: Path, steps: int) -> None:
    stage = STAGES[directory.name]
    config = read_config(STAGE_CONFIGS[stage.name], [str(directory / "config.yaml")])
    assert isinstance(config, SupervisedConfig) and config.model.init_from is not None
    torch.set_num_threads(config.cpus_per_worker)
    windows = stored(directory)
    path = resolve_model(config.model.init_from, config.run_dir)
    model = load_scalar(path, "float32", config.seed) if stage.head == "scalar" else load_causal(path, "float32")
    module = HEADS[stage.head](model).train()
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=config.optimizer.lr, betas=config.optimizer.betas, weight_decay=config.optimizer.weight_decay, fused=True
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(config.optimizer, num_steps(config, windows)))
    reading = Reading(windows.sizes, config.shares, num_steps(config, windows), config.batch_size, config.seed)
    micro_batch = max(1, config.engine.micro_batch_tokens // config.window)
    rows = []
    start = time.perf_counter()
    for step in range(steps):
        chosen = reading.windows(step)
        count = sum(windows.count(stage.mean_over, chosen).values())
        losses = []
        for batch in Batch.of(windows.take(chosen), torch.device("cpu")).split(micro_batch):
            loss, _ = stage.loss(module, batch, count, config)
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.optimizer.max_grad_norm)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        now = time.perf_counter()
        rows.append({"tokens": sum(windows.count("num_tokens", chosen).values()), "seconds": now - start, "loss": float(sum(losses))})
        start = now
    (directory / "torch_loop.json").write_text(json.dumps(rows))


def stored(directory: Path) -> Sources:
    """The training windows that the stage made, with the reference's logprobs where it asked for them."""
    (manifest,) = (directory / "windows").glob(f"*/{MANIFEST}")
    windows = Sources.load({"": manifest.parent}, "train")
    kept = [np.load(path, mmap_mode="r") for path in (manifest.parent / "train").glob(f"{REFERENCE}-*.npy")]
    return Sources({"": replace(windows.parts[""], numbers={**windows.parts[""].numbers, REFERENCE: kept[0]})}) if kept else windows


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
