"""The rules that keep the folders apart, read from the source itself; they hold without importing anything heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPTIONAL = {"stardist", "instanseg", "celltypist", "openslide"}
"""Imported where the user has installed them; refused in one sentence elsewhere."""
OWN = ("ge2hist_core", "perturb", "pages", "app", "tests", "benchmarks")
HEAVY = {"torch", "diffusers", "scanpy", "anndata", "spatialdata", "h5py", "sklearn", "skimage"}


def sources(*folders: str) -> list[Path]:
    """Python files of folders and single files."""
    found = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return found + [ROOT / folder for folder in folders if (ROOT / folder).is_file()]


def imports(path: Path) -> Iterator[str]:
    """Dotted names of every module that a file imports anywhere, those for type checkers alone left out."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    typing_only = {
        id(child)
        for node in nodes
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for child in ast.walk(statement)
    }
    for node in nodes:
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def offenders(folder: str, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(folder)
        for name in imports(path)
        if any(name == f or name.startswith(f + ".") for f in forbidden)
    ]


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("ge2hist_core", {"streamlit", "perturb", "pages", "app"}),
        ("perturb", {"streamlit", "pages", "app"}),
        ("pages", HEAVY),
        ("app.py", HEAVY),
        # Judges are blind: they see pixels and tables, never the model that drew them.
        ("ge2hist_core/nuclei.py", {"ge2hist_core.model", "ge2hist_core.denoiser", "ge2hist_core.simulator"}),
        ("ge2hist_core/niche.py", {"ge2hist_core.model", "ge2hist_core.simulator", "torch"}),
        ("ge2hist_core/metrics.py", {"ge2hist_core.model", "torch"}),
        ("ge2hist_core/image_features.py", {"ge2hist_core.model", "ge2hist_core.simulator"}),
        ("ge2hist_core/data.py", {"ge2hist_core.model", "ge2hist_core.simulator", "torch"}),
        ("ge2hist_core/store.py", {"ge2hist_core.model", "ge2hist_core.simulator"}),
        ("ge2hist_core/simulator", {"ge2hist_core.model", "ge2hist_core.nuclei", "ge2hist_core.niche"}),
        # Tables in, figures out.
        ("perturb/charts.py", HEAVY | {"ge2hist_core.model"}),
    ],
)
def test_imports_run_one_way(folder, forbidden):
    assert offenders(folder, forbidden) == []


def test_the_import_reader_sees_imports_inside_functions(tmp_path):
    """A rule that cannot fail protects nothing."""
    path = tmp_path / "x.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
        "def f():\n    import a.b\n    from c import d\n"
    )
    assert list(imports(path)) == ["typing.TYPE_CHECKING", "a.b", "c.d"]


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import ge2hist_core, perturb", {"streamlit", "torch", "scanpy", "anndata"}),
        ("import perturb.recipe, perturb.edits", {"streamlit", "torch", "scanpy", "anndata", "diffusers"}),
        ("import perturb.run, perturb.report, perturb.charts, ge2hist_core.model", {"streamlit"}),
        ("import ge2hist_core.data", {"torch", "streamlit", "scanpy"}),
    ],
)
def test_what_an_import_leaves_out(statement, absent):
    """In a fresh process: pages start fast, and the engine runs without the app."""
    code = f"{statement}\nimport sys\nprint(sorted(set(sys.modules) & {absent!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_page_leaves_a_string_or_value_standing_alone():
    """Streamlit would show it to the reader; the module's docstring alone is exempt."""
    found = []
    for path in (ROOT / "pages").glob("[!_]*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body[1:]:
            if isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call):
                found.append(f"{path.name}:{node.lineno}")
    assert found == []


def test_loading_never_runs_code():
    """No pickle, eval or exec; torch.load only of plain tensors; numpy without objects."""
    found = []
    for path in sources("ge2hist_core", "perturb", "pages", "app.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if (
                name in ("eval", "exec", "pickle.load", "pickle.loads", "joblib.load")
                or (name == "torch.load" and keywords.get("weights_only") != "True")
                or keywords.get("allow_pickle", "False") != "False"
                or name.endswith("read_pickle")
            ):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {name}")
    assert found == []


def test_noise_has_one_source():
    """Nothing draws from a global generator or from a clock: what is not in the Recipe cannot change a result."""
    pattern = re.compile(r"np\.random\.(?!Generator|Philox|SeedSequence)\w+|\brandom\.(random|seed|choice|shuffle)\(")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in sources("ge2hist_core", "perturb")
        for match in pattern.finditer(path.read_text(encoding="utf-8"))
        if path.name != "rng.py"
    ]
    assert found == []


def requirements(name: str) -> dict[str, str]:
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines()]
    pinned = [line for line in lines if line and not line.startswith("-r")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", line) for line in pinned), pinned
    return {line.split("==")[0].lower(): line for line in pinned}


def test_requirements_are_what_is_imported():
    """Every package that the app imports is pinned, and nothing is pinned that is not imported."""
    known = packages_distributions()
    names = {
        name.partition(".")[0]
        for path in sources("ge2hist_core", "perturb", "pages", "app.py")
        for name in imports(path)
    }
    third_party = names - set(sys.stdlib_module_names) - set(OWN) - OPTIONAL
    used = {dist.lower() for name in third_party for dist in known[name]}
    pinned = set(requirements("requirements.txt"))
    assert used - pinned == set()
    assert pinned - used == set()


def test_ci_runs_the_command_that_the_readme_gives():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "pip install -r requirements-dev.txt && pytest\n" in readme
    assert re.search(r"pip install (--quiet )?-r requirements-dev\.txt && pytest", ci)
    assert "scgpt" not in requirements("requirements.txt")
