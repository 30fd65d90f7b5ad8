"""Who may import whom: jobs -> actors -> minigpt_ray, and heavy libraries only where they are used."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for package in ("minigpt_ray", "actors", "jobs") for path in (ROOT / package).rglob("*.py"))
NAMES = [path.relative_to(ROOT).as_posix() for path in FILES]

ONLY_IN = {
    "vllm": {"actors/vllm_engine.py", "actors/vllm_cpu.py"},
    "deepspeed": {"actors/engine.py"},
}
NEVER_IN = {
    "minigpt_ray": {"actors", "jobs", "ray", "vllm", "deepspeed"},
    "actors": {"jobs"},
    "jobs": {"vllm", "deepspeed"},
}


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, at the top or within a function."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the module's full name"
            yield node.module or ""
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_go_downwards(path):
    name = path.relative_to(ROOT).as_posix()
    packages = {module.partition(".")[0] for module in imported(path)}
    assert not packages & NEVER_IN[name.partition("/")[0]]
    for library, places in ONLY_IN.items():
        assert library not in packages or name in places


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_module_opens_with_what_it_is_for(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not tree.body or ast.get_docstring(tree)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_signature_is_annotated(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs, *filter(None, [node.args.vararg, node.args.kwarg])]
            missing = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            assert not missing and (node.returns is not None or node.name == "__init__"), f"{node.name}: {', '.join(missing) or 'its result'} is not annotated"


def test_the_ppo_driver_fits_a_page():
    assert len((ROOT / "jobs/ppo.py").read_text(encoding="utf-8").splitlines()) <= 170


def test_a_driver_starts_without_what_only_models_need():
    """Seconds and 100 MiB in every job."""
    parts = "collection, evaluation, policy, critic, reference, rewards, supervised, training"
    code = f"import sys; from actors import {parts}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    assert "torch" in loaded and not {"accelerate", "deepspeed", "transformers", "vllm"} & set(loaded)


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "jobs"], ids=[n for n in NAMES if n.startswith("jobs/")])
def test_a_driver_holds_no_ray_get(path):
    assert "ray.get(" not in path.read_text(encoding="utf-8")
