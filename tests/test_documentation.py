"""What the documents show is real: commands parse, options exist, linked files and named tests are there."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CLI_OF_COMMAND = {"patch-aligned": "patch_aligned.cli", "llava-convert": "llava.convert.cli"}
OF_THIS_REPOSITORY = ("llava", "patch_aligned", "playground", "eval")
BLOCK = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


def bash_blocks() -> Iterator[tuple[str, str]]:
    for document in DOCUMENTS:
        for number, block in enumerate(BLOCK.findall(document.read_text(encoding="utf-8"))):
            yield f"{document.name}-{number}", block


def commands() -> Iterator[list[str]]:
    """Words of each command of the documents, without comments and without the variables before them."""
    for _, block in bash_blocks():
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split("&&"):
                words = shlex.split(command, comments=True)
                while words and re.match(r"[A-Z_0-9]+=", words[0]):
                    del words[0]
                if words:
                    yield words


BLOCKS = dict(bash_blocks())
COMMANDS = list(commands())


@pytest.mark.parametrize("name", BLOCKS)
def test_command_blocks_are_valid_shell(name: str) -> None:
    result = subprocess.run(["bash", "-n"], input=BLOCKS[name], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_scripts_that_documents_run_are_there() -> None:
    scripts = [words[1] for words in COMMANDS if words[0] == "bash"]
    assert "scripts/quickstart.sh" in scripts
    assert "scripts/test.sh" in scripts
    assert not [script for script in scripts if not (ROOT / script).is_file()]


def test_options_that_documents_show_are_in_the_help(
    run_python: Callable[..., subprocess.CompletedProcess[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[tuple[str, ...], set[str]] = {}
    for words in COMMANDS:
        if words[0] in CLI_OF_COMMAND:
            program: tuple[str, ...] = ("-m", CLI_OF_COMMAND[words[0]], words[1])
        elif words[:2] == ["python", "-m"] and words[2].split(".")[0] in OF_THIS_REPOSITORY:
            program = ("-m", words[2])
        else:
            continue
        shown.setdefault(program, set()).update(word for word in words if word.startswith("--"))
    assert ("-m", "patch_aligned.cli", "analyze") in shown
    assert ("-m", "llava.serve.cli") in shown
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend(ROOT)  # `eval` and `playground` are not installed
    for program, options in shown.items():
        result = run_python(*program, "--help")
        assert result.returncode == 0, result.stderr
        assert not [option for option in options if option not in result.stdout], program


def test_python_that_the_documents_show_compiles_and_imports() -> None:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    assert node.module is not None
                    module = importlib.import_module(node.module)
                    assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_linked_files_are_there(document: Path) -> None:
    shown = re.sub(r"<!--.*?-->", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", shown)
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (document.parent / link).exists()]


@pytest.mark.parametrize("name", ["differences.md", "reliability.md"])
def test_tests_that_a_document_names_exist(name: str) -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "docs" / name).read_text(encoding="utf-8")))
    assert named
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    assert not named - set(re.findall(r"^ *def (test_\w+)\(", sources, re.MULTILINE))


def test_launch_recipe_that_the_guide_quotes_is_the_scripts() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
    script = (ROOT / "scripts" / "v1_5" / "pretrain_patchaligned.sh").read_text(encoding="utf-8")
    quoted = re.search(r"^```\n(launch .*?)^```", guide, re.MULTILINE | re.DOTALL)
    assert quoted is not None
    for line in quoted.group(1).splitlines():
        assert line.strip() == "..." or line in script


def messages_of_the_code() -> list[str]:
    """Every string of the packages and scripts, with `…` where a value is put in."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        return str(node.value) if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"

    files = [path for package in ("llava", "patch_aligned", "scripts") for path in (ROOT / package).rglob("*.py")]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    strings = [text(node) for node in nodes if isinstance(node, ast.JoinedStr | ast.Constant)]
    shell = [
        re.sub(r"\$\([^)]*\)|\$\w+|\$\{[^}]*\}", "…", path.read_text()) for path in (ROOT / "scripts").rglob("*.sh")
    ]
    return [re.sub(r"%\w|\{\w*\}", "…", string) for string in strings] + shell


def test_messages_that_troubleshooting_quotes_are_in_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE) + re.findall(r"`([^`]*…[^`]*)`", page)
    assert len(quoted) > 30
    code = messages_of_the_code()
    for message in quoted:
        pattern = re.compile(
            ".*".join(map(re.escape, filter(None, (part.strip() for part in message.split("…"))))), re.DOTALL
        )
        assert any(pattern.search(text) for text in code), message


def test_reference_lists_every_command_flag_and_variable() -> None:
    from scripts.docs_reference import filled

    page = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8")
    scripts = [*(ROOT / "scripts" / "v1_5").glob("*.sh"), ROOT / "scripts" / "v1_5" / "eval" / "common.sh"]
    assert not [script for script in scripts if f"script {script.relative_to(ROOT)} -->" not in page]
    parsers = [path for package in ("llava", "eval") for path in (ROOT / package).rglob("*.py")
               if "\ndef argument_parser(" in path.read_text(encoding="utf-8")]  # fmt: skip
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in parsers]
    assert not [module for module in modules if f"argparse {module} -->" not in page]
    shown = filled(page)
    assert "| `--patch_beta_end` | Weight of the patch loss at the last step;" in shown
    assert "| `--threshold-rule <mid_range\\|otsu\\|mean_std\\|top_area>` | Which tokens" in shown
    assert "| `MODEL_MAX_LENGTH` | `2048` |" in shown
    assert "| `GLOBAL_BATCH_SIZE` | `8` or `4` |" in shown
    assert "### `patch-aligned models fetch`" in shown


def test_python_names_that_documents_import_are_in_the_reference() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)", page, re.MULTILINE)}
    imported = set()
    for document in DOCUMENTS:
        for block in re.findall(
            r"^```python\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        ):
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("llava", "patch_aligned"):
                    imported |= {alias.name for alias in node.names}
    assert len(imported) > 15
    assert not imported - listed


def test_five_pictures_of_the_page_become_a_file_that_training_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from patch_aligned.dataset.verify import VerifySettings, verify_file
    from playground.mini import make_scenes

    page = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    [scenes] = re.findall(r"^python -m playground.mini.make_scenes (.*)$", page, re.MULTILINE)
    make_scenes.main(shlex.split(scenes))
    [block] = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(block, {})
    folder = tmp_path / "playground" / "data" / "my"
    found = verify_file(folder / "mine.jsonl", VerifySettings(folder))
    assert (found.records, found.regions, found.errors) == (5, 10, 0)
