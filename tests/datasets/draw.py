"""Miniatures of published folders: tiny images, the names and trees of the real thing."""

import csv

import cv2
import numpy as np
import openpyxl
import tifffile

from g2l_core.datasets.manifest import write_manifest
from g2l_core.datasets.table import DATASETS


def picture(seed, height=8, width=None):
    return np.random.default_rng(seed).integers(0, 256, (height, width or height, 3), np.uint8)


def image(path, seed=0, height=8, width=None):
    """Draw an image in the format that the suffix says; returns its pixels (exact for PNG and TIFF)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = picture(seed, height, width)
    if path.suffix == ".tif":
        tifffile.imwrite(path, pixels)
    else:
        cv2.imwrite(str(path), pixels[..., ::-1])
    return pixels


def empty(path):
    """A slide that no reader of a folder opens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def slide(path, width, height, seed=0):
    """A tiled TIFF without a scale in its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, picture(seed, height, width), tile=(256, 256), photometric="rgb")


def mask(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, pixels.astype(np.uint8), tile=(256, 256), compression="zlib")


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def spreadsheet(path, sheet, rows):
    """An .xlsx whose second sheet has the rows."""
    book = openpyxl.Workbook()
    book.create_sheet(sheet)
    for row in rows:
        book[sheet].append(row)
    path.parent.mkdir(parents=True, exist_ok=True)
    book.save(path)


def made(name, root, out):
    """Write a dataset's manifest; returns what was written, the manifest's rows and the label file's."""
    written = write_manifest(DATASETS[name], root, out / f"{name}.csv")
    return written, rows(written.manifest), rows(written.labels) if written.labels else None


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def column(table, *names):
    """Some columns of a table, row by row."""
    return [tuple(row[name] for name in names) if len(names) > 1 else row[names[0]] for row in table]
