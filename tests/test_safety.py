"""Nothing in the project runs what it reads: no pickle, no eval, no shell, no code out of a model folder."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "socratiq").rglob("*.py")])
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "yaml"}
CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "torch.load", "torch.save", "torch.hub.load", "__import__"}


def name_of(node) -> str:
    """ "torch.load" for the expression torch.load."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def problems(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        imported = []
        if isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imported = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        found += [f"line {node.lineno}: import of {name}" for name in imported if name.split(".")[0] in MODULES | CALLS]
        found += [f"line {node.lineno}: import of {name}" for name in imported if name in CALLS]
        if isinstance(node, ast.Call):
            if name_of(node.func) in CALLS:
                found.append(f"line {node.lineno}: {name_of(node.func)}")
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                if keyword.arg in ("trust_remote_code", "allow_pickle", "shell") and value is not False:
                    found.append(f"line {node.lineno}: {keyword.arg}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_that_is_read_is_run(path):
    assert problems(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from torch import load", "x = eval(text)", "torch.load(path)", "f(trust_remote_code=True)",
     "numpy.load(path, allow_pickle=True)", "subprocess.run(text, shell=wanted)"],
)  # fmt: skip
def test_the_test_sees_what_it_looks_for(source):
    assert len(problems(source)) == 1


def test_models_are_opened_without_their_code():
    source = (ROOT / "socratiq" / "models.py").read_text()
    assert source.count("trust_remote_code") >= 2 and "use_safetensors" in source
