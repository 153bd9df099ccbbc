"""What a user holds: any form of image in, strings and arrays out, each image's result its own."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

import openblip
from openblip.api import load, row_seeds
from openblip.config import UserError
from openblip.models.generation import GenerationConfig
from tests.parity.peers import ENC, blip_config, random_peer
from tests.tiny_models import drawing, save_blip, save_clip, save_vqa

TEXTS = ["a red circle", "two dogs in the snow", "the word", "something else entirely, with more words"]
SAMPLED = {"do_sample": True, "top_p": 0.9, "temperature": 0.3, "max_new_tokens": 4}
SHORT = {"max_new_tokens": 4}  # every token is 30,524 logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "blip": save_blip(root / "blip"),
        "captioner": save_blip(root / "captioner", encoder=False, share=()),
        "filter": save_blip(root / "filter", decoder=False, share=()),
        "vqa": save_vqa(root / "vqa"),
        "clip": save_clip(root / "clip"),
    }


@pytest.fixture(scope="module")
def blip(folders):
    return load(folders["blip"], batch_size=4)


@pytest.fixture(scope="module")
def vqa(folders):
    return load(folders["vqa"], batch_size=2)


@pytest.fixture(scope="module")
def clip(folders):
    return load(folders["clip"], batch_size=2)


@pytest.fixture(scope="module")
def images():
    return [drawing(number) for number in (0, 9, 18, 27, 36, 45)]


@pytest.fixture(scope="module")
def forms(images, tmp_path_factory):
    """One picture in every form."""
    path = tmp_path_factory.mktemp("forms") / "a.png"
    images[1].save(path)
    return [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), images[1]]


def test_openblip_load_is_it():
    assert openblip.load is load


def test_a_jpeg_of_many_times_the_size_is_decoded_at_a_fraction_of_it(blip, images):
    """Of 640 px for a model of 32: nearly the vector of all its pixels, which an image of Pillow has."""
    file = io.BytesIO()
    images[2].resize((640, 640), Image.Resampling.BICUBIC).save(file, "JPEG", quality=95)
    found, whole = blip.embed_images([file.getvalue(), Image.open(file).convert("RGB")])
    assert found @ whole > 0.999 and not np.array_equal(found, whole)
    other = blip.embed_images(images[0])
    assert found @ whole > other @ whole + 1e-4, "pictures differ more than that"


def test_every_form_of_an_image_gives_the_same(blip, vqa, clip, forms):
    captions = blip.caption(forms, **SHORT)
    assert len(set(captions)) == 1 and captions[0]
    forms[3].seek(0)
    assert np.ptp(blip.embed_images(forms), axis=0).max() < 1e-6
    forms[3].seek(0)
    assert len(set(vqa.answer(forms, "what is it?", **SHORT))) == 1
    forms[3].seek(0)
    assert np.ptp(clip.embed_images(forms), axis=0).max() < 1e-6


def test_one_image_gives_one_result_and_a_list_a_list(blip, vqa, clip, images):
    assert isinstance(blip.caption(images[0], **SHORT), str)
    assert [type(text) for text in blip.caption(images[:1], **SHORT)] == [str]
    assert blip.caption([]) == []
    assert isinstance(vqa.answer(images[0], "what?", **SHORT), str)
    assert len(vqa.answer(images[:1], "what?", **SHORT)) == 1
    for model in (blip, clip):
        assert model.embed_images(images[0]).shape == model.embed_texts("one").shape == (8,)
        assert model.embed_images(images[:3]).shape == model.embed_texts(TEXTS[:3]).shape == (3, 8)
        assert model.embed_images([]).shape == model.embed_texts([]).shape == (0, 8)
        assert model.embed_images(images[0]).dtype == model.embed_texts("one").dtype == np.float32


def test_a_batch_gives_what_each_gives_alone(blip, vqa, clip, images):
    for options in (SHORT, {"num_beams": 1, **SHORT}):
        together = blip.caption(images, **options)
        assert together == [blip.caption(image, **options) for image in images]
        assert len(set(together)) > 1, "captions differ"
    questions = ["what is it?", "which colour has the thing in the picture?"] * 3
    assert vqa.answer(images, questions, **SHORT) == [
        vqa.answer(image, question, **SHORT) for image, question in zip(images, questions, strict=True)
    ]
    for model in (blip, clip):
        alone = np.stack([model.embed_images(image) for image in images])
        assert np.abs(model.embed_images(images) - alone).max() < 1e-5
        alone = np.stack([model.embed_texts(text) for text in TEXTS])
        assert np.abs(model.embed_texts(TEXTS) - alone).max() < 1e-5
        assert np.ptp(alone, axis=0).max() > 1e-2, "texts differ"
    many = blip.match(images, [TEXTS] * 6)
    for row, image in enumerate(images):
        for column, text in enumerate(TEXTS):
            one = blip.match([image], [text])
            assert many.probability[row, column] == pytest.approx(one.probability[0], abs=1e-5)
            assert many.cosine[row, column] == pytest.approx(one.cosine[0], abs=1e-5)


def test_what_is_sampled_depends_on_the_images_own_seed_alone(blip, images):
    seeds = [3, 1, 4, 15, 92, 65]
    together = blip.caption(images, seeds=seeds, **SAMPLED)
    assert together == [
        blip.caption(image, seeds=[seed], **SAMPLED) for image, seed in zip(images, seeds, strict=True)
    ]
    backwards = blip.caption(images[::-1], seeds=seeds[::-1], **SAMPLED)
    assert backwards[::-1] == together
    assert blip.caption(images, seeds=[seed + 1 for seed in seeds], **SAMPLED) != together


def test_one_seed_gives_each_image_its_own(blip, images):
    first = blip.caption(images, seed=5, **SAMPLED)
    assert first == blip.caption(images, seed=5, **SAMPLED) != blip.caption(images, seed=6, **SAMPLED)
    assert first[:2] == blip.caption(images[:2], seed=5, **SAMPLED), "more images change nothing"
    same = blip.caption([images[0]] * 4, seed=5, **SAMPLED)
    assert len(set(same)) > 1, "equal pictures in one call are sampled apart"
    assert row_seeds(5, 9)[:4] == row_seeds(5, 4) and len(set(row_seeds(5, 9))) == 9
    assert row_seeds(None, 3) != row_seeds(None, 3)
    assert all(0 <= seed < 2**63 for seed in row_seeds(5, 9))


def test_the_prompt_leads_but_is_not_said(blip, images):
    model = blip
    assert model.info["prompt"] == "a picture of ", "what save_pretrained was told comes back"
    own = model.caption(images, **SHORT)
    assert own == model.caption(images, "a picture of ", **SHORT), "None is the model's own"
    assert own != model.caption(images, "", **SHORT), "an empty one is none"
    assert own != model.caption(images, "two dogs and", **SHORT)
    ids = torch.tensor([[101, 1037, 3861, 1997]])  # [CLS] a picture of
    with torch.inference_mode():
        embeds = model.model.encode_image(model.transform(images[0])[None])
        config = GenerationConfig(num_beams=3, **SHORT)
        found = model.model.generate(model.model.decoder_memory(embeds), ids, config)
    assert own[0] == model.tokenizer.decode(found.sequences[0])


def test_several_captions_of_an_image(blip, images):
    three = blip.caption(images[:2], num_return_sequences=3, seeds=[7, 8], **SAMPLED)
    assert [len(texts) for texts in three] == [3, 3] and len(set(three[0])) == 3
    alone = blip.caption(images[0], num_return_sequences=3, seeds=[7], **SAMPLED)
    assert alone == three[0]
    beams = blip.caption(images[0], num_beams=4, num_return_sequences=2, **SHORT)
    assert beams[0] == blip.caption(images[0], num_beams=4, **SHORT) and beams[1] != beams[0]


def test_a_stream_says_what_the_greedy_caption_says(blip, images):
    for image in images[:3]:
        pieces = list(blip.caption_stream(image, max_new_tokens=6))
        assert "".join(pieces) == blip.caption(image, num_beams=1, max_new_tokens=6)
        assert len(pieces) > 2
    sampled = {**SAMPLED, "seed": 11}
    assert "".join(blip.caption_stream(images[0], **sampled)) == blip.caption(images[0], **sampled)


def test_a_stream_joins_apostrophes_again(blip, images):
    ids = blip.tokenizer(["a man's hat'"])["input_ids"][0, 1:]
    pieces = list(blip._pieces(images[0], lambda embeds: iter(ids[:, None])))
    assert "".join(pieces) == blip.tokenizer.decode(ids) and "a man's hat" in "".join(pieces)


def test_a_stream_leaves_the_callers_mode_alone(blip, images):
    stream = blip.caption_stream(images[0])
    next(stream)
    assert not torch.is_inference_mode_enabled()
    (torch.ones(1, requires_grad=True) * 2).backward()


def test_match_takes_one_text_many_texts_or_a_list_per_image(blip, images):
    one = blip.match(images[0], TEXTS[0])
    assert one.probability.shape == one.cosine.shape == (1,)
    assert blip.match(images[0], TEXTS).probability.shape == (4,)
    assert blip.match(images[:3], TEXTS[0]).probability.shape == (3,)
    pairs = blip.match(images[:3], TEXTS[:3])
    table = blip.match(images[:3], [TEXTS] * 3)
    assert pairs.probability.shape == (3,) and table.probability.shape == (3, 4)
    assert pairs.probability == pytest.approx(table.probability.diagonal(), abs=1e-5)
    assert pairs.cosine == pytest.approx(table.cosine.diagonal(), abs=1e-5)
    assert ((table.probability > 0) & (table.probability < 1)).all() and (np.abs(table.cosine) <= 1).all()
    assert np.ptp(table.probability) > 1e-3 and np.ptp(table.cosine) > 1e-3


def test_matches_cosine_is_that_of_the_embeddings(blip, images):
    cosine = blip.embed_images(images[:3]) @ blip.embed_texts(TEXTS).T
    assert blip.match(images[:3], [TEXTS] * 3).cosine == pytest.approx(cosine, abs=1e-5)
    assert np.linalg.norm(blip.embed_texts(TEXTS), axis=1) == pytest.approx(1, abs=1e-5)


def test_match_of_ragged_texts_is_match_of_each(blip, images):
    texts = [TEXTS[:1], TEXTS, []]
    (embeds, _) = next(blip.encoded(images[:3]))
    found = blip.match_ragged(embeds, texts)
    assert [len(one.probability) for one in found] == [1, 4, 0]
    assert found[1].probability == pytest.approx(blip.match(images[1], TEXTS).probability, abs=1e-5)
    assert found[0].cosine == pytest.approx(blip.match(images[0], TEXTS[0]).cosine, abs=1e-5)


def test_a_caption_is_matched_as_blip_cleans_it(blip, images):
    clean, raw = blip.match(images[0], ["a red circle", "A  Red Circle!"]).probability
    assert clean == pytest.approx(raw, abs=1e-6)


def test_several_sequences_still_are_one_answer_per_image(vqa, images):
    alone = vqa.answer(images[:3], "which colour?", num_beams=3, max_new_tokens=3)
    assert (
        vqa.answer(images[:3], "which colour?", num_beams=3, num_return_sequences=2, max_new_tokens=3)
        == alone
    )


def test_answers_from_a_list_are_of_the_list(vqa, images):
    options = ["red", "a green one", "no"]
    assert set(vqa.answer(images, "which?", answers=options)) <= set(options)
    assert vqa.answer(images[0], "which?", answers=["only this"]) == "only this"


def test_localize_gives_a_map_for_each_word_and_a_picture(blip, images):
    pieces = blip.tokens(["a red hippogriff"])["input_ids"].shape[1] - 2
    assert pieces > 3, "one of its words is several word pieces"
    assert blip.localize(images[0], "a red hippogriff").words == ["a", "red", "hippogriff"]
    found = blip.localize(images[0], "a red circle")
    assert found.words == ["a", "red", "circle"]
    assert found.maps.shape == (3, 2, 2) and found.mean.shape == (2, 2)  # 32 pixels in patches of 16
    assert found.maps.min() >= 0 and found.maps.max() == pytest.approx(1) == found.mean.max()
    other = blip.localize(images[2], "a red circle")
    assert not np.allclose(found.maps, other.maps), "it looks at the picture"
    picture = found.picture()
    assert isinstance(picture, Image.Image) and picture.width > 3 * picture.height


def test_bf16_loads_runs_and_says_nearly_the_same(folders, blip, images):
    half = load(folders["blip"], dtype="bf16")
    assert half.model.vision_proj.weight.dtype == torch.bfloat16
    assert all(isinstance(text, str) for text in half.caption(images[:2], **SHORT))
    vectors = half.embed_images(images)
    assert vectors.dtype == np.float32 and np.abs(vectors - blip.embed_images(images)).max() < 0.1
    near = half.match(images[0], TEXTS)
    assert near.probability.dtype == np.float32
    assert np.abs(near.probability - blip.match(images[0], TEXTS).probability).max() < 0.1
    assert half.localize(images[0], "a dog").maps.shape == (2, 2, 2)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Folders as transformers saves them, with a vocabulary of 128 words beside."""
    root = tmp_path_factory.mktemp("theirs")
    words = [f"w{i}" for i in range(128)]
    words[0], words[100], words[101], words[102] = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
    found = {}
    for cls in (BlipForConditionalGeneration, BlipForImageTextRetrieval):
        peer = random_peer(cls, blip_config()).float()
        folder = root / cls.__name__
        peer.save_pretrained(folder)
        (folder / "vocab.txt").write_text("\n".join(words))
        found[cls] = (folder, peer)
    return found


def test_a_transformers_captioner_says_what_it_says_there(theirs, images):
    folder, peer = theirs[BlipForConditionalGeneration]
    model = load(folder)
    pixel_values = torch.stack([model.transform(image) for image in images])
    ids = peer.generate(pixel_values=pixel_values, num_beams=1, max_new_tokens=6)
    mine = model.caption(images, num_beams=1, max_new_tokens=6)
    assert mine == [model.tokenizer.decode(row[1:]) for row in ids] and any(mine)  # theirs begin with [DEC]


def test_a_transformers_retrieval_model_matches_as_it_does_there(theirs, images):
    folder, peer = theirs[BlipForImageTextRetrieval]
    model = load(folder)
    pixel_values = torch.stack([model.transform(image) for image in images[:2]])
    tokens = model.tokenizer(["w3 w5", "w9 w4"])
    grounded = tokens | {"input_ids": tokens["input_ids"].clone()}
    grounded["input_ids"][:, 0] = ENC  # as in the paper; there it is the caller's duty
    with torch.no_grad():
        itm = peer(pixel_values=pixel_values, **grounded).itm_score.softmax(dim=1)[:, 1]
        itc = peer(pixel_values=pixel_values, **tokens, use_itm_head=False).itm_score
    found = model.match(images[:2], ["w3 w5", "w9 w4"])
    assert found.cosine == pytest.approx(itc.diagonal().numpy(), abs=1e-5)
    assert found.probability == pytest.approx(itm.numpy(), abs=1e-5)


def test_a_users_mistake_is_one_useful_line(folders, blip, vqa, clip, images, tmp_path):
    captioner, judge = load(folders["captioner"]), load(folders["filter"])
    image = images[0]
    mistakes = [
        (lambda: blip.caption(image, beams=3), "unknown.* .beams..*num_beams"),
        (lambda: blip.caption(image, num_beams=0), "num_beams 0: must be at least 1"),
        (lambda: blip.caption(image, do_sample=True, seed=-1), "seed"),
        (lambda: blip.caption(images, seeds=[1, 2], do_sample=True), "6 images but 2 seeds"),
        (lambda: list(blip.caption_stream(image, num_beams=2)), "num_beams 2: beam search cannot stream"),
        (lambda: blip.caption(tmp_path / "absent.png"), "absent.png"),
        (lambda: load(folders["blip"], dtype="fp16"), '"fp32", "bf16" or "int8", not \'fp16\''),
        (lambda: load(folders["blip"], batch_size=-1), "batch_size is at least 1, got -1"),
        (lambda: blip.caption(image, max_new_tokens=1000), r"max_new_tokens is at most \d+, got 1000"),
        (lambda: list(blip.caption_stream(image, max_new_tokens=1000)), "max_new_tokens is at most"),
        (
            lambda: vqa.answer(image, "what?", max_new_tokens=1000, min_new_tokens=1000),
            "this model has .* positions",
        ),
        (lambda: load(tmp_path / "absent"), "absent: no such folder"),
        (lambda: load(tmp_path), "no config.json in it"),
        (lambda: judge.caption(image), "captioning: .*Blip"),
        (lambda: judge.caption_stream(image), "captioning: .*Blip"),
        (lambda: captioner.match(image, "a"), "matching: .*Blip"),
        (lambda: captioner.embed_images(image), "embedding: .*Blip"),
        (lambda: captioner.localize(image, "a"), "localisation: .*Blip"),
        (lambda: blip.answer(image, "what?"), "question answering: .*Blip"),
        (lambda: vqa.embed_texts("a"), "embedding: .*BlipVqa"),
        (lambda: clip.match(image, "a"), "matching: .*Clip"),
        (lambda: clip.caption(image), "captioning: .*Clip"),
        (lambda: blip.match(images[:2], TEXTS[:3]), "2 images but 3 texts"),
        (lambda: blip.match([], []), "match: no image"),
        (lambda: blip.match(images[:2], [TEXTS[:1], TEXTS[:2]]), "same number of texts"),
        (lambda: blip.match(image, []), "same number of texts, one or more"),
        (lambda: vqa.answer(images[:3], ["what?", "who?"]), "3 images but 2 questions"),
        (lambda: vqa.answer(image, "what?", answers=[]), "answers"),
        (lambda: blip.localize(image, "..."), "localize: .*no word"),
        (lambda: blip.localize(image, "a dog", layer=9), "layer 9"),
    ]
    for number, (call, line) in enumerate(mistakes):
        with pytest.raises(UserError, match=line) as caught:
            call()
        assert "\n" not in str(caught.value).strip(), number


def test_a_model_without_tokenizer_is_refused(tmp_path):
    from openblip.hub import save_pretrained
    from tests.curate.made import tiny_blip

    save_pretrained(tiny_blip(1).model, tmp_path)
    with pytest.raises(UserError, match="without its tokenizer"):
        load(tmp_path)
