"""Small random models of the architectures whose attention differs, built in milliseconds.

Weights are drawn wider than Transformers' default of 0.02: with that, attention hardly changes the
output, and a mask that is wrong would be lost in the noise.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 64
LAYERS = 2
#: Special tokens of every tiny model; ordinary tokens start after them.
PAD, BOS, EOS = 0, 1, 2

_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_ENCODER: dict[str, Any] = {
    name: value
    for name, value in _DECODER.items()
    if name not in ("num_key_value_heads", "head_dim", "bos_token_id", "eos_token_id")
}
#: Encoders without dropout, which Transformers gives them by default.
_BERT = {**_ENCODER, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 128,
    "init_std": 0.3,
    "dropout": 0.0,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": BOS,
    "forced_eos_token_id": None,
}

#: Model class, configuration class and what a tiny configuration says beyond the common values.
_RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", _DECODER),
    # Norms on query and key.
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _DECODER),
    # Every layer windowed: a causal window of 5 tokens.
    "mistral": ("MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 5}),
    # Windowed and full layers in one model, with a hybrid cache.
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_DECODER,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
    # Softcap.
    "gemma2": (
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **_DECODER,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
        },
    ),
    # Attention sinks.
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_DECODER,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    # Chunked and full layers.
    "llama4": (
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **_DECODER,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 5,
            "layer_types": ["chunked_attention", "full_attention"],
            "no_rope_layers": [1, 0],
        },
    ),
    # Every query sees the four keys that an indexer chooses.
    "deepseek_v32": (
        "DeepseekV32ForCausalLM",
        "DeepseekV32Config",
        {
            **{name: value for name, value in _DECODER.items() if name != "head_dim"},
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": 2,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "index_topk": 4,
            "index_n_heads": 2,
            "index_head_dim": 8,
        },
    ),
    # Query and key of 12, value of 8 dimensions.
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **{name: value for name, value in _DECODER.items() if name != "head_dim"},
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "first_k_dense_replace": LAYERS,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": LAYERS,
            "n_head": 4,
            "n_positions": 128,
            "initializer_range": 0.3,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "pad_token_id": PAD,
        },
    ),
    "bert": ("BertModel", "BertConfig", _BERT),
    "roberta": ("RobertaModel", "RobertaConfig", {**_BERT, "pad_token_id": 1}),
    "splinter": ("SplinterModel", "SplinterConfig", {**_BERT, "question_token_id": EOS}),
    # A symmetric window of 3 tokens to either side, next to full layers.
    "modernbert": (
        "ModernBertModel",
        "ModernBertConfig",
        {
            **_ENCODER,
            "local_attention": 6,
            "layer_types": ["sliding_attention", "full_attention"],
            "initializer_cutoff_factor": 2.0,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "cls_token_id": BOS,
            "sep_token_id": EOS,
        },
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", _SEQ2SEQ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": LAYERS,
            "num_heads": 4,
            "initializer_factor": 1.0,
            "dropout_rate": 0.0,
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "decoder_start_token_id": PAD,
        },
    ),
    # Architectures that never call the attention function.
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "n_layer": LAYERS,
            "n_head": 4,
            "initializer_range": 0.3,
            "pad_token_id": PAD,
        },
    ),
    "mpt": (
        "MptForCausalLM",
        "MptConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_layers": LAYERS,
            "n_heads": 4,
            "expansion_ratio": 2,
            "max_seq_len": 128,
            "initializer_range": 0.3,
        },
    ),
    "roformer": (
        "RoFormerModel",
        "RoFormerConfig",
        {**_BERT, "embedding_size": 32},
    ),
    "mpnet": ("MPNetModel", "MPNetConfig", {**_BERT, "pad_token_id": 1}),
    "convbert": ("ConvBertModel", "ConvBertConfig", {**_BERT, "embedding_size": 32}),
    "xglm": (
        "XGLMForCausalLM",
        "XGLMConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "ffn_dim": 48,
            "num_layers": LAYERS,
            "attention_heads": 4,
            "init_std": 0.3,
            "max_position_embeddings": 128,
            "dropout": 0.0,
            "pad_token_id": 1,
        },
    ),
}


def tiny_config(name: str, **changes: Any) -> PreTrainedConfig:
    """The configuration of a tiny model; ``changes`` override its values."""
    _, config_name, values = _RECIPES[name]
    config_class = getattr(transformers, config_name)
    return config_class(**{**values, **changes})


def tiny_model(
    name: str,
    implementation: str = "eager",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> PreTrainedModel:
    """A tiny model in evaluation mode; the same seed gives the same weights.

    Args:
        changes: values of the configuration, see :func:`tiny_config`.
    """
    return from_config(_RECIPES[name][0], tiny_config(name, **changes), implementation, dtype, seed)


def from_config(
    class_name: str,
    config: PreTrainedConfig,
    implementation: str = "eager",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """A model with random weights from its configuration."""
    torch.manual_seed(seed)
    model_class = getattr(transformers, class_name)
    model = model_class._from_config(config, attn_implementation=implementation, dtype=dtype)
    return model.eval()


def token_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """(batch, length) ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(EOS + 1, VOCABULARY, (batch, length), generator=generator)
