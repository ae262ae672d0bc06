"""Glyphs as a recognition data set: a class is a character, its samples are 12 faces under random distortion.

The faces, DejaVu for text, are the ones inside matplotlib, so nothing is downloaded. Only characters that every face
has are used, those without ink are dropped, and characters that no face tells apart (Latin A, Greek Alpha, Cyrillic A)
become one class.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.ft2font import FT2Font
from PIL import ImageFont
from torch import Tensor

CANVAS = 48  # pixels a side of a drawing
IMAGE = 32  # pixels a side of what the network sees
EM = 36  # pixels per em of a drawing
BASELINE = 35  # row of a drawing on which the letters stand


@dataclass(frozen=True)
class Glyphs:
    """Drawings of every class in every face, and the characters they came from."""

    drawings: Tensor  # [classes, faces, CANVAS, CANVAS] uint8, ink is 255
    characters: list[str]  # one string a class: all characters with these drawings
    faces: list[str]
    common: int  # characters that every face has
    inkless: int  # of them without ink


@dataclass(frozen=True)
class Distortion:
    """The largest distortion of a sample: angles in degrees, shift in parts of the image side."""

    rotation: float = 10.0
    shear: float = 8.0
    scale: float = 0.1
    shift: float = 0.04
    contrast: float = 0.4
    noise: float = 0.05


def text_faces() -> list[Path]:
    """The DejaVu text faces that matplotlib ships: Sans, Sans Mono and Serif; upright and slanted; regular and bold."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    faces = [p for family in ("Sans", "Serif") for p in folder.glob(f"DejaVu{family}*.ttf") if "Display" not in p.stem]
    return sorted(faces)


class Pen:
    """Draws characters of one face."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fonts: dict[int, ImageFont.FreeTypeFont] = {}

    def _ink(self, character: str, size: int) -> tuple[np.ndarray, int]:
        """Coverage of the inked rectangle at `size` pixels per em, and its first row relative to the baseline."""
        if size not in self.fonts:
            engine = ImageFont.Layout.BASIC
            self.fonts[size] = ImageFont.truetype(str(self.path), size, layout_engine=engine)
        mask, (_, top) = self.fonts[size].getmask2(character, mode="L", anchor="ls")
        left, upper, right, lower = mask.getbbox() or (0, 0, 0, 0)
        pixels = np.array(mask, dtype=np.uint8).reshape(mask.size[::-1])
        return pixels[upper:lower, left:right], top + upper

    def draw(self, character: str) -> np.ndarray | None:
        """The character on a CANVAS x CANVAS raster, centred from left to right; None where it has no ink.

        A drawing that does not fit is drawn smaller.
        """
        for size in range(EM, 0, -1):
            ink, top = self._ink(character, size)
            height, width = ink.shape
            row, column = BASELINE + top, (CANVAS - width) // 2
            if ink.size == 0:
                return None
            if width <= CANVAS and row >= 0 and row + height <= CANVAS:
                break
        canvas = np.zeros((CANVAS, CANVAS), dtype=np.uint8)
        canvas[row : row + height, column : column + width] = ink
        return canvas


def load_glyphs() -> Glyphs:
    """Draw every character that all text faces have, and merge those with equal drawings in every face."""
    paths = text_faces()
    common = sorted(set.intersection(*(set(FT2Font(str(p)).get_charmap()) for p in paths)))
    pens = [Pen(p) for p in paths]
    classes: dict[bytes, tuple[np.ndarray, list[str]]] = {}
    inkless = 0
    for character in map(chr, common):
        drawings = [pen.draw(character) for pen in pens]
        if any(d is None for d in drawings):
            inkless += 1
            continue
        stack = np.stack(drawings)
        classes.setdefault(stack.tobytes(), (stack, []))[1].append(character)
    return Glyphs(
        drawings=torch.from_numpy(np.stack([stack for stack, _ in classes.values()])),
        characters=["".join(characters) for _, characters in classes.values()],
        faces=[p.stem for p in paths],
        common=len(common),
        inkless=inkless,
    )


def distort(drawings: Tensor, generator: torch.Generator, most: Distortion | None = None) -> Tensor:
    """Images [B, 1, IMAGE, IMAGE] of drawings [B, CANVAS, CANVAS], each distorted in its own way."""
    most = most or Distortion()
    n = len(drawings)
    rotation, shear, scale_x, scale_y, shift_x, shift_y, contrast = torch.rand(7, n, generator=generator) * 2 - 1
    angle = rotation * math.radians(most.rotation)
    slant = torch.tan(shear * math.radians(most.shear))
    cos, sin = angle.cos(), angle.sin()
    wide, high = torch.exp(scale_x * most.scale), torch.exp(scale_y * most.scale)
    row_x = torch.stack([cos * wide, (cos * slant - sin) * high, shift_x * 2 * most.shift], 1)
    row_y = torch.stack([sin * wide, (sin * slant + cos) * high, shift_y * 2 * most.shift], 1)
    grid = F.affine_grid(torch.stack([row_x, row_y], 1), [n, 1, IMAGE, IMAGE], align_corners=False)
    image = F.grid_sample(drawings[:, None].float() / 255, grid, mode="bilinear", align_corners=False)
    image = image * (1 - most.contrast * (contrast + 1) / 2).view(n, 1, 1, 1)
    return image + most.noise * torch.randn(image.shape, generator=generator)
