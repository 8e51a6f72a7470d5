"""Lymph node, colon and rectum, lung: miniatures of the published folders, manifests checked by hand."""

import cv2
import h5py
import numpy as np
import pytest

from g2l_core.datasets.manifest import write_manifest
from g2l_core.datasets.table import DATASETS
from g2l_core.errors import ManifestError, UsageError
from g2l_core.patches.render import read_image
from g2l_core.slides.manifest import read_sources
from tests.datasets.draw import column, empty, image, made, picture, text


def draw_pcam(root, counts=(3, 2, 2)):
    drawn = {}
    for seed, (part, count) in enumerate(zip(("train", "valid", "test"), counts, strict=True)):
        stem = root / f"camelyonpatch_level_2_split_{part}"
        drawn[part] = np.stack([picture(10 * seed + i, 96) for i in range(count)])
        with h5py.File(f"{stem}_x.h5", "w") as file:
            file.create_dataset("x", data=drawn[part], chunks=(1, 96, 96, 3))
        with h5py.File(f"{stem}_y.h5", "w") as file:
            file["y"] = np.array([i % 2 for i in range(count)], np.uint8).reshape(count, 1, 1, 1)
        lines = [f"{i},{7 * i},{3 * i},True,False,camelyon16_{part}_tumor_{i // 2:03}" for i in range(count)]
        text(root / f"{stem.name}_meta.csv", "\n".join([",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi", *lines]))
    return drawn


def test_pcam_is_written_without_loss(tmp_path):
    drawn = draw_pcam(tmp_path)
    written, manifest, labels = made("pcam", tmp_path, tmp_path / "out")
    assert (written.rows, written.slides, written.patients) == (7, 4, 0)
    assert column(labels, "slide_id", "tumor", "wsi", "split") == [
        ("camelyon16_train_tumor_000", "no tumor", "camelyon16_train_tumor_000", "train"),
        ("camelyon16_train_tumor_000", "tumor", "camelyon16_train_tumor_000", "train"),
        ("camelyon16_train_tumor_001", "no tumor", "camelyon16_train_tumor_001", "train"),
        ("camelyon16_valid_tumor_000", "no tumor", "camelyon16_valid_tumor_000", "val"),
        ("camelyon16_valid_tumor_000", "tumor", "camelyon16_valid_tumor_000", "val"),
        ("camelyon16_test_tumor_000", "no tumor", "camelyon16_test_tumor_000", "test"),
        ("camelyon16_test_tumor_000", "tumor", "camelyon16_test_tumor_000", "test"),
    ]
    assert manifest[3]["path"] == "pcam-images/valid/000000.png"
    images = [cv2.imread(str(tmp_path / "out" / row["path"]))[..., ::-1] for row in manifest]
    assert (np.stack(images) == np.concatenate([drawn[part] for part in ("train", "valid", "test")])).all()


def test_pcam_refuses_packed_short_and_broken_files(tmp_path):
    draw_pcam(tmp_path)
    stem = "camelyonpatch_level_2_split"
    (tmp_path / f"{stem}_valid_x.h5").rename(tmp_path / f"{stem}_valid_x.h5.gz")
    with pytest.raises(ManifestError, match=r"expected camelyonpatch_level_2_split_valid_x\.h5 \(unpack the \.gz"):
        made("pcam", tmp_path, tmp_path)
    (tmp_path / f"{stem}_valid_x.h5").write_bytes(b"cut short")
    with pytest.raises(ManifestError, match=r"valid_x\.h5 has no array 'x' that can be read"):
        made("pcam", tmp_path, tmp_path)
    draw_pcam(tmp_path)
    text(tmp_path / f"{stem}_test_meta.csv", ",coord_y,coord_x,tumor_patch,center_tumor_patch,wsi\n0,1,2,True,True,w\n")
    with pytest.raises(ManifestError, match=r"2 images in _x\.h5, 2 labels in _y\.h5 and 1 rows in _meta\.csv"):
        made("pcam", tmp_path, tmp_path)


WILDS = [
    ("004", "4", 3328, 21792, 1, 0, 0, "train"),
    ("017", "1", 96, 96, 0, 0, 1, "id_val"),
    ("020", "2", 0, 0, 1, 1, 0, "val"),  # hospital 1, whatever the column split says
    ("042", "3", 32, 64, 0, 2, 1, "test"),
    ("042", "3", 64, 64, 1, 2, 0, "test"),
]


def draw_wilds(root):
    lines = [",patient,node,x_coord,y_coord,tumor,slide,center,split"]
    for i, (patient, node, x, y, tumor, center, split, _) in enumerate(WILDS):
        lines.append(f"{i},{patient},{node},{x},{y},{tumor},{i},{center},{split}")
        folder = f"patient_{patient}_node_{node}"
        image(root / "patches" / folder / f"patch_{folder}_x_{x}_y_{y}.png", i, 96)
    text(root / "metadata.csv", "\n".join(lines))


def test_camelyon17_wilds(tmp_path):
    draw_wilds(tmp_path / "camelyon17_v1.0")
    _, manifest, labels = made("camelyon17-wilds", tmp_path, tmp_path)
    assert column(labels, "split") == [row[-1] for row in WILDS]
    assert column(labels, "tumor") == ["tumor", "no tumor", "tumor", "no tumor", "tumor"]
    assert column(manifest, "slide_id", "patient_id", "medical_center")[2:4] == [
        ("patient_020_node_2", "020", "1"),
        ("patient_042_node_3", "042", "2"),
    ]
    (tmp_path / manifest[1]["path"]).unlink()
    with pytest.raises(ManifestError, match="names 1 of 5 files that are not there, first .*patient_017_node_1"):
        made("camelyon17-wilds", tmp_path, tmp_path)


def draw_nct(root, letters="AB"):
    for name in ("NCT-CRC-HE-100K", "CRC-VAL-HE-7K"):
        for i, tissue in enumerate(("ADI", "BACK", "DEB", "LYM", "MUC", "MUS", "NORM", "STR", "TUM")):
            for j, letter in enumerate(letters):
                last = image(
                    root / name / tissue / f"{tissue}-TCGA{letter}.tif", i + 10 * j + 100 * (name[0] == "C"), 224
                )
    return last


def test_nct_crc(tmp_path):
    last = draw_nct(tmp_path)
    written, manifest, labels = made("nct-crc", tmp_path, tmp_path)
    assert labels is None
    assert (written.rows, written.slides) == (36, 18)
    assert column(manifest, "slide_id", "mpp", "tissue", "split")[::17] == [
        ("NCT-CRC-HE-100K/ADI", "0.5", "ADI", "train"),
        ("NCT-CRC-HE-100K/TUM", "0.5", "TUM", "train"),
        ("CRC-VAL-HE-7K/TUM", "0.5", "TUM", "test"),
    ]
    sources = read_sources([written.manifest])  # TIFF files, yet patch images
    assert [len(source.patch_ids) for source in sources] == [2] * 18
    assert (read_image(tmp_path / manifest[-1]["path"], 224) == last).all()
    assert sources[0].labels == {"dataset": "nct-crc", "tissue": "ADI", "split": "test"}
    with pytest.raises(ManifestError, match=r"expected NCT-CRC-HE-100K and CRC-VAL-HE-7K in .*; found ADI/, BACK/"):
        made("nct-crc", tmp_path / "CRC-VAL-HE-7K", tmp_path)


def draw_mhist(root, more=""):
    text(
        root / "annotations.csv",
        "Image Name,Majority Vote Label,Number of Annotators who Selected SSA (Out of 7),Partition\n"
        "MHIST_aaa.png,SSA,6,train\nMHIST_aab.png,HP,0,train\nMHIST_aac.png,HP,2,test\n" + more,
    )
    for seed, name in enumerate(("aaa", "aab", "aac")):
        image(root / "images" / f"MHIST_{name}.png", seed, 224)


def test_mhist(tmp_path):
    draw_mhist(tmp_path)
    _, manifest, labels = made("mhist", tmp_path, tmp_path)
    assert labels is None
    assert column(manifest, "slide_id", "path", "polyp", "split") == [
        ("train/SSA", "images/MHIST_aaa.png", "SSA", "train"),
        ("train/HP", "images/MHIST_aab.png", "HP", "train"),
        ("test/HP", "images/MHIST_aac.png", "HP", "test"),
    ]
    with pytest.raises(UsageError, match=r"annotations\.csv is there already and is no manifest"):
        write_manifest(DATASETS["mhist"], tmp_path, tmp_path / "annotations.csv")
    made("mhist", tmp_path, tmp_path)  # its own manifest is written anew
    draw_mhist(tmp_path, "MHIST_aad.png,HP")
    with pytest.raises(ManifestError, match=r"annotations\.csv: row 4 is cut short"):
        made("mhist", tmp_path, tmp_path)


def test_tcga_crc_msi(tmp_path):
    names = ("TCGA-CM-4743-01Z-00-DX1.9f_(1,2).jpg", "blk-AAAH-TCGA-AA-3715-01A-01-TS1.jpg")
    for part in ("TRAIN", "TEST"):
        for seed, (kind, name) in enumerate(zip(("MSIH", "nonMSIH"), names, strict=True)):
            image(tmp_path / part / kind / name.replace("47", "47" if part == "TRAIN" else "48"), seed, 32)
    written, _, labels = made("tcga-crc-msi", tmp_path, tmp_path)
    assert column(labels, "slide_id", "msi", "split") == [
        ("TCGA-CM-4743", "MSIH", "train"),
        ("TCGA-AA-3715", "nonMSIH", "train"),
        ("TCGA-CM-4843", "MSIH", "test"),
        ("TCGA-AA-3715", "nonMSIH", "test"),
    ]
    assert written.patients == 3
    image(tmp_path / "TEST" / "MSIH" / "nameless.jpg")
    with pytest.raises(ManifestError, match=r"'nameless\.jpg' has no TCGA barcode"):
        made("tcga-crc-msi", tmp_path, tmp_path)


def test_tcga_nsclc(tmp_path):
    header = "File ID\tFile Name\tData Category\tData Type\tProject ID\tCase ID\tSample ID\tSample Type"
    listed = [
        ("id1", "TCGA-05-4244-01Z-00-DX1.A.svs", "TCGA-LUAD", "TCGA-05-4244", "Primary Tumor"),
        ("id2", "TCGA-18-3406-01Z-00-DX1.B.svs", "TCGA-LUSC", "TCGA-18-3406", "Primary Tumor"),
        ("id3", "TCGA-18-3406-11A-01-TS1.C.svs", "TCGA-LUSC", "TCGA-18-3406", "Solid Tissue Normal"),
        ("id4", "TCGA-05-4245-01Z-00-DX1.D.svs", "TCGA-LUAD", "TCGA-05-4245", "Primary Tumor"),
        ("id5", "TCGA-A2-A0CM-01Z-00-DX1.E.svs", "TCGA-BRCA", "TCGA-A2-A0CM", "Primary Tumor"),
    ]
    lines = [
        f"{i}\t{n}\tBiospecimen\tSlide Image\t{project}\t{c}\t{c}-01A\t{kind}" for i, n, project, c, kind in listed
    ]
    text(tmp_path / "gdc_sample_sheet.2026-01-02.tsv", "\n".join([header, *lines]))
    for file_id, name, *_ in [listed[0], listed[1], listed[2], listed[4]]:
        empty(tmp_path / file_id / name)
    written, manifest, _ = made("tcga-nsclc", tmp_path, tmp_path)
    assert column(manifest, "slide_id", "path", "patient_id", "medical_center", "subtype") == [
        ("TCGA-05-4244-01Z-00-DX1.A", "id1/TCGA-05-4244-01Z-00-DX1.A.svs", "TCGA-05-4244", "05", "LUAD"),
        ("TCGA-18-3406-01Z-00-DX1.B", "id2/TCGA-18-3406-01Z-00-DX1.B.svs", "TCGA-18-3406", "18", "LUSC"),
    ]
    assert written.left_out == ("1 slides of the sample sheet that are not there", "1 slides of normal tissue")


def test_lc25000(tmp_path):
    folders = {"colon_image_sets": ("colon_aca", "colon_n"), "lung_image_sets": ("lung_aca", "lung_n", "lung_scc")}
    for organ, names in folders.items():
        for name in names:
            image(tmp_path / "lung_colon_image_set" / organ / name / f"{name.replace('_', '')}1.jpeg", 0, 76)
    written, manifest, labels = made("lc25000", tmp_path, tmp_path)
    assert labels is None
    assert column(manifest, "slide_id", "organ", "tissue")[1:3] == [
        ("colon_n", "colon", "colon_n"),
        ("lung_aca", "lung", "lung_aca"),
    ]
    assert (written.rows, written.patients) == (5, 0)
