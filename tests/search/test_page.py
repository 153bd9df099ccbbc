"""A page of results shows its pictures, and lets no caption speak HTML."""

import base64
import io
import re

from PIL import Image

from openblip.search.page import results_page
from tests.tiny_models import drawing


def test_every_hit_is_there_with_its_picture_in_order():
    pictures = []
    for number in (0, 1):
        file = io.BytesIO()
        drawing(number).save(file, "PNG")
        pictures.append(file.getvalue())
    hits = [
        {"id": "first.png", "score": 2.5, "cosine": 0.25, "captions": ["a <b>red</b> circle"]},
        {"id": "second.png", "score": 1.5, "cosine": 0.125},
        {"id": "gone.png", "score": 0.5, "cosine": 0.5, "captions": []},
    ]
    page = results_page("“<red>”", hits, [*pictures, None], subtitle="3 pictures")
    assert "<b>" not in page and "&lt;red&gt;" in page and "a &lt;b&gt;red" in page
    assert page.index("first.png") < page.index("second.png") < page.index("gone.png")
    shown = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', page)
    colours = []
    for one in shown:
        image = Image.open(io.BytesIO(base64.b64decode(one))).convert("RGB")
        colours.append(image.getpixel((image.width // 2, image.height // 2)))
    red, green, grey = colours
    assert red[0] > 200 and red[1] < 60 and green[1] > 100 and green[0] < 60
    assert max(grey) - min(grey) < 5, "of a picture that is gone there is a grey one"
    assert "score 2.500, cosine 0.250" in page
