"""The report's charts as inline SVG: the loss over the stream, a small curve a task, bars a task.

Colours come from the page's style sheet. Every text passes through Markup.format, which escapes it.
"""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup

from .numbers import percent

Points = list[tuple[float, float]]  # (step, loss)
POINTS_A_CHART = 1200  # more would only make the file heavier: the wide chart is about 900 pixels wide


def figure(name: str, width: int, height: int, label: str, parts: list[Markup]) -> Markup:
    """An image with a name: what is read aloud is `label`."""
    head = Markup('<svg class="chart {}" viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>').format(name, width, height, label, label)
    return head + Markup("").join(parts) + Markup("</svg>")


# ---- training loss


def loss_charts(segments: list[tuple[int, str, Points]]) -> list[Markup]:
    """The loss for a wide page and for a phone, where the wide one's letters would be too small to read; the style sheet shows one of them."""
    shapes = (("wide", 960, 270, POINTS_A_CHART), ("narrow", 400, 230, POINTS_A_CHART // 3))
    return [chart for name, width, height, most in shapes if (chart := loss_chart(segments, width, height, name, most))]


def loss_chart(
    segments: list[tuple[int, str, Points]], width: int = 960, height: int = 270, name: str = "wide", most: int = POINTS_A_CHART
) -> Markup | None:
    """One line a task, (index, task, [(step, loss)]) each, along the whole stream; faint is what was logged, strong its running mean."""
    if not segments:
        return None
    left, right, top, bottom = 44, 8, 30, 40
    total = sum(points[-1][0] for _, _, points in segments) or 1.0
    ceiling, tick = nice_ceiling(max(loss for _, _, points in segments for _, loss in points))
    floor = min(0.0, min(loss for _, _, points in segments for _, loss in points))
    parts, said, start = [], [], 0.0

    def x(step: float) -> float:
        return left + (width - left - right) * step / total

    def y(loss: float) -> float:
        return top + (height - top - bottom) * (ceiling - loss) / (ceiling - floor)

    for level in (tick * k for k in range(round(ceiling / tick) + 1)):
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(left, width - right, y(level), y(level)))
        parts.append(Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{:g}</text>').format(left - 8, y(level) + 4, level))
    for index, task, points in segments:
        end = start + points[-1][0]
        said.append(f"{task} from {points[0][1]:.3g} to {points[-1][1]:.3g} in {points[-1][0]:g} steps")
        room = int((x(end) - x(start) - 10) / 7)  # characters of about 7 pixels; a task too narrow for a word shows its number
        label = task if len(task) <= room else f"{task[: room - 1]}…" if room >= 5 else str(index + 1)
        parts.append(Markup('<line class="boundary" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(x(start), top - 18, height - bottom))
        parts.append(Markup('<text class="label" x="{:.1f}" y="{}">{}<title>{}</title></text>').format(x(start) + 6, top - 8, label, task))
        if len(f"{end:g}") <= room + 1 or index == segments[-1][0]:
            parts.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="end">{:g}</text>').format(x(end), height - bottom + 16, end))
        thin = thinned(points, max(2, most // len(segments)))
        for kind, line in (("raw", thin), ("mean", running_mean(thin, max(1, len(thin) // 24)))):
            drawn = " ".join(f"{x(start + step):.1f},{y(loss):.1f}" for step, loss in line)
            parts.append(Markup('<polyline class="{}" points="{}"><title>{}</title></polyline>').format(kind, drawn, said[-1]))
        start = end
    parts.append(Markup('<text class="tick" x="{}" y="{}">training steps over the stream</text>').format(left, height - 6))
    return figure(name, width, height, f"Training loss over the stream: {'; '.join(said)}", parts)


def nice_ceiling(value: float) -> tuple[float, float]:
    """The top of an axis and the distance of its ticks: 3 to 6 ticks of 1, 2, 2.5 or 5 times a power of ten.

    >>> nice_ceiling(2.3)
    (2.5, 0.5)
    """
    if value <= 0:
        return 1.0, 0.5
    power = 10.0 ** math.floor(math.log10(value))
    tick = next(power * k for k in (0.2, 0.25, 0.5, 1.0, 2.0, 2.5) if value / (power * k) <= 5)
    return tick * math.ceil(value / tick), tick


def thinned(points: Points, most: int) -> Points:
    """At most `most` points, each the mean loss of a bucket of neighbours at the bucket's last step."""
    size = math.ceil(len(points) / most)
    buckets = [points[i : i + size] for i in range(0, len(points), size)]
    return [(bucket[-1][0], sum(loss for _, loss in bucket) / len(bucket)) for bucket in buckets]


def running_mean(points: Points, window: int) -> Points:
    """Mean of up to `window` neighbours on each side (a mean of the past alone would hang above a falling loss)."""
    smooth = []
    for i, (step, _) in enumerate(points):
        reach = min(window, i, len(points) - 1 - i)
        near = [loss for _, loss in points[i - reach : i + reach + 1]]
        smooth.append((step, sum(near) / len(near)))
    return smooth


# ---- one task over the tasks learned


def curve_chart(curve: dict[str, Any], tasks: int, width: int = 300, height: int = 130) -> Markup:
    """One curve of scores.curves: 0 to 100 % over the `tasks` of the run.

    The task's own training is a band, the first scorer the strong line, probes the faint ones.
    """
    left, right, top, bottom = 30, 46, 8, 22

    def x(place: float) -> float:
        return left + (width - left - right) * place / max(tasks, 1)

    def y(score: float) -> float:
        return top + (height - top - bottom) * (1 - min(max(score, 0.0), 1.0))

    parts, said, taken = [], [], []
    if curve["trained"]:
        a, b = (x(place) for place in curve["trained"])
        parts.append(Markup('<rect class="band" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>').format(a, top, b - a, height - top - bottom))
    for level in (0, 50, 100):
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(left, width - right, y(level / 100), y(level / 100))
        )
        parts.append(Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(left - 6, y(level / 100) + 4, level))
    every = max(1, math.ceil(tasks / 6))
    for place in range(0, tasks + 1, every):
        parts.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(x(place), height - 6, place))
    for rank, line in reversed(list(enumerate(curve["lines"]))):  # the first scorer is drawn last, on top
        kind, points = "mean" if rank == 0 else "other", line["points"]
        for looks in line["looks"] if rank == 0 else ():
            if len(looks) > 1:
                parts.append(Markup('<polyline class="raw" points="{}"/>').format(" ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in looks)))
        parts.append(Markup('<polyline class="{}" points="{}"/>').format(kind, " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)))
        if tasks <= 24:
            for a, b in points:
                parts.append(
                    Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="2.5"><title>{}: {} %</title></circle>').format(
                        kind, x(a), y(b), line["scorer"], percent(b)
                    )
                )
    for rank, line in enumerate(curve["lines"]):
        at, last = line["points"][-1]
        if all(abs(y(last) - other) >= 11 for other in taken):  # a number upon a number is none
            parts.append(
                Markup('<text class="end {}" x="{:.1f}" y="{:.1f}">{}</text>').format(
                    "first" if rank == 0 else "", x(at) + 6, y(last) + 4, percent(last)
                )
            )
            taken.append(y(last))
        values = ", ".join(f"{percent(b)} after {a:g}" if a else f"{percent(b)} before" for a, b in line["points"])
        said.append(f"{line['scorer']} {values}")
    return figure("small", width, height, f"{curve['name']}, % over the tasks learned: {'; '.join(said)}", parts)


# ---- growth of the protected space


def space_chart(rows: list[dict[str, Any]], width: int = 380, height: int = 160) -> Markup | None:
    """Bars: the share of the layers' input directions that is protected after each task, of protection.space_rows."""
    bars = [(row["index"], row["task"], row["share"]) for row in rows if row["share"] is not None]
    if not bars:
        return None
    left, right, top, bottom = 40, 8, 18, 26
    ceiling, tick = nice_ceiling(100 * max(share for *_, share in bars))
    ceiling = min(ceiling, 100.0) if ceiling > 100 and max(share for *_, share in bars) <= 1 else ceiling
    step = (width - left - right) / len(bars)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - value / ceiling)

    parts = []
    for level in (tick * k for k in range(round(ceiling / tick) + 1)):
        parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(left, width - right, y(level), y(level)))
        parts.append(Markup('<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{:g}</text>').format(left - 6, y(level) + 4, level))
    every = max(1, math.ceil(len(bars) * 26 / (width - left - right)))
    for place, (index, task, share) in enumerate(bars):
        wide = min(0.55 * step, 40.0)
        a, top_of = left + step * (place + 0.5), y(100 * share)
        bar = Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>after {}: {} %</title></rect>')
        parts.append(bar.format(a - wide / 2, top_of, wide, height - bottom - top_of, task, percent(share)))
        if len(bars) <= 10:
            parts.append(Markup('<text class="end first" x="{:.1f}" y="{:.1f}" text-anchor="middle">{}</text>').format(a, top_of - 5, percent(share)))
        if place % every == 0:
            parts.append(Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(a, height - 8, index + 1))
    said = "; ".join(f"{percent(share)} after {task}" for _, task, share in bars)
    return figure("medium", width, height, f"Share of the input directions that is protected, %: {said}", parts)
