"""Networks as people bring them: built by timm, torchvision and torchxrayvision, and written as MONAI writes them."""

from __future__ import annotations

import contextlib
import io
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

LABELS = 3


def of_timm(name: str, **options) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=LABELS, **options)

    return build


def of_torchvision(name: str, **options) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import torchvision

        return getattr(torchvision.models, name)(weights=None, num_classes=LABELS, **options)

    return build


def small_vit() -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=64, patch_size=16, num_layers=3, num_heads=2, hidden_dim=64, mlp_dim=128, num_classes=LABELS
    )


def small_maxvit() -> nn.Module:
    from torchvision.models import MaxVit

    return MaxVit(
        input_size=(64, 64),
        stem_channels=16,
        partition_size=2,
        block_channels=[16, 32, 64],
        block_layers=[1, 1, 1],
        head_dim=16,
        stochastic_depth_prob=0.0,
        num_classes=LABELS,
    )


def efficient_densenet() -> nn.Module:
    """A DenseNet whose layers are recomputed in the backward pass."""
    from torchvision.models import DenseNet

    return DenseNet(16, (2, 4, 4, 2), 32, num_classes=LABELS, memory_efficient=True)


def xrv_densenet() -> nn.Module:
    import torchxrayvision

    return torchxrayvision.models.DenseNet(weights=None, num_classes=LABELS)


def xrv_resnet() -> nn.Module:
    """The class that torchxrayvision fills with its weights, without them."""
    import torchvision
    import torchxrayvision

    kind = torchxrayvision.models.ResNet
    network = kind.__new__(kind)
    nn.Module.__init__(network)
    network.weights, network.apply_sigmoid = "resnet50-res512-all", False
    network.model = torchvision.models.resnet50(weights=None, num_classes=LABELS)
    network.model.conv1 = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    return network


class _DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int):
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("norm1", nn.BatchNorm2d(channels))
        self.layers.add_module("relu1", nn.ReLU(inplace=True))
        self.layers.add_module("conv1", nn.Conv2d(channels, 4 * growth, 1, bias=False))
        self.layers.add_module("norm2", nn.BatchNorm2d(4 * growth))
        self.layers.add_module("relu2", nn.ReLU(inplace=True))
        self.layers.add_module("conv2", nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.layers(x)], 1)


def monai_densenet(growth: int = 12, blocks: tuple[int, ...] = (2, 4, 3)) -> nn.Module:
    """Features and a head of named layers; the last activation belongs to the head."""
    channels = 2 * growth
    features = nn.Sequential(
        OrderedDict(
            conv0=nn.Conv2d(1, channels, 7, stride=2, padding=3, bias=False),
            norm0=nn.BatchNorm2d(channels),
            relu0=nn.ReLU(inplace=True),
            pool0=nn.MaxPool2d(3, stride=2, padding=1),
        )
    )
    for i, count in enumerate(blocks):
        block = nn.Sequential()
        for j in range(count):
            block.add_module(f"denselayer{j + 1}", _DenseLayer(channels, growth))
            channels += growth
        features.add_module(f"denseblock{i + 1}", block)
        if i == len(blocks) - 1:
            features.add_module("norm5", nn.BatchNorm2d(channels))
            continue
        parts = OrderedDict(norm=nn.BatchNorm2d(channels), relu=nn.ReLU(inplace=True))
        parts |= {"conv": nn.Conv2d(channels, channels // 2, 1, bias=False), "pool": nn.AvgPool2d(2)}
        features.add_module(f"transition{i + 1}", nn.Sequential(parts))
        channels //= 2
    head = OrderedDict(relu=nn.ReLU(inplace=True), pool=nn.AdaptiveAvgPool2d(1))
    head |= {"flatten": nn.Flatten(1), "out": nn.Linear(channels, LABELS)}
    return nn.Sequential(OrderedDict(features=features, class_layers=nn.Sequential(head)))


class _ResidualBlock(nn.Module):
    """One activation for both convolutions, and squeeze-excite by linear layers where asked for."""

    def __init__(self, channels: int, out: int, stride: int, excited: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.act = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out))
        self.se = _Excitation(out) if excited else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.downsample(x)
        out = self.se(self.bn2(self.conv2(self.act(self.bn1(self.conv1(x))))))
        out += residual
        return self.act(out)


class _Excitation(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        layers = [nn.Linear(channels, channels // 4), nn.ReLU(inplace=True), nn.Linear(channels // 4, channels)]
        self.fc = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        b, c = x.shape[:2]
        return x * self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)


class MonaiResNet(nn.Module):
    def __init__(self, excited: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 7, stride=2, padding=3, bias=False)
        self.bn1, self.act, self.maxpool = nn.BatchNorm2d(16), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1 = nn.Sequential(_ResidualBlock(16, 16, 1, excited))
        self.layer2 = nn.Sequential(_ResidualBlock(16, 32, 2, excited), _ResidualBlock(32, 32, 1, excited))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(32, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.act(self.bn1(self.conv1(x))))
        x = self.avgpool(self.layer2(self.layer1(x)))
        x = x.view(x.size(0), -1)
        return self.fc(x)


# Name in the book, side of the image, channels, and how it is built; small variants, random weights.
ARCHITECTURES: dict[str, tuple[int, int, Callable[[], nn.Module]]] = {
    "timm ViT": (64, 3, of_timm("vit_tiny_patch16_224", img_size=64)),
    "timm DeiT": (64, 3, of_timm("deit_tiny_patch16_224", img_size=64)),
    "timm DINOv2 with registers": (28, 3, of_timm("vit_small_patch14_reg4_dinov2", img_size=28, depth=3)),
    "timm Swin": (64, 3, of_timm("swin_tiny_patch4_window7_224", img_size=64, window_size=2, embed_dim=48)),
    "timm MLP-Mixer": (64, 3, of_timm("mixer_s32_224", img_size=64)),
    "timm XCiT": (64, 3, of_timm("xcit_nano_12_p16_224", depth=3)),
    "timm ConvNeXt V2": (64, 3, of_timm("convnextv2_atto")),
    "timm MaxViT": (64, 3, of_timm("maxvit_pico_rw_256", img_size=64)),
    "timm CoAtNet": (64, 3, of_timm("coatnet_pico_rw_224", img_size=64)),
    "timm PVT v2": (64, 3, of_timm("pvt_v2_b0")),
    "timm PoolFormer": (64, 3, of_timm("poolformer_s12")),
    "timm EdgeNeXt": (64, 3, of_timm("edgenext_xx_small")),
    "timm MobileViT": (64, 3, of_timm("mobilevit_xxs")),
    "timm RegNetY": (64, 3, of_timm("regnety_002")),
    "timm MobileNetV3": (64, 3, of_timm("mobilenetv3_small_050")),
    "timm EfficientNet": (64, 3, of_timm("efficientnet_b0")),
    "timm HRNet": (64, 3, of_timm("hrnet_w18_small")),
    "timm NFNet": (64, 3, of_timm("eca_nfnet_l0")),
    "timm NF-RegNet": (64, 3, of_timm("nf_regnet_b0")),
    "timm SE-ResNet": (64, 3, of_timm("seresnet18")),
    "timm ResNeSt": (64, 3, of_timm("resnest14d")),
    "timm CSPNet": (64, 3, of_timm("cspresnet50")),
    "timm DLA": (64, 3, of_timm("dla34")),
    "torchvision ViT": (64, 3, small_vit),
    "torchvision Swin": (64, 3, of_torchvision("swin_t")),
    "torchvision VGG-11 with batch norm": (64, 3, of_torchvision("vgg11_bn")),
    "torchvision ResNeXt": (64, 3, of_torchvision("resnext50_32x4d")),
    "torchvision DenseNet, memory-efficient": (64, 3, efficient_densenet),
    "torchvision GoogLeNet": (64, 3, of_torchvision("googlenet", init_weights=False)),
    "torchvision SqueezeNet": (64, 3, of_torchvision("squeezenet1_1")),
    "torchvision ShuffleNetV2": (64, 3, of_torchvision("shufflenet_v2_x0_5")),
    "torchvision MNASNet": (64, 3, of_torchvision("mnasnet0_5")),
    "torchvision MobileNetV2": (64, 3, of_torchvision("mobilenet_v2", width_mult=0.35)),
    "torchvision MobileNetV3": (64, 3, of_torchvision("mobilenet_v3_small")),
    "torchvision RegNetX": (64, 3, of_torchvision("regnet_x_400mf")),
    "torchvision MaxViT": (64, 3, small_maxvit),
    "MONAI-style DenseNet": (64, 1, monai_densenet),
    "MONAI-style ResNet": (64, 1, MonaiResNet),
    "MONAI-style SE-ResNet": (64, 1, lambda: MonaiResNet(excited=True)),
    "torchxrayvision DenseNet": (64, 1, xrv_densenet),
    "torchxrayvision ResNet": (64, 1, xrv_resnet),
}


def architecture(name: str, seed: int = 1) -> nn.Module:
    """The network with random weights, in evaluation mode; its head's weights are large enough to tell labels apart."""
    torch.manual_seed(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        network = ARCHITECTURES[name][2]().eval()
    heads = [m for m in network.modules() if LABELS in (getattr(m, "out_features", 0), getattr(m, "out_channels", 0))]
    if heads:
        nn.init.normal_(heads[-1].weight, std=0.3)
    return network
