"""diffusers, monai, open_clip, vit_pytorch, x_transformers and others."""

from __future__ import annotations

import torch

from benchmarks.models.foreign.case import add, gray, image, rows, volume, words


def register() -> None:
    diffusers_models()
    monai_models()
    open_clip_models()
    lucidrains()


def noisy(channels: int, context: int | None = None):
    def inputs(batch, size):
        given = {"sample": torch.randn(batch, channels, size, size), "timestep": torch.tensor([3] * batch)}
        return given if context is None else given | {"encoder_hidden_states": torch.randn(batch, 5, context)}

    return inputs


def diffusers_models() -> None:
    def made(name, **words_of):
        import diffusers

        return getattr(diffusers, name)(**words_of)

    unet = {"sample_size": 16, "block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
    add(
        "diffusers/UNet2DModel",
        lambda: made(
            "UNet2DModel",
            **unet,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=8,
        ),
        noisy(3),
        16,
        24,
    )
    add(
        "diffusers/UNet2DConditionModel",
        lambda: made(
            "UNet2DConditionModel",
            **unet,
            cross_attention_dim=24,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ),
        noisy(4, 24),
        16,
        24,
    )
    add(
        "diffusers/AutoencoderKL",
        lambda: made(
            "AutoencoderKL",
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ),
        image,
        16,
        24,
    )
    add(
        "diffusers/AutoencoderTiny",
        lambda: made(
            "AutoencoderTiny",
            encoder_block_out_channels=(16, 16),
            decoder_block_out_channels=(16, 16),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        image,
        16,
        24,
    )
    add(
        "diffusers/VQModel",
        lambda: made(
            "VQModel",
            block_out_channels=(16, 32),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            num_vq_embeddings=16,
        ),
        image,
        16,
        24,
    )
    add(
        "diffusers/AutoencoderDC",
        lambda: made(
            "AutoencoderDC",
            attention_head_dim=4,
            encoder_block_out_channels=(16, 32),
            decoder_block_out_channels=(16, 32),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_block_types=("ResBlock", "EfficientViTBlock"),
            decoder_act_fns="silu",
            latent_channels=8,
            encoder_qkv_multiscales=((), (5,)),
            decoder_qkv_multiscales=((), (5,)),
            downsample_block_type="pixel_unshuffle",
            upsample_block_type="pixel_shuffle",
        ),
        image,
        16,
        24,
    )
    add(
        "diffusers/DiTTransformer2DModel",
        lambda: made(
            "DiTTransformer2DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=10,
        ),
        lambda b, s: {
            "hidden_states": torch.randn(b, 4, s, s),
            "timestep": torch.tensor([3] * b),
            "class_labels": torch.tensor([1] * b),
        },
        8,
    )
    add(
        "diffusers/PixArtTransformer2DModel",
        lambda: made(
            "PixArtTransformer2DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            cross_attention_dim=32,
            caption_channels=16,
            use_additional_conditions=False,
        ),
        lambda b, s: {
            "hidden_states": torch.randn(b, 4, s, s),
            "timestep": torch.tensor([3] * b),
            "encoder_hidden_states": torch.randn(b, 5, 16),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        8,
    )
    add(
        "diffusers/SD3Transformer2DModel",
        lambda: made(
            "SD3Transformer2DModel",
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=16,
            out_channels=4,
        ),
        lambda b, s: {
            "hidden_states": torch.randn(b, 4, s, s),
            "timestep": torch.tensor([3] * b),
            "encoder_hidden_states": torch.randn(b, 5, 16),
            "pooled_projections": torch.randn(b, 16),
        },
        8,
    )
    add(
        "diffusers/FluxTransformer2DModel",
        lambda: made(
            "FluxTransformer2DModel",
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        ),
        lambda b, s: {
            "hidden_states": torch.randn(b, s, 4),
            "encoder_hidden_states": torch.randn(b, 5, 32),
            "pooled_projections": torch.randn(b, 32),
            "timestep": torch.tensor([0.5] * b),
            "img_ids": torch.randn(s, 3),
            "txt_ids": torch.zeros(5, 3),
        },
        16,
        12,
    )
    add(
        "diffusers/Transformer2DModel",
        lambda: made(
            "Transformer2DModel",
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=16,
            norm_num_groups=4,
            cross_attention_dim=24,
        ),
        lambda b, s: {"hidden_states": torch.randn(b, 16, s, s), "encoder_hidden_states": torch.randn(b, 5, 24)},
        8,
        10,
    )
    add(
        "diffusers/ControlNetModel",
        lambda: made(
            "ControlNetModel",
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=24,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            conditioning_embedding_out_channels=(8, 16),
        ),
        lambda b, s: noisy(4, 24)(b, s) | {"controlnet_cond": torch.randn(b, 3, 2 * s, 2 * s)},
        16,
        24,
    )
    add(
        "diffusers/PriorTransformer",
        lambda: made(
            "PriorTransformer",
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            embedding_dim=16,
            num_embeddings=5,
            additional_embeddings=4,
        ),
        lambda b, _: {
            "hidden_states": torch.randn(b, 16),
            "timestep": torch.tensor([3] * b),
            "proj_embedding": torch.randn(b, 16),
            "encoder_hidden_states": torch.randn(b, 5, 16),
        },
        1,
    )
    add(
        "diffusers/UNet1DModel",
        lambda: made(
            "UNet1DModel",
            block_out_channels=(32, 32, 64),
            extra_in_channels=16,
            sample_size=64,
            in_channels=2,
            out_channels=2,
        ),
        lambda b, s: {"sample": torch.randn(b, 2, s), "timestep": torch.tensor([3] * b)},
        64,
        96,
    )
    add(
        "diffusers/UNet3DConditionModel",
        lambda: made(
            "UNet3DConditionModel",
            sample_size=16,
            block_out_channels=(16, 32),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=24,
            attention_head_dim=8,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        ),
        lambda b, s: {
            "sample": torch.randn(b, 4, 3, s, s),
            "timestep": torch.tensor([3] * b),
            "encoder_hidden_states": torch.randn(b, 5, 24),
        },
        16,
        24,
    )


def monai_models() -> None:
    def made(name, **words_of):
        import monai.networks.nets as nets

        return getattr(nets, name)(**words_of)

    two = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}
    three = {"spatial_dims": 3, "in_channels": 1, "out_channels": 2}
    for name, words_of, inputs, sizes in (
        ("UNet", three | {"channels": (8, 16, 32), "strides": (2, 2), "num_res_units": 1}, volume, (16, 24)),
        ("BasicUNet", two | {"features": (8, 8, 16, 16, 32, 8)}, gray, (32, 48)),
        (
            "DynUNet",
            two
            | {"kernel_size": [3, 3, 3], "strides": [1, 2, 2], "upsample_kernel_size": [2, 2], "filters": [8, 16, 32]},
            gray,
            (32, 48),
        ),
        (
            "DynUNet",
            two
            | {
                "kernel_size": [3, 3, 3],
                "strides": [1, 2, 2],
                "upsample_kernel_size": [2, 2],
                "filters": [8, 16, 32],
                "deep_supervision": True,
                "res_block": True,
            },
            gray,
            (32, 48),
        ),
        ("AttentionUnet", two | {"channels": (8, 16, 32), "strides": (2, 2)}, gray, (32, 48)),
        ("SegResNet", three | {"init_filters": 8, "blocks_down": (1, 1, 1), "blocks_up": (1, 1)}, volume, (16, 24)),
        ("VNet", three, volume, (16, 32)),
        ("HighResNet", two, gray, (32, 48)),
        (
            "UNETR",
            three | {"img_size": 32, "feature_size": 4, "hidden_size": 24, "mlp_dim": 32, "num_heads": 2},
            volume,
            (32, 32),
        ),
        (
            "SwinUNETR",
            three | {"feature_size": 12, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 4)},
            volume,
            (32, 32),
        ),
        (
            "ViT",
            {
                "in_channels": 1,
                "img_size": 32,
                "patch_size": 8,
                "hidden_size": 32,
                "mlp_dim": 48,
                "num_layers": 2,
                "num_heads": 4,
                "classification": True,
                "spatial_dims": 2,
            },
            gray,
            (32, 32),
        ),
        ("DenseNet121", two, gray, (64, 96)),
        ("SEResNet50", {"spatial_dims": 2, "in_channels": 1, "num_classes": 3}, gray, (64, 96)),
        ("resnet10", {"spatial_dims": 3, "n_input_channels": 1, "num_classes": 3}, volume, (32, 48)),
        ("FlexibleUNet", {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0"}, image, (64, 96)),
        (
            "EfficientNetBN",
            {"model_name": "efficientnet-b0", "spatial_dims": 2, "in_channels": 1, "num_classes": 3},
            gray,
            (64, 96),
        ),
        ("MedNeXtS", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2, "init_filters": 8}, gray, (32, 48)),
        (
            "AutoEncoder",
            {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (8, 16), "strides": (2, 2)},
            gray,
            (32, 48),
        ),
        (
            "Regressor",
            {"in_shape": (1, 32, 32), "out_shape": (2,), "channels": (8, 16), "strides": (2, 2)},
            gray,
            (32, 32),
        ),
        (
            "DiffusionModelUNet",
            two
            | {
                "channels": (8, 16),
                "attention_levels": (False, True),
                "norm_num_groups": 4,
                "num_res_blocks": 1,
                "num_head_channels": 8,
            },
            lambda b, s: (gray(b, s), torch.tensor([3] * b)),
            (16, 24),
        ),
        (
            "AutoencoderKL",
            two
            | {
                "channels": (8, 16),
                "attention_levels": (False, True),
                "norm_num_groups": 4,
                "num_res_blocks": 1,
                "latent_channels": 2,
            },
            gray,
            (16, 24),
        ),
        (
            "VQVAE",
            two
            | {
                "channels": (8, 16),
                "num_res_channels": (8, 16),
                "num_res_layers": 1,
                "num_embeddings": 16,
                "embedding_dim": 8,
            },
            gray,
            (32, 48),
        ),
        (
            "MILModel",
            {"num_classes": 3, "pretrained": False, "mil_mode": "att_trans", "backbone": "resnet18"},
            lambda b, s: torch.randn(b, 2, 3, s, s),
            (64, 96),
        ),
        ("SegResNetDS", two | {"init_filters": 8, "blocks_down": (1, 1, 1), "dsdepth": 2}, gray, (32, 48)),
        (
            "DecoderOnlyTransformer",
            {
                "num_tokens": 99,
                "max_seq_len": 16,
                "attn_layers_dim": 32,
                "attn_layers_depth": 2,
                "attn_layers_heads": 4,
            },
            words,
            (12, 9),
        ),
    ):
        label = "deep " if words_of.get("deep_supervision") else ""
        add(f"monai/{label}{name}", lambda n=name, w=words_of: made(n, **w), inputs, *sizes)


def open_clip_models() -> None:
    def clip(vision, text=None):
        import open_clip

        text = {"context_length": 12, "vocab_size": 99, "width": 32, "heads": 4, "layers": 2} | (text or {})
        return open_clip.model.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text)

    def both(batch, _):
        return (image(batch, 32), torch.cat([words(batch, 11), torch.full((batch, 1), 98)], 1))

    add(
        "open_clip/ViT",
        lambda: clip({"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2}),
        both,
        32,
    )
    add(
        "open_clip/ResNet",
        lambda: clip({"image_size": 32, "layers": (1, 1, 1, 1), "width": 8, "head_width": 16}),
        both,
        32,
    )
    add(
        "open_clip/timm",
        lambda: clip({"image_size": 32, "timm_model_name": "resnet10t", "timm_pool": "avg", "timm_proj": "linear"}),
        both,
        32,
    )
    add(
        "open_clip/ViT patch dropout, attentional pool",
        lambda: clip(
            {
                "image_size": 32,
                "patch_size": 8,
                "width": 32,
                "head_width": 8,
                "layers": 2,
                "attentional_pool": True,
                "attn_pooler_heads": 4,
                "ls_init_value": 0.1,
            }
        ),
        both,
        32,
    )
    add("open_clip/CoCa", coca, both, 32)


def coca():
    from open_clip.coca_model import CoCa

    text = {
        "context_length": 12,
        "vocab_size": 99,
        "width": 32,
        "heads": 4,
        "layers": 1,
        "embed_cls": True,
        "output_tokens": True,
    }
    vision = {
        "image_size": 32,
        "patch_size": 8,
        "width": 32,
        "head_width": 8,
        "layers": 1,
        "attentional_pool": True,
        "attn_pooler_heads": 4,
        "output_tokens": True,
    }
    return CoCa(16, {"context_length": 12, "vocab_size": 99, "width": 32, "heads": 4, "layers": 1}, text, vision)


def lucidrains() -> None:
    def made(path, **words_of):
        import importlib

        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(f"vit_pytorch.{module}"), name)(**words_of)

    plain = {"image_size": 32, "patch_size": 8, "num_classes": 5, "dim": 32, "depth": 2, "heads": 4, "mlp_dim": 48}
    for path, words_of, sizes in (
        ("vit.ViT", plain | {"dim_head": 8}, (32, 32)),
        ("simple_vit.SimpleViT", plain | {"dim_head": 8}, (32, 32)),
        ("vit_for_small_dataset.ViT", plain | {"dim_head": 8}, (32, 32)),
        ("deepvit.DeepViT", plain | {"dim_head": 8}, (32, 32)),
        ("cait.CaiT", plain | {"dim_head": 8, "cls_depth": 1}, (32, 32)),
        ("parallel_vit.ViT", plain | {"dim_head": 8}, (32, 32)),
        (
            "cct.CCT",
            {
                "img_size": 32,
                "embedding_dim": 32,
                "n_conv_layers": 1,
                "num_layers": 2,
                "num_heads": 4,
                "mlp_ratio": 2.0,
                "num_classes": 5,
                "positional_embedding": "learnable",
            },
            (32, 32),
        ),
        (
            "cvt.CvT",
            {
                "num_classes": 5,
                "s1_emb_dim": 16,
                "s2_emb_dim": 32,
                "s3_emb_dim": 48,
                "s1_depth": 1,
                "s2_depth": 1,
                "s3_depth": 1,
            },
            (64, 96),
        ),
        (
            "mobile_vit.MobileViT",
            {
                "image_size": (64, 64),
                "dims": [24, 32, 40],
                "channels": [8, 8, 16, 16, 24, 24, 32, 32, 40, 40, 64],
                "num_classes": 5,
            },
            (64, 64),
        ),
        (
            "regionvit.RegionViT",
            {"dim": (16, 24, 32, 40), "depth": (1, 1, 1, 1), "window_size": 2, "num_classes": 5},
            (64, 64),
        ),
        (
            "max_vit.MaxViT",
            {"num_classes": 5, "dim": 16, "dim_conv_stem": 8, "dim_head": 8, "depth": (1, 1), "window_size": 4},
            (64, 64),
        ),
        (
            "crossformer.CrossFormer",
            {
                "num_classes": 5,
                "dim": (16, 24, 32, 40),
                "depth": (1, 1, 1, 1),
                "global_window_size": (4, 2, 2, 1),
                "local_window_size": 2,
            },
            (64, 64),
        ),
        (
            "twins_svt.TwinsSVT",
            {
                "num_classes": 5,
                "s1_emb_dim": 16,
                "s2_emb_dim": 24,
                "s3_emb_dim": 32,
                "s4_emb_dim": 40,
                "s1_local_patch_size": 4,
                "s2_local_patch_size": 4,
                "s3_local_patch_size": 2,
                "s4_local_patch_size": 2,
                "s3_depth": 1,
            },
            (64, 64),
        ),
        (
            "nest.NesT",
            {
                "image_size": 32,
                "patch_size": 4,
                "dim": 16,
                "heads": 2,
                "num_hierarchies": 2,
                "block_repeats": (1, 1),
                "num_classes": 5,
            },
            (32, 32),
        ),
        ("xcit.XCiT", plain | {"dim_head": 8, "cls_depth": 1}, (32, 32)),
        ("rvt.RvT", plain, (32, 32)),
        (
            "t2t.T2TViT",
            {
                "image_size": 32,
                "num_classes": 5,
                "dim": 32,
                "depth": 2,
                "heads": 4,
                "mlp_dim": 48,
                "t2t_layers": ((3, 2), (3, 2)),
            },
            (32, 32),
        ),
        (
            "levit.LeViT",
            {
                "image_size": 64,
                "num_classes": 5,
                "stages": 2,
                "dim": (16, 32),
                "depth": 1,
                "heads": (2, 4),
                "mlp_mult": 2,
            },
            (64, 64),
        ),
        ("sep_vit.SepViT", {"num_classes": 5, "dim": 16, "dim_head": 8, "depth": (1, 1), "window_size": 4}, (64, 64)),
        (
            "scalable_vit.ScalableViT",
            {
                "num_classes": 5,
                "dim": 16,
                "depth": (1, 1),
                "heads": (2, 2),
                "ssa_dim_key": (8, 8),
                "ssa_dim_value": (8, 8),
                "window_size": (4, 4),
                "reduction_factor": (2, 2),
            },
            (64, 64),
        ),
        (
            "pit.PiT",
            {
                "image_size": 64,
                "patch_size": 8,
                "dim": 16,
                "num_classes": 5,
                "depth": (1, 1),
                "heads": 2,
                "mlp_dim": 32,
            },
            (64, 64),
        ),
        (
            "cross_vit.CrossViT",
            {
                "image_size": 64,
                "num_classes": 5,
                "sm_dim": 16,
                "lg_dim": 24,
                "sm_patch_size": 8,
                "lg_patch_size": 16,
                "depth": 1,
            },
            (64, 64),
        ),
    ):
        add(f"vit_pytorch/{path}", lambda p=path, w=words_of: made(p, **w), image, *sizes)
    x_transformers()


def x_transformers() -> None:
    def decoder(**words_of):
        from x_transformers import Decoder, TransformerWrapper

        return TransformerWrapper(
            num_tokens=99, max_seq_len=20, attn_layers=Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, **words_of)
        )

    add("x_transformers/Decoder", decoder, words, 12, 9)
    add(
        "x_transformers/Decoder rotary, GLU, RMSNorm",
        lambda: decoder(rotary_pos_emb=True, ff_glu=True, use_rmsnorm=True, ff_swish=True),
        words,
        12,
        9,
    )
    add(
        "x_transformers/Decoder alibi, grouped, flash",
        lambda: decoder(alibi_pos_bias=True, attn_kv_heads=2, attn_flash=True),
        words,
        12,
        9,
    )
    add("x_transformers/Encoder", continuous, rows(16), 12, 9)

    def unet():
        from denoising_diffusion_pytorch import Unet

        return Unet(dim=16, dim_mults=(1, 2), attn_dim_head=8, attn_heads=2)

    add("denoising_diffusion_pytorch/Unet", unet, lambda b, s: (image(b, s), torch.tensor([3] * b)), 16, 24)

    def efficient():
        from efficientnet_pytorch import EfficientNet

        return EfficientNet.from_name("efficientnet-b0", num_classes=5)

    add("efficientnet_pytorch/b0", efficient, image, 64, 96)


def continuous():
    from x_transformers import ContinuousTransformerWrapper, Encoder

    return ContinuousTransformerWrapper(
        dim_in=16, dim_out=8, max_seq_len=20, attn_layers=Encoder(dim=32, depth=2, heads=4, attn_dim_head=8)
    )
