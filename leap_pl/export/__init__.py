"""Export a sparse model as a Hugging Face folder."""
