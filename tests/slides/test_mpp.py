"""The scale of a slide from every vendor's header, and hand-drawn cohorts under the audit."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from g2l_core.errors import MppError
from g2l_core.slides.manifest import Source
from g2l_core.slides.mpp import KEYS, Scale, ScaleFacts, audit_scale, audit_table, find_scale, objective_power
from g2l_core.synthetic.cohort import write_pyramid
from pipeline.audit import audit_sources, require_plausible
from tests.slides.test_slide import noise

SIZE = (40_000, 20_000)
DICOM = "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing"
MIRAX = "mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_"
ZEISS = "zeiss.Scaling.Items."

# ---- one slide ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("properties", "key", "x", "y"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.251"}, "openslide.mpp-x", 0.25, 0.251),
        ({"aperio.MPP": "0.2525"}, "aperio.MPP", 0.2525, 0.2525),
        ({"aperio.MPP": "0,2525"}, "aperio.MPP", 0.2525, 0.2525),
        ({f"{MIRAX}X": "0.2333", f"{MIRAX}Y": "0.2334"}, f"{MIRAX}X", 0.2333, 0.2334),
        ({"ventana.ScanRes": "0.465"}, "ventana.ScanRes", 0.465, 0.465),
        ({"sakura.ResolutionMmPerPix": "0.00047"}, "sakura.ResolutionMmPerPix", 0.47, 0.47),
        ({f"{ZEISS}X.Value": "2.2e-7", f"{ZEISS}Y.Value": "2.21e-07"}, f"{ZEISS}X.Value", 0.22, 0.221),
        ({f"{DICOM}[0]": "0.00025", f"{DICOM}[1]": "0.000251"}, f"{DICOM}[1]", 0.251, 0.25),
        ({"philips.DICOM_PIXEL_SPACING": '"0.00025" "0.000251"'}, "philips.DICOM_PIXEL_SPACING", 0.251, 0.25),
        ({"hamamatsu.PhysicalWidth": "9200000", "hamamatsu.PhysicalHeight": "4590000"},
         "hamamatsu.PhysicalWidth", 0.23, 0.2295),
        ({"tiff.XResolution": "40000", "tiff.YResolution": "20000", "tiff.ResolutionUnit": "centimeter"},
         "tiff.XResolution", 0.25, 0.5),
        ({"tiff.XResolution": "50800", "tiff.YResolution": "50800", "tiff.ResolutionUnit": "inch"},
         "tiff.XResolution", 0.5, 0.5),
        ({"tiff.XResolution": "50800", "tiff.YResolution": "50800"}, "tiff.XResolution", 0.5, 0.5),
        ({"tiff.XResolution": "0.6", "tiff.YResolution": "0.6", "openslide.vendor": "trestle"},
         "tiff.XResolution", 0.6, 0.6),
    ],
)  # fmt: skip
def test_every_vendors_key_in_its_own_unit(properties, key, x, y):
    scale = find_scale(properties, SIZE, mpp_override=1.0)
    assert (scale.mpp_x, scale.mpp_y) == (pytest.approx(x, rel=1e-12), pytest.approx(y, rel=1e-12))
    assert scale.source == f"header: {key}"
    assert scale.mpp == pytest.approx((x + y) / 2)


def test_standard_key_goes_before_the_vendors_and_that_before_the_tags():
    properties = {"tiff.XResolution": "20000", "tiff.YResolution": "20000", "tiff.ResolutionUnit": "centimeter"}
    assert find_scale(properties, SIZE).mpp == 0.5
    properties["aperio.MPP"] = "0.4"
    assert find_scale(properties, SIZE).mpp == 0.4
    properties |= {"openslide.mpp-x": "0.3", "openslide.mpp-y": "0.3"}
    assert find_scale(properties, SIZE).mpp == 0.3


@pytest.mark.parametrize("bad", ["", "none", "0", "-0.25", "nan", "inf", "353", "0.0001"])
def test_what_is_no_scale_gives_way_to_the_next_key(bad):
    properties = {"openslide.mpp-x": bad, "openslide.mpp-y": "0.25", "ventana.ScanRes": "0.25"}
    assert find_scale(properties, SIZE).source == "header: ventana.ScanRes"


def test_half_a_pair_and_tags_without_a_unit_are_no_scale():
    for properties in (
        {"openslide.mpp-x": "0.25"},
        {"philips.DICOM_PIXEL_SPACING": '"0.00025"'},
        {"tiff.XResolution": "40000", "tiff.YResolution": "40000", "tiff.ResolutionUnit": "none"},
        {"hamamatsu.XResolution": "0.25", "hamamatsu.YResolution": "0.25"},
    ):
        assert find_scale(properties, SIZE, mpp_override=1.0).source == "override"


def test_an_absent_scale_names_all_keys_and_both_remedies():
    with pytest.raises(MppError) as caught:
        find_scale({}, SIZE)
    assert all(key in str(caught.value) for key in KEYS)
    assert "--mpp-override UM_PER_PX" in str(caught.value)
    assert "the manifest's column mpp" in str(caught.value)


@pytest.mark.parametrize(
    ("header", "power", "manifest", "source"),
    [
        (("0.5", "0.5"), None, 0.25, "manifest (header: 0.5)"),  # the audit flags the difference
        (("0.5", "0.5"), "20", 0.25, "manifest (header: 0.5)"),
        (("0.5", "0.5"), "40", 0.25, "manifest (header: 0.5)"),
        (("0.2525", "0.2525"), "40", 0.25, "header: openslide.mpp-x"),  # the manifest has rounded it
        (("0.245", "0.245"), None, 0.25, "header: openslide.mpp-x"),  # by 2 %
        (("0.2449", "0.2449"), None, 0.25, "manifest (header: 0.2449)"),
        (("0.5", "0.25"), None, 0.4, "manifest (header: 0.375)"),  # not square
        (("0.5", "0.25"), None, 0.375, "manifest"),
        (("0.25", "0.251"), "40", 0.24, "manifest (header: 0.2505)"),
        (("2.5", "2.5"), None, 0.25, "manifest (header: 2.5)"),
        (("2.5", "2.5"), None, None, "header: openslide.mpp-x"),
    ],
)
def test_the_manifest_s_scale_is_used_unless_it_is_the_header_s_rounded(header, power, manifest, source):
    properties = {"openslide.mpp-x": header[0], "openslide.mpp-y": header[1]}
    if power:
        properties["openslide.objective-power"] = power
    assert find_scale(properties, SIZE, manifest_mpp=manifest, mpp_override=9.0).source == source


def test_objective_power():
    assert objective_power({"openslide.objective-power": "40"}) == 40
    assert objective_power({"openslide.objective-power": "unknown"}) is None
    assert objective_power({}) is None
    assert objective_power({"openslide.objective-power": "20", "openslide.vendor": "mirax"}) is None


# ---- a cohort -----------------------------------------------------------------------------------------------


def fact(slide_id, x, *, y=None, power=None, manifest=None, source="header: openslide.mpp-x", header=None):
    beside = None if header is None else Scale(mpp_x=header, mpp_y=header, source="header: openslide.mpp-x")
    scale = Scale(mpp_x=x, mpp_y=x if y is None else y, source=source, header=beside)
    return ScaleFacts(slide_id=slide_id, scale=scale, objective_power=power, manifest_mpp=manifest, level0_size=SIZE)


def flagged(*facts):
    return {finding.slide_id: "; ".join(finding.reasons) for finding in audit_scale(facts)}


def many(n, x, **more):
    return [fact(f"{x:g}-{i}", x, **more) for i in range(n)]


def test_a_mixed_cohort_of_20x_and_40x_is_normal():
    assert flagged(*many(30, 0.2525, power=40.0), *many(3, 0.499, power=20.0), *many(1, 1.0, power=10.0)) == {}
    assert flagged(*many(30, 0.2525), *many(20, 0.499)) == {}  # no objective, but no clear majority either


@pytest.mark.parametrize("mpp", [0.2204, 0.2278, 0.2325, 0.25, 0.2528, 0.27])
def test_what_real_scanners_call_40x_is_normal(mpp):
    assert flagged(fact("a", mpp, power=40.0), fact("b", 2 * mpp, power=20.0)) == {}


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        (fact("odd", 0.5, power=40.0), "about 2 times the 0.25 um/px of its objective, 40x"),
        (fact("odd", 0.25, power=20.0), "about 1/2 of the 0.5 um/px of its objective, 20x"),
        (fact("odd", 0.025, power=40.0), "about 1/10 of the 0.25 um/px of its objective"),
        (fact("odd", 2.5, power=40.0), "outside the 0.1 to 1.2 um/px of slides"),
        (fact("odd", 0.0999), "outside"),
        (fact("odd", 1.21), "outside"),
        (fact("odd", 0.25, y=0.253), "0.25 um/px across but 0.253 um/px down"),
        (fact("odd", 0.25, manifest=0.25, source="manifest", header=0.5), "about 1/2 of the 0.5 um/px of its header: "),
        (
            fact("odd", 0.5, manifest=0.5, source="manifest", header=0.35),
            "about 1.4 times the 0.35 um/px of its header",
        ),
        (
            fact("odd", 2.5, manifest=2.5, source="manifest", header=0.25),
            "about 10 times the 0.25 um/px of its header: ",
        ),
        (fact("odd", 2.5, manifest=2.5, source="manifest"), "outside"),
        (fact("odd", 0.5, power=40.0, source="override"), "objective"),
        (fact("odd", 0.5, power=40.0, manifest=0.5, source="manifest"), "objective"),
    ],
)
def test_a_scale_that_cannot_be_true_by_itself(odd, words):
    assert words in flagged(odd, fact("good", 0.25, power=40.0))["odd"]


@pytest.mark.parametrize(
    "good",
    [
        fact("a", 0.25, y=0.252),
        fact("a", 0.1),
        fact("a", 1.2),
        fact("a", 2.0, manifest=2.0),  # two sources agree
        fact("a", 0.24, power=20.0, manifest=0.25),
        fact("a", 0.25, power=40.0, manifest=0.25, source="manifest"),
        fact("a", 0.25, manifest=0.25, source="manifest", header=2.5),  # the header is doubtful by itself
        fact("a", 0.25, manifest=0.25, source="manifest", header=0.3),
    ],
)
def test_a_scale_that_may_be_true(good):
    assert flagged(good) == {}


def test_one_slide_off_the_clear_majority():
    others = many(9, 0.25)
    assert flagged(*others, fact("odd", 0.5)) == {"odd": "about 2 times the 0.25 um/px of most slides"}
    assert "most slides" in flagged(*others, fact("odd", 0.5, power=60.0))["odd"]
    assert flagged(*others, fact("even", 0.5, power=20.0)) == {}
    assert flagged(*others, fact("even", 0.5, manifest=0.5)) == {}
    assert flagged(*others[:3], fact("odd", 0.5)) == {}  # four slides have no majority
    assert flagged(*others[:7], *many(3, 0.5)) == {}  # 70 % neither


@given(
    st.lists(
        st.tuples(st.sampled_from([0.23, 0.25, 0.5, 1.0, 2.5]), st.sampled_from([None, 10.0, 20.0, 40.0])), max_size=20
    )
)
def test_findings_do_not_depend_on_the_order(drawn):
    facts = [fact(f"s{i}", mpp, power=power) for i, (mpp, power) in enumerate(drawn)]
    assert flagged(*facts) == flagged(*reversed(facts))
    assert [finding.slide_id for finding in audit_scale(facts)] == [
        f.slide_id for f in facts if f.slide_id in flagged(*facts)
    ]


def test_table_groups_and_lists():
    facts = [*many(40, 0.25), *many(2, 0.2528), *many(12, 0.499, power=20.0)]
    facts += [fact(f"odd/{i}", 5.0, source="manifest") for i in range(3)]
    lines = audit_table(facts, audit_scale(facts)).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["0.25", "to", "0.2528", "42", "header:", "openslide.mpp-x"],
        ["0.499", "12", "header:", "openslide.mpp-x"],
        ["5", "3", "manifest"],
    ]
    assert "3 of 57 slides have a doubtful scale:" in lines
    assert "  odd/0: 5 um/px of 40000 x 20000 px (manifest): outside the 0.1 to 1.2" in "\n".join(lines)
    assert len(audit_table(facts[:54], audit_scale(facts[:54])).splitlines()) == 3


def test_table_fits_80_columns_and_lists_at_most_20():
    facts = [fact(f"a/very/long/folder/{'x' * 90}/{i}", 2.5, y=3.0, source=f"header: {DICOM}[1]") for i in range(23)]
    table = audit_table(facts, audit_scale(facts))
    assert max(map(len, table.splitlines())) <= 80
    assert table.count("pixels are") == 20
    assert table.endswith("\n  and 3 more")


# ---- files --------------------------------------------------------------------------------------------------


def test_audit_of_files(tmp_path, capsys):
    for name, mpp in (("a", 0.25), ("b", 0.25), ("c", 2.5)):
        write_pyramid(tmp_path / f"{name}.tiff", noise(256, 256), mpp=mpp, downsamples=(1,))
    (tmp_path / "text.svs").write_text("no slide")
    sources = [Source(slide_id=p.stem, path=p) for p in sorted(tmp_path.iterdir())]
    sources.append(Source(slide_id="patches", path=tmp_path, patch_ids=("1.png",)))
    found = [audit_sources(sources, mpp_override=None, workers=workers) for workers in (0, 3)]
    assert found[0] == found[1]
    facts, findings, failed = found[0]
    assert [(f.slide_id, round(f.scale.mpp, 6), f.level0_size) for f in facts] == [
        ("a", 0.25, (256, 256)), ("b", 0.25, (256, 256)), ("c", 2.5, (256, 256))
    ]  # fmt: skip
    assert list(failed) == ["text"]
    with pytest.raises(
        MppError, match=r"give mpp in the manifest, or --accept-mpp .*um/px: 1, the first is c: outside "
    ):
        require_plausible(findings, accept_mpp=False)
    require_plausible(findings, accept_mpp=True)
    require_plausible([], accept_mpp=False)
    capsys.readouterr()


def test_the_manifest_mends_a_flagged_slide(tmp_path, capsys):
    write_pyramid(tmp_path / "c.tiff", noise(256, 256), mpp=2.5, downsamples=(1,))
    source = Source(slide_id="c", path=tmp_path / "c.tiff", mpp=0.25)
    facts, findings, _ = audit_sources([source], mpp_override=None, workers=0)
    assert (facts[0].scale.mpp, facts[0].scale.source, findings) == (0.25, "manifest (header: 2.5)", [])
    capsys.readouterr()
