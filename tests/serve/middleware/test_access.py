async def test_one_line_a_request_with_its_outcome(stack, caplog):
    caplog.set_level("INFO", logger="sala_serve")
    await stack.http.post("/v1/completions", content=b"{", headers={"X-Request-Id": "r1"})
    await stack.http.get("/healthz")
    lines = [record.message for record in caplog.records if "access" in record.name]
    assert len(lines) == 1
    assert lines[0].startswith("r1 /v1/completions 400 invalid_request duration_s=0.")
