"""Checkpoints: weights on disk, in every form in which Mamba models are published.

files: safetensors, shards, JSON, and writing safely.   torch_bin, torch_zip: PyTorch's format.
names: how a checkpoint names sizes and tensors.   hub: local folders and the Hugging Face Hub.
load, save: a checkpoint -> parameters, and back.   tensors: what all of these share.
"""
