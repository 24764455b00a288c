"""Contact sheets: rows of pictures, enlarged without smoothing."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

_GAP = 2


def contact_sheet(rows: Sequence[np.ndarray], scale: int = 3) -> Image.Image:
    """Rows of uint8 pictures [N, H, W, 3] (all of one size) on white, pixels enlarged `scale` times."""
    height, width = rows[0].shape[1:3]
    columns = max(len(row) for row in rows)
    step_y, step_x = height * scale + _GAP, width * scale + _GAP
    sheet = np.full((len(rows) * step_y, columns * step_x, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            enlarged = picture.repeat(scale, axis=0).repeat(scale, axis=1)
            sheet[y * step_y : y * step_y + height * scale, x * step_x : x * step_x + width * scale] = (
                enlarged
            )
    return Image.fromarray(sheet)
