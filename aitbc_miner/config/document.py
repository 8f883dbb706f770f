"""Reads YAML files into msgspec structs and reports every fault in one pass.

Each fault names file, line, key, value (hidden for secrets) and the allowed values. A struct field may carry
`Parse(function)` in `Annotated` if its YAML notation differs from its type. A struct's `__post_init__` may
raise `BadField` or `ValueError` to check keys against each other.
"""

import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union

import msgspec
from msgspec.structs import FieldInfo
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from aitbc_miner.config.yaml_text import (
    NO_TAGS,
    YamlTextError,
    compose,
    construct_scalar,
    empty_mapping,
    encodes,
    read_text,
    resolve_scalar,
)
from aitbc_miner.config.yaml_types import (
    Parse,
    absolute_path,
    allowed,
    bare_type,
    describe_type,
    is_struct,
    limits_of,
    members_of,
    nearest,
    node_kind,
    parser_of,
)
from aitbc_miner.util.trust import refusal

__all__ = ["BadField", "Fault", "Parse", "absolute_path", "decode_text", "describe_type", "read_document"]

T = TypeVar("T")

ENV_PREFIX = "AITBC_MINER_"
_BAD = object()
_NULL = "tag:yaml.org,2002:null"
_TEXT = "tag:yaml.org,2002:str"
_SECRET_NAME = re.compile(r"token|secret|passw|passphrase|credential|key", re.IGNORECASE)
_SOURCE = re.compile(r"(env|file|credential):\S+")


class Fault(msgspec.Struct, frozen=True):
    """A mistake in a file of the operator, or in the variable that overrides a value; `file` names either."""

    file: str
    line: int | None
    key: str
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        text = ": ".join(part for part in (place, self.key, self.message) if part)
        # The message may quote unprintable characters of the file.
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


class BadField(ValueError):  # noqa: N818  # named after the field
    """Raised by `__post_init__` for a field that contradicts others, so that the fault names its line."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


def read_document(
    path: Path, type_: type[T], faults: list[Fault], *, env_overrides: Mapping[str, str] | None = None
) -> T | None:
    """Read a YAML file as `type_`; if the file has faults, append them to `faults` and return None.

    A file that other users could change is a fault: these files decide what root and jobs do. Variables of
    `env_overrides` called AITBC_MINER_<SECTION>__<KEY> override the file's values. Variables without the
    prefix are ignored, so the caller may pass the whole environment.
    """
    try:
        text = read_text(path)
    except YamlTextError as error:
        faults.append(Fault(str(path), None, "", error.message))
        return None
    if untrusted := refusal(path):
        faults.append(Fault(str(path), None, "", untrusted))
        return None
    return decode_text(text, type_, faults, file=str(path), environ=env_overrides)


def decode_text(
    text: str, type_: type[T], faults: list[Fault], *, file: str, environ: Mapping[str, str] | None = None
) -> T | None:
    """Read YAML text as `type_`, like `read_document`; faults name `file`."""
    try:
        root = compose(text, file)
    except YamlTextError as error:
        faults.append(Fault(file, error.line, "", error.message))
        return None
    before = len(faults)
    walk = _Walk(faults)
    walk.override(root, type_, environ or {})
    result = walk.value(root, type_, "")
    return typing.cast("T", result) if len(faults) == before else None


class _Walk:
    """One pass over a node tree; `value` returns `_BAD` for a value whose fault is in `faults`."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults = faults

    def fault(self, node: Node, key: str, message: str) -> object:
        mark = node.start_mark
        line = None if mark.name.startswith(ENV_PREFIX) else mark.line + 1
        self.faults.append(Fault(mark.name, line, key, message))
        return _BAD

    def value(self, node: Node, type_: Any, key: str) -> object:
        members = members_of(type_)
        if node.tag == _NULL and types.NoneType in members:
            return None
        if isinstance(node, MappingNode | SequenceNode) and not node.tag.endswith((":map", ":seq")):
            return self.fault(node, key, NO_TAGS)
        if bare_type(type_) is Any and not isinstance(node, ScalarNode):
            members = (dict[str, Any] if isinstance(node, MappingNode) else list[Any],)
        members = tuple(member for member in members if member is not types.NoneType)
        listed = key.endswith("]")
        if node.tag == _NULL and len(members) == 1 and is_struct(bare_type(members[0])) and not listed:
            # "section:" with all keys commented out means the defaults; a dash without a value does not.
            node = empty_mapping(node.start_mark)
        fitting = [member for member in members if node_kind(member) is type(node)]
        if not fitting:
            return self.fault(node, key, f"is {_kind(node)}; {allowed(type_)}")
        if not isinstance(node, MappingNode | SequenceNode):
            return self._scalar(node, Union[tuple(fitting)], type_, key)  # noqa: UP007  # built at run time
        chosen = fitting[0]
        result = self._container(node, bare_type(chosen), key)
        return result if result is _BAD else self._sized(node, chosen, result, key)

    def _container(self, node: MappingNode | SequenceNode, bare: Any, key: str) -> object:
        if isinstance(node, SequenceNode):
            return self._list(node, bare, key)
        return self._struct(node, bare, key) if is_struct(bare) else self._dict(node, bare, key)

    def _sized(self, node: Node, type_: Any, value: Any, key: str) -> object:
        for extra in typing.get_args(type_) if typing.get_origin(type_) is Annotated else ():
            if isinstance(extra, msgspec.Meta):
                low, high = extra.min_length or 0, extra.max_length
                if len(value) < low or (high is not None and len(value) > high):
                    limits = " and ".join(limits_of(extra))
                    return self.fault(node, key, f"has {len(value)} entries; must be {limits}")
        return value

    def _scalar(self, node: Node, type_: Any, declared: Any, key: str) -> object:
        try:
            # YAML reads a bare `off` as false; if `off` is one of the choices, the operator means the choice.
            chosen = typing.get_origin(type_) is Literal and node.value in typing.get_args(type_)
            value = node.value if chosen else construct_scalar(node)
        except YamlTextError as error:
            return self.fault(node, key, error.message)
        try:
            if parse := parser_of(type_):
                return parse(value)
            # NaN would pass every range check.
            finite = not isinstance(value, float) or math.isfinite(value)
            return msgspec.convert(value if finite else None, type_)
        except msgspec.ValidationError:
            hint = "; put it in quotes" if describe_type(type_) == "text" and value is not None else ""
            return self.fault(node, key, f"is {_shown(node, key)}; must be {describe_type(declared)}{hint}")
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
                self.fault(key_node, _join(key, name), f"unknown key; {nearest(name, fields)}")
        for name, field in fields.items():
            if field.required and field.name not in values:
                message = f"this key is missing; {allowed(field.type)}"
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
                message = f"duplicate key, first in line {seen[name]}; remove one of the two"
                self.fault(key_node, _join(key, name), message)
            else:
                seen[name] = key_node.start_mark.line + 1
                yield name, key_node, child

    def override(self, root: Node, type_: Any, environ: Mapping[str, str]) -> None:
        """Put the values of AITBC_MINER_<SECTION>__<KEY> into the tree; `value` then checks them."""
        given = {name: text for name, text in environ.items() if name.startswith(ENV_PREFIX)}
        known = {ENV_PREFIX + "__".join(path).upper(): (path, field) for path, field in _paths(type_)}
        for variable, text in sorted(given.items()):
            if variable not in known:
                message = f"unknown variable; {nearest(variable, known)}"
                self.faults.append(Fault(variable, None, "", message))
                continue
            path, field = known[variable]
            try:
                node = _given(text, field, variable)
            except YamlTextError as error:
                self.faults.append(Fault(variable, None, ".".join(path), error.message))
                continue
            if node is None and field.required:
                message = f"is empty, and this key has no default; {allowed(field.type)}"
                self.faults.append(Fault(variable, None, ".".join(path), message))
            else:
                _graft(root, path, node)


def _given(text: str, field: FieldInfo, variable: str) -> Node | None:
    """Read a variable: as YAML for a list or mapping, else as plain text. None means the key's default."""
    members = members_of(field.type)
    plain = text.strip()
    if not plain or (plain == "null" and types.NoneType not in members):
        return None
    mark = compose("", variable).start_mark
    if plain == "null":
        return ScalarNode(_NULL, plain, mark, mark)
    if any(node_kind(member) is not ScalarNode for member in members):
        return compose(text, variable)
    if not encodes(text):
        raise YamlTextError("is not valid UTF-8")
    words = any(_is_text(member) for member in members)
    scalar = ScalarNode(_TEXT, text if words else plain, mark, mark)
    return scalar if words else resolve_scalar(scalar)


def _is_text(type_: Any) -> bool:
    """Whether a value is taken as written, even if the text looks like a number or a truth value."""
    bare = bare_type(type_)
    return bare is str or parser_of(type_) is not None or typing.get_origin(bare) is Literal


def _paths(type_: Any) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    for field in msgspec.structs.fields(type_):
        bare = bare_type(field.type)
        if is_struct(bare):
            yield from (((field.encode_name, *path), leaf) for path, leaf in _paths(bare))
        else:
            yield (field.encode_name,), field


def _graft(node: Node, path: tuple[str, ...], value: Node | None) -> None:
    """Put a value into the tree; None removes the present value, so that the default applies."""
    for depth, name in enumerate(path):
        if not isinstance(node, MappingNode):
            return  # `value` reports that the section is no mapping
        pairs = node.value
        at = next((i for i, (key, _) in enumerate(pairs) if key.value == name), len(pairs))
        known = pairs[at] if at < len(pairs) else (None, None)
        mark = node.start_mark if value is None else value.start_mark
        key = known[0] or ScalarNode(_TEXT, name, mark, mark)
        if depth == len(path) - 1:
            pairs[at : at + 1] = [] if value is None else [(key, value)]
            return
        if known[1] is None or known[1].tag == _NULL:
            pairs[at : at + 1] = [(key, empty_mapping(node.start_mark))]
        node = pairs[at][1]


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


def _shown(node: Node, key: str) -> str:
    """Give the value as written in the file, or "(hidden)" if the value may be a secret."""
    if node.tag == _NULL:
        return "null"
    if _SECRET_NAME.search(key) and not _SOURCE.fullmatch(node.value):
        return "(hidden)"
    text: str = node.value if len(node.value) <= 80 else node.value[:77] + "..."
    text = re.sub(r"//[^/\s]*@", "//(hidden)@", text)
    return repr(text) if node.tag == _TEXT else text
