"""Random small models of mlx-lm's families, seeded, in float32."""

import importlib

import mlx.core as mx
from mlx.utils import tree_map

_PLAIN = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "layer_norm_eps": 1e-5,
    "norm_epsilon": 1e-5,
    "vocab_size": 97,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 3, "query_pre_attn_scalar": 16},
    "gpt_oss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "phi3": {"rope_scaling": None, "partial_rotary_factor": 1.0},
    "qwen3_moe": _MOE,
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": 8},
    "exaone4": {"sliding_window": 8, "sliding_window_pattern": "LLG", "rope_scaling": None},
    "starcoder2": {},
    "cohere2": {"sliding_window": 8, "sliding_window_pattern": 3, "layer_norm_bias": False},
    "gemma": {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    # Layers of different head dims, and some that attend over another's K and V.
    "gemma4_text": {
        "num_hidden_layers": 6,
        "global_head_dim": 32,
        "num_kv_shared_layers": 2,
        "hidden_size_per_layer_input": 0,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
    },
    # K and V of different head dims, besides.
    "mimo_v2_flash": {
        "num_experts_per_tok": 2,
        "hybrid_layer_pattern": [0, 1, 1],
        "moe_layer_freq": [0, 1, 0],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": 8,
        "moe_intermediate_size": 32,
        "n_shared_experts": None,
        "n_routed_experts": 4,
        "routed_scaling_factor": None,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "n_group": 1,
        "topk_group": 1,
        "layernorm_epsilon": 1e-5,
        "swa_rope_theta": 10000.0,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "head_dim": 24,
        "v_head_dim": 16,
        "swa_head_dim": 24,
        "swa_v_head_dim": 16,
        "partial_rotary_factor": 1,
    },
    "qwen3_next": {
        **_MOE,
        "shared_expert_intermediate_size": 32,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 3,
    },
}
"""What a family's model differs in from a plain one."""


def config_of(family, **other):
    """Return the configuration of a family's small model."""
    return {**_PLAIN, **FAMILIES.get(family, {}), **other, "model_type": family}


def tokens_of(generator, uids):
    """Run a `BatchGenerator` to the end; return the tokens of each sequence."""
    found = {uid: [] for uid in uids}
    while responses := generator.next_generated():
        for response in responses:
            found[response.uid].append(response.token)
    return [found[uid] for uid in uids]


def small_model(family, seed=0, **other):
    """Return a model of a family with random weights that prefer no token."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    config = config_of(family, **other)
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config))
    model.update(
        tree_map(
            lambda x: mx.random.normal(x.shape) * (0.4 if x.ndim > 1 else 0.1) + (x.ndim == 1),
            model.parameters(),
        )
    )
    mx.eval(model.parameters())
    return model
