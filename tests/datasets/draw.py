"""Miniatures of published folders: tiny images, the names and trees of the real thing."""

import csv
import zipfile

import cv2
import numpy as np
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
    """An .xlsx by hand: the first row as shared strings, as spreadsheets write text, the rest as they are."""
    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    cells = [
        "".join(
            f'<c r="{"ABCDEFG"[j]}{i + 1}" t="s"><v>{j}</v></c>'
            if i == 0
            else f'<c r="{"ABCDEFG"[j]}{i + 1}"><v>{value}</v></c>'
            if isinstance(value, int)
            else f'<c r="{"ABCDEFG"[j]}{i + 1}" t="inlineStr"><is><t>{value}</t></is></c>'
            for j, value in enumerate(row)
            if value != ""
        )
        for i, row in enumerate(rows)
    ]
    body = "".join(f'<row r="{i + 1}">{row}</row>' for i, row in enumerate(cells))
    strings = "".join(f"<si><t>{value}</t></si>" for value in rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as book:
        book.writestr(
            "xl/workbook.xml",
            f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets><sheet name="Other" sheetId="1" r:id="rId1"/>'
            f'<sheet name="{sheet}" sheetId="2" r:id="rId2"/></sheets></workbook>',
        )
        book.writestr(
            "xl/_rels/workbook.xml.rels",
            '<Relationships xmlns="http://schemas.openxmlformats.org/package/2006/relationships">'
            '<Relationship Id="rId2" Target="worksheets/sheet2.xml"/></Relationships>',
        )
        book.writestr("xl/sharedStrings.xml", f'<sst xmlns="{main}">{strings}</sst>')
        book.writestr(
            "xl/worksheets/sheet2.xml", f'<worksheet xmlns="{main}"><sheetData>{body}</sheetData></worksheet>'
        )


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
