"""Self-supervised pretraining: a masked autoencoder with the UNETR's encoder (He et al. 2022, arXiv 2111.06377).

Three quarters of a window's patches are masked, and the network learns to reconstruct them from the rest. The resulting
encoder initialises ``python -m lib.trainers.cli train --encoder``, and the server's first training of a preset.
"""
