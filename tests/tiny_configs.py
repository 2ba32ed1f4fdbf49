"""A tiny config of every causal language model of Transformers: its default config, with fields shrunk by their names.

Fields keep whatever decides how a model attends (kinds of layers, norms, rotations, multipliers); sizes become small, windows
smaller than the texts of ``models_table.py``, and one layer of each kind stays. What a name can't tell is in ``SETTINGS``.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .tiny import VOCAB

LAYERS = 2
SIZES: dict[str, Any] = {
    # Width and heads.
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "embedding_size", "emb_dim", "embedding_dim", "lru_width"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "kv_n_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "d_kv", "d_head", "dim_head", "kv_channels", "swa_head_dim"), 8),
    **dict.fromkeys(("global_head_dim", "swa_v_head_dim", "attention_head_size", "attention_head_dim"), 8),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim"), 4),
    **dict.fromkeys(("qk_head_dim", "kv_lora_rank", "q_lora_rank", "o_lora_rank"), 8),
    **dict.fromkeys(("index_head_dim", "index_n_heads", "index_topk", "o_groups"), 4),
    # Layers; lists of them are cut besides.
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), LAYERS),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks", "depth", "conf_num_hidden_layers"), LAYERS),
    "num_layers_per_stack": 1,
    "num_nextn_predict_layers": 0,
    # The rest of a layer.
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "decoder_ffn_dim", "encoder_ffn_dim", "dff"), 48),
    **dict.fromkeys(("dim_ff", "d_ff", "d_inner", "feed_forward_size", "intermediate_size_mlp", "mlp_dim"), 48),
    **dict.fromkeys(("dense_intermediate_size", "attention_hidden_size"), 32),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 16),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 16),
    **dict.fromkeys(("shared_experts_intermediate_size", "router_hidden_size", "gated_norm_rank", "laurel_rank"), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "zero_expert_num"), 2),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k"), 1),
    **dict.fromkeys(("moe_k", "n_group", "topk_group", "num_expert_group", "num_shared_experts"), 1),
    **dict.fromkeys(("hidden_size_per_layer_input", "ple_embed_dim", "hc_lowrank", "d_rel", "rel_extent"), 8),
    # Mamba and its kin.
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("linear_num_heads", "n_mamba_heads"), 4),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim", "mamba_head_dim"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_headdim", "mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size", "time_step_rank", "mamba_dt_rank", "adapter_rank"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    # Texts and windows, and how many tokens sparse attention looks at.
    **dict.fromkeys(("index_block_size", "index_topk_blocks", "block_size"), 2),
    "index_local_blocks": 1,
    **dict.fromkeys(("vocab_size", "decoder_vocab_size", "vocab_size_per_layer_input", "audio_vocab_size"), VOCAB),
    **dict.fromkeys(("unpadded_vocab_size", "shape_vocab_size", "pronunciation_vocab_size"), VOCAB),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_source_positions"), 256),
    **dict.fromkeys(("max_target_positions", "model_max_length", "context_length"), 256),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "local_attention", "window_size"), 6),
    **dict.fromkeys(("attention_window_size", "attention_chunk_size", "keep_window_size"), 6),
    "pad_token_id": 0,
    **dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id"), 1),
    # Pictures and sound.
    **dict.fromkeys(("image_size", "crop_size"), 28),
    "patch_size": 14,
    **dict.fromkeys(("out_hidden_size", "adapter_out_dim", "projector_output_dim", "output_channels"), 32),
    **dict.fromkeys(("vision_output_dim", "num_filters", "codebook_size", "base_channels", "num_mel_bins"), 32),
    "num_position_embeddings": 16,
}  # fmt: skip
# What the names can't tell. Fields that are None by default have no name here that would shrink them.
_MAMBA = dict(mamba_expand=1)
_GEMMA4 = dict(per_layer_config={1: dict(head_dim=16)})
_QWEN4 = dict(
    indexer_n_heads=4,
    indexer_kv_heads=1,
    indexer_head_dim=8,
    indexer_budget=4,
    indexer_compress_ratio=2,
    ngram_vocab_size_base=64,
)
_BLT = dict(hidden_size=32, hidden_size_global=32)
SETTINGS: dict[str, dict[str, Any]] = {
    "bamba": dict(attn_layer_indices=[1], **_MAMBA),
    "falcon_h1": dict(mamba_d_ssm=32),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"], **_MAMBA),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "recurrent_gemma": dict(num_hidden_layers=3),
    "mamba2": dict(expand=1),
    "blt": dict(encoder_hash_byte_group_vocab=64, encoder_config=_BLT, decoder_config=_BLT),
    "cohere_compass_text": dict(rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=10000.0))),
    "dbrx": dict(attn_config=dict(clip_qkv=8.0, rope_theta=10000.0, kv_n_heads=2), ffn_config=dict(hidden_size=32)),
    "dots3_note": dict(vision_config=dict(adapter_in_dim=32), audio_config=dict(adapter_input_size=32)),
    "dots1": dict(n_shared_experts=1, n_routed_experts=2, num_experts_per_tok=1),
    "gemma4_assistant": dict(text_config=dict(hidden_size_per_layer_input=0, **_GEMMA4)),
    "gemma3n": dict(text_config=dict(num_kv_shared_layers=1)),
    "gemma3n_text": dict(num_kv_shared_layers=1),
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gemma4": dict(text_config=_GEMMA4),
    "gemma4_unified": dict(text_config=_GEMMA4),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], attention_layers=["global", "local"]),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "lfm2": dict(layer_types=["conv", "full_attention"], full_attn_idxs=None),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "ministral": dict(head_dim=8),
    "mllama": dict(text_config=dict(num_hidden_layers=3, cross_attention_layers=[1])),
    "nemotron": dict(num_key_value_heads=2),
    "reformer": dict(axial_pos_embds_dim=[8, 24], axial_pos_shape=[16, 16]),
    "zamba": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2),
    "zamba2": dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2, hybrid_layer_ids=[1, 3]),
    "qwen4_exp": dict(text_config=_QWEN4),
    "qwen4_exp_text": _QWEN4,
}
# Settings of a model type that make another kind of attention of it, or that its checkpoints have and its default has not.
_ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": dict(rope_type="linear", factor=4.0),
    "llama3": dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    ),
    "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16),
}
_ALTERNATE = ["sliding_attention", "full_attention"]
_SPARSE = ["full_attention", "minimax_m3_sparse"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere, use_qk_norm": ("cohere", dict(use_qk_norm=True)),
    "dbrx, no clip": ("dbrx", dict(attn_config=dict(clip_qkv=1e30))),
    "gemma3n_text, no shared K/V": ("gemma3n_text", dict(num_kv_shared_layers=0)),
    "gemma4_text, V = K": ("gemma4_text", dict(attention_k_eq_v=True)),
    "gemma4_text, shared K/V": (
        "gemma4_text",
        dict(
            num_hidden_layers=4,
            layer_types=_ALTERNATE * 2,
            per_layer_config={3: dict(head_dim=16)},
            num_kv_shared_layers=2,
        ),
    ),
    **{f"llama, {name}": ("llama", dict(rope_parameters=dict(rope_theta=1e4, **r))) for name, r in _ROTATIONS.items()},
    "llama, biases": ("llama", dict(attention_bias=True, mlp_bias=True)),
    "minimax_m3_vl_text, sparse": ("minimax_m3_vl_text", dict(layer_types=_SPARSE)),
    "mistral, no window": ("mistral", dict(sliding_window=None)),
    "olmo, clip_qkv": ("olmo", dict(clip_qkv=1.0)),
    "phi, qk_layernorm": ("phi", dict(qk_layernorm=True)),
    "qwen2, windows": ("qwen2", dict(use_sliding_window=True, sliding_window=6, layer_types=_ALTERNATE)),
    "smollm3, layers without RoPE": ("smollm3", dict(no_rope_layers=[1, 0])),
    "stablelm, qk_layernorm": ("stablelm", dict(qk_layernorm=True)),
}
# Fields of a config that are no sizes but follow from them, or that are of no use here.
_LEFT_OUT = {
    "model_type", "transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id", "_name_or_path",
    "output_attentions", "output_hidden_states", "return_dict", "forced_eos_token_id", "forced_bos_token_id",
    "begin_suppress_tokens", "suppress_tokens",
}  # fmt: skip


def tiny_config(name: str) -> Any:
    """A small config of a model type, or of one of :data:`VARIANTS`, with eager attention."""
    model_type, settings = VARIANTS.get(name, (name, {}))
    fields = _shrunk(CONFIG_MAPPING[model_type]().to_dict())
    _update(fields, SETTINGS.get(model_type, {}))
    _update(fields, settings)
    return CONFIG_MAPPING[model_type](**fields, attn_implementation="eager", experts_implementation="eager")


def _update(fields: dict[str, Any], settings: dict[str, Any]) -> None:
    for name, value in settings.items():
        if isinstance(value, dict) and isinstance(fields.get(name), dict):
            _update(fields[name], value)
        else:
            fields[name] = value


def _shrunk(fields: dict[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    kept = _kept_layers(fields)
    for name, value in fields.items():
        if name in _LEFT_OUT:
            continue
        if name == "per_layer_config":
            layers = {int(index): settings for index, settings in value.items()}
            value = {new: _shrunk(layers[old]) for new, old in enumerate(kept or []) if old in layers}
        elif isinstance(value, dict):
            value = {"model_type": value["model_type"], **_shrunk(value)} if "model_type" in value else value
        elif (
            isinstance(value, list)
            and kept is not None
            and len(value) == fields["num_hidden_layers"]
            and not _are_indices(value)
        ):
            value = [value[i] for i in kept]
        elif name == "is_decoder":
            value = True
        if _are_indices(value):
            # Which layers are of a kind, by their index.
            value = [new for new, old in enumerate(kept or []) if old in value]
        if name in SIZES:
            value = (
                [_at_most(v, SIZES[name]) for v in value] if isinstance(value, list) else _at_most(value, SIZES[name])
            )
        small[name] = value
    if "kv_lora_rank" in small and "num_key_value_heads" in small:
        # Latent attention has as many key heads as query heads.
        small["num_key_value_heads"] = small["num_attention_heads"]
    if kept is not None:
        small["num_hidden_layers"] = len(kept)
    return small


def _is_per_layer(value: Any, layers: int) -> bool:
    return isinstance(value, list) and len(value) == layers and not _are_indices(value)


def _are_indices(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(type(v) is int for v in value)
        and value == sorted(set(value))
    )


def _at_most(value: Any, size: int) -> Any:
    """A size, made smaller; 0 and -1 stand for "none"."""
    return min(value, size) if isinstance(value, int) and value > 0 else value


def _kept_layers(fields: dict[str, Any]) -> list[int] | None:
    """One layer of each kind, two at least, in their order; None: the config has no number of layers."""
    count = fields.get("num_hidden_layers")
    if not isinstance(count, int):
        return None
    lists = [value for value in fields.values() if _is_per_layer(value, count)]
    kinds = list(zip(*lists, strict=True)) if lists else [()] * count
    first = sorted({str(kind): index for index, kind in reversed(list(enumerate(kinds)))}.values())
    return first if len(first) >= LAYERS else [*range(min(LAYERS, count))]
