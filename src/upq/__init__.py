"""UPQ: instruction-tuned language models in 2 bits a weight."""

__version__ = "0.1.0"
