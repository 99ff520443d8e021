from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision
from scipy import ndimage
from torch import nn

from distssl.errors import ConfigError
from distssl.nn import backbones, sobel_filter


def images(size: int, n: int = 2) -> torch.Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_resnet_with_the_default_stem_is_torchvisions(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)()
    theirs.fc = nn.Identity()
    ours = backbones.build(name)
    ours.net.load_state_dict(theirs.state_dict(), strict=True)
    with torch.no_grad():
        assert torch.equal(ours.eval().features(images(64)), theirs.eval()(images(64)))


@pytest.mark.parametrize("name", ["resnet34", "resnet101", "wide_resnet50_2"])
def test_the_other_resnets_have_torchvisions_parameters(name):
    with torch.device("meta"):
        theirs, ours = getattr(torchvision.models, name)(), backbones.build(name)
        theirs.fc = nn.Identity()
    expected = {key: value.shape for key, value in theirs.state_dict().items()}
    assert {key: value.shape for key, value in ours.net.state_dict().items()} == expected


def test_a_resnet_starts_as_torchvisions_does():
    torch.manual_seed(0)
    ours = backbones.build("resnet34", zero_init_residual=True).net.state_dict()
    theirs = torchvision.models.resnet34(zero_init_residual=True).state_dict()
    for name, value in ours.items():
        assert value.shape == theirs[name].shape
        if value.dtype.is_floating_point:
            torch.testing.assert_close(value.mean(), theirs[name].mean(), rtol=0, atol=0.01)
            torch.testing.assert_close(value.std(), theirs[name].std(), rtol=0.1, atol=0.01)


@pytest.mark.parametrize(
    ("name", "prefix"), [("alexnet", "features."), ("vgg16", "features."), ("vgg16_bn", "features.")]
)
def test_the_plain_nets_are_torchvisions_convolutions(name, prefix):
    ours = backbones.build(name)
    with torch.device("meta"):
        theirs = (
            getattr(torchvision.models, name)(init_weights=False) if name != "alexnet" else torchvision.models.alexnet()
        )
    expected = {key: value.shape for key, value in theirs.state_dict().items() if key.startswith(prefix)}
    assert {key: value.shape for key, value in ours.net.state_dict().items()} == expected


@pytest.mark.parametrize(
    ("name", "options", "size", "features", "channels", "places"),
    [
        ("resnet10", {}, 64, 512, 512, 2),
        ("resnet10", {"stem": "3x3_s2", "width": 32}, 64, 256, 256, 4),
        ("resnet10", {"stem": "3x3_s1", "width": 16}, 32, 128, 128, 4),
        ("resnet18", {"stem": "3x3_s1"}, 32, 512, 512, 4),
        ("resnet50", {"width": 16, "zero_init_residual": True}, 64, 512, 512, 2),
        ("alexnet", {}, 64, 256, 256, 1),
        ("vgg16_bn", {}, 32, 512, 512, 1),
        ("vit_tiny_patch16_224", {"img_size": 64}, 64, 192, 192, 4),
        ("swin_tiny_patch4_window7_224", {"img_size": 64, "window_size": 2, "drop_path_rate": 0}, 64, 768, 768, 2),
        ("mobilenetv3_small_050", {}, 64, 1024, 288, 2),
    ],
)
def test_features_and_feature_map_have_their_shapes(name, options, size, features, channels, places):
    net = backbones.build(name, **options).eval()
    with torch.no_grad():
        assert net.num_features == features
        assert net(images(size)).shape == (2, features)
        assert net.feature_map(images(size)).shape == (2, channels, places, places)


@pytest.mark.parametrize(("name", "least"), [("alexnet", 63), ("vgg16", 32), ("vgg16_bn", 32)])
def test_images_too_small_for_a_plain_net_are_the_users_mistake_and_one_px_more_is_not(name, least):
    net = backbones.build(name).eval()
    with torch.no_grad():
        assert net.feature_map(images(least)).shape[2:] == (1, 1)
        with pytest.raises(ConfigError, match=f"takes images of {least} px or more, not of {least - 1}"):
            net(images(least - 1))


def test_a_transformers_feature_map_has_its_patches_in_their_places():
    net = backbones.build("vit_tiny_patch16_224", img_size=(64, 96), global_pool="avg", fc_norm=False).eval()
    x = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        feature_map = net.feature_map(x)
        assert feature_map.shape == (1, 192, 4, 6)
        tokens = net.net.forward_features(x)
        torch.testing.assert_close(feature_map[0, :, 2, 5], tokens[0, 1 + 2 * 6 + 5])
        torch.testing.assert_close(feature_map.mean((2, 3)), net.features(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet81", {}, "model.backbone=resnet81 is unknown; nearest: .*resnet18"),
        ("hf-hub:timm/resnet18.a1_in1k", {}, "is unknown"),
        ("resnet18", {"stem": "4x4"}, "model.stem=4x4 is unknown: use 7x7_s2_pool, 3x3_s2, 3x3_s1"),
        ("vgg16", {"stem": "3x3_s1"}, "model.stem=3x3_s1 needs one of resnet8, .*; vgg16 has only its own stem"),
        ("vit_tiny_patch16_224", {"stem": "3x3_s2"}, "has only its own stem"),
        (
            "resnet18",
            {"depth": 3},
            "model.options.depth is not an option of resnet18: it has width, zero_init_residual",
        ),
        ("resnet81", {"stem": "3x3_s2"}, "model.backbone=resnet81 is unknown; nearest: .*resnet18"),
        ("resnet18", {"width": 0}, "model.options.width=0: a whole number of at least 1 is right"),
        ("resnet18", {"width": "abc"}, "model.options.width='abc': a whole number of at least 1 is right"),
        ("alexnet", {"width": 3}, "model.options.width is not an option of alexnet"),
        ("vit_tiny_patch16_224", {"foo": 3}, "vit_tiny_patch16_224 does not take these options: .*foo"),
    ],
)
def test_what_cannot_be_built_is_the_users_mistake_in_one_line(name, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        backbones.build(name, **options)
    assert "\n" not in str(caught.value)


def test_importing_the_package_imports_neither_timm_nor_torchvision():
    code = (
        "import sys, distssl.nn.backbones, distssl.nn.optim, distssl.nn.norm, distssl.nn.losses; "
        "print([name for name in ('timm', 'torchvision', 'ray', 'nvidia.dali') if name in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


@pytest.mark.parametrize(
    ("name", "conv"),
    [("resnet18", "conv1"), ("alexnet", "features.0"), ("vgg16", "features.0"), ("vgg16_bn", "features.0")],
)
def test_a_sobel_filter_stands_before_the_network_and_changes_no_name(name: str, conv: str) -> None:
    plain, edges = backbones.build(name), backbones.build(name, sobel=True)
    assert plain.state_dict().keys() == edges.state_dict().keys()
    assert edges.state_dict()[f"net.{conv}.weight"].shape[1] == 2
    assert edges(images(64)).shape == plain(images(64)).shape
    different = [key for key, value in plain.state_dict().items() if value.shape != edges.state_dict()[key].shape]
    assert different == [f"net.{conv}.weight"]


def test_the_sobel_filter_is_scipys() -> None:
    x = images(20).double()
    ours = sobel_filter.Sobel().double()(x)
    grey = x.numpy().mean(1)
    for image, edges in zip(grey, ours.numpy(), strict=True):
        for axis, edge in zip((1, 0), edges, strict=True):
            # scipy convolves, which turns the kernel; torch correlates, with zeros beyond the border.
            np.testing.assert_allclose(edge, -ndimage.sobel(image, axis, mode="constant"), atol=1e-12)


def test_a_sobel_filter_before_timms_networks_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"model\.sobel=true needs one of resnet8, .*vgg16_bn; convnext_atto is timm's"
    ):
        backbones.build("convnext_atto", sobel=True)


@pytest.mark.parametrize(
    ("name", "options", "size_px", "shapes"),
    [
        ("resnet10", {"width": 8}, 64, [(8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]),
        ("alexnet", {}, 224, [(256, 6, 6)]),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, 32, [(192, 2, 2)]),
    ],
)
def test_the_shapes_of_maps_are_found_without_a_trace(name, options, size_px, shapes):
    backbone = backbones.build(name, **options)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    assert backbone.use_maps(size_px) == shapes
    assert all(module.training for module in backbone.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize("name", ["convnext_atto", "resnet10"])
def test_where_maps_are_used_every_parameter_that_learns_gets_a_gradient(name):
    backbone = backbones.build(name)
    backbone.net.get_submodule("stem" if name == "convnext_atto" else "conv1").requires_grad_(False)
    learning = {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    backbone.use_maps(64)
    torch.stack([x.sum() for x in backbone.pyramid(images(64))]).sum().backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None)
        assert parameter.requires_grad == (key in learning and "head.norm" not in key)


@pytest.mark.parametrize("option", ["drop_path_rate", "drop_rate", "patch_drop_rate", "attn_drop_rate"])
def test_a_network_that_drops_at_random_is_refused(option):
    with pytest.raises(ConfigError, match=f"model.options=.*{option}.*drop_path_rate: 0 is right"):
        backbones.build("vit_tiny_patch16_224", img_size=32, depth=2, **{option: 0.1})
