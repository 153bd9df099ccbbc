"""Named training recipes: functions that return a full `Recipe`. A variant calls another and changes fields.

The papers' own recipes bear the models' names; those with "small" in theirs train on a laptop's CPU from real
pretrained parts.
"""

from collections.abc import Callable

from openblip.config import UserError
from openblip.recipes import blip, blip2, blip3
from openblip.recipes.recipe import Augment, Language, Recipe, Stage

__all__ = ["RECIPES", "Augment", "Language", "Recipe", "Stage", "recipe_named"]

RECIPES: dict[str, Callable[[], Recipe]] = {
    function.__name__: function
    for function in (
        *(blip.clip_b16, blip.blip_base, blip.blip_large, blip.retrieval_coco, blip.retrieval_flickr),
        *(blip.caption_coco, blip.vqa_v2, blip.nlvr2),
        *(blip2.blip2_stage1, blip2.blip2_stage2, blip2.instructblip),
        *(blip2.blip2_retrieval_coco, blip2.blip2_caption_coco),
        *(blip2.blip2_stage1_small, blip2.blip2_retrieval_small, blip2.blip2_stage2_small, blip2.blip2_small),
        *(blip2.blip2_stage1_short, blip2.blip2_stage1_short_without_itg),
        *(blip2.blip2_stage2_short, blip2.blip2_stage2_short_alone),
        *(blip3.xgenmm_pretrain, blip3.xgenmm_sft, blip3.xgenmm_dpo),
        *(blip3.xgenmm_safety, blip3.xgenmm_video),
        *(blip3.blip3_small_pretrain, blip3.blip3_small_sft, blip3.blip3_small_dpo),
        *(blip3.blip3_small_anyres, blip3.blip3_small_fixed, blip3.blip3_small_fixed_sampling),
        blip3.blip3_small_conditioned,
        *(blip.small_pretrain, blip.small_retrieval, blip.small_caption, blip.small_vqa),
    )
}


def recipe_named(name: str) -> Recipe:
    """The recipe called `name`. Raises UserError that lists them if there is none."""
    if name not in RECIPES:
        raise UserError(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]()
