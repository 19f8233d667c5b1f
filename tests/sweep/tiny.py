"""Shrinks a default configuration until the model is small enough to sweep.

The recipe is generic: it looks only at field names, and every config of Transformers passes through
it. What it cannot know (a consistency rule between two fields of one architecture) stands in
`OVERRIDES`, keyed by model type.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from transformers import PreTrainedConfig

HIDDEN = 64
HEADS = 4
KV_HEADS = 2
HEAD_DIM = HIDDEN // HEADS
LAYERS = 2
MAX_LAYERS = 4
FFN = 96
VOCAB = 160
POSITIONS = 64
WINDOW = 6
EXPERTS = 4
# At the usual 0.02 narrow layers have scores near zero: any attention would be nearly a mean.
INITIAL_DEVIATION = 0.1
IMAGE = 32
PATCH = 8
MEL_BINS = 16

# Ordinary tokens are drawn from below this id; the special tokens of a config lie above it.
FIRST_SPECIAL_TOKEN = 100
PAD, BOS, EOS = 0, 1, 2
FIRST_ORDINARY_TOKEN = 5

# The first pattern that matches a whole field name decides. Applied to positive integers.
INT_RULES: tuple[tuple[str, int], ...] = (
    (r"pad_token_id", PAD),
    (r"bos_token_id|decoder_start_token_id", BOS),
    (r"eos_token_id", EOS),
    # Experts.
    (r"num_(experts|local_experts|routed_experts)|n_routed_experts|moe_num_experts", EXPERTS),
    (r"num_experts_per_tok(en)?|moe_(k|topk|top_k)|top_k_experts|experts_top_k", 2),
    (r"(n|num)_groups?|topk_group|num_expert_groups?|n_shared_experts", 1),
    (r"first_k_dense_replace", 1),
    (r"(expert|moe|shared).*(intermediate|ffn|hidden)(_hidden)?_(size|dim)", HIDDEN),
    # Heads.
    (r"(kv|q|o)_lora_rank|gate_low_rank_dim", 16),
    (r"qk_rope_head_dim|rotary_dim", HEAD_DIM // 2),
    (r"index_head_dim", HEAD_DIM),
    (r"index_n_heads", 2),
    (r"index_topk", 8),
    (r"((qk_nope|v|swa|global|local|attention)_)?head_(dim|size)", HEAD_DIM),
    (r"d_kv|d_head|kv_channels|dim_head|attention_head_size|resampler_head_dim", HEAD_DIM),
    (r"(\w+_)?num_(key_value_heads|kv_heads)|num_key_value_attention_heads", KV_HEADS),
    (r"linear_num_((key|value)_)?heads", 2),
    (r"linear_((key|value)_)?head_dim", HEAD_DIM),
    (r"((encoder|decoder|swa|text)_)?(num_)?((self_)?attention_heads|heads)", HEADS),
    (r"n_heads?|num_(encoder|decoder|self|cross)_attention_heads|resampler_n_heads", HEADS),
    (r"(decoder|encoder)_num_(attention_)?heads", HEADS),
    # Depth.
    (r"num_hidden_groups", 1),
    (r"num_((hidden|encoder|decoder|attention)_)?layers|n_layers?|layers|depth", LAYERS),
    (r"(\w+_)?(encoder|decoder)_(num_hidden_)?layers|[lxr]_layers|resampler_depth", LAYERS),
    # Width.
    (r"(\w+_)?intermediate_size|(\w+_)?(ffn|mlp|feedforward)_(dim|hidden_size)", FFN),
    (r"d_ff|dff|d_inner|dim_ff|dim_feedforward|n_inner|feed_forward_size", FFN),
    (r"(\w+_)?hidden_size(_global)?|d_model|n_embd|dim|emb_dim|hidden_dim", HIDDEN),
    (r"(embed|embedding)_(dim|size)|word_embed_proj_dim|project(ion|or)?_(dim|size)", HIDDEN),
    (r"(input|output)_embedding_size|pooler_output_size|lru_width", HIDDEN),
    (r"(\w+_)?vocab_size(_per_layer_input)?", VOCAB),
    # Length.
    (r"(\w+_)?max_(2d_)?position_embeddings", POSITIONS),
    (r"n_positions|max_(source|target|text|speech)_positions", POSITIONS),
    (r"n_ctx|block_size|max_seq_len|model_max_length|seq_length|context_length", POSITIONS),
    (r"sliding_window(_size)?|attention_window_size|local_attention_window_len", WINDOW),
    (r"attention_chunk_size", WINDOW),
    (r"local_attention|attention_window|(mamba_)?chunk_size", 8),
    # Images and sound.
    (r"image_size|img_size|pretrain_image_size", IMAGE),
    (r"patch_size", PATCH),
    (r"num_frames|frames_per_clip", 2),
    (r"num_mel_bins|n_mel_bins|input_feat_per_channel|feature_projection_input_dim", MEL_BINS),
    (r"num_codebooks", 1),
    (r"num_quantizers|n_codebooks", 2),
)

# Fields whose None means "derive it" or "not set", where a number serves the sweep better: fewer
# key/value heads than query heads make the attention grouped.
NONE_RULES: tuple[tuple[str, int], ...] = (
    (r"num_key_value_heads|num_kv_heads", KV_HEADS),
    (r"head_dim", HEAD_DIM),
    (r"vocab_size", VOCAB),
    (r"n_routed_experts", EXPERTS),
    (r"num_experts_per_tok", 2),
    (r"n_shared_experts|n_group|topk_group", 1),
)
LIST_RULES: tuple[tuple[str, int], ...] = ((r"conv_dim|tdnn_dim", 32),)
SPECIAL_TOKEN = re.compile(
    r"(?!(pad|bos|eos)_token_id)(\w+_(token|pad|start|end)|image|mask|tag_pad|subs_pad)_(id|index)"
)
RATE_OF_NOISE = re.compile(r"\w*(dropout|drop_path|drop_rate|layerdrop|pdrop)\w*")
WEIGHT_SCALE = re.compile(r"initializer_range|init_std|init_range")
PER_LAYER = re.compile(r"\w*(layer_types|block_types?|attention_layers|_per_layer|rope_layers)")


_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
_MROPE_TEXT_MODELS = (
    "qwen2_vl_text",
    "qwen2_5_vl_text",
    "qwen2_5_omni_text",
    "paddleocr_vl_text",
    "glm4v_text",
    "glm_image_text",
    "glm_ocr_text",
)
_SWIN_MODELS = ("swin", "swinv2", "donut-swin", "maskformer-swin")
_SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4), "patch_size": 4, "window_size": 4}

# What no field name tells, by model type (that of the sub-config, for composite ones).
OVERRIDES: dict[str, dict[str, Any]] = {
    **{model_type: {"rope_parameters": _MROPE} for model_type in _MROPE_TEXT_MODELS},
    **dict.fromkeys(_SWIN_MODELS, _SWIN),
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"sliding_attention": _MROPE, "full_attention": _MROPE},
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": KV_HEADS, "clip_qkv": 8.0, "rope_theta": 10_000.0},
        "ffn_config": {"ffn_hidden_size": FFN, "moe_num_experts": EXPERTS, "moe_top_k": 2},
    },
    "dia": {"delay_pattern": [0]},
    "dia_decoder": {"num_channels": 1},
    "dory": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "dots3_note_text": {
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        "swa_q_lora_rank": HEAD_DIM,
        "swa_kv_lora_rank": HEAD_DIM,
        "swa_head_dim": HEAD_DIM + HEAD_DIM // 2,
        "swa_qk_nope_head_dim": HEAD_DIM,
        "swa_v_head_dim": HEAD_DIM,
    },
    "esm": {"pad_token_id": PAD, "mask_token_id": FIRST_SPECIAL_TOKEN},
    "esmc": {"num_key_value_heads": HEADS},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": FFN,
    },
    "glm4v_moe_text": {"rope_parameters": _MROPE | {"mrope_section": [1, 1, 2]}},
    "glm5_next_text": {"index_kpool": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_vl_text": {"rope_parameters": _MROPE | {"mrope_section": [2, 2, 2, 2]}},
    "hy_v4_vl_text": {"rope_parameters": _MROPE | {"mrope_section": [1, 1, 2]}},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "layoutlmv3": {"coordinate_size": 8, "shape_size": 16},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
    "lilt": {"hidden_size": 96},
    "longcat_flash": {"head_dim": HEAD_DIM // 2},
    "mistral4": {"qk_nope_head_dim": HEAD_DIM // 2},
    "mobilebert": {"initializer_range": 0.02},  # without normalisation, noise would grow
    "moonshine": {"encoder_num_key_value_heads": HEADS, "decoder_num_key_value_heads": HEADS},
    "perceiver": {"d_latents": HIDDEN, "num_latents": 16, "num_self_attends_per_block": LAYERS},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": HEAD_DIM,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False},
    "step3p5": {"sliding_window": WINDOW},
    "wavtokenizer": {"codebook_dim": HIDDEN},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 2 * HIDDEN,
        "attention_head_dim": 2 * HEAD_DIM,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(config_class: type[PreTrainedConfig]) -> PreTrainedConfig:
    """The smallest config of this class that still has every kind of layer its default has."""
    return shrink(config_class())


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A small copy of `config`, sub-configs included. Unknown fields keep their values.

    What equals the default is left to the constructor, which derives many fields from others.
    """
    default = type(config)()
    names = constructor_fields(type(config))
    picks = representative_layers(config, names)
    values: dict[str, Any] = {}
    special_tokens = 0
    for name in names:
        value = stored_value(config, name)
        if isinstance(value, PreTrainedConfig):
            values[name] = shrink(value)
        elif SPECIAL_TOKEN.fullmatch(name) and _is_int(value) and value >= FIRST_ORDINARY_TOKEN:
            values[name] = FIRST_SPECIAL_TOKEN + special_tokens
            special_tokens += 1
        else:
            small = shrink_field(name, value, picks)
            if small is not value or value != stored_value(default, name):
                values[name] = small
    if {"kv_lora_rank", "num_key_value_heads"} <= set(names):
        values["num_key_value_heads"] = HEADS  # multi-head latent attention has no groups
    return type(config)(**(values | OVERRIDES.get(config.model_type, {})))


def shrink_field(name: str, value: Any, picks: list[int] | None) -> Any:
    """The small value of one field; `value` itself where no rule applies.

    `picks` are the layers to keep, as `representative_layers` gives them.
    """
    if value is None:
        return _first_match(NONE_RULES, name)
    if isinstance(value, float):
        if WEIGHT_SCALE.fullmatch(name):
            return max(value, INITIAL_DEVIATION)
        return 0.0 if RATE_OF_NOISE.fullmatch(name) else value
    if _is_int(value):
        if picks is not None and re.fullmatch(r"num_hidden_layers|num_layers|n_layers?", name):
            return len(picks)
        small = _first_match(INT_RULES, name)
        return value if small is None or value <= 0 else small
    if isinstance(value, list | tuple):
        if name.endswith("eos_token_id"):
            return EOS
        if picks is not None and PER_LAYER.fullmatch(name) and len(value) > max(picks):
            return type(value)(value[i] for i in picks)
        small = _first_match(LIST_RULES, name)
        return value if small is None else type(value)(small for _ in value)
    if name in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
        return shrink_rope(value)
    return value


def constructor_fields(config_class: type[PreTrainedConfig]) -> list[str]:
    """The names that the constructor of a config takes, in its order."""
    if is_dataclass(config_class):
        return [f.name for f in fields(config_class) if f.init]
    parameters = inspect.signature(config_class.__init__).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]


def stored_value(config: PreTrainedConfig, name: str) -> Any:
    """What a config holds for a constructor field, which it may keep under another name.

    Not getattr: that raises for a field which differs between layers.
    """
    return vars(config).get(config.attribute_map.get(name, name))


def representative_layers(config: PreTrainedConfig, names: list[str]) -> list[int] | None:
    """Indices of the layers to keep, so that every combination of layer kinds stays represented.

    None for a config without per-layer lists of kinds. At least `LAYERS`, at most `MAX_LAYERS`.
    """
    count = stored_value(config, "num_hidden_layers")
    if not _is_int(count):
        return None
    lists = [stored_value(config, name) for name in names if PER_LAYER.fullmatch(name)]
    kinds = [
        value
        for value in lists
        if isinstance(value, list | tuple)
        and len(value) == count
        and all(isinstance(kind, str) for kind in value)
    ]
    if not kinds:
        return None
    first_seen: dict[tuple[str, ...], int] = {}
    for index, combination in enumerate(zip(*kinds, strict=True)):
        first_seen.setdefault(combination, index)
    picks = list(first_seen.values())[:MAX_LAYERS]
    others = [index for index in range(count) if index not in picks]
    return sorted(picks + others[: max(0, LAYERS - len(picks))])


def shrink_rope(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE parameters for `HEAD_DIM`: the sections of multimodal RoPE must add up to half of it."""
    small: dict[str, Any] = {}
    for name, value in parameters.items():
        if isinstance(value, Mapping):  # one set of parameters per layer type
            small[name] = shrink_rope(value)
        elif name == "mrope_section":
            rotary = int(HEAD_DIM * parameters.get("partial_rotary_factor", 1.0))
            small[name] = scale_sections(value, rotary // 2)
        else:
            small[name] = value
    return small


def scale_sections(sections: list[int], total: int) -> list[int]:
    """Positive whole numbers in about the proportions of `sections` that add up to `total`."""
    scaled = [max(1, total * s // sum(sections)) for s in sections]
    scaled[-1] += total - sum(scaled)
    return scaled


def _first_match(rules: tuple[tuple[str, int], ...], name: str) -> int | None:
    return next((small for pattern, small in rules if re.fullmatch(pattern, name)), None)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
