import pytest

from sala_serve.events import event_data, split_events


async def chunked(data: bytes, num_bytes: int):
    for start in range(0, len(data), num_bytes):
        yield data[start : start + num_bytes]


@pytest.mark.parametrize("num_bytes", [1, 2, 7, 1000])
async def test_events_are_found_however_the_stream_is_cut(num_bytes):
    data = 'data: {"a": "中"}\n\n: keep-alive\n\ndata: [DONE]\n\ndata: torn'.encode()
    events = [event async for event in split_events(chunked(data, num_bytes))]
    assert b"".join(events) == data.removesuffix(b"data: torn")
    crlf = data.replace(b"\n", b"\r\n")
    events_crlf = [event async for event in split_events(chunked(crlf, num_bytes))]
    assert [event_data(event) for event in events_crlf] == [event_data(event) for event in events]
    assert [event_data(event) for event in events] == ['{"a": "中"}'.encode(), None, b"[DONE]"]
