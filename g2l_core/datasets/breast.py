"""Breast: TCGA-TILs, TP53 of TCGA-BRCA, IDC, BRACS, BreakHis, TIGER, BACH."""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from g2l_core.datasets.layout import (
    TCGA_PATIENT,
    base_folder,
    class_folders,
    files,
    require_files,
    some,
    spreadsheet,
    table,
    tcga_labels,
    wrong,
)
from g2l_core.datasets.pixels import cells_of, fitted, png_size
from g2l_core.datasets.spec import Cell, Reading, Record
from g2l_core.errors import ManifestError

TILS = ("til-negative", "til-positive")
BRACS = ("N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC")
BRACS_GROUPS = {"Group_BT": ("N", "PB", "UDH"), "Group_AT": ("FEA", "ADH"), "Group_MT": ("DCIS", "IC")}
BREAKHIS = {
    "benign": ("adenosis", "fibroadenoma", "phyllodes_tumor", "tubular_adenoma"),
    "malignant": ("ductal_carcinoma", "lobular_carcinoma", "mucinous_carcinoma", "papillary_carcinoma"),
}
MAGNIFICATIONS = ("40", "100", "200", "400")
FOLDS = 5
BACH = ("Benign", "InSitu", "Invasive", "Normal")
BACH_IMAGES = 400
BACH_TEST = ((41, 59), (60, 90), (139, 169), (240, 258), (260, 273), (345, 368))
"""Half-open ranges in the 400 images sorted by class and name: eva's patient-wise validation part (kaiko-ai/eva,
src/eva/vision/data/datasets/classification/bach.py)."""
TIGER_TISSUES = (
    "invasive tumor",
    "tumor-associated stroma",
    "in-situ tumor",
    "healthy glands",
    "necrosis not in-situ",
    "inflamed stroma",
    "rest",
)
"""Mask values 1 to 7; 0 is not annotated (data-structure.txt and https://tiger.grand-challenge.org/Data/)."""
IDC_NAME = re.compile(r"(?P<patient>\d+)_idx\d+_x\d+_y\d+_class(?P<idc>[01])\.png")
BREAKHIS_NAME = re.compile(r"SOB_[BM]_[A-Z]+-(?P<case>\d+-(?P<number>\d+)[A-Z]*)-(?P<magnification>\d+)-\d+\.png")
IDC_PX = 50
SILENT = frozenset("Silent Intron 3'UTR 5'UTR 3'Flank 5'Flank IGR RNA".split())
"""Values of Variant_Classification that do not change the protein, which cBioPortal leaves out by default
(https://docs.cbioportal.org/file-formats/, mutation data)."""


def read_tcga_tils(root: Path) -> Reading:
    """Read images-tcga-tils-metadata.csv: partition, study, barcode, label, path, md5."""
    base = base_folder(root, "TCGA-TILs", holding="images-tcga-tils-metadata.csv")
    listed = base / "images-tcga-tils-metadata.csv"
    rows = table(listed, ("partition", "study", "barcode", "label", "path"))
    # images-tcga-tils/pancancer links to the images of the other studies
    rows = [row for row in rows if row["study"] != "pancancer"]
    require_files([base / row["path"] for row in rows], listed)
    return Reading(records=[_tils_record(base, row) for row in rows])


def _tils_record(base: Path, row: Mapping[str, str]) -> Record:
    if row["label"] not in TILS:
        raise ManifestError(f"{base}: label {row['label']!r} of {row['path']} is none of {', '.join(TILS)}")
    labels = tcga_labels(row["barcode"])
    labels |= {"study": row["study"], "tils": row["label"], "split": row["partition"]}
    return Record(slide_id=f"{row['study']}/{row['barcode']}", path=base / row["path"], labels=labels, mpp=0.5)


def read_tcga_brca_tp53(root: Path) -> Reading:
    """Read slides from the GDC, and data_mutations.txt and case_lists/cases_sequenced.txt of a cBioPortal study."""
    study = base_folder(root, "brca_tcga_pan_can_atlas_2018", holding="data_mutations.txt")
    mutated, sequenced = _tp53_mutants(study), _sequenced(study / "case_lists" / "cases_sequenced.txt")
    slides = some(files(root, ".svs"), root, "slides (.svs) from the GDC")
    records, unknown = [], 0
    for slide in slides:
        labels = tcga_labels(slide.name)
        if labels["patient_id"] not in sequenced:
            unknown += 1
            continue
        labels["tp53"] = "mutant" if labels["patient_id"] in mutated else "wild-type"
        records.append(Record(slide_id=slide.stem, path=slide, labels=labels, is_image=False))
    some([record.path for record in records], root, "slides of patients that cases_sequenced.txt names")
    left_out = (f"{unknown} slides of patients who were not sequenced",) if unknown else ()
    return Reading(records=records, left_out=left_out)


def _tp53_mutants(study: Path) -> set[str]:
    columns = ("Hugo_Symbol", "Tumor_Sample_Barcode", "Variant_Classification")
    rows = table(study / "data_mutations.txt", columns, delimiter="\t", comment="#")
    hits = (row for row in rows if row["Hugo_Symbol"] == "TP53" and row["Variant_Classification"] not in SILENT)
    return {tcga_labels(row["Tumor_Sample_Barcode"])["patient_id"] for row in hits}


def _sequenced(path: Path) -> set[str]:
    if not path.is_file():
        raise wrong(path.parent.parent, "case_lists/cases_sequenced.txt, which says who was sequenced")
    return set(TCGA_PATIENT.findall(path.read_text(encoding="utf-8")))


def read_idc(root: Path) -> Reading:
    """Read PATIENT/CLASS/PATIENT_idx5_xX_yY_classCLASS.png."""
    base = base_folder(root, "IDC_regular_ps50_idx5", holding="[0-9]*/[01]/*.png")
    records, small = [], 0
    for patient in sorted(path for path in base.iterdir() if path.is_dir() and path.name.isdigit()):
        for path in files(patient, ".png"):
            found = IDC_NAME.fullmatch(path.name)
            if not found or found["patient"] != patient.name or found["idc"] != path.parent.name:
                raise wrong(path.parent, f"names such as {patient.name}_idx5_x1_y1_class{path.parent.name}.png")
            if png_size(path) != (IDC_PX, IDC_PX):
                small += 1
                continue
            labels = {"patient_id": patient.name, "idc": "IDC" if found["idc"] == "1" else "no IDC"}
            records.append(Record(slide_id=patient.name, path=path, labels=labels))
    some([record.path for record in records], base, f"images of {IDC_PX} px")
    return Reading(records=records, left_out=(f"{small} images that are not {IDC_PX} px square",) if small else ())


def read_bracs_roi(root: Path) -> Reading:
    """Read train|val|test / 0_N ... 6_IC / BRACS_<slide>_<class>_<number>.png."""
    base = base_folder(root, "BRACS_RoI/latest_version", "latest_version", "BRACS_RoI", holding="train/0_N")
    patients = _bracs_patients(root)
    found = []
    for part in ("train", "val", "test"):
        for name, folder in class_folders(base / part, (f"{i}_{c}" for i, c in enumerate(BRACS))):
            for path in some(files(folder, ".png"), folder, "images (.png)"):
                slide = "_".join(path.stem.split("_")[:2])
                labels = {"patient_id": patients.get(slide, ""), "lesion": name.partition("_")[2], "split": part}
                relative = Path(part, name, path.stem)
                found.append(Record(slide_id=slide, path=relative, labels=labels, pixels=partial(fitted, path)))
    return Reading(records=_split_by_patient(found))


def read_bracs_wsi(root: Path) -> Reading:
    """Read train|val|test / Group_BT|AT|MT / Type_<class> / BRACS_<slide>.svs."""
    base = base_folder(root, "BRACS_WSI", holding="train/Group_BT")
    patients = _bracs_patients(root)
    found = []
    for part in ("train", "val", "test"):
        for group, classes in BRACS_GROUPS.items():
            for name, folder in class_folders(base / part / group, (f"Type_{c}" for c in classes)):
                labels = {"lesion": name.removeprefix("Type_"), "lesion_group": group.removeprefix("Group_")}
                for path in files(folder, ".svs"):
                    own = {"patient_id": patients.get(path.stem, ""), **labels, "split": part}
                    found.append(Record(slide_id=path.stem, path=path, labels=own, is_image=False, mpp=0.25))
    some([record.path for record in found], base, "slides (.svs)")
    return Reading(records=_split_by_patient(found))


def _bracs_patients(root: Path) -> dict[str, str]:
    """Patients by slide from BRACS.xlsx, if it is in the folder or beside it; else none."""
    path = next((folder / "BRACS.xlsx" for folder in (root, root.parent) if (folder / "BRACS.xlsx").is_file()), None)
    if path is None:
        return {}
    rows = spreadsheet(path, "WSI_Information", ("WSI Filename", "Patient Id"))
    return {row["WSI Filename"].removesuffix(".svs"): row["Patient Id"].removesuffix(".0") for row in rows}


def _split_by_patient(records: Sequence[Record]) -> Iterator[Record]:
    """Add `split_by_patient`: the official split without the training and validation rows of test patients."""
    test_patients = {r.labels["patient_id"] for r in records if r.labels["split"] == "test"} - {""}
    for r in records:
        leaks = r.labels["split"] != "test" and r.labels["patient_id"] in test_patients
        labels = {**r.labels, "split_by_patient": "patient in test" if leaks else r.labels["split"]}
        yield Record(slide_id=r.slide_id, path=r.path, labels=labels, is_image=r.is_image, mpp=r.mpp, pixels=r.pixels)


def read_breakhis(root: Path) -> Reading:
    """Read benign|malignant / SOB / <type> / SOB_.._.._.. / 40X ... 400X, and mkfold's dsfold1..5.txt if present."""
    inside = ("BreaKHis_v1/histology_slides/breast", "histology_slides/breast", "breast")
    base = base_folder(root, *inside, holding="benign/SOB/adenosis")
    folds = _official_folds(root)
    records = []
    for kind, types in BREAKHIS.items():
        for name, folder in class_folders(base / kind / "SOB", types):
            for path in some(files(folder, ".png"), folder, "images (.png)"):
                labels = {**_breakhis_labels(path), "tumor": kind, "tumor_type": name, **folds.get(path.name, {})}
                place = Path(path.parent.parent.name, path.parent.name)
                pixels = partial(fitted, path)
                records.append(Record(slide_id=place.as_posix(), path=place / path.stem, labels=labels, pixels=pixels))
    return Reading(records=records)


def _breakhis_labels(path: Path) -> dict[str, str]:
    found = BREAKHIS_NAME.fullmatch(path.name)
    if not found or path.parent.name != f"{found['magnification']}X":
        raise wrong(path.parent, "names such as SOB_B_A-14-22549AB-40-001.png in a folder 40X")
    return {"patient_id": found["number"], "case": found["case"], "magnification": found["magnification"]}


def _official_folds(root: Path) -> dict[str, dict[str, str]]:
    """The columns fold1 ... fold5 by image, from lines `image|magnification|fold|train or test`."""
    folds: dict[str, dict[str, str]] = defaultdict(dict)
    for number in range(1, FOLDS + 1):
        path = next(iter(sorted(root.rglob(f"dsfold{number}.txt"))), None)
        for line in path.read_text(encoding="utf-8").splitlines() if path else ():
            name, _, part = line.strip().partition("|")
            part = part.rpartition("|")[2]
            if part not in {"train", "test"}:
                raise ManifestError(f"{path}: {line!r} is no line image|magnification|fold|train or test")
            folds[name][f"fold{number}"] = part
    return folds


def read_tiger(root: Path) -> Reading:
    """Read the slides of WSIROIS, and the tissue of each patch from their masks."""
    base = base_folder(root, "wsirois/wsi-level-annotations", holding="annotations-tissue-cells-masks")
    slides = some(files(base / "images", ".tif"), base / "images", "slides (.tif)")
    return Reading(records=[_tiger_record(base, slide) for slide in slides])


def _tiger_record(base: Path, slide: Path) -> Record:
    folders = ("annotations-tissue-bcss-masks", "annotations-tissue-cells-masks")
    masks = [base / folder / slide.name for folder in folders if (base / folder / slide.name).is_file()]
    if not masks:
        raise wrong(base, f"a mask {slide.name} in {' or '.join(folders)}")
    return Record(
        slide_id=slide.stem,
        path=slide,
        labels=tiger_origin(slide.stem),
        is_image=False,
        mpp=0.5,
        # the larger regions of BCSS hold those of NuCLS, so only they are read where a slide has both
        cells=partial(_tiger_cells, slide, masks[0]),
    )


def _tiger_cells(slide: Path, mask: Path) -> Iterator[Cell]:
    return cells_of(slide, {mask: dict(enumerate(TIGER_TISSUES, start=1))}, 0.5)


def tiger_origin(name: str) -> dict[str, str]:
    """patient_id and medical_center of a TIGER slide, from its name.

    TCGA-...: TCGA; TC_S01_P000001_...: Radboudumc (RUMC); 100B, 103S: Jules Bordet (JB).

    Raises:
        ManifestError: It is named otherwise.
    """
    if name.startswith("TCGA-"):
        return {"patient_id": tcga_labels(name)["patient_id"], "medical_center": "TCGA"}
    if found := re.fullmatch(r"(TC_S\d+_P\d+)_\w+", name):
        return {"patient_id": found[1], "medical_center": "RUMC"}
    if found := re.fullmatch(r"(\d+)[BS]", name):
        return {"patient_id": found[1], "medical_center": "JB"}
    raise ManifestError(f"{name!r} is no slide of TIGER: expected TCGA-..., TC_S01_P000001_... or 100B")


def read_bach(root: Path) -> Reading:
    """Read Photos / Benign|InSitu|Invasive|Normal / b001.tif .... The split is eva's, which separates patients."""
    base = base_folder(root, "ICIAR2018_BACH_Challenge/Photos", "Photos", holding="InSitu")
    listed = [(name, path) for name, folder in class_folders(base, BACH) for path in files(folder, ".tif")]
    if len(listed) != BACH_IMAGES:
        raise wrong(base, f"all {BACH_IMAGES} images (.tif), as the split goes by their order, not {len(listed)},")
    test = {index for start, stop in BACH_TEST for index in range(start, stop)}
    records = [
        Record(
            slide_id=name,
            path=Path(name, path.stem),
            labels={"lesion": name, "split": "test" if index in test else "train"},
            pixels=partial(fitted, path),
        )
        for index, (name, path) in enumerate(listed)
    ]
    return Reading(records=records)
