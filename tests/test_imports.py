"""The architecture, read from the source: imports point one way, and the environment is read in one place."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "fastexperts"

# A module imports from the layers above its own line in this list, and from its own package; nothing else.
LAYERS = (
    {"errors", "dtypes"},
    {"settings", "library"},
    {"activations", "routing", "weights"},
    {"kernels"},
    {"checks", "cpu", "reference"},
    {"backend"},
    {"updates"},
    {"moe"},
    {"ops"},
    {"hf", "metrics"},
    {"train", "run"},
    {"cli"},
)
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}
# Kernels need triton, so these alone import them, inside functions.
USES_KERNELS = {"backend"}
# The oracle shares the plain types with what it judges, and no code that computes.
REFERENCE_MAY_USE = {"errors", "activations", "routing", "weights"}

ENVIRONMENT_VARIABLE = re.compile(r"FASTEXPERTS_[A-Z0-9_]+")


def sources(package):
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(package.rglob("*.py"))}


def unit_of(path, package):
    """The file's name in LAYERS: the top-level module, or the sub-package that it is in."""
    return path.relative_to(package).with_suffix("").parts[0]


def internal_imports(tree, path, package):
    """(unit, line, lazy) for each import of the package's own modules; unit "" is the package itself."""
    here = ("fastexperts", *path.relative_to(package).parent.parts)
    lazy_lines = {
        inner.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = here[: len(here) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            targets = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] == "fastexperts":
                unit = target[1] if len(target) > 1 and target[1] in RANK else ""
                yield unit, node.lineno, node.lineno in lazy_lines


def import_violations(package):
    found = []
    for path, tree in sources(package).items():
        unit = unit_of(path, package)
        if unit == "__init__":
            continue  # the public names, from anywhere
        where = path.relative_to(package)
        if unit not in RANK:
            found.append(f"{where}: not in LAYERS; give it its place there")
            continue
        for target, line, lazy in internal_imports(tree, path, package):
            if target == unit:
                continue
            if target == "":
                found.append(f"{where}:{line}: import from the module that defines it, not the package")
            elif target == "kernels" and unit not in USES_KERNELS:
                found.append(f"{where}:{line}: only {sorted(USES_KERNELS)} import kernels")
            elif target == "kernels" and not lazy:
                found.append(f"{where}:{line}: kernels are imported inside functions (they need triton)")
            elif target == "kernels":
                continue  # lazy, and only of the backend
            elif unit == "reference" and target not in REFERENCE_MAY_USE:
                found.append(f"{where}:{line}: the reference imports plain types only, not {target}")
            elif target in RANK and RANK[target] >= RANK[unit]:
                found.append(f"{where}:{line}: {unit} is not above {target}")
    return found


def environment_variables(package):
    """Names of FASTEXPERTS_* variables in the source's strings, wherever they stand."""
    return {
        name
        for tree in sources(package).values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for name in ENVIRONMENT_VARIABLE.findall(node.value)
    }


def environment_reads(package):
    """Places that look up a FASTEXPERTS_* variable outside settings.py; messages may name one."""
    return [
        f"{path.relative_to(package)}:{node.lineno}"
        for path, tree in sources(package).items()
        if path.name != "settings.py"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call | ast.Subscript | ast.Compare)
        and re.search(r"\b(environ|getenv)\b", ast.unparse(node))
        and "FASTEXPERTS_" in ast.unparse(node)
    ]


def test_imports_point_one_way():
    assert import_violations(PACKAGE) == []


def test_at_most_three_environment_variables_read_in_settings():
    names = environment_variables(PACKAGE)
    assert names, "settings.py has some: none found means looking in the wrong place"
    assert len(names) <= 3, sorted(names)
    assert environment_reads(PACKAGE) == []


@pytest.fixture
def package(tmp_path):
    """A well-formed miniature of the package, for a test to break."""
    files = {
        "__init__.py": "from fastexperts.ops import moe_mlp",
        "errors.py": "",
        "settings.py": "import os\nfrom fastexperts.errors import refuse\nos.environ.get('FASTEXPERTS_A')",
        "routing.py": "",
        "weights.py": "",
        "kernels/__init__.py": "",
        "kernels/routing.py": "import triton\nfrom fastexperts.routing import Routing\nfrom .tiles import T",
        "kernels/tiles.py": "",
        "backend.py": "from fastexperts import routing\ndef up():\n    import fastexperts.kernels.tiles",
        "reference.py": "from .weights import Weight",
        "moe.py": "from fastexperts.backend import up",
        "ops.py": "from fastexperts.moe import forward",
        "hf/__init__.py": "",
        "hf/experts.py": "from ..ops import moe_mlp",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_the_miniature_is_clean(package):
    assert import_violations(package) == []
    assert environment_variables(package) == {"FASTEXPERTS_A"}
    assert environment_reads(package) == []


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("backend.py", "from fastexperts.ops import moe_mlp", "backend is not above ops"),
        ("backend.py", "def f():\n    from . import moe", "backend is not above moe"),
        ("backend.py", "from fastexperts.kernels import routing", "inside functions"),
        ("moe.py", "def f():\n    from .kernels import routing", "only ['backend']"),
        ("moe.py", "import fastexperts", "not the package"),
        ("moe.py", "from fastexperts import register", "not the package"),
        ("weights.py", "from fastexperts.routing import Routing", "weights is not above routing"),
        ("hf/experts.py", "from ..metrics import flops", "hf is not above metrics"),
        ("kernels/routing.py", "from ..backend import up", "kernels is not above backend"),
        ("reference.py", "from fastexperts.backend import up", "plain types only, not backend"),
        ("helpers.py", "", "not in LAYERS"),
    ],
)
def test_a_wrong_import_is_found(package, name, text, complaint):
    (package / "metrics.py").write_text("")
    (package / name).write_text(text)
    violations = import_violations(package)
    assert len(violations) == 1, violations
    assert violations[0].startswith(name)
    assert complaint in violations[0]


@pytest.mark.parametrize(
    "read",
    ["os.environ['FASTEXPERTS_B']", "os.getenv('FASTEXPERTS_B', '0')", "'FASTEXPERTS_B' in environ"],
)
def test_an_environment_variable_read_elsewhere_is_found(package, read):
    (package / "moe.py").write_text(read)
    assert environment_variables(package) == {"FASTEXPERTS_A", "FASTEXPERTS_B"}
    assert environment_reads(package) == ["moe.py:1"]
