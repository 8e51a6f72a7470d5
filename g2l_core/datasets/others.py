"""Lymph node (PCam, Camelyon17-WILDS), colon and rectum (NCT-CRC, MHIST, TCGA-CRC-MSI), lung (TCGA-NSCLC, LC25000)."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from g2l_core.datasets.layout import base_folder, class_folders, files, require_files, some, table, tcga_labels, wrong
from g2l_core.datasets.pixels import ArrayRows, fitted
from g2l_core.datasets.spec import Reading, Record
from g2l_core.errors import ManifestError

PCAM_PARTS = {"train": "train", "valid": "val", "test": "test"}
WILDS_VAL_CENTER, WILDS_TEST_CENTER = "1", "2"
"""Hospitals that are the out-of-distribution parts of the official split (p-lambda/wilds, camelyon17_dataset.py)."""
WILDS_PARTS = {"0": "train", "1": "id_val"}
NCT = ("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")
NCT_PARTS = {"NCT-CRC-HE-100K": "train", "CRC-VAL-HE-7K": "test"}
MSI = ("MSIH", "nonMSIH")
NSCLC = ("TCGA-LUAD", "TCGA-LUSC")
LC25000 = {
    "colon_image_sets": ("colon_aca", "colon_n"),
    "lung_image_sets": ("lung_aca", "lung_n", "lung_scc"),
}


def read_pcam(root: Path) -> Reading:
    """Read camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5 and ..._meta.csv."""
    base = base_folder(root, holding="camelyonpatch_level_2_split_train_x.h5")
    return Reading(records=[r for name, part in PCAM_PARTS.items() for r in _pcam_part(base, name, part)])


def _pcam_part(base: Path, name: str, part: str) -> list[Record]:
    stem = f"camelyonpatch_level_2_split_{name}"
    images, labels = _h5(base / f"{stem}_x.h5", "x"), _h5(base / f"{stem}_y.h5", "y")
    meta = table(base / f"{stem}_meta.csv", ("wsi",))
    if not len(images) == len(labels) == len(meta):
        raise ManifestError(
            f"{base / stem}: {len(images)} images in _x.h5, {len(labels)} labels in _y.h5 and {len(meta)} rows in "
            "_meta.csv; expected as many of each"
        )
    rows, tumor = ArrayRows(images), labels[:].reshape(len(labels))
    return [
        Record(
            slide_id=facts["wsi"],
            path=Path(name, f"{index:06d}"),
            labels={"tumor": "tumor" if tumor[index] else "no tumor", "wsi": facts["wsi"], "split": part},
            pixels=rows.row(index),
        )
        for index, facts in enumerate(meta)
    ]


def _h5(path: Path, name: str) -> Any:
    import h5py

    if not path.is_file():
        raise wrong(path.parent, f"{path.name} (unpack the .gz of the same name)")
    try:
        return h5py.File(path, "r")[name]
    except (OSError, KeyError) as error:
        raise ManifestError(f"{path} has no array {name!r} that can be read: {error}") from error


def read_camelyon17_wilds(root: Path) -> Reading:
    """Read metadata.csv and patches / patient_P_node_N / patch_patient_P_node_N_x_X_y_Y.png."""
    base = base_folder(root, "camelyon17_v1.0", holding="metadata.csv")
    listed = base / "metadata.csv"
    rows = table(listed, ("patient", "node", "x_coord", "y_coord", "tumor", "center", "split"))
    records = [_wilds_record(base, row) for row in rows]
    require_files([record.path for record in records], listed)
    return Reading(records=records)


def _wilds_record(base: Path, row: Mapping[str, str]) -> Record:
    slide = f"patient_{row['patient']}_node_{row['node']}"
    by_center = {WILDS_VAL_CENTER: "val", WILDS_TEST_CENTER: "test"}
    part = by_center.get(row["center"]) or WILDS_PARTS.get(row["split"])
    if part is None:
        raise ManifestError(f"{base / 'metadata.csv'}: split {row['split']!r} is neither 0 (train) nor 1 (id_val)")
    return Record(
        slide_id=slide,
        path=base / "patches" / slide / f"patch_{slide}_x_{row['x_coord']}_y_{row['y_coord']}.png",
        labels={
            "patient_id": row["patient"],
            "medical_center": row["center"],
            "tumor": "tumor" if row["tumor"] == "1" else "no tumor",
            "split": part,
        },
    )


def read_nct_crc(root: Path) -> Reading:
    """Read NCT-CRC-HE-100K / <class> / *.tif for training and CRC-VAL-HE-7K / <class> / *.tif for testing."""
    records = []
    for name, part in NCT_PARTS.items():
        if not (root / name).is_dir():
            raise wrong(root, " and ".join(NCT_PARTS))
        for tissue, folder in class_folders(root / name, NCT):
            labels = {"tissue": tissue, "split": part}
            paths = some(files(folder, ".tif"), folder, "images (.tif)")
            records += [Record(slide_id=f"{name}/{tissue}", path=path, labels=labels, mpp=0.5) for path in paths]
    return Reading(records=records)


def read_mhist(root: Path) -> Reading:
    """Read images / MHIST_xxx.png and annotations.csv: Image Name, Majority Vote Label, ..., Partition."""
    base = base_folder(root, holding="annotations.csv")
    listed = base / "annotations.csv"
    rows = table(listed, ("Image Name", "Majority Vote Label", "Partition"))
    require_files([base / "images" / row["Image Name"] for row in rows], listed)
    return Reading(
        records=[
            Record(
                slide_id=f"{row['Partition']}/{row['Majority Vote Label']}",
                path=base / "images" / row["Image Name"],
                labels={"polyp": row["Majority Vote Label"], "split": row["Partition"]},
            )
            for row in rows
        ]
    )


def read_tcga_crc_msi(root: Path) -> Reading:
    """Read TRAIN|TEST / MSIH|nonMSIH / images named by their TCGA slide."""
    base = base_folder(root, holding="TRAIN/MSIH")
    records = []
    for part in ("train", "test"):
        for name, folder in class_folders(base / part.upper(), MSI):
            for path in some(files(folder, ".jpg", ".jpeg", ".png"), folder, "images"):
                labels = {**tcga_labels(path.name), "msi": name, "split": part}
                place = Path(part, name, path.stem)
                pixels = partial(fitted, path)
                records.append(Record(slide_id=labels["patient_id"], path=place, labels=labels, pixels=pixels))
    return Reading(records=records)


def read_tcga_nsclc(root: Path) -> Reading:
    """Read gdc_sample_sheet*.tsv and <File ID> / <File Name>, as the GDC Data Transfer Tool writes them."""
    base = base_folder(root, holding="gdc_sample_sheet*.tsv")
    sheet = sorted(base.glob("gdc_sample_sheet*.tsv"))[-1]
    rows = table(sheet, ("File ID", "File Name", "Project ID", "Case ID", "Sample Type"), delimiter="\t")
    wanted = [row for row in rows if row["Project ID"] in NSCLC and row["File Name"].lower().endswith(".svs")]
    here = [row for row in wanted if (base / row["File ID"] / row["File Name"]).is_file()]
    some([base / row["File ID"] for row in here], base, "<File ID>/<File Name> of TCGA-LUAD and TCGA-LUSC slides")
    tumors = [row for row in here if "Normal" not in row["Sample Type"]]
    counts = {"slides of the sample sheet that are not there": len(wanted) - len(here)}
    counts["slides of normal tissue"] = len(here) - len(tumors)
    return Reading(
        records=[_nsclc_record(base, row) for row in tumors],
        left_out=tuple(f"{count} {what}" for what, count in counts.items() if count),
    )


def _nsclc_record(base: Path, row: Mapping[str, str]) -> Record:
    path = base / row["File ID"] / row["File Name"]
    labels = {**tcga_labels(row["Case ID"]), "subtype": row["Project ID"].removeprefix("TCGA-")}
    return Record(slide_id=path.stem, path=path, labels=labels, is_image=False)


def read_lc25000(root: Path) -> Reading:
    """Read lung_colon_image_set / colon_image_sets|lung_image_sets / <class> / *.jpeg."""
    base = base_folder(root, "lung_colon_image_set", holding="lung_image_sets")
    records = []
    for organ, classes in LC25000.items():
        for name, folder in class_folders(base / organ, classes):
            for path in some(files(folder, ".jpeg"), folder, "images (.jpeg)"):
                labels = {"organ": organ.partition("_")[0], "tissue": name}
                pixels = partial(fitted, path)
                records.append(Record(slide_id=name, path=Path(name, path.stem), labels=labels, pixels=pixels))
    return Reading(records=records)
