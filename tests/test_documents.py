"""What the documents say about the project is so: their links lead somewhere, the tree is the tree."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])


def named_in_tree(text: str) -> set[str]:
    """The package's files that README's tree shows, from its indentation: `models/blip.py`."""
    block = re.search(r"^```\nopenblip/\n(.*?)^```", text, re.S | re.M).group(1)
    found, folder = set(), ""
    for line in block.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        if not indent:
            break  # beside the package
        if name.endswith("/"):
            folder = name
        else:
            found.add(f"{folder if len(indent) == 4 else ''}{name}")
    return found


def test_the_tree_in_the_readme_is_the_tree():
    package = ROOT / "openblip"
    real = {str(path.relative_to(package)) for path in package.rglob("*.py") if path.name != "__init__.py"}
    named = named_in_tree((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(named) > 20
    assert named == real, f"only in README: {sorted(named - real)}; not in README: {sorted(real - named)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text(encoding="utf-8"))
    broken = [link for link in links if not (page.parent / link).exists()]
    assert not broken, f"{page.name} links to what is not there: {broken}"


def test_files_named_in_documents_exist():
    """`models/clip.py` or `tests/house_rules.py` in code font is a file of the package or of the project."""
    missing = []
    for page in PAGES:
        for name in re.findall(r"`((?:[\w.-]+/)*[\w.-]+\.py)`", page.read_text(encoding="utf-8")):
            if not any((folder / name).is_file() for folder in (ROOT, ROOT / "openblip")):
                missing.append(f"{page.name}: {name}")
    missing = [one for one in missing if not one.endswith(": utils.py")]  # named as what there is not
    assert not missing, missing


def test_every_layout_of_blip_and_transformers_is_in_the_table_of_checkpoints():
    from openblip.convert import huggingface, lavis

    page = (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")
    rows = [row for row in page.splitlines() if row.startswith("| `")]
    for layout in (*huggingface.LAYOUTS, *lavis.LAYOUTS):
        assert any(row.startswith(f"| `{layout.name}`") for row in rows), layout.name


def test_every_recipe_named_in_the_readme_exists():
    from openblip.recipes import RECIPES

    rows = re.findall(r"^\| .*? \| .*? \| (.*?) \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    named = {name for cell in rows for name in re.findall(r"`(\w+)`", cell)}
    assert len(named) > 5 and named <= set(RECIPES), named - set(RECIPES)
