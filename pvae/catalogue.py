"""Models, guides, objectives, games by name: a listed folder, an import path, a user's own file.

There is no registry. What lies in ``models/`` and ``guides/`` is found by listing the folder, and
the signature of a class is the list of its options.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from pvae.errors import OptionError, ProgramError, did_you_mean

__all__ = [
    "Options",
    "Program",
    "blame",
    "build_objective",
    "filled_names",
    "find",
    "games",
    "listing",
    "objective_options",
    "objectives",
    "option_names",
    "optimizers",
]

filled_names = (
    "x_dim", "num_levels", "num_classes", "image_shape", "latents", "model", "x_mean", "x_scale",
    "example_batch",
)  # fmt: skip

_FOLDERS = {"model": "models", "guide": "guides"}
_FILES = {"auto": "derived"}  # short name -> file, where they differ
_NAMED = {
    "beta": "schedules", "bound": "bounds", "gradient": "gradients", "kl_term": "kl_terms",
    "penalty": "penalties",
}  # fmt: skip
_user_files: set[str] = set()


@dataclass(frozen=True)
class Program:
    """A model or a guide before it is built.

    Attributes:
        factory: A class to construct, or a plain function that is the program itself.
        reference: What finds it again: a short name, ``package.module:Class`` or
            ``/folder/file.py:Class``.
        name: A short name for folders and tables.
        file: The user's file, if it came from one.
    """

    factory: Callable[..., Any]
    reference: str
    name: str
    file: Path | None = None

    @property
    def is_class(self) -> bool:
        """Whether the factory has to be called to give the program."""
        return isinstance(self.factory, type)


def listing(role: str) -> dict[str, str]:
    """Short name -> first docstring line of every shipped ``"model"`` or ``"guide"``.

    The files are read, not imported. Of a ``"game"`` those of :func:`games`.
    """
    if role == "game":
        return {n: (inspect.getdoc(g) or "").partition("\n")[0] for n, g in games().items()}
    found = {}
    names = {file: name for name, file in _FILES.items()}
    for path in sorted((Path(__file__).parent / _FOLDERS[role]).glob("[!_]*.py")):
        tree = ast.parse(path.read_bytes())
        classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        described = ast.get_docstring(classes[-1] if classes else tree) or ""
        found[names.get(path.stem, path.stem)] = described.partition("\n")[0]
    return found


def find(role: str, text: str, *, copy: Path | None = None) -> Program:
    """The model, guide or game that ``text`` names.

    Args:
        role: ``"model"``, ``"guide"`` or ``"game"``, a function.
        text: A short name (dashes or underscores), ``package.module:Class``, or ``./file.py:Class``
            where ``:Class`` may be left out if the file has one candidate.
        copy: Read this copy of the user's file instead of the file itself.

    Raises:
        ProgramError: there is none, or its file does not run.
    """
    place, _, attribute = text.partition(":")
    if place.endswith(".py") or "/" in place:
        return _from_file(role, Path(place), attribute, copy)
    if attribute:
        return _from_import(role, place, attribute)
    known = listing(role)
    name = place.replace("-", "_").lower()
    if name not in known:
        raise ProgramError(
            f"no {role} is called {text!r}: {did_you_mean(name, known)} (or give "
            "package.module:Class or ./file.py:Class)"
        )
    if role == "game":
        return Program(games()[name], name, name)
    file = _FILES.get(name, name)
    module = importlib.import_module(f"pvae.{_FOLDERS[role]}.{file}")
    return Program(_only(role, module, module.__name__), name, name)


def _from_file(role: str, path: Path, attribute: str, copy: Path | None) -> Program:
    path = path.expanduser().absolute()
    source = copy if copy is not None else path
    if not source.is_file():
        raise ProgramError(f"the {role} file {path} does not exist: give the path of a Python file")
    module = _execute(source, path.parent)
    factory = _attribute(module, attribute, path.name) if attribute else None
    factory = factory if factory is not None else _only(role, module, path.name)
    name = getattr(factory, "__name__", path.stem)
    return Program(factory, f"{path}:{name}", path.stem.replace("_", "-"), path)


def _from_import(role: str, place: str, attribute: str) -> Program:
    if not all(part.isidentifier() for part in place.split(".")):
        raise ProgramError(
            f"the {role} {place}:{attribute} names no module: give package.module:Class or "
            "./file.py:Class"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise ProgramError(
            f"the {role} {place}:{attribute} cannot be imported ({error}): check the name, or give "
            "./file.py:Class"
        ) from None
    if module.__file__ and not _is_shipped(module.__file__):
        _user_files.add(module.__file__)
    name = attribute.lower().replace("_", "-")
    return Program(_attribute(module, attribute, place), f"{place}:{attribute}", name)


def _is_shipped(file: str) -> bool:
    return Path(__file__).parent in Path(file).parents


def _attribute(module: ModuleType, attribute: str, where: str) -> Any:
    if not hasattr(module, attribute):
        known = [name for name, value in vars(module).items() if _is_own(module, value)]
        hint = did_you_mean(attribute, known) if known else "it defines no class or function"
        raise ProgramError(f"{where} has no {attribute!r}: {hint}")
    found = getattr(module, attribute)
    if not callable(found):
        raise ProgramError(
            f"{where}:{attribute} is a {type(found).__name__}, not a class or a function: name the "
            "program itself"
        )
    return found


def _is_own(module: ModuleType, value: Any) -> bool:
    return (inspect.isclass(value) or inspect.isfunction(value)) and (
        value.__module__ == module.__name__
    )


def _only(role: str, module: ModuleType, where: str) -> Any:
    """The one candidate of a module: its only nn.Module, else the function named after the role."""
    from torch import nn

    public = getattr(module, "__all__", None)
    own = {
        name: value
        for name, value in vars(module).items()
        if _is_own(module, value) and (name in public if public else name[0] != "_")
    }
    modules = [n for n, v in own.items() if inspect.isclass(v) and issubclass(v, nn.Module)]
    modules = [] if role == "game" else modules
    functions = [n for n, v in own.items() if inspect.isfunction(v)]
    candidates = modules or [role if role in functions else n for n in functions]
    if len(set(candidates)) == 1:
        return own[candidates[0]]
    if not candidates:
        if role == "game":
            raise ProgramError(
                f"{where} defines no game: write a function of model and guide that returns a "
                "pvae.adversarial.Game"
            )
        raise ProgramError(
            f"{where} defines no {role}: write a class (nn.Module) whose forward is the program, "
            "or a function"
        )
    raise ProgramError(
        f"{where} defines {', '.join(sorted(set(candidates)))}: say which one, as "
        f"{where}:{candidates[0]}"
    )


def _execute(source: Path, folder: Path) -> ModuleType:
    """Run a user's file as a module of its own, with its folder importable; once if unchanged."""
    digest = hashlib.sha256(str(source).encode() + source.read_bytes()).hexdigest()[:16]
    name = f"pvae_user_{digest}_{source.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, source)
    if spec is None or spec.loader is None:
        raise ProgramError(f"{source} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    _user_files.add(str(source))
    sys.modules[name] = module
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    try:
        with _no_bytecode():
            spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _refused(error, source) from error
    return module


def _refused(error: Exception, source: Path) -> ProgramError:
    if isinstance(error, SyntaxError):
        file = Path(error.filename or source).name
        return ProgramError(f"{file}, line {error.lineno}: SyntaxError: {error.msg}")
    return ProgramError(blame(error) or f"{source.name}: {error}")


@contextlib.contextmanager
def _no_bytecode() -> Iterator[None]:
    """Leave no ``__pycache__`` beside the user's file."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def blame(error: BaseException) -> str | None:
    """``"mine.py, line 7: ValueError: ..."`` if the user's own file is on the error's way."""
    seen: BaseException | None = error
    while seen is not None:
        place, traceback = None, seen.__traceback__
        while traceback is not None:
            if traceback.tb_frame.f_code.co_filename in _user_files:
                place = (traceback.tb_frame.f_code.co_filename, traceback.tb_lineno)
            traceback = traceback.tb_next
        if place is not None:
            reason = (str(seen).strip().splitlines() or [""])[0]
            described = f"{type(seen).__name__}: {reason}" if reason else type(seen).__name__
            return f"{Path(place[0]).name}, line {place[1]}: {described}"
        seen = seen.__cause__
    return None


# --- the options that a signature offers ---------------------------------------------------------


def option_names(factory: Callable[..., Any]) -> list[str]:
    """The named parameters of a class or function."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [name for name, p in inspect.signature(factory).parameters.items() if p.kind in kinds]


class Options:
    """The arguments of a class or function as options ``--prefix.name``.

    Types, defaults and descriptions are those of its signature and docstring.

    Args:
        factory: A class or a function.
        prefix: What the options begin with: model, guide, objective or game.
        hidden: Parameters that are not options.
        named: Parameters whose text is kept as it is.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        prefix: str,
        *,
        hidden: Collection[str] = (),
        named: Collection[str] = (),
    ) -> None:
        from jsonargparse import ArgumentParser

        self.factory, self.prefix = factory, prefix
        self.hidden, self.named = set(hidden), set(named)
        parser: Any = ArgumentParser(exit_on_error=False, add_help=False)
        skip = self.hidden & set(option_names(factory))
        add = parser.add_class_arguments if isinstance(factory, type) else None
        add = add or parser.add_function_arguments
        add(factory, prefix, skip=skip, fail_untyped=False)
        start = f"{prefix}."
        self.actions = {
            action.dest.removeprefix(start): action
            for action in parser._actions
            if action.dest.startswith(start) and "." not in action.dest.removeprefix(start)
        }
        self.required = _required(factory, self.actions)

    def read(self, given: Mapping[str, Any], *, origin: str = "") -> dict[str, Any]:
        """Options with their types, from text of the command line or values of a file.

        Args:
            given: Name -> value.
            origin: Where they were found, to begin the message of an error.

        Raises:
            OptionError: an unknown name, or a value of another type.
        """
        values = {}
        for name, value in given.items():
            key = name.replace("-", "_")
            label = self._label(key, origin)
            if key in filled_names and key in self.hidden:
                raise OptionError(
                    f"{label} is known from the data: leave it out, and give data of that form"
                )
            if key not in self.actions:
                known = [self._label(n, "") if not origin else n for n in self.actions]
                asked = f"--{self.prefix}.{key}" if not origin else key
                hint = did_you_mean(asked, known) if known else "it takes none"
                raise OptionError(f"{origin}{self.owner} has no option {asked}: {hint}")
            values[key] = value if key in self.named else self._value(key, value, label)
        return values

    def missing(self, given: Collection[str]) -> None:
        """Refuse to go on without the arguments that have no default.

        Raises:
            OptionError: names the first of them.
        """
        for name in self.required:
            if name not in given:
                raise OptionError(f"{self.owner} needs --{self.prefix}.{name}: give it a value")

    def describe(self) -> list[tuple[str, str]]:
        """Option -> its description, type and default, for a help page."""
        rows = []
        for name, action in self.actions.items():
            kind, default = self._kind(name), f", default {action.default}"
            if name in self.required:
                default = ", required"
            elif name in self.named and not isinstance(action.default, float):
                default = ""
            text = " ".join((action.help or "").replace("``", "").split())
            rows.append((f"--{self.prefix}.{name}", f"{text} ({kind}{default})".strip()))
        return rows

    def _kind(self, name: str) -> str:
        if name in self.named:
            return f"a name of pvae.{_NAMED[name]}, or a call" + " or a number" * (name == "beta")
        return _type_name(getattr(self.actions[name], "_typehint", None))

    def defaults(self) -> dict[str, Any]:
        """The options that may be left out, as far as a text file can hold their values."""
        plain = (bool, int, float, str, type(None), list, tuple, dict)
        return {
            name: action.default
            for name, action in self.actions.items()
            if name not in (*self.required, *self.named) and isinstance(action.default, plain)
        }

    @property
    def owner(self) -> str:
        """The name of the class or function."""
        return getattr(self.factory, "__name__", str(self.factory))

    def _label(self, name: str, origin: str) -> str:
        return f"{origin}{name!r}" if origin else f"--{self.prefix}.{name}"

    def _value(self, name: str, value: Any, label: str) -> Any:
        for attempt in (value, *_as_whole(value)):
            try:
                return self._parse(name, attempt)
            except Exception:
                continue
        raise OptionError(f"{label} takes a value of type {self._kind(name)}, got {value!r}")

    def _parse(self, name: str, value: Any) -> Any:
        """One value by a parser of its own, so that no other default is judged with it."""
        from jsonargparse import ArgumentParser

        parser: Any = ArgumentParser(exit_on_error=False, add_help=False)
        parser.add_argument("--value", type=getattr(self.actions[name], "_typehint", None) or Any)
        as_text = isinstance(value, str)
        parsed = parser.parse_args([f"--value={value}"]) if as_text else None
        return (parsed or parser.parse_object({"value": value})).value


def _required(factory: Callable[..., Any], offered: Collection[str]) -> list[str]:
    parameters = inspect.signature(factory).parameters
    empty = inspect.Parameter.empty
    return [n for n in offered if n in parameters and parameters[n].default is empty]


def _as_whole(value: Any) -> list[Any]:
    """``1e3`` as 1000, where a whole number was meant."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return []
    return [int(number)] if number.is_integer() else []


def _type_name(hint: Any) -> str:
    if hint is None:
        return "any"
    text = hint.__name__ if isinstance(hint, type) else str(hint)
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", text)


# --- objectives and games ------------------------------------------------------------------------


def objectives() -> dict[str, Callable[..., Any]]:
    """Name -> recipe: the functions of ``pvae.recipes`` that return an Objective."""
    return _functions("pvae.recipes", "Objective")


def games() -> dict[str, Callable[..., Any]]:
    """Name -> function: those of ``pvae.games`` that return a Game."""
    return _functions("pvae.games", "Game")


def _functions(place: str, returned: str) -> dict[str, Callable[..., Any]]:
    module = importlib.import_module(place)
    return {
        name: value
        for name, value in vars(module).items()
        if name in module.__all__
        and inspect.isfunction(value)
        and value.__annotations__.get("return") == returned
    }


def objective_options(name: str) -> Options:
    """The options of a recipe.

    Raises:
        OptionError: no objective is called so.
    """
    known = objectives()
    key = name.replace("-", "_").lower()
    if key not in known:
        raise OptionError(f"no objective is called {name!r}: {did_you_mean(key, known)}")
    return Options(known[key], "objective", named=_NAMED)


def build_objective(name: str, options: Mapping[str, Any]) -> Any:
    """A recipe with its options, e.g. ``dreg`` with ``{"num_particles": 50}``.

    ``bound``, ``gradient``, ``beta``, ``kl_term`` and ``penalty`` may be named as in Python:
    ``"renyi(0.5)"``, ``"score_function"``, ``"Linear(1000)"``, ``"mmd(10)"``.

    Raises:
        OptionError: an option has no such value.
        ObjectiveError: the combination is unsound.
    """
    values = {key: _named(key, value) for key, value in options.items()}
    return objectives()[name.replace("-", "_").lower()](**values)


def _named(key: str, value: Any) -> Any:
    """``"renyi(0.5)"`` as ``pvae.bounds.renyi(0.5)``: a name, or a call with plain values."""
    if key not in _NAMED or not isinstance(value, str):
        return value
    if key == "beta" and re.match(r"\s*[-+.\d]", value):
        return _number(value)
    module = importlib.import_module(f"pvae.{_NAMED[key]}")
    call = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", value)
    known = [
        name
        for name in module.__all__
        if (inspect.isclass(getattr(module, name)) if key == "beta" else name.islower())
    ]
    if call is None or call[1] not in known:
        number = "a number, or " if key == "beta" else ""
        raise OptionError(f"{key} takes no {value!r}: {number}{did_you_mean(value, known)}")
    found = getattr(module, call[1])
    if call[2] is None and not inspect.isfunction(found):
        return found
    try:
        tree = ast.parse(value.strip() + ("()" if call[2] is None else ""), mode="eval").body
        assert isinstance(tree, ast.Call)
        positional = [ast.literal_eval(node) for node in tree.args]
        named = {node.arg or "": ast.literal_eval(node.value) for node in tree.keywords}
        return found(*positional, **named)
    except (SyntaxError, ValueError, TypeError) as error:
        raise OptionError(f"{key} {value!r} cannot be built: {error}") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise OptionError(f"beta takes a number or a schedule, got {text!r}: try 4.0") from None


def optimizers() -> dict[str, str]:
    """Name -> first docstring line of the optimisers of ``torch.optim`` that ``fit`` takes."""
    import torch

    found = {}
    for name, value in vars(torch.optim).items():
        if inspect.isclass(value) and issubclass(value, torch.optim.Optimizer):
            lines = (inspect.getdoc(value) or "").splitlines()
            found[name.lower()] = lines[0] if lines else ""
    for unfit in ("optimizer", "lbfgs", "sparseadam", "muon"):
        found.pop(unfit, None)
    return dict(sorted(found.items()))
