"""A recipe: an ordered composition of methods, from Python, a short string, YAML, or the Hugging Face Hub."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from foveate.core import hub, registry
from foveate.core.errors import FoveateError
from foveate.core.method import Method

NONE = "none"
"""How the empty recipe is written."""

FILE = "recipe.yaml"
"""A recipe's file in a repository on the Hub."""

SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Recipe:
    """Methods in the order in which they apply where they meet; ``Recipe()`` leaves the model as it is.

    >>> str(Recipe.parse("hiprune(keep=64) + fastv(layer=2, keep=0.5)"))
    'hiprune(keep=64) + fastv(layer=2, keep=0.5)'
    """

    methods: tuple[Method, ...] = ()

    @classmethod
    def of(cls, recipe: RecipeLike) -> Recipe:
        """A recipe from any of the forms that users write.

        Args:
            recipe: a `Recipe`; a method; text such as ``"hiprune(keep=64) + fastv"``; a path to a YAML file, as a `Path` or
                as text that ends in ``.yaml`` or ``.yml``; the name of a repository on the Hub, ``"user/name"``, with a
                ``recipe.yaml`` in it; what YAML gives for one method, ``{"hiprune": {"keep": 64}}``; or a list of any of
                these, in the order in which they apply.

        Raises:
            FoveateError: if it is none of these, or could be two.
        """
        if isinstance(recipe, Recipe):
            return recipe
        if isinstance(recipe, Method):
            return cls((recipe,))
        if isinstance(recipe, Path):
            return cls.load(recipe)
        if isinstance(recipe, str):
            return cls._read(recipe.strip())
        if isinstance(recipe, Mapping):
            if len(recipe) > 1:
                raise FoveateError(
                    f"recipe: a dict of {len(recipe)} names; write several methods as a list, as their order counts"
                )
            return cls((_from_yaml(dict(recipe)),))
        if isinstance(recipe, Sequence):
            return cls(tuple(method for part in recipe for method in cls.of(part).methods))
        if isinstance(recipe, type) and issubclass(recipe, Method):
            raise FoveateError(f"recipe={recipe.__name__}: is a class; make a method of it: {recipe.__name__}()")
        raise FoveateError(
            f"recipe={recipe!r}: must be a Recipe, a method, text such as 'hiprune(keep=64)', a path to YAML, a name on the "
            "Hub, a dict such as {'hiprune': {'keep': 64}}, or a list of these"
        )

    @classmethod
    def _read(cls, text: str) -> Recipe:
        if _is_file(text):
            return cls.load(text)
        if not hub.is_repo(text):
            return cls.parse(text)
        if Path(text).exists():
            raise FoveateError(
                f"recipe {text!r}: is a folder here and could be a name on the Hub; write {f'{text}/{FILE}'!r}, or "
                f"Recipe.from_hub({text!r})"
            )
        return cls.from_hub(text)

    @classmethod
    def parse(cls, text: str) -> Recipe:
        """From ``"name(parameter=value, ...) + name + ..."``; values are Python literals."""
        if text.strip() in ("", NONE):
            return cls()
        try:
            tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise FoveateError(
                f"recipe {text!r}: {error.msg} at character {error.offset or len(text)}; "
                'write it like "hiprune(keep=64) + fastv(layer=2, keep=0.5)"'
            ) from error
        return cls(tuple(_method(node, text) for node in _terms(tree)))

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """From a YAML file (see `to_yaml`)."""
        try:
            return cls.from_yaml(Path(path).read_text())
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a text file"
            raise FoveateError(f"recipe file {str(path)!r}: cannot be read ({reason})") from error

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """From a YAML list of ``name`` or ``name: {parameter: value}``."""
        try:
            content = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise FoveateError(f"recipe: not valid YAML ({' '.join(str(error).split())})") from error
        if content is None or content == NONE:
            return cls()
        if not isinstance(content, list):
            raise FoveateError("recipe: YAML must be a list such as '- hiprune: {keep: 64}'")
        return cls(tuple(_from_yaml(entry) for entry in content))

    @classmethod
    def from_hub(cls, repo: str, *, revision: str | None = None, token: str | bool | None = None) -> Recipe:
        """From ``recipe.yaml`` in a repository on the Hub.

        Args:
            repo: its name, ``"user/name"``.
            revision: branch, tag or commit; the main branch if None.
            token: of the Hub; the one that is logged in if None.

        Raises:
            FoveateError: if it cannot be fetched or is no recipe.
        """
        return cls.load(hub.fetch(repo, FILE, revision, token))

    def push_to_hub(self, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Write ``recipe.yaml`` into a repository on the Hub, with a card where it has none.

        Args:
            repo: its name, ``"user/name"``; it is made if it is not there.
            private: whether only you may see a repository that is made; the account's default if None.
            token: of the Hub; the one that is logged in if None.

        Returns:
            The address of the commit.

        Raises:
            FoveateError: if the Hub refuses or cannot be reached.
        """
        return hub.push(repo, {FILE: self.to_yaml().encode()}, _CARD.format(repo=repo), f"Recipe {self}", private, token)

    def to_yaml(self) -> str:
        """As YAML that `from_yaml` reads back to an equal recipe."""
        entries = [{m.name: _plain(m.parameters())} if m.parameters() else m.name for m in self.methods]
        text: str = yaml.safe_dump(entries, sort_keys=False, default_flow_style=None)
        return text

    def __str__(self) -> str:
        return " + ".join(map(str, self.methods)) or NONE


RecipeLike: TypeAlias = Recipe | Method | str | Path | Mapping[str, Any] | Sequence["RecipeLike"]
"""What `Recipe.of` takes."""

_CARD = """\
# A recipe for Foveate

`recipe.yaml` says which published methods shorten the work of a vision-language model, and with which parameters.

```python
import foveate

with foveate.attach(model, "{repo}"):
    out = model.generate(**inputs)
```
"""


def lies_elsewhere(text: str) -> bool:
    """Whether a text is no recipe but says where one is: a YAML file, or a repository on the Hub."""
    return _is_file(text) or hub.is_repo(text.strip())


def build(name: str, parameters: Mapping[str, Any]) -> Method:
    """The method ``name`` with ``parameters``, each checked."""
    kind = registry.get(name)
    known = {field.name: field for field in fields(kind)}
    for parameter in parameters:
        if parameter not in known:
            close = difflib.get_close_matches(str(parameter), known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"it has: {', '.join(known) or 'no parameters'}"
            raise FoveateError(f"{name}: unknown parameter {parameter!r}: {hint}")
    try:
        return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items()})
    except TypeError as error:
        raise FoveateError(f"{name}: {error}") from error


def _is_file(text: str) -> bool:
    return text.strip().lower().endswith(SUFFIXES)


def _terms(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return [*_terms(node.left), *_terms(node.right)]
    return [node]


def _method(node: ast.expr, text: str) -> Method:
    if isinstance(node, ast.Name):
        return build(node.id, {})
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        raise FoveateError(f"recipe {text!r}: {ast.unparse(node)!r} is no method; join methods with '+'")
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise FoveateError(
            f"{node.func.id}: parameters need names, as in 'keep={ast.unparse(node.args[0])}'"
            if node.args
            else f"{node.func.id}: '**' is not understood"
        )
    parameters: dict[str, Any] = {}
    for keyword in node.keywords:
        parameter = str(keyword.arg)
        if parameter in parameters:
            raise FoveateError(f"{node.func.id}: {parameter} is given twice")
        parameters[parameter] = _literal(node.func.id, parameter, keyword.value)
    return build(node.func.id, parameters)


def _literal(method: str, parameter: str, node: ast.expr) -> Any:
    if isinstance(node, ast.Name):  # an unquoted word
        return node.id
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise FoveateError(f"{method}: {parameter}={ast.unparse(node)}: must be a number, a word or a tuple") from error


def _from_yaml(entry: Any) -> Method:
    if isinstance(entry, str):
        return build(entry, {})
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, parameters),) = entry.items()
        if isinstance(parameters, dict | None):
            return build(str(name), parameters or {})
    raise FoveateError(f"recipe: {entry!r} is no method; write '- name' or '- name: {{parameter: value}}'")


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in parameters.items()}
