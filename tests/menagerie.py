"""Many more architectures, each once: tiny models whose sizes are set by the names that configurations share.

What `zoo.py` holds in depth, several tasks and exact sizes, this file holds in breadth. Every configuration is asked
which of the usual names of sizes it has; what is particular to an architecture stands in its row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForAudioClassification
from zoo import (
    CLASSES,
    CLASSIFY,
    CLASSIFY_IMAGE,
    CLASSIFY_ROBERTA,
    CONTINUE,
    END,
    IGNORED,
    IMAGE_SIDE,
    MEL_BINS,
    MEL_FRAMES,
    PAD,
    ROBERTA_PAD,
    START,
    TARGET_LENGTHS,
    TRANSCRIBE,
    TRANSLATE,
    VIT,
    VOCABULARY,
    WAV2VEC2,
    Batch,
    Goal,
    Specimen,
    audio_batch,
    build_tiny,
    random_classes,
    random_words,
    seeded,
)


WIDTH, LAYERS, HEADS, INNER = 16, 4, 2, 32
# Layers of each stack, for encoder-decoders that count layers without saying which.
FROM_PAD = {"decoder_start_token_id": PAD, "num_layers": LAYERS // 2, "num_decoder_layers": LAYERS // 2}
# The usual names of sizes, by what they mean.
_NAMES = (
    (VOCABULARY, "vocab_size"),
    (WIDTH, "hidden_size d_model n_embd dim embedding_size emb_dim embed_dim word_embed_proj_dim"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers"),
    (HEADS, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    (INNER, "intermediate_size ffn_dim n_inner hidden_dim d_ff encoder_ffn_dim decoder_ffn_dim"),
    (INNER, "moe_intermediate_size shared_expert_intermediate_size"),
    (LAYERS // 2, "encoder_layers decoder_layers num_encoder_layers num_decoder_layers"),
    (1, "num_key_value_heads"),
    (WIDTH // HEADS, "head_dim d_kv"),
    (64, "max_position_embeddings n_positions n_ctx max_source_positions max_target_positions"),
    (IMAGE_SIDE, "image_size"),
    (4, "patch_size"),
    (PAD, "pad_token_id"),
    (START, "bos_token_id"),
    (END, "eos_token_id"),
)
USUAL = {name: size for size, names in _NAMES for name in names.split()}


def usual_sizes(model_type: str) -> dict[str, Any]:
    """Return the usual sizes under those names that a configuration has."""
    known = AutoConfig.for_model(model_type).to_dict()
    return {name: size for name, size in USUAL.items() if name in known}


def build_usual(model_type: str, goal: Goal, particular: Mapping[str, Any]) -> Any:
    """Build a model with the usual sizes, and with what is particular to it in their place."""
    return build_tiny(model_type, goal.auto_class, {**usual_sizes(model_type), **goal.options, **particular})


def rows(goal: Goal, *plain: str, **particular: Mapping[str, Any]) -> list[Specimen]:
    """Describe architectures that are taught one thing; keywords are those with sizes of their own."""
    return [
        Specimen(name, partial(build_usual, name, goal, own), goal.batch, layers=LAYERS, task=goal.task)
        for name, own in {**dict.fromkeys(plain, {}), **particular}.items()
    ]


def mel_batch(seed: int) -> Batch:
    """Spectrograms with time first, with a text each as label."""
    generator = seeded(seed)
    return {
        "input_features": torch.randn(len(TARGET_LENGTHS), MEL_FRAMES, MEL_BINS, generator=generator),
        "labels": random_words(TARGET_LENGTHS, padding=IGNORED, generator=generator),
    }


def spoken_batch(seed: int) -> Batch:
    """Waveforms, with a text each as label."""
    generator = seeded(seed)
    return {
        "input_values": torch.randn(len(TARGET_LENGTHS), 1200, generator=generator),
        "labels": random_words(TARGET_LENGTHS, padding=IGNORED, generator=generator),
    }


def heard_batch(seed: int, *, name: str) -> Batch:
    """Spectrograms with time first, each of one class."""
    generator = seeded(seed)
    spectrograms = torch.randn(len(TARGET_LENGTHS), MEL_FRAMES, MEL_BINS, generator=generator)
    return {name: spectrograms, "labels": random_classes(generator)}


LISTEN = Goal(AutoModelForAudioClassification, audio_batch, "audio", {"num_labels": CLASSES})
SKIPPING = {"layerdrop": 0.0, "apply_spec_augment": False}
WAVES = WAV2VEC2 | SKIPPING
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
LINEAR = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
LATENT = {
    **{"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    **{"num_key_value_heads": 2, "first_k_dense_replace": 1, "head_dim": 8},
}
STAGES = {"depths": [2, 2], "num_heads": [2, 2], "embed_dim": WIDTH, "window_size": 2, "patch_size": 2}
PICTURES = {
    "vision_config": VIT | {"hidden_size": WIDTH},
    "text_config": {"hidden_size": WIDTH, "num_hidden_layers": 1},
}
GEMMA_4 = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 0}
SPARSE = {"num_experts": 4, "encoder_sparse_step": 2, "decoder_sparse_step": 2, "expert_capacity": 64}

_ROWS = [
    *rows(
        CLASSIFY,
        *["big_bird", "convbert", "data2vec-text", "deberta", "electra", "ernie", "esm", "eurobert", "flaubert"],
        *["fnet", "ibert", "jina_embeddings_v3", "longformer", "megatron-bert", "modernbert", "mpnet"],
        *["nomic_bert", "nystromformer", "roberta-prelayernorm", "roformer", "squeezebert", "xlm"],
        **{
            "canine": {"num_hash_buckets": 64, "max_position_embeddings": 64},
            "funnel": {"block_sizes": [2, 2], "d_inner": INNER, "d_head": 8},
            "layoutlm": {"max_2d_position_embeddings": 16},
            "mobilebert": {"intra_bottleneck_size": WIDTH, "num_feedforward_networks": 1},
            "rembert": {"input_embedding_size": WIDTH, "output_embedding_size": WIDTH},
            "xlnet": {"d_inner": INNER},
            "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
        },
    ),
    *rows(CLASSIFY_ROBERTA, **dict.fromkeys(("camembert", "xlm-roberta"), {"pad_token_id": ROBERTA_PAD})),
    *rows(
        CONTINUE,
        *["biogpt", "bitnet", "bloom", "cohere", "cohere2", "ernie4_5", "exaone4", "falcon", "falcon_mamba", "gemma"],
        *["gemma2", "glm", "glm4", "gpt_bigcode", "gpt_neox", "granite", "helium", "lfm2", "mamba", "mistral", "mpt"],
        *["nemotron", "olmo", "olmo2", "openai-gpt", "persimmon", "phi", "phi3", "qwen2"],
        *["seed_oss", "smollm3", "stablelm", "starcoder2", "xglm"],
        **{
            "bamba": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
            | {"mamba_n_groups": 1, "attn_layer_indices": [1, 3]},
            "codegen": {"rotary_dim": 4, "n_head": 4},
            "ctrl": {"dff": INNER},
            "deepseek_v2": LATENT,
            "deepseek_v3": LATENT,
            "gemma3n_text": GEMMA_4
            | {"laurel_rank": 4, "activation_sparsity_pattern": [0.0] * LAYERS}
            | {"layer_types": ["sliding_attention", "full_attention"] * 2},
            "gemma4_text": GEMMA_4 | {"global_head_dim": 8},
            "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 4},
            "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
            "gptj": {"rotary_dim": 4},
            "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
            "jamba": {"attn_layer_period": 2, "expert_layer_period": 2, "num_experts": 4, "mamba_d_state": 8}
            | {"attn_layer_offset": 1, "expert_layer_offset": 1, "use_mamba_kernels": False, "mamba_dt_rank": 2},
            "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
            "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": INNER},
            "mamba2": {"num_heads": 4, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8},
            "minimax": {"num_local_experts": 4, "num_experts_per_tok": 2},
            "recurrent_gemma": {"use_cache": False},
            "rwkv": {"use_cache": False},
            "qwen2_moe": EXPERTS,
            "qwen3_5_text": LINEAR,
            "qwen3_moe": EXPERTS,
            "qwen3_next": EXPERTS | LINEAR,
        },
    ),
    *rows(
        CLASSIFY_IMAGE,
        *["beit", "data2vec-vision", "dinov2", "dinov2_with_registers", "ijepa", "vit_msn"],
        **{
            "clip": PICTURES,
            "convnext": {"hidden_sizes": [WIDTH, 2 * WIDTH], "depths": [2, 2], "num_stages": 2},
            "convnextv2": {"hidden_sizes": [WIDTH, 2 * WIDTH], "depths": [2, 2], "num_stages": 2},
            "deit": {"architectures": ["DeiTForImageClassification"]},
            "resnet": {"hidden_sizes": [WIDTH, 2 * WIDTH], "depths": [1, 1], "layer_type": "basic"},
            "siglip": PICTURES,
            "swin": STAGES,
            "swinv2": STAGES,
        },
    ),
    *rows(
        TRANSLATE,
        *["bigbird_pegasus", "blenderbot", "blenderbot-small", "m2m_100", "mbart", "mvp", "pegasus", "plbart"],
        **{
            "led": {"max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32}
            | {"attention_window": 4},
            "longt5": FROM_PAD,
            "marian": FROM_PAD | {"decoder_vocab_size": VOCABULARY},
            "mt5": FROM_PAD,
            "nllb-moe": SPARSE,
            "prophetnet": {"num_buckets": 8},
            "switch_transformers": FROM_PAD | {"num_experts": 4, "expert_capacity": 64},
            "umt5": FROM_PAD,
        },
    ),
    *rows(
        replace(TRANSCRIBE, batch=mel_batch), speech_to_text={"input_feat_per_channel": MEL_BINS, "conv_channels": 32}
    ),
    *rows(
        replace(TRANSCRIBE, batch=spoken_batch),
        moonshine={"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 2},
    ),
    *rows(
        LISTEN,
        **{
            "data2vec-audio": WAVES | {"num_conv_pos_embeddings": 2},
            "hubert": WAVES,
            "unispeech-sat": WAVES,
            "wav2vec2-conformer": WAVES,
            "wavlm": WAVES,
            "sew": WAVES,
        },
    ),
    *rows(
        replace(LISTEN, batch=partial(heard_batch, name="input_values")),
        **{
            "audio-spectrogram-transformer": {"num_mel_bins": MEL_BINS, "max_length": MEL_FRAMES}
            | {"frequency_stride": 4, "time_stride": 4}
        },
    ),
    *rows(
        replace(LISTEN, batch=partial(heard_batch, name="input_features")),
        **{
            "wav2vec2-bert": SKIPPING
            | {"feature_projection_input_dim": MEL_BINS, "use_intermediate_ffn_before_adapter": False}
        },
    ),
]
MENAGERIE: dict[str, Specimen] = {row.name: row for row in _ROWS}
