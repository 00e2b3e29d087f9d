"""One request, as the faces see it, and the record that is kept of it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import orjson

from gproxyd.host.demo.answers import Object, VendorError
from gproxyd.host.demo.controls import Controls
from gproxyd.host.demo.form import Part
from gproxyd.types import RawHeaders

Dialect = Literal["openai", "anthropic", "gemini"]
"""Whose manners a path has: its errors, its headers, its line ends."""

CREATED = 1_750_000_000
"""The moment at which everything here was made, in Unix seconds."""
CREATED_RFC3339 = "2025-06-15T15:06:40Z"

UNKNOWN_MODEL = "nope"


@dataclass(slots=True)
class Seen:
    """What one request looked like on the wire, and what became of its answer.

    `target` is path and query exactly as received. `body` is empty above 1 MiB; `body_bytes` and `body_sha256`
    always tell. `finished`: the answer's last byte was written. `client_gone`: the peer left before that.
    """

    method: str
    target: bytes
    headers: RawHeaders
    body: bytes = b""
    body_bytes: int = 0
    body_sha256: str = ""
    finished: bool = False
    client_gone: bool = False

    def header(self, name: str) -> list[str]:
        """The values of a header, in order; its name in any case."""
        wanted = name.lower().encode()
        return [value.decode("latin-1") for key, value in self.headers if key.lower() == wanted]


class Shelf(OrderedDict[str, Object]):
    """Objects kept by id; the oldest fall off beyond `limit`."""

    def __init__(self, kind: str, limit: int = 1000) -> None:
        super().__init__()
        self.kind = kind
        self.limit = limit

    def put(self, thing: Object) -> Object:
        """Keep `thing` under its `id`."""
        self[thing["id"]] = thing
        while len(self) > self.limit:
            self.popitem(last=False)
        return thing

    def take(self, key: str) -> Object:
        """The object of that id. Raises VendorError (404)."""
        if key not in self:
            raise VendorError(404, f"{self.kind} with id '{key}' not found.", param="id")
        return self[key]


@dataclass(slots=True)
class Shelves:
    """What the vendor remembers between requests. Contents of files stand in `contents`, under the file's id."""

    responses: Shelf = field(default_factory=lambda: Shelf("Response"))
    files: Shelf = field(default_factory=lambda: Shelf("File", limit=64))
    contents: Shelf = field(default_factory=lambda: Shelf("Content of file", limit=64))
    batches: Shelf = field(default_factory=lambda: Shelf("Batch"))


@dataclass(slots=True)
class Call:
    """One request.

    `path` is decoded and has no query; `place` holds what the route's pattern captured; `dropped` says that the
    vendor itself broke the exchange off.
    """

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    seen: Seen
    dialect: Dialect
    shelves: Shelves
    base: str
    body: bytes = b""
    form: tuple[Part, ...] = ()
    controls: Controls = field(default_factory=Controls)
    place: Mapping[str, str] = field(default_factory=dict)
    dropped: bool = False

    def json(self) -> Object:
        """The JSON object in the body. Raises VendorError (400) if there is none."""
        try:
            value = orjson.loads(self.body)
        except orjson.JSONDecodeError as error:
            raise VendorError(400, "We could not parse the JSON body of your request.") from error
        if not isinstance(value, dict):
            raise VendorError(400, "The JSON body of your request is not an object.")
        return value

    def part(self, name: str) -> Part:
        """A field of the form. Raises VendorError (400) if it is missing."""
        for part in self.form:
            if part.name == name:
                return part
        raise VendorError(400, f"Missing required parameter: '{name}'.", code="missing_required_parameter", param=name)

    def form_value(self, name: str, default: str = "") -> str:
        """The text of a field of the form."""
        return next((part.text for part in self.form if part.name == name), default)

    def files(self) -> list[Part]:
        """The files of the form."""
        return [part for part in self.form if part.filename is not None]

    def ident(self, prefix: str, length: int = 24, salt: object = "") -> str:
        """An id that depends on path, body and `salt` alone, so that the same request gets the same one."""
        seed = f"{self.path}\n{self.seen.body_sha256}\n{salt}".encode()
        return prefix + hashlib.sha256(seed).hexdigest()[:length]

    def eol(self, usual: bytes = b"\n") -> bytes:
        """The line end of event streams."""
        return self.controls.eol or usual

    def model(self, body: Mapping[str, object]) -> str:
        """The model asked for. Raises VendorError: 400 without one, 404 for the one that does not exist."""
        name = body.get("model")
        if not isinstance(name, str) or not name:
            message = "model: Field required" if self.dialect == "anthropic" else "you must provide a model parameter"
            raise VendorError(400, message, param="model")
        return self.known_model(name)

    def known_model(self, name: str) -> str:
        """`name`, unless it is the model that does not exist (VendorError 404)."""
        if name != UNKNOWN_MODEL:
            return name
        message = {
            "openai": f"The model `{name}` does not exist or you do not have access to it.",
            "anthropic": f"model: {name}",
            "gemini": f"models/{name} is not found for API version v1beta, or is not supported for this method. "
            "Call ListModels to see the list of available models and their supported methods.",
        }[self.dialect]
        raise VendorError(404, message, code="model_not_found")
