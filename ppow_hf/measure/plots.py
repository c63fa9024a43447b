"""The few pictures that training and benchmarks leave behind, drawn with matplotlib.

Knows series of numbers; knows nothing about models.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Points = Sequence[tuple[float, float]]
CROWDED = 6  # lines, from which on a legend has no place among them
COLOURS = 10  # of matplotlib's cycle; lines after them have them again, dashed


def plot_curves(
    *panels: Mapping[str, Points] | Path | str,
    title: str = "",
    x_label: str = "step",
    panel_titles: Sequence[str] | None = None,
) -> Path:
    """Draw one panel per mapping `{name: [(x, y), ...]}` side by side; the last argument is the PNG's path."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    path = Path(panels[-1])  # type: ignore[arg-type]
    mappings = [panel for panel in panels[:-1] if isinstance(panel, Mapping)]
    crowded = any(len(mapping) > CROWDED for mapping in mappings)
    size = (4.2 * len(mappings), 4.2 if crowded else 3.2)
    figure, axes = pyplot.subplots(1, len(mappings), figsize=size, squeeze=False, layout="constrained")
    for axis, mapping, panel_title in zip(axes[0], mappings, panel_titles or [""] * len(mappings), strict=True):
        axis.set_title(panel_title, fontsize=9)
        for number, (name, points) in enumerate(mapping.items()):
            if points:
                axis.plot(
                    *zip(*points, strict=True),
                    label=name,
                    linewidth=1.6,
                    marker="." if len(points) < 30 else "",
                    color=f"C{number % COLOURS}",
                    linestyle="-" if number < COLOURS else "--",
                )
        axis.set_xlabel(x_label)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    with_lines = [axis for axis in axes[0] if axis.lines]
    alike = len({tuple(mapping) for mapping in mappings}) == 1
    if with_lines and alike and (crowded or len(with_lines) > 1):  # one legend for all, below them
        columns = 4 if len(with_lines) > 1 else 2
        figure.legend(
            handles=with_lines[0].lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=8
        )
    else:
        for axis in with_lines:
            axis.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    return save_figure(figure, path)


def save_figure(figure: Any, path: str | Path) -> Path:
    """Write a figure as a PNG of 64 colours, a third of the size of full ones, and close it."""
    from matplotlib import pyplot
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = io.BytesIO()
    figure.savefig(whole, format="png", dpi=130)
    pyplot.close(figure)
    Image.open(whole).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)
    return path
