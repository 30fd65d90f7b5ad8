"""What every test shares: a quiet environment with fixed thread counts, and one local Ray for those that need it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch, ray or vllm, which read these once. One thread each: several processes share the cores,
# and two-thread work collapses when another process takes one.
THREADS = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")}
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",
    "RAY_prestart_worker_first_driver": "0",
    "MPLBACKEND": "Agg",
}
os.environ.update(THREADS | QUIET)
os.environ.setdefault("WANDB_MODE", "offline")

import pytest  # noqa: E402

pytest.register_assert_rewrite("tests.jobs.runs")  # its assertions say what differs, as those of tests do

LONGEST = ("test_ppo.py", "test_readme.py", "test_families.py", "test_sft.py", "test_chaos.py", "test_midtrain.py", "test_submit.py", "test_recompute.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that all workers of `make unit` end at about the same time; gpu tests only where there is a CUDA device."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with 8 logical CPUs, shared by all tests marked ray; each must release what it takes."""
    import ray

    ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=True, logging_level="warning")
    yield
    ray.shutdown()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, which tests/disks.py fills."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)
