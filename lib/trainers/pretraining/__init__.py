"""Learning from images without labels: a masked autoencoder whose encoder is the UNETR's (He et al. 2022).

Three quarters of a window's patches are hidden, and the network learns to draw them from the rest. What it learns is
where ``python -m lib.trainers.cli train --encoder`` starts, and the server's first training of a preset.
"""
