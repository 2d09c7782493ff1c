"""Make vision transformers safe to quantise: the float model is rewritten, and computes what it did."""
