"""The house rules, read off the source: each takes the tree of modules and yields findings, `file:line: why`.

`IMPORTS` is the map of the project: which modules of ours a module may import, wherever in the file it
does so. The other rules keep out what would cost a user data or trust, or a reader time.
"""

import ast
import graphlib
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400
CATCH_ALL_NAMES = {"utils", "util", "helpers", "misc", "common"}
UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# What a package is called on the registry, where that is not the name it is imported by.
REGISTRY_NAMES = {"PIL": "pillow", "lance": "pylance", "resvg_py": "resvg-py"}

BRICKS = (
    "models.layers models.memory models.vit models.text models.tower models.qformer models.tiling models.resampler "
    "models.temporal models.packed models.adapters models.decoding models.lm models.generation"
)
PLUMBING = "train.config train.optim train.checkpoint train.distributed train.shard train.rng train.log train.signals"
OPEN = "config data models convert hub"
USE = f"{OPEN} api picture html fingerprint"

# The first line that fits a module holds; "models" stands for itself and everything below; "*" for all.
# fmt: off
IMPORTS = [
    # module, and what of ours it may import               # why not more
    ("openblip", "api"),                                   # free to import: names looked up on first use
    ("config", ""),                                        # the ground stands on nothing
    ("picture", "config data.image"),                      # draws arrays on images
    ("html", "config data.image"),                         # the pieces of pages
    ("data.image", "config"),                              # the one door for untrusted bytes
    ("data", "config data"),                               # data knows no model
    ("models.layers", "config"),                           # the lowest brick
    ("models.vit", "config models.layers"),                # bricks stand on layers alone
    ("models.text", "config models.layers models.memory"),
    ("models.tower", "models.vit"),                        # a tower, trained or frozen
    ("models.generation", "config"),                       # it sees a `step` callable and no model
    ("models.localize", f"{BRICKS} models.blip"),          # reads BLIP's cross-attention
    ("models.blip2_llm", f"config {BRICKS} models.blip2"),  # stage 2 stands on stage 1
    ("models", f"config {BRICKS}"),                        # no other system, no data, no training
    ("train.objectives", ""),                              # losses see tensors only
    ("train.tasks", f"config models train.objectives train.matching {PLUMBING}"),  # a model and its losses
    ("train.tasks_blip2", f"config models train.objectives train.tasks train.matching {PLUMBING}"),
    ("train.tasks_blip3", f"config models train.objectives train.tasks {PLUMBING}"),
    ("train.matching", f"models train.objectives {PLUMBING}"),  # one ITM for BLIP and BLIP-2
    ("train.start", "config models"),                      # weights of one model into another
    ("train.initialise", OPEN),                            # parts from anywhere into a fresh model
    ("train.ingredients", f"{OPEN} recipes train"),        # a recipe's model, with the weights it begins with
    ("train.ingredients_blip3", f"{OPEN} recipes train"),
    ("train.batches_blip3", f"{OPEN} recipes train"),      # rows to batches, as a recipe says
    ("train.stage", f"{OPEN} recipes train"),              # a recipe and rows to a saved model
    ("train", f"config {PLUMBING}"),                       # tasks by protocol, no model by name
    ("recipes", "config models train.config train.tasks train.tasks_blip2 train.tasks_blip3 recipes"),
    ("convert", "config data models convert"),             # other layouts into ours and back
    ("model_card", ""),                                    # words about a model it is given
    ("hub", "config data models convert model_card"),      # a folder of weights; it trains nothing
    ("api_arguments", OPEN),                                # what callers give, checked
    ("api_blip", f"{OPEN} picture api_arguments"),         # what a user holds trains nothing
    ("api_llm", f"{OPEN} api_arguments api_blip"),         # the same calls, a language model talks
    ("api_reader", f"{OPEN} api_arguments"),               # what a BLIP-3 reads and writes
    ("api_talk", f"{OPEN} api_arguments api_blip api_reader"),  # turns, and what stays in the cache
    ("api_chat", f"{OPEN} api_arguments api_blip api_llm api_reader api_talk"),
    ("api", f"{OPEN} api_arguments api_blip api_llm api_chat api_talk"),  # the right one for a model
    ("fingerprint", f"{OPEN} api"),                        # which model it was
    ("search", f"{USE} search"),                           # an index uses models, it makes none
    ("eval", f"{USE} eval"),                               # a protocol measures what it is given
    ("curate", f"{USE} train recipes eval curate"),        # CapFilt trains, and serves nothing
    ("quickstart", f"{USE} train recipes eval curate search quickstart"),  # the main job, start to end
    ("cli_shared", f"{OPEN} curate"),                      # parts of the roof
    ("cli_make", "*"),
    ("cli_chat", "*"),
    ("cli_convert", "*"),
    ("cli_search", "*"),
    ("cli", "*"),                                          # the roof stands on everything
]
# fmt: on

Tree = dict[str, tuple[Path, ast.Module]]


def parse(root: Path) -> Tree:
    """The modules of `root/openblip` by name: `models.vit` and so on; the package itself is `openblip`."""
    tree = {}
    for path in sorted((root / "openblip").rglob("*.py")):
        parts = path.relative_to(root / "openblip").with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "openblip"
        tree[name] = (path, ast.parse(path.read_text(encoding="utf-8"), str(path)))
    return tree


def imports(module: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a module imports, at its head or inside a function."""
    for node in ast.walk(module):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (
                (node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names
            )


def ours(tree: Tree, name: str) -> str | None:
    """The module of ours that the import `name` means: `openblip.models.vit.VisionConfig` is `models.vit`."""
    package, _, inner = name.partition(".")
    if package != "openblip" or inner == "__version__":
        return None
    while inner not in tree and inner:
        inner = inner.rpartition(".")[0]
    return inner or "api"  # the names of the package itself are those of api, looked up lazily


def within(name: str, groups: str) -> bool:
    return any(group == "*" or name == group or name.startswith(f"{group}.") for group in groups.split())


def at(path: Path, line: int) -> str:
    """The place of a finding as editors read it."""
    inside = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    return f"{inside}:{line}"


def calls(module: ast.Module) -> Iterator[tuple[ast.Call, dict[str, object]]]:
    """Every call with its keywords; a value that is not a constant is given as its source text."""
    for node in ast.walk(module):
        if isinstance(node, ast.Call):
            values = {k.arg: k.value for k in node.keywords if k.arg}
            yield (
                node,
                {k: v.value if isinstance(v, ast.Constant) else ast.unparse(v) for k, v in values.items()},
            )


def import_directions(tree: Tree) -> Iterator[str]:
    for name, (path, module) in tree.items():
        allowed = next((allowed for group, allowed in IMPORTS if within(name, group)), None)
        if allowed is None:
            yield f"{at(path, 1)}: {name} has no line in IMPORTS: say what it may import"
            continue
        for line, target in sorted(
            {(line, ours(tree, imported)) for line, imported in imports(module)}, key=str
        ):
            if target not in (None, name) and not within(target, allowed):
                yield f"{at(path, line)}: {name} imports {target}, may import only [{allowed}]"


def no_cycles(tree: Tree) -> Iterator[str]:
    graph = {
        name: {ours(tree, imported) for _, imported in imports(module)} - {None, name}
        for name, (_, module) in tree.items()
        if name != "openblip"  # its lazy names
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield f"modules that import each other: {' -> '.join(error.args[1])}"


def declared_packages(tree: Tree) -> Iterator[str]:
    """What is imported is listed in pyproject.toml, so that an installation has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = [
        *project["dependencies"],
        *(line for extra in project["optional-dependencies"].values() for line in extra),
    ]
    names = {re.split(r"[^\w.-]", line)[0].lower().replace("-", "_") for line in listed}
    for path, module in tree.values():
        for line, imported in imports(module):
            package = imported.partition(".")[0]
            registry = REGISTRY_NAMES.get(package, package).lower().replace("-", "_")
            if (
                package
                and package != "openblip"
                and package not in sys.stdlib_module_names
                and registry not in names
            ):
                yield f"{at(path, line)}: {package} is in no list of dependencies of pyproject.toml"


def no_relative_imports(tree: Tree) -> Iterator[str]:
    for path, module in tree.values():
        for line, imported in imports(module):
            if imported.startswith("."):
                yield f"{at(path, line)}: write the import in full, from openblip.…"


def no_unpickling(tree: Tree) -> Iterator[str]:
    """A file from someone else must never be able to run code."""
    for path, module in tree.values():
        for line, imported in imports(module):
            if imported.partition(".")[0] in UNPICKLERS:
                yield f"{at(path, line)}: {imported}: unpickling runs code; use safetensors or JSON"
        for call, keywords in calls(module):
            if keywords.get("allow_pickle", False) is not False:
                yield f"{at(path, call.lineno)}: allow_pickle: unpickling runs code from the file"
            if ast.unparse(call.func) == "torch.load" and keywords.get("weights_only") is not True:
                yield f"{at(path, call.lineno)}: torch.load without weights_only=True unpickles the file"
            elif keywords.get("weights_only", True) is not True:
                yield f"{at(path, call.lineno)}: weights_only must be True: anything else unpickles the file"
            if keywords.get("trust_remote_code", False) is not False:
                yield f"{at(path, call.lineno)}: trust_remote_code runs code from the hub"
            if isinstance(call.func, ast.Name) and call.func.id in ("eval", "exec"):
                yield f"{at(path, call.lineno)}: {call.func.id}() runs text as code"


def no_silent_loading(tree: Tree) -> Iterator[str]:
    """`load_state_dict(strict=False)` hides a model that is partly random."""
    for path, module in tree.values():
        for call, keywords in calls(module):
            is_zip = isinstance(call.func, ast.Name) and call.func.id == "zip"
            if not is_zip and keywords.get("strict", True) is not True:
                yield f"{at(path, call.lineno)}: strict=False: name the keys that may be absent"


def no_swallowed_errors(tree: Tree) -> Iterator[str]:
    for path, module in tree.values():
        lines = path.read_text(encoding="utf-8").splitlines()
        for node in ast.walk(module):
            swallows = isinstance(node, ast.ExceptHandler) and isinstance(node.body[0], ast.Pass)
            if swallows and "#" not in lines[node.body[0].lineno - 1]:
                yield f"{at(path, node.lineno)}: an error is swallowed: handle it, or say there why not"


def small_files(tree: Tree) -> Iterator[str]:
    for path, _ in tree.values():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_LINES:
            yield f"{at(path, lines)}: {lines} lines, at most {MAX_LINES}: a brick is missing"


def speaking_names(tree: Tree) -> Iterator[str]:
    for path, _ in tree.values():
        if path.stem in CATCH_ALL_NAMES:
            yield f"{at(path, 1)}: a file is named after what it holds, not {path.name}"


def docstrings(tree: Tree) -> Iterator[str]:
    """Modules and their public functions and classes say what they are."""
    for path, module in tree.values():
        if not ast.get_docstring(module):
            yield f"{at(path, 1)}: the module has no docstring"
        for node in module.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                yield f"{at(path, node.lineno)}: {node.name} has no docstring"


RULES = [
    import_directions,
    no_cycles,
    declared_packages,
    no_relative_imports,
    no_unpickling,
    no_silent_loading,
    no_swallowed_errors,
    small_files,
    speaking_names,
    docstrings,
]


def traces_of_work(files: list[Path]) -> Iterator[str]:
    """Paths of somebody's machine, and notes of unfinished work, in any text file of the project."""
    patterns = {
        "a path of somebody's machine": re.compile(r"(?<![\w.:/-])/(?:home|root|work|opt|tmp|mnt|Users)/\w+"),
        "unfinished work": re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b"),
    }
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture or weights
            continue
        for number, line in enumerate(text.splitlines(), 1):
            for what, pattern in patterns.items():
                if found := pattern.search(line):
                    yield f"{at(path, number)}: {what}: {found.group()}"
