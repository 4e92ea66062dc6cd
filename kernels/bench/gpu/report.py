"""From the results file: the table of bars, the table of operators, the plots."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gpu.results import END, START, Results
from gpu.settings import FP8, STAGE_LIMIT_S, K

if TYPE_CHECKING:
    from pathlib import Path

RESULTS = "results.jsonl"
REPORT = "report.md"
SGLANG_LABEL = "SGLang 0.5.23, measured 2026-11-23 on another machine of this kind"
SGLANG_S = {  # prompt tokens: TTFT, TPOT of one request
    16 * K: (0.751, 9.07e-3),
    64 * K: (3.117, 9.77e-3),
    128 * K: (6.482, 10.96e-3),
    256 * K: (13.673, 12.88e-3),
    512 * K: (30.214, 16.46e-3),
    1024 * K: (72.632, 24.01e-3),
}
MIN_RATIO = {64 * K: 1.4, 128 * K: 2.2, 256 * K: 4.0, 512 * K: 8.0}
MIN_ROOFLINE_FRAC = 0.6
CONTEXT = 1024 * K


@dataclass(frozen=True)
class Bar:
    """One promised figure."""

    figure: str
    bar: str
    measured: float | None
    """None = not measured."""
    passed: bool
    note: str = ""

    @classmethod
    def at_most(cls, figure: str, limit: float, measured: float | None, note: str = "") -> Bar:
        """A figure that must not exceed ``limit``."""
        return cls(figure, f"≤ {limit:g}", measured, _holds(measured, maximum=limit), note)

    @classmethod
    def at_least(cls, figure: str, limit: float, measured: float | None, note: str = "") -> Bar:
        """A figure that must reach ``limit``."""
        return cls(figure, f"≥ {limit:g}", measured, _holds(measured, minimum=limit), note)

    def row(self) -> str:
        """Format as a row of the table."""
        measured = "not measured" if self.measured is None else f"{self.measured:.4g}"
        verdict = "" if self.measured is None else "yes" if self.passed else "**no**"
        return f"| {self.figure} | {self.bar} | {measured} | {verdict} | {self.note} |"


def _holds(
    measured: float | None, minimum: float = float("-inf"), maximum: float = float("inf")
) -> bool:
    return measured is not None and minimum <= measured <= maximum


def _get(line: dict[str, Any] | None, *path: str) -> Any:
    value: Any = line
    for name in path:
        value = None if value is None else value.get(name)
    return value


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    return numerator / denominator if numerator is not None and denominator else None


def _latency(results: Results, stage: str, tokens: int, what: str) -> float | None:
    value: float | None = _get(results.one(stage, "latency", prompt_tokens=tokens), what, "median")
    return value


def bars(results: Results) -> list[Bar]:
    """Compare every promised figure with what was measured."""
    rows = []
    for tokens, minimum in MIN_RATIO.items():
        dense_s = _latency(results, "full-attention", tokens, "ttft_s")
        ours_s = _latency(results, "sala", tokens, "ttft_s")
        note = "" if None in (dense_s, ours_s) else f"{dense_s:.4g} s ÷ {ours_s:.4g} s"
        figure = f"TTFT at {tokens // K}K, full attention ÷ ours"
        rows.append(Bar.at_least(figure, minimum, _ratio(dense_s, ours_s), note))
    for tokens, limit_s in ((1024 * K, 50.0), (64 * K, 2.4)):
        ours_s = _latency(results, "sala", tokens, "ttft_s")
        rows.append(Bar.at_most(f"TTFT at {tokens // K}K, s", limit_s, ours_s))
    for tokens, limit_ms in ((16 * K, 5.8), (1024 * K, 6.5)):
        tpot_s = _latency(results, "sala", tokens, "tpot_s")
        measured = None if tpot_s is None else tpot_s * 1e3
        rows.append(Bar.at_most(f"TPOT at {tokens // K}K, ms", limit_ms, measured))
    follow_up = results.one("sala", "follow_up", prompt_tokens=CONTEXT, order=0)
    note = f"{_get(follow_up, 'cached_tokens')} tokens cached" if follow_up else ""
    figure = "TTFT of a second question on a cached 1M document, s"
    rows.append(Bar.at_most(figure, 0.5, _get(follow_up, "ttft_s", "median"), note))
    rows.append(_throughput(results))
    rows += _serving(results)
    rows += _memory(results)
    rows += _correctness(results)
    kernels = [line for line in results.find("kernels", "kernel") if not line["variant"]]
    wrong = sum("failed" in line for line in kernels)
    wrong += len(results.find("kernels", "kernel_inputs"))
    slow = sum(line.get("roofline_frac", 1.0) < MIN_ROOFLINE_FRAC for line in kernels)
    count = len(kernels) or None
    note = "" if count is None else f"of {count} cases"
    rows.append(Bar.at_most("operators that fail or are wrong", 0, count and wrong, note))
    rows.append(Bar.at_most("operators below 60 % of their roofline", 0, count and slow, note))
    return rows


def _throughput(results: Results) -> Bar:
    lines = sorted(results.find("sala", "decode_throughput"), key=lambda line: line["requests"])
    figure = "decode throughput, 16 requests at 128K ÷ one"
    if len(lines) < 2:
        return Bar.at_least(figure, 8.0, None)
    one, many = (line["tokens_per_s"] for line in (lines[0], lines[-1]))
    return Bar.at_least(figure, 8.0, _ratio(many, one), f"{many:g} ÷ {one:g} tokens/s")


def _serving(results: Results) -> list[Bar]:
    idle, beside = (results.one("serving", name) for name in ("short_idle", "short_beside"))
    idle_s, beside_s = (_get(line, "ttft_s", "median") for line in (idle, beside))
    note = (
        f"{idle_s * 1e3:.4g} ms idle, beside: {_get(beside, 'ttft_s', 'repeats')} arrivals, "
        f"slowest {_get(beside, 'max_ttft_s') * 1e3:.4g} ms"
        if idle_s and beside_s
        else ""
    )
    prefill = results.one("serving", "long_prefill")
    return [
        Bar.at_most(
            "TTFT of short requests, beside a 1M prefill ÷ idle",
            4.0,
            _ratio(beside_s, idle_s),
            note,
        ),
        Bar.at_most(
            "1M prefill slowed by short requests, share", 0.1, _get(prefill, "slowed_by_frac")
        ),
    ]


def _memory(results: Results) -> list[Bar]:
    line = results.one("sala", "memory", prompt_tokens=CONTEXT)
    off = _get(line, "held_over_formula")
    figure = "memory of a 1M context, off its formula by"
    return [
        Bar.at_most(figure, 0.05, None if off is None else abs(off - 1)),
        Bar.at_least("1M contexts that stay resident", 12, _get(line, "contexts_resident")),
    ]


def _correctness(results: Results) -> list[Bar]:
    selections = [line for line in results.find("correctness", "selection") if "failed" not in line]
    overlap = min((line["overlap_frac"] for line in selections), default=None)
    no_forced = sum(not line["all_forced"] for line in selections) if selections else None
    contexts = ", ".join(str(c) for c in sorted({line["context"] for line in selections}))
    greedy = [line for line in results.find("correctness", "greedy") if "failed" not in line]
    exact = [line for line in greedy if line["dtype"] == "float32"]
    rounded = [line for line in greedy if line["dtype"] == "bfloat16" and line["run"] != FP8]
    gap_8_bits = max(
        (line["largest_logit_gap"] for line in greedy if line["run"] == FP8), default=None
    )
    wrong = sum(line["mismatches"] for line in exact) if exact else None
    note = "; ".join(
        f"bfloat16: {line['mismatch_frac']:.2%} other, logit gap at most {line['largest_logit_gap']:.3g}"
        for line in rounded
    )
    broken = sum(
        "failed" in line
        for name in ("selection", "greedy")
        for line in results.find("correctness", name)
    )
    checked = bool(selections or greedy or broken)
    tests = results.one("tests", "tests")
    failed = None if tests is None else tests["failed"] or int(tests["exit"] != 0)
    return [
        Bar.at_most("correctness checks that broke off", 0, broken if checked else None),
        Bar.at_least("selected blocks shared with float64, worst", 0.999, overlap, contexts),
        Bar.at_most("selections without a forced block", 0, no_forced),
        Bar.at_most("greedy tokens other than the reference's, float32", 0, wrong, note),
        Bar.at_most("largest logit gap of a token chosen with fp8 weights", 0.5, gap_8_bits),
        Bar.at_most(
            "tests of kernels and engine failed",
            0,
            failed,
            f"of {tests['tests']}, {tests['skipped']} skipped" if tests else "",
        ),
    ]


def operators(results: Results) -> str:
    """Format the operators' times."""
    rows = [
        "| operator | shape | ms (p10 to p90) | limited by | of the roofline | rivals, ms | SGLang as published, ms |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for line in results.find("kernels", "kernel"):
        shape = ", ".join(f"{name} {value}" for name, value in line["shape"].items())
        shape += "".join(f"; {name}={value}" for name, value in line["variant"].items())
        if "failed" in line:
            rows.append(f"| {line['op']} | {shape} | {line['failed'][:80]} | | | | |")
            continue
        published = line["sglang_published_ms"] or ""
        low, mid, high = (line["time_us"][name] / 1e3 for name in ("p10", "median", "p90"))
        rivals = "; ".join(
            f"{name}: {times['median'] / 1e3:.3g}" for name, times in line["rivals_us"].items()
        )
        rows.append(
            f"| {line['op']} | {shape} | {mid:.3g} ({low:.3g} to {high:.3g}) | {line['limit']} | "
            f"{line['roofline_frac']:.0%} | {rivals} | {published and f'{published:.3g}'} |"
        )
    return "\n".join(rows)


def latencies(results: Results) -> str:
    """Format latency by prompt length."""
    rows = ["| prompt tokens | TTFT, s | TPOT, ms | full attention: TTFT, s | TPOT, ms |"]
    rows.append("| --- | --- | --- | --- | --- |")
    tokens = {
        line["prompt_tokens"]
        for stage in ("sala", "full-attention")
        for line in results.find(stage, "latency")
    }
    for count in sorted(tokens):
        cells = [f"{count:,}"]
        for stage in ("sala", "full-attention"):
            for what, factor in (("ttft_s", 1.0), ("tpot_s", 1e3)):
                value = _latency(results, stage, count, what)
                cells.append("" if value is None else f"{value * factor:.3g}")
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def offloads(results: Results) -> str:
    """Return what it takes to answer again after eviction, with and without CPU memory."""
    rows = [
        "| CPU memory, GiB | prompt tokens | brought back | first, s | again, s | tokens equal |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for line in results.find("offload", "come_back"):
        rows.append(
            f"| {line['offload_gib'] or 'none'} | {line['prompt_tokens']:,} | {line['external_hit_tokens']:,} "
            f"| {line['first_s']:.3g} | {line['again_s']:.3g} | {'yes' if line['equal'] else '**no**'} |"
        )
    return "\n".join(rows)


def needles(results: Results) -> str:
    """Format the answers about passkeys."""
    rows = ["| prompt tokens | right | TTFT, s |", "| --- | --- | --- |"]
    for line in results.find("needle", "needle"):
        right = round(line["right_frac"] * line["cases"])
        rows.append(
            f"| {line['prompt_tokens']:,} | {right} of {line['cases']} | {line['ttft_s']['median']:.3g} |"
        )
    return "\n".join(rows)


def _starts(results: Results) -> list[dict[str, Any]]:
    found = (results.one(stage, START) for stage in STAGE_LIMIT_S)
    return [line for line in found if line]


def markdown(results: Results) -> str:
    """Format everything."""
    parts = [
        "# GPU benchmark",
        "Each figure is a median; `results.jsonl` has the spread and settings.",
    ]
    arguments = [
        argument for line in _starts(results) for argument in line["settings"].get("arguments", ())
    ]
    if "miniature" in arguments:
        parts.append(
            "**A miniature on a CPU: it shows that the benchmark runs, its times mean nothing.**"
        )
    runs = ["| stage | outcome | s | device | versions | commit |"]
    runs.append("| --- | --- | --- | --- | --- | --- |")
    for stage in STAGE_LIMIT_S:
        start, end = results.one(stage, START), results.one(stage, END)
        if start:
            versions = ", ".join(f"{name} {number}" for name, number in start["versions"].items())
            outcome, wall_s = _get(end, "outcome") or "not ended", _get(end, "wall_s") or ""
            where = f"{start['device']}, driver {start['driver']}"
            runs.append(
                f"| {stage} | {outcome} | {wall_s} | {where} | {versions} | {start['commit']} |"
            )
    parts.append("\n".join(runs))
    table = ["| figure | bar | measured | reached | note |", "| --- | --- | --- | --- | --- |"]
    table += [bar.row() for bar in bars(results)]
    parts += ["## Bars", "\n".join(table), "## Latency by length", latencies(results)]
    parts.append(
        f"Plots: `ttft.png`, `tpot.png`; {SGLANG_LABEL}: published figures, not of this run."
    )
    parts += ["## Operators", operators(results)]
    if drafts := results.find("ngram", "drafts"):
        rows = ["## Drafts looked up in the prompt"]
        rows += [
            f"- {line['prompt']}: {line['speed_up']['median']:.2f} times as fast, tokens "
            f"{'equal' if line['equal_tokens'] else '**differ**'}"
            for line in drafts
        ]
        parts.append("\n".join(rows))
    if results.find("needle", "needle"):
        parts += ["## Passkeys, demo checkpoint", needles(results)]
    if results.find("offload", "come_back"):
        parts += ["## A prompt that was evicted from the GPU, asked again", offloads(results)]
    return "\n\n".join(parts) + "\n"


def plot(results: Results, out: Path) -> None:
    """Draw TTFT and TPOT by prompt length: ours, full attention of this run, SGLang as published."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    for index, (what, title, factor, scale) in enumerate(
        (
            ("ttft_s", "time to first token, s", 1.0, "log"),
            ("tpot_s", "time per output token, ms", 1e3, "linear"),
        )
    ):
        figure, axes = plt.subplots(figsize=(8, 5))
        for stage, label, style in (
            ("sala", "SALA 9B, this engine", "o-"),
            ("full-attention", "full attention (Qwen3-8B's shape), same vLLM, same run", "s-"),
        ):
            lines = sorted(results.find(stage, "latency"), key=lambda line: line["prompt_tokens"])
            x = [line["prompt_tokens"] for line in lines]
            axes.plot(x, [line[what]["median"] * factor for line in lines], style, label=label)
        published = [values[index] * factor for values in SGLANG_S.values()]
        axes.plot(list(SGLANG_S), published, "^--", color="grey", label=SGLANG_LABEL)
        axes.set_xscale("log", base=2)
        axes.set_yscale(scale)
        axes.set_xticks(list(SGLANG_S), [f"{tokens // K}K" for tokens in SGLANG_S])
        axes.set_xlabel("prompt tokens")
        axes.set_ylabel(title)
        if scale == "linear":
            axes.set_ylim(bottom=0)
        axes.grid(visible=True, alpha=0.3)
        axes.legend(fontsize="small")
        figure.savefig(out / f"{what.removesuffix('_s')}.png", dpi=120, bbox_inches="tight")
        plt.close(figure)


def write(out: Path) -> str:
    """Write the report and the plots into ``out``; return the report's text."""
    results = Results.read(out / RESULTS)
    text = markdown(results)
    (out / REPORT).write_text(text, encoding="utf-8")
    try:
        plot(results, out)
    except ImportError:
        text += "\nNo plots: matplotlib is not installed; run the report stage where it is.\n"
    return text
