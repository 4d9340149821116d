"""Rows: which token each row of a tensor is, and which rows of two programs are the same. Pure.

tokens    `grafter.Tokens`: rows as stretches of positions of sequences
hashes    a sequence known by its token ids, where ids of sequences mean nothing to the other program
pairing   which sequences are the same
matching  which rows are the same, by stretches
windows   which rows count, by absolute position: `start=`, `new_rows_only=`
"""
