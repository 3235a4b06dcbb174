"""Picture of the density of each weight, by decoder layer and projection, for TensorBoard."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from leap_pl.masks import split_name

DOTS = 160  # an inch; a card of TensorBoard is about 340 dots wide, in which the labels must still be readable


def draw_densities(densities: Mapping[str, float]) -> Any:
    """Return a heat map of ``densities``, weight name → density, as an array of uint8 (height, width, 3).

    Weights outside the decoder blocks are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # importing it takes time, and only pictures need it
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    cells: dict[tuple[str, int], float] = {}
    for name, density in densities.items():
        layer, projection = split_name(name)
        if layer is not None:
            cells[projection, layer] = density
    projections = list(dict.fromkeys(projection for projection, _ in cells))
    layers = sorted({layer for _, layer in cells})
    grid = [[cells.get((projection, layer), float("nan")) for layer in layers] for projection in projections]
    size = (2.8 + 0.06 * len(layers), 1.2 + 0.26 * len(projections))
    figure = Figure(figsize=size, dpi=DOTS, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.subplots()
    image = axes.imshow(grid or [[float("nan")]], cmap="cividis", aspect="auto")
    axes.set_yticks(range(len(projections)), projections)
    step = max(1, len(layers) // 8)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("decoder layer")
    figure.colorbar(image, ax=axes, label="density", format=ScalarFormatter(useOffset=False))
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()  # the canvas is freed
