"""Our BLIP-2 of stage 2 and InstructBLIP give what transformers' classes give: Q-Former states, logits, loss, texts.

Both run the same language model of transformers; what is compared is all before it, how it is fed, and how texts are
searched. In three things transformers cannot be followed in float64, and is helped here:

- Its norms of Llama and T5 round to float32 in between: one bit of difference before them becomes 1e-8 behind. Here
  they do not round, in both models.
- The loss of a decoder-only model is rounded to float32; it is held to 1e-6, and the logits it is made of to 1e-9.
- It wants the soft prompt's places in the prompt, marked by `image_token_index`; ours takes the prompt alone.
"""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Model,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
)

from openblip.convert.huggingface import to_huggingface
from openblip.convert.recognise import from_checkpoint_
from openblip.convert.weights import WeightsError, tied_names
from openblip.hub import load_pretrained, save_for_transformers, save_pretrained
from openblip.models.blip2_llm import Blip2Llm
from openblip.models.generation import GenerationConfig
from tests.data.test_prompts import byte_level
from tests.parity.peers import (
    CLS,
    SEP,
    TOLERANCE,
    blip2_sections,
    difference,
    language_model,
    norms_that_do_not_round,
    other_activation,
    other_eps,
    ours,
    pixels,
    random_peer,
    save_words,
    swapped_k_and_v,
    swapped_q_and_k,
    texts,
    without,
)

QUERIES, IMAGE_TOKEN = 5, 1
IMAGES = pixels(3, 3, 32, 32)
QUESTIONS, QUESTION_MASK = texts([9, 4, 7], first=CLS)  # as the Q-Former reads them
PROMPTS, PROMPT_MASK = texts([3, 6, 4], first=2, last=9, low=3, high=43)
ANSWERS, ANSWER_MASK = texts([7, 3, 5], first=5, last=50, low=3, high=43)
KINDS = ["opt", "t5", "instruct llama", "instruct t5"]


def make_peer(kind: str, cls: type | None = None):
    instruct, _, lm = kind.rpartition(" ")
    config = (InstructBlipConfig if instruct else Blip2Config)(
        **blip2_sections(), num_query_tokens=QUERIES, image_token_index=IMAGE_TOKEN,
        text_config=language_model(lm),
    )  # fmt: skip
    kinds = {"": Blip2ForConditionalGeneration, "instruct": InstructBlipForConditionalGeneration}
    peer = random_peer(cls or kinds[instruct], config)
    if kind == "instruct t5":  # Flan-T5's output layer is not the embeddings, whatever the configuration says
        head = peer.language_model.lm_head
        head.weight = torch.nn.Parameter(head.weight.data.roll(1, 0))
    return peer


@pytest.fixture(scope="module", autouse=True)
def exact_norms():
    with norms_that_do_not_round():
        yield


@pytest.fixture(scope="module", params=KINDS)
def peer(request):
    return make_peer(request.param)


@pytest.fixture(scope="module")
def instructed():
    return make_peer("instruct llama")


def instructions(peer, ids=QUESTIONS, mask=QUESTION_MASK) -> dict[str, torch.Tensor]:
    is_instruct = isinstance(peer, InstructBlipForConditionalGeneration)
    return {"qformer_input_ids": ids, "qformer_attention_mask": mask} if is_instruct else {}


def shown(ids: torch.Tensor, value: int) -> torch.Tensor:
    """`ids` behind the places of the queries, which hold `value`."""
    return torch.cat([ids.new_full((len(ids), QUERIES), value), ids], dim=1)


def their_inputs(peer, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": shown(ids, IMAGE_TOKEN), "attention_mask": shown(mask, 1)}


def is_encoder_decoder(peer) -> bool:
    return peer.language_model.config.is_encoder_decoder


@torch.no_grad()
def theirs(peer, images=IMAGES, questions=QUESTIONS, prompts=PROMPTS, answers=ANSWERS):
    """(logits that predict the answers' tokens [K, V], the peer's own loss, its whole output)."""
    given = instructions(peer, questions)
    if is_encoder_decoder(peer):
        labels = answers.masked_fill(ANSWER_MASK == 0, -100)
        out = peer(images, **given, **their_inputs(peer, prompts, PROMPT_MASK), labels=labels)
        return out.logits[labels != -100], out.loss, out
    labels = shown(answers.masked_fill(ANSWER_MASK == 0, -100), -100)
    out = peer(images, **given, **their_inputs(peer, answers, ANSWER_MASK), labels=labels)
    return out.logits[:, :-1][labels[:, 1:] != -100], out.loss, out


@torch.no_grad()
def mine(model: Blip2Llm, peer, images=IMAGES):
    """(the same logits [K, V], their labels [K], states on the way)."""
    embeds = model.encode_image(images)
    given = tuple(instructions(peer).values())
    soft = model.soft_prompt(embeds, *given)
    ids, mask = (PROMPTS, PROMPT_MASK) if is_encoder_decoder(peer) else (ANSWERS, ANSWER_MASK)
    logits, labels = model.labelled_logits(soft, ids, mask, ANSWERS.masked_fill(ANSWER_MASK == 0, -100))
    memory = model.blip2.memory(embeds)
    states = (
        model.blip2.qformer.encode_both(memory, *given)
        if given
        else model.blip2.qformer.encode_queries(memory)
    )
    return (
        logits,
        labels,
        {"image": model.blip2.ln_vision(embeds), "queries": states[:, :QUERIES], "prompt": soft},
    )


@torch.no_grad()
def gap(model: Blip2Llm, peer) -> float:
    """The largest difference of image states, Q-Former states, soft prompt and logits."""
    logits, _, states = mine(model, peer)
    their_logits, _, out = theirs(peer)
    read = out.qformer_outputs.last_hidden_state[:, :QUERIES]
    told = {
        "image": out.vision_outputs.last_hidden_state,
        "queries": read,
        "prompt": peer.language_projection(read),
        "logits": their_logits,
    }
    return difference(states | {"logits": logits}, told)


def test_the_peer_looks_at_image_question_and_words(peer):
    logits = theirs(peer)[0]
    others = {"images": IMAGES.flip(0), "prompts": PROMPTS.flip(0), "answers": ANSWERS.flip(0)}
    if instructions(peer):
        others["questions"] = QUESTIONS.flip(0)
    if not is_encoder_decoder(peer):
        del others["prompts"]
    for name, other in others.items():
        assert (theirs(peer, **{name: other})[0] - logits).abs().max() > 0.01, name


def test_states_and_logits_are_the_same(peer):
    assert gap(ours(peer), peer) < TOLERANCE


def test_the_loss_is_the_same(peer):
    logits, labels, _ = mine(ours(peer), peer)
    loss = F.cross_entropy(logits, labels)
    their_logits, their_loss, _ = theirs(peer)
    assert abs(loss - F.cross_entropy(their_logits, labels)) < TOLERANCE
    assert abs(loss - their_loss) < (TOLERANCE if is_encoder_decoder(peer) else 1e-6)


@torch.no_grad()
def test_qformer_features_of_the_model_without_head_are_the_same():
    peer = make_peer("opt", Blip2Model)
    model = ours(peer)
    embeds = model.encode_image(IMAGES)
    features = model.blip2.qformer.encode_queries(model.blip2.memory(embeds))
    assert (features - peer.get_qformer_features(IMAGES)).abs().max() < TOLERANCE
    assert (model.blip2.ln_vision(embeds) - peer.get_image_features(IMAGES)[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "fault",
    [
        other_eps("blip2.vision.", 10),
        other_eps("blip2.ln_vision", 10),
        other_eps("blip2.qformer.", 1e7),
        swapped_q_and_k("blip2.qformer.layers.1"),
        swapped_k_and_v("blip2.qformer.layers.2"),
        other_activation("blip2.qformer.", "gelu_tanh"),
        without("blip2.ln_vision"),
        lambda model: model.projection.bias.data.zero_(),
    ],
    ids=[
        "vision eps", "ln_vision eps", "Q-Former eps", "q and k", "cross k and v", "tanh GELU", "no ln_vision",
        "no projection bias",
    ],
)  # fmt: skip
def test_a_fault_is_seen(instructed, fault):
    model = ours(instructed)
    fault(model)
    assert gap(model, instructed) > TOLERANCE


def test_a_question_the_queries_do_not_see_is_seen(instructed):
    model = ours(instructed)
    model.config.qformer_text = False
    soft_prompt = model.soft_prompt
    model.soft_prompt = lambda embeds, *question: soft_prompt(embeds)
    assert gap(model, instructed) > TOLERANCE


def test_another_activation_of_the_language_model_is_seen():
    peer = make_peer("t5")
    config = peer.config.to_dict()
    config["text_config"]["dense_act_fn"] = "gelu_new"
    model = from_checkpoint_(config, dict(peer.state_dict()), "peer")[0]
    assert gap(model, peer) > TOLERANCE


OPTIONS = {
    "greedy": {"num_beams": 1, "max_new_tokens": 12},
    "beam 3": {"num_beams": 3, "max_new_tokens": 12},
    "beam 3, longer": {"num_beams": 3, "max_new_tokens": 8, "min_new_tokens": 3, "length_penalty": -1.0},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@torch.no_grad()
def test_texts_are_the_same(peer, options):
    model, images = ours(peer), pixels(9, 3, 32, 32)
    rows = torch.arange(9) % 3
    prompts, mask, questions = PROMPTS[rows], PROMPT_MASK[rows], (QUESTIONS[rows], QUESTION_MASK[rows])
    given = instructions(peer, *questions)
    soft = model.soft_prompt(model.encode_image(images), *given.values())
    made = model.generate(soft, prompts, mask, GenerationConfig(**options))
    # Theirs wants padding where its processor puts it: before all else for a decoder, and behind for an encoder.
    inputs = their_inputs(peer, prompts, mask)
    if not is_encoder_decoder(peer):
        order = inputs["attention_mask"].argsort(dim=1, stable=True)
        inputs = {name: value.gather(1, order) for name, value in inputs.items()}
    told = peer.generate(images, **given, **inputs, do_sample=False, **options)
    told = told[:, 1 if is_encoder_decoder(peer) else inputs["input_ids"].shape[1] :]
    ends = peer.language_model.config.eos_token_id
    captions = cut(made.sequences, ends)
    assert captions == cut(told, ends)
    assert len({tuple(caption) for caption in captions}) > 3, "texts depend on image and prompt"
    assert len({len(caption) for caption in captions}) > 1, "texts end at different lengths"


def cut(sequences: torch.Tensor, ends: list[int]) -> list[list[int]]:
    """Rows up to the first end."""
    rows = []
    for row in sequences.tolist():
        first = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(row[: first + 1])
    return rows


def test_it_goes_back(peer):
    model = ours(peer)
    config, weights = to_huggingface(model)
    own = peer.state_dict()
    tied = {
        f"language_model.{name.removeprefix('lm.model.')}"
        for _, *names in tied_names(model)
        for name in names
    }
    assert weights.keys() == own.keys() - tied
    assert all(torch.equal(value, own[name]) for name, value in weights.items())
    assert config["image_token_index"] == IMAGE_TOKEN
    again, report = from_checkpoint_(config, weights, "again")
    assert again.config == model.config and not report.ignored and not report.fresh
    assert again.state_dict().keys() == model.state_dict().keys() and tied_names(again) == tied_names(model)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())


def test_folders_are_loaded(peer, tmp_path):
    peer.save_pretrained(tmp_path / "theirs")
    byte_level().save_pretrained(tmp_path / "theirs")  # the language model's
    if instructions(peer):
        save_words(tmp_path / "theirs/qformer_tokenizer")
    found = load_pretrained(tmp_path / "theirs", dtype=None)
    assert gap(found.model, peer) < TOLERANCE
    if instructions(peer):
        assert found.tokenizer(["w7 w9"])["input_ids"].tolist() == [[CLS, 7, 9, SEP]]
    else:
        assert found.tokenizer is None
    assert found.transform.image_size == 32 and not found.report.ignored
    save_pretrained(
        found.model, tmp_path / "ours", tokenizer=found.tokenizer, transform=found.transform, info=found.info,
        lm_tokenizer=found.lm_tokenizer,
    )  # fmt: skip
    again = load_pretrained(tmp_path / "ours", dtype=None)
    for words in (found.lm_tokenizer, again.lm_tokenizer):
        assert words.decode(words.encode("a dog")) == "a dog"
        assert words.encoder_decoder == found.model.lm.is_encoder_decoder
        is_opt = found.model.lm.config.config["model_type"] == "opt"
        assert words.end_id == (words.encode("\n")[0] if is_opt else 2)
        is_vicuna = found.model.lm.config.family == "vicuna"
        assert words.quirks.rewrite == ({0: 2} if is_vicuna else {})
    assert again.model.config == found.model.config and gap(again.model, peer) < TOLERANCE
    save_for_transformers(again.model, tmp_path / "back")
    back, info = type(peer).from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not any(info.values())
    assert gap(found.model, back.double().eval()) < TOLERANCE


def test_tables_of_old_files_are_passed_over_and_the_rest_is_named(peer):
    config, weights = peer.config.to_dict(), dict(peer.state_dict())
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    weights["qformer.embeddings.position_ids"] = torch.arange(24)[None]
    assert len(from_checkpoint_(config, dict(weights), "the file")[1].ignored) == 2
    del weights["language_projection.bias"]
    weights["language_model.model.extra"] = torch.zeros(2)
    with pytest.raises(
        WeightsError, match=r"missing: language_projection.bias; .*language_model.model.extra"
    ):
        from_checkpoint_(config, weights, "the file")


def test_a_model_that_names_no_image_token_gets_the_last_of_the_vocabulary(instructed):
    model = ours(instructed)
    del model.config.lm.config["image_token_index"]
    assert to_huggingface(model)[0]["image_token_index"] == 59
