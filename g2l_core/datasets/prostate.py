"""Prostate: Gleason (Arvaniti), AGGC22, CHIMERA, PANDA."""

import re
from functools import partial
from pathlib import Path

from g2l_core.datasets.layout import base_folder, files, some, table, wrong
from g2l_core.datasets.pixels import cells_of, fitted
from g2l_core.datasets.spec import Reading, Record
from g2l_core.errors import ManifestError
from g2l_core.files import parse_json

GLEASON = ("benign", "gleason 3", "gleason 4", "gleason 5")
GLEASON_NAME = re.compile(r"(?P<core>(?P<array>ZT\d+)_\w+?)_patch_\d+_class_(?P<class>[0-3])\.jpg")
GLEASON_PARTS = {"ZT111": "train", "ZT199": "train", "ZT204": "train", "ZT76": "val", "ZT80": "test"}
"""The split by tissue microarray (Arvaniti et al. 2018, doi 10.1038/s41598-018-30535-1)."""
AGGC = ("Stroma", "Normal", "G3", "G4", "G5")
AGGC_VALUE = 255
AGGC_SUBSETS = ("1", "2", "3")
AGGC_NAME = re.compile(r"Subset\d_(?:Train|Test)_(?P<number>\d+)(?:_(?P<scanner>\w+))?")
CHIMERA_BCR = {0.0: "no recurrence", 1.0: "recurrence"}


def read_gleason_arvaniti(root: Path) -> Reading:
    """Read train_validation_patches_750 / <core> / <core>_patch_N_class_C.jpg and test_patches_750 / patho_1 / ..."""
    base = base_folder(root, "arvaniti_gleason_patches", holding="train_validation_patches_750")
    records = []
    for part in ("train_validation_patches_750", "test_patches_750/patho_1"):
        for path in some(files(base / part, ".jpg"), base / part, "patches (.jpg)"):
            found = GLEASON_NAME.fullmatch(path.name)
            if not found or found["array"] not in GLEASON_PARTS:
                raise wrong(path.parent, "names such as ZT76_39_A_1_1_patch_12_class_0.jpg")
            labels = {"core": found["core"], "array": found["array"], "gleason": GLEASON[int(found["class"])]}
            labels["split"] = GLEASON_PARTS[found["array"]]
            name = Path(found["core"], path.stem)
            records.append(Record(slide_id=found["core"], path=name, labels=labels, pixels=partial(fitted, path)))
    return Reading(records=records)


def read_aggc22(root: Path) -> Reading:
    """Read SubsetN_Train_image / [scanner /] <name>.tiff and SubsetN_Train_annotation / ... / <class>_Mask.tif."""
    if next(root.rglob("Subset?_Train_image"), None) is None:
        raise wrong(root, "folders Subset1_Train_image and Subset1_Train_annotation")
    records, unmarked = [], 0
    for part in ("Train", "Test"):
        masks = {path.parent.name: path.parent for path in root.rglob(f"Subset?_{part}_annotation*/**/*_Mask.tif")}
        for subset in AGGC_SUBSETS:
            for folder in sorted(root.rglob(f"Subset{subset}_{part}_image")):
                for slide in files(folder, ".tif", ".tiff"):
                    if slide.stem in masks:
                        records.append(_aggc_record(slide, masks[slide.stem], subset, part.lower()))
                    else:
                        unmarked += 1
    some([record.path for record in records], root, "slides with <name>/<class>_Mask.tif in SubsetN_Train_annotation")
    return Reading(records=records, left_out=(f"{unmarked} slides without masks",) if unmarked else ())


def _aggc_record(slide: Path, folder: Path, subset: str, part: str) -> Record:
    found = AGGC_NAME.fullmatch(slide.stem)
    if not found:
        raise wrong(slide.parent, "names such as Subset1_Train_1.tiff or Subset3_Train_12_Philips.tiff")
    masks = {folder / f"{name}_Mask.tif": {AGGC_VALUE: name} for name in AGGC}
    labels = {
        # the scans of one specimen by several scanners differ only in the last part of their names
        "patient_id": f"Subset{subset}_{part}_{found['number']}",
        "scanner": found["scanner"] or "Akoya",
        "subset": subset,
        "split": part,
    }
    present = {path: values for path, values in masks.items() if path.is_file()}
    cells = partial(cells_of, slide, present, 0.5)
    return Record(slide_id=slide.stem, path=slide, labels=labels, is_image=False, mpp=0.5, cells=cells)


def read_chimera(root: Path) -> Reading:
    """Read task 1: clinical_data / <patient>.json and pathology / images / <patient> / <patient>_N.tif."""
    base = base_folder(root, "v2/task1", "task1", holding="clinical_data")
    slides = [path for path in files(base / "pathology" / "images", ".tif") if not path.stem.endswith("_tissue")]
    some(slides, base, "slides (.tif) in pathology/images")
    patients = {patient: _chimera_patient(base, patient) for patient in {s.stem.partition("_")[0] for s in slides}}
    return Reading(
        records=[
            Record(slide_id=s.stem, path=s, labels=patients[s.stem.partition("_")[0]], is_image=False, mpp=0.25)
            for s in slides
        ]
    )


def _chimera_patient(base: Path, patient: str) -> dict[str, str]:
    path = base / "clinical_data" / f"{patient}.json"
    try:
        facts = parse_json(path.read_text(encoding="utf-8"))
        event = float(facts["BCR"])
        bcr, months = CHIMERA_BCR[event], f"{float(facts['time_to_follow-up/BCR']):g}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ManifestError(f"{path} gives no BCR (0 or 1) and time_to_follow-up/BCR: {error!r}") from error
    found = {"patient_id": patient, "medical_center": "Radboudumc", "bcr": bcr, "bcr_event": f"{event:.0f}"}
    return {**found, "bcr_months": months, "isup": str(facts.get("ISUP", ""))}


def read_panda(root: Path) -> Reading:
    """Read train_images / <image_id>.tiff and train.csv: image_id, data_provider, isup_grade, gleason_score."""
    base = base_folder(root, "prostate-cancer-grade-assessment", holding="train_images")
    rows = table(base / "train.csv", ("image_id", "data_provider", "isup_grade", "gleason_score"))
    known = {row["image_id"]: row for row in rows}
    records = []
    for slide in some(files(base / "train_images", ".tiff"), base / "train_images", "slides (.tiff)"):
        if slide.stem not in known:
            raise ManifestError(f"{base / 'train.csv'} has no row for the slide {slide.name}")
        row = known[slide.stem]
        labels = {"medical_center": row["data_provider"], "isup": row["isup_grade"], "gleason": row["gleason_score"]}
        records.append(Record(slide_id=slide.stem, path=slide, labels=labels, is_image=False, mpp=0.5))
    return Reading(records=records)
