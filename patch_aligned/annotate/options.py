"""Options of the annotation commands, each stated once: name, type, default and help. Imports no torch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import typer

Resample = Literal["bilinear", "bicubic"]
PromptJoin = Literal[", ", ". "]
LabelMode = Literal["phrase", "best_tag"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Engine = Literal["local", "torchrun", "ray"]
TaggerName = Literal["ram", "file", "captions", "vlm"]
SegmenterName = Literal["gdino+sam", "sam3"]
_OPTIONS_OF_TAGGERS = {"ram": ("ram", "ram_tag_list", "ram_thresholds"), "file": ("phrases",), "vlm": ("vlm",)}

REVISION_HELP = "On the hub. Default: the pinned commit of the default model, `main` of another."
DETECTOR = "IDEA-Research/grounding-dino-tiny"
SAM = "facebook/sam-vit-huge"
SAM3 = "facebook/sam3"
SAM3_LICENCE = "gated: ask for them under the SAM License at https://huggingface.co/facebook/sam3, then `hf auth login`"
SAM3_BOX_THRESHOLD = 0.5  # as transformers' examples of SAM 3 have it

_model = partial(typer.Option, rich_help_panel="Models")
_choice = partial(typer.Option, rich_help_panel="Which boxes become regions")
work_option = partial(typer.Option, rich_help_panel="How the work is done")


class CandidateThresholds(NamedTuple):
    """What a candidate's score, and a token's score in it, has to exceed to be kept."""

    box: float = 0.15
    text: float = 0.15


def _defaults_of(context: typer.Context, segmenter: SegmenterName) -> SegmenterName:
    """Give the options that are not named the defaults of a segmenter, whose scores are numbers of their own."""
    if segmenter == "sam3":
        context.default_map = {"box_threshold": SAM3_BOX_THRESHOLD}
    return segmenter


@dataclass(frozen=True)
class ModelOptions:
    """The models, how they are run, and what is kept of their results."""

    tagger: Annotated[TaggerName, _model(help="What gives phrases: RAM, `--phrases`, captions or `--vlm`.")] = "ram"
    segmenter: Annotated[
        SegmenterName,
        _model(is_eager=True, callback=_defaults_of, help="What finds them: Grounding DINO and SAM, or SAM 3."),
    ] = "gdino+sam"
    ram: Annotated[Path | None, _model(metavar="FILE", help="Weights of RAM or RAM++ (.pth).")] = None
    ram_tag_list: Annotated[Path | None, _model(metavar="FILE", help="RAM's ram_tag_list.txt.")] = None
    ram_thresholds: Annotated[Path | None, _model(metavar="FILE", help="RAM's ram_tag_list_threshold.txt.")] = None
    resample: Annotated[Resample, _model(help="Filter that resizes images for RAM.")] = "bilinear"
    detector: Annotated[str, _model(help="Grounding DINO or MM Grounding DINO: folder or name on the hub.")] = DETECTOR
    detector_revision: Annotated[str | None, _model(metavar="COMMIT", help=REVISION_HELP)] = None
    sam: Annotated[str, _model(help="SAM or SAM 2: folder or name on the hub.")] = SAM
    sam_revision: Annotated[str | None, _model(metavar="COMMIT", help=REVISION_HELP)] = None
    sam3: Annotated[str, _model(help=f"SAM 3: folder or name on the hub. Its weights are {SAM3_LICENCE}.")] = SAM3
    sam3_revision: Annotated[str | None, _model(metavar="COMMIT", help=REVISION_HELP)] = None
    phrases: Annotated[Path | None, _model(metavar="FILE", help="A record an image, for `--tagger file`.")] = None
    spacy: Annotated[str, _model(help="Pipeline of spaCy, for `--tagger captions`.")] = "en_core_web_sm"
    vlm: Annotated[str | None, _model(help="Image-text model: folder, name on the hub or on `--vlm_url`.")] = None
    vlm_revision: Annotated[str | None, _model(metavar="COMMIT", help=REVISION_HELP)] = None
    vlm_url: Annotated[str | None, _model(help="OpenAI-compatible server, as http://localhost:8000/v1 of vLLM.")] = None
    mask_threshold: Annotated[float, _choice(min=0, max=1, help="SAM 3: of the probability of a mask's pixels.")] = 0.5
    presence_threshold: Annotated[float, _choice(min=0, max=1, help="SAM 3: least presence of a phrase.")] = 0.0
    prompt_join: Annotated[PromptJoin, _choice(metavar="', '|'. '", help="What joins the tags of a prompt.")] = ", "
    candidate_box_threshold: Annotated[
        float, _choice(min=0, max=1, help="Boxes with a higher score are kept as candidates, for reselect.")
    ] = CandidateThresholds().box
    candidate_text_threshold: Annotated[
        float, _choice(min=0, max=1, help="Tokens with a higher score are kept with their candidate.")
    ] = CandidateThresholds().text
    segment_candidates: Annotated[
        bool,
        _choice("--segment-candidates", help="Make masks for all candidates, so that reselect may choose any. Slower."),
    ] = False
    dtype: Annotated[Dtype, work_option(help="`auto`: bfloat16 on a GPU, float32 on a CPU.")] = "auto"

    @property
    def candidate_thresholds(self) -> CandidateThresholds:
        """Both thresholds of candidates."""
        return CandidateThresholds(self.candidate_box_threshold, self.candidate_text_threshold)

    def resolved(self) -> ModelOptions:
        """The same with absolute paths, for a process elsewhere; `ValueError` where the tagger lacks an option."""
        needed = _OPTIONS_OF_TAGGERS.get(self.tagger, ())
        if not all(getattr(self, name) for name in needed):
            listed = ", ".join(f"--{name}" for name in needed)
            raise ValueError(f"{listed}: not all are given. `patch-aligned models fetch` gets the files of RAM")
        paths = ("ram", "ram_tag_list", "ram_thresholds", "phrases")
        names = (*paths, "detector", "sam", "sam3", *(() if self.vlm_url else ("vlm",)))
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        found = {name: Path(value).resolve() for name, value in given.items() if value and Path(value).exists()}
        return replace(self, **given | {name: path if name in paths else str(path) for name, path in found.items()})


@dataclass(frozen=True)
class Selection:
    """How candidates are chosen and named. The defaults are the reference recipe's."""

    box_threshold: Annotated[
        float, _choice(help=f"A box becomes a region only if its score is higher. SAM 3: {SAM3_BOX_THRESHOLD}.")
    ] = 0.25
    text_threshold: Annotated[float, _choice(help="Tokens with a higher score are in the phrase.")] = 0.2
    nms_iou: Annotated[float, _choice(help="Of two boxes (SAM 3: masks) of a higher IoU the better is kept.")] = 0.5
    label_mode: Annotated[
        LabelMode,
        _choice(
            metavar="phrase|best_tag",
            help="How to label a region: the phrase that the detector matched (the best tag where there is none), or "
            "always the best tag.",
        ),
    ] = "phrase"
    min_box_area_px: Annotated[float, _choice(help="Smallest area of a box within the image, in pixels.")] = 1.0

    def __post_init__(self) -> None:
        for name in ("box_threshold", "text_threshold", "nms_iou"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}: found {value}, expected 0 to 1")
        if not self.min_box_area_px >= 0:
            raise ValueError(f"min_box_area_px: found {self.min_box_area_px}, expected 0 or more")

    def require_within(self, kept: CandidateThresholds) -> None:
        """Raise `ValueError` for a threshold below that at which candidates are kept."""
        for name, floor in (("box_threshold", kept.box), ("text_threshold", kept.text)):
            if (value := getattr(self, name)) < floor:
                raise ValueError(
                    f"{name}: found {value}, expected {floor} or more, the threshold at which candidates were kept. "
                    f"Annotate with a lower --candidate_{name}"
                )


@dataclass(frozen=True)
class Workload:
    """How much is done at once, and which images are left out."""

    tag_batch: Annotated[int, work_option(min=1, help="Images tagged at a time.")] = 64
    detect_batch: Annotated[int, work_option(min=1, help="Images of one size detected at a time.")] = 8
    segment_batch: Annotated[int, work_option(min=1, help="Images segmented at a time.")] = 8
    chunk: Annotated[
        int,
        work_option(min=1, help="Decoded images in memory, in each chunk. One of 12 megapixels takes 36 MB: then 32."),
    ] = 256
    chunks_at_once: Annotated[
        int, work_option(min=1, help="One is on the device while the others are prepared: more if a GPU waits.")
    ] = 2
    decode_workers: Annotated[int, work_option(min=1, help="Threads that decode.")] = 8
    min_side: Annotated[int, work_option(min=1, help="Images with a shorter side (pixels) are skipped.")] = 16
    max_aspect: Annotated[float, work_option(min=1, help="Images that are narrower are skipped.")] = 10.0
    on_error: Annotated[
        Literal["skip", "fail"], work_option(help="Record images that fail, or stop after their shard.")
    ] = "skip"
    allow_missing: Annotated[
        bool,
        work_option(
            "--allow-missing", help="Record shards none of whose images exists, instead of stopping: all are lost."
        ),
    ] = False


def with_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a typer command one option for each field of its parameters that are dataclasses.

    A parameter annotated `Annotated[dict[str, Any], Class]` takes the same options and holds those that were given.
    """
    groups: dict[str, tuple[Any, bool]] = {}
    options: list[inspect.Parameter] = []
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        parts = get_args(parameter.annotation)
        are_changes = parts[:1] == (dict[str, Any],)
        group = parts[1] if are_changes else parameter.annotation
        if is_dataclass(group):
            groups[parameter.name] = group, are_changes
            options += _options_of(group, are_changes)
        else:
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))

    @functools.wraps(command)
    def wrapped(context: typer.Context, **values: Any) -> Any:
        for name, (group, are_changes) in groups.items():
            own = {field.name: values.pop(field.name) for field in fields(group)}
            given = {option: value for option, value in own.items() if value is not None}
            values[name] = given if are_changes else group(**own)
        return command(context, **values)

    wrapped.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {option.name: option.annotation for option in options}
    return wrapped


def _options_of(group: Any, are_changes: bool) -> Iterator[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        hint, default = hints[field.name], field.default
        if are_changes:
            kind, option = get_args(hint)
            hint, default = Annotated[kind | None, option], None
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, annotation=hint, default=default)
