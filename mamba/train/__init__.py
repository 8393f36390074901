"""Training.

tasks, corpus: where batches come from.   loop: the training loop, with metrics, saves and devices.
optimizer: AdamW as it is used for Mamba.   experiment: one run on a task.   presets: the settings
of the book's experiments.   ablation: the block in which some of Δ, B and C do not depend on the
input.   results: the JSON that describes a run.   ``python -m mamba.train`` runs the presets.
"""
