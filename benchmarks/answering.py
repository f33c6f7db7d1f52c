"""Answers a second of the one generation loop, against upstream's loop of one question at a time and against
transformers' own LLaVA (`llava-convert to-hf`), on the same weights.

    python benchmarks/answering.py                                        # the miniature's LLM, a random projector
    python benchmarks/answering.py --model-path checkpoints/llava-mini-patchaligned
    python benchmarks/answering.py --one-an-image                         # nothing to share between questions
    python benchmarks/answering.py --shape 7b --device cuda               # random weights at LLaVA-1.5-7B's size

Questions are the miniature's held-out ones, in their order: five or six in a row are about one image, as in POPE, GQA
or VQAv2. All sides answer in turn, `--repeats` times. Ratios, of the times of one round, come first: the median, and
the least and the greatest. In float32 the texts must be equal in all runs; in half precision, where the order of a sum
decides near ties, the share of equal texts is printed.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measured_models import MODELS, ROOT, keep_layers, miniature_model, random_model, ratio_and_spread, seconds_in_turn
from measuring import command_line, require_miniature
from transformers import AutoProcessor, AutoTokenizer, LlavaForConditionalGeneration

from llava.conversation import Conversation, conv_templates
from llava.convert.to_hf import to_hf
from llava.eval.answering import GenerationSettings, Question, answer_questions, prompt_of
from llava.eval.vqa_files import vqa_questions
from llava.mm_utils import load_rgb_image, process_images, tokenizer_image_token
from llava.model.builder import LoadedModel, load_pretrained_model

SCENES = ROOT / "playground/data/mini/heldout"
TEMPLATE = "chatml_direct"


def miniature(device: str) -> LoadedModel:
    """The miniature's LLM and tower with a projector of random weights."""
    flags = f"--version {TEMPLATE} --image_aspect_ratio pad --data_path {SCENES}/instruct.json --image_folder {SCENES}"
    with tempfile.TemporaryDirectory() as output_dir:
        tokenizer, model, *_ = miniature_model(flags, output_dir)
    model.to(device).eval()
    return LoadedModel(tokenizer, model, model.get_vision_tower().image_processor, 2048)


def save_miniature(folder: Path, layers: int | None) -> str:
    """Write the miniature to a folder, and return its path."""
    tokenizer, model, *_ = miniature("cpu")
    keep_layers(model, layers)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def seven_billion(device: str) -> LoadedModel:
    """LLaVA-1.5-7B's shape with random weights in bfloat16, and the miniature's words."""
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "smollm2-135m-instruct")
    model = random_model("7b", device, vocab_size=len(tokenizer), image_aspect_ratio="pad")
    return LoadedModel(tokenizer, model.eval(), model.get_vision_tower().image_processor, 2048)


def one_by_one(
    questions: Sequence[Question], loaded: LoadedModel, template: Conversation, max_new_tokens: int
) -> list[str]:
    """Upstream's loop: read an image, process it, generate, next question."""
    tokenizer, model, image_processor, _ = loaded
    texts = []
    for question in questions:
        ids = tokenizer_image_token(prompt_of(question, template), tokenizer, return_tensors="pt")
        image = load_rgb_image(question.images[0])  # type: ignore[arg-type]
        pixels = process_images([image], image_processor, model.config)[0]
        with torch.inference_mode():
            new_ids = model.generate(
                ids[None].to(model.device),  # type: ignore[call-overload]
                images=pixels[None].to(model.device, model.dtype),
                image_sizes=[image.size],
                do_sample=False,
                num_beams=1,
                max_new_tokens=max_new_tokens,
                use_cache=True,
            )
        texts.append(tokenizer.batch_decode(new_ids, skip_special_tokens=True)[0].strip())
    return texts


def of_transformers(
    questions: Sequence[Question], model: Any, processor: Any, batch_size: int, new_tokens: int
) -> list[str]:
    """transformers' own LLaVA as its documentation shows it, in batches in the order of the questions."""
    texts = []
    for start in range(0, len(questions), batch_size):
        asked = questions[start : start + batch_size]
        contents = [[{"type": "image"}, {"type": "text", "text": question.text}] for question in asked]
        prompts = [processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
                   for content in contents]  # fmt: skip
        images = [load_rgb_image(question.images[0]) for question in asked]  # type: ignore[arg-type]
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**inputs.to(model.device, model.dtype), do_sample=False, max_new_tokens=new_tokens)
        new_ids = ids[:, inputs["input_ids"].shape[1] :]
        texts += [text.strip() for text in processor.batch_decode(new_ids, skip_special_tokens=True)]
    return texts


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the ratios, then the times they come from."""
    parser = command_line(__doc__)
    parser.add_argument("--model-path", help="a checkpoint of stage 2 to use instead")
    parser.add_argument("--shape", choices=("mini", "7b"), default="mini")
    parser.add_argument("--layers", type=int, help="of the miniature's LLM, for a quick look")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--one-an-image", action="store_true", help="only the first question about each image")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="the first is that of the baselines")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args(arguments)
    require_miniature(MODELS / "smollm2-135m-instruct", SCENES / "questions.jsonl")

    questions = vqa_questions(SCENES / "questions.jsonl", SCENES)
    if args.one_an_image:
        questions = list({question.images: question for question in reversed(questions)}.values())[::-1]
    questions = questions[: args.questions]
    settings = GenerationSettings(max_new_tokens=args.max_new_tokens)
    sides: dict[str, Callable[[], list[str]]] = {}

    def add_ours(loaded: LoadedModel) -> None:
        model = loaded.model
        template = conv_templates[getattr(model.config, "conversation_version", TEMPLATE)]
        dtype = str(model.dtype).removeprefix("torch.")
        if not sides:
            sides["one by one"] = lambda: one_by_one(questions, loaded, template, args.max_new_tokens)

        def batched(size: int) -> list[str]:
            answers = answer_questions(
                questions, *loaded[:3], template, settings, batch_size=size, workers=args.workers
            )
            return [answer.text for answer in answers]

        for size in args.batch_sizes:
            sides[f"{size} at once, {dtype}"] = partial(batched, size)

    with tempfile.TemporaryDirectory() as name:
        if args.shape == "7b":
            add_ours(seven_billion(args.device))
        else:
            source = args.model_path or save_miniature(Path(name, "checkpoint"), args.layers)
            for dtype in args.dtypes:
                add_ours(load_pretrained_model(source, None, "", device=args.device, dtype=dtype))
            to_hf(source, Path(name, "hf"), dtype=args.dtypes[0])
            processor = AutoProcessor.from_pretrained(Path(name, "hf"), backend="pil")
            theirs = LlavaForConditionalGeneration.from_pretrained(Path(name, "hf"), dtype=args.dtypes[0])
            theirs = theirs.to(args.device).eval()
            for size in dict.fromkeys((args.batch_sizes[0], args.batch_sizes[-1])):
                run = partial(of_transformers, questions, theirs, processor, size, args.max_new_tokens)
                sides[f"transformers, {size} at once, {args.dtypes[0]}"] = run
        texts: dict[str, list[str]] = {}
        seconds = seconds_in_turn(
            {side: lambda side=side, run=run: texts.update({side: run()}) for side, run in sides.items()},  # type: ignore[misc]
            args.repeats,
            args.device,
        )

    print(f"{'':<36}  {'against one by one':>20}  {'answers/s':>9}  {'equal texts':>11}")
    for side, own in seconds.items():
        equal = sum(ours == theirs for ours, theirs in zip(texts[side], texts["one by one"], strict=True))
        rate = len(questions) / statistics.median(own)
        ratio = ratio_and_spread(seconds["one by one"], own)
        print(f"{side:<36}  {ratio:>20}  {rate:>9.2f}  {equal:>5} of {len(questions)}", flush=True)
        if "16" not in args.dtypes[0] and "float16" not in side and equal < len(questions):
            raise SystemExit(f"{side}: {len(questions) - equal} texts differ from those of one question at a time")
    images = len({question.images for question in questions})
    print(
        f"{len(questions)} questions about {images} images, up to {args.max_new_tokens} new tokens, {args.repeats} "
        f"rounds; {args.model_path or args.shape} on {args.device}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
