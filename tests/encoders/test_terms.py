"""What licenses mean for a student."""

import pytest

from g2l_core.encoders.registry import TABLE
from g2l_core.encoders.terms import (
    COPYLEFT,
    FREE,
    NON_COMMERCIAL,
    UNKNOWN,
    Source,
    combined,
    kind_of,
    not_free,
    verdict,
)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Apache-2.0", FREE), ("apache 2.0", FREE), ("MIT", FREE), ("MIT License", FREE), ("BSD-3-Clause", FREE),
        ("CC-BY-4.0", FREE), ("CC BY 4.0", FREE), ("CC0-1.0", FREE), ("Apache-2.0 AND MIT", FREE),
        ("GPL-3.0", COPYLEFT), ("AGPL-3.0-or-later", COPYLEFT), ("CC-BY-SA-4.0", COPYLEFT),
        ("CC-BY-NC-ND-4.0", NON_COMMERCIAL), ("CC BY-NC 4.0", NON_COMMERCIAL), ("Kaiko non-commercial", NON_COMMERCIAL),
        ("noncommercial", NON_COMMERCIAL), ("research use only", NON_COMMERCIAL),
        ("MIT or CC-BY-NC-ND", NON_COMMERCIAL),
        ("unknown", UNKNOWN), ("", UNKNOWN), ("CC-BY-ND-4.0", UNKNOWN), ("Acme EULA", UNKNOWN),
        ("Apache-2.0 AND Acme EULA", UNKNOWN), ("unknown AND CC-BY-NC-4.0", NON_COMMERCIAL),
    ],
)  # fmt: skip
def test_kinds_of_terms(text, kind):
    assert kind_of(text) == kind


def test_the_table_s_terms_are_all_understood():
    assert not [(spec.name, spec.license) for spec in TABLE.values() if kind_of(spec.license) == UNKNOWN]
    assert kind_of(TABLE["uni"].license) == NON_COMMERCIAL
    assert kind_of(TABLE["h-optimus-0"].license) == FREE


def test_one_source_decides_for_all():
    apache = Source(what="the teacher h-optimus-0", license="Apache-2.0")
    uni = Source(what="the teacher uni", license="CC-BY-NC-ND-4.0")
    slides = Source(what="the slides", license="CC-BY-SA-4.0")
    said = verdict([apache, uni, slides])
    assert said == (
        "non-commercial because of the teacher uni (CC-BY-NC-ND-4.0); "
        "to be shared alike because of the slides (CC-BY-SA-4.0)"
    )
    assert verdict([apache]) == "free for any use under the terms of the teacher h-optimus-0 (Apache-2.0)"
    assert not_free([apache]) == ""
    assert not_free([apache, uni]) == "the teacher uni (CC-BY-NC-ND-4.0)"
    assert kind_of(combined([apache, uni, uni])) == NON_COMMERCIAL  # a student of this student knows it too
    assert combined([apache, uni, uni]) == "Apache-2.0 AND CC-BY-NC-ND-4.0"
