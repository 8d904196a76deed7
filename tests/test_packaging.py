"""The house: the wheel holds pvae alone, names are where they are promised, imports point down."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

import pvae

ROOT = Path(__file__).parents[1]
FLOORS = [
    {
        "allocation",
        "broadcasts",
        "contexts",
        "errors",
        "inversion",
        "launchers",
        "nonfinite",
        "published",
        "rewrites",
        "seeds",
    },
    {
        "distributed",
        "log_weights",
        "checkpoints",
        "foreign",
        "interrupts",
        "locks",
        "progress",
        "staging",
        "precision",
    },
    {
        "audio",
        "networks",
        "distributions",
        "families",
        "spaces",
        "likelihoods",
        "count_distributions",
        "tables",
        "priors",
        "codebooks",
        "flows",
        "mixtures",
        "relaxations",
        "von_mises_fisher",
        "mean_field",
        "markov",
        "recurrent",
        "sentences",
        "logistic_mixture",
        "autoregressive",
        "convolutions",
    },
    {"image_features", "sample_quality"},
    {"encoders", "heads", "particles"},
    {"guide_source", "placement"},
    {"structure"},
    {"factors", "head_choice"},
    {"assembly", "explanation"},
    {"guides", "models"},
    {"bounds", "schedules", "penalties"},
    {"gradients", "kl_terms"},
    {"objectives", "data", "parts"},
    {"recipes"},
    {"evidence", "baselines"},
    {"imputation", "latents"},
    {"latent_paths", "latent_density", "out_of_distribution", "disentanglement"},
    {"engine"},
    {"alternation", "resumption", "rollback", "trackers"},
    {"loop"},
    {"adversarial", "training"},
    {"games"},
    {"catalogue"},
    {
        "doctor",
        "runs",
        "sequences",
        "comparison",
        "plots",
        "arviz",
        "board",
        "workers",
        "search_spaces",
    },
    {"galleries", "segments", "sweeps"},
    {"watching"},
    {"cells"},
    {"standings"},
    {"roster"},
    {"commands"},
    {"cli", "__main__"},
]


def test_public_names_are_sorted_and_importable():
    assert sorted(pvae.__all__) == list(pvae.__all__)
    for name in pvae.__all__:
        assert getattr(pvae, name) is not None, name


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name
)
def test_what_a_page_calls_needs_no_import_but_that_of_pvae(page):
    called = set(re.findall(r"\bpvae\.(\w+)(?:\.\w+)*\(", page.read_text()))
    assert called <= set(pvae.__all__)


def test_unknown_public_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        pvae.nonsense  # noqa: B018


@pytest.mark.parametrize("path", sorted((ROOT / "pvae").rglob("*.py")), ids=lambda p: p.name)
def test_every_module_lists_its_public_names(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "a module says what is in it"
    names = {
        target.id
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert "__all__" in names or path.name == "__main__.py" or path.parent.is_symlink()


def _modules():
    for folder in ("pvae", "models", "guides"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.is_symlink() or "models" in path.parts[len(ROOT.parts) + 1 :]:
                continue
            if "guides" in path.parts[len(ROOT.parts) + 1 :]:
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            yield path, parts[0] if folder != "pvae" else parts[1]


def _floor(name: str) -> int | None:
    return next((i for i, floor in enumerate(FLOORS) if name in floor), None)


def _imported(tree: ast.AST):
    """Names of pvae's modules imported at module level or inside functions, but not for types."""
    skip = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "pvae":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pvae."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("pvae."))


def test_imports_point_downward():
    seen = 0
    for path, name in _modules():
        if name == "__init__":
            continue
        floor = _floor(name)
        assert floor is not None, f"{path.name}: give it a floor in this test"
        for other in _imported(ast.parse(path.read_text())):
            target = _floor(other)
            if target is None or other == name:
                continue
            seen += 1
            assert target <= floor, f"{path.relative_to(ROOT)} imports upward: {other}"
    assert seen > 30


@pytest.mark.parametrize(
    "package", sorted(p.parent for p in ROOT.glob("pvae/*/__init__.py")), ids=lambda p: p.name
)
def test_modules_of_a_package_import_one_way(package):
    graph = {}
    for path in package.glob("*.py"):
        imports = ast.walk(ast.parse(path.read_text()))
        graph[path.stem] = {
            node.module.split(".")[2]
            for node in imports
            if isinstance(node, ast.ImportFrom)
            and (node.module or "").startswith(f"pvae.{package.name}.")
        }
    assert list(graphlib.TopologicalSorter(graph).static_order())


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def test_no_module_takes_what_is_private_to_another():
    for path, _ in _modules():
        tree = ast.parse(path.read_text())
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)]
        ours = [n for n in imports if (n.module or "").split(".")[0] == "pvae"]
        private = [a.name for n in ours for a in n.names if _is_private(a.name)]
        assert not private, f"{path.relative_to(ROOT)} imports {private}"
        modules = {a.asname or a.name for n in ours for a in n.names if _floor(a.name) is not None}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert not (node.value.id in modules and _is_private(node.attr)), (
                    f"{path.relative_to(ROOT)} reaches for {node.value.id}.{node.attr}"
                )


def test_wheel_holds_pvae_alone(tmp_path):
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        tmp_path,
        ROOT,
    ]
    aside = tmp_path / "aside.cfg"  # what an earlier build left in the tree is not taken along
    aside.write_text(f"[build]\nbuild_base = {tmp_path / 'build'}\n")
    environment = {**os.environ, "DIST_EXTRA_CONFIG": str(aside)}
    subprocess.run([str(c) for c in command], check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("pvae_toolkit-")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"pvae", "pvae_toolkit"}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "pvae").rglob("*.py")}
    modules |= {
        f"pvae/{p.relative_to(ROOT)}" for f in ("models", "guides") for p in ROOT.glob(f"{f}/*.py")
    }
    assert "pvae/models/vae.py" in modules
    assert {name for name in names if name.endswith(".py")} == modules
    assert "pvae/py.typed" in names


def test_models_cannot_be_imported_twice():
    code = "import sys; sys.path.insert(0, '.'); import models"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    assert "import pvae.models, not models" in result.stderr


def test_help_is_quick_and_imports_no_torch():
    """Under half a second on an idle machine; what is asserted is the cause, not the clock."""
    code = (
        "import sys; from pvae.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'pyro', 'arviz', 'matplotlib', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    started = time.perf_counter()
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "train" in result.stdout
    assert time.perf_counter() - started < 20
