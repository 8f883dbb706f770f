"""Reads YAML files into msgspec structs and reports every fault in one pass.

Each fault names file, line, key, the value (never that of a secret) and what is allowed instead. A struct
field may carry `Parse(function)` in `Annotated` where YAML holds another notation than the field's type; a
struct's `__post_init__` may raise `BadField` or `ValueError` to check keys against each other.
"""

import difflib
import enum
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union

import msgspec
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from aitbc_miner.util.yamltext import (
    NO_TAGS,
    YamlTextError,
    compose,
    construct_scalar,
    empty_mapping,
    read_text,
)

T = TypeVar("T")

ENV_PREFIX = "AITBC_MINER_"
_BAD = object()
_NULL = "tag:yaml.org,2002:null"
_TEXT = "tag:yaml.org,2002:str"
_SECRET_NAME = re.compile(r"token|secret|passw|passphrase|credential|key", re.IGNORECASE)
_SOURCE = re.compile(r"(env|file|credential):\S+")


class Fault(msgspec.Struct, frozen=True):
    """One thing wrong with a file; `file` is the name of the variable that overrode its value, if one did."""

    file: str
    line: int | None
    key: str
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        text = ": ".join(part for part in (place, self.key, self.message) if part)
        # What is wrong with a file may be what is in it.
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class Parse(NamedTuple):
    """Marks a field whose YAML value is read by `function`, which raises ValueError("must be ...")."""

    function: Callable[[object], object]


class BadField(ValueError):  # noqa: N818  # says what it names: a field, not a failure of ours
    """Raised by `__post_init__` when one field contradicts the others, so that the fault names its line."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def read_document(
    path: Path, type_: type[T], faults: list[Fault], *, env_overrides: Mapping[str, str] | None = None
) -> T | None:
    """Read a YAML file as `type_`; append what is wrong to `faults` and then return None.

    Variables of `env_overrides` called AITBC_MINER_<SECTION>__<KEY> take the place of the file's values;
    others without that prefix are ignored, so the whole environment may be given.
    """
    try:
        text = read_text(path)
    except YamlTextError as error:
        faults.append(Fault(str(path), None, "", error.message))
        return None
    return _decode(text, type_, faults, str(path), env_overrides or {})


def decode_text(text: str, type_: type[T], faults: list[Fault], *, file: str) -> T | None:
    """Read YAML text as `type_`, as `read_document` does; `file` is the name that faults give."""
    return _decode(text, type_, faults, file, {})


def _decode(
    text: str, type_: type[T], faults: list[Fault], file: str, environ: Mapping[str, str]
) -> T | None:
    try:
        root = compose(text, file)
    except YamlTextError as error:
        faults.append(Fault(file, error.line, "", error.message))
        return None
    before = len(faults)
    walk = _Walk(faults)
    walk.override(root, type_, environ)
    result = walk.value(root, type_, "")
    return typing.cast("T", result) if len(faults) == before else None


def _arguments(type_: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type itself."""
    if typing.get_origin(type_) in {Union, types.UnionType}:
        return typing.get_args(type_)
    return (type_,)


def _bare(type_: Any) -> Any:
    return typing.get_args(type_)[0] if typing.get_origin(type_) is Annotated else type_


def _is_struct(type_: Any) -> bool:
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


def _node_kind(type_: Any) -> type[Node]:
    """Say which kind of YAML node a type is written as."""
    bare = _bare(type_)
    if any(isinstance(extra, Parse) for extra in typing.get_args(type_)):
        return ScalarNode
    if _is_struct(bare) or typing.get_origin(bare) is dict or bare is dict:
        return MappingNode
    if (typing.get_origin(bare) or bare) in {list, tuple, set, frozenset}:
        return SequenceNode
    return ScalarNode


def _parser(type_: Any) -> Callable[[object], object] | None:
    own = next((extra.function for extra in typing.get_args(type_) if isinstance(extra, Parse)), None)
    return absolute_path if own is None and _bare(type_) is Path else own


def absolute_path(value: object) -> Path:
    """Read an absolute path; raises ValueError otherwise."""
    if not isinstance(value, str) or not value.startswith("/") or "\0" in value:
        raise ValueError("must be an absolute path, such as /var/lib/aitbc")
    return Path(value)


def describe(type_: Any) -> str:
    """Say in words what a type allows, to be put after "must be"."""
    members = [member for member in _arguments(type_) if member is not types.NoneType]
    if len(members) < len(_arguments(type_)):
        return " or ".join([*map(describe, members), "null"])
    if len(members) > 1:
        return " or ".join(map(describe, members))
    bare = _bare(type_)
    if typing.get_origin(bare) is Literal:
        return _one_of(typing.get_args(bare))
    if isinstance(bare, type) and issubclass(bare, enum.Enum):
        return _one_of([member.value for member in bare])
    if _node_kind(type_) is not ScalarNode:
        return "a mapping of keys to values" if _node_kind(type_) is MappingNode else "a list"
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
    metas = [extra for extra in typing.get_args(type_) if isinstance(extra, msgspec.Meta)]
    if described := [meta.description for meta in metas if meta.description]:
        return described[0]
    limits = [limit for meta in metas for limit in _limits(meta)]
    return " ".join([words.get(bare, getattr(bare, "__name__", str(bare))), " and ".join(limits)]).strip()


def _one_of(values: typing.Iterable[object]) -> str:
    options = [str(value) for value in values]
    return options[0] if len(options) == 1 else f"one of {', '.join(options)}"


def _limits(meta: msgspec.Meta) -> Iterator[str]:
    words = {
        "ge": "of at least",
        "gt": "above",
        "le": "at most",
        "lt": "below",
        "min_length": "of length at least",
        "max_length": "of length at most",
        "pattern": "that matches",
    }
    for name, word in words.items():
        if (limit := getattr(meta, name)) is not None:
            yield f"{word} {limit}"


class _Walk:
    """One pass over a node tree; `value` returns `_BAD` for whatever it has already reported."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults

    def fault(self, node: Node, key: str, message: str) -> object:
        mark = node.start_mark
        line = None if mark.name.startswith(ENV_PREFIX) else mark.line + 1
        self.faults.append(Fault(mark.name, line, key, message))
        return _BAD

    def value(self, node: Node, type_: Any, key: str) -> object:
        members = _arguments(type_)
        if node.tag == _NULL and types.NoneType in members:
            return None
        if isinstance(node, MappingNode | SequenceNode) and not node.tag.endswith((":map", ":seq")):
            return self.fault(node, key, NO_TAGS)
        if _bare(type_) is Any and not isinstance(node, ScalarNode):
            members = (dict[str, Any] if isinstance(node, MappingNode) else list[Any],)
        members = tuple(member for member in members if member is not types.NoneType)
        if node.tag == _NULL and len(members) == 1 and _is_struct(_bare(members[0])):
            # "section:" with all its keys commented out means its defaults.
            node = empty_mapping(node.start_mark)
        fitting = [member for member in members if _node_kind(member) is type(node)]
        if not fitting:
            return self.fault(node, key, f"is {_kind(node)}; {_allowed(type_)}")
        if not isinstance(node, MappingNode | SequenceNode):
            return self._scalar(node, Union[tuple(fitting)], type_, key)  # noqa: UP007  # built at run time
        chosen = fitting[0]
        result = self._container(node, _bare(chosen), key)
        return result if result is _BAD else self._sized(node, chosen, result, key)

    def _container(self, node: MappingNode | SequenceNode, bare: Any, key: str) -> object:
        if isinstance(node, SequenceNode):
            return self._list(node, bare, key)
        return self._struct(node, bare, key) if _is_struct(bare) else self._dict(node, bare, key)

    def _sized(self, node: Node, type_: Any, value: Any, key: str) -> object:
        for extra in typing.get_args(type_) if typing.get_origin(type_) is Annotated else ():
            if isinstance(extra, msgspec.Meta):
                low, high = extra.min_length or 0, extra.max_length
                if len(value) < low or (high is not None and len(value) > high):
                    limits = " and ".join(_limits(extra))
                    return self.fault(node, key, f"has {len(value)} entries; must be {limits}")
        return value

    def _scalar(self, node: Node, type_: Any, declared: Any, key: str) -> object:
        try:
            # YAML takes a bare `off` for false, but where `off` is one of the choices it is meant as such.
            chosen = typing.get_origin(type_) is Literal and node.value in typing.get_args(type_)
            value = node.value if chosen else construct_scalar(node)
        except YamlTextError as error:
            return self.fault(node, key, error.message)
        try:
            if parse := _parser(type_):
                return parse(value)
            # NaN passes every range check, because it compares as neither less nor more.
            finite = not isinstance(value, float) or math.isfinite(value)
            return msgspec.convert(value if finite else None, type_)
        except msgspec.ValidationError:
            hint = "; put it in quotes" if describe(type_) == "text" and value is not None else ""
            return self.fault(node, key, f"is {_shown(node, key)}; must be {describe(declared)}{hint}")
        except ValueError as error:
            return self.fault(node, key, f"is {_shown(node, key)}; {error}")

    def _list(self, node: SequenceNode, bare: Any, key: str) -> object:
        element = (typing.get_args(bare) or (Any,))[0]
        values = [self.value(child, element, f"{key}[{i}]") for i, child in enumerate(node.value)]
        if any(value is _BAD for value in values):
            return _BAD
        return (typing.get_origin(bare) or bare)(values)

    def _dict(self, node: MappingNode, bare: Any, key: str) -> object:
        key_type, type_ = typing.get_args(bare) or (str, Any)
        result = {}
        good = True
        for name, key_node, child in self._pairs(node, key):
            here = _join(key, name)
            value = self.value(child, type_, here)
            known = self._scalar(ScalarNode(_TEXT, name, key_node.start_mark), key_type, key_type, here)
            good = good and value is not _BAD and known is not _BAD
            result[known] = value
        return result if good else _BAD

    def _struct(self, node: MappingNode, struct: type[msgspec.Struct], key: str) -> object:
        fields = {field.encode_name: field for field in msgspec.structs.fields(struct)}
        values: dict[str, Any] = {}
        places: dict[str, Node] = {}
        for name, key_node, child in self._pairs(node, key):
            if field := fields.get(name):
                values[field.name] = self.value(child, field.type, _join(key, name))
                places[field.name] = child
            else:
                self.fault(key_node, _join(key, name), f"unknown key; {_nearest(name, fields)}")
        for name, field in fields.items():
            if field.required and field.name not in values:
                message = f"this key is missing; {_allowed(field.type)}"
                values[field.name] = self.fault(node, _join(key, name), message)
        if any(value is _BAD for value in values.values()):
            return _BAD
        try:
            return struct(**values)
        except BadField as error:
            return self.fault(places.get(error.field, node), _join(key, error.field), str(error))
        except ValueError as error:
            return self.fault(node, key, str(error))

    def _pairs(self, node: MappingNode, key: str) -> Iterator[tuple[str, Node, Node]]:
        seen: dict[str, int] = {}
        for key_node, child in node.value:
            if not isinstance(key_node, ScalarNode):
                self.fault(key_node, key, f"has {_kind(key_node)} for a key; must be plain text")
            elif (name := key_node.value) in seen:
                message = f"this key is here twice, first in line {seen[name]}; remove one of them"
                self.fault(key_node, _join(key, name), message)
            else:
                seen[name] = key_node.start_mark.line + 1
                yield name, key_node, child

    def override(self, root: Node, type_: Any, environ: Mapping[str, str]) -> None:
        """Put the values of AITBC_MINER_<SECTION>__<KEY> into the tree, where `value` then judges them."""
        given = {name: text for name, text in environ.items() if name.startswith(ENV_PREFIX)}
        known = {ENV_PREFIX + "__".join(path).upper(): path for path in _paths(type_)} if given else {}
        for variable, text in sorted(given.items()):
            if variable not in known:
                message = f"unknown variable; {_nearest(variable, known)}"
                self.faults.append(Fault(variable, None, "", message))
                continue
            try:
                node = compose(text, variable)
            except YamlTextError as error:
                self.faults.append(Fault(variable, None, ".".join(known[variable]), error.message))
            else:
                _graft(root, known[variable], node)


def _paths(type_: Any) -> Iterator[tuple[str, ...]]:
    for field in msgspec.structs.fields(type_):
        bare = _bare(field.type)
        if _is_struct(bare):
            yield from ((field.encode_name, *rest) for rest in _paths(bare))
        else:
            yield (field.encode_name,)


def _graft(node: Node, path: tuple[str, ...], value: Node) -> None:
    for depth, name in enumerate(path):
        if not isinstance(node, MappingNode):
            return  # the walk reports that this section is no mapping
        pairs = node.value
        at = next((i for i, (key, _) in enumerate(pairs) if key.value == name), len(pairs))
        known = pairs[at] if at < len(pairs) else (None, None)
        key = known[0] or ScalarNode(_TEXT, name, value.start_mark, value.end_mark)
        if depth == len(path) - 1:
            child = value
        elif known[1] is None or known[1].tag == _NULL:
            child = empty_mapping(node.start_mark)
        else:
            child = known[1]
        pairs[at : at + 1] = [(key, child)]
        node = child


def _nearest(name: str, known: typing.Iterable[str]) -> str:
    options = sorted(known)
    if near := difflib.get_close_matches(name, options, n=1):
        return f"did you mean {near[0]}?"
    if len(options) > 24:
        return "remove it"
    return f"must be {_one_of(options)}"


def _join(key: str, name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,80}", name):
        return f"{key}[{name[:80]!r}]"
    return f"{key}.{name}" if key else name


def _kind(node: Node) -> str:
    if node.tag == _NULL:
        return "null"
    if isinstance(node, ScalarNode):
        return "a single value"
    return "a mapping" if isinstance(node, MappingNode) else "a list"


def _allowed(type_: Any) -> str:
    if parse := _parser(_arguments(type_)[0]):
        try:
            parse(object())  # what none accepts, so that it says what it does accept
        except ValueError as error:
            return str(error)
    return f"must be {describe(type_)}"


def _shown(node: Node, key: str) -> str:
    """Return the value as it is written in the file, or "(hidden)" where it may be a secret."""
    if node.tag == _NULL:
        return "null"
    if _SECRET_NAME.search(key) and not _SOURCE.fullmatch(node.value):
        return "(hidden)"
    text: str = node.value if len(node.value) <= 80 else node.value[:77] + "..."
    text = re.sub(r"//[^/\s]*@", "//(hidden)@", text)
    return repr(text) if node.tag == _TEXT else text
