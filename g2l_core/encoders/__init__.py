"""Pretrained encoders: their specs, their weights, and running them.

A name becomes an `EncoderSpec` (`resolve`, from `registry` or `spec_file`). `architectures` builds its network,
`weights` finds its weights and `weight_layouts` renames them to timm's layout. `loading.load_encoder` does all of it
and gives an encoder that turns uint8 pixels into features (`patch_encoder`). `student_folder` writes a distilled
student as a folder that is an encoder again, and `student_export` converts it for other programs.

Public names: `spec.EncoderSpec`, `spec.WeightsSource`, `registry.TABLE`, `resolve.resolve_encoder`,
`resolve.run_encoder`, `loading.load_encoder`, `loading.LoadedEncoder`, `loading.encode`, `patch_encoder.PatchEncoder`,
`student_folder.write_student`, `student_export.export_student`.
"""

__all__ = (
    "architectures", "loading", "patch_encoder", "registry", "resolve", "spec", "spec_file", "student_export",
    "student_folder", "tables", "timm_compat", "weight_layouts", "weights",
)  # fmt: skip
