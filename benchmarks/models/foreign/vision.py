"""Models of images: torchvision beyond classification, segmentation_models_pytorch, ultralytics, pytorchcv, timm."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.models.foreign.case import add, clip, image


def register() -> None:
    torchvision_models()
    segmentation_models()
    for name in (
        "yolov8n",
        "yolov5n",
        "yolov8n-seg",
        "yolov8n-pose",
        "yolov8n-cls",
        "yolov8n-obb",
        "yolo11n",
        "yolov10n",
        "yolov9t",
        "yolo12n",
        "yolov6n",
        "yolov3-tiny",
    ):
        add(f"ultralytics/{name}", lambda n=name: ultralytics(n), image, 64, 96)
    for name in (
        "resnet10",
        "mobilenet_w4",
        "shufflenetv2_wd2",
        "densenet121",
        "igcv3_wd4",
        "menet108_8x1_g3",
        "pyramidnet110_a48_cifar10",
        "shakeshakeresnet20_2x16d_cifar10",
        "sepreresnet10",
        "condensenet74_c4_g4",
        "dpn68",
        "ror3_56_cifar10",
        "nin_cifar10",
        "squeezenet_v1_0",
        "fdmobilenet_wd4",
        "drnc26",
        "ibn_resnet50",
        "octresnet10_ad2",
        "airnet50_1x64d_r2",
        "bagnet9",
        "lednet_cityscapes",
        "fastscnn_cityscapes",
        "diaresnet20_cifar10",
        "sknet50",
        "bamresnet18",
        "cbamresnet18",
        "resattnet56",
        "msdnet22",
        "peleenet",
        "spnasnet",
        "mnasnet_b1",
        "darts",
        "xdensenet40_2_k24_bc_cifar10",
        "wrn16_10_cifar10",
        "rir_cifar10",
        "ntsnet_cub",
        "alphapose_fastseresnet101b_coco",
        "lwopenpose2d_mobilenet_cm_coco",
        "centernet_resnet18_voc",
        "bisenet_resnet18_celebamaskhq",
        "dabnet_cityscapes",
        "contextnet_cityscapes",
        "esnet_cityscapes",
        "cgnet_cityscapes",
        "enet_cityscapes",
        "erfnet_cityscapes",
        "edanet_cityscapes",
        "sinet_cityscapes",
        "espcnetv2",
    ):
        size = 32 if "cifar" in name else 96 if name == "msdnet22" else 64
        other = size if "cifar" in name or name == "msdnet22" else 96
        add(f"pytorchcv/{name}", lambda n=name: pytorchcv(n), image, size, other)
    for name in ("tf_mobilenetv3_small_minimal_100", "vit_tiny_patch16_224"):
        add(
            f"timm/features {name}",
            lambda n=name: timm_features(n),
            image,
            64 if "vit" not in name else 224,
            96 if "vit" not in name else 224,
        )


def torchvision_models() -> None:
    for name in ("fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"):
        add(
            f"torchvision/{name}", lambda n=name: torchvision(f"segmentation.{n}", weights_backbone=None), image, 64, 96
        )
    for name in (
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        "ssdlite320_mobilenet_v3_large",
        "retinanet_resnet50_fpn",
        "fcos_resnet50_fpn",
        "maskrcnn_resnet50_fpn",
        "keypointrcnn_resnet50_fpn",
    ):
        words = {"num_classes": 5} if name[0] != "k" else {}
        add(
            f"torchvision/{name}",
            lambda n=name, w=words: torchvision(f"detection.{n}", weights_backbone=None, **w),
            pictures,
            64,
            80,
        )
    for name in ("r3d_18", "r2plus1d_18", "s3d"):
        add(
            f"torchvision/{name}",
            lambda n=name: torchvision(f"video.{n}"),
            clip if name != "s3d" else longer_clip,
            64,
            80,
        )
    add("torchvision/mvit_v1_b", lambda: torchvision("video.mvit_v1_b"), lambda b, s: torch.randn(b, 3, 16, s, s), 224)
    add("torchvision/swin3d_t", lambda: torchvision("video.swin3d_t"), clip, 64, 96)
    add(
        "torchvision/raft_small",
        lambda: torchvision("optical_flow.raft_small"),
        lambda b, s: (image(b, s), image(b, s)),
        128,
        136,
    )
    for name in ("mobilenet_v2", "resnet18", "googlenet", "inception_v3", "shufflenet_v2_x0_5"):
        size = 128
        add(
            f"torchvision/quantizable {name}",
            lambda n=name: torchvision(
                f"quantization.{n}",
                quantize=False,
                **({"init_weights": True} if n in ("googlenet", "inception_v3") else {}),
            ),
            image,
            size,
            160,
        )
    add(
        "torchvision/googlenet aux",
        lambda: torchvision("googlenet", aux_logits=True, init_weights=True),
        image,
        96,
        128,
    )
    add("torchvision/feature extractor", extracted, image, 64, 96)
    add("torchvision/IntermediateLayerGetter", layers_of, image, 64, 96)


def longer_clip(batch: int, size: int) -> torch.Tensor:
    return torch.randn(batch, 3, 16, size, size)


def pictures(batch: int, size: int) -> tuple[list[torch.Tensor]]:
    return ([torch.rand(3, size, size) for _ in range(batch)],)


def torchvision(path: str, **words) -> nn.Module:
    from torchvision import models

    make = models
    for part in path.split("."):
        make = getattr(make, part)
    if path.startswith(("segmentation", "detection", "video", "optical")):
        words["weights"] = None
    model = make(**words)
    if path.startswith("detection"):
        model.transform.min_size, model.transform.max_size = (64,), 96
        if hasattr(model.transform, "fixed_size") and model.transform.fixed_size:
            model.transform.fixed_size = (128, 128)
    return model


def extracted() -> nn.Module:
    from torchvision.models import resnet18
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(resnet18(), {"layer2": "half", "layer4": "whole"})


def layers_of() -> nn.Module:
    from torchvision.models import mobilenet_v3_small
    from torchvision.models._utils import IntermediateLayerGetter

    return IntermediateLayerGetter(mobilenet_v3_small().features, {"3": "low", "12": "high"})


def segmentation_models() -> None:
    for arch in (
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "DeepLabV3",
        "DeepLabV3Plus",
        "PAN",
        "UPerNet",
        "Segformer",
    ):
        add(
            f"smp/{arch} resnet18",
            lambda a=arch: smp(a, "resnet18"),
            image,
            128 if arch == "PAN" else 64,
            160 if arch == "PAN" else 96,
        )
    for encoder in (
        "mobilenet_v2",
        "efficientnet-b0",
        "mit_b0",
        "timm-mobilenetv3_small_100",
        "densenet121",
        "vgg11_bn",
        "se_resnet50",
        "xception",
        "mobileone_s0",
        "tu-convnext_atto",
        "dpn68",
    ):
        add(f"smp/Unet {encoder}", lambda e=encoder: smp("Unet", e), image, 64, 96)
    add(
        "smp/Unet scse aux",
        lambda: smp("Unet", "resnet18", decoder_attention_type="scse", aux_params={"classes": 4}),
        image,
        64,
        96,
    )
    add("smp/DPT vit_tiny", lambda: smp("DPT", "tu-vit_tiny_patch16_224"), image, 224)


def smp(arch: str, encoder: str, **words) -> nn.Module:
    import segmentation_models_pytorch as smp

    return getattr(smp, arch)(encoder_name=encoder, encoder_weights=None, classes=3, **words)


def ultralytics(name: str) -> nn.Module:
    from ultralytics import YOLO

    return YOLO(f"{name}.yaml", verbose=False).model


def pytorchcv(name: str) -> nn.Module:
    from pytorchcv.model_provider import get_model

    words = {"in_size": (64, 64)} if "cityscapes" in name or "celeba" in name else {}
    return get_model(name, pretrained=False, **words)


def timm_features(name: str) -> nn.Module:
    import timm

    return timm.create_model(name, features_only=True)
