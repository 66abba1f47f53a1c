"""transformers: models of images, of images and words, and of time series."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.models.foreign.case import add, image, pixels, words
from benchmarks.models.foreign.language import SMALL, D, built

VIT = {k: SMALL[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")} | {
    "image_size": 32,
    "patch_size": 8,
}
STAGES = {"hidden_sizes": [16, 24, 32, 40], "depths": [1, 1, 1, 1]}
TEXT = SMALL | {"max_position_embeddings": 20}

PLAIN: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "ViTForImageClassification": ("ViT", VIT, (32, 32)),
    "DeiTForImageClassificationWithTeacher": ("DeiT", VIT, (32, 32)),
    "BeitForImageClassification": ("Beit", VIT | {"use_relative_position_bias": True}, (32, 32)),
    "Data2VecVisionForImageClassification": ("Data2VecVision", VIT, (32, 32)),
    "Dinov2ForImageClassification": ("Dinov2", VIT, (32, 48)),
    "Dinov2WithRegistersModel": ("Dinov2WithRegisters", VIT, (32, 32)),
    "SwinForImageClassification": (
        "Swin",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        (32, 32),
    ),
    "Swinv2ForImageClassification": (
        "Swinv2",
        {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
        (32, 32),
    ),
    "Swin2SRForImageSuperResolution": (
        "Swin2SR",
        {"image_size": 16, "embed_dim": 16, "depths": [2], "num_heads": [2], "window_size": 4, "upscale": 2},
        (16, 16),
    ),
    "ConvNextForImageClassification": ("ConvNext", STAGES, (64, 96)),
    "ConvNextV2ForImageClassification": ("ConvNextV2", STAGES, (64, 96)),
    "ResNetForImageClassification": ("ResNet", STAGES | {"embedding_size": 16}, (64, 96)),
    "RegNetForImageClassification": ("RegNet", STAGES | {"embedding_size": 16, "groups_width": 8}, (64, 96)),
    "MobileNetV1ForImageClassification": ("MobileNetV1", {"depth_multiplier": 0.25}, (64, 96)),
    "MobileNetV2ForSemanticSegmentation": ("MobileNetV2", {"depth_multiplier": 0.25}, (64, 96)),
    "MobileViTForImageClassification": (
        "MobileViT",
        {"image_size": 64, "hidden_sizes": [32, 40, 48], "neck_hidden_sizes": [8, 16, 24, 32, 40, 48, 64]},
        (64, 96),
    ),
    "MobileViTV2ForImageClassification": ("MobileViTV2", {"image_size": 64, "width_multiplier": 0.25}, (64, 96)),
    "SegformerForSemanticSegmentation": (
        "Segformer",
        STAGES | {"num_attention_heads": [1, 1, 2, 2], "hidden_sizes": [16, 16, 32, 32], "decoder_hidden_size": 32},
        (64, 96),
    ),
    "PvtForImageClassification": (
        "Pvt",
        STAGES | {"image_size": 64, "hidden_sizes": [16, 32, 32, 32], "num_attention_heads": [1, 2, 2, 4]},
        (64, 64),
    ),
    "PvtV2ForImageClassification": (
        "PvtV2",
        STAGES | {"image_size": 64, "hidden_sizes": [16, 32, 32, 32], "num_attention_heads": [1, 2, 2, 4]},
        (64, 96),
    ),
    "PoolFormerForImageClassification": ("PoolFormer", STAGES | {"hidden_sizes": [16, 24, 32, 40]}, (64, 96)),
    "LevitForImageClassification": (
        "Levit",
        {
            "image_size": 64,
            "hidden_sizes": [16, 32, 48],
            "num_attention_heads": [2, 2, 3],
            "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        (64, 64),
    ),
    "CvtForImageClassification": (
        "Cvt",
        {"embed_dim": [16, 32, 48], "num_heads": [1, 2, 3], "depth": [1, 1, 2]},
        (64, 96),
    ),
    "EfficientNetForImageClassification": (
        "EfficientNet",
        {"width_coefficient": 0.25, "depth_coefficient": 0.3, "image_size": 64, "hidden_dim": 320},
        (64, 96),
    ),
    "FocalNetForImageClassification": (
        "FocalNet",
        {
            "image_size": 32,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
        },
        (32, 48),
    ),
    "HieraForImageClassification": (
        "Hiera",
        {
            "image_size": [64, 64],
            "embed_dim": 16,
            "num_heads": [1, 2],
            "depths": [1, 2],
            "query_stride": [2, 2],
            "num_query_pool": 1,
            "masked_unit_size": [8, 8],
            "masked_unit_attention": [True, False],
        },
        (64, 64),
    ),
    "BitForImageClassification": (
        "Bit",
        STAGES | {"embedding_size": 16, "num_groups": 4, "hidden_sizes": [16, 32, 32, 32]},
        (64, 96),
    ),
    "DPTForDepthEstimation": (
        "DPT",
        VIT
        | {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [16, 16, 32, 32],
            "fusion_hidden_size": 16,
            "is_hybrid": False,
        },
        (32, 32),
    ),
    "GLPNForDepthEstimation": (
        "GLPN",
        STAGES | {"num_attention_heads": [1, 1, 2, 2], "hidden_sizes": [16, 16, 32, 32], "decoder_hidden_size": 32},
        (64, 96),
    ),
    "YolosForObjectDetection": ("Yolos", VIT | {"image_size": [32, 32], "num_detection_tokens": 5}, (32, 40)),
    "ViTMAEForPreTraining": (
        "ViTMAE",
        VIT
        | {
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 24,
        },
        (32, 32),
    ),
    "ViTMSNForImageClassification": ("ViTMSN", VIT, (32, 32)),
    "UperNetForSemanticSegmentation": ("UperNet", {}, (64, 96)),
    "SiglipVisionModel": ("SiglipVision", VIT, (32, 32)),
    "CLIPVisionModelWithProjection": ("CLIPVision", VIT, (32, 32)),
    "SuperPointForKeypointDetection": (
        "SuperPoint",
        {
            "encoder_hidden_sizes": [16, 16, 16, 16],
            "decoder_hidden_size": 32,
            "keypoint_decoder_dim": 65,
            "descriptor_decoder_dim": 32,
        },
        (64, 64),
    ),
    "VideoMAEForVideoClassification": ("VideoMAE", VIT | {"num_frames": 4}, (32, 32)),
    "TimesformerForVideoClassification": ("Timesformer", VIT | {"num_frames": 4}, (32, 32)),
    "VivitForVideoClassification": ("Vivit", VIT | {"num_frames": 4, "tubelet_size": [2, 8, 8]}, (32, 32)),
    "DetrForObjectDetection": ("Detr", {}, (64, 96)),
    "RTDetrForObjectDetection": ("RTDetr", {}, (64, 64)),
    "VitDetModel": (
        "VitDet",
        VIT
        | {
            "window_block_indices": [0],
            "use_relative_position_embeddings": True,
            "pretrain_image_size": 32,
            "window_size": 2,
        },
        (32, 32),
    ),
    "Owlv2ForObjectDetection": ("Owlv2", {}, (32, 32)),
}


def register() -> None:
    for cls, (config, words_of, sizes) in PLAIN.items():
        if words_of:
            video = "Video" in cls
            add(
                f"transformers/{cls}",
                lambda c=config, w=words_of, k=cls: built(c, w, k),
                frames if video else pixels,
                *sizes,
            )
    backbones()
    pairs()
    series()


def frames(batch: int, size: int) -> dict[str, Any]:
    return {"pixel_values": torch.randn(batch, 4, 3, size, size)}


def backbones() -> None:
    def resnet():
        from transformers import ResNetConfig

        return ResNetConfig(
            embedding_size=16,
            hidden_sizes=[16, 24, 32, 40],
            depths=[1, 1, 1, 1],
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )

    words_of = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "num_queries": 5,
    }
    add(
        "transformers/DetrForObjectDetection",
        lambda: built(
            "Detr",
            words_of | {"use_timm_backbone": False, "backbone": None, "backbone_config": resnet()},
            "DetrForObjectDetection",
        ),
        pixels,
        64,
        96,
    )
    add(
        "transformers/ConditionalDetr",
        lambda: built(
            "ConditionalDetr",
            words_of | {"use_timm_backbone": False, "backbone": None, "backbone_config": resnet()},
            "ConditionalDetrForObjectDetection",
        ),
        pixels,
        64,
        96,
    )
    add(
        "transformers/DeformableDetr",
        lambda: built(
            "DeformableDetr",
            words_of
            | {"use_timm_backbone": False, "backbone": None, "backbone_config": resnet(), "num_feature_levels": 3},
            "DeformableDetrForObjectDetection",
        ),
        pixels,
        64,
        96,
    )
    add(
        "transformers/UperNet",
        lambda: built(
            "UperNet",
            {
                "backbone_config": resnet(),
                "backbone": None,
                "hidden_size": 32,
                "auxiliary_channels": 16,
                "auxiliary_in_channels": 32,
                "pool_scales": [1, 2],
            },
            "UperNetForSemanticSegmentation",
        ),
        pixels,
        64,
        96,
    )
    add("transformers/Mask2Former backbone MaskFormer", maskformer, pixels, 64, 96)


def maskformer():
    from transformers import DetrConfig, MaskFormerConfig, MaskFormerForInstanceSegmentation, SwinConfig

    swin = SwinConfig(
        image_size=64,
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    detr = DetrConfig(
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=5,
    )
    return MaskFormerForInstanceSegmentation(
        MaskFormerConfig(fpn_feature_size=32, mask_feature_size=32, backbone_config=swin, decoder_config=detr)
    )


def pairs() -> None:
    def with_text(batch, size):
        return {
            "input_ids": words(batch, size),
            "attention_mask": torch.ones(batch, size, dtype=torch.long),
            "pixel_values": image(batch, 32),
        }

    two = {"text_config": TEXT, "vision_config": VIT, "projection_dim": 16}
    for name, words_of in (
        ("CLIP", two),
        ("Siglip", {"text_config": TEXT, "vision_config": VIT}),
        ("Blip", two | {"image_text_hidden_size": 16}),
        (
            "CLIPSeg",
            two
            | {
                "extract_layers": [0, 1],
                "reduce_dim": 8,
                "decoder_num_attention_heads": 2,
                "decoder_intermediate_size": 16,
            },
        ),
        ("ChineseCLIP", two),
        ("AltCLIP", {"text_config": TEXT | {"project_dim": 16}, "vision_config": VIT, "projection_dim": 16}),
        (
            "GroupViT",
            {
                "text_config": TEXT,
                "vision_config": VIT
                | {
                    "depths": [1, 1, 1],
                    "num_group_tokens": [4, 2, 0],
                    "num_output_groups": [4, 2, 0],
                    "hidden_size": 32,
                },
                "projection_dim": 16,
                "projection_intermediate_dim": 24,
            },
        ),
        (
            "Flava",
            {
                "text_config": SMALL,
                "image_config": VIT,
                "multimodal_config": {k: SMALL[k] for k in VIT if k in SMALL},
                "image_codebook_config": {"hidden_size": 8, "vocab_size": 32},
            },
        ),
    ):
        add(f"transformers/{name}Model", lambda n=name, w=words_of: built(n, w, f"{n}Model"), with_text, 12, 9)
    add(
        "transformers/ViltForQuestionAnswering",
        lambda: built("Vilt", SMALL | VIT | {"max_position_embeddings": 20}, "ViltForQuestionAnswering"),
        with_text,
        12,
        9,
    )
    add(
        "transformers/LlavaForConditionalGeneration",
        llava,
        lambda b, s: {"input_ids": torch.cat([torch.full((b, 16), 98), words(b, s)], 1), "pixel_values": image(b, 32)},
        12,
        9,
    )
    add(
        "transformers/TrOCR pair",
        vision_encoder_decoder,
        lambda b, s: {"pixel_values": image(b, 32), "decoder_input_ids": words(b, s)},
        8,
        6,
    )
    add(
        "transformers/Qwen2VL text",
        lambda: built(
            "Qwen2VLText",
            SMALL | {"num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
            "Qwen2VLTextModel",
        ),
        lambda b, s: {"input_ids": words(b, s)},
        12,
        9,
    )
    add(
        "transformers/Perceiver",
        lambda: built(
            "Perceiver",
            {
                "num_latents": 6,
                "d_latents": 32,
                "d_model": 24,
                "num_blocks": 1,
                "num_self_attends_per_block": 2,
                "num_self_attention_heads": 4,
                "num_cross_attention_heads": 4,
                "vocab_size": 99,
                "max_position_embeddings": 20,
            },
            "PerceiverForMaskedLM",
        ),
        lambda b, s: {"inputs": words(b, s)},
        20,
    )


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(**SMALL, num_key_value_heads=2)
    return LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**VIT),
            text_config=text,
            image_token_id=98,
            image_seq_length=16,
            vision_feature_layer=-1,
        )
    )


def vision_encoder_decoder():
    from transformers import TrOCRConfig, TrOCRForCausalLM, VisionEncoderDecoderModel, ViTConfig, ViTModel

    text = TrOCRConfig(
        **{k: v for k, v in D.items() if "encoder_" not in k},
        cross_attention_hidden_size=32,
        is_decoder=True,
        add_cross_attention=True,
    )
    return VisionEncoderDecoderModel(encoder=ViTModel(ViTConfig(**VIT)), decoder=TrOCRForCausalLM(text))


def series() -> None:
    add(
        "transformers/PatchTST",
        lambda: built(
            "PatchTST",
            {
                "num_input_channels": 3,
                "context_length": 32,
                "patch_length": 8,
                "patch_stride": 8,
                "d_model": 32,
                "num_attention_heads": 4,
                "ffn_dim": 48,
                "num_hidden_layers": 2,
                "prediction_length": 4,
            },
            "PatchTSTForPrediction",
        ),
        lambda b, s: {"past_values": torch.randn(b, s, 3)},
        32,
    )
    add(
        "transformers/PatchTSMixer",
        lambda: built(
            "PatchTSMixer",
            {
                "num_input_channels": 3,
                "context_length": 32,
                "patch_length": 8,
                "patch_stride": 8,
                "d_model": 16,
                "num_layers": 2,
                "prediction_length": 4,
            },
            "PatchTSMixerForPrediction",
        ),
        lambda b, s: {"past_values": torch.randn(b, s, 3)},
        32,
    )
    time = {
        "prediction_length": 4,
        "context_length": 12,
        "lags_sequence": [1, 2],
        "num_time_features": 1,
        "d_model": 16,
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
    }
    for name in ("TimeSeriesTransformer", "Informer", "Autoformer"):
        add(f"transformers/{name}", lambda n=name: built(n, time, f"{n}ForPrediction"), past, 14)
    add(
        "transformers/DecisionTransformer",
        lambda: built(
            "DecisionTransformer",
            {
                "state_dim": 6,
                "act_dim": 3,
                "hidden_size": 32,
                "n_layer": 2,
                "n_head": 4,
                "max_ep_len": 20,
                "n_positions": 64,
            },
            "DecisionTransformerModel",
        ),
        lambda b, s: {
            "states": torch.randn(b, s, 6),
            "actions": torch.randn(b, s, 3),
            "rewards": torch.randn(b, s, 1),
            "returns_to_go": torch.randn(b, s, 1),
            "timesteps": torch.arange(s).expand(b, s),
            "attention_mask": torch.ones(b, s),
        },
        8,
        6,
    )


def past(batch: int, size: int) -> dict[str, Any]:
    return {
        "past_values": torch.randn(batch, size),
        "past_time_features": torch.randn(batch, size, 1),
        "past_observed_mask": torch.ones(batch, size),
        "future_values": torch.randn(batch, 4),
        "future_time_features": torch.randn(batch, 4, 1),
    }
