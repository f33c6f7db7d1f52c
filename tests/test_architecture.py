"""The rules of the house: who may import whom, what must import without extras, how large a folder may be."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("llava", "patch_aligned", "eval")
OUTSIDE = ("scripts", "playground", "benchmarks", "tests")

CORE = tuple(
    f"patch_aligned.{name}"
    for name in (
        "cells",
        "masks",
        "labels",
        "loss",
        "files",
        "images",
        "intervals",
        "record_files",
        "pad",
        "annotated_sets",
    )
)
PAGES = ("patch_aligned.tables", "patch_aligned.web")
GROUND = tuple(f"llava.{name}" for name in ("constants", "checkpoint_files", "command", "conversation", "plugin",
                                             "mm_utils", "stopping_criteria", "utils"))  # fmt: skip
# Module or package -> what it may import of the packages. The longest matching name decides.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "llava": ("llava",),
    "llava.constants": (),
    "llava.checkpoint_files": (),
    "llava.command": (),
    "llava.stopping_criteria": (),
    "llava.conversation": ("llava.constants", "llava.mm_utils"),
    "llava.plugin": ("llava.constants",),
    "llava.mm_utils": GROUND,
    "llava.utils": GROUND,
    "llava.model": (*GROUND, "llava.model"),
    "llava.data": (*GROUND, "llava.data"),
    "llava.train": (*GROUND, "llava.model", "llava.data", "llava.train"),
    "llava.convert": (*GROUND, "llava.model", "llava.convert"),
    "llava.eval": (*GROUND, "llava.model.builder", "llava.model.multimodal_merge", "llava.eval"),
    "llava.serve": (*GROUND, "llava.model.builder", "llava.eval", "llava.serve"),
    "patch_aligned": CORE,
    "patch_aligned.cli": ("patch_aligned",),
    "patch_aligned.loss": (),
    "patch_aligned.tables": ("patch_aligned.web",),
    "patch_aligned.train_mem": ("patch_aligned.train", "llava"),
    "patch_aligned.train": (*CORE, "patch_aligned.train"),
    **dict.fromkeys(
        (f"patch_aligned.train.{name}" for name in ("cli", "regions", "train", "trainer")),
        (*CORE, "patch_aligned.train", "patch_aligned.models"),
    ),
    "patch_aligned.train.watch": (*CORE, *PAGES, "patch_aligned.train", "patch_aligned.analysis"),
    "patch_aligned.train.plugin": (*CORE, "patch_aligned.train", "patch_aligned.models", "llava"),
    "patch_aligned.models": (*CORE, "patch_aligned.models", "llava.checkpoint_files"),
    "patch_aligned.models.llava": (*CORE, "patch_aligned.models", "llava"),
    "patch_aligned.analysis": (*CORE, *PAGES, "patch_aligned.models", "patch_aligned.analysis"),
    "patch_aligned.analysis.entropy": (),
    "patch_aligned.analysis.alignment": (),
    "patch_aligned.analysis.matching_pursuit": (),
    "patch_aligned.annotate": (*CORE, "patch_aligned.annotate"),
    "patch_aligned.dataset": (*CORE, *PAGES, "patch_aligned.dataset"),
    # Names are compared by word embeddings.
    "patch_aligned.dataset.quality": (*CORE, *PAGES, "patch_aligned.dataset", "patch_aligned.models.llava"),
    "patch_aligned.explore": (*CORE, *PAGES, "patch_aligned.analysis", "patch_aligned.models", "patch_aligned.explore"),
    "patch_aligned.results": (*PAGES, "patch_aligned.files", "patch_aligned.intervals", "patch_aligned.results"),
    "eval": ("eval", *CORE, *PAGES, "patch_aligned.results", "llava"),
}
# What the rules above do not allow yet. A line goes when the import has gone.
EXCEPTIONS: dict[str, tuple[str, ...]] = {
    "patch_aligned.analysis.cli": ("llava.command",),
    "patch_aligned.analysis.localisation": ("llava.mm_utils",),
    "patch_aligned.analysis.regions": ("llava.mm_utils",),
    "patch_aligned.analysis.words": ("llava.mm_utils",),
    "patch_aligned.annotate.cli": ("llava.command",),
    "patch_aligned.cli": ("llava.command",),
    "patch_aligned.dataset.cli": ("llava.command",),
    "patch_aligned.explore.cli": ("llava.command",),
    "patch_aligned.results.cli": ("llava.command",),
    "patch_aligned.train.cli": ("llava.checkpoint_files", "llava.command"),
    "patch_aligned.train.train": ("llava.command", "llava.train.screen"),
}
# Modules that are formulas on tensors: torch and the standard library, nothing else.
TORCH_ONLY = ("patch_aligned.loss", "patch_aligned.analysis.entropy", "patch_aligned.analysis.alignment",
              "patch_aligned.analysis.matching_pursuit")  # fmt: skip
# Lines of *.py that a folder may hold.
BUDGETS = {
    "llava": 10589,
    "patch_aligned": 17412,
    "patch_aligned/analysis": 3648,
    "patch_aligned/annotate": 3718,
    "patch_aligned/dataset": 1548,
    "patch_aligned/results": 1249,
    "eval": 3232,
}
LONGEST_FILE = 500
# Distributions that come with an extra. No module needs them to be imported.
OPTIONAL = ("deepspeed", "peft", "bitsandbytes", "tensorboard", "wandb", "flash_attn", "lmms_eval",
            "pycocoevalcap", "ray", "trl", "torchvision", "skimage", "matplotlib", "spellchecker", "nltk", "gguf",
            "onnx", "starlette", "uvicorn", "spacy")  # fmt: skip


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def within(name: str, allowed: str) -> bool:
    return name == allowed or name.startswith(f"{allowed}.")


class ImportCollector(ast.NodeVisitor):
    """Names that a module imports when it runs, wherever the statement stands, but for those for type checkers."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.names: list[tuple[int, str]] = []

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            for statement in node.orelse:
                self.visit(statement)
        else:
            self.generic_visit(node)

    def visit_Import(self, node: ast.Import) -> None:
        self.names += [(node.lineno, alias.name) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        assert node.level == 0, f"{self.module}:{node.lineno}: imports are absolute here"
        assert node.module is not None
        for alias in node.names:
            submodule = f"{node.module}.{alias.name}"
            self.names.append((node.lineno, submodule if submodule in MODULES else node.module))


def imports_of(module: str) -> list[tuple[int, str]]:
    collector = ImportCollector(module)
    collector.visit(ast.parse(MODULES[module].read_text(encoding="utf-8")))
    return collector.names


def rule_of(module: str) -> tuple[str, ...]:
    return MAY_IMPORT[max((name for name in MAY_IMPORT if within(module, name)), key=len)]


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_what_its_place_allows(module: str) -> None:
    allowed = rule_of(module)
    for line, name in imports_of(module):
        where = f"{MODULES[module].relative_to(ROOT)}:{line} imports {name}"
        if name in EXCEPTIONS.get(module, ()):
            continue
        assert name.split(".")[0] not in OUTSIDE, f"{where}, which is no part of the packages"
        if name.split(".")[0] in PACKAGES:
            assert any(within(name, other) for other in allowed), f"{where}; allowed are {', '.join(allowed) or 'none'}"
            assert not name.endswith(".cli") or module == "patch_aligned.cli", f"{where}; only patch_aligned.cli may"
        elif module in TORCH_ONLY:
            top = name.split(".")[0]
            assert top == "torch" or top in sys.stdlib_module_names, f"{where}; it is a formula on torch tensors alone"


@pytest.mark.parametrize("module", EXCEPTIONS)
def test_every_exception_is_still_one(module: str) -> None:
    imported = {name for _, name in imports_of(module)}
    assert set(EXCEPTIONS[module]) <= imported
    assert not [name for name in EXCEPTIONS[module] if any(within(name, other) for other in rule_of(module))]


def test_no_circle_of_imports() -> None:
    # What is left after modules without open imports are taken away, again and again, lies on a circle or above one.
    open_imports = {
        module: {name for _, name in imports_of(module) if name in MODULES} - {module} for module in MODULES
    }
    while ready := {module for module, imports in open_imports.items() if not imports}:
        open_imports = {module: imports - ready for module, imports in open_imports.items() if module not in ready}
    assert not open_imports


def test_llava_knows_nothing_of_patch_aligned() -> None:
    for module, path in MODULES.items():
        if within(module, "llava"):
            assert not re.search(r"\bimport patch_aligned|from patch_aligned", path.read_text(encoding="utf-8")), module


IMPORT_WITHOUT_EXTRAS = """
import importlib, sys

BLOCKED = set(sys.argv[1].split(","))


class Without:
    '''A finder that does not see the blocked distributions, as if they were not installed.'''

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for module in sys.argv[2].split(","):
    importlib.import_module(module)
"""


def test_every_module_imports_without_the_extras() -> None:
    beside = [module_name(path) for path in sorted((ROOT / "playground").rglob("*.py"))]
    modules = [name for name in (*MODULES, *beside) if not name.endswith("__main__")]
    command = [sys.executable, "-c", IMPORT_WITHOUT_EXTRAS, ",".join(OPTIONAL), ",".join(modules)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def canonical(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


def declared_packages() -> set[str]:
    requirements = re.findall(r'"([\w.-]+)[<>=]', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return {canonical(name) for name in requirements} - {"setuptools"}


def test_constraints_name_every_package_that_is_declared() -> None:
    tested = re.findall(r"^([\w-]+)[<=]=", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert declared_packages() - {canonical(name) for name in tested} == {"flash-attn"}  # it is built on a GPU machine


def test_packages_that_modules_import_are_declared() -> None:
    # nltk is an alternative to a declared package, spaCy serves one option; their errors say how to install them.
    declared = declared_packages() | {"nltk", "spacy"}
    distributions = importlib.metadata.packages_distributions()
    undeclared = {
        f"{module} imports {package}"
        for module in MODULES
        if not within(module, "eval")  # its own extras bring what their packages bring
        for package in {name.split(".")[0] for _, name in imports_of(module)}
        if package not in sys.stdlib_module_names and package not in PACKAGES
        if declared.isdisjoint(map(canonical, distributions.get(package, [package])))
    }
    assert not undeclared


# What a command imports before its arguments are read, so that a wrong one is refused at once.
LIGHT = (
    "llava", "llava.constants", "llava.conversation", "llava.mm_utils", "llava.train.flags", "llava.serve.cli",
    "llava.convert.cli", "patch_aligned.cli", "eval.run", "eval.prefetch", "eval.captions.run", "eval.captions.score",
    *(f"llava.eval.{name}" for name in ("run_llava", "model_vqa", "model_vqa_loader", "model_vqa_mmbench",
                                        "model_vqa_science", "eval_pope", "eval_textvqa", "eval_science_qa")),
)  # fmt: skip


def test_commands_read_their_arguments_before_they_import_torch() -> None:
    code = f"import sys, {', '.join(LIGHT)}; sys.exit(' '.join({{'torch', 'transformers'}} & set(sys.modules)) or 0)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("package", ["llava", "patch_aligned"])
def test_packages_offer_functions_and_cost_nothing(package: str) -> None:
    code = (
        f"import sys, time; began = time.process_time(); import {package}; spent = time.process_time() - began\n"
        f"print(spent, *{{'torch', 'transformers', 'numpy', 'PIL'}} & set(sys.modules))\n"
        f"assert all(callable(getattr({package}, name)) for name in {package}.__all__)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    seconds, *modules = result.stdout.split()
    assert not modules
    assert float(seconds) < 0.3


def test_places_of_tokens_need_numpy_alone() -> None:
    modules = ", ".join(f"patch_aligned.{name}" for name in ("cells", "masks", "intervals"))
    code = f"import sys, {modules}; print(*{{'torch', 'transformers', 'llava', 'PIL'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not result.stdout.strip()


TEXT_SUFFIXES = (".py", ".sh", ".md", ".toml", ".json", ".txt", "")


def own_text_files() -> Iterator[Path]:
    """Files that people write: what git tracks or would track, without recorded outputs."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in listed:
        path = ROOT / name
        if path.is_file() and "goldens" not in path.parts and path.suffix in TEXT_SUFFIXES:
            yield path


def lines_of(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("folder", BUDGETS)
def test_folder_keeps_its_budget(folder: str) -> None:
    assert sum(lines_of(path) for path in (ROOT / folder).rglob("*.py")) <= BUDGETS[folder]


def test_files_are_as_long_as_their_topic() -> None:
    sources = [path for path in own_text_files() if path.suffix in (".py", ".sh")]
    lengths = {path.relative_to(ROOT).as_posix(): lines_of(path) for path in sources}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FILE}


def test_no_file_names_a_place_of_one_machine() -> None:
    # A home folder, or a scratch folder under an absolute path. Written so that this line is no example of itself.
    place = re.compile(r"(?<![\w.~$}/-])/(?:home|root|Users|work|workspace|mnt|tmp)/[\w.-]+")
    found = [
        f"{path.relative_to(ROOT)}:{number}: {match.group()}"
        for path in own_text_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        for match in place.finditer(line)
    ]
    assert not found
