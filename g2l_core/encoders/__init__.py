"""The pretrained models: their specs, their weights, and running them.

A name becomes an `EncoderSpec` (`resolve`, from `registry` or `spec_file`), its weights are found and renamed
to timm's layout (`weights`, `weight_layouts`), and `loading.load_encoder` gives an encoder that maps uint8
pixels to features.
"""
