"""Formats that can be made here, each equal to the picture it was made from; OME-Zarr; plug-ins."""

import json
import os
import re
import shutil
import struct
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr

from g2l_core.errors import ManifestError, MppError, NotASlideError, ReadError, UsageError
from g2l_core.slides import readers
from g2l_core.slides.fingerprint import fingerprint
from g2l_core.slides.manifest import read_sources
from g2l_core.slides.slide import open_slide
from g2l_core.store.features import FeatureStore
from g2l_core.synthetic.cohort import write_pyramid
from tests.conftest import TEACHER
from tests.slides.test_slide import noise

ROOT = Path(__file__).resolve().parents[2]
WIDTH, HEIGHT = 1024, 768

# ---- formats of OpenSlide -----------------------------------------------------------------------------------

SPACING = """<Attribute Name="DICOM_PIXEL_SPACING">"0.000226" "0.000227"</Attribute>"""
PHILIPS = f"""<?xml version="1.0"?><DataObject ObjectType="DPUfsImport"><Attribute Name="PIM_DP_SCANNED_IMAGES"><Array>
<DataObject ObjectType="DPScannedImage"><Attribute Name="PIM_DP_IMAGE_TYPE">WSI</Attribute>{SPACING}
<Attribute Name="PIIM_PIXEL_DATA_REPRESENTATION_SEQUENCE"><Array>
<DataObject ObjectType="PixelDataRepresentation">{SPACING}</DataObject></Array></Attribute>
</DataObject></Array></Attribute></DataObject>"""
ARGOS = "<Argos.Scan.Metadata><ObjectiveMagnification>20</ObjectiveMagnification><MinZ>0</MinZ><MaxZ>0</MaxZ>"
LEICA = f"""<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">
<collection sizeX="9000000" sizeY="9000000"><image><pixels sizeX="{WIDTH}" sizeY="{HEIGHT}">
<dimension sizeX="{WIDTH}" sizeY="{HEIGHT}" r="0" ifd="0"/></pixels>
<view sizeX="{WIDTH * 500}" sizeY="{HEIGHT * 500}" offsetX="1000" offsetY="1000"/><scanSettings>
<objectiveSettings><objective>20</objective></objectiveSettings><illuminationSettings>
<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image></collection></scn>"""

TIFF_KINDS = {
    "generic-tiff": ({"resolution": (40_000, 40_000), "resolutionunit": "CENTIMETER"}, 0.25, None),
    "generic-tiff in inches": ({"resolution": (50_800, 50_800), "resolutionunit": "INCH"}, 0.5, None),
    "aperio": ({"description": "Aperio Image Library v11\n1024x768 (256x256)|AppMag = 40|MPP = 0.2525"}, 0.2525, 40),
    "trestle": (
        {"software": "MedScan 1.0", "description": "Objective Power=20;OverlapsXY=", "resolution": (0.48, 0.48)},
        0.48, 20,
    ),
    "philips": ({"software": "Philips DP v1.0", "description": PHILIPS}, 0.2265, None),
    "huron": (
        {"description": "Label=x", "resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER",
         "extratags": [(271, 2, 0, "Huron Digital Pathology", True)]}, 0.5, None
    ),
    "argos": (
        {"resolution": (25_000, 25_000), "resolutionunit": "CENTIMETER",
         "extratags": [(65000, 2, 0, f"{ARGOS}</Argos.Scan.Metadata>", True)]}, 0.4, 20
    ),
    "leica": ({"description": LEICA, "resolution": (20_000, 20_000), "resolutionunit": "CENTIMETER"}, 0.5, 20),
}  # fmt: skip


@pytest.mark.parametrize("kind", TIFF_KINDS)
def test_tiffs_of_every_vendor(tmp_path, kind):
    tags, mpp, power = TIFF_KINDS[kind]
    image = noise(WIDTH, HEIGHT)
    tags = {"resolution": (1, 1), "resolutionunit": "NONE", "software": False, **tags}
    tifffile.imwrite(tmp_path / "a.tif", image, tile=(256, 256), photometric="rgb", metadata=None, **tags)
    handle = readers.open_handle(tmp_path / "a.tif")
    assert handle.properties["openslide.vendor"].startswith(kind.split(" ")[0])
    assert handle.properties.get("openslide.objective-power") == (str(power) if power else None)
    left, top = (int(handle.properties.get(f"openslide.bounds-{axis}", 0)) for axis in "xy")
    handle.close()
    with open_slide(tmp_path / "a.tif") as slide:
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(mpp), "header: openslide.mpp-x")
        region = slide.read_patch(left + 130, top + 70, 512, 512)
        np.testing.assert_array_equal(region, image[70:582, 130:642])


def element(group, number, kind, value):
    """A DICOM element in explicit VR, little endian (part 5, section 7.1.2)."""
    if isinstance(value, str):
        value = value.encode() + (b"\0" if kind == "UI" else b" ") * (len(value) % 2)
    elif isinstance(value, int):
        value = struct.pack({"US": "<H", "UL": "<I"}[kind], value)
    head = struct.pack("<HH2s", group, number, kind.encode())
    long = kind in {"OB", "SQ"}
    return head + (struct.pack("<xxI", len(value)) if long else struct.pack("<H", len(value))) + value


def sequence(group, number, *elements):
    item = b"".join(elements)
    return element(group, number, "SQ", struct.pack("<HHI", 0xFFFE, 0xE000, len(item)) + item)


def write_dicom(path, image, spacing, power, tile=256):
    """A whole-slide image of one level, uncompressed, tiles from left to right and top to bottom."""
    height, width = image.shape[:2]
    frames = image.reshape(height // tile, tile, width // tile, tile, 3).swapaxes(1, 2)
    wsi, explicit_vr = "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.840.10008.1.2.1"
    meta = [(2, "UI", wsi), (3, "UI", "1.2.3.4"), (0x10, "UI", explicit_vr), (0x12, "UI", "1.2.3")]
    meta = element(2, 1, "OB", b"\0\1") + b"".join(element(2, number, kind, value) for number, kind, value in meta)
    body = [
        element(8, 8, "CS", "ORIGINAL\\PRIMARY\\VOLUME\\NONE"), element(8, 0x16, "UI", wsi),
        element(8, 0x18, "UI", "1.2.3.4"), element(0x20, 0xE, "UI", "1.2.3.5"),
        element(0x20, 0x9311, "CS", "TILED_FULL"), element(0x28, 2, "US", 3), element(0x28, 4, "CS", "RGB"),
        element(0x28, 6, "US", 0), element(0x28, 8, "IS", str(frames.shape[0] * frames.shape[1])),
        element(0x28, 0x10, "US", tile), element(0x28, 0x11, "US", tile), element(0x28, 0x100, "US", 8),
        element(0x28, 0x101, "US", 8), element(0x28, 0x102, "US", 7), element(0x28, 0x103, "US", 0),
        element(0x48, 6, "UL", width), element(0x48, 7, "UL", height),
        sequence(0x48, 0x105, element(0x48, 0x112, "DS", power)),
        sequence(0x5200, 0x9229, sequence(0x28, 0x9110, element(0x28, 0x30, "DS", spacing))),
        element(0x7FE0, 0x10, "OB", frames.tobytes()),
    ]  # fmt: skip
    path.write_bytes(bytes(128) + b"DICM" + element(2, 0, "UL", len(meta)) + meta + b"".join(body))


def test_dicom(tmp_path):
    image = noise(WIDTH, HEIGHT)
    write_dicom(tmp_path / "a.dcm", image, "0.00025\\0.000252", "40")
    with open_slide(tmp_path / "a.dcm") as slide:
        assert slide.level0_size == (WIDTH, HEIGHT)
        assert (slide.mpp, slide.mpp_source) == (pytest.approx(0.251), "header: openslide.mpp-x")
        np.testing.assert_array_equal(slide.read_patch(130, 70, 512, 512), image[70:582, 130:642])


def test_the_files_of_a_dicom_series_are_one_slide(tmp_path):
    (tmp_path / "other").mkdir()
    for name in ("b.dcm", "a.dcm", "other/a.dcm"):
        write_dicom(tmp_path / name, noise(WIDTH, HEIGHT), "0.00025\\0.00025", "40")
    (tmp_path / "broken.dcm").write_bytes(b"no DICOM")
    found = [source.slide_id for source in read_sources([tmp_path])]
    assert found == ["a", "broken", "other/a"]


# ---- OME-Zarr -----------------------------------------------------------------------------------------------

UNITS = {"nanometer": 250.0, "micrometer": 0.25, "millimeter": 0.00025}


def write_ome_zarr(path, levels, *, version="0.5", axes="tczyx", unit="micrometer", scale=None, **options):
    """Pictures of one slide, the finest first, as multiscales; `axes` in the arrays' order; `options` of the arrays."""
    step = scale or UNITS.get(unit, 1.0)
    datasets = []
    for level, pixels in enumerate(levels):
        sides = dict(zip("yxc", pixels.shape, strict=True))
        ordered = pixels.transpose(["yxc".index(a) for a in axes if a in sides]).reshape(
            [sides.get(a, 1) for a in axes]
        )
        array = zarr.create_array(
            str(path / str(level)), shape=ordered.shape, dtype=pixels.dtype, zarr_format=2 if version == "0.4" else 3,
            **{"chunks": tuple(256 if a in "yx" else 1 for a in axes), **options},
        )  # fmt: skip
        array[...] = ordered
        factor = levels[0].shape[0] / pixels.shape[0]
        scales = [step * factor if a in "yx" else 1.0 for a in axes]
        datasets.append({"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scales}]})
    kinds = [{"name": a, "type": {"t": "time", "c": "channel"}.get(a, "space")} for a in axes]
    for axis in kinds:
        if axis["name"] in "yx" and unit:
            axis["unit"] = unit
    image_entry = {"axes": kinds, "datasets": datasets, "name": "slide"}
    if version == "0.4":
        (path / ".zgroup").write_text('{"zarr_format": 2}')
        (path / ".zattrs").write_text(json.dumps({"multiscales": [{**image_entry, "version": "0.4"}]}))
    else:
        group = {"zarr_format": 3, "node_type": "group"}
        group["attributes"] = {"ome": {"version": version, "multiscales": [image_entry]}}
        (path / "zarr.json").write_text(json.dumps(group))
    return path


@pytest.fixture(scope="module")
def picture():
    return noise(WIDTH, HEIGHT)


@pytest.fixture(scope="module")
def tiff(picture, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiff") / "a.tiff"
    write_pyramid(path, picture, mpp=0.25, downsamples=(1, 2, 4), quality=None)
    return path


@pytest.fixture(scope="module")
def levels(tiff):
    with tifffile.TiffFile(tiff) as file:
        return [page.asarray() for page in file.pages]


@pytest.mark.parametrize(
    ("version", "axes", "unit"),
    [
        ("0.4", "tczyx", "micrometer"),
        ("0.5", "tczyx", "nanometer"),
        ("0.4", "yxc", "millimeter"),
        ("0.5", "cyx", "micrometer"),
    ],
)
def test_ome_zarr_equals_the_tiff_of_the_same_picture(tiff, levels, tmp_path, version, axes, unit):
    path = write_ome_zarr(tmp_path / "a.zarr", levels, version=version, axes=axes, unit=unit)
    with open_slide(path) as slide, open_slide(tiff) as other:
        assert (slide.level0_size, slide.mpp_source) == (other.level0_size, "header: openslide.mpp-x")
        assert slide.mpp == pytest.approx(other.mpp) == 0.25
        for x, y, side, patch_px in [(0, 0, 256, 256), (130, 71, 257, 256), (128, 64, 512, 256), (512, 256, 512, 128),
                                     (900, 700, 256, 256), (WIDTH + 9, 0, 64, 64)]:  # fmt: skip
            np.testing.assert_array_equal(
                slide.read_patch(x, y, side, patch_px), other.read_patch(x, y, side, patch_px)
            )
        np.testing.assert_array_equal(slide.read_thumbnail(4.0).image, other.read_thumbnail(4.0).image)


def test_ome_zarr_scales_of_dataset_and_image_multiply(picture, tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", [picture], version="0.4", scale=0.5)
    attributes = json.loads((path / ".zattrs").read_text())
    attributes["multiscales"][0]["coordinateTransformations"] = [{"type": "scale", "scale": [1, 1, 1, 0.5, 0.5]}]
    (path / ".zattrs").write_text(json.dumps(attributes))
    with open_slide(path) as slide:
        assert slide.mpp == pytest.approx(0.25)


@pytest.mark.parametrize("unit", [None, "pixel"])
def test_ome_zarr_without_a_unit_of_length_has_no_scale(picture, tmp_path, unit):
    path = write_ome_zarr(tmp_path / "a.zarr", [picture], unit=unit, scale=0.25)
    with pytest.raises(MppError, match="--mpp-override"):
        open_slide(path)
    with open_slide(path, mpp_override=0.25) as slide:
        assert slide.mpp_source == "override"


def test_bioformats2raws_layout_is_followed_to_the_slide(picture, tmp_path):
    write_ome_zarr(tmp_path / "a.zarr/0", [picture], version="0.4")
    (tmp_path / "a.zarr/.zattrs").write_text('{"bioformats2raw.layout": 3}')
    with open_slide(tmp_path / "a.zarr") as slide:
        np.testing.assert_array_equal(slide.read_patch(5, 6, 64, 64), picture[6:70, 5:69])


def change(path, edit):
    attributes = json.loads((path / "zarr.json").read_text())
    edit(attributes["attributes"]["ome"]["multiscales"][0])
    (path / "zarr.json").write_text(json.dumps(attributes))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(axes=["t", "c", "z", "y", "x"]), "not those of OME-Zarr 0.4 or 0.5"),
        (lambda m: m.pop("axes"), "not those of OME-Zarr 0.4 or 0.5: KeyError"),
        (lambda m: m["axes"][0].update(name="q"), "expected levels of axes t, c, z, y, x; its 3 levels have q, c"),
        (lambda m: m["axes"].pop(0), "has 0 of uint8"),
        (lambda m: m["datasets"][1].update(path="absent"), "its levels 0, absent, 2 cannot be opened"),
        (lambda m: m["datasets"].clear(), "not those of"),
    ],
)
def test_broken_ome_zarr(levels, tmp_path, edit, message):
    path = write_ome_zarr(tmp_path / "a.zarr", levels)
    change(path, edit)
    with pytest.raises(NotASlideError, match=message):
        open_slide(path)
    assert [source.path for source in read_sources([tmp_path])] == [path]


def test_ome_zarr_of_other_pixels_is_refused(picture, tmp_path):
    deep = write_ome_zarr(tmp_path / "deep.zarr", [picture.astype(np.uint16)])
    with pytest.raises(NotASlideError, match=r"expected 3 channels of uint8 \(RGB\) on axis c; it has 3 of uint16"):
        open_slide(deep)
    (tmp_path / "torn.zarr").mkdir()
    (tmp_path / "torn.zarr/zarr.json").write_text('{"attributes": ')
    with pytest.raises(NotASlideError, match="metadata in .*torn.zarr are broken"):
        open_slide(tmp_path / "torn.zarr")


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_a_damaged_chunk_is_unreadable_and_costs_no_other(picture, tmp_path, version):
    path = write_ome_zarr(tmp_path / "a.zarr", [picture], version=version)
    chunk = path / "0" / ("0.0.0.0.0" if version == "0.4" else "c/0/0/0/0/0")
    chunk.write_bytes(chunk.read_bytes()[:100])
    with open_slide(path) as slide:
        with pytest.raises(ReadError, match=r"cannot decode 256 x 256 px at \(0, 0\), level 0"):
            slide.read_patch(0, 0, 256, 256)
        np.testing.assert_array_equal(slide.read_patch(256, 0, 256, 256), picture[:256, 256:512])


def test_ome_zarr_in_a_folder_of_slides(picture, tiff, tmp_path):
    write_ome_zarr(tmp_path / "deep/b.zarr", [picture], version="0.4")
    write_ome_zarr(tmp_path / ".hidden.zarr", [picture])
    shutil.copy(tiff, tmp_path / "a.tiff")
    zarr.create_group(str(tmp_path / "store.zarr"))
    (tmp_path / "store.zarr/none").mkdir()
    (tmp_path / "store.zarr/no.svs").touch()  # not looked into
    assert [source.slide_id for source in read_sources([tmp_path])] == ["a", "deep/b"]
    (source,) = read_sources([tmp_path / "deep/b.zarr"])
    assert (source.slide_id, source.path, source.patch_ids) == ("b", tmp_path / "deep/b.zarr", ())
    (tmp_path / "m.csv").write_text("path,mpp\ndeep/b.zarr,0.25\n")
    assert read_sources([tmp_path / "m.csv"])[0].slide_id == "b"
    with pytest.raises(ManifestError, match=r"holds no slide \(.*\.zarr.*\)"):
        read_sources([tmp_path / "store.zarr/none"])


def test_fingerprint_of_a_folder(picture, tmp_path):
    path = write_ome_zarr(tmp_path / "a.zarr", [picture], version="0.4")
    shutil.copytree(path, tmp_path / "b.zarr")
    original = fingerprint(path)
    assert fingerprint(tmp_path / "b.zarr") == original
    attributes = (path / ".zattrs").read_text()
    for edit, undo in [
        (lambda: (path / "new").touch(), lambda: (path / "new").unlink()),
        (lambda: (path / ".zattrs").write_text(attributes.replace("0.25", "0.52")),
         lambda: (path / ".zattrs").write_text(attributes)),
        (lambda: (path / "0").rename(path / "9"), lambda: (path / "9").rename(path / "0")),
    ]:  # fmt: skip
        edit()
        assert fingerprint(path) != original
        undo()
        assert fingerprint(path) == original


# ---- plug-ins -----------------------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path):
    """A folder like site-packages with the documentation's reader as an installed distribution."""
    code, toml = (
        re.search(rf"```{kind}\n(.*?)```", (ROOT / "docs/readers.md").read_text(encoding="utf-8"), re.DOTALL)[1]
        for kind in ("python", "toml")
    )
    site = tmp_path / "site"
    info = site / "npy_reader-1.0.dist-info"
    info.mkdir(parents=True)
    (site / "npy_reader.py").write_text(code)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: npy-reader\nVersion: 1.0\n")
    name, target = re.search(r'^(\w+) = "(.*)"', toml, re.MULTILINE).groups()
    assert '."g2l.readers"]' in toml
    (info / "entry_points.txt").write_text(f"[g2l.readers]\n{name} = {target}\n")
    return site


def test_a_plug_in_is_found_and_read_by_the_command_line(installed, tmp_path):
    pixels = noise(600, 520)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in/tiny.npy", pixels)
    np.save(tmp_path / "in/torn.npy", pixels)
    (tmp_path / "in/torn.npy").write_bytes(b"no array")
    call = [
        "cache-teacher",
        "in",
        "--store",
        "s.zarr",
        "--teacher",
        TEACHER,
        "--weights",
        "random:0",
        "--tissue",
        "none",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.cli.main", *call], cwd=tmp_path, capture_output=True, text=True, check=False,
        timeout=120, env={**os.environ, "PYTHONPATH": f"{installed}{os.pathsep}{ROOT}"},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr  # the torn one
    assert "failed  torn: the reader 'npy' cannot open it" in done.stderr
    store = FeatureStore.open(tmp_path / "s.zarr")
    (slide,) = store.slides()
    assert (slide.slide_id, len(slide), slide.facts.mpp) == ("tiny", 4, 0.5)
    assert slide.facts.mpp_source == "header: openslide.mpp-x"


@contextmanager
def fresh_plug_ins(site, monkeypatch):
    """The plug-ins of a folder are the installed ones."""
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "npy_reader", raising=False)
    readers.installed_readers.cache_clear()
    readers.slide_suffixes.cache_clear()
    try:
        yield
    finally:
        monkeypatch.undo()
        sys.modules.pop("npy_reader", None)
        readers.installed_readers.cache_clear()
        readers.slide_suffixes.cache_clear()


def test_plug_ins_are_asked_first_in_the_order_of_their_names(installed, monkeypatch, tiff):
    (installed / "npy_reader.py").write_text(
        "asked = []\ndef first(path): asked.append(1)\ndef second(path): asked.append(2)\nsecond.suffixes = ['.XYZ']\n"
    )
    entries = "[g2l.readers]\nb = npy_reader:second\na = npy_reader:first\n"
    (installed / "npy_reader-1.0.dist-info/entry_points.txt").write_text(entries)
    with fresh_plug_ins(installed, monkeypatch):
        with open_slide(tiff) as slide:
            assert slide.mpp == 0.25
        assert sys.modules["npy_reader"].asked == [1, 2]
        assert readers.slide_suffixes() == readers.SLIDE_SUFFIXES | {".xyz"}


def test_a_plug_ins_own_refusal_is_passed_on(monkeypatch, tiff):
    def broken(path):
        raise NotASlideError("mine, but its index is missing")

    monkeypatch.setattr(readers, "installed_readers", lambda: (("a", broken),))
    with pytest.raises(NotASlideError, match="^mine, but its index is missing$"):
        open_slide(tiff)


def test_a_plug_in_that_cannot_be_imported_is_named(installed, monkeypatch):
    (installed / "npy_reader.py").write_text("import nothing_of_that_name")
    message = r"slide reader 'npy' \(npy_reader:open_npy\) cannot be imported: No module"
    with fresh_plug_ins(installed, monkeypatch), pytest.raises(UsageError, match=message):
        readers.installed_readers()
