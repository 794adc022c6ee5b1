"""The way in: Makefile, .ci/run, and the files that say what is installed."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]


def requirements(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    found = [re.match(r"([\w.-]+)\s*(.*)", line) for line in lines if not line.startswith("#")]
    return {m[1].lower().replace("_", "-"): m[2] for m in found if m}


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def declared(text: str) -> dict[str, str]:
    found = [re.match(r"([\w.-]+)(.*)", line) for line in text.split("\n") if line.strip()]
    return {m[1].lower(): m[2] for m in found if m}


@pytest.mark.parametrize("target", ["demo", "test", "check", "bench", "clean", "install"])
def test_target_is_there_and_explained(target: str) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    done = subprocess.run(
        ["make", "--dry-run", target],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert f"make {target} " in shown.stdout


def test_installation_compiles_and_uses_the_tested_set() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "--always-make", "install"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for option in (
        "--compile-bytecode",
        "--override overrides.txt",
        "--constraint constraints.txt",
    ):
        assert option in done.stdout
    assert "UV_DEFAULT_INDEX" in done.stdout


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    assert text.rstrip().endswith("make test")


def test_every_dependency_has_a_lower_bound(setup: configparser.ConfigParser) -> None:
    groups = [setup["options"]["install_requires"], *setup["options.extras_require"].values()]
    for name, bounds in (item for group in groups for item in declared(group).items()):
        assert ">=" in bounds, name


def test_narrow_pins_only_where_the_code_leans_on_internals(
    setup: configparser.ConfigParser,
) -> None:
    bounded = {
        name
        for name, bounds in declared(setup["options"]["install_requires"]).items()
        if "<" in bounds
    }
    assert bounded == {"deepspeed", "mosaicml-streaming", "transformers", "xxhash"}


def test_tested_set_names_every_dependency_and_no_index(setup: configparser.ConfigParser) -> None:
    tested = requirements("constraints.txt")
    wanted = declared(setup["options"]["install_requires"])
    wanted |= declared(setup["options.extras_require"]["dev"])
    assert set(wanted) <= set(tested)
    assert all(re.fullmatch(r"==[\w.+!]+", version) for version in tested.values())
    assert not any(name.startswith(("nvidia", "cuda", "triton")) for name in tested)
    text = "".join((ROOT / name).read_text() for name in ("constraints.txt", "overrides.txt"))
    assert "://" not in text
    assert not any(line.startswith("-") for line in text.splitlines())


def test_overrides_are_within_what_we_declare(setup: configparser.ConfigParser) -> None:
    wanted = declared(setup["options"]["install_requires"])
    for name, bounds in requirements("overrides.txt").items():
        assert wanted.get(name, bounds) == bounds


def needs(name: str) -> set[str]:
    """What an installed distribution needs here, without extras."""
    from importlib.metadata import requires

    found = [Requirement(line) for line in requires(name) or []]
    wanted = [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    return {r.name.lower().replace("_", "-").replace(".", "-") for r in wanted}


def closure(names: set[str]) -> set[str]:
    """The distributions and all that they need."""
    found: set[str] = set()
    while waiting := names - found:
        found |= waiting
        names = {other for name in waiting for other in needs(name)}
    return found


def test_tested_set_is_complete_without_a_resolver(setup: configparser.ConfigParser) -> None:
    """docs/install.md installs it with pip --no-deps, after torch with its own dependencies."""
    wanted = set(declared(setup["options"]["install_requires"]))
    wanted |= set(declared(setup["options.extras_require"]["dev"]))
    assert closure(wanted) - closure({"torch"}) <= set(requirements("constraints.txt"))


def test_commands_of_the_documentation_exist() -> None:
    text = (ROOT / "docs" / "install.md").read_text()
    for file in ("constraints.txt", "overrides.txt", "launcher/run.py"):
        assert file in text
        assert (ROOT / file).is_file()
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (?:[A-Z]+=\S+ )?(\w+)`", text):
        assert f"\n{target}:" in makefile
