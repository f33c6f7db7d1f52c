"""Train LLaVA with flash attention if it can be used, else with torch's own attention."""

import runpy
from pathlib import Path

own_packages = runpy.run_path(str(Path(__file__).parents[1] / "own_packages.py"))
own_packages["require_own_packages"]("llava")  # started by its path, this file alone is sure to be ours

from llava.command import errors_as_sentences  # noqa: E402
from llava.train.flags import check_command_line  # noqa: E402

if __name__ == "__main__":
    check_command_line()  # before the import below, which takes seconds

from llava.train.train import train  # noqa: E402

if __name__ == "__main__":
    with errors_as_sentences():
        train(attn_implementation="flash_attention_2")
