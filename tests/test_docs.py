"""README and docs: every link leads somewhere, every command is understood by its script, every name is in the code."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "bench" / "RESULTS.md"])
PATTERNS = ("*.py", "socratiq/**/*.py", "bench/*.py", "tests/*.py")
SCRIPTS = [path for pattern in PATTERNS for path in ROOT.glob(pattern)]
CODE = "\n".join(path.read_text() for path in SCRIPTS if path != Path(__file__))
WORDS = {*re.findall(r"\w+", CODE), *(path.stem for path in SCRIPTS), *(path.parent.name for path in SCRIPTS)}
BLOCK = re.compile(r"^```\w*\n(.*?)^```|((?:^    .*\n)+)", re.MULTILINE | re.DOTALL)  # fenced, or indented
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)


class Found(BaseException):
    """Carries a parser out of the script that made it."""


def parser_of(module_name: str) -> argparse.ArgumentParser:
    """The parser that the command line of a module is read by."""

    def parse_args(self, *_, **__):
        raise Found(self)

    module = importlib.import_module(module_name)
    read = next(getattr(module, name) for name in ("parse_arguments", "run", "write") if hasattr(module, name))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Found) as found:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        read()
    return found.value.args[0]


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(script or module, arguments) of every command on a page, in code blocks and in backticks."""
    text = page.read_text()
    blocks = "\n".join(a or b for a, b in BLOCK.findall(text)).replace("\\\n", " ").splitlines()
    spans = re.findall(r"`(.+?)`", BLOCK.sub("", text))
    lines = [line for line in [*blocks, *spans] if re.match(r"\s*(\w+=\S+ )*(\S*python|torchrun) ", line)]
    found = []
    for piece in re.split(r" && | \| |\n", "\n".join(lines)):
        words = shlex.split(piece, comments=True)
        script = next((word for word in words if re.search(r"\.py$|^socratiq\.", word)), None)
        found += [(script, words[words.index(script) + 1 :])] if script else []
    return found


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@every_page
def test_links(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text())):
        if not target.startswith("http"):
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


def test_map_of_files():
    """The README names every script and every module or folder of the package."""
    listed = set(re.findall(r"[\w.]+", (ROOT / "README.md").read_text().partition("## Map of files")[2]))
    parts = [path for path in [*ROOT.glob("*.py"), *ROOT.glob("socratiq/*")] if not path.name.startswith("__")]
    assert listed.issuperset(path.name for path in parts)


@every_page
def test_commands(page):
    for script, arguments in commands(page):
        if script.startswith(("bench/", "tests/")):  # some import torch
            source = (ROOT / script).read_text()
            options = [option for option in arguments if re.fullmatch("--[a-z][a-z0-9-]+", option)]
            assert all(f'"{option}"' in source for option in options), (script, arguments)
            continue
        package = script.startswith("socratiq") and (ROOT / script.replace(".", "/")).is_dir()
        parser = parser_of(f"{script}.__main__" if package else script.removesuffix(".py"))
        parser.parse_args(arguments)  # what is wrong stands in the captured stderr


def test_quick_commands_and_code_run(tmp_path, scripts, monkeypatch, capsys):
    """The command that tries a trainer, PPO with the reward that a page shows, its log read as a page reads it."""
    quick = next(arguments for _, arguments in commands(ROOT / "docs" / "sft.md") if "tiny" in arguments)
    assert " ".join(quick) in (ROOT / "README.md").read_text()
    status, _, complained = scripts.run(["train_sft.py", *quick], cwd=tmp_path)
    assert (status, complained) == (0, "")
    reward, read = (code_of(ROOT / "docs" / page) for page in ("scorer.md", "metrics.md"))
    (tmp_path / "my_reward.py").write_text(reward)
    small = ["--steps", "1", "--batch-size", "2", "--ppo-epochs", "1", "--max-new-tokens", "4", "--eval-prompts", "2"]
    status, said, _ = scripts.run(
        ["train_ppo.py", "--model", "runs/tiny", "--reward", "my_reward:reward", *small], cwd=tmp_path
    )
    assert status == 0 and "held-out score" in said
    monkeypatch.chdir(tmp_path)
    exec(read, {})
    assert "objective/kl" in capsys.readouterr().out


def code_of(page: Path) -> str:
    """The Python code that a page shows."""
    return re.search(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)[1]


@pytest.mark.parametrize("page", [page for page in PAGES if "questions" not in page.name], ids=lambda path: path.name)
def test_names(page):  # not on the pages of what models wrote
    for span in re.findall(r"`([^`\n]+)`", BLOCK.sub("", page.read_text())):
        path, _, name = span.partition("::")
        if path.endswith(".py") and " " not in path and path != "my_reward.py":
            files = [file for file in SCRIPTS if file.as_posix().endswith(f"/{path}")]
            assert files, span
            assert not name or f" {name.split('::')[-1]}(" in files[0].read_text(), span
        elif re.fullmatch(r"[A-Za-z_][\w.]*(\(.*\))?", span) and not re.search(r"\.(\w?html|\w?jsonl?|md|csv)$", span):
            assert WORDS.issuperset(span.partition("(")[0].split(".")), span
        for option in re.findall(r"(?<!\S)--[a-z][a-z0-9-]+", span):
            assert f'"{option}"' in CODE, span


def test_commands_are_found():
    """The pages have commands, and a wrong one is noticed."""
    found = {script for page in PAGES for script, _ in commands(page)}
    assert {"train_sft.py", "socratiq.evaluate", "bench/compare.py"} <= found
    with pytest.raises(SystemExit):
        parser_of("train_ppo").parse_args(["--kl-targt", "1"])
