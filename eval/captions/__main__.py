"""The command `python -m eval.captions`."""

from eval.captions.run import app

if __name__ == "__main__":
    app()
