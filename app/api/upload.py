"""An upload, piece by piece from the socket to storage. Memory does not depend on the file's size.

The parser and the disk work in a thread; the event loop only passes pieces on. Knows no table.
"""

from __future__ import annotations

from anyio import to_thread
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from app.api.faults import shown
from app.core.errors import InvalidRequest, TooLarge
from app.core.files import NewFile
from app.core.storage import PendingFile, Storage
from app.core.vocabulary import UPLOADABLE, Purpose

PIECE_BYTES = 512 * 1024  # handed to the thread at once
MAX_FIELD_BYTES = 256  # of any part but the file
MAX_HEADER_BYTES = 4096  # of one part's headers
FIELDS = ("purpose", "expires_after[anchor]", "expires_after[seconds]")
EXPIRY_S = (3600, 2_592_000)  # 1 h to 30 d, as at OpenAI
FORM_CURE = "curl -F purpose=fine-tune -F file=@data.jsonl does it."
FILE_CURE = "Send it as a file upload, as curl -F file=@data.jsonl does."
PURPOSES = tuple(purpose for purpose in UPLOADABLE if purpose is not Purpose.EVALS)


class Upload:
    """A form being read: the fields so far, and the file in storage, still without a name."""

    def __init__(self, storage: Storage, *, boundary: bytes, max_file_bytes: int) -> None:
        self._storage = storage
        self._max_file_bytes = max_file_bytes
        self._fields: dict[str, bytearray] = {}
        self._name = ""
        self._header = (bytearray(), bytearray())
        self._disposition = ""
        self._ended = False
        self.filename = ""
        self.pending: PendingFile | None = None
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_end": self._end,
            },
            max_header_size=MAX_HEADER_BYTES,
        )

    async def read(self, request: Request) -> None:
        """Read the whole body. On any failure call `discard`."""
        pieces: list[bytes] = []
        size = 0
        async for chunk in request.stream():
            pieces.append(chunk)
            size += len(chunk)
            if size >= PIECE_BYTES:
                await to_thread.run_sync(self._feed, b"".join(pieces))
                pieces, size = [], 0
        await to_thread.run_sync(self._feed, b"".join(pieces))
        if not self._ended:
            raise _bad_form("it ends before its closing boundary")

    def new_file(self) -> NewFile:
        """What the form says of the file; raises InvalidRequest."""
        purpose = _purpose(self._text("purpose"))
        if self.pending is None:
            raise InvalidRequest(
                f"Missing required parameter: 'file'. {FILE_CURE}",
                code="missing_required_parameter",
                param="file",
            )
        expires = _expires(self._text("expires_after[anchor]"), self._text("expires_after[seconds]"))
        if expires is None and purpose is Purpose.BATCH:
            expires = EXPIRY_S[1]
        return NewFile(filename=self.filename, purpose=purpose, expires_after_s=expires)

    def discard(self) -> None:
        """Forget the bytes; no error after they were published."""
        if self.pending is not None:
            self.pending.discard()

    def _feed(self, data: bytes) -> None:
        if self._ended or not data:
            return  # what follows the closing boundary has no meaning
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise _bad_form("its parts cannot be told apart; check the boundary") from error

    def _part_begin(self) -> None:
        self._name = self._disposition = ""
        self._header = (bytearray(), bytearray())

    def _header_end(self) -> None:
        field, value = self._header
        if field.lower() == b"content-disposition":
            self._disposition = value.decode("latin-1")
        self._header = (bytearray(), bytearray())

    def _headers_finished(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if kind != b"form-data" or not name:
            raise _bad_form("a part has no name")
        self._name = name
        if name == "file":
            self._open_file(options.get(b"filename", b"").decode("utf-8", "replace"))
        elif name not in FIELDS:
            raise InvalidRequest(
                f"Unknown parameter: '{shown(name)}'.", code="unknown_parameter", param=shown(name)
            )
        elif name in self._fields:
            raise InvalidRequest(f"'{name}' is given twice.", code="invalid_value", param=name)
        else:
            self._fields[name] = bytearray()

    def _open_file(self, filename: str) -> None:
        if self.pending is not None:
            raise InvalidRequest(
                "The form has two files. Upload one file a request.", code="invalid_value", param="file"
            )
        if not filename:
            raise InvalidRequest(
                f"The part 'file' has no filename. {FILE_CURE}",
                code="invalid_value",
                param="file",
            )
        self.filename = filename
        self.pending = self._storage.begin()

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._name != "file":
            field = self._fields[self._name]
            field.extend(data[start:end])
            if len(field) > MAX_FIELD_BYTES:
                text = f"Invalid '{self._name}': string too long. Expected at most {MAX_FIELD_BYTES} bytes."
                raise InvalidRequest(text, code="string_above_max_length", param=self._name)
            return
        assert self.pending is not None
        if self.pending.size_bytes + end - start > self._max_file_bytes:
            limit = f"{self._max_file_bytes} bytes ({self._max_file_bytes / 2**20:.3g} MB)"
            raise TooLarge(
                f"The file is too large: at most {limit} are allowed.",
                code="file_too_large",
                param="file",
            )
        self.pending.write(data[start:end])

    def _end(self) -> None:
        self._ended = True

    def _text(self, name: str) -> str | None:
        field = self._fields.get(name)
        return None if field is None else field.decode("utf-8", "replace")


def begin_upload(request: Request, storage: Storage, *, max_file_bytes: int) -> Upload:
    """An upload for this request's form; raises InvalidRequest when the body is no form."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data":
        raise InvalidRequest(
            f"Files are uploaded as multipart/form-data. {FORM_CURE}",
            code="unsupported_content_type",
        )
    if not 1 <= len(boundary) <= 70:  # RFC 2046 section 5.1.1
        raise _bad_form("its Content-Type needs a boundary of 1 to 70 characters")
    return Upload(storage, boundary=boundary, max_file_bytes=max_file_bytes)


def _bad_form(reason: str) -> InvalidRequest:
    return InvalidRequest(f"The multipart form cannot be read: {reason}.", code="invalid_form")


def _purpose(text: str | None) -> Purpose:
    if text is None:
        raise InvalidRequest(
            "Missing required parameter: 'purpose'.", code="missing_required_parameter", param="purpose"
        )
    if text not in PURPOSES:
        supported = ", ".join(f"'{purpose}'" for purpose in PURPOSES)
        raise InvalidRequest(
            f"Invalid value for 'purpose': {shown(text)!r}. Supported values are: {supported}.",
            code="invalid_value",
            param="purpose",
        )
    return Purpose(text)


def _expires(anchor: str | None, seconds: str | None) -> int | None:
    if anchor is None and seconds is None:
        return None
    for name, value in (("anchor", anchor), ("seconds", seconds)):
        if value is None:
            param = f"expires_after[{name}]"
            text = f"Missing required parameter: '{param}'."
            raise InvalidRequest(text, code="missing_required_parameter", param=param)
    if anchor != "created_at":
        raise InvalidRequest(
            "Invalid value for 'expires_after[anchor]': only 'created_at' is supported.",
            code="invalid_value",
            param="expires_after[anchor]",
        )
    return _seconds(seconds or "")


def _seconds(text: str) -> int:
    param, (low, high) = "expires_after[seconds]", EXPIRY_S
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        message = f"Invalid type for '{param}': expected an integer from {low} to {high}."
        raise InvalidRequest(message, code="invalid_type", param=param)
    value = int(text)
    if not low <= value <= high:
        code = "integer_below_min_value" if value < low else "integer_above_max_value"
        message = f"Invalid '{param}': expected an integer from {low} to {high}, but got {value}."
        raise InvalidRequest(message, code=code, param=param)
    return value
