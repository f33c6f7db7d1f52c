"""`models.base` for every family of transformers that `tokens.PROJECTORS` names. A family needs no code of its own.

Only vision tower and projector are loaded; the LLM's layers are neither built nor read. Images are encoded one at a
time, each as its processor has it, tiles included.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import MODEL_MAPPING, AutoConfig, AutoImageProcessor, AutoProcessor, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from llava.checkpoint_files import may_be_hub_name
from patch_aligned.cells import Layout
from patch_aligned.models.base import Encoded, VisionLanguageModel
from patch_aligned.models.layouts import layouts_of
from patch_aligned.models.llava import lazy_tensors, load_words, read_config
from patch_aligned.models.tokens import PROJECTORS, image_inputs, image_token_id, visual_tokens
from patch_aligned.models.whole import TransformersSource


def is_of_transformers(place: str) -> bool:
    """Whether a folder or hub name is a model of transformers, rather than one of LLaVA's own checkpoints.

    Raises:
        FileNotFoundError: it looks like a hub name, and the hub does not give its config.
        ValueError: its family is unknown, or its config.json is broken.
    """
    if (file := Path(place, "config.json")).is_file():
        config = read_config(file)
    elif not may_be_hub_name(place):
        return False
    else:
        try:
            config, _ = PreTrainedConfig.get_config_dict(place)
        except OSError as error:
            raise FileNotFoundError(
                f"--projector: there is no folder {place}, and no model of this name can be fetched from the hub: "
                f"{str(error).splitlines()[0]} Pass an --output_dir of stage 1, the folder of a model, or a hub name."
            ) from error
    if not {"text_config", "vision_config"} & config.keys():  # LLaVA's own may have model_type `llava` too
        return False
    if (model_type := config.get("model_type")) not in PROJECTORS:
        raise ValueError(
            f"{place}: config.json says model_type {model_type!r}; expected one of {', '.join(PROJECTORS)}. To add a "
            "family whose tokens have a place, add its projector to PROJECTORS in patch_aligned/models/tokens.py."
        )
    return True


def load_transformers(name: str, place: str, device: str = "cpu") -> VisionLanguageModel:
    """Load a model (folder or hub name) up to its projector, in float32, and its word embeddings.

    Of sharded weights only the files with tower, projector and words are opened.

    Raises:
        ValueError: weights are missing, or the tokens have no place.
    """
    encoder = TransformersEncoder(place, device)
    projector, words = encoder.projector, load_words(place, placeholder=image_token_id(encoder.config))
    language = TransformersSource(place, device)
    return VisionLanguageModel(name, place, encoder, projector, words, projector.untrained, language)


class TransformersEncoder:
    """The vision tower of a model of transformers, with its processor and its trained projector."""

    takes_batches = False

    def __init__(self, place: str, device: str = "cpu"):
        self.name, self.device, self.config = place, device, AutoConfig.from_pretrained(place)
        self.processor = AutoProcessor.from_pretrained(place)
        # On PIL where it can be, as in LLaVA: pixels are those that most models were trained with.
        self.processor.image_processor = AutoImageProcessor.from_pretrained(place, backend="pil")
        self.image_aspect_ratio = type(self.processor.image_processor).__name__  # it resizes and tiles images
        layouts_of(self.processor, [(64, 64)])
        self.projector = InnerProjector(_without_language_model(place, self.config).to(device))

    def encode(self, images: Sequence[Image.Image]) -> Encoded:
        """Run the tower on one RGB image."""
        [image] = images
        inputs = image_inputs(self.processor, [[image]]).to(self.device)
        features, outputs = self.projector.record(inputs)
        return Encoded(features, lambda projector: [projector(inputs, outputs)])

    def layout(self, image_wh: tuple[int, int], tokens: int) -> Layout:
        """Return the layout of the visual tokens of an image of this size."""
        [layout] = layouts_of(self.processor, [image_wh])
        if layout.length != tokens:
            raise ValueError(
                f"{self.name}: found {tokens} visual tokens of an image of {image_wh} pixels, expected {layout.length} "
                "by its processor. Processor and weights do not belong together: copy both from one model."
            )
        return layout


Outputs = dict[str, list[Any]]
"""What modules of the tower return, call by call, by their names."""


class InnerProjector(nn.Module):
    """The projector of a model, run where it stands: often between modules of the tower, and in several places.

    Whatever the tower does before the first of the projector's modules is called is the same for every projector. It is
    recorded once, and replayed for the others.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.model = model.eval()
        self._names = PROJECTORS[model.config.model_type]

    @torch.no_grad()
    def record(self, inputs: Any) -> tuple[Tensor, Outputs]:
        """Run the model. Returns the projector's input `[..., d]`, and what the tower returned before it."""
        outputs: Outputs = {name: [] for name in self._tower(self.model)}
        features: list[Tensor] = []
        own = [module for name, module in self.model.named_modules() if self._is_inside(name)]
        was_called = False

        def keep(name: str) -> Any:
            return lambda module, args, output: None if was_called else outputs[name].append(_own(output))

        def note_call(module: nn.Module, args: Any) -> None:
            nonlocal was_called
            was_called = True

        def read(module: nn.Module, args: Any, kwargs: Any) -> None:
            features.append(next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)))

        handles = [self.model.get_submodule(name).register_forward_hook(keep(name)) for name in outputs]
        handles += [module.register_forward_pre_hook(note_call) for module in own]
        first = self.model.get_submodule(self._names[0])
        handles.append(first.register_forward_pre_hook(read, with_kwargs=True))
        try:
            visual_tokens(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in features]), outputs

    def forward(self, inputs: Any, outputs: Outputs) -> Tensor:
        """Compute the visual tokens of an image, `[T, D]`."""
        with _replayed(self.model, outputs):
            return visual_tokens(self.model, inputs)

    def untrained(self) -> InnerProjector:
        """Return a copy that shares the tower. The projector's weights are drawn as the model itself initialises them.

        Matrices that this leaves at zero, such as Gemma 3's, are drawn from a normal distribution of the width that the
        config names: tokens that are all zero have neither entropy nor direction.
        """
        tensors = (*self.model.named_parameters(), *self.model.named_buffers())
        shared = {id(tensor): tensor for name, tensor in tensors if not self._is_inside(name)}
        twin = copy.deepcopy(self.model, shared)
        drawn = [parameter for name, parameter in twin.named_parameters() if self._is_inside(name)]
        for parameter in drawn:
            parameter.data = parameter.data.cpu()  # the same weights on every device
        for name, module in twin.named_modules():
            if self._is_inside(name) or any(own.rpartition(".")[0] == name for own in self._names):
                module._is_hf_initialized = False
        twin.initialize_weights()
        std = getattr(twin.config.get_text_config(), "initializer_range", None) or 0.02
        for parameter in drawn:
            if parameter.ndim > 1 and not parameter.any():
                nn.init.normal_(parameter, std=std)
        return InnerProjector(twin)

    def _is_inside(self, name: str) -> bool:
        return any(name == own or name.startswith(f"{own}.") for own in self._names)

    def _tower(self, module: nn.Module, prefix: str = "") -> Iterator[str]:
        """Yield the names of the largest modules that hold no part of the projector."""
        for name, child in module.named_children():
            name = prefix + name
            if any(own.startswith(f"{name}.") for own in self._names) or isinstance(child, nn.ModuleList):
                yield from self._tower(child, f"{name}.")
            elif not self._is_inside(name):
                yield name


@contextmanager
def _replayed(model: nn.Module, outputs: Outputs) -> Iterator[None]:
    """Let modules return what was recorded, as often as it was; then they run again."""

    def replay(module: nn.Module, recorded: deque[Any]) -> Any:
        run = module.forward
        return lambda *args, **kwargs: _own(recorded.popleft()) if recorded else run(*args, **kwargs)

    modules = [(model.get_submodule(name), deque(recorded)) for name, recorded in outputs.items() if recorded]
    for module, recorded in modules:
        module.forward = replay(module, recorded)
    try:
        yield
    finally:
        for module, _ in modules:
            del module.forward


def _own(output: Any) -> Any:
    """Copy an output with fields, to which models write their own later."""
    return copy.copy(output) if isinstance(output, dict) else output


def _without_language_model(place: str, config: Any) -> Any:
    """Load a model whose LLM is nothing. Weights are read by the names that transformers maps to those of the model."""
    known: Any = MODEL_MAPPING[type(config)]

    def init(self: Any, config: Any) -> None:
        known.__init__(self, config)
        for unused in (self.get_decoder(), self.get_encoder(modality="audio")):
            if unused not in (None, self):
                self.set_submodule(next(name for name, part in self.named_modules() if part is unused), nn.Identity())

    cut: Any = type(known.__name__, (known,), {"__init__": init, "__module__": known.__module__})
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # else it lists all layers that are skipped on purpose
    try:
        model, report = cut.from_pretrained(
            None, config=config, state_dict=lazy_tensors(place), dtype=torch.float32, output_loading_info=True
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{place}: the checkpoint lacks {len(missing)} weights of a {config.model_type}, such as {missing[0]!r}, "
            "so the tower or projector is incomplete. Pass the folder of a complete model."
        )
    return model
