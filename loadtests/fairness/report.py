"""The results as a page and a plot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

MAX_TTFT_RATIO = 3.0
MIN_FLOOD_FRAC = 0.9
TITLES = {
    "idle": "short requests alone",
    "fair": "with the flood, fair",
    "arrival": "with the flood, first come first served",
    "vllm": "with the flood, vLLM alone",
    "no give way": "fair, long prefills never put back",
}
SCENE = """\
Two tenants send 500-token questions, one in 8 s each on average (Poisson, the same moments under every rule), answers of 128
tokens. The third always has eight prompts of 1,048,576 tokens under way. Half an hour, of which the first two minutes do not
count. Several runs differ in their random moments; a figure is the median of the runs. A request without its first token at the
end counts with the time it has waited. *First come first served*: the same gateway and engine, fairness off. *vLLM alone*: no
gateway, vLLM's own scheduler."""
RATES = """\
Rare questions miss the bar: one that comes after 30 quiet seconds meets a long prefill's whole steps (`quiet_s` in
[0008](../../../docs/decisions/0008-long-prefills.md))."""
UNEVEN = """\
Beside the same questions. Service gap: how far the service of two tenants drifts apart while both wait, in tokens of work; measured
at the gateway, so not for *vLLM alone*. The bound is that of *fair*."""
CALIBRATION = """\
The stages `sala` and `serving` of the GPU run, played again. Speeds of long prompts, of a lone question and what small steps cost
are put in; how a question and its answer fare beside a million-token prefill is not. The two stages may be
of two machines, so a prefill beside others is compared with the one alone in its own stage."""


@dataclass(frozen=True)
class Results:
    """What ``results.jsonl`` holds."""

    start: dict[str, Any]
    calibration: list[dict[str, Any]]
    runs: list[dict[str, Any]]

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read it."""
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        named = {
            name: [line for line in lines if line["name"] == name]
            for name in ("start", "calibration", "run")
        }
        return cls(named["start"][0], named["calibration"], named["run"])

    def of(self, part: str, rule: str | None = None) -> list[dict[str, Any]]:
        """Return the results of one part of the benchmark."""
        return [
            run["result"]
            for run in self.runs
            if run["part"] == part and rule in (None, run["rule"])
        ]

    def alone(self) -> float:
        """Return what the flood gets alone, in tokens a second."""
        (result,) = self.of("alone")
        rate: float = result["flood_tokens_per_s"][0]
        return rate


def page(results: Results) -> str:
    """Return the report as Markdown."""
    return "\n".join(
        [
            "# Fairness benchmark",
            "",
            _conditions(results.start),
            "",
            "## Three tenants, one floods with 1M-token prompts",
            "",
            SCENE,
            "",
            bars_table(results),
            "",
            mixed_table(results),
            "",
            "## How many short requests that bears",
            "",
            RATES,
            "",
            rate_table(results),
            "",
            "## Two tenants with 1M-token prompts, 16 under way against 2",
            "",
            UNEVEN,
            "",
            uneven_table(results),
            "",
            "## Simulated and measured engine",
            "",
            CALIBRATION,
            "",
            calibration_table(results.calibration),
            "",
        ]
    )


def _conditions(start: dict[str, Any]) -> str:
    engine, versions, machine = start["engine"], start["versions"], start["machine"]
    return (
        f"`scripts/bench-fairness` made this page: the scheduler at {start['commit']} before one simulated engine, in virtual "
        f"time. The engine has the speeds of one {engine['device']}, measured in `{engine['source']}` at {engine['commit']}. "
        f"Python {versions['python']}, {machine['num_cpus']} cores ({machine['cpu']}), {machine['system']}; how fast that "
        "machine is does not show in the figures. Settings are the defaults; each tenant has weight 1."
    )


def _middle(results: Sequence[dict[str, Any]], figure: str) -> float:
    """Return the median over the runs."""
    return median(float(each["ttft_s"][figure]) for each in results)


def _flood(runs: Sequence[dict[str, Any]]) -> float:
    """Return the median of the flood's tokens a second."""
    return median(float(each["flood_tokens_per_s"][0]) for each in runs)


def ttft_ratio(results: Results, part: str) -> float:
    """Return the 99th percentile as a multiple of that of an idle system."""
    return _middle(results.of(part), "p99") / _middle(results.of("idle"), "p99")


def flood_frac(results: Results, part: str) -> float:
    """Return the flood's throughput as a share of what it has alone."""
    return _flood(results.of(part)) / results.alone()


def bars_reached(results: Results) -> bool:
    """Tell whether fairness reaches both."""
    is_quick = ttft_ratio(results, "fair") <= MAX_TTFT_RATIO
    return is_quick and flood_frac(results, "fair") >= MIN_FLOOD_FRAC


def bars_table(results: Results) -> str:
    """Return the promised figures."""
    ratio, share = ttft_ratio(results, "fair"), flood_frac(results, "fair")
    quick, busy = ratio <= MAX_TTFT_RATIO, share >= MIN_FLOOD_FRAC
    return _table(
        ["figure", "bar", "fair", "reached", "first come first served", "vLLM alone"],
        [
            [
                "short requests' p99 TTFT ÷ idle system",
                f"≤ {MAX_TTFT_RATIO:g}",
                f"{ratio:.2f}",
                "yes" if quick else "**no**",
                *(f"{ttft_ratio(results, part):,.0f}" for part in ("arrival", "vllm")),
            ],
            [
                "flood's throughput ÷ alone",
                f"≥ {MIN_FLOOD_FRAC:g}",
                f"{share:.3f}",
                "yes" if busy else "**no**",
                *(f"{flood_frac(results, part):.3f}" for part in ("arrival", "vllm")),
            ],
        ],
    )


def mixed_table(results: Results) -> str:
    """Return the times to first token under each rule, what the flood gets, and the service gap."""
    rows = []
    for part in ("idle", "fair", "arrival", "vllm"):
        runs = results.of(part)
        p99s = [each["ttft_s"]["p99"] for each in runs]
        figures = ("p10", "median", "p90", "p99", "max")
        rows.append(
            [
                TITLES[part],
                f"{sum(each['num_short'] for each in runs)} in {len(runs)}",
                *(f"{_middle(runs, figure):.3g}" for figure in figures),
                f"{min(p99s):.3g} to {max(p99s):.3g}" if len(runs) > 1 else "",
                f"{_flood(runs):,.0f}" if part != "idle" else "",
            ]
        )
    rows.append(["flood alone", *[""] * 7, f"{results.alone():,.0f}"])
    head = ["", "requests, runs", "TTFT, s: p10", "median", "p90", "p99", "max", "p99 of each run"]
    return _table([*head, "flood, tokens/s"], rows)


def rate_table(results: Results) -> str:
    """Return what more and more short requests do."""
    rows = []
    for run in (run for run in results.runs if run["part"] == "rate"):
        rate, result = run["scene"]["short_per_s"], run["result"]
        (idle,) = (
            each["result"]
            for each in results.runs
            if each["part"] == "rate idle" and each["scene"]["short_per_s"] == rate
        )
        share = result["flood_tokens_per_s"][0] / results.alone()
        ratio = result["ttft_s"]["p99"] / idle["ttft_s"]["p99"]
        times = (result["ttft_s"]["median"], result["ttft_s"]["p99"], idle["ttft_s"]["p99"])
        rows.append(
            [f"{2 * rate:g}", *(f"{each:.3g}" for each in times), f"{ratio:.2f}", f"{share:.3f}"]
        )
    head = ["short requests/s", "TTFT, s: median", "p99", "p99 idle", "÷", "flood ÷ alone"]
    return _table(head, rows)


def uneven_table(results: Results) -> str:
    """Return who gets how much when one tenant asks for more, and the service gap beside its bound."""
    rows = []
    for rule in ("fair", "no give way", "arrival", "vllm"):
        (result,) = results.of("uneven", rule)
        many, few = result["flood_tokens_per_s"]
        gap, bound = result["gap_tokens"], result["gap_bound_tokens"]
        rows.append(
            [
                TITLES[rule].removeprefix("with the flood, "),
                f"{few / (many + few):.1%}",
                f"{many + few:,.0f}",
                f"{result['ttft_s']['p99']:.3g}",
                f"{gap:,.0f}" if rule != "vllm" else "",
                f"{bound:,.0f}" if rule == "fair" else "",
                f"{result['num_gave_way']}" if rule == "fair" else "",
            ]
        )
    head = ["", "share of who has 2", "both, tokens/s", "short p99 TTFT, s"]
    return _table([*head, "service gap, tokens", "bound", "put back"], rows)


def calibration_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return simulated times beside measured ones."""
    return _table(
        ["", "measured, s", "simulated, s", "off by"],
        [
            [
                row["figure"],
                f"{row['measured']:.4g}",
                f"{row['simulated']:.4g}",
                f"{row['simulated'] / row['measured'] - 1:+.1%}",
            ]
            for row in rows
        ],
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(results: Results, path: Path) -> None:
    """Draw percentiles under each rule, and what more short requests do."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    names = ("p10", "median", "p90", "p99", "max")
    for part, marker in (("idle", "o"), ("fair", "s"), ("vllm", "^"), ("arrival", "v")):
        heights = [_middle(results.of(part), name) for name in names]
        left.plot(names, heights, marker=marker, label=TITLES[part])
    left.axhline(
        MAX_TTFT_RATIO * _middle(results.of("idle"), "p99"),
        linestyle=":",
        color="grey",
        label="bar for p99: 3 times idle",
    )
    left.set(yscale="log", ylabel="s", title="Time to first token of 500-token requests")
    left.legend(fontsize="small")

    runs = [run for run in results.runs if run["part"] == "rate"]
    idle = [run for run in results.runs if run["part"] == "rate idle"]
    rates = [2 * run["scene"]["short_per_s"] for run in runs]
    shares = [run["result"]["flood_tokens_per_s"][0] / results.alone() for run in runs]
    ratios = [
        one["result"]["ttft_s"]["p99"] / other["result"]["ttft_s"]["p99"]
        for one, other in zip(runs, idle, strict=True)
    ]
    right.plot(rates, shares, marker="s", color="tab:green", label="flood's throughput ÷ alone")
    right.axhline(MIN_FLOOD_FRAC, linestyle=":", color="tab:green")
    right.set(xscale="log", xlabel="short requests a second", ylim=(0, 1.05))
    right.set_ylabel("flood's throughput ÷ alone", color="tab:green")
    other_axis = right.twinx()
    other_axis.plot(rates, ratios, marker="o", color="tab:orange")
    other_axis.axhline(MAX_TTFT_RATIO, linestyle=":", color="tab:orange")
    other_axis.set_ylim(bottom=0)
    other_axis.set_ylabel("short requests' p99 TTFT ÷ idle", color="tab:orange")
    right.set_title("Fair, by how many short requests come; dotted: the bars")
    figure.savefig(path, dpi=110)
    plt.close(figure)
