"""Models of sound: torchaudio, speechbrain, and those of transformers."""

from __future__ import annotations

import torch

from benchmarks.models.foreign.case import add, rows, sound, wave
from benchmarks.models.foreign.language import SMALL, D, built

CONV = {
    "conv_dim": (16, 16, 16),
    "conv_stride": (5, 2, 2),
    "conv_kernel": (10, 3, 3),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
W2V = SMALL | CONV
LENGTHS = "lengths"


def register() -> None:
    torchaudio_models()
    speechbrain_models()
    for name, cls, words in (
        ("Wav2Vec2", "Wav2Vec2ForCTC", W2V),
        (
            "Wav2Vec2",
            "Wav2Vec2ForSequenceClassification",
            W2V | {"feat_extract_norm": "layer", "do_stable_layer_norm": True},
        ),
        ("Hubert", "HubertForCTC", W2V),
        ("WavLM", "WavLMForCTC", W2V),
        ("SEW", "SEWForCTC", W2V | {"squeeze_factor": 2}),
        ("UniSpeech", "UniSpeechForCTC", W2V),
        ("Data2VecAudio", "Data2VecAudioForCTC", W2V | {"conv_pos_kernel_size": 3}),
        ("Wav2Vec2Conformer", "Wav2Vec2ConformerForCTC", W2V),
        ("UniSpeechSat", "UniSpeechSatForCTC", W2V),
    ):
        add(f"transformers/{cls}", lambda c=name, w=words, k=cls: built(c, w, k), sound, 800, 1000)
    add(
        "transformers/Whisper",
        lambda: built(
            "Whisper",
            D | {"num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 20},
            "WhisperForConditionalGeneration",
        ),
        lambda b, s: {"input_features": torch.randn(b, 16, 40), "decoder_input_ids": torch.randint(3, 90, (b, s))},
        8,
        6,
    )
    add(
        "transformers/AST",
        lambda: built(
            "AST", SMALL | {"max_length": 32, "num_mel_bins": 16, "patch_size": 8}, "ASTForAudioClassification"
        ),
        lambda b, s: {"input_values": torch.randn(b, s, 16)},
        32,
    )
    add(
        "transformers/Encodec",
        lambda: built(
            "Encodec",
            {"num_filters": 8, "hidden_size": 16, "num_lstm_layers": 1, "codebook_size": 16, "codebook_dim": 16},
            "EncodecModel",
        ),
        lambda b, s: torch.randn(b, 1, s),
        1600,
        2240,
    )
    add(
        "transformers/Dac",
        lambda: built(
            "Dac",
            {
                "encoder_hidden_size": 8,
                "decoder_hidden_size": 48,
                "downsampling_ratios": [2, 2],
                "upsampling_ratios": [2, 2],
                "n_codebooks": 2,
                "codebook_size": 16,
                "codebook_dim": 4,
            },
            "DacModel",
        ),
        lambda b, s: torch.randn(b, 1, s),
        320,
        400,
    )
    add(
        "transformers/Vits",
        lambda: built(
            "Vits",
            {
                "vocab_size": 40,
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "ffn_dim": 48,
                "flow_size": 16,
                "upsample_initial_channel": 64,
                "spectrogram_bins": 33,
                "prior_encoder_num_flows": 2,
                "posterior_encoder_num_wavenet_layers": 2,
                "prior_encoder_num_wavenet_layers": 2,
            },
            "VitsModel",
        ),
        lambda b, s: {"input_ids": torch.randint(1, 39, (b, s))},
        10,
        8,
    )
    add(
        "transformers/UnivNet",
        lambda: built(
            "UnivNet",
            {
                "model_in_channels": 8,
                "model_hidden_channels": 8,
                "num_mel_bins": 16,
                "kernel_predictor_hidden_channels": 8,
            },
            "UnivNetModel",
        ),
        lambda b, s: {"input_features": torch.randn(b, s, 16)},
        10,
        12,
    )
    add(
        "transformers/SpeechT5HifiGan",
        lambda: built("SpeechT5HifiGan", {"model_in_dim": 16, "upsample_initial_channel": 32}, "SpeechT5HifiGan"),
        lambda b, s: torch.randn(b, s, 16),
        10,
        12,
    )
    add(
        "transformers/Moonshine",
        lambda: built(
            "Moonshine",
            SMALL
            | {
                "encoder_num_hidden_layers": 2,
                "decoder_num_hidden_layers": 2,
                "encoder_num_attention_heads": 4,
                "decoder_num_attention_heads": 4,
            },
            "MoonshineForConditionalGeneration",
        ),
        lambda b, s: {"input_values": torch.randn(b, 2000), "decoder_input_ids": torch.randint(3, 90, (b, s))},
        8,
        6,
    )


def torchaudio_models() -> None:
    def audio(name, **words):
        import torchaudio.models as models

        return getattr(models, name)(**words)

    def long(batch, size):
        return torch.full((batch,), size)

    add(
        "torchaudio/Conformer",
        lambda: audio("Conformer", input_dim=32, num_heads=4, ffn_dim=64, num_layers=2, depthwise_conv_kernel_size=7),
        lambda b, s: (torch.randn(b, s, 32), long(b, s)),
        20,
        26,
    )
    add(
        "torchaudio/Emformer",
        lambda: audio(
            "Emformer", input_dim=32, num_heads=4, ffn_dim=64, num_layers=2, segment_length=4, right_context_length=1
        ),
        lambda b, s: (torch.randn(b, s, 32), long(b, s - 1)),
        13,
        17,
    )
    add(
        "torchaudio/ConvTasNet",
        lambda: audio(
            "ConvTasNet",
            num_sources=2,
            enc_kernel_size=8,
            enc_num_feats=32,
            msk_num_feats=16,
            msk_num_hidden_feats=32,
            msk_num_layers=2,
            msk_num_stacks=2,
        ),
        lambda b, s: torch.randn(b, 1, s),
        400,
        560,
    )
    add(
        "torchaudio/DeepSpeech",
        lambda: audio("DeepSpeech", n_feature=16, n_hidden=32, n_class=10),
        lambda b, s: torch.randn(b, 1, s, 16),
        12,
        15,
    )
    add(
        "torchaudio/Wav2Letter",
        lambda: audio("Wav2Letter", num_classes=10),
        lambda b, s: torch.randn(b, 1, s),
        4000,
        5000,
    )
    add(
        "torchaudio/WaveRNN",
        lambda: audio(
            "WaveRNN",
            upsample_scales=[2, 2, 3],
            n_classes=16,
            hop_length=12,
            n_res_block=2,
            n_rnn=32,
            n_fc=32,
            kernel_size=5,
            n_freq=16,
            n_hidden=16,
            n_output=16,
        ),
        lambda b, s: (torch.randn(b, 1, (s - 4) * 12), torch.randn(b, 1, 16, s)),
        9,
        11,
    )
    add(
        "torchaudio/Tacotron2",
        lambda: audio(
            "Tacotron2",
            n_mels=16,
            n_symbol=20,
            symbol_embedding_dim=32,
            encoder_embedding_dim=32,
            decoder_rnn_dim=32,
            attention_rnn_dim=32,
            attention_hidden_dim=16,
            prenet_dim=16,
            postnet_embedding_dim=32,
            attention_location_n_filter=4,
        ),
        lambda b, s: (torch.randint(0, 20, (b, s)), long(b, s), torch.randn(b, 16, 6), torch.full((b,), 6)),
        8,
        10,
    )
    add(
        "torchaudio/HDemucs", lambda: audio("hdemucs_low", sources=["a", "b"]), lambda b, s: torch.randn(b, 2, s), 16384
    )
    add(
        "torchaudio/wav2vec2",
        lambda: audio(
            "wav2vec2_model",
            extractor_mode="group_norm",
            extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2)],
            extractor_conv_bias=False,
            encoder_embed_dim=32,
            encoder_projection_dropout=0.0,
            encoder_pos_conv_kernel=16,
            encoder_pos_conv_groups=2,
            encoder_num_layers=2,
            encoder_num_heads=4,
            encoder_attention_dropout=0.0,
            encoder_ff_interm_features=48,
            encoder_ff_interm_dropout=0.0,
            encoder_dropout=0.0,
            encoder_layer_norm_first=False,
            encoder_layer_drop=0.0,
            aux_num_out=10,
        ),
        wave,
        800,
        1000,
    )
    add("torchaudio/squim_objective", lambda: audio("squim_objective_base"), wave, 2000, 3000)
    add(
        "torchaudio/RNNT predictor",
        lambda: audio("emformer_rnnt_base", num_symbols=20).predictor,
        lambda b, s: (torch.randint(0, 20, (b, s)), long(b, s)),
        6,
        8,
    )


def speechbrain_models() -> None:
    def brain(path, **words):
        import importlib

        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(f"speechbrain.{module}"), name)(**words)

    add(
        "speechbrain/ECAPA",
        lambda: brain(
            "lobes.models.ECAPA_TDNN.ECAPA_TDNN",
            input_size=20,
            channels=[32, 32, 32, 32, 96],
            attention_channels=16,
            lin_neurons=24,
        ),
        rows(20),
        30,
        40,
    )
    add(
        "speechbrain/Xvector",
        lambda: brain(
            "lobes.models.Xvector.Xvector",
            in_channels=20,
            tdnn_blocks=3,
            tdnn_channels=[32, 32, 64],
            tdnn_kernel_sizes=[5, 3, 1],
            tdnn_dilations=[1, 2, 1],
            lin_neurons=24,
        ),
        rows(20),
        30,
        40,
    )
    add(
        "speechbrain/CRDNN",
        lambda: brain(
            "lobes.models.CRDNN.CRDNN",
            input_shape=[None, None, 20],
            cnn_blocks=2,
            cnn_channels=[8, 16],
            rnn_layers=1,
            rnn_neurons=24,
            dnn_blocks=1,
            dnn_neurons=24,
        ),
        rows(20),
        32,
        40,
    )
    add(
        "speechbrain/ContextNet",
        lambda: brain(
            "lobes.models.ContextNet.ContextNet", input_shape=[None, None, 20], out_channels=24, conv_channels=[16] * 21
        ),
        rows(20),
        64,
        80,
    )
    add(
        "speechbrain/ResNet",
        lambda: brain(
            "lobes.models.ResNet.ResNet",
            input_size=20,
            channels=[8, 8, 16, 16],
            block_sizes=[1, 1, 1, 1],
            strides=[1, 2, 2, 2],
            lin_neurons=16,
        ),
        rows(20),
        32,
        40,
    )
    add(
        "speechbrain/Conformer",
        lambda: brain(
            "lobes.models.transformer.Conformer.ConformerEncoder",
            num_layers=2,
            d_ffn=48,
            nhead=4,
            d_model=32,
            kernel_size=7,
            attention_type="regularMHA",
        ),
        rows(32),
        16,
        20,
    )
    add(
        "speechbrain/Transformer",
        lambda: brain(
            "lobes.models.transformer.Transformer.TransformerEncoder", num_layers=2, d_ffn=48, nhead=4, d_model=32
        ),
        rows(32),
        16,
        20,
    )
    add(
        "speechbrain/Branchformer",
        lambda: brain(
            "lobes.models.transformer.Branchformer.BranchformerEncoder",
            num_layers=2,
            nhead=4,
            d_model=32,
            csgu_linear_units=48,
            kernel_size=7,
            attention_type="regularMHA",
        ),
        rows(32),
        16,
        20,
    )
    add(
        "speechbrain/EncoderClassifier LiGRU",
        lambda: brain("nnet.RNN.LiGRU", hidden_size=24, input_shape=[None, None, 20], num_layers=2),
        rows(20),
        10,
        12,
    )
    add(
        "speechbrain/QuasiRNN",
        lambda: brain(
            "nnet.RNN.QuasiRNN", hidden_size=24, input_shape=[None, None, 20], num_layers=1, bidirectional=False
        ),
        rows(20),
        10,
        12,
    )
    add(
        "speechbrain/Sepformer mask",
        lambda: brain(
            "lobes.models.convolution.ConvolutionFrontEnd",
            input_shape=[None, None, 20],
            num_blocks=2,
            num_layers_per_block=1,
            out_channels=[8, 16],
            kernel_sizes=[3, 3],
            strides=[2, 2],
            residuals=[False, True],
        ),
        rows(20),
        32,
        40,
    )
    add(
        "speechbrain/HifiGan",
        lambda: brain(
            "lobes.models.HifiGAN.HifiganGenerator",
            in_channels=16,
            out_channels=1,
            resblock_type="1",
            resblock_dilation_sizes=[[1, 3], [1, 3]],
            resblock_kernel_sizes=[3, 5],
            upsample_kernel_sizes=[4, 4],
            upsample_initial_channel=32,
            upsample_factors=[2, 2],
        ),
        lambda b, s: torch.randn(b, 16, s),
        12,
        16,
    )
    add(
        "speechbrain/dual path",
        lambda: brain(
            "lobes.models.conv_tasnet.MaskNet", N=16, B=16, H=24, P=3, X=2, R=2, C=2, norm_type="gLN", causal=False
        ),
        lambda b, s: torch.randn(b, 16, s),
        20,
        28,
    )
