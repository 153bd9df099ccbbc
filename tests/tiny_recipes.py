"""Recipes that end within seconds: random parts in the geometry of `tiny_models`."""

from openblip.models.blip import BlipConfig
from openblip.recipes import Recipe
from openblip.train.config import TrainConfig
from openblip.train.tasks import BlipTaskConfig
from tests.tiny_models import TEXT, VISION


def tiny_recipe(stage: str = "pretrain", steps: int = 3, **changes) -> Recipe:
    """On a frozen tower, whose features are cached; `calibrate` as the quickstart does."""
    train = TrainConfig(max_steps=steps, batch_size=4, lr=1e-3, log_every=1, save_every=None)
    settings = {"augment": None, "workers": 0, "max_length": 12, "calibrate": 8 if stage == "pretrain" else 0}
    return Recipe(
        stage,
        train,
        model=BlipConfig(VISION, TEXT, projection_dim=8, freeze_vision=True),
        task=BlipTaskConfig(queue_size=8, match_ids=True),
        **settings | changes,
    )
