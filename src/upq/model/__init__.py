"""Hugging Face models: where their parts are, and reading them whole or block by block."""
