"""Services: make manifests from the payloads of an AITBC coordinator, one file of services.d for each kind.

A payload names no program. A service lists the fields that it accepts, their types and sizes, their places in
the manifest, and the members of the result for the client. A field fills only the places that the service has
for it, as one argument or one parameter, and never adds a further argument.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from aitbc_miner.allowlist.patterns import Pattern, parse_pattern
from aitbc_miner.config.document import BadField, Fault, Parse, read_document
from aitbc_miner.config.dropins import drop_ins, stamp_of
from aitbc_miner.config.yaml_text import line_of
from aitbc_miner.coordinator.service_result import RESERVED, Source
from aitbc_miner.errors import ErrorCode, brief
from aitbc_miner.jobs import ArtifactSpec, ManifestError, Requirements, RetryPolicy

_PLACE = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")

ServiceName = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}\Z", description="a name of A-Z a-z 0-9 . _ -")
]
FieldName = Annotated[
    str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,63}\Z", description="the name of a field of the payload")
]
ServiceText = Annotated[str, Meta(max_length=4096)]


class ServiceError(ManifestError):
    """No service matches the job (E_DENY), or the payload does not fit its service (E_MANIFEST)."""


class Match(Struct, frozen=True):
    """The payloads of a service: by `type`, by `service_type`, or without a type by all fields of `when`."""

    types: tuple[ServiceText, ...] = ()
    service_types: tuple[ServiceText, ...] = ()
    when: tuple[FieldName, ...] = ()


class Field(Struct, frozen=True):
    """A field of the payload. `max_bytes` bounds its text or JSON; `min` and `max` bound numbers."""

    type: Literal["text", "url", "int", "number", "bool", "choice", "json"] = "text"
    required: bool = False
    default: Any = None
    aliases: tuple[FieldName, ...] = ()
    max_bytes: Annotated[int, Meta(ge=1, le=16 << 20)] = 4096
    min: float | None = None
    max: float | None = None
    values: tuple[ServiceText, ...] = ()
    pattern: Annotated[Any, Parse(parse_pattern)] = None

    def __post_init__(self) -> None:
        if self.type == "choice" and not self.values:
            raise BadField("type", "is choice, but the field has no `values`; add `values`")
        if self.required and self.default is not None:
            raise BadField("default", "has no effect, because the field is required; remove it")

    @property
    def always_there(self) -> bool:
        """Whether the field has a value in each job."""
        return self.required or self.default is not None


class Run(Struct, frozen=True):
    """The program of a service: a command of the allowlist with arguments, or a task with parameters.

    If a job lacks a field, the manifest omits the parameter, or the whole list of arguments, with this field.
    """

    command: ServiceText | None = None
    args: list[ServiceText | list[ServiceText]] = []
    task: ServiceText | None = None
    params: dict[FieldName, Any] = {}

    def __post_init__(self) -> None:
        if (self.command is None) == (self.task is None):
            raise ValueError("needs either `command`, with `args`, or `task`, with `params`")
        if self.task is None and self.params:
            raise BadField("params", "is only for tasks; a command takes `args`")
        if self.command is None and self.args:
            raise BadField("args", "is only for commands; a task takes `params`")


class Input(Struct, frozen=True):
    """A file to fetch before the program starts. The service and not the URL chooses the file's name."""

    url: ServiceText
    name: ServiceName
    max_mb: Annotated[float, Meta(gt=0)] | None = None


class Service(Struct, frozen=True):
    """One file of services.d.

    The node announces `models` to the coordinator. The result contains files of up to `inline_kb` KiB.
    """

    name: ServiceName = msgspec.field(name="service")
    match: Match
    run: Run
    fields: dict[FieldName, Field] = {}
    inputs: list[Input] = []
    requirements: Requirements = Requirements()
    timeout_s: Annotated[float, Meta(gt=0, le=31_536_000)] | None = None
    artifacts: list[ArtifactSpec] = []
    env: dict[str, ServiceText] = {}
    egress: Literal["none", "open"] | None = None
    retry: RetryPolicy = RetryPolicy(3, [ErrorCode.E_LOST])
    models: tuple[ServiceText, ...] = ()
    result: dict[FieldName, Source] = {}
    inline_kb: Annotated[int, Meta(ge=0, le=4096)] = 1024

    def __post_init__(self) -> None:
        for key, template, whole in self._templates():
            for field in _fields_in(key, template):
                if field not in self.fields:
                    raise BadField(key, f"uses {{{field}}}, but `fields` does not define it")
                if whole and not self.fields[field].always_there:
                    remedy = "add `default` or `required: true`, or put the argument into a list of its own"
                    raise BadField(key, f"needs {{{field}}}, but jobs may omit this field; {remedy}")
        for name in self.result:
            if name in RESERVED:
                raise BadField("result", f"has {name!r}, a name that coordinator or node reserve; rename it")
        if not (self.match.types or self.match.service_types or self.match.when):
            raise BadField("match", "needs `types`, `service_types` or `when`")

    def _templates(self) -> Iterator[tuple[str, Any, bool]]:
        """Yield the texts with places for fields: key, text, and whether the text needs all its fields."""
        for arg in self.run.args:
            yield "run", arg, isinstance(arg, str)
        yield "run", list(self.run.params.values()), False
        yield "inputs", [one.url for one in self.inputs], False
        yield "artifacts", [one.path for one in self.artifacts], True
        yield "env", list(self.env.values()), False


def _fields_in(key: str, template: Any) -> Iterator[str]:
    texts = template if isinstance(template, list) else [template]
    for text in texts:
        for place in _PLACE.finditer(text) if isinstance(text, str) else ():
            if place[0] in {"{", "}"}:
                raise BadField(key, f"has a single {place[0]} in {text[:80]!r}; write {place[0] * 2}")
            if place[1]:
                yield place[1]


# --- the files ---------------------------------------------------------------------------------------------


def read_services(
    directory: Path,
    faults: list[Fault],
    warnings: list[Fault] | None = None,
    files: dict[str, Path] | None = None,
) -> list[Service]:
    """Read all of services.d; a service with a fault is left out and goes to `faults`.

    `files` gets the file of each service, by the service's name.
    """
    services: list[Service] = []
    taken: dict[str, Path] = {}
    found = drop_ins(directory, faults)
    if found and warnings is not None:
        warnings += found.warnings()
    for path in found.files if found else ():
        service = read_document(path, Service, faults)
        if service is None:
            continue
        kinds = [*(f"type {one!r}" for one in service.match.types), f"service {service.name!r}"]
        kinds += [f"service_type {one!r}" for one in service.match.service_types]
        if twice := [kind for kind in kinds if kind in taken]:
            message = f"{twice[0]} is also in {taken[twice[0]]}; remove {twice[0]} here or there"
            faults.append(Fault(str(path), line_of(path, ["match"]), "match", message))
            continue
        taken |= dict.fromkeys(kinds, path)
        services.append(service)
        if files is not None:
            files[service.name] = path
    return services


class ServiceBook:
    """The services of a directory, read again after a change of the directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._seen: object = None
        self._services: list[Service] = []

    @property
    def services(self) -> list[Service]:
        """The current services without fault."""
        if (seen := stamp_of([self._directory])) != self._seen:
            self._services = read_services(self._directory, [])
            self._seen = seen
        return self._services

    def manifest(self, job_id: str, payload: Mapping[str, Any]) -> dict[str, Any]:
        """Make a job's manifest, as JSON data, with the payload and the rule for the result.

        Raises:
            ServiceError: no service matches the job, or the fields do not fit.
        """
        service, given = self._find(job_id, payload)
        return {**_manifest(service, job_id, given), "payload": dict(payload)}

    def _find(self, job_id: str, payload: Mapping[str, Any]) -> tuple[Service, Mapping[str, Any]]:
        services = self.services
        kind, named = payload.get("type"), payload.get("service_type")
        for service in services:
            if kind is not None and kind in service.match.types:
                return service, payload
            if kind is None and named is not None and named in service.match.service_types:
                request = payload.get("service_request")
                return service, request if isinstance(request, dict) else {}
        for service in services if kind is None and named is None else ():
            if service.match.when and all(payload.get(field) is not None for field in service.match.when):
                return service, payload
        asked = brief(ascii(kind if kind is not None else named), 100)
        known = ", ".join(service.name for service in services) or "none"
        raise ServiceError(
            f"cannot run the job: this node has no service for type {asked}; its services: {brief(known)}",
            job_id,
            ErrorCode.E_DENY,
        )


# --- one job -----------------------------------------------------------------------------------------------


def _manifest(service: Service, job_id: str, given: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in _values(service, job_id, given) if value is not None}
    run = service.run
    made: dict[str, Any] = {"job_id": job_id}
    if run.command is not None:
        made |= {"runner": "cli", "command": run.command, "args": _args(run.args, values)}
    else:
        params = {name: _filled(template, values) for name, template in run.params.items()}
        kept = {name: value for name, value in params.items() if value is not None}
        made |= {"runner": "python", "task": run.task, "params": kept}
    urls = [
        {"url": url, "name": one.name, **({} if one.max_mb is None else {"max_mb": one.max_mb})}
        for one in service.inputs
        if (url := _text(one.url, values)) is not None
    ]
    artifacts = [{**msgspec.to_builtins(one), "path": _text(one.path, values)} for one in service.artifacts]
    env = {name: text for name, one in service.env.items() if (text := _text(one, values)) is not None}
    made |= {
        "input": {"urls": urls},
        "requirements": msgspec.to_builtins(service.requirements),
        "timeout_s": service.timeout_s,
        "artifacts": artifacts,
        "env": env,
        "egress": service.egress,
        "retry": msgspec.to_builtins(service.retry),
        "service": {
            "name": service.name,
            "result": msgspec.to_builtins(service.result),
            "inline_kb": service.inline_kb,
        },
    }
    return made


def _values(service: Service, job_id: str, given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, field in service.fields.items():
        names = [name, *field.aliases]
        value = next((given[one] for one in names if given.get(one) is not None), None)
        try:
            if value is not None:
                yield name, _checked(field, value)
            elif field.required:
                raise ValueError("is missing")  # noqa: TRY301
            else:
                yield name, field.default
        except ValueError as error:
            raise ServiceError(
                f"cannot run the job: service {service.name}: field {name!r} {error}", job_id
            ) from None


def _checked(field: Field, value: Any) -> Any:
    """Check one value. Raises ValueError with the permitted values."""
    if field.type == "bool":
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
    elif field.type in {"int", "number"}:
        if isinstance(value, float) and field.type == "int" and value.is_integer():
            value = int(value)
        _check_number(field, value)
    elif field.type == "json":
        _check_size(field, msgspec.json.encode(value))
    elif not isinstance(value, str) or "\0" in value:
        raise ValueError("must be text")
    else:
        _check_text(field, value)
    return value


def _check_number(field: Field, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole and (field.type == "int" or not isinstance(value, float)):
        raise ValueError("must be a whole number" if field.type == "int" else "must be a number")
    # Written so that NaN fails, too: NaN is neither below nor above a number.
    if not (-(2**63) < value < 2**63):
        raise ValueError("must be a number of reasonable size")
    if (field.min is not None and value < field.min) or (field.max is not None and value > field.max):
        low, high = ("" if one is None else f"{one:g}" for one in (field.min, field.max))
        raise ValueError(f"must be from {low or 'any'} to {high or 'any'}")


def _check_text(field: Field, value: str) -> None:
    try:
        _check_size(field, value.encode())
    except UnicodeEncodeError:
        raise ValueError("is not valid text") from None
    if field.type == "choice" and value not in field.values:
        raise ValueError(f"must be one of {', '.join(field.values)}")
    if field.type == "url" and not value.startswith(("http://", "https://")):
        raise ValueError("must be an http or https address")
    pattern: Pattern | None = field.pattern
    if pattern is not None and not pattern.fullmatch(value):
        raise ValueError(f"must match {pattern.pattern}")


def _check_size(field: Field, data: bytes) -> None:
    if len(data) > field.max_bytes:
        raise ValueError(f"has {len(data)} bytes; at most {field.max_bytes} are permitted")


def _args(templates: Sequence[str | list[str]], values: Mapping[str, Any]) -> list[str]:
    args: list[str] = []
    for template in templates:
        group = template if isinstance(template, list) else [template]
        filled = [_text(one, values) for one in group]
        args += [text for text in filled if text is not None] if None not in filled else []
    return args


def _filled(template: Any, values: Mapping[str, Any]) -> Any:
    """Make a parameter: a template of one place alone becomes the field's value in its own type."""
    if not isinstance(template, str):
        return template
    alone = _PLACE.fullmatch(template)
    return values.get(alone[1]) if alone and alone[1] else _text(template, values)


def _text(template: str, values: Mapping[str, Any]) -> str | None:
    """Put fields into their places; None if a field is absent."""
    if any(place[1] and place[1] not in values for place in _PLACE.finditer(template)):
        return None
    return _PLACE.sub(lambda place: _as_text(values[place[1]]) if place[1] else place[0][0], template)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
