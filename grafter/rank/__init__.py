"""Rank: one live rank put together. The `Grafter`, automatic attaching, and ranks that play a recording."""
