"""UPQ: instruction-tuned language models in 2 bits a weight."""

__version__ = "0.1.0"

from upq.cli.quiet import quiet_import

with quiet_import():
    from upq.artifact.transformers import load  # importing hf registers the format with transformers

__all__ = ["__version__", "load"]
