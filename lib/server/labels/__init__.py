"""How labels enter and leave the server."""
