"""What transformers calls the modules and parameters of our models: one table per architecture, read both ways."""

from openblip.convert.layout import Names, under


def _vision(prefix: str, qkv: str | tuple[str, ...], out: str) -> Names:
    """The ViT of BLIP and CLIP, and CLIP's text blocks; what differs is how attention is called."""
    layer = f"{prefix}encoder.layers.{{}}."
    heads = tuple(layer + name for name in qkv) if isinstance(qkv, tuple) else layer + qkv
    return {
        "class_embedding": f"{prefix}embeddings.class_embedding",
        "patch_embedding": f"{prefix}embeddings.patch_embedding",
        "position_embedding": f"{prefix}embeddings.position_embedding",
        "blocks.{}.norm1": f"{layer}layer_norm1",
        "blocks.{}.attention.qkv": heads,
        "blocks.{}.attention.out": layer + out,
        "blocks.{}.norm2": f"{layer}layer_norm2",
        "blocks.{}.mlp.fc1": f"{layer}mlp.fc1",
        "blocks.{}.mlp.fc2": f"{layer}mlp.fc2",
    }


def bert_names(prefix: str) -> Names:
    """BLIP's BERT; these are also the names of the original checkpoints."""
    layer = f"{prefix}encoder.layer.{{}}."
    query, key, value = (f"{layer}attention.self.{name}" for name in ("query", "key", "value"))
    image_query, image_key, image_value = (
        f"{layer}crossattention.self.{n}" for n in ("query", "key", "value")
    )
    return {
        "embeddings.word": f"{prefix}embeddings.word_embeddings",
        "embeddings.position": f"{prefix}embeddings.position_embeddings",
        "embeddings.norm": f"{prefix}embeddings.LayerNorm",
        "layers.{}.self_attention.attention.qkv": (query, key, value),
        "layers.{}.self_attention.attention.out": f"{layer}attention.output.dense",
        "layers.{}.self_attention.residual.norm": f"{layer}attention.output.LayerNorm",
        "layers.{}.cross_attention.attention.q": image_query,
        "layers.{}.cross_attention.attention.kv": (image_key, image_value),
        "layers.{}.cross_attention.attention.out": f"{layer}crossattention.output.dense",
        "layers.{}.cross_attention.residual.norm": f"{layer}crossattention.output.LayerNorm",
        "layers.{}.feed_forward.mlp.fc1": f"{layer}intermediate.dense",
        "layers.{}.feed_forward.mlp.fc2": f"{layer}output.dense",
        "layers.{}.feed_forward.residual.norm": f"{layer}output.LayerNorm",
    }


_SPLIT_HEADS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
BLIP_VISION = under("vision", _vision("vision_model.", "self_attn.qkv", "self_attn.projection")) | {
    "vision.norm": "vision_model.post_layernorm"
}
BLIP_ENCODER = under("text_encoder", bert_names("text_encoder."))
BLIP_DECODER = under("text_decoder", bert_names("text_decoder.bert.")) | {
    "lm_head.dense": "text_decoder.cls.predictions.transform.dense",
    "lm_head.norm": "text_decoder.cls.predictions.transform.LayerNorm",
    "lm_head.bias": "text_decoder.cls.predictions.bias",
}
BLIP_TIED = (
    ("text_decoder.bert.embeddings.word_embeddings.weight", "text_decoder.cls.predictions.decoder.weight"),
    ("text_decoder.cls.predictions.bias", "text_decoder.cls.predictions.decoder.bias"),
)
CLIP = (
    under("vision", _vision("vision_model.", _SPLIT_HEADS, "self_attn.out_proj"))
    | under("text", _vision("text_model.", _SPLIT_HEADS, "self_attn.out_proj"))
    | {
        "text.word": "text_model.embeddings.token_embedding",
        "text.position": "text_model.embeddings.position_embedding",
        "text.norm": "text_model.final_layer_norm",
        "vision.position_embedding": "vision_model.embeddings.position_embedding.weight",
        "vision.pre_norm": "vision_model.pre_layrnorm",  # sic
        "vision_norm": "vision_model.post_layernorm",
        "vision_proj": "visual_projection",
        "text_proj": "text_projection",
        "logit_scale": "logit_scale",
    }
)


def siglip_names(prefix: str) -> Names:
    """SigLIP's image tower, which has no class token."""
    names = _vision(prefix, _SPLIT_HEADS, "self_attn.out_proj")
    del names["class_embedding"]
    return names | {
        "position_embedding": f"{prefix}embeddings.position_embedding.weight",
        "norm": f"{prefix}post_layernorm",
    }


_VIT_LAYER = "encoder.layer.{}."
VIT: Names = {
    "class_embedding": "embeddings.cls_token",
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "position_embedding": "embeddings.position_embeddings",
    "blocks.{}.norm1": f"{_VIT_LAYER}layernorm_before",
    "blocks.{}.attention.qkv": tuple(
        f"{_VIT_LAYER}attention.attention.{name}" for name in ("query", "key", "value")
    ),
    "blocks.{}.attention.out": f"{_VIT_LAYER}attention.output.dense",
    "blocks.{}.norm2": f"{_VIT_LAYER}layernorm_after",
    "blocks.{}.mlp.fc1": f"{_VIT_LAYER}intermediate.dense",
    "blocks.{}.mlp.fc2": f"{_VIT_LAYER}output.dense",
    "norm": "layernorm",
}
_DINOV2_LAYER = "encoder.layer.{}."
DINOV2: Names = {
    "class_embedding": "embeddings.cls_token",
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "position_embedding": "embeddings.position_embeddings",
    "blocks.{}.norm1": f"{_DINOV2_LAYER}norm1",
    "blocks.{}.attention.qkv": tuple(
        f"{_DINOV2_LAYER}attention.{name}" for name in ("q_proj", "k_proj", "v_proj")
    ),
    "blocks.{}.attention.out": f"{_DINOV2_LAYER}attention.o_proj",
    "blocks.{}.scale1.gain": f"{_DINOV2_LAYER}layer_scale1.lambda1",
    "blocks.{}.norm2": f"{_DINOV2_LAYER}norm2",
    "blocks.{}.mlp.fc1": f"{_DINOV2_LAYER}mlp.fc1",
    "blocks.{}.mlp.fc2": f"{_DINOV2_LAYER}mlp.fc2",
    "blocks.{}.scale2.gain": f"{_DINOV2_LAYER}layer_scale2.lambda1",
    "norm": "layernorm",
}
DINOV2_OLD_NAMES = (  # files on disk have the left ones, state dicts of transformers 5 the right ones
    ("attention.attention.query", "attention.q_proj"),
    ("attention.attention.key", "attention.k_proj"),
    ("attention.attention.value", "attention.v_proj"),
    ("attention.output.dense", "attention.o_proj"),
)


def _qformer(embeddings: str, norm: str) -> Names:
    """The Q-Former; its embeddings stand inside of it in InstructBLIP and beside it in BLIP-2."""
    layer = "qformer.encoder.layer.{}."
    query, key, value = (f"{layer}attention.attention.{name}" for name in ("query", "key", "value"))
    image_query, image_key, image_value = (
        f"{layer}crossattention.attention.{name}" for name in ("query", "key", "value")
    )
    return {
        "query_tokens": "query_tokens",
        "word": f"{embeddings}.word_embeddings",
        "position": f"{embeddings}.position_embeddings",
        "norm": norm,
        "layers.{}.self_attention.attention.qkv": (query, key, value),
        "layers.{}.self_attention.attention.out": f"{layer}attention.output.dense",
        "layers.{}.self_attention.residual.norm": f"{layer}attention.output.LayerNorm",
        "layers.{}.cross_attention.attention.q": image_query,
        "layers.{}.cross_attention.attention.kv": (image_key, image_value),
        "layers.{}.cross_attention.attention.out": f"{layer}crossattention.output.dense",
        "layers.{}.cross_attention.residual.norm": f"{layer}crossattention.output.LayerNorm",
        "layers.{}.query_feed_forward.mlp.fc1": f"{layer}intermediate_query.dense",
        "layers.{}.query_feed_forward.mlp.fc2": f"{layer}output_query.dense",
        "layers.{}.query_feed_forward.residual.norm": f"{layer}output_query.LayerNorm",
        "layers.{}.feed_forward.mlp.fc1": f"{layer}intermediate.dense",
        "layers.{}.feed_forward.mlp.fc2": f"{layer}output.dense",
        "layers.{}.feed_forward.residual.norm": f"{layer}output.LayerNorm",
    }


# Their tower has no norm of its own: what it calls one is `ln_vision`, which belongs to the bridge.
_BLIP2_VISION = {name: theirs for name, theirs in BLIP_VISION.items() if name != "vision.norm"} | {
    "ln_vision": "vision_model.post_layernorm"
}
BLIP2_RETRIEVAL = (
    _BLIP2_VISION
    | under("qformer", _qformer("embeddings", "qformer.layernorm"))
    | {"vision_proj": "vision_projection", "text_proj": "text_projection", "itm_head": "itm_head"}
)
# Ours holds a model of transformers: below these prefixes all names are the same.
_TO_LANGUAGE: Names = {"projection": "language_projection", "lm.model.": "language_model."}
BLIP2_LLM = _TO_LANGUAGE | under(
    "blip2", _BLIP2_VISION | under("qformer", _qformer("embeddings", "qformer.layernorm"))
)
INSTRUCTBLIP = _TO_LANGUAGE | under(
    "blip2", _BLIP2_VISION | under("qformer", _qformer("qformer.embeddings", "qformer.embeddings.layernorm"))
)
