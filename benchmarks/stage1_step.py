"""What the patch loss costs in a step of stage 1, and what computing logits at supervised positions alone saves.

    python benchmarks/stage1_step.py                                    # the miniature, on CPU
    python benchmarks/stage1_step.py --shape 7b --device cuda           # random weights at the size of LLaVA-1.5-7B

Ratios come first: time inside the plugin (forward and backward) over the time of the step, and the time of a step with
logits at all positions over that of a step as it is.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from measured_models import MODELS, ROOT, loss_of_all_logits, miniature_model, random_batch, random_model, to_device
from measuring import command_line, median_seconds, require_miniature
from torch import Tensor

from llava.plugin import AlignmentContext, AuxiliaryOutput
from llava.train.assemble import make_data
from patch_aligned.train.arguments import PatchArguments
from patch_aligned.train.objective import PatchObjective
from patch_aligned.train.plugin import PatchAlignedPlugin

SCENES = ROOT / "playground/data/mini/train"


class WatchedPlugin(PatchAlignedPlugin):
    """Keeps what it was shown last, so that its work can be repeated alone."""

    shown: tuple[AlignmentContext, Any]

    def auxiliary_losses(self, context: AlignmentContext, batch: Any) -> AuxiliaryOutput:
        """As the plugin's own."""
        self.shown = context, batch
        return super().auxiliary_losses(context, batch)


def miniature(batch_size: int) -> tuple[Any, WatchedPlugin, dict[str, Any]]:
    """Model, plugin and first batch of `PRESET=mini bash scripts/v1_5/pretrain_patchaligned.sh`."""
    require_miniature(MODELS / "smollm2-135m-instruct", SCENES / "pad.json")
    flags = (
        f"--version plain --tune_mm_mlp_adapter True --data_path {SCENES}/train.json --image_folder {SCENES} "
        "--lazy_preprocess True --model_max_length 2048"
    )
    with tempfile.TemporaryDirectory() as output_dir:
        tokenizer, model, model_args, data_args, training_args = miniature_model(flags, output_dir)
        plugin = WatchedPlugin()
        plugin.setup(PatchArguments(patch_data_path=str(SCENES / "pad.json")), tokenizer)
        data = make_data(tokenizer, model, model_args, data_args, training_args, plugin)
        batch = data["data_collator"]([data["train_dataset"][i] for i in range(batch_size)])
    return model, plugin, batch


def random_weights(shape: Literal["7b", "tiny"], batch_size: int, device: str) -> tuple[Any, WatchedPlugin, dict]:
    """LLaVA-1.5 with random weights in bfloat16, its projector to be trained, and a batch with regions."""
    model = random_model(shape, device)
    model.requires_grad_(False)
    model.get_model().mm_projector.requires_grad_(True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batch = random_batch(model, batch_size, text_tokens=26, prompt_tokens=2)
    plugin = WatchedPlugin()
    plugin.objective = PatchObjective(PatchArguments(), labels=None, index=None)  # type: ignore[arg-type]  # for the loss alone
    return model, plugin, batch | {"plugin_batch": random_regions(model, batch_size)}


def random_regions(model: Any, batch_size: int) -> dict[str, Tensor]:
    """What the plugin reads of a batch: four regions an image, each covering 20 of 576 visual tokens."""
    regions, visual = 4 * batch_size, model.get_vision_tower().num_patches
    tokens = torch.zeros(regions, visual, dtype=torch.bool)
    tokens[:, visual // 6 : visual // 6 + max(1, visual // 28)] = True
    return {
        "region_row": torch.arange(batch_size).repeat_interleave(4),
        "region_tokens": tokens,
        "view_region": torch.arange(regions),
        "region_label": torch.arange(regions),
        "label_ids": torch.randint(3, model.config.vocab_size, (regions, 3)),
        "label_lengths": torch.full((regions,), 3),
        "counts": torch.zeros(3, dtype=torch.int64),
    }


def plugin_alone(plugin: WatchedPlugin) -> None:
    """Computes the patch loss of what the plugin was shown last, and its gradients."""
    context, batch = plugin.shown
    tokens = context.visual_tokens.detach().requires_grad_()
    loss = PatchAlignedPlugin.auxiliary_losses(plugin, replace(context, visual_tokens=tokens), batch).losses["patch"]
    loss.backward()


def step_of(model: Any, batch: dict[str, Any]) -> Callable[[], None]:
    """A step with the patch loss, forward and backward."""

    def step() -> None:
        output = model(**batch)
        (output.loss + 5 * output.auxiliary_losses["patch"]).backward()
        model.zero_grad()

    return step


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the ratios, then the times they come from."""
    parser = command_line(__doc__)
    parser.add_argument("--shape", choices=("mini", "7b"), default="mini")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(arguments)

    build = miniature if args.shape == "mini" else lambda size: random_weights("7b", size, args.device)
    model, plugin, batch = build(args.batch_size)
    model, batch = model.to(args.device), to_device(batch, args.device)
    model.attach_plugin(plugin)

    step = step_of(model.train(), batch)
    step_s = median_seconds(step, args.repeats, args.device)
    plugin_s = median_seconds(partial(plugin_alone, plugin), 4 * args.repeats, args.device)
    model.supervised_loss = partial(loss_of_all_logits, model)
    full_s = median_seconds(step, args.repeats, args.device)
    regions = len(plugin.shown[1]["region_row"])
    print(f"plugin / step                    {plugin_s / step_s:.2%}")
    print(f"step with all logits / step      {full_s / step_s:.2f}x")
    print(f"step {step_s:.3f} s, plugin {plugin_s * 1e3:.2f} ms, step with all logits {full_s:.3f} s")
    print(
        f"{args.shape} on {args.device}: batch {args.batch_size}, {regions} regions, forward and backward, no optimizer"
    )


if __name__ == "__main__":
    main()
