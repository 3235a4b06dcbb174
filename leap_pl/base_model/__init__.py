"""Load the base model, and find, name and fingerprint its weights."""
