"""Other libraries' weights in timm's layout: transformers' DINOv2 by hand and against transformers itself."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from g2l_core.encoder_loading import build_network, load_encoder
from g2l_core.encoders import TABLE, EncoderSpec
from g2l_core.errors import EncoderError, UnknownNameError
from g2l_core.layouts import LAYOUTS, state_dict_in_timm_layout
from g2l_core.timm_bridge import import_timm

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
    larger = {**named, "embeddings.position_embeddings": torch.zeros(1, 1370, 48)}
    with pytest.raises(EncoderError, match=r"pos_embed is \(1, 1369, 48\), expected \(1, 16, 48\)$"):
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
    with pytest.raises(UnknownNameError, match="layout 'transformers'. Did you mean transformers-dinov2"):
        state_dict_in_timm_layout({}, "transformers", {}, "x")
    assert {spec.layout for spec in TABLE.values()} == set(LAYOUTS)


@pytest.fixture
def transformers_model():
    """Makes a small random model of transformers; its import needs what timm's needs."""
    import_timm()
    transformers = pytest.importorskip("transformers", reason="transformers is no dependency of G2L")

    def make(kind: str):
        config = transformers.Dinov2WithRegistersConfig(
            hidden_size=48, num_hidden_layers=2, num_attention_heads=3, mlp_ratio=4, image_size=56, patch_size=14,
            num_register_tokens=4, use_swiglu_ffn=kind == "swiglu", layerscale_value=1.0,
        )  # fmt: skip
        model = transformers.Dinov2WithRegistersModel(config).eval()
        random = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=random))
        return model

    return make


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_a_model_that_transformers_saved_gives_its_features(transformers_model, tmp_path, kind):
    """Class, register and patch tokens of transformers' own forward pass, from the file that it writes."""
    model = transformers_model(kind)
    model.save_pretrained(tmp_path)
    assert "embeddings.mask_token" in load_file(tmp_path / "model.safetensors")
    spec = EncoderSpec(
        name="hibou-s", architecture=ARCHITECTURES[kind], arguments=SMALL, layout="transformers-dinov2",
        weights=f"file:{tmp_path / 'model.safetensors'}", input_px=56, pooling="cls", dim=48,
        mean=(0.7, 0.6, 0.7), std=(0.2, 0.2, 0.2),
    )  # fmt: skip
    with torch.inference_mode():
        wanted = model(images())
        found = build_network(spec).eval().forward_features(images())
    assert wanted.last_hidden_state.std() > 0.1
    torch.testing.assert_close(found, wanted.last_hidden_state, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[:, 0], wanted.pooler_output, rtol=1e-5, atol=1e-5)
    assert load_encoder(spec).dim == 48
