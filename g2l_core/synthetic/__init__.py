"""Draw slides and cohorts for demos and tests. They are no model of real tissue.

`cohort.draw_cohort` writes the slides, class maps and manifest of a `CohortSpec`; `tissue.draw_field` draws the tissue
of one slide.

Public names: `cohort.CohortSpec`, `cohort.draw_cohort`, `cohort.draw_slide`, `cohort.label_patches`,
`cohort.write_pyramid`.
"""

__all__ = ("cohort", "tissue")
