"""The parts of `benchmarks/gpu.py`: what they measure, against which baseline.

A part imports what it needs itself, so that a package that is missing costs its own rows alone. For another part add a
function to `PARTS`; the whole stays within nine minutes whatever the shares are.
"""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gpu import Report, Row, Status

ROOT = Path(__file__).parents[1]


def gpu_tests(report: Report) -> None:
    """The tests that need a GPU, a row each."""
    import pytest

    class RowPerTest:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                add(report, report.duration)

        def pytest_collectreport(self, report: Any) -> None:
            if report.outcome == "failed":
                add(report, None)

    def add(outcome: Any, seconds: float | None) -> None:
        status: dict[str, Status] = {"passed": "ok", "failed": "failed", "skipped": "skipped"}
        why = outcome.longrepr[2] if isinstance(outcome.longrepr, tuple) else str(outcome.longrepr or "")
        report.say(status[outcome.outcome], outcome.nodeid, why.strip().split("\n")[-1], seconds)

    os.chdir(ROOT)
    # Only files that have such tests: the others import what a bare machine lacks.
    files = [str(path) for path in sorted(ROOT.glob("tests/**/test_*.py")) if "pytest.mark.gpu" in path.read_text()]
    pytest.main(["-m", "gpu", "-q", "-p", "no:cacheprovider", *files], plugins=[RowPerTest()])


def stage_1(report: Report) -> None:
    """A step of stage 1, in which the projector is trained, with the patch loss and without."""
    import torch
    from measured_models import batch_of_transformers, loss_of_all_logits, random_model_of_transformers, to_device
    from stage1_step import plugin_alone, random_weights

    size = 2 if report.is_tiny else 32
    model, plugin, batch = random_weights("tiny" if report.is_tiny else "7b", size, report.device)
    batch = to_device(batch, report.device)
    optimizer = torch.optim.AdamW(model.get_model().mm_projector.parameters(), lr=1e-3, fused=True)
    forward, tower = forward_flop(model.train(), batch)
    step = partial(training_step, model, optimizer, batch)
    # Weights of the LLM are frozen: the gradients of its inputs cost what the forward pass costs.
    timed = partial(report.time, count=size, unit="images/s", flop=2 * forward - tower)
    model.supervised_loss = partial(loss_of_all_logits, model)
    plain = timed("plain: logits at all positions, no patch loss", step, detail="gradient checkpointing")
    del model.supervised_loss
    timed("logits at supervised positions", step, against=plain, detail="gradient checkpointing")
    model.attach_plugin(plugin)
    ours = timed("the same with the patch loss", step, against=plain, detail="gradient checkpointing")
    if ours and ours.seconds:
        alone = report.time("the patch loss alone, with gradients", partial(plugin_alone, plugin), size, "images/s")
        if alone and alone.seconds:
            report.say("ok", "share of the patch loss in a step", f"{alone.seconds / ours.seconds:.3%}")
    model.gradient_checkpointing_disable()
    timed("with the patch loss, activations kept", step, against=plain, detail="no gradient checkpointing")
    del model, optimizer, step, plugin
    theirs = random_model_of_transformers("tiny" if report.is_tiny else "7b", report.device).train()
    theirs.requires_grad_(False)
    trained = theirs.model.multi_modal_projector.requires_grad_(True).parameters()
    theirs.gradient_checkpointing_enable({"use_reentrant": False})
    batch = batch_of_transformers(batch, theirs.config.image_token_index, theirs.config.image_seq_length)
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    step = partial(training_step, theirs, optimizer, batch)
    timed("transformers' own LLaVA", step, against=plain, detail="gradient checkpointing, no patch loss")


def stage_2(report: Report) -> None:
    """A step of stage 2, in which LLM and projector are trained."""
    import torch
    from measured_models import loss_of_all_logits, ragged, random_batch, random_model, to_device

    size, text_tokens = (2, 32) if report.is_tiny else (16, 256)
    model = random_model("tiny" if report.is_tiny else "7b", report.device)
    model.get_vision_tower().requires_grad_(False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = to_device(random_batch(model, size, text_tokens, prompt_tokens=text_tokens // 2), report.device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Its states are in bfloat16, as the weights are: 27 GB at 7B, where float32 ones and float32 weights take 81 GB.
    optimizer = torch.optim.AdamW(trained, lr=2e-5, fused=True)
    forward, tower = forward_flop(model.train(), batch)
    step = partial(training_step, model, optimizer, batch)
    timed = partial(report.time, count=size, unit="images/s", flop=3 * forward - 2 * tower)
    states = "AdamW with states in bfloat16"
    model.supervised_loss = partial(loss_of_all_logits, model)
    plain = timed("plain: logits at all positions", step, detail=f"gradient checkpointing, {states}")
    del model.supervised_loss
    timed("logits at supervised positions", step, against=plain, detail=f"gradient checkpointing, {states}")
    model.gradient_checkpointing_disable()
    timed("the same, activations kept", step, against=plain, detail=f"no gradient checkpointing, {states}")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    step = partial(training_step, model, optimizer, ragged(batch, text_tokens // 2))
    timed = partial(report.time, count=size, unit="images/s", detail="gradient checkpointing, half of the text to all")
    padded = timed("rows of many lengths, padded", step)
    model.get_model().packs_samples = True
    timed("the same, packed (--pack_samples)", step, against=padded)


def vlm_step(report: Report) -> None:
    """A step of a model of transformers whose projector is trained, with the patch loss and without."""
    from vlm_step import seconds_of, steps_of

    size = 2 if report.is_tiny else 8
    steps = steps_of("tiny" if report.is_tiny else "2b", report.device, size)
    timed = partial(report.time, count=size, unit="images/s")
    detail = f"{steps.visual_tokens // size} visual tokens an image" + ", gradient checkpointing" * (not report.is_tiny)
    plain = timed("plain: captions alone", steps.captions, detail=detail)
    ours = timed("with the patch loss", steps.aligned, against=plain, detail=detail)
    hook = timed("the hook alone, with gradients", steps.hook, repeats=10)
    collator = seconds_of(steps.collator, 10, "cpu")
    report.measured("what the collator adds, on one core", collator, size, "images/s", None)
    if ours and ours.seconds and hook and hook.seconds:
        share = (hook.seconds + collator) / ours.seconds
        report.say("ok", "share of hook and collator in a step", f"{share:.3%}")


def training_step(model: Any, optimizer: Any, batch: dict[str, Any]) -> None:
    """Forward, backward and update, after gradients are dropped that a step without enough memory may have left."""
    optimizer.zero_grad()
    output = model(**batch)
    losses = getattr(output, "auxiliary_losses", None)  # transformers' own model has none
    patch = losses["patch"] if losses else 0
    (output.loss + 5 * patch).backward()
    optimizer.step()


def forward_flop(model: Any, batch: dict[str, Any]) -> tuple[int, int]:
    """Floating-point operations of the forward pass, and those of the vision tower in it, which needs no gradients."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    inputs = {key: value for key, value in batch.items() if key != "plugin_batch"}
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        model(**inputs)
    with torch.no_grad(), FlopCounterMode(display=False) as tower:
        model.get_vision_tower()(batch["images"])
    return whole.get_total_flops(), tower.get_total_flops()


def patch_loss(report: Report) -> None:
    """The patch loss with its gradients, against a loop over images and regions."""
    import torch
    import torch.nn.functional as F

    from patch_aligned.loss import patch_loss as loss_of
    from patch_aligned.loss import region_cosines, region_embeddings

    images, visual, width = (2, 16, 64) if report.is_tiny else (32, 576, 4096)
    tokens = torch.randn(images, visual, width, dtype=torch.bfloat16, device=report.device, requires_grad=True)
    for regions in (4, 16):
        image_of = torch.arange(images, device=report.device).repeat_interleave(regions)  # [R]
        covered = torch.rand(images * regions, visual, device=report.device) < 0.1  # [R, S]
        covered[:, 0] = True
        labels = torch.randn(images * regions, width, device=report.device)  # [R, D]

        def looped(regions: int = regions, covered: Any = covered, labels: Any = labels) -> Any:
            losses = []
            for image, start in enumerate(range(0, images * regions, regions)):
                own = range(start, start + regions)
                means = torch.stack([tokens[image][covered[region]].float().mean(dim=0) for region in own])
                losses.append(1 - F.cosine_similarity(means, labels[start : start + regions], dim=1).mean())
            return torch.stack(losses).mean()

        def at_once(image_of: Any = image_of, covered: Any = covered, labels: Any = labels) -> Any:
            means = region_embeddings(tokens, image_of, covered)
            return loss_of(region_cosines(means, labels), image_of, images)

        def trained(loss: Callable[[], Any]) -> None:
            tokens.grad = None
            loss().backward()

        detail = f"the loss differs by {abs(looped().item() - at_once().item()):.0e}"
        timed = partial(report.time, count=images, unit="images/s", repeats=10)
        loop = timed(f"plain: loop over {regions} regions an image", partial(trained, looped))
        timed(f"{regions} regions an image at once", partial(trained, at_once), against=loop, detail=detail)


def pursuit(report: Report) -> None:
    """Matching pursuit of an image's tokens at once, against Algorithm 1 token by token."""
    import torch
    from matching_pursuit import ROUNDS, largest_difference, literal_loop, tokens_of_words

    from patch_aligned.analysis.matching_pursuit import Pursuit, WordDictionary, matching_pursuit

    visual, words, width, images, looped = (16, 200, 64, 2, 4) if report.is_tiny else (576, 32000, 4096, 8, 24)
    tokens, units = (tensor.to(report.device) for tensor in tokens_of_words(width, words, visual * images, ROUNDS))
    dictionary = WordDictionary(units)

    def loop() -> list[Any]:
        return [literal_loop(token, units, ROUNDS) for token in tokens[:looped]]

    ids, coefficients = (torch.stack(part) for part in zip(*loop(), strict=True))
    found = matching_pursuit(tokens, dictionary, ROUNDS)
    on_cpu = Pursuit(*(tensor.cpu() for tensor in (found.ids, found.coefficients, found.cosines, found.residual_norms)))
    other, gap = largest_difference(on_cpu, ids, coefficients)
    detail = f"{other} of {looped} tokens get other words; coefficients differ by {gap:.0e}"
    plain = report.time("plain: Algorithm 1, token by token", loop, looped, "tokens/s")
    for some in (tokens[:visual], tokens):
        run = partial(matching_pursuit, some, dictionary, ROUNDS)
        report.time(f"{len(some)} tokens at once", run, len(some), "tokens/s", plain, detail=detail)


def masks(report: Report) -> None:
    """Covered tokens of regions from run lengths, on one core, against decoding the masks alone."""
    from mask_tokens import GRID, compare

    found = compare(2, repeats=1) if report.is_tiny else compare()
    detail = f"{found.differing} of {found.regions * GRID**2} coverages differ from the decoded mask's"
    add = partial(report.measured, count=found.regions, unit="regions/s")
    plain = add("plain: decoding the mask alone", found.decode_s, against=None)
    add("exact coverage from run lengths", found.cover_s, against=plain, detail=detail)
    add("where each image has a size not seen before", found.cover_new_sizes_s, against=plain, detail=detail)


def answering(report: Report) -> None:
    """Answers a second in batches, against upstream's loop of one question at a time."""
    from answering import one_by_one
    from measured_models import byte_tokenizer, random_model
    from PIL import Image

    from llava.conversation import conv_templates
    from llava.eval.answering import GenerationSettings, Question, answer_questions
    from llava.model.builder import LoadedModel

    images, new_tokens = (2, 4) if report.is_tiny else (8, 16)
    model = random_model("tiny" if report.is_tiny else "7b", report.device, image_aspect_ratio="pad").eval()
    tokenizer = byte_tokenizer(model.config.vocab_size)
    loaded = LoadedModel(tokenizer, model, model.get_vision_tower().image_processor, 2048)
    template, settings = conv_templates["vicuna_v1"], GenerationSettings(max_new_tokens=new_tokens)
    with tempfile.TemporaryDirectory() as folder:
        questions = []  # four in a row about one image, as in POPE
        for number in range(images):
            path = Path(folder) / f"{number}.jpg"
            Image.effect_noise((448, 336), 64).convert("RGB").save(path)
            texts = [f"Is there a {thing} in the image?" for thing in ("dog", "bicycle", "tree", "house")]
            questions += [Question(f"{number} {text}", text, (path,)) for text in texts]

        def batched(size: int, asked: Sequence[Question]) -> list[str]:
            return [answer.text for answer in answer_questions(asked, *loaded[:3], template, settings, batch_size=size)]

        batched(1, questions[:2])  # warms up
        add = partial(report.measured, count=len(questions), unit="answers/s")
        start = time.perf_counter()
        expected = one_by_one(questions, loaded, template, new_tokens)
        plain = add("plain: one question at a time", time.perf_counter() - start, against=None)
        for size in (1, 4, 16):
            start = time.perf_counter()
            found = batched(size, questions)
            seconds = time.perf_counter() - start
            equal = sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
            detail = f"{equal} of {len(questions)} texts equal, of up to {new_tokens} tokens"
            add(f"batch {size}", seconds, against=plain, detail=detail)


def annotation(report: Report) -> None:
    """RAM++, Grounding DINO and SAM in batches, against one image at a time, on scenes of the miniature."""
    import annotate

    from patch_aligned.annotate.manifest import list_images
    from patch_aligned.annotate.options import Workload

    count = 4 if report.is_tiny else 64
    workload = Workload(chunk=count // 2)
    add = partial(report.measured, count=count, unit="images/s")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        annotate.write_scenes(folder / "scenes", count)
        entries, images = list_images(folder / "scenes")
        entries = entries[:count]
        if report.is_tiny:
            exact = fast = annotate.tiny_stages(folder / "models", "cpu")
        else:
            exact, fast = annotate.full_size_stages(report.device)
        plain = None
        for stages in (exact, fast):
            annotate.one_at_a_time(stages, entries[:4], images, folder / "warm.jsonl")
            start = time.perf_counter()
            times = annotate.one_at_a_time(stages, entries, images, folder / "single.jsonl")
            name = f"{'one' if plain else 'plain: one'} at a time, {stages.settings['sam']['dtype']}"
            row = add(name, time.perf_counter() - start, against=plain, detail=by_stage(times))
            plain = plain or row
        annotate.timed_shard(fast, entries[: count // 2], images, folder / "warm", workload)
        for name, chunks in (("batched, a chunk at a time", 1), ("batched, two chunks at once", 2)):
            work = replace(workload, chunks_at_once=chunks)
            seconds, times = annotate.timed_shard(fast, entries, images, folder / name, work)
            add(name, seconds, against=plain, detail=by_stage(times))


def segmenters(report: Report) -> None:
    """SAM 3 against Grounding DINO and SAM, by the number of phrases, which are given; about a region a phrase."""
    import annotate

    from patch_aligned.annotate.manifest import list_images
    from patch_aligned.annotate.options import Workload

    count, numbers = (2, (2, 20)) if report.is_tiny else (32, (4, 16, 64))
    names = [f"thing {number}" for number in range(max(numbers))]
    baselines: dict[int, Row] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        annotate.write_scenes(folder / "scenes", count)
        entries, images = list_images(folder / "scenes")
        for name in ("plain: Grounding DINO and SAM", "SAM 3"):
            segmenter: Any
            if name == "SAM 3":
                segmenter = annotate.busy_sam3(report.device, report.is_tiny, names)
            elif report.is_tiny:
                segmenter = annotate.tiny_boxes(folder / "models")
            else:
                segmenter = annotate.busy_boxes(report.device, names)
            for number in numbers:
                stages = annotate.given_phrases(segmenter, names[:number])
                annotate.timed_shard(stages, entries[:2], images, folder / f"warm {name} {number}", Workload())
                report.peak_gib()  # what came before does not count
                place = folder / f"{name} {number}"
                seconds, times = annotate.timed_shard(stages, entries[:count], images, place, Workload())
                title, plain, detail = f"{name}, {number} phrases", baselines.get(number), by_stage(times)
                row = report.measured(title, seconds, count, "images/s", plain, detail=detail)
                baselines.setdefault(number, row)
            del segmenter, stages
            gc.collect()


def by_stage(times: Any) -> str:
    """Milliseconds for each image, by stage."""
    cells = [f"{name} {1000 * taken.seconds / taken.images:.0f}" for name, taken in times.items() if taken.images]
    return f"ms an image: {', '.join(cells)}"


def attention(report: Report) -> None:
    """Causal attention of a layer of 7B with its gradients, in the ways that are installed."""
    import torch
    import torch.nn.functional as F

    batch, length, heads, width = (2, 16, 4, 16) if report.is_tiny else (16, 1024, 32, 128)
    shape = (batch, length, heads, width)
    query, key, value = (
        torch.randn(shape, dtype=torch.bfloat16, device=report.device, requires_grad=True) for _ in range(3)
    )

    def plain(query: Any, key: Any, value: Any) -> Any:
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # -> [B, heads, L, width]
        future = torch.ones(length, length, dtype=torch.bool, device=report.device).triu(1)
        scores = (query @ key.mT / width**0.5).masked_fill(future, -torch.inf)  # [B, heads, L, L]
        return (scores.softmax(dim=-1, dtype=torch.float32).to(value) @ value).transpose(1, 2)

    def fused(query: Any, key: Any, value: Any) -> Any:
        query, key, value = (states.transpose(1, 2) for states in (query, key, value))  # -> [B, heads, L, width]
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2)

    def timed(name: str, attend: Callable[..., Any], against: Row | None = None) -> Row | None:
        def trained() -> None:
            query.grad = key.grad = value.grad = None
            attend(query, key, value).sum().backward()

        with torch.no_grad():
            gap = (attend(query, key, value) - plain(query, key, value)).abs().max().item()
        detail = f"outputs differ by {gap:.0e} at most"
        return report.time(name, trained, batch, "sequences/s", against, repeats=10, flop=flop, detail=detail)

    # Two products forward and four backward, of which the causal mask leaves half.
    flop = 6 * 2 * batch * heads * length**2 * width / 2
    baseline = timed("plain: softmax of all scores", plain)
    timed("torch's scaled_dot_product_attention", fused, baseline)

    from flash_attn import flash_attn_func

    timed("flash-attn", partial(flash_attn_func, causal=True), baseline)


PARTS: dict[str, tuple[Callable[[Report], None], int]] = {
    "tests": (gpu_tests, 60),
    "stage_1": (stage_1, 100),
    "stage_2": (stage_2, 90),
    "vlm_step": (vlm_step, 40),
    "patch_loss": (patch_loss, 30),
    "pursuit": (pursuit, 30),
    "masks": (masks, 20),
    "answering": (answering, 80),
    "annotation": (annotation, 90),
    "segmenters": (segmenters, 60),
    "attention": (attention, 20),
}
"""What measures, and its share of the time: its seconds where all parts run, and more where others leave some over."""
