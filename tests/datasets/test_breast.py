"""Breast datasets: miniatures of the published folders, manifests checked by hand."""

import re
import sys

import cv2
import numpy as np
import pytest

from g2l_core.datasets.breast import tiger_origin
from g2l_core.errors import ManifestError, UsageError
from tests.datasets.draw import column, empty, image, made, mask, slide, spreadsheet, text

SLIDE = "TCGA-A2-A0CM-01Z-00-DX1.AC4901DE-4B6D-4185-BB9F-156033839828"


def draw_tils(root):
    listed = [
        ("train", "brca", "TCGA-A2-A0CM", "til-positive", "a"),
        ("train", "brca", "TCGA-A2-A0CM", "til-negative", "b"),
        ("val", "brca", "TCGA-BH-A0B3", "til-negative", "c"),
        ("test", "luad", "TCGA-05-4244", "til-positive", "d"),
    ]
    lines = ["partition,study,barcode,label,path,md5"]
    for seed, (part, study, barcode, label, md5) in enumerate(listed):
        path = f"images-tcga-tils/{study}/{part}/{label}/{barcode}_{md5}.png"
        image(root / path, seed, 100)
        lines.append(f"{part},{study},{barcode},{label},{path},{md5}")
    lines.append("test,pancancer,TCGA-05-4244,til-positive,images-tcga-tils/pancancer/test/til-positive/x.png,d")
    text(root / "images-tcga-tils-metadata.csv", "\n".join(lines))


def test_tils(tmp_path):
    draw_tils(tmp_path / "up" / "TCGA-TILs")
    written, manifest, labels = made("tcga-tils", tmp_path / "up", tmp_path)
    assert (written.rows, written.slides, written.patients, written.images) == (4, 3, 3, None)
    assert manifest[0] == {
        "slide_id": "brca/TCGA-A2-A0CM",
        "path": "up/TCGA-TILs/images-tcga-tils/brca/train/til-positive/TCGA-A2-A0CM_a.png",
        "patch_id": "up/TCGA-TILs/images-tcga-tils/brca/train/til-positive/TCGA-A2-A0CM_a.png",
        "mpp": "0.5",
        "dataset": "tcga-tils",
        "patient_id": "TCGA-A2-A0CM",
        "medical_center": "A2",
        "study": "brca",
        "tils": "til-positive",
        "split": "train",
    }
    assert column(labels, "slide_id", "tils", "split") == [
        ("brca/TCGA-A2-A0CM", "til-positive", "train"),
        ("brca/TCGA-A2-A0CM", "til-negative", "train"),
        ("brca/TCGA-BH-A0B3", "til-negative", "val"),
        ("luad/TCGA-05-4244", "til-positive", "test"),
    ]
    assert column(labels, "patch_id") == column(manifest, "patch_id")


def test_tils_refuses_a_partial_download(tmp_path):
    draw_tils(tmp_path)
    gone = tmp_path / "images-tcga-tils/luad/test/til-positive/TCGA-05-4244_d.png"
    gone.unlink()
    with pytest.raises(ManifestError, match=f"names 1 of 4 files that are not there, first {re.escape(str(gone))}"):
        made("tcga-tils", tmp_path, tmp_path)


def draw_tp53(root):
    study = root / "brca_tcga_pan_can_atlas_2018"
    text(
        study / "data_mutations.txt",
        "#version 2.4\nHugo_Symbol\tVariant_Classification\tTumor_Sample_Barcode\n"
        "TP53\tMissense_Mutation\tTCGA-A2-A0CM-01\nTP53\tSilent\tTCGA-BH-A0B3-01\nPIK3CA\tMissense_Mutation\tTCGA-BH-A0B3-01\n",
    )
    text(
        study / "case_lists" / "cases_sequenced.txt",
        "cancer_study_identifier: brca\ncase_list_ids: TCGA-A2-A0CM-01\tTCGA-BH-A0B3-01\n",
    )
    for name in (SLIDE, "TCGA-BH-A0B3-01Z-00-DX1.B", "TCGA-BH-A0B3-01Z-00-DX2.C", "TCGA-AC-A2QH-01Z-00-DX1.D"):
        empty(root / "slides" / name.lower()[-3:] / f"{name}.svs")


def test_tp53(tmp_path):
    draw_tp53(tmp_path)
    written, manifest, labels = made("tcga-brca-tp53", tmp_path, tmp_path)
    assert labels is None
    assert sorted(column(manifest, "slide_id", "patient_id", "medical_center", "tp53")) == [
        (SLIDE, "TCGA-A2-A0CM", "A2", "mutant"),
        ("TCGA-BH-A0B3-01Z-00-DX1.B", "TCGA-BH-A0B3", "BH", "wild-type"),  # a silent variant is none
        ("TCGA-BH-A0B3-01Z-00-DX2.C", "TCGA-BH-A0B3", "BH", "wild-type"),
    ]
    assert "patch_id" not in manifest[0]
    assert written.left_out == ("1 slides of patients who were not sequenced",)


def test_tp53_needs_to_know_who_was_sequenced(tmp_path):
    draw_tp53(tmp_path)
    (tmp_path / "brca_tcga_pan_can_atlas_2018" / "case_lists" / "cases_sequenced.txt").unlink()
    with pytest.raises(ManifestError, match=r"expected case_lists/cases_sequenced\.txt.*found case_lists/, data_mut"):
        made("tcga-brca-tp53", tmp_path, tmp_path)


def draw_idc(root, patients=("10253", "9036"), each=2):
    for p, patient in enumerate(patients):
        for kind in "01":
            for i in range(each):
                name = f"{patient}_idx5_x{1 + 50 * i}_y1001_class{kind}.png"
                image(root / patient / kind / name, 100 * p + 50 * int(kind) + i, 50)


def test_idc(tmp_path):
    draw_idc(tmp_path / "IDC_regular_ps50_idx5")
    _, manifest, labels = made("idc", tmp_path, tmp_path)
    assert column(labels, "slide_id", "idc") == [
        ("10253", "no IDC"),
        ("10253", "no IDC"),
        ("10253", "IDC"),
        ("10253", "IDC"),
        ("9036", "no IDC"),
        ("9036", "no IDC"),
        ("9036", "IDC"),
        ("9036", "IDC"),
    ]
    assert labels[0]["patch_id"] == "IDC_regular_ps50_idx5/10253/0/10253_idx5_x1_y1001_class0.png"
    assert set(column(manifest, "patient_id", "dataset")) == {("10253", "idc"), ("9036", "idc")}


def test_idc_leaves_out_what_is_smaller_at_an_edge(tmp_path):
    draw_idc(tmp_path)
    image(tmp_path / "10253" / "0" / "10253_idx5_x1_y1_class0.png", 5, 50, 21)
    (tmp_path / "10253" / "0" / "10253_idx5_x9_y1_class0.png").write_bytes(b"\x89PNG")
    written, manifest, _ = made("idc", tmp_path, tmp_path)
    assert (written.rows, len(manifest)) == (8, 8)
    assert written.left_out == ("2 images that are not 50 px square",)


def test_files_may_be_links_into_another_store(tmp_path):
    draw_idc(tmp_path / "real")
    patient = tmp_path / "linked" / "10253" / "0"
    patient.mkdir(parents=True)
    blob = tmp_path / "blob"
    (tmp_path / "real" / "10253" / "0" / "10253_idx5_x1_y1001_class0.png").rename(blob)
    (patient / "10253_idx5_x1_y1001_class0.png").symlink_to(blob)
    _, manifest, _ = made("idc", tmp_path / "linked", tmp_path)
    assert column(manifest, "path") == ["linked/10253/0/10253_idx5_x1_y1001_class0.png"]


@pytest.mark.parametrize("name", ["10253/1/10253_idx5_x1_y1_class0.png", "10253/1/9036_idx5_x1_y1_class1.png"])
def test_idc_refuses_an_image_in_a_wrong_folder(name, tmp_path):
    draw_idc(tmp_path)
    image(tmp_path / name)
    with pytest.raises(
        ManifestError, match=r"expected names such as 10253_idx5_x1_y1_class1\.png in .*/10253/1; found"
    ):
        made("idc", tmp_path, tmp_path)


def draw_bracs_roi(root):
    base = root / "BRACS_RoI" / "latest_version"
    place = {"train": ("1003", 0), "val": ("1291", 1), "test": ("1330", 2)}
    for part, (number, seed) in place.items():
        for i, name in enumerate(("N", "PB", "UDH", "FEA", "ADH", "DCIS", "IC")):
            image(base / part / f"{i}_{name}" / f"BRACS_{number}_{name}_{i}.png", 10 * seed + i, 300, 250)
    image(base / "train" / "0_N" / "BRACS_1330_N_9.png", 99, 300, 250)
    return base


def test_bracs_roi(tmp_path):
    base = draw_bracs_roi(tmp_path)
    header = ("WSI Filename", "Patient Id", "RoI ", "WSI label")
    table = [header, ("BRACS_1003", 85, 24, "PB"), ("BRACS_1291", 67, 3, "N"), ("BRACS_1330", 12, 1, "IC")]
    spreadsheet(tmp_path / "BRACS.xlsx", "WSI_Information", table)
    written, manifest, labels = made("bracs-roi", tmp_path, tmp_path / "out")
    assert (written.rows, written.slides, written.patients) == (22, 3, 3)
    assert column(manifest, "patient_id", "lesion", "split", "split_by_patient")[:3] == [
        ("85", "N", "train", "train"),
        ("12", "N", "train", "patient in test"),  # slide 1330 is a test patient's
        ("85", "PB", "train", "train"),
    ]
    assert labels[0] == {
        "slide_id": "BRACS_1003",
        "patch_id": "bracs-roi-images/train/0_N/BRACS_1003_N_0.png",
        "lesion": "N",
        "split_by_patient": "train",
        "split": "train",
    }
    drawn = cv2.imread(str(base / "train/0_N/BRACS_1003_N_0.png"))
    fitted = cv2.imread(str(tmp_path / "out" / labels[0]["patch_id"]))
    assert (fitted == cv2.resize(drawn[25:275], (224, 224), interpolation=cv2.INTER_AREA)).all()


def test_bracs_roi_without_its_spreadsheet_knows_no_patients(tmp_path):
    draw_bracs_roi(tmp_path)
    written, manifest, _ = made("bracs-roi", tmp_path, tmp_path)
    assert written.patients == 0
    assert column(manifest, "split") == column(manifest, "split_by_patient")
    assert "patient_id" not in manifest[0]


def test_bracs_refuses_a_spreadsheet_that_is_another(tmp_path):
    draw_bracs_roi(tmp_path)
    book = tmp_path / "BRACS.xlsx"
    spreadsheet(book, "WSI_Information", [("WSI Filename", "Set"), ("BRACS_1003", "Training")])
    with pytest.raises(ManifestError, match=r"has no column 'Patient Id'; found WSI Filename, Set"):
        made("bracs-roi", tmp_path, tmp_path)
    spreadsheet(book, "Sheet1", [("WSI Filename", "Patient Id"), ("BRACS_1003", 85)])
    with pytest.raises(ManifestError, match=r"cannot read the sheet WSI_Information of .*BRACS\.xlsx"):
        made("bracs-roi", tmp_path, tmp_path)
    book.write_bytes(b"no workbook")
    with pytest.raises(ManifestError, match="cannot read the sheet"):
        made("bracs-roi", tmp_path, tmp_path)


def test_a_spreadsheet_without_openpyxl(tmp_path, monkeypatch):
    draw_bracs_roi(tmp_path)
    (tmp_path / "BRACS.xlsx").touch()
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(UsageError, match=r"BRACS\.xlsx needs a package: pip install 'g2l\[xlsx\]'"):
        made("bracs-roi", tmp_path, tmp_path)


def test_bracs_roi_refuses_a_missing_class(tmp_path):
    base = draw_bracs_roi(tmp_path)
    for path in (base / "val" / "3_FEA").iterdir():
        path.unlink()
    (base / "val" / "3_FEA").rmdir()
    with pytest.raises(ManifestError, match=r"expected the class folders 0_N, .*, 6_IC in .*/val; found 0_N/, 1_PB/"):
        made("bracs-roi", tmp_path, tmp_path)


def test_bracs_wsi(tmp_path):
    groups = {"Group_BT": ("N", "PB", "UDH"), "Group_AT": ("FEA", "ADH"), "Group_MT": ("DCIS", "IC")}
    number = 0
    for part in ("train", "val", "test"):
        for group, names in groups.items():
            for name in names:
                number += 1
                empty(tmp_path / "BRACS_WSI" / part / group / f"Type_{name}" / f"BRACS_{number}.svs")
    _, manifest, labels = made("bracs-wsi", tmp_path, tmp_path)
    assert labels is None
    assert column(manifest, "slide_id", "mpp", "lesion", "lesion_group", "split")[3:10] == [
        ("BRACS_4", "0.25", "FEA", "AT", "train"),
        ("BRACS_5", "0.25", "ADH", "AT", "train"),
        ("BRACS_6", "0.25", "DCIS", "MT", "train"),
        ("BRACS_7", "0.25", "IC", "MT", "train"),
        ("BRACS_8", "0.25", "N", "BT", "val"),
        ("BRACS_9", "0.25", "PB", "BT", "val"),
        ("BRACS_10", "0.25", "UDH", "BT", "val"),
    ]
    assert len(manifest) == 21


BREAKHIS = {
    "adenosis": "SOB_B_A-14-22549AB",
    "fibroadenoma": "SOB_B_F-14-14134",
    "phyllodes_tumor": "SOB_B_PT-14-22704",
    "tubular_adenoma": "SOB_B_TA-14-13200",
    "ductal_carcinoma": "SOB_M_DC-14-13412",
    "lobular_carcinoma": "SOB_M_LC-14-13412",
    "mucinous_carcinoma": "SOB_M_MC-14-13418DE",
    "papillary_carcinoma": "SOB_M_PC-14-9146",
}


def draw_breakhis(root):
    base = root / "BreaKHis_v1" / "histology_slides" / "breast"
    for i, (name, stem) in enumerate(BREAKHIS.items()):
        kind = "benign" if "_B_" in stem else "malignant"
        for m in (40, 400):
            image(base / kind / "SOB" / name / stem / f"{m}X" / f"{stem}-{m}-001.png", i * m, 46, 70)
    return base


def test_breakhis(tmp_path):
    draw_breakhis(tmp_path)
    text(
        tmp_path / "mkfold" / "dsfold1.txt",
        "SOB_B_A-14-22549AB-40-001.png|40|1|train\nSOB_B_A-14-22549AB-400-001.png|400|1|test\n",
    )
    written, manifest, labels = made("breakhis", tmp_path, tmp_path)
    assert labels is None
    assert (written.rows, written.slides, written.patients) == (16, 16, 7)  # 13412 is two cases of one patient
    assert manifest[0] == {
        "slide_id": "SOB_B_A-14-22549AB/400X",
        "path": "breakhis-images/SOB_B_A-14-22549AB/400X/SOB_B_A-14-22549AB-400-001.png",
        "patch_id": "breakhis-images/SOB_B_A-14-22549AB/400X/SOB_B_A-14-22549AB-400-001.png",
        "dataset": "breakhis",
        "patient_id": "22549",
        "case": "14-22549AB",
        "magnification": "400",
        "tumor": "benign",
        "tumor_type": "adenosis",
        "fold1": "test",
    }
    assert column(manifest, "case", "magnification", "fold1")[1:3] == [
        ("14-22549AB", "40", "train"),
        ("14-14134", "400", ""),
    ]
    assert cv2.imread(str(tmp_path / manifest[0]["path"])).shape == (224, 224, 3)


def test_breakhis_refuses_broken_images_and_folds(tmp_path):
    base = draw_breakhis(tmp_path)
    path = base / "benign/SOB/adenosis/SOB_B_A-14-22549AB/40X/SOB_B_A-14-22549AB-40-001.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    with pytest.raises(ManifestError, match=r"22549AB-40-001\.png is no image that OpenCV decodes"):
        made("breakhis", tmp_path, tmp_path)
    path.write_bytes(whole)
    text(tmp_path / "dsfold3.txt", "SOB_B_A-14-22549AB-40-001.png|40|1\n")
    with pytest.raises(ManifestError, match=r"dsfold3\.txt: .* is no line image\|magnification\|fold\|train or test"):
        made("breakhis", tmp_path, tmp_path)


def test_breakhis_refuses_a_fold_that_parts_a_folder(tmp_path):
    base = draw_breakhis(tmp_path)
    image(base / "benign/SOB/adenosis/SOB_B_A-14-22549AB/40X/SOB_B_A-14-22549AB-40-002.png", 1, 46, 70)
    text(
        tmp_path / "dsfold2.txt", "SOB_B_A-14-22549AB-40-001.png|40|2|train\nSOB_B_A-14-22549AB-40-002.png|40|2|test\n"
    )
    with pytest.raises(
        ManifestError, match="expected one fold2 for all files of SOB_B_A-14-22549AB/40X; found 'train'"
    ):
        made("breakhis", tmp_path, tmp_path)


def draw_tiger(root, names=("100B",)):
    base = root / "wsirois" / "wsi-level-annotations"
    for seed, name in enumerate(names):
        slide(base / "images" / f"{name}.tif", 900, 600, seed)
        tissue = np.zeros((600, 900))
        tissue[:256, :256] = 1
        tissue[:256, 256:400] = 2  # 144 of 256 columns: more than half
        tissue[:256, 512:630] = 6  # 118 of 256: less than half
        tissue[256:512, :120] = 7
        tissue[256:512, 120:256] = 5
        mask(base / "annotations-tissue-cells-masks" / f"{name}.tif", tissue)
    return base


def test_tiger_patches_get_the_tissue_that_covers_most_of_them(tmp_path):
    names = ("100B", "TC_S01_P000001_C0001_B101", SLIDE)
    base = draw_tiger(tmp_path, names)
    mask(base / "annotations-tissue-bcss-masks" / f"{SLIDE}.tif", np.full((600, 900), 3))
    written, manifest, labels = made("tiger", tmp_path, tmp_path)
    assert column(manifest, "slide_id", "patient_id", "medical_center") == [
        ("100B", "100", "JB"),
        (SLIDE, "TCGA-A2-A0CM", "TCGA"),
        (names[1], "TC_S01_P000001", "RUMC"),
    ]
    assert column(labels, "slide_id", "x", "y", "tissue")[:3] == [
        ("100B", "0", "0", "invasive tumor"),
        ("100B", "256", "0", "tumor-associated stroma"),
        ("100B", "0", "256", "necrosis not in-situ"),
    ]
    assert written.cells == len(labels) == 3 + 3 + 6
    assert {row["tissue"] for row in labels if row["slide_id"] == SLIDE} == {"in-situ tumor"}


def test_tiger_refuses_masks_that_are_not_of_the_slide(tmp_path):
    base = draw_tiger(tmp_path)
    mask(base / "annotations-tissue-cells-masks" / "100B.tif", np.zeros((300, 450)))
    with pytest.raises(ManifestError, match="is 450 x 300 px, its slide 900 x 600"):
        made("tiger", tmp_path, tmp_path)
    (base / "annotations-tissue-cells-masks" / "100B.tif").write_bytes(b"no mask")
    with pytest.raises(ManifestError, match="cannot read the mask"):
        made("tiger", tmp_path, tmp_path)
    (base / "annotations-tissue-cells-masks" / "100B.tif").unlink()
    with pytest.raises(ManifestError, match=r"expected .*annotations-tissue-cells-masks"):
        made("tiger", tmp_path, tmp_path)


def test_tiger_names():
    assert tiger_origin("103S") == {"patient_id": "103", "medical_center": "JB"}
    with pytest.raises(ManifestError, match="is no slide of TIGER"):
        tiger_origin("slide7")


def test_bach(tmp_path):
    base = tmp_path / "ICIAR2018_BACH_Challenge" / "Photos"
    for name, letter in {"Benign": "b", "InSitu": "is", "Invasive": "iv", "Normal": "n"}.items():
        for number in range(1, 101):
            image(base / name / f"{letter}{number:03}.tif", number, 6, 8)
    written, _, labels = made("bach", tmp_path, tmp_path)
    assert (written.rows, written.patients) == (400, 0)
    test = [row["patch_id"] for row in labels if row["split"] == "test"]
    assert (len(test), len(labels)) == (132, 400)  # as eva counts them
    assert test[0] == "bach-images/Benign/b042.png"
    assert {row["lesion"] for row in labels} == {"Benign", "InSitu", "Invasive", "Normal"}
    (base / "Normal" / "n100.tif").unlink()
    with pytest.raises(ManifestError, match="expected all 400 images"):
        made("bach", tmp_path, tmp_path)
