"""Between text and a model: its tokenizer, and how it generates."""
