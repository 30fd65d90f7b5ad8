"""The set-up takes torch's CPU build from where it is, pulls in no CUDA, and says in a sentence what failed."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
TAG = f"cp{sys.version_info.major}{sys.version_info.minor}"


@pytest.fixture
def install() -> ModuleType:
    specification = importlib.util.spec_from_file_location("install", ROOT / "requirements" / "install.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_torch_comes_from_the_wheel_folder_that_pip_names(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / f"torch-2.13.0+cpu-{TAG}-{TAG}-manylinux_2_28_x86_64.whl").touch()
    for place in (str(tmp_path), f"/nowhere file://{tmp_path}"):
        monkeypatch.setenv("PIP_FIND_LINKS", place)
        assert install.torch_source() == ["--find-links", str(tmp_path)]


@pytest.mark.parametrize("place", ["", "/nowhere", "https://example.com/wheels", "."])
def test_without_such_a_folder_torch_comes_from_pytorchs_index_of_cpu_builds(install: ModuleType, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", place)
    assert install.torch_source() == ["--torch-backend", "cpu"]


def test_the_lock_of_a_machine_without_gpu_holds_no_cuda() -> None:
    names = [line.split("==")[0] for line in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()]
    assert "torch==2.13.0+cpu" in (ROOT / "requirements" / "cpu.txt").read_text().splitlines()
    assert not [name for name in names if name.startswith(("nvidia", "cuda")) or name in ("triton", "torchvision", "torchaudio", "torchcodec")]


def test_what_fails_is_said_with_the_command_and_a_remedy(install: ModuleType) -> None:
    with pytest.raises(install.SetupError, match=r"`.* -c raise SystemExit\(3\)` ended with code 3: do something"):
        install.run([sys.executable, "-c", "raise SystemExit(3)"], "do something")


def test_an_old_python_is_refused(install: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install.sys, "version_info", type("Version", (tuple,), {"major": 3, "minor": 9})((3, 9)))
    with pytest.raises(install.SetupError, match=r"Python 3\.9 is too old; call make with PYTHON=python3\.11 or newer"):
        install.install(ROOT / "requirements" / "cpu.txt", gpu=False)


def test_a_machine_with_a_gpu_keeps_the_cpu_builds_that_were_asked_for(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed: list[str] = []

    def keep(lock: Path, gpu: bool) -> None:
        installed.append(lock.name)
        install.STAMP.write_text("gpu 1" if gpu else "cpu 1")

    monkeypatch.setattr(install, "STAMP", tmp_path / "installed")
    monkeypatch.setattr(install, "install", keep)
    monkeypatch.setattr(install.shutil, "which", lambda name: "/usr/bin/" + name)
    for arguments in ([], ["--cpu"], [], ["--gpu"], []):
        monkeypatch.setattr(sys, "argv", ["install.py", *arguments])
        install.main()
    assert installed == ["gpu.txt", "cpu.txt", "cpu.txt", "gpu.txt", "gpu.txt"]


def test_builds_of_the_other_kind_are_put_into_a_new_environment(install: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    venv = tmp_path / ".venv"
    for name, path in {"VENV": venv, "PYTHON": venv / "bin" / "python", "STAMP": venv / "installed"}.items():
        monkeypatch.setattr(install, name, path)
    monkeypatch.setattr(install, "run", lambda command, advice: commands.append(command))
    install.PYTHON.parent.mkdir(parents=True)
    install.PYTHON.touch()
    made_anew = []
    for lock, gpu in ((install.CPU_LOCK, False), (install.CPU_LOCK, False), (install.GPU_LOCK, True), (install.GPU_LOCK, True), (install.CPU_LOCK, False)):
        commands.clear()
        install.install(lock, gpu)
        made_anew.append([command[1:4] == ["-m", "venv", "--clear"] for command in commands[:1]])
    assert made_anew == [[False], [], [True], [], [True]]
