"""Reads an uploaded form while it comes: small fields are kept, the file's bytes are passed on."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from sala_serve.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from python_multipart.multipart import MultipartCallbacks

_MAX_FIELDS = 16
_MAX_FIELD_BYTES = 1024
_MAX_FILENAME_LENGTH = 255


class FileForm:
    """A form with one file and some fields, in any order.

    Args:
        content_type: the header.

    Raises:
        InvalidRequest: it is not that of a form.
    """

    def __init__(self, content_type: str) -> None:
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise InvalidRequest("The body must be multipart/form-data.")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        """As the client calls it; ``None``: the file has not begun."""
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._field = ""
        """In which a part's data belongs; empty: in the file."""
        self._value = bytearray()
        self._content: list[bytes] = []
        self._is_whole = False
        callbacks = {
            "on_part_begin": self._begin_part,
            "on_header_field": self._take_header_name,
            "on_header_value": self._take_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._take_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }
        with _parsing():
            self._parser = MultipartParser(
                options[b"boundary"], cast("MultipartCallbacks", callbacks)
            )

    def feed(self, data: bytes) -> list[bytes]:
        """Take the next bytes of the body; return those of the file. Raises InvalidRequest."""
        with _parsing():
            self._parser.write(data)
        content = self._content[:]
        self._content.clear()
        return content

    def finish(self) -> str:
        """Return the file's name when the body is over; raises InvalidRequest if something is missing."""
        if not self._is_whole:
            raise InvalidRequest("The body is not a whole form.")
        if self.filename is None:
            raise InvalidRequest("file: expected a file.", param="file")
        return self.filename

    def _begin_part(self) -> None:
        self._disposition = b""

    def _take_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header[0].extend(data[start:end])

    def _take_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header[1].extend(data[start:end])

    def _end_header(self) -> None:
        name, value = self._header
        if name.lower() == b"content-disposition":
            self._disposition = bytes(value)
        name.clear()
        value.clear()

    def _end_headers(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode(errors="replace")
        self._value.clear()
        if b"filename" in options or name == "file":
            if name != "file" or self.filename is not None:
                raise InvalidRequest("Expected one file, called 'file'.", param="file")
            filename = options.get(b"filename", b"").decode(errors="replace")
            self.filename = filename[:_MAX_FILENAME_LENGTH] or "file"
            self._field = ""
            return
        if not name or name in self.fields or len(self.fields) == _MAX_FIELDS:
            raise InvalidRequest("The form has a field too many, or one without a name.")
        self._field = name

    def _take_data(self, data: bytes, start: int, end: int) -> None:
        if not self._field:
            self._content.append(data[start:end])
            return
        self._value.extend(data[start:end])
        if len(self._value) > _MAX_FIELD_BYTES:
            raise InvalidRequest("A field is too long.", param=self._field[:64])

    def _end_part(self) -> None:
        if self._field:
            self.fields[self._field] = self._value.decode(errors="replace")

    def _end(self) -> None:
        self._is_whole = True


@contextmanager
def _parsing() -> Iterator[None]:
    try:
        yield
    except FormParserError:
        raise InvalidRequest("The body is not a valid form.") from None
