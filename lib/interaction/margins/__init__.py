"""Clicks on an automatic mask of which the network's logit margins are known."""
