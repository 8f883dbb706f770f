"""Parses YAML text into a tree of nodes with line numbers, and refuses the dangerous parts of YAML."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

MAX_BYTES = 1024 * 1024
NO_TAGS = "has a tag (!name), and tags are not accepted; remove the tag"
_MAX_DEPTH = 40
# PyYAML reads 1:0:0 as a number to the base 60, in time that grows with the square of its length.
_MAX_NUMBER = 100
_TAG = "tag:yaml.org,2002:"
_TEXT_TAGS = {_TAG + name for name in ("str", "timestamp", "merge", "value")}
_PLAIN_TAGS = {_TAG + name for name in ("null", "bool", "int", "float")}


class YamlTextError(ValueError):
    """The text is not accepted as YAML; `line` counts from 1."""

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.line = line


class _Loader(yaml.SafeLoader):
    """Refuses aliases, because a few lines of aliases can grow into gigabytes, and endless nesting."""

    depth = 0

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        event: yaml.Event = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1 if event.start_mark else None
        if isinstance(event, yaml.AliasEvent):
            raise YamlTextError("aliases (*name) are not accepted; write the value out", line)
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise YamlTextError(f"is nested more than {_MAX_DEPTH} levels deep", line)
        node = super().compose_node(parent, index)
        self.depth -= 1
        if isinstance(node, ScalarNode) and not encodes(node.value):
            raise YamlTextError("has half a character (\\ud800 to \\udfff); remove the character", line)
        return node


def encodes(text: str) -> bool:
    """Whether a text has no half characters (surrogates), which stand for bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_text(path: Path) -> str:
    """Give the text of a regular file, cut shortly after the size that `compose` accepts.

    Raises:
        YamlTextError: the file does not exist, cannot be read, is not a regular file, or is not UTF-8.
    """
    try:
        # Opening a FIFO would wait for its writer.
        if path.exists() and not path.is_file():
            raise YamlTextError("cannot read this path: it is not a regular file")
        with path.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        # The cut may split a character: the error must be "too large", not "bad UTF-8".
        return content.decode(errors="strict" if len(content) <= MAX_BYTES else "replace")
    except OSError as error:
        remedy = "; use sudo, or let this user read it" if isinstance(error, PermissionError) else ""
        raise YamlTextError(f"cannot read this file: {error.strerror}{remedy}") from None
    except UnicodeDecodeError as error:
        raise YamlTextError(f"cannot read this file: byte {error.start} is not UTF-8") from None


def compose(text: str, name: str) -> Node:
    """Parse one YAML document; an empty document is an empty mapping. Every node's mark has `name`.

    Raises:
        YamlTextError: the text is too large, not YAML, two documents, has aliases or too much nesting.
    """
    # An environment variable may hold bytes that are not UTF-8; the loader refuses them.
    if len(text.encode(errors="surrogatepass")) > MAX_BYTES:
        raise YamlTextError(f"is larger than {MAX_BYTES} bytes")
    try:
        loader = _Loader(text)
        loader.name = name
        node = loader.get_single_node()
        mark = loader.get_mark()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlTextError("contains a control character; remove the character", line) from None
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        raise YamlTextError(_problem(error), place.line + 1 if place else None) from None
    except YamlTextError:
        raise
    except (ValueError, OverflowError):
        # PyYAML raises these for an escape such as "\U99999999" or a %YAML version of thousands of digits.
        line = loader.get_mark().line + 1
        raise YamlTextError("is not valid YAML: has a number that is too large", line) from None
    if node is None or node.tag == _TAG + "null":
        mark.line = 0
        return empty_mapping(mark)
    return node


def empty_mapping(mark: yaml.Mark) -> MappingNode:
    """Give a mapping without keys, at the place `mark`."""
    return MappingNode(_TAG + "map", [], mark, mark)


def line_of(path: Path, steps: Sequence[str | int]) -> int | None:
    """Follow `steps` (keys and indices) and give the line of the value, or of the last existing step."""
    try:
        node = compose(read_text(path), str(path))
    except YamlTextError:
        return None
    for step in steps:
        children: dict[str | int, Node] = {}
        if isinstance(node, MappingNode):
            children = {key.value: child for key, child in node.value if isinstance(key, ScalarNode)}
        elif isinstance(node, SequenceNode):
            children = dict(enumerate(node.value))
        if step not in children:
            break
        node = children[step]
    return node.start_mark.line + 1


def _problem(error: yaml.MarkedYAMLError) -> str:
    if "but found another document" in (error.problem or ""):
        return "holds more than one YAML document; keep one"
    if r"'\t'" in (error.problem or ""):
        return "is indented with a tab; use spaces"
    # The parser may quote a piece of a secret from the file.
    problem = re.sub(r"'[^']*'|\"[^\"]*\"", _unless_text, error.problem or "cannot be read")
    return f"is not valid YAML: {problem}"


def _unless_text(match: re.Match[str]) -> str:
    """Keep quotes of the grammar (',' or '<stream end>'); replace quotes of the file with "this"."""
    inside = match[0][1:-1]
    return match[0] if len(inside) < 4 or re.fullmatch(r"<[a-z -]+>", inside) else "this"


def resolve_scalar(node: ScalarNode) -> ScalarNode:
    """Give a scalar the tag of its text without quotes."""
    tag = yaml.SafeLoader("").resolve(ScalarNode, node.value, (True, False))  # type: ignore[no-untyped-call]
    return ScalarNode(tag, node.value, node.start_mark, node.end_mark)


def construct_scalar(node: Node) -> str | int | float | bool | None:
    """Give the value of a scalar node; dates are text.

    Raises:
        YamlTextError: the value has a custom tag, or does not fit its tag.
    """
    if node.tag in _TEXT_TAGS:
        return str(node.value)
    if node.tag not in _PLAIN_TAGS:
        raise YamlTextError(NO_TAGS)
    try:
        if len(node.value) > _MAX_NUMBER:
            raise ValueError  # noqa: TRY301  # like Python at its own limit
        value: str | int | float | bool | None = yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, LookupError, OverflowError):
        raise YamlTextError("does not fit its tag, or has too many digits") from None
    return value
