"""CapFilt in rounds: the model that one round makes is what the next one's captioner and filter begin with.

    web + human ── pre-train ─────────────────────────────────────► model 0
    round r:  model r-1 ─┬─ fine-tune on human ─► captioner ┐
                         └─ fine-tune on human ─► filter    ┴─ CapFilt over the web pairs
              what is kept + human ── pre-train, from the start ──► model r

The paper does one round (§3.3) and names more of them as a way on (§6). Every round judges the web pairs as they
were found, so a text that a poor filter dropped gets another chance. Every pre-training begins with the same
weights: to go on with the model that saw the noise gains nothing (table 13).

    out/rounds.json    settings             out/round1/report.html, parquet/   what was kept
    out/start          first weights        out/round1/captioner, filter       fine-tuned from round0's model
    out/round0/model   model 0              out/round1/model                   model 1; round.json: its figures

Each step resumes; a finished round is read from its round.json.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from openblip.api import load
from openblip.config import UserError, from_dict, to_dict
from openblip.curate import engine
from openblip.curate.capfilt import CapFilt, CapFiltConfig, check_rule, fit_scale_on
from openblip.curate.dataset import write_parquet
from openblip.curate.engine_ray import RayOptions
from openblip.curate.human import HumanRows, check_enough
from openblip.curate.job import publish, refuse_other
from openblip.curate.report import write_report
from openblip.curate.shard import check_work
from openblip.data.collate import Rows, rows_fingerprint
from openblip.data.rows import Row
from openblip.data.sources import Source, open_source
from openblip.hub import save_pretrained
from openblip.recipes import Recipe
from openblip.recipes.blip import small_caption, small_pretrain, small_retrieval
from openblip.train.ingredients import prepare
from openblip.train.stage import cache_features, run_stage


@dataclass
class RoundsConfig:
    """What every round does in the same way. threshold: of P(match), for a text to be kept.

    held_out: every so many-th human pair is kept out of the filter's training, to fit its scale (`fit_match_scale`),
        which a small filter wants; 0: none, P(match) is that of the ITM head.

    Raises UserError for a recipe of another stage than its field's, or a number that makes no sense.
    """

    pretrain: Recipe = field(default_factory=small_pretrain)
    caption: Recipe = field(default_factory=small_caption)
    retrieval: Recipe = field(default_factory=small_retrieval)
    capfilt: CapFiltConfig = field(default_factory=CapFiltConfig)
    threshold: float = 0.5
    held_out: int = 0

    def __post_init__(self) -> None:
        for stage in ("pretrain", "caption", "retrieval"):
            if (found := getattr(self, stage).stage) != stage:
                raise UserError(f"{stage}: wanted a recipe of this stage, got one of {found!r}")
        check_rule(self.threshold)
        if self.held_out == 1 or self.held_out < 0:
            raise UserError(
                f"held_out {self.held_out}: wanted 2 or more, so that pairs are left, or 0 for none"
            )


def run_rounds(
    web: Source,
    human: Source,
    out: str | Path,
    config: RoundsConfig | None = None,
    *,
    rounds: int = 1,
    model: str | Path | None = None,
    batch_size: int = 32,
    ray: RayOptions | None = None,
    say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Do `rounds` rounds, or what is missing of them; the figures of each: those of its report, and "model".

    Args:
        out: a new folder, or that of an interrupted call or of fewer rounds.
        model: folder or hub name of one pre-trained on the web pairs already, instead of model 0.
        batch_size: pictures at a time, in CapFilt.
        ray: where CapFilt's shards are worked on; None: in this process, where the trainings always are.

    Raises:
        UserError: no round, too few pairs for a batch of a stage, the folder was made with other settings or data, a
            filter that keeps nothing, or whatever a stage refuses.
        KeyboardInterrupt: a training was told to stop; its checkpoint is saved.
    """
    if rounds < 1:
        raise UserError(f"rounds is at least 1, got {rounds}")
    config, out = config or RoundsConfig(), Path(out)
    check_work(batch_size, decoders=1)
    check_enough(config, len(human), len(web))
    given = {"web": web.fingerprint, "human": human.fingerprint, "model": model and str(model)}
    settings = json.loads(json.dumps({**to_dict(config), **given}))
    listed = out / "rounds.json"
    if listed.is_file():
        before = json.loads(listed.read_text(encoding="utf-8"))
        others = {name: before.pop(name) for name in given}
        # Through the class: a setting that is new since then had its default.
        refuse_other({**to_dict(from_dict(RoundsConfig, before, str(listed))), **others}, settings, out)
    out.mkdir(parents=True, exist_ok=True)
    people = HumanRows(human, out / "bad_human_rows.jsonl")
    check_enough(config, len(people), len(web))  # before the folder is bound to these rows
    publish(listed, json.dumps(settings, indent=2).encode())

    everyone = _Joined(web, people)
    held_out = range(0, len(people), config.held_out) if config.held_out else range(0)
    seen = people.part([index for index in range(len(people)) if index not in held_out])
    start = out / "start"
    if not (start / "config.json").is_file():
        made = prepare(config.pretrain, everyone)
        save_pretrained(made.model, start, tokenizer=made.tokenizer, transform=made.transform)
    stages = (config.pretrain, config.caption, config.retrieval)
    features = None
    if model is None and all(stage.model.freeze_vision and stage.augment is None for stage in stages):
        made = prepare(replace(config.pretrain, init=str(start)), everyone)  # one frozen tower: it looks once
        features = cache_features(made, everyone, out / "features", workers=config.pretrain.workers)

    def train(folder: Path, recipe: Recipe, rows: Rows, init: str | Path) -> Path:
        if not (folder / "model/config.json").is_file():
            name, steps = folder.relative_to(out), recipe.train.max_steps
            say(f"{name}: {recipe.stage}, {steps} steps on {len(rows)} rows")
            if run_stage(replace(recipe, init=str(init)), rows, folder, features=features).fit.interrupted:
                raise KeyboardInterrupt
        return folder / "model"

    def one_round(folder: Path, newest: str | Path) -> dict[str, Any]:
        captioner = train(folder / "captioner", config.caption, people, newest)
        judge = load(train(folder / "filter", config.retrieval, seen, newest))
        say(f"{folder.name}: CapFilt over {len(web)} web rows")
        settings = config.capfilt
        if held_out:
            settings = replace(settings, scale=fit_scale_on(judge, people.part(held_out)))
        worker = CapFilt(load(captioner), judge, settings, features=features)
        result = engine.run(worker, web, folder / "job", batch_size=batch_size, ray=ray)
        if result.aside:
            shard, reason = next(iter(result.aside.items()))
            say(
                f"{folder.name}: {len(result.aside)} of {result.shards} shards were put aside ({shard}: {reason})"
            )
        if not (folder / "parquet").exists():
            write_parquet(folder / "job", web, folder / "parquet", threshold=config.threshold, human=people)
        figures = write_report(folder / "job", web, folder / "report.html", threshold=config.threshold)
        made = train(folder, config.pretrain, open_source(folder / "parquet"), start)
        return {**figures, "model": str(made)}

    newest = model or train(out / "round0", config.pretrain, everyone, start)
    found = []
    for number in range(1, rounds + 1):
        folder = out / f"round{number}"
        if not (folder / "round.json").is_file():
            figures = {"round": number, **one_round(folder, newest)}
            publish(folder / "round.json", json.dumps(figures, indent=2).encode())
        found.append(json.loads((folder / "round.json").read_text(encoding="utf-8")))
        kept = {kind: "{kept} of {texts}".format(**found[-1][kind]) for kind in ("web", "synthetic")}
        say(f"round {number}: kept {kept['web']} web texts and {kept['synthetic']} written ones")
        newest = folder / "model"
    return found


@dataclass(frozen=True)
class _Joined:
    """The rows of one, then those of the other."""

    first: Rows
    second: Rows

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, index: int, /) -> Row:
        return self.first[index] if index < len(self.first) else self.second[index - len(self.first)]

    @property
    def fingerprint(self) -> str:
        """Those of both."""
        return f"{rows_fingerprint(self.first)} {rows_fingerprint(self.second)}"
