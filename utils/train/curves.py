"""The picture of a run: accuracy and loss over the epochs."""

import io
from pathlib import Path

from utils.base.files import replace_file


def draw_curves(history: list[dict], title: str, path: Path) -> None:
    """Writes a PNG with top-1 accuracy on the left and loss on the right, training and test.

    Args:
        history: rows of metrics.csv.
        title: above both.
        path: of the PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    for panel, kind, label in zip(panels, ("acc", "loss"), ("top-1 accuracy (%)", "loss"), strict=True):
        for split in ("train", "test"):
            values = [row[f"{split}_{kind}"] for row in history]
            marker = "o" if len(epochs) <= 30 else None
            panel.plot(epochs, values, marker=marker, markersize=3, label=f"{split}, last {values[-1]:.2f}")
        panel.set(xlabel="epoch", ylabel=label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(title)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    replace_file(path, picture.getvalue())
