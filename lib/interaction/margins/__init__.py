"""What clicks change where an automatic mask is in margins."""
