"""The model folder's own chat template compared with ours, by ids."""
