"""YAML and JSON, read strictly and written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pvae.errors import OptionError

__all__ = ["read_yaml", "write_json", "write_yaml"]


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, strictly: a key given twice is refused, with its line.

    Raises:
        OptionError: the file is missing, is not YAML, or is not a mapping.
    """
    import yaml  # type: ignore[import-untyped]

    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise OptionError(f"the config file {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise OptionError(f"{path} is not a text file in UTF-8: give a YAML file") from None
    try:
        content = yaml.load(text, Loader=_loader(path.name))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise OptionError(f"{path.name}{line} is not YAML: {error.problem}") from None
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(f"{path.name} is not YAML: {reason}") from None
    if not isinstance(content, dict):
        found = "it is empty" if content is None else f"got a {type(content).__name__}"
        raise OptionError(f"{path.name} must hold options as 'name: value' lines, {found}")
    return content


def _loader(file: str) -> Any:
    """PyYAML's safe loader that refuses a key twice and reads ``1e-3`` as a number."""
    import re

    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:  # noqa: FBT001, FBT002
            seen: dict[Any, int] = {}
            for key_node, _ in node.value:
                key, line = key_node.value, key_node.start_mark.line + 1
                if not isinstance(key_node, yaml.ScalarNode):
                    raise OptionError(f"{file}, line {line}: a key must be a word")
                if key in seen:
                    raise OptionError(
                        f"{file}, line {line}: {key!r} is there twice (first in line {seen[key]}): "
                        "keep one"
                    )
                seen[key] = line
            return super().construct_mapping(node, deep)

    number = re.compile(r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    """A mapping as YAML, written whole or not at all."""
    import yaml  # type: ignore[import-untyped]

    from pvae.checkpoints import write_aside

    text = yaml.safe_dump(_plain(content), sort_keys=False, allow_unicode=True)
    write_aside(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Strict JSON, written whole or not at all; what is not finite is ``null``."""
    from pvae.checkpoints import write_aside

    text = json.dumps(_strict(_plain(content)), indent=2, ensure_ascii=False, allow_nan=False)
    write_aside(path, (text + "\n").encode())


def _plain(value: Any) -> Any:
    """Numbers, strings, lists and dicts alone: what YAML and JSON can hold."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_strict(entry) for entry in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value
