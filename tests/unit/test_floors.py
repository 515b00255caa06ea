"""Imports of colledge point down only, and planning never needs torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import colledge

FLOORS = {
    "__init__": 0, "errors": 0, "units": 0, "arrays": 0, "records": 0, "settings": 0,
    "profiles": 1, "plan": 1,
    "schedule": 2, "models": 2, "data": 2,
    "planner": 3, "measure": 3, "report": 3,
    "parallel": 4,
    "federation": 5,
    "launch": 6,
}  # fmt: skip
SAME_FLOOR_ALLOWED = {
    ("plan", "profiles"),
    ("records", "errors"),
    ("settings", "records"),
    ("settings", "units"),
}
FORBIDDEN = {("parallel", "planner"): "the engine sees a plan, not how it was found"}
WITHOUT_TORCH = {"profiles", "plan", "schedule", "planner"}
BRINGS_TORCH = {"torch", "transformers", "peft", "accelerate", "safetensors.torch"}
DRAWERS = {"utils", "util", "common", "core", "shared", "misc", "helpers"}

ROOT = Path(colledge.__file__).parent


def module_name(root: Path, path: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path) -> dict[str, Path]:
    return {module_name(root, path): path for path in sorted(root.rglob("*.py"))}


def imports(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """Yield the full name of every module that a file imports anywhere, also inside functions."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                yield inner if inner in known or inner in BRINGS_TORCH else base


def unit(module: str) -> str:
    """Return the sub-package (or top module) of colledge that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def floor_faults(root: Path) -> list[str]:
    known = modules(root)
    faults = []
    for name, path in known.items():
        source = unit(name)
        faults += [f"{name}: no drawer packages" for part in name.split(".") if part in DRAWERS]
        if source not in FLOORS:
            faults.append(f"{name}: has no floor")
            continue
        for target_module in imports(name, path, set(known)):
            if target_module.split(".")[0] != root.name:
                continue
            target = unit(target_module)
            pair = (source, target)
            if pair in FORBIDDEN:
                faults.append(f"{name} imports {target_module}: {FORBIDDEN[pair]}")
            below = FLOORS.get(target, sys.maxsize) < FLOORS[source]
            if source != target and not below and pair not in SAME_FLOOR_ALLOWED:
                faults.append(f"{name} imports {target_module}: not below it")
    return faults


def torch_faults(root: Path) -> list[str]:
    """Return the chains by which packages that plan would import torch."""
    known = modules(root)
    graph = {name: set(imports(name, path, set(known))) for name, path in known.items()}
    faults = []
    for name in known:
        if unit(name) not in WITHOUT_TORCH:
            continue
        chains = [(name,)]
        seen = {name}
        while chains:
            chain = chains.pop()
            for target in graph[chain[-1]]:
                if any(target == library or target.startswith(f"{library}.") for library in BRINGS_TORCH):
                    faults.append(" -> ".join((*chain, target)))
                parts = target.split(".")  # importing a.b.c runs a and a.b too
                for module in (".".join(parts[: n + 1]) for n in range(len(parts))):
                    if module in graph and module not in seen:
                        seen.add(module)
                        chains.append((*chain, module))
    return faults


def test_imports_point_down() -> None:
    assert floor_faults(ROOT) == []


def test_planning_never_imports_torch() -> None:
    assert torch_faults(ROOT) == []


def test_planning_runs_without_torch() -> None:
    names = [name for name in modules(ROOT) if unit(name) in WITHOUT_TORCH]
    script = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"
        f"import importlib; [importlib.import_module(name) for name in {names!r}]"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(
    ("file", "source", "fault"),
    [
        ("plan.py", "import colledge.schedule", "plan imports colledge.schedule: not below"),
        ("plan.py", "from colledge import launch", "plan imports colledge.launch: not below"),
        ("profiles/device.py", "from ..planner import search", "colledge.planner.search: not below"),
        ("profiles/device.py", "from colledge.plan import Plan", "colledge.plan: not below"),
        ("schedule/lower.py", "def f():\n    import colledge.models", "colledge.models: not below"),
        ("report/html.py", "from colledge.measure import links", "colledge.measure: not below"),
        ("parallel/engine.py", "from colledge.planner import search", "not how it was found"),
        ("errors.py", "from colledge.units import parse", "errors imports colledge.units: not below"),
        ("tools/a.py", "", "tools.a: has no floor"),
        ("planner/utils.py", "", "planner.utils: no drawer"),
    ],
)
def test_a_bad_module_is_caught(tmp_path: Path, file: str, source: str, fault: str) -> None:
    root = small_package(tmp_path)
    assert floor_faults(root) == []
    write(root / file, source)
    assert any(fault in one for one in floor_faults(root))


@pytest.mark.parametrize(
    ("file", "source", "chain"),
    [
        ("planner/search.py", "import torch.nn", "colledge.planner.search -> torch.nn"),
        ("schedule/lower.py", "def f():\n    from safetensors.torch import load", "safetensors.torch"),
        ("schedule/lower.py", "from safetensors import torch", "safetensors.torch"),
        ("records.py", "import transformers", "colledge.plan -> colledge.records -> transformers"),
        ("profiles/__init__.py", "from torch import Tensor", "colledge.profiles -> torch"),
    ],
)
def test_torch_is_caught_through_any_chain(tmp_path: Path, file: str, source: str, chain: str) -> None:
    root = small_package(tmp_path)
    assert torch_faults(root) == []
    write(root / file, source)
    assert any(chain in one for one in torch_faults(root))


def small_package(folder: Path) -> Path:
    root = folder / "colledge"
    write(root / "plan.py", "from colledge.records import Record\nfrom colledge.profiles import device")
    write(root / "records.py", "from colledge import errors")
    write(root / "models" / "layered.py", "import torch")
    write(root / "parallel" / "engine.py", "from colledge.models.layered import Layered")
    for name in ("", "profiles", "planner", "schedule", "launch", "measure", "report", "models", "parallel"):
        write(root / name / "__init__.py", "")
    for name in ("errors", "units", "planner/search", "profiles/device"):
        write(root / f"{name}.py", "")
    return root


def write(path: Path, source: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


def test_a_device_loads_nothing_that_it_does_not_run() -> None:
    code = "import sys, colledge.launch.worker; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    unwanted = {
        "sympy",
        "pandas",
        "pyarrow",
        "matplotlib",
        "datasets",
        "rich",
    }  # each takes tens of megabytes
    assert not unwanted & set(loaded)
