"""The project keeps its house rules, and each rule is seen to fail on a fault planted in a sound tree."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.house_rules import (
    IMPORTS,
    MAX_LINES,
    RULES,
    Tree,
    declared_packages,
    docstrings,
    import_directions,
    no_cycles,
    no_relative_imports,
    no_silent_loading,
    no_swallowed_errors,
    no_unpickling,
    parse,
    small_files,
    speaking_names,
    traces_of_work,
    within,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def package() -> Tree:
    return parse(ROOT)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule, package):
    assert len(package) > 20, "the package was found"
    assert not (found := list(rule(package))), "\n" + "\n".join(found)


def test_every_line_of_the_map_is_used(package):
    names = set(package)
    unused = [group for group, _ in IMPORTS if not any(within(name, group) for name in names)]
    assert not unused, f"IMPORTS speaks of modules that do not exist: {unused}"


def test_the_project_holds_no_trace_of_work():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True
    )
    if listed.returncode:
        pytest.skip("not a git checkout: the project's files cannot be told from what lies beside them")
    files = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    found = list(traces_of_work([path for path in files if path.is_file()]))
    assert not found, "\n" + "\n".join(found)


# Sources with one fault each, planted in an otherwise sound tree: every rule is seen to fail.

PLANTED = [
    (import_directions, "models/clip.py", "import openblip.data.image", "models.clip imports data.image"),
    (import_directions, "models/clip.py", "from openblip import api", "models.clip imports api"),
    (import_directions, "models/clip.py", "from openblip import load", "models.clip imports api"),
    (import_directions, "models/clip.py", "import openblip.models.blip", "clip imports models.blip"),
    (import_directions, "models/vit.py", "import openblip.models.text", "vit imports models.text"),
    (import_directions, "data/image.py", "def f():\n import openblip.models.vit", ":3: data.image imports"),
    (
        import_directions,
        "train/objectives.py",
        "import openblip.models.vit",
        "train.objectives imports models.vit",
    ),
    (import_directions, "train/loop.py", "import openblip.models.vit", "train.loop imports models.vit"),
    (import_directions, "train/loop.py", "import openblip.api", "train.loop imports api"),
    (import_directions, "config.py", "import openblip.data.image", "config imports data.image"),
    (import_directions, "search/scan.py", "import openblip.train.loop", "search.scan imports train.loop"),
    (import_directions, "novelty.py", "", "novelty has no line in IMPORTS"),
    (no_cycles, "train/log.py", "def f():\n    import openblip.train.loop", "train.log"),
    (declared_packages, "data/image.py", "import cv2", ":2: cv2 is in no list"),
    (declared_packages, "data/image.py", "from torchvision.io import x", "torchvision is in no list"),
    (no_relative_imports, "data/image.py", "from .text import x", "write the import in full"),
    (no_unpickling, "hub.py", "import pickle", "hub.py:2: pickle"),
    (no_unpickling, "hub.py", "from joblib import load", "joblib.load"),
    (no_unpickling, "hub.py", "torch.load(f)", "torch.load without weights_only=True"),
    (no_unpickling, "hub.py", "torch.load(f, weights_only=flag)", "torch.load without weights_only=True"),
    (no_unpickling, "hub.py", "g(f, weights_only=False)", "weights_only must be True"),
    (no_unpickling, "hub.py", "np.load(f, allow_pickle=True)", "allow_pickle"),
    (no_unpickling, "hub.py", "g(n, trust_remote_code=True)", "trust_remote_code"),
    (no_unpickling, "hub.py", "eval('1')", "eval() runs text as code"),
    (no_silent_loading, "hub.py", "m.load_state_dict(s, strict=False)", "hub.py:2: strict=False"),
    (
        no_swallowed_errors,
        "hub.py",
        "try:\n    f()\nexcept OSError:\n    pass",
        "hub.py:4: an error is swallowed",
    ),
    (small_files, "hub.py", "x = 1\n" * MAX_LINES, f"at most {MAX_LINES}"),
    (speaking_names, "data/utils.py", "", "a file is named after what it holds"),
    (docstrings, "hub.py", "def f():\n    return 1", "hub.py:2: f has no docstring"),
    (docstrings, "hub.py", "class C:\n    x = 1", "hub.py:2: C has no docstring"),
]
SOUND = {
    "__init__.py": "def __getattr__(name):\n    import openblip.api",
    "config.py": "import json",
    "data/image.py": "from openblip.config import UserError\nfrom openblip import __version__",
    "data/text.py": "import PIL",
    "models/layers.py": "import torch\nm.eval()",
    "models/vit.py": "from openblip.models.layers import Attention\nfrom openblip.models import layers",
    "models/text.py": "import openblip.models.layers",
    "models/blip.py": "from openblip.models import text, vit",
    "models/clip.py": "from openblip.config import x",
    "train/objectives.py": "import torch\nfor a, b in zip(x, y, strict=False):\n    f(a, strict=True)",
    "train/log.py": "try:\n    f()\nexcept OSError:\n    pass  # it was a hint only",
    "train/loop.py": "from openblip.train import log",
    "train/tasks.py": "from openblip.train import objectives\nimport openblip.models.blip",
    "hub.py": "torch.load(f, weights_only=True)\ndef _f():\n    g(allow_pickle=False)",
    "api.py": "import openblip.hub",
    "search/scan.py": "import openblip",
    "cli.py": "import openblip.search.scan\nimport openblip.train.loop",
}


def plant(root: Path, files: dict[str, str]) -> Tree:
    for name, source in files.items():
        path = root / "openblip" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'"""Doc."""\n{source}\n', encoding="utf-8")
    return parse(root)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_sound_tree_passes(rule, tmp_path):
    assert list(rule(plant(tmp_path, SOUND))) == []


@pytest.mark.parametrize(("rule", "file", "source", "message"), PLANTED)
def test_a_planted_fault_is_found_where_it_is(rule, file, source, message, tmp_path):
    found = list(rule(plant(tmp_path, SOUND | {file: source})))
    assert len(found) == 1 and message in found[0], found
    assert rule is no_cycles or re.match(r".*\.py:\d+: ", found[0]), "file and line"


def test_a_missing_module_docstring_is_found(tmp_path):
    tree = plant(tmp_path, SOUND)
    (tmp_path / "openblip" / "hub.py").write_text("x = 1\n")
    assert "hub.py:1: the module has no docstring" in "".join(docstrings(parse(tmp_path)))
    assert not list(docstrings(tree))


def test_every_rule_has_a_planted_fault():
    assert {rule for rule, *_ in PLANTED} == set(RULES)


@pytest.mark.parametrize("text", ["see /ho" + "me/ann/data", 'p = "/tm' + 'p/x"', "# TO" + "DO: later"])
def test_traces_of_work_are_found(text, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"fine: https://example.org/home/x ./work/y\n{text}\n")
    found = list(traces_of_work([page]))
    assert len(found) == 1 and f"{page}:2: " in found[0]
