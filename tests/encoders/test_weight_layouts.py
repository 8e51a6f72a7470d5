"""Other libraries' weights in timm's layout: by hand, against transformers and timm's own reading; and back."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from g2l_core.encoders.architectures import build_architecture
from g2l_core.encoders.loading import build_network, load_encoder
from g2l_core.encoders.resolve import TABLE, EncoderSpec
from g2l_core.encoders.timm_compat import import_timm
from g2l_core.encoders.weight_layouts import LAYOUTS, state_dict_in_timm_layout, state_dict_in_transformers_layout
from g2l_core.errors import EncoderError, UnknownNameError

SMALL = {"img_size": 56, "depth": 2, "embed_dim": 48, "num_heads": 3}
ARCHITECTURES = {"mlp": "vit_small_patch14_reg4_dinov2", "swiglu": "vit_giant_patch14_reg4_dinov2"}


def network_of(kind: str = "mlp") -> nn.Module:
    """A small network of Hibou-L's make (mlp) or of ViT-g's (swiglu), all of its tensors random."""
    network = import_timm().create_model(ARCHITECTURES[kind], num_classes=0, **SMALL).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=random))
    return network


def in_transformers_names(state: dict[str, Tensor], kind: str = "mlp") -> dict[str, Tensor]:
    """A timm state dict under transformers' names: the class token's position apart, q, k and v apart."""
    first = torch.full_like(state["cls_token"], 0.25)
    named = {
        "embeddings.cls_token": state["cls_token"] - first,
        "embeddings.mask_token": torch.ones(1, 48),
        "embeddings.register_tokens": state["reg_token"],
        "embeddings.position_embeddings": torch.cat([first, state["pos_embed"]], dim=1),
        "embeddings.patch_embeddings.projection.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": state["patch_embed.proj.bias"],
        "layernorm.weight": state["norm.weight"],
        "layernorm.bias": state["norm.bias"],
    }
    up, down = {"mlp": ("fc1", "fc2"), "swiglu": ("weights_in", "weights_out")}[kind]
    for i in range(2):
        here, there = f"blocks.{i}", f"encoder.layer.{i}"
        for part in ("weight", "bias"):
            query, key, value = state[f"{here}.attn.qkv.{part}"].split(48)
            named[f"{there}.attention.attention.query.{part}"] = query
            named[f"{there}.attention.attention.key.{part}"] = key
            named[f"{there}.attention.attention.value.{part}"] = value
            named[f"{there}.attention.output.dense.{part}"] = state[f"{here}.attn.proj.{part}"]
            named[f"{there}.mlp.{up}.{part}"] = state[f"{here}.mlp.fc1.{part}"]
            named[f"{there}.mlp.{down}.{part}"] = state[f"{here}.mlp.fc2.{part}"]
            for norm in ("norm1", "norm2"):
                named[f"{there}.{norm}.{part}"] = state[f"{here}.{norm}.{part}"]
        for scale in (1, 2):
            named[f"{there}.layer_scale{scale}.lambda1"] = state[f"{here}.ls{scale}.gamma"]
    return named


def images() -> Tensor:
    return torch.randn(3, 3, 56, 56, generator=torch.Generator().manual_seed(1))


def assert_equal_states(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-6 if key == "cls_token" else 0)


@pytest.mark.parametrize("prefix", ["", "dinov2.", "model.", "backbone."])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_transformers_names_and_back(kind, prefix):
    network = network_of(kind)
    named = {prefix + key: tensor for key, tensor in in_transformers_names(network.state_dict(), kind).items()}
    found = state_dict_in_timm_layout(named, "transformers-dinov2", network.state_dict(), "x")
    assert_equal_states(found, network.state_dict())
    copy = network_of(kind)
    nn.init.zeros_(copy.cls_token)
    copy.load_state_dict(found, strict=True)
    with torch.inference_mode():
        torch.testing.assert_close(copy(images()), network(images()))


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("layernorm.bias", "norm.bias is missing$"),
        ("embeddings.register_tokens", "reg_token is missing$"),
        ("encoder.layer.1.layer_scale2.lambda1", "blocks.1.ls2.gamma is missing$"),
        (
            "encoder.layer.0.attention.attention.key.weight",
            "blocks.0.attn.qkv.weight is missing; .*attn.query.weight has no place; .*attn.value.weight has no place$",
        ),
    ],
)
def test_missing_tensors_of_transformers_are_named(key, message):
    wanted = network_of().state_dict()
    named = in_transformers_names(wanted)
    del named[key]
    with pytest.raises(EncoderError, match="^hibou: the weights do not fit the architecture: " + message):
        state_dict_in_timm_layout(named, "transformers-dinov2", wanted, "hibou")


def test_surplus_and_misshaped_tensors_of_transformers_are_named():
    wanted = network_of().state_dict()
    named = in_transformers_names(wanted)
    deeper = {**named, "encoder.layer.2.norm1.weight": torch.zeros(48)}
    with pytest.raises(EncoderError, match="blocks.2.norm1.weight has no place$"):
        state_dict_in_timm_layout(deeper, "transformers-dinov2", wanted, "x")
    for shape in ((1, 1370, 47), (1, 2000, 48)):
        larger = {**named, "embeddings.position_embeddings": torch.zeros(shape)}
        with pytest.raises(EncoderError, match=rf"pos_embed is \(1, {shape[1]}, {shape[2]}\), expected \(1, 16, 48\)$"):
            state_dict_in_timm_layout(larger, "transformers-dinov2", wanted, "x")


def test_in_order_takes_positions_and_leaves_a_classifier_over():
    wanted = network_of().state_dict()
    renamed = {f"layer{i}": tensor for i, tensor in enumerate(wanted.values())}
    assert_equal_states(state_dict_in_timm_layout(renamed, "in-order", wanted, "x"), wanted)
    head = {"_fc.weight": torch.zeros(9, 48), "_fc.bias": torch.zeros(9)}
    assert_equal_states(state_dict_in_timm_layout(renamed | head, "in-order", wanted, "x"), wanted)
    with pytest.raises(EncoderError, match="layer99 has no place"):
        state_dict_in_timm_layout(renamed | {"layer99": torch.zeros(1)}, "in-order", wanted, "x")
    with pytest.raises(EncoderError, match=r"norm.bias is missing$"):
        state_dict_in_timm_layout(dict(list(renamed.items())[:-1]), "in-order", wanted, "x")
    values = list(renamed.items())
    with pytest.raises(EncoderError, match="cls_token is .*expected"):
        state_dict_in_timm_layout(dict([values[2], values[1], values[0], *values[3:]]), "in-order", wanted, "x")


def test_unknown_layout():
    with pytest.raises(UnknownNameError, match="layout 'transformers'. Did you mean transformers-"):
        state_dict_in_timm_layout({}, "transformers", {}, "x")
    assert {spec.layout for spec in TABLE.values()} < set(LAYOUTS)


# ---- the original DINOv2 and Swin, against timm's own reading of them ------------------------------------------


def in_dinov2_names(state: dict[str, Tensor], prefix: str, chunk: int) -> dict[str, Tensor]:
    """A timm state dict under the names of facebookresearch/dinov2, its blocks in chunks as its training saves them."""
    first = torch.full_like(state["cls_token"], 0.25)
    named = {"cls_token": state["cls_token"] - first, "mask_token": torch.ones(1, 48)}
    named["register_tokens"] = state["reg_token"]
    named["pos_embed"] = torch.cat([first, state["pos_embed"]], dim=1)
    for key in [k for k in state if k not in {"cls_token", "reg_token", "pos_embed"}]:
        renamed = key.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        if chunk:
            renamed = re.sub(r"^blocks\.(\d+)", lambda m: f"blocks.{int(m[1]) // chunk}.{m[1]}", renamed)
        named[renamed] = state[key]
    return {prefix + key: tensor for key, tensor in named.items()}


@pytest.mark.parametrize(("prefix", "chunk"), [("", 0), ("backbone.", 1), ("module.backbone.", 2)])
def test_the_original_dinov2(prefix, chunk):
    network = network_of("swiglu")
    wanted = network.state_dict()
    named = in_dinov2_names(wanted, prefix, chunk)
    heads = {"dino_head.mlp.0.weight": torch.zeros(3, 48), "ibot_head.mlp.0.weight": torch.zeros(3, 48)}
    found = state_dict_in_timm_layout(named | heads, "auto", wanted, "x")
    assert_equal_states(found, wanted)
    if not prefix and not chunk:
        timms = import_timm().models.vision_transformer.checkpoint_filter_fn(dict(named), network)
        assert_equal_states(found, timms)


def test_the_training_wrapper_of_dinov2(tmp_path):
    network = network_of("swiglu")
    torch.save({"teacher": in_dinov2_names(network.state_dict(), "backbone.", 1)}, tmp_path / "teacher.pth")
    spec = EncoderSpec(
        name="gpfm-s", architecture=ARCHITECTURES["swiglu"], arguments=SMALL, input_px=56, pooling="cls",
        weights=f"file:{tmp_path / 'teacher.pth'}", mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    )  # fmt: skip
    assert_equal_states(build_network(spec).state_dict(), network.state_dict())


def test_the_original_swin_with_ctranspaths_stem():
    """Its patch merging stands at a stage's end: layers.0 to 2; timm's at the next one's beginning."""
    spec = TABLE["ctranspath"]
    network = build_architecture(spec.architecture, spec.arguments, 0)
    wanted = network.state_dict()
    named = {
        re.sub(r"^layers\.(\d)\.down", lambda m: f"layers.{int(m[1]) - 1}.down", key): tensor
        for key, tensor in wanted.items()
    }
    named["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    named["head.weight"] = torch.zeros(5, 768)
    assert "layers.0.downsample.reduction.weight" in named
    assert_equal_states(state_dict_in_timm_layout(named, "auto", wanted, "x"), wanted)
    assert_equal_states(state_dict_in_timm_layout(wanted, "auto", wanted, "x"), wanted)
    with torch.inference_mode():
        assert network.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 768)
    del named["layers.1.downsample.norm.bias"]
    with pytest.raises(EncoderError, match=r"x: .*layers.2.downsample.norm.bias is missing$"):
        state_dict_in_timm_layout(named, "auto", wanted, "x")


# ---- transformers itself --------------------------------------------------------------------------------------

SIZES = {
    "tiny": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3},
    "base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "large": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}


def transformers_model(kind: str, size: str = "tiny", image_px: int = 56, token_px: int = 14, spread: float = 0.2):
    """A random model of transformers; its import needs what timm's needs."""
    import_timm()
    transformers = pytest.importorskip("transformers", reason="transformers is no dependency of G2L")
    shape = {**SIZES[size], "image_size": image_px, "patch_size": token_px}
    match kind:
        case "vit":
            config = transformers.ViTConfig(**shape, intermediate_size=4 * shape["hidden_size"])
            model = transformers.ViTModel(config, add_pooling_layer=False)
        case "plain" | "plain-swiglu":
            config = transformers.Dinov2Config(
                **shape, mlp_ratio=4, use_swiglu_ffn=kind == "plain-swiglu", layerscale_value=1.0
            )
            model = transformers.Dinov2Model(config)
        case _:
            config = transformers.Dinov2WithRegistersConfig(
                **shape, mlp_ratio=4, num_register_tokens=4, use_swiglu_ffn=kind == "swiglu", layerscale_value=1.0
            )
            model = transformers.Dinov2WithRegistersModel(config)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters() if spread else ():
            parameter.add_(spread * torch.randn(parameter.shape, generator=random))
    return model.eval()


NETWORKS = {
    **ARCHITECTURES,
    "plain": "vit_small_patch14_dinov2",
    "plain-swiglu": "vit_giant_patch14_dinov2",
    "vit": "vit_small_patch16_224",
}


def spec_of(kind: str, path: Path, image_px: int = 56, **changes: object) -> EncoderSpec:
    arguments = {**SMALL, "img_size": image_px}
    if kind == "vit":
        arguments |= {"patch_size": 14, "norm_layer": "LayerNorm(1e-12)"}
    fields = {
        "name": "x", "architecture": NETWORKS[kind], "arguments": arguments, "weights": f"file:{path}",
        "input_px": image_px, "pooling": "cls", "mean": (0.7, 0.6, 0.7), "std": (0.2, 0.2, 0.2),
    }  # fmt: skip
    return EncoderSpec(**{**fields, **changes})


def assert_equal_tokens(model: nn.Module, spec: EncoderSpec, pixels: Tensor, **how: bool) -> None:
    with torch.inference_mode():
        wanted = model(pixels, **how)
        found = build_network(spec).eval().forward_features(pixels)
    assert wanted.last_hidden_state.std() > 0.1
    torch.testing.assert_close(found, wanted.last_hidden_state, rtol=1e-5, atol=1e-5)
    if wanted.pooler_output is not None:
        torch.testing.assert_close(found[:, 0], wanted.pooler_output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["auto", "declared"])
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_model_that_transformers_saved_gives_its_features(tmp_path, kind, layout):
    """Class, register and patch tokens of transformers' own forward pass, from the file that it writes."""
    model = transformers_model(kind)
    model.save_pretrained(tmp_path)
    declared = "transformers-vit" if kind == "vit" else "transformers-dinov2"
    spec = spec_of(kind, tmp_path / "model.safetensors", layout=declared if layout == "declared" else "auto")
    assert ("embeddings.mask_token" in load_file(tmp_path / "model.safetensors")) == (kind != "vit")
    assert_equal_tokens(model, spec, images())
    assert load_encoder(spec).dim == 48


@pytest.mark.parametrize("kind", NETWORKS)
def test_position_embeddings_of_another_grid_are_resampled_as_transformers_does(tmp_path, kind):
    """Weights of 84 px in a network of 56 px; it shrinks, so antialiasing shows."""
    model = transformers_model(kind, image_px=84)
    model.save_pretrained(tmp_path)
    how = {"interpolate_pos_encoding": True} if kind == "vit" else {}
    assert_equal_tokens(model, spec_of(kind, tmp_path / "model.safetensors"), images(), **how)


def test_position_embeddings_of_another_grid_are_resampled_as_timm_does(tmp_path):
    arguments = {**SMALL, "img_size": 84, "dynamic_img_size": True}
    network = import_timm().create_model(ARCHITECTURES["mlp"], num_classes=0, **arguments).eval()
    torch.save(network.state_dict(), tmp_path / "w.pt")
    small = build_network(spec_of("mlp", tmp_path / "w.pt")).eval()
    with torch.inference_mode():
        torch.testing.assert_close(small.forward_features(images()), network.forward_features(images()))


def test_position_embeddings_are_resampled_as_the_original_dinov2_does():
    """Without registers it scales by (side + 0.1) / old side, and does not antialias."""
    wanted = import_timm().create_model("vit_small_patch14_dinov2", num_classes=0, **SMALL).state_dict()
    positions = torch.randn(1, 37, 48, generator=torch.Generator().manual_seed(0))
    named = {**wanted, "mask_token": torch.zeros(1, 48), "pos_embed": positions}
    found = state_dict_in_timm_layout(named, "auto", wanted, "x")["pos_embed"]
    grid = positions[:, 1:].reshape(6, 6, 48).double().numpy()
    assert torch.equal(found[:, :1], positions[:, :1])
    np.testing.assert_allclose(found[0, 1:].reshape(4, 4, 48), cubic_at(grid, 4, (4 + 0.1) / 6), atol=1e-5)


def cubic_at(grid: np.ndarray, side: int, scale: float) -> np.ndarray:
    """Cubic convolution (Keys 1981, a = -0.75) of a (rows, columns, dim) grid at pixel centers, borders repeated."""

    def weights(fraction: float) -> np.ndarray:
        d = np.abs(np.array([1 + fraction, fraction, 1 - fraction, 2 - fraction]))
        near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
        return np.where(d <= 1, near, far)

    def along(values: np.ndarray) -> np.ndarray:
        rows = []
        for i in range(side):
            at = (i + 0.5) / scale - 0.5
            first = int(np.floor(at)) - 1
            taken = values[np.clip(np.arange(first, first + 4), 0, len(values) - 1)]
            rows.append(np.tensordot(weights(at - np.floor(at)), taken, axes=1))
        return np.stack(rows)

    return along(along(grid).swapaxes(0, 1)).swapaxes(0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "large"])
def test_hibou_at_its_true_size(tmp_path, size):
    """Dinov2WithRegisters of Hibou-B's and Hibou-L's shape with random weights: tokens equal to 1e-5."""
    model = transformers_model("mlp", size, image_px=224, spread=0.0)
    with torch.no_grad():  # what starts as zeros and ones must not hide behind them
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "embeddings" in name:
                parameter.add_(0.1 * torch.linspace(-1, 1, parameter.numel()).view(parameter.shape))
    model.save_pretrained(tmp_path)
    spec = TABLE[f"hibou-{size[0]}"]
    with torch.device("meta"):
        network = build_architecture(spec.architecture, spec.arguments, 0)
    tensors = load_file(tmp_path / "model.safetensors")
    state = state_dict_in_timm_layout(tensors, spec.layout, network.state_dict(), spec.name)
    network.load_state_dict(state, strict=True, assign=True)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted, found = model(pixels).last_hidden_state, network.eval().forward_features(pixels)
    assert wanted.std() > 0.1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# ---- and back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_back_in_transformers_layout(tmp_path, kind):
    """Transformers itself loads it, strictly, and gives the same tokens; read back, every tensor has the same bits."""
    network = network_of(kind)
    state = network.state_dict()
    named = state_dict_in_transformers_layout(state)
    back = state_dict_in_timm_layout(named, "auto", state, "x")
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    untrained = transformers_model(kind)
    untrained.config.save_pretrained(tmp_path)
    save_file(named, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, report = type(untrained).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        found, wanted = model(images()).last_hidden_state, network.forward_features(images())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_what_transformers_has_no_place_for():
    plain = import_timm().create_model("vit_small_patch14_dinov2", num_classes=0, **SMALL).state_dict()
    with pytest.raises(EncoderError, match="DINOv2 with registers; this network has no reg_token"):
        state_dict_in_transformers_layout(plain)
    with pytest.raises(EncoderError, match="has no place for fc_norm.weight"):
        state_dict_in_transformers_layout({**network_of().state_dict(), "fc_norm.weight": torch.zeros(48)})
