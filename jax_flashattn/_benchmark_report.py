"""What the benchmark measured, and how it is shown: work, ratios, tables, CSV and plots."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

# Work of each pass in units of the forward's. The backward does five products of the score matrix's
# size where the forward does two (FlashAttention-2, arXiv 2307.08691, section 4.1).
PASSES = {"forward": 1.0, "backward": 2.5, "both": 3.5}


class Shape(NamedTuple):
    """One row: self-attention of `length` tokens."""

    head_dim: int
    batch: int
    length: int
    heads: int
    kv_heads: int
    causal: bool

    def __str__(self):
        d, b, s, h, hk, causal = self
        return f"d {d}, b {b}, s {s}, heads {h}/{hk}, {'causal' if causal else 'full'}"


class Measured(NamedTuple):
    """One call of one variant."""

    seconds: float
    sm_clock_mhz: int | None  # while it ran


def flop(shape: Shape, which: str) -> float:
    """Floating point operations as the field counts them: 4·b·h·s²·d forward, half when causal.

    The softmax is not counted, nor is what an implementation computes twice or masks afterwards.
    """
    square = 4 * shape.batch * shape.heads * shape.length**2 * shape.head_dim
    return PASSES[which] * (square / 2 if shape.causal else square)


@dataclasses.dataclass
class Report:
    """Everything measured in one run; a variant that could not run a row has no entry there."""

    ours: list[str]
    theirs: list[str]
    baseline: str
    passes: list[str]
    dtype: str
    device: str
    measured: dict[tuple[Shape, str, str], Measured] = dataclasses.field(default_factory=dict)

    @property
    def variants(self) -> list[str]:
        """Every variant, ours first."""
        return self.ours + self.theirs

    def shapes(self) -> list[Shape]:
        """The rows that anything ran, in the order of running."""
        return list(dict.fromkeys(shape for shape, _, _ in self.measured))

    def tflops(self, shape: Shape, which: str, variant: str) -> float | None:
        """TFLOP/s, or None where the variant did not run."""
        found = self.measured.get((shape, which, variant))
        return None if found is None else flop(shape, which) / found.seconds / 1e12

    def ratio(self, shape: Shape, which: str, variant: str) -> float | None:
        """Speed in units of the baseline's, above 1 where the variant is faster than it."""
        speed, base = (self.tflops(shape, which, v) for v in (variant, self.baseline))
        return None if speed is None or base is None else speed / base

    def clocks(self, shape: Shape) -> list[int]:
        """The SM clocks seen during this row, in MHz, lowest first."""
        seen = [m.sm_clock_mhz for (s, _, _), m in self.measured.items() if s == shape]
        return sorted(mhz for mhz in seen if mhz is not None)


def number(x: float | None) -> str:
    """Three significant digits and no exponent; empty for None."""
    if x is None:
        return ""
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def cells(report: Report, passes: Iterable[str], label: str = "") -> list[list[str]]:
    """A table as rows of strings, its header first: TFLOP/s, then our ratios to the baseline.

    `label` names each pass in the header, from its name: "{} " where the table shows several.
    """
    header = ["d", "b", "s", "h/hk", "causal"]
    for which in passes:
        prefix = label.format(which)
        header += [prefix + variant for variant in report.variants]
        header += [f"{prefix}{ours} / {report.baseline}" for ours in report.ours]
    with_clocks = any(report.clocks(shape) for shape in report.shapes())
    rows = [header + ["SM MHz"] * with_clocks]
    for shape in report.shapes():
        d, b, s, h, hk, causal = shape
        row = [str(d), str(b), str(s), f"{h}/{hk}", "yes" if causal else "no"]
        for which in passes:
            row += [number(report.tflops(shape, which, v)) for v in report.variants]
            ratios = (report.ratio(shape, which, v) for v in report.ours)
            row += ["" if r is None else f"{r:.2f}" for r in ratios]
        if with_clocks:
            clocks = report.clocks(shape)
            row.append(f"{clocks[0]}-{clocks[-1]}" if clocks else "")
        rows.append(row)
    return rows


def aligned(table: list[list[str]]) -> str:
    """For a terminal: columns as wide as their widest cell, right-justified."""
    widths = [max(map(len, column)) for column in zip(*table)]
    lines = ["  ".join(x.rjust(width) for x, width in zip(row, widths)) for row in table]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(table: list[list[str]]) -> str:
    """For a README."""
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + "---|" * len(table[0]), *lines[1:]])


COLUMNS = (
    *Shape._fields, "dtype", "pass", "variant", "milliseconds", "tflops", "baseline", "ratio",
    "sm_clock_mhz", "device",
)  # fmt: skip


def write_csv(report: Report, path: Path) -> None:
    """One line for each row, pass and variant; empty cells where a variant did not run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for shape in report.shapes():
            for which in report.passes:
                for variant in report.variants:
                    found = report.measured.get((shape, which, variant))
                    writer.writerow([
                        *map(int, shape), report.dtype, which, variant,
                        found and 1e3 * found.seconds, report.tflops(shape, which, variant),
                        report.baseline, report.ratio(shape, which, variant),
                        found and found.sm_clock_mhz, report.device,
                    ])  # fmt: skip


Line = tuple[str, str, str, Callable[[Shape], float | None]]  # label, colour, style, value


def write_plots(report: Report, folder: Path) -> list[Path]:
    """tflops_<pass>.png for each pass, and ratio.png where the baseline ran; the files written."""
    colour = {variant: f"C{i}" for i, variant in enumerate(report.variants)}
    style = dict(zip(PASSES, ("-", "--", ":")))
    figures: dict[str, tuple[str, list[Line]]] = {}
    for which in report.passes:
        lines = [
            (v, colour[v], "-", lambda shape, v=v, w=which: report.tflops(shape, w, v))
            for v in report.variants
        ]
        figures[f"tflops_{which}"] = (f"{which}, TFLOP/s", lines)
    ratios = [
        (f"{v} {w}", colour[v], style[w], lambda shape, v=v, w=w: report.ratio(shape, w, v))
        for v in report.ours
        for w in report.passes
    ]
    figures["ratio"] = (f"speed in units of {report.baseline}'s", ratios)
    written = []
    for name, (label, lines) in figures.items():
        drawn = [x for x in lines if any(x[3](shape) is not None for shape in report.shapes())]
        if drawn:
            written.append(folder / f"{name}.png")
            draw(report, label, drawn, written[-1], one=name == "ratio")
    return written


def draw(report: Report, label: str, lines: list[Line], path: Path, *, one: bool) -> None:
    """One panel for each head dim and mask, lengths from left to right; `one` draws a line at 1."""
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state

    shapes = sorted(report.shapes(), key=lambda x: (x.length, *x))
    head_dims = sorted({shape.head_dim for shape in shapes})
    masks = sorted({shape.causal for shape in shapes})
    size = (max(7, 4.5 * len(head_dims)), 1 + 3.2 * len(masks))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(masks), len(head_dims), squeeze=False)
    for i, causal in enumerate(masks):
        for j, head_dim in enumerate(head_dims):
            axes = panels[i, j]
            here = [x for x in shapes if (x.head_dim, x.causal) == (head_dim, causal)]
            for name, colour, style, value in lines:
                values = [value(shape) for shape in here]
                y = [float("nan") if x is None else x for x in values]
                axes.plot(range(len(here)), y, style, color=colour, marker="o", label=name)
            if one:
                axes.axhline(1, color="black", linewidth=0.8)
            ticks = [f"{x.length}\nb {x.batch}\n{x.heads}/{x.kv_heads}" for x in here]
            axes.set_xticks(range(len(here)), ticks, fontsize="small")
            axes.set_title(f"head dim {head_dim}, {'causal' if causal else 'full'}")
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize="small")
    figure.supxlabel("sequence length, batch, heads / key heads", fontsize="medium")
    figure.suptitle(f"{label} ({report.dtype}, {report.device})")
    figure.savefig(path, dpi=120)
