"""The stored rows as a page, and whether ours keeps its bars."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from overhead.client import MAX_OPEN
from overhead.measure import SATURATING_CLIENTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Row = dict[str, Any]
OURS, LITELLM = "sala-serve", "litellm"
MAX_ADDED_P99_MS = 10.0
MIN_THROUGHPUT_RATIO = 3.0
MAX_RSS_GROWTH_FRAC = 0.2


def chosen(rows: Sequence[Row]) -> list[Row]:
    """Return one repeat of each target: that in which the engine itself was steadiest."""
    found = []
    for target in dict.fromkeys(row["target"] for row in rows):
        own = [row for row in rows if row["target"] == target and "repeat" in row]
        noise: dict[int, float] = {}
        for row in own:
            if row["what"] == "rate" and row["direct"]["num_good"]:
                noise[row["repeat"]] = noise.get(row["repeat"], 0.0) + row["direct"]["total_p99_ms"]
        if noise:
            best = min(noise, key=noise.__getitem__)
            found += [row for row in own if row["repeat"] == best]
    return found


def bars(rows: Sequence[Row]) -> list[tuple[str, str, bool | None]]:
    """Return each bar, what was measured, and whether it is kept; ``None``: it was not measured."""
    best = chosen(rows)

    def found(target: str, **wanted: Any) -> Row | None:
        match = [
            row
            for row in best
            if row["target"] == target and all(row[name] == each for name, each in wanted.items())
        ]
        return match[0] if match else None

    results: list[tuple[str, str, bool | None]] = []
    for is_stream, what, name in (
        (False, "whole answers", "added_total_p99_ms"),
        (True, "streams, first event", "added_first_p99_ms"),
    ):
        bar = f"added p99 under {MAX_ADDED_P99_MS:g} ms at 100 requests a second, {what}"
        row = found(OURS, what="rate", rate_per_s=100, is_stream=is_stream) if best else None
        if row is None or name not in row:
            results.append((bar, "not measured", None))
        else:
            good = row[name] < MAX_ADDED_P99_MS and not row["num_bad"]
            results.append((bar, f"{row[name]:.2f} ms", good))
    for is_stream, what in ((False, "whole answers"), (True, "streams")):
        bar = f"at least {MIN_THROUGHPUT_RATIO:g} times LiteLLM's throughput, {what}"
        own = found(OURS, what="most", is_stream=is_stream)
        other = found(LITELLM, what="most", is_stream=is_stream)
        if own is None or other is None or not other["num_good"]:
            results.append((bar, "not measured", None))
        else:
            ratio = own["per_s"] / other["per_s"]
            results.append((bar, f"{ratio:.1f} times", ratio >= MIN_THROUGHPUT_RATIO))
    for row in (row for row in rows if row["what"] == "long" and row["target"] == OURS):
        growth = row["rss_mib_after"] / row["rss_mib_before"] - 1
        bar = (
            f"resident memory after {row['num_prompts']} million-token prompts within "
            f"{MAX_RSS_GROWTH_FRAC:.0%} of before"
        )
        is_good = abs(growth) <= MAX_RSS_GROWTH_FRAC and row["num_good"] == row["num_prompts"]
        results.append((bar, f"{growth:+.0%}", is_good))
    return results


def report(machine: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """Return the page."""
    best = chosen(rows)
    lines = ["# What a gateway costs", "", "`scripts/bench-overhead` writes this page.", ""]
    lines += ["| bar | measured | kept |", "| --- | ---: | --- |"]
    words = {True: "yes", False: "**no**", None: "not measured"}
    lines += [f"| {bar} | {value} | {words[is_kept]} |" for bar, value, is_kept in bars(rows)]
    lines += [
        "",
        "## Added time",
        "",
        "Milliseconds above the engine itself, measured right before in the same run, at p50 and p99. Constant arrivals, "
        f"{MAX_OPEN} requests open at most: `lost` counts what failed or found that many open, and a target with `lost` "
        "does not keep up, so that its times say little. `first` is the first event of a stream of 16 tokens.",
        "",
        "| | requests/s | kind | added p50 | added p99 | first: p50 | first: p99 | direct p50 | direct p99 | lost | cores "
        "| RSS MiB | load |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [_rate_line(row) for row in best if row["what"] == "rate"]
    lines += [
        "",
        "## Throughput",
        "",
        f"Answers a second with {SATURATING_CLIENTS} clients that ask again at once.",
        "",
        "| | kind | answers/s | per core | p50 ms | p99 ms | lost | cores | RSS MiB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [_most_line(row) for row in best if row["what"] == "most"]
    lines += [
        "",
        "## Million-token prompts",
        "",
        "One after the other, each another one, whole answers. `added` is above the engine itself, which throws the body "
        "away. Ours parses, counts exactly and hashes each prompt; others pass the bytes on.",
        "",
        "| | prompts | good | tokens | MB | added p50 ms | CPU s each | RSS before | RSS after |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [_long_line(row) for row in rows if row["what"] == "long"]
    lines += ["", "## Conditions", ""]
    lines += [f"- {name}: {value}" for name, value in machine.items()]
    lines += [
        "- load generator, engine and gateway share the machine; the gateway is one process with the settings of "
        "`loadtests/overhead/targets.py`",
        *(f"- {row['target']}: {row['why']}" for row in rows if row["what"] == "left out"),
        "",
        f"All of {len(rows)} rows are in `overhead.jsonl`; shown is the repeat in which the engine itself was steadiest.",
        "",
    ]
    return "\n".join(lines)


def _kind(row: Row) -> str:
    return "stream" if row["is_stream"] else "whole"


def _number(row: Row, name: str) -> str:
    return f"{row[name]:.2f}" if name in row else ""


def _rate_line(row: Row) -> str:
    added = ("added_total_p50_ms", "added_total_p99_ms", "added_first_p50_ms", "added_first_p99_ms")
    cells = [
        *(row["target"], str(row["rate_per_s"]), _kind(row)),
        *(_number(row, name) for name in added),
        *(_number(row["direct"], name) for name in ("total_p50_ms", "total_p99_ms")),
        *(str(row["num_bad"]), f"{row['cores']:.2f}", f"{row['rss_mib']:.0f}"),
        f"{row['load_before']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _most_line(row: Row) -> str:
    per_core = f"{row['per_s'] / row['cores']:.0f}" if row["cores"] else ""
    cells = [
        *(row["target"], _kind(row), f"{row['per_s']:.0f}", per_core),
        *(_number(row, "total_p50_ms"), _number(row, "total_p99_ms")),
        *(str(row["num_bad"]), f"{row['cores']:.2f}", f"{row['rss_mib']:.0f}"),
    ]
    return f"| {' | '.join(cells)} |"


def _long_line(row: Row) -> str:
    cells = [
        *(row["target"], str(row["num_prompts"]), str(row["num_good"]), f"{row['tokens']:,}"),
        *(f"{row['bytes'] / 1e6:.1f}", _number(row, "added_p50_ms")),
        *(f"{row['cpu_s_per_prompt']:.2f}", f"{row['rss_mib_before']:.0f}"),
        f"{row['rss_mib_after']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"
