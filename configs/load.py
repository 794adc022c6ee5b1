"""YAML to a checked config: `extends`, `key=value` overrides, and the resolved dump.

`extends: other.yaml` starts from another file of the same kind (relative to this one); mappings
merge, everything else replaces. Overrides are dotted: `optim.lr=2e-4`, `model.moe.num_experts=8`;
a number picks an item of a list: `data.train.0.weight=2`. A null sets a key to none.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from shoal.configs.errors import ConfigError

ConfigT = TypeVar("ConfigT", bound=BaseModel)

SHIPPED = Path(__file__).parent


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 3e-4 as a number (YAML 1.1 wants a dot) and refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Build a mapping; a key given twice is an error, not a silent last-one-wins."""
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":  # `<<: *other` may repeat what it merges
                continue
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key cannot be a mapping or a list", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+$"),
    list("-+0123456789."),
)


def find_config(name: str | Path) -> Path:
    """Return the file called `name`: as given, or among those shipped with the project."""
    given = Path(name)
    for path in (given, SHIPPED / given, SHIPPED / given.with_suffix(".yaml")):
        if path.is_file():
            return path
    shipped = sorted(str(p.relative_to(SHIPPED)) for p in SHIPPED.rglob("*.yaml"))
    near = difflib.get_close_matches(str(name), shipped, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        "no such config file", where=name, fix=f"{hint}shipped configs: {', '.join(shipped)}"
    )


def load_config(kind: type[ConfigT], path: str | Path, overrides: Iterable[str] = ()) -> ConfigT:
    """Read `path` as a config of `kind` and apply `key=value` overrides.

    Raises:
        ConfigError: file missing, YAML broken, key unknown (nearest named) or value refused.
    """
    file = find_config(path)
    tree = read_tree(file)
    for override in overrides:
        apply_override(tree, override)
    return build_config(kind, tree, where=file)


def build_config(kind: type[ConfigT], tree: Mapping[str, Any], where: object) -> ConfigT:
    """Check a plain tree against `kind`; every problem is named with its full key."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        problems = [_explain(kind, dict(item)) for item in error.errors()]
        raise ConfigError("\n  ".join(["invalid configuration", *problems]), where=where) from None


def first_problem(error: ValidationError) -> str:
    """Return the first thing pydantic found wrong, with its place where it has one."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return (f"{place}: " if place else "") + first["msg"].removeprefix("Value error, ")


def read_tree(file: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read one YAML file and what it `extends`, as a plain tree.

    A corpus config that a file names (`prepare`) and that lies beside it comes back as the path to
    it, so that each name means what it meant to the file that says it.

    Raises:
        ConfigError: not readable, not a mapping, or extended in a circle.
    """
    if file.resolve() in seen:
        raise ConfigError("extends itself", where=file)
    try:
        tree = yaml.load(file.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"not readable as YAML: {error}", where=file) from None
    if not isinstance(tree, dict):
        raise ConfigError("expected `key: value` lines at the top level", where=file)
    corpus = tree.get("prepare")
    # What is shipped goes by its name, which holds on every machine that a run is moved to.
    if isinstance(corpus, str) and SHIPPED.resolve() not in file.resolve().parents:
        beside = file.parent / corpus
        tree["prepare"] = str(beside) if beside.is_file() else corpus
    parent = tree.pop("extends", None)
    if parent is None:
        return tree
    beside = file.parent / str(parent)
    base = read_tree(beside if beside.is_file() else find_config(parent), (*seen, file.resolve()))
    return merge(base, tree)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `over` on top; mappings merge, everything else replaces."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        result[key] = merge(old, value) if both else value  # type: ignore[arg-type]
    return result


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one dotted `key=value` in place; the value is read as YAML."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(
            f"{override!r} is not key=value", where="command line", fix="for example optim.lr=2e-4"
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"value not readable: {error}", where=key) from None
    *path, last = key.strip().split(".")
    node: Any = tree
    for part in path:
        if isinstance(node, list):
            node = node[_list_index(node, part, key)]
        else:
            if not isinstance(node.get(part), (dict, list)):
                node[part] = {}
            node = node[part]
    if isinstance(node, list):
        node[_list_index(node, last, key)] = value
    else:
        node[last] = value


def _list_index(node: list, part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise ConfigError(f"{part!r} is no item of a list of {len(node)}", where=key)
    return int(part)


def dump_config(config: BaseModel) -> str:
    """Return the resolved config as YAML that loads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def config_hash(config: BaseModel, *, without: Iterable[str] = ()) -> str:
    """Return a short SHA-256 of a config, leaving out top-level keys that change no result."""
    tree = {k: v for k, v in config.model_dump(mode="json").items() if k not in set(without)}
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]


def _explain(kind: type[BaseModel], item: dict[str, Any]) -> str:
    """One line for one pydantic error, naming the nearest known key for an unknown one."""
    path = [str(part) for part in item["loc"]]
    name = ".".join(path)
    if item["type"] == "extra_forbidden":
        known = _known_keys(kind, path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{name}: unknown key{hint} (known: {', '.join(known)})"
    if item["type"] == "missing":
        return f"{name}: missing"
    given = f" (given: {item['input']!r})" if not isinstance(item["input"], dict) else ""
    message = item["msg"].removeprefix("Value error, ")
    return f"{name or 'config'}: {message}{given}"


def _known_keys(kind: type[BaseModel], path: list[str]) -> list[str]:
    """Keys of the section at `path`, looking through optionals, tuples and mappings."""
    kinds = [kind]
    for part in path:
        below = [k.model_fields[part].annotation for k in kinds if part in k.model_fields]
        kinds = [m for annotation in below for m in _models_in(annotation)] or kinds
    return [key for k in kinds for key in k.model_fields]


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)
