"""Tokens: which token each row of a tensor is, and which rows of two programs are the same. Pure.

tokens     `grafter.Tokens`: the rows of a tensor as runs of positions of sequences
runs       runs as arrays: read from what users give, joined, checked, cut
sequences  which sequences of two programs are the same: by id, else by hashes of their token ids
matching   which rows of two tensors are the same
"""
