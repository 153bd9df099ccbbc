"""`import openblip` must stay cheap: a program that asks for the version does not pay for torch."""

import subprocess
import sys

import pytest

import openblip

HEAVY = (
    "torch",
    "transformers",
    "datasets",
    "numpy",
    "PIL",
    "pydantic",
    "huggingface_hub",
    "tyro",
    "rich",
    "lancedb",
    "ray",
)


def loaded_after(code: str) -> set[str]:
    """Top-level modules a fresh interpreter holds after running `code`."""
    code += "\nimport sys; print(' '.join({name.partition('.')[0] for name in sys.modules}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_nothing_heavy():
    loaded = loaded_after("import openblip; assert openblip.__version__; dir(openblip)")
    assert "openblip" in loaded
    assert loaded.isdisjoint(HEAVY)


def test_the_configuration_loads_no_framework():
    loaded = loaded_after("import openblip.config")
    assert "pydantic" in loaded, "the probe sees what is loaded"
    assert loaded.isdisjoint({"torch", "transformers", "datasets", "numpy"})


def test_the_command_line_loads_nothing_before_a_command_runs():
    loaded = loaded_after("import openblip.cli")
    assert "tyro" in loaded and loaded.isdisjoint({"lancedb", "torch", "transformers", "datasets", "numpy"})


def test_a_lazy_name_is_the_real_one_and_an_unknown_name_is_an_error():
    from openblip.api import load

    assert openblip.load is load
    assert set(openblip.__all__) <= set(dir(openblip))
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = openblip.lode


def test_the_engines_load_without_ray():
    loaded = loaded_after("import openblip.curate.engine")
    assert "torch" in loaded and loaded.isdisjoint({"ray", "imagehash", "scipy"})
