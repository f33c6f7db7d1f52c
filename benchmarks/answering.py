"""Answers a second of the one generation loop, against upstream's loop of one question at a time on the same weights.

    python benchmarks/answering.py                                        # the miniature's LLM, a random projector
    python benchmarks/answering.py --model-path checkpoints/llava-mini-patchaligned
    python benchmarks/answering.py --one-an-image                         # nothing to share between questions
    python benchmarks/answering.py --shape 7b --device cuda               # random weights at LLaVA-1.5-7B's size

Questions are the miniature's held-out ones, in their order: five or six in a row are about one image, as in POPE, GQA
or VQAv2. Ratios come first. In float32 the texts must be equal in all runs; in half precision, where the order of a sum
decides near ties, the share of equal texts is printed.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
from measured_models import MODELS, ROOT, miniature_model, random_model
from transformers import AutoTokenizer

from llava.conversation import Conversation, conv_templates
from llava.eval.answering import GenerationSettings, Question, answer_questions, prompt_of
from llava.eval.vqa_files import vqa_questions
from llava.mm_utils import load_rgb_image, process_images, tokenizer_image_token
from llava.model.builder import LoadedModel, load_pretrained_model

SCENES = ROOT / "playground/data/mini/heldout"
TEMPLATE = "chatml_direct"
TARGET = {"cpu": 2.0, "cuda": 5.0}


def miniature(device: str) -> LoadedModel:
    """The miniature's LLM and tower with a projector of random weights."""
    flags = f"--version {TEMPLATE} --image_aspect_ratio pad --data_path {SCENES}/instruct.json --image_folder {SCENES}"
    with tempfile.TemporaryDirectory() as output_dir:
        tokenizer, model, *_ = miniature_model(flags, output_dir)
    model.to(device).eval()
    return LoadedModel(tokenizer, model, model.get_vision_tower().image_processor, 2048)


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


def timed(run: Callable[[], list[str]], device: str) -> tuple[list[str], float]:
    """What a run returns, and its seconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    texts = run()
    return texts, time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the ratios, then the times they come from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-path", help="a checkpoint of stage 2 to use instead")
    parser.add_argument("--shape", choices=("mini", "7b"), default="mini")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--one-an-image", action="store_true", help="only the first question about each image")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--workers", type=int, default=4)
    args = parser.parse_args(arguments)
    for path in (MODELS / "smollm2-135m-instruct", SCENES / "questions.jsonl"):
        if not path.exists():
            raise SystemExit(f"No {path}; next: bash scripts/prepare_mini.sh")

    if args.model_path:
        loaded = load_pretrained_model(args.model_path, None, "", device=args.device)
    else:
        loaded = miniature(args.device) if args.shape == "mini" else seven_billion(args.device)
    template = conv_templates[getattr(loaded.model.config, "conversation_version", TEMPLATE)]
    questions = vqa_questions(SCENES / "questions.jsonl", SCENES)
    if args.one_an_image:
        questions = list({question.images: question for question in reversed(questions)}.values())[::-1]
    questions = questions[: args.questions]
    settings = GenerationSettings(max_new_tokens=args.max_new_tokens)

    def batched(batch_size: int, asked: Sequence[Question]) -> list[str]:
        answers = answer_questions(asked, *loaded[:3], template, settings, batch_size=batch_size, workers=args.workers)
        return [answer.text for answer in answers]

    batched(1, questions[:2])  # warms up
    expected, upstream_s = timed(lambda: one_by_one(questions, loaded, template, args.max_new_tokens), args.device)
    print(f"{'batch':>5}  {'against one by one':>18}  {'answers/s':>9}  {'equal texts':>11}")
    for size in args.batch_sizes:
        texts, seconds = timed(lambda size=size: batched(size, questions), args.device)  # type: ignore[misc]
        equal = sum(ours == theirs for ours, theirs in zip(texts, expected, strict=True))
        ratio = f"{upstream_s / seconds:.2f}x"
        print(f"{size:>5}  {ratio:>18}  {len(questions) / seconds:>9.2f}  {equal:>5} of {len(questions)}", flush=True)
        if loaded.model.dtype == torch.float32 and equal < len(questions):
            raise SystemExit(
                f"batch {size}: {len(questions) - equal} texts differ from those of one question at a time"
            )
    images = len({question.images for question in questions})
    print(f"one by one: {len(questions) / upstream_s:.2f} answers/s; target at 16: {TARGET[args.device]}x")
    print(
        f"{len(questions)} questions about {images} images, up to {args.max_new_tokens} new tokens; "
        f"{args.model_path or args.shape} on {args.device}, {loaded.model.dtype}, {torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
