"""A soak's result, for a terminal and for a page."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from soak.play import Result


def table(result: Result) -> list[str]:
    """Return the lines for a terminal."""
    lines = [f"{'':2}{'left behind':50}{'number':>10}{'at most':>10}"]
    for check in result.checks:
        mark = "ok" if check.is_good else "NO"
        lines.append(f"{mark} {check.name:49}{check.number:>10g}{check.most:>10g}")
    lines += ["", *(f"{kind:16}{_counted(each)}" for kind, each in result.outcomes.items())]
    verdict = "nothing has leaked" if result.is_good else "LEAKED, or went wrong"
    lines += ["", f"{result.num_requests} requests in {result.duration_s:g} s: {verdict}"]
    return lines


def report(machine: Mapping[str, object], result: Result) -> str:
    """Return the page."""
    rss = ", ".join(f"{name} {mib:g} MiB" for name, mib in result.rss_mib.items())
    away = ", ".join(f"{name} for {each:g} s" for name, each in result.away_s.items())
    verdict = "Nothing has leaked." if result.is_good else "**Something has leaked or went wrong.**"
    conditions = ", ".join(f"{name} {value}" for name, value in machine.items())
    return "\n".join(
        [
            "# Soak",
            "",
            f"{result.num_requests} requests in {result.duration_s / 60:g} minutes, most of them ill-behaved; killed in the "
            f"middle: {away}. {verdict}",
            f"At rest {result.settle_s:g} s after the last client. Resident memory: {rss}.",
            "",
            "`scripts/soak --store` writes this page.",
            "",
            "| left behind | number | at most |",
            "| --- | ---: | ---: |",
            *(f"| {each.name} | {each.number:g} | {each.most:g} |" for each in result.checks),
            "",
            "| client | how its requests ended |",
            "| --- | --- |",
            *(f"| {kind} | {_counted(each)} |" for kind, each in result.outcomes.items()),
            "",
            f"Conditions: {conditions}.",
            "",
        ]
    )


def _counted(outcomes: Mapping[str, int]) -> str:
    return ", ".join(f"{outcome}: {number}" for outcome, number in outcomes.items())
