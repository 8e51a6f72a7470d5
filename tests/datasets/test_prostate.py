"""Prostate datasets: miniatures of the published folders, manifests checked by hand."""

import json

import numpy as np
import pytest

from g2l_core.errors import ManifestError
from tests.datasets.draw import column, empty, image, made, mask, slide, text


def draw_gleason(root):
    base = root / "arvaniti_gleason_patches"
    cores = {
        "train_validation_patches_750": ("ZT111_4_A_1_1", "ZT76_39_A_1_1"),
        "test_patches_750/patho_1": ("ZT80_38_A_1_1",),
        "test_patches_750/patho_2": ("ZT80_38_A_1_1",),
    }
    for folder, names in cores.items():
        for core in names:
            for kind in range(4):
                image(base / folder / core / f"{core}_patch_{10 + kind}_class_{kind}.jpg", kind, 75)


def test_gleason(tmp_path):
    draw_gleason(tmp_path)
    written, _, labels = made("gleason-arvaniti", tmp_path, tmp_path)
    assert (written.rows, written.slides, written.patients) == (12, 3, 0)
    assert column(labels, "core", "gleason", "split")[::3] == [
        ("ZT111_4_A_1_1", "benign", "train"),
        ("ZT111_4_A_1_1", "gleason 5", "train"),
        ("ZT76_39_A_1_1", "gleason 4", "val"),
        ("ZT80_38_A_1_1", "gleason 3", "test"),
    ]
    assert labels[-1]["patch_id"] == "gleason-arvaniti-images/ZT80_38_A_1_1/ZT80_38_A_1_1_patch_13_class_3.png"


def test_gleason_refuses_an_array_that_no_part_has(tmp_path):
    draw_gleason(tmp_path)
    image(tmp_path / "arvaniti_gleason_patches/train_validation_patches_750/ZT9_1/ZT9_1_patch_1_class_0.jpg")
    with pytest.raises(ManifestError, match=r"expected names such as ZT76_39_A_1_1_patch_12_class_0\.jpg"):
        made("gleason-arvaniti", tmp_path, tmp_path)


def draw_aggc(root):
    base = root / "AGGC2022_train"
    grade = np.zeros((512, 512))
    grade[:256, :200] = 255
    stroma = np.zeros((512, 512))
    stroma[256:, 256:] = 255
    places = {
        "Subset1_Train_1": "Subset1_Train_image",
        "Subset2_Train_7": "Subset2_Train_image",
        "Subset3_Train_12_Philips": "Subset3_Train_image/Philips",
        "Subset3_Train_12_Zeiss": "Subset3_Train_image/Zeiss",
    }
    for seed, (name, folder) in enumerate(places.items()):
        slide(base / folder / f"{name}.tiff", 512, 512, seed)
        annotation = folder.replace("_image", "_annotation").replace("annotation/", "annotation/Train/")
        mask(base / annotation / name / "G4_Mask.tif", grade)
        mask(base / annotation / name / "Stroma_Mask.tif", stroma)
    empty(base / "Subset1_Train_image" / "Subset1_Train_2.tiff")
    return base


def test_aggc22(tmp_path):
    draw_aggc(tmp_path)
    written, manifest, labels = made("aggc22", tmp_path, tmp_path)
    assert column(manifest, "slide_id", "patient_id", "scanner", "mpp", "split") == [
        ("Subset1_Train_1", "Subset1_train_1", "Akoya", "0.5", "train"),
        ("Subset2_Train_7", "Subset2_train_7", "Akoya", "0.5", "train"),
        ("Subset3_Train_12_Philips", "Subset3_train_12", "Philips", "0.5", "train"),
        ("Subset3_Train_12_Zeiss", "Subset3_train_12", "Zeiss", "0.5", "train"),
    ]
    assert column(labels, "x", "y", "gleason") == [("0", "0", "G4"), ("256", "256", "Stroma")] * 4
    assert written.cells == 8
    assert written.left_out == ("1 slides without masks",)


def test_aggc22_refuses_names_and_folders_of_others(tmp_path):
    base = draw_aggc(tmp_path)
    (base / "Subset2_Train_image" / "Subset2_Train_7.tiff").rename(base / "Subset2_Train_image" / "case7.tiff")
    (base / "Subset2_Train_annotation" / "Subset2_Train_7").rename(base / "Subset2_Train_annotation" / "case7")
    with pytest.raises(ManifestError, match=r"expected names such as Subset1_Train_1\.tiff"):
        made("aggc22", tmp_path, tmp_path)
    with pytest.raises(ManifestError, match=r"expected folders Subset1_Train_image .*; found Subset1_Train_1\.tiff"):
        made("aggc22", base / "Subset1_Train_image", tmp_path)


def draw_chimera(root, **changes):
    base = root / "task1"
    for patient, event, months in (("1003", "1.0", 12.5), ("1011", 0.0, 60)):
        facts = {"BCR": event, "time_to_follow-up/BCR": months, "ISUP": 2, **changes}
        text(base / "clinical_data" / f"{patient}.json", json.dumps(facts))
        for number in (1, 2):
            empty(base / "pathology" / "images" / patient / f"{patient}_{number}.tif")
            empty(base / "pathology" / "images" / patient / f"{patient}_{number}_tissue.tif")
    return base


def test_chimera(tmp_path):
    draw_chimera(tmp_path)
    _, manifest, labels = made("chimera", tmp_path, tmp_path)
    assert labels is None
    assert column(manifest, "slide_id", "patient_id", "medical_center", "bcr", "bcr_event", "bcr_months", "isup") == [
        ("1003_1", "1003", "Radboudumc", "recurrence", "1", "12.5", "2"),
        ("1003_2", "1003", "Radboudumc", "recurrence", "1", "12.5", "2"),
        ("1011_1", "1011", "Radboudumc", "no recurrence", "0", "60", "2"),
        ("1011_2", "1011", "Radboudumc", "no recurrence", "0", "60", "2"),
    ]


@pytest.mark.parametrize("event", ["unknown", 2, None])
def test_chimera_refuses_an_outcome_that_is_none(event, tmp_path):
    draw_chimera(tmp_path, BCR=event)
    with pytest.raises(ManifestError, match=r"1003\.json gives no BCR|1011\.json gives no BCR"):
        made("chimera", tmp_path, tmp_path)


def test_panda(tmp_path):
    text(
        tmp_path / "train.csv",
        "image_id,data_provider,isup_grade,gleason_score\n0005f7,karolinska,0,0+0\n000920,radboud,4,4+4\n",
    )
    for name in ("0005f7", "000920"):
        empty(tmp_path / "train_images" / f"{name}.tiff")
    _, manifest, _ = made("panda", tmp_path, tmp_path)
    assert column(manifest, "slide_id", "medical_center", "isup", "gleason") == [
        ("0005f7", "karolinska", "0", "0+0"),
        ("000920", "radboud", "4", "4+4"),
    ]
    empty(tmp_path / "train_images" / "ffff.tiff")
    with pytest.raises(ManifestError, match=r"train\.csv has no row for the slide ffff\.tiff"):
        made("panda", tmp_path, tmp_path)
    text(tmp_path / "train.csv", "image_id,isup_grade\n0005f7,0\n")
    with pytest.raises(ManifestError, match=r"has no column 'data_provider'; found image_id, isup_grade"):
        made("panda", tmp_path, tmp_path)
