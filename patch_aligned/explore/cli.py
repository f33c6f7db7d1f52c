"""The command `patch-aligned explore`."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from llava.command import clear_errors

app = typer.Typer(rich_markup_mode="markdown")
Text: TypeAlias = str | None
File: TypeAlias = Path | None


@app.command(epilog="What the page shows, and how to reach it from another machine: docs/explore.md.")
@clear_errors
def explore(
    context: typer.Context,
    model: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL_OR_PROJECTOR...",
            help="NAME=PATH, or PATH alone, which is named after its folder. PATH is an --output_dir of stage 1, an "
            "mm_projector.bin, a full checkpoint, a model of transformers (folder or hub name), or `random[:SEED]`.",
        ),
    ],
    data: Annotated[File, typer.Option(metavar="PAD", help="Images to look through; their labels give an IoU.")] = None,
    image_folder: Annotated[File, typer.Option(metavar="DIR", help="Folder that the ids of --data are below.")] = None,
    base: Annotated[
        Text, typer.Option(metavar="LLM", help="Gives LLaVA's projectors words: folder or hub name.")
    ] = None,
    vision_tower: Annotated[Text, typer.Option(metavar="PATH", help="Default: as in the projectors' configs.")] = None,
    image_aspect_ratio: Annotated[
        Literal["square", "pad"] | None, typer.Option(help="How images are made square. Default: as in the configs.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=50, help="Words of a token or region.")] = 5,
    device: Annotated[str, typer.Option(help="Where towers, projectors and pursuit run: `cpu`, `cuda` ...")] = "cpu",
    host: Annotated[
        str, typer.Option(help="Address under which browsers reach the page, without a password.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8300,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Play with what visual tokens mean, in a browser: click a token for its words, type a word for its map.

    Models stand side by side, each on its own grid over an image of yours or of `--data`. Brush a region for the words
    of its mean token, or subtract one checkpoint's map from another's. The page loads nothing from elsewhere.

    Example:

    `patch-aligned explore captions=runs/captions ours=runs/patch --base models/vicuna-7b-v1.5
    --data pad.jsonl --image-folder images --open`
    """
    if (data is None) != (image_folder is None):
        raise ValueError("Found one of --data and --image-folder; expected both, to look through a set, or neither.")
    if data is not None and not data.is_file():
        raise FileNotFoundError(f"--data {data}: there is no such file.")
    if image_folder is not None and not image_folder.is_dir():
        raise FileNotFoundError(f"--image-folder {image_folder}: there is no such folder.")
    from patch_aligned.web import listen, run_server

    listener = listen(host, port)

    from rich.console import Console
    from transformers.utils import logging as transformers_logging

    from patch_aligned.explore.app import create_app
    from patch_aligned.explore.session import Session
    from patch_aligned.models.load import load_models
    from patch_aligned.pad import open_annotation_index

    console = Console(markup=False)
    transformers_logging.disable_progress_bar()
    with console.status("Loading"):
        index = None if data is None else open_annotation_index(data)
        models = load_models([named(one) for one in model], base, vision_tower, image_aspect_ratio, device)
        application = create_app(
            Session(models, index, image_folder or Path(), rounds), (host, "127.0.0.1", "localhost")
        )
    if index is not None and index.rejected:
        console.print(index.rejection_message(), soft_wrap=True)
    address = f"http://{host}:{listener.getsockname()[1]}/"
    console.print(f"Explore {', '.join(one.name for one in models)}: {address} (Ctrl-C ends)", soft_wrap=True)
    if open_browser:
        webbrowser.open(address)
    run_server(application, listener)


def named(specification: str) -> str:
    """Return NAME=PATH; a path alone is named after its folder, or the folder of its file."""
    path = Path(specification)
    if "=" in specification and not path.exists():
        return specification
    return f"{(path.parent if path.is_file() else path).resolve().name}={specification}"
