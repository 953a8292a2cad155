"""A section's picture below the cells of a map."""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import plotly.graph_objects as go

__all__ = ["lay_under"]

OPACITY = 0.65
"""Of the cells, so that the picture shows through."""
HEIGHT_PX = 640


def lay_under(figure: go.Figure, picture: np.ndarray, size_um: tuple[float, float]) -> go.Figure:
    """The same figure with a picture below its points, and axes that show the whole picture.

    Parameters
    ----------
    figure: of :func:`perturb.charts.cell_map`, y downwards, in um from the section's top left corner.
    picture: uint8 ``[h, w, 3]``. size_um: its width and height.
    """
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=85)
    width, height = size_um
    figure.add_layout_image(
        source="data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode(),
        xref="x",
        yref="y",
        x=0,
        y=0,
        xanchor="left",
        yanchor="top",
        sizex=width,
        sizey=height,
        sizing="stretch",
        layer="below",
    )
    figure.update_traces(opacity=OPACITY)
    figure.update_xaxes(range=[0, width], showgrid=False)
    figure.update_yaxes(range=[height, 0], autorange=False, showgrid=False)
    return figure.update_layout(height=HEIGHT_PX)
