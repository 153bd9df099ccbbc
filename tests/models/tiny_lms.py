"""Random language models of every family, small enough to compute in float64 on the side."""

import torch

from openblip.models.lm import LanguageModel, LmConfig

VOCAB, EOS, PAD = 61, 2, 1

_LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
CONFIGS = {
    "llama": {"model_type": "llama", **_LLAMA},
    "qwen2": {"model_type": "qwen2", **_LLAMA},
    "phi3": {"model_type": "phi3", **_LLAMA, "sliding_window": 6},
    "gemma": {"model_type": "gemma", **_LLAMA, "head_dim": 4},
    "gemma2": {
        **{"model_type": "gemma2", **_LLAMA, "head_dim": 4, "sliding_window": 6},
        "final_logit_softcapping": 2.0,
    },
    "gpt_neox": {
        **{"model_type": "gpt_neox", **_LLAMA, "rotary_pct": 0.5},
        "num_key_value_heads": None,
    },
    "gpt2": {  # learned positions, which it does not count by itself as OPT does
        "model_type": "gpt2",
        "vocab_size": VOCAB,
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": 0.3,
    },
    "opt": {
        "model_type": "opt",
        "vocab_size": VOCAB,
        "hidden_size": 16,
        "word_embed_proj_dim": 12,  # narrower than the model, as in OPT-350M
        "ffn_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "bos_token_id": 2,
        "eos_token_id": 50,  # the end of a text is another token than the start: "\n" in BLIP-2
        "pad_token_id": PAD,
        "init_std": 0.3,
        "dropout": 0.1,
    },
    "t5": {
        "model_type": "t5",
        "vocab_size": VOCAB,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu",
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "initializer_factor": 4.0,
        "tie_word_embeddings": False,
        "scale_decoder_outputs": False,
    },
    "t5_tied": {
        "model_type": "t5",
        "vocab_size": VOCAB,
        "d_model": 16,
        "d_kv": 4,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 4,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "initializer_factor": 4.0,
    },
    "bart": {
        "model_type": "bart",
        "vocab_size": VOCAB,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
        "max_position_embeddings": 64,
        "bos_token_id": 0,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "decoder_start_token_id": EOS,
        "forced_eos_token_id": None,
        "scale_embedding": True,
        "init_std": 0.3,
    },
}
DECODER_ONLY = ["llama", "qwen2", "phi3", "gemma", "gemma2", "gpt_neox", "gpt2", "opt"]
ENCODER_DECODER = ["t5", "t5_tied", "bart"]


def tiny_lm(name: str, **settings) -> LanguageModel:
    """A random model in float64, whose biases and norms are not all zero and one.

    Gemma 2 is in float32: transformers masks it with numbers that overflow where its softmax is computed in float32.
    """
    torch.manual_seed(3)
    lm = LanguageModel(LmConfig(dict(CONFIGS[name]), **settings))
    lm = lm if name == "gemma2" else lm.double()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    bias = getattr(lm.model, "final_logits_bias", None)
    if bias is not None:
        bias.normal_()
    return lm
