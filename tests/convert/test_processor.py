"""A folder we write for transformers does there what our model does here: its auto classes load it, its processor
makes the same ids and pixels, its generation the same tokens, its logits the same numbers.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from openblip import api
from openblip.config import UserError
from openblip.convert.processor import image_processor
from openblip.data.prompts import LmTokenizer
from openblip.data.transforms import ImageTransform
from openblip.hub import Pretrained, load_pretrained, save_for_transformers, save_pretrained
from openblip.models.blip import without_decoder, without_encoder
from openblip.models.blip2 import without_decoder as without_itg
from openblip.models.blip2_llm import Blip2Llm
from tests.data.test_prompts import byte_level, sentence_piece
from tests.parity.peers import TOLERANCE, norms_that_do_not_round
from tests.tiny_models import VISION, drawing, save_blip, save_blip2, save_blip2_llm, save_clip, save_vqa

TOWER = replace(
    VISION, final_norm=False, layer_norm_eps=1e-5
)  # BLIP-2's, all of whose norms have one epsilon
WORDS = ["a dog on a beach", "what's that, a man's hat?", "2 cats"]


def save(kind: str, folder: Path) -> Path:
    """A tiny random model of a kind in a folder of ours."""
    source, _, lm = kind.rpartition(" ")
    if kind in ("captioner", "retrieval"):
        return save_blip(folder)
    if kind in ("vqa", "clip"):
        return {"vqa": save_vqa, "clip": save_clip}[kind](folder)
    if kind == "blip-2 retrieval":
        return save_blip2(folder, vision=TOWER)
    changes = {"word_embed_proj_dim": 16} if lm == "opt" else {}
    return save_blip2_llm(folder, lm, instruct=source == "instruct", heads=False, vision=TOWER, **changes)


def taken(kind: str, found: Pretrained) -> Pretrained:
    """The half of a model that transformers has a class for."""
    halves = {"captioner": without_encoder, "retrieval": without_decoder, "blip-2 retrieval": without_itg}
    return replace(found, model=halves[kind](found.model)) if kind in halves else found


CLASSES = {
    "captioner": "BlipForConditionalGeneration",
    "retrieval": "BlipForImageTextRetrieval",
    "vqa": "BlipForQuestionAnswering",
    "clip": "CLIPModel",
    "blip-2 retrieval": "Blip2ForImageTextRetrieval",
    "blip-2 opt": "Blip2ForConditionalGeneration",
    "blip-2 t5": "Blip2ForConditionalGeneration",
    "blip-2 llama": "Blip2ForConditionalGeneration",
    "instruct llama": "InstructBlipForConditionalGeneration",
    "instruct t5": "InstructBlipForConditionalGeneration",
}
TALKERS = [kind for kind, name in CLASSES.items() if name.endswith("2ForConditionalGeneration")] + [
    kind for kind in CLASSES if kind.startswith("instruct")
]
WRITERS = ["captioner", "vqa", *TALKERS]


class Both:
    """A model of ours, its folder for transformers, and what transformers loads from there."""

    def __init__(self, kind: str, folder: Path) -> None:
        self.kind, self.folder = kind, folder / "theirs"
        self.found = taken(kind, load_pretrained(save(kind, folder / "ours")))
        self.notes = save_for_transformers(self.found, self.folder)
        save_pretrained(
            self.found.model, folder / "half", tokenizer=self.found.tokenizer, transform=self.found.transform,
            info=self.found.info, lm_tokenizer=self.found.lm_tokenizer,
        )  # fmt: skip
        self.ours = api.load(folder / "half", device="cpu")
        self.processor = AutoProcessor.from_pretrained(self.folder)
        self.image = folder / "it.png"
        drawing(12, side=48).resize((57, 40)).save(self.image)

    def theirs(self, dtype: torch.dtype = torch.float32):
        cls = getattr(transformers, CLASSES[self.kind])
        model, told = cls.from_pretrained(self.folder, dtype=dtype, output_loading_info=True)
        assert not any(told.values()), told
        return model.eval()

    def inputs(self, text: str | list[str], **options) -> dict[str, Tensor]:
        images = [Image.open(self.image).convert("RGB")] * (1 if isinstance(text, str) else len(text))
        return dict(self.processor(images=images, text=text, return_tensors="pt", **options))

    def written(self, monkeypatch, call, *arguments, **options) -> list[list[int]]:
        """The ids that a call of our api writes."""
        seen, write = [], self.ours.model.generate

        def generate(*args, **named):
            seen.append(write(*args, **named))
            return seen[-1]

        with monkeypatch.context() as patch:
            patch.setattr(self.ours.model, "generate", generate)
            self.said = getattr(self.ours, call)(*arguments, **options)
        return seen[0].sequences.tolist()


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    made: dict[str, Both] = {}

    def get(kind: str) -> Both:
        if kind not in made:
            made[kind] = Both(kind, tmp_path_factory.mktemp("both"))
        return made[kind]

    return get


OPTIONS = {"greedy": {"num_beams": 1}, "beams": {"num_beams": 4, "length_penalty": 0.5}}
PROMPTS = {"captioner": ["", "a photo of"], "vqa": ["what's the colour?", "is it a dog"]}


@pytest.mark.parametrize("how", OPTIONS)
@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_written_about_an_image_is_the_same(both, kind, how, monkeypatch):
    it = both(kind)
    options = {**OPTIONS[how], "max_new_tokens": 12, "min_new_tokens": 1}
    model = AutoModelForImageTextToText.from_pretrained(it.folder).eval() if kind != "vqa" else it.theirs()
    assert type(model).__name__ == CLASSES[kind]
    said = []
    for text in PROMPTS.get(kind, ["", "a photo of", "Question: what? Short answer:"]):
        call = ("answer", it.image, text) if kind == "vqa" else ("caption", it.image, text)
        mine = it.written(monkeypatch, *call, **options)[0]
        inputs = it.inputs(text)
        told = model.generate(**inputs, do_sample=False, **options)[0].tolist()
        begun = {"vqa": 1, "captioner": inputs["input_ids"].shape[1] - 1}.get(
            kind, inputs["input_ids"].shape[1]
        )
        told = told[1 if kind.endswith("t5") else begun :]
        assert len(mine) >= len(told) > 2 and told == mine[: len(told)]
        assert set(mine[len(told) :]) <= {0, 1, 2}, "padding"
        said.append(mine)
    assert len({tuple(ids) for ids in said}) > 1, "the words have a say"
    decoded = it.processor.decode(told, skip_special_tokens=True)
    assert kind in TALKERS or decoded.strip() == it.said


@torch.no_grad()
def logits(it: Both, pixels: Tensor, texts: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What ours and theirs compute in float64 of the same pixels and of the ids of their processor."""
    ours, theirs = it.found.model.double(), it.theirs(torch.float64)
    inputs = {name: value for name, value in it.inputs(texts, padding=True).items() if name != "pixel_values"}
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    embeds = ours.encode_image(pixels)
    if it.kind == "clip":
        cosines = ours.image_features(embeds) @ ours.text_features(ids, mask).T * ours.clamped_scale()
        return {"all": cosines}, {"all": theirs(pixel_values=pixels, **inputs).logits_per_image}
    if it.kind == "captioner":
        memory = ours.memory(embeds)
        mine = ours.lm_logits(ours.lm_states(memory, ids, mask))
        dec = {**inputs, "input_ids": torch.cat([ids.new_full((len(ids), 1), 30522), ids[:, 1:]], dim=1)}
        return {"all": mine[mask.bool()]}, {"all": theirs(pixel_values=pixels, **dec).logits[mask.bool()]}
    if it.kind == "vqa":
        said = it.found.tokenizer(["red", "a", "blue"])["input_ids"]
        memory = ours.question_memory(embeds, ids, mask)
        mine = ours.lm_logits(ours.lm_states(memory, said, torch.ones_like(said)))
        said[:, 0] = 30522
        told = []
        for one in range(len(ids)):  # for itself: their decoder looks at the padding of a question
            seen = theirs.vision_model(pixels[one : one + 1])[0]
            asked = theirs.text_encoder(ids[one : one + 1, mask[one].bool()], encoder_hidden_states=seen)[0]
            told.append(theirs.text_decoder(said[one : one + 1], encoder_hidden_states=asked).logits)
        return {"all": mine}, {"all": torch.cat(told)}
    if it.kind == "retrieval":
        memory, similar = ours.memory(embeds), ours.image_features(embeds) @ ours.text_features(ids, mask).T
        mine = {"itm": ours.itm_logits(memory, ids, mask), "itc": similar}
        itc = theirs(pixel_values=pixels, **inputs, use_itm_head=False).itm_score
        ids[:, 0] = it.processor.tokenizer.convert_tokens_to_ids("[ENC]")  # as the card says
        return mine, {"itm": theirs(pixel_values=pixels, **inputs).itm_score, "itc": itc}
    queries = it.processor.num_query_tokens
    words, real = ids[:, queries:], mask[:, queries:]
    if it.kind == "blip-2 retrieval":
        mine = {"itm": ours.itm_logits(ours.memory(embeds), words, real)}
        mine["itc"] = ours.similarity(ours.image_features(embeds), ours.text_features(words, real))
        told = [
            theirs(pixel_values=pixels, **inputs, use_image_text_matching_head=head) for head in (True, False)
        ]
        return mine, {"itm": told[0].logits_per_image, "itc": told[1].logits_per_image}
    read = [
        inputs[f"qformer_{name}"] for name in ("input_ids", "attention_mask") if f"qformer_{name}" in inputs
    ]
    soft = ours.soft_prompt(embeds, *read)
    if ours.lm.is_encoder_decoder:
        labels = torch.tensor([[70, 71, 72, 2]]).repeat(len(ids), 1)
        mine = ours.lm_logits(ours.lm_states(soft, words, real, labels))
        return {"all": mine}, {"all": theirs(pixel_values=pixels, **inputs, labels=labels).logits}
    assert bool(real.all()), "texts of one length: a causal model that is trained is not padded on the left"
    mine = ours.lm_logits(ours.lm_states(soft, words, real, words))
    return {"all": mine}, {"all": theirs(pixel_values=pixels, **inputs).logits[:, queries - 1 : -1]}


@pytest.mark.parametrize("kind", CLASSES)
def test_logits_are_the_same(both, kind):
    it = both(kind)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    same = ["a dog.", "2 cats", "a hat?"]
    try:
        with norms_that_do_not_round():
            mine, told = logits(it, pixels, same)
    finally:
        it.found.model.float()
    for name, value in mine.items():
        theirs = told[name][..., : value.shape[-1]]  # but for <image>
        assert value.shape == theirs.shape and (value - theirs).abs().max() < TOLERANCE, name
        assert value.std(dim=0).max() > 1e-3, "image and text have a say"


@pytest.mark.parametrize("kind", CLASSES)
def test_ids_and_pixels_are_the_same(both, kind):
    it = both(kind)
    ours = it.found.transform(Image.open(it.image).convert("RGB"))
    queries = getattr(it.processor, "num_query_tokens", None) or 0
    for text in WORDS:
        inputs = it.inputs(text)
        assert (inputs["pixel_values"][0] - ours).abs().max() < 1e-6
        shown, ids = inputs["input_ids"][0].split([queries, inputs["input_ids"].shape[1] - queries])
        assert set(shown.tolist()) <= {
            json.loads((it.folder / "config.json").read_text()).get("image_token_index")
        }
        if kind in TALKERS:
            assert ids.tolist() == it.found.lm_tokenizer.prompts([text])["input_ids"][0].tolist()
            if kind.startswith("instruct"):
                assert (
                    inputs["qformer_input_ids"].tolist() == it.found.tokenizer([text])["input_ids"].tolist()
                )
            continue
        wanted = it.found.tokenizer([text])["input_ids"][0].tolist()
        begin = it.found.tokenizer.enc_id if kind == "vqa" else wanted[0]
        assert ids.tolist() == [begin, *wanted[1:]]
    padded = it.inputs(WORDS, padding=True)["attention_mask"]
    assert padded[0, queries] == (0 if kind in ("blip-2 opt", "blip-2 llama", "instruct llama") else 1)


@pytest.mark.parametrize("kind", CLASSES)
def test_back_here_it_is_what_it_was_and_stays_so(both, kind, tmp_path):
    it, before = both(kind), both(kind).found
    back = load_pretrained(it.folder)
    assert back.transform == before.transform
    state, again = before.model.state_dict(), back.model.state_dict()
    assert state.keys() == again.keys()
    for name, value in state.items():
        if name == "temperature":  # transformers has no place for it
            continue
        rows = again[name][: len(value)] if "lm.model" in name and value.ndim else again[name]
        assert torch.equal(rows, value), name
    for here, there in ((before.tokenizer, back.tokenizer), (before.lm_tokenizer, back.lm_tokenizer)):
        if here is None:
            assert there is None
        elif isinstance(here, LmTokenizer):
            assert [here.prompts(WORDS)["input_ids"].tolist()] == [there.prompts(WORDS)["input_ids"].tolist()]
            assert (here.end_id, here.pad_id) == (there.end_id, there.pad_id)
        else:
            assert torch.equal(here(WORDS)["input_ids"], there(WORDS)["input_ids"])
    notes = save_for_transformers(back, tmp_path)
    assert not any("row(s) more" in note or "epsilon" in note for note in notes)
    twice = load_pretrained(tmp_path)
    assert twice.model.config == back.model.config and twice.transform == back.transform
    assert all(torch.equal(value, again[name]) for name, value in twice.model.state_dict().items())
    for path in it.folder.glob("*.json"):
        one, two = (json.loads(file.read_text()) for file in (path, tmp_path / path.name))
        for values in (one, two):
            values.pop("image_text_hidden_size", None)  # of heads that a captioner has not
        assert one == two, path.name


@pytest.mark.parametrize("kind", ["blip-2 opt", "blip-2 t5", "instruct llama"])
def test_a_vocabulary_without_room_for_the_image_gets_a_row_that_is_the_mean(both, kind):
    it = both(kind)
    rows = it.found.model.lm.vocab_size
    model = it.theirs()
    assert model.config.image_token_id == rows == len(it.processor.tokenizer) - 1
    assert model.config.text_config.vocab_size == rows + 1
    assert any(f"<image> is token {rows}" in note and "1 row(s) more" in note for note in it.notes)
    words = model.get_input_embeddings().weight
    assert len(words) == rows + 1 and torch.allclose(words[-1], words[:-1].mean(dim=0), atol=1e-6)
    head = model.language_model.get_output_embeddings().weight
    assert len(head) == rows + 1 and torch.allclose(head[-1], head[:-1].mean(dim=0), atol=1e-6)


def test_a_vocabulary_with_room_for_the_image_stays(tmp_path):
    """T5's and OPT's tables have more rows than there are words."""
    found = load_pretrained(save("blip-2 opt", tmp_path / "small"))
    config = found.model.lm.config.config
    larger = save_blip2_llm(
        tmp_path / "ours",
        "opt",
        heads=False,
        vision=TOWER,
        word_embed_proj_dim=16,
        vocab_size=config["vocab_size"] + 7,
    )
    notes = save_for_transformers(load_pretrained(larger), tmp_path / "theirs")
    written = json.loads((tmp_path / "theirs/config.json").read_text())
    assert written["text_config"]["vocab_size"] == config["vocab_size"] + 7
    assert written["image_token_index"] == config["vocab_size"]
    assert any("has a row" in note for note in notes)


def test_what_transformers_cannot_hold_is_written_only_if_it_may_be(tmp_path):
    tower = replace(TOWER, layer_norm_eps=1e-6)  # and the norm behind it 1e-5
    found = load_pretrained(save_blip2_llm(tmp_path / "ours", heads=False, vision=tower))
    with pytest.raises(UserError, match=r"one epsilon .*`approximate`"):
        save_for_transformers(found, tmp_path / "theirs")
    assert any(
        "epsilon" in note for note in save_for_transformers(found, tmp_path / "theirs", approximate=True)
    )
    narrow = load_pretrained(save_blip2_llm(tmp_path / "narrow", "opt", heads=False, vision=TOWER))
    with pytest.raises(UserError, match="hidden_size, 16, and its words have 12"):
        save_for_transformers(narrow, tmp_path / "theirs")
    bart = load_pretrained(save_blip2_llm(tmp_path / "bart", "bart", heads=False, vision=TOWER))
    with pytest.raises(UserError, match="takes a bart for a decoder"):
        save_for_transformers(bart, tmp_path / "theirs")


def test_every_part_of_a_model_is_in_the_folder_though_ours_names_it(tmp_path):
    """A language model by its source, with adapters: what is written is the sum, and answers the same."""
    from openblip.convert.lm import load_lm
    from openblip.models.adapters import LoraSettings
    from openblip.models.blip2_llm import Blip2LlmConfig

    plain = load_pretrained(save("blip-2 llama", tmp_path / "plain"))
    plain.model.lm.model.save_pretrained(tmp_path / "lm")
    plain.lm_tokenizer.save(tmp_path / "lm")
    lm = load_lm(str(tmp_path / "lm"), lora=LoraSettings(rank=2, target_modules=["q_proj", "down_proj"]))
    model = Blip2Llm(Blip2LlmConfig(lm.config, plain.model.config.blip2), lm).eval()
    torch.manual_seed(1)
    for name, weight in model.lm.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    parts = {"transform": plain.transform, "lm_tokenizer": plain.lm_tokenizer}
    save_pretrained(model, tmp_path / "ours", **parts)
    found = load_pretrained(tmp_path / "ours")
    save_for_transformers(found, tmp_path / "theirs")
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "theirs").eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        wanted, got = model.lm.model(ids).logits, theirs.language_model(ids).logits[..., :-1]
        assert (got - plain.model.lm.model(ids).logits).abs().max() > 0.01, "the adapters do something"
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert found.model.lm.config.lora is not None, "and ours is what it was"


def test_a_model_alone_is_written_without_what_it_came_without(tmp_path):
    found = load_pretrained(save("blip-2 opt", tmp_path / "ours"))
    assert save_for_transformers(found.model, tmp_path / "theirs") == []
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == [
        "README.md", "config.json", "generation_config.json", "model.safetensors",
    ]  # fmt: skip
    assert json.loads((tmp_path / "theirs/generation_config.json").read_text())["eos_token_id"] == 203


@pytest.mark.parametrize(
    "transform",
    [
        ImageTransform(32),
        ImageTransform(24, resize="crop"),
        ImageTransform(24, resize="crop", resize_size=32),
        ImageTransform(24, resize_size=32, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7)),
        ImageTransform(32, interpolation="bilinear"),
    ],
)
def test_their_image_processor_does_what_our_transform_does(transform, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(image_processor(transform)))
    theirs = AutoImageProcessor.from_pretrained(tmp_path)
    for size in ((57, 40), (31, 90)):
        image = drawing(20, side=60).resize(size)
        pixels = theirs(image, return_tensors="pt")["pixel_values"][0]
        assert (pixels - transform(image)).abs().max() < 1e-6
    # The class without "Pil": with torchvision, transformers takes that one of the pair.
    assert theirs.__class__.__name__ == image_processor(transform)["image_processor_type"] + "Pil"


@pytest.mark.parametrize(
    ("words", "begin", "end"),
    [
        (LmTokenizer(byte_level(start="<s>"), "vicuna"), [2], []),
        (LmTokenizer(byte_level(start="<s>"), "llama"), [0], []),
        (LmTokenizer(sentence_piece(), "t5", encoder_decoder=True), [], [1]),
    ],
    ids=["vicuna begins with </s>", "llama", "t5"],
)
def test_a_text_has_the_ends_that_it_has_here(words, begin, end, tmp_path):
    from openblip.convert.processor import save_processor

    config = {"model_type": "blip-2", "architectures": ["Blip2Model"]}
    save_processor(tmp_path, config, None, None, words)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a dog")["input_ids"] == [*begin, *words.encode("a dog"), *end]
    assert theirs("a dog")["input_ids"] == words.prompts(["a dog"])["input_ids"][0].tolist()
    assert theirs.convert_tokens_to_ids("<image>") == len(theirs) - 1


def test_a_chat_template_comes_along(both):
    it = both("blip-2 llama")
    talk = [{"role": "user", "content": "hello"}]
    assert it.processor.tokenizer.apply_chat_template(talk, tokenize=False) == it.found.lm_tokenizer.render(
        talk, answer=False
    )


def test_the_long_instruction_loses_its_beginning_there_too(both):
    it = both("instruct llama")
    text = " ".join(f"w{number}" for number in range(200))
    theirs = it.processor.qformer_tokenizer(text, truncation=True)["input_ids"]
    assert theirs == it.found.tokenizer([text], 128, keep="end")["input_ids"][0].tolist()


def test_the_card_says_how_to_load_it_and_under_which_licence(both, tmp_path):
    it = both("retrieval")
    info = {"licence": "bsd-3-clause", "commands": ["openblip train retrieval --data x", "openblip eval y"]}
    save_for_transformers(replace(it.found, info=info), tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: transformers\nlicense: bsd-3-clause\n" in card
    assert "import AutoProcessor, BlipForImageTextRetrieval" in card and "[ENC]" in card
    assert "```bash\nopenblip train retrieval --data x\nopenblip eval y\n```" in card
    captions = (both("captioner").folder / "README.md").read_text()
    assert 'text="a picture of"' in captions, "what its captions begin with"


@pytest.mark.parametrize("kind", CLASSES)
def test_the_code_on_the_card_runs(both, kind, monkeypatch, capsys):
    it = both(kind)
    code = (it.folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("path/to/this/folder", str(it.folder)).replace("a.jpg", str(it.image))
    exec(code, {})
    assert capsys.readouterr().out.strip()
