"""Tools for those who try out or work on the miner; nothing of the miner itself imports them."""
